"""Where a site's states lie on average, and how alike unrelated tokens are there.

Attention outputs share a large mean: of two unrelated tokens of a small model the median cosine is above 0.5, so that
most tokens would reinforce one slot, whose direction is that mean. Directions are therefore compared after the mean of
clean text is subtracted, and "alike" means more alike than nearly all pairs of tokens.

*How nearly.* A token is compared with every slot, and one match is a hit. Let a pair of unrelated tokens be above θ
with probability q; then a token hits one of M slots that hold unrelated tokens with probability at most M·q, whatever
the dependence between slots (Boole's inequality). So that this is at most 0.1, θ is the quantile 1 − 0.1/M of all
pairs: those of equal tokens, which are no false hits, are among the largest and make θ the stricter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import CalibrationError
from dynprobe.probes import Instrument, Site, Subject, make_batch, tokenize
from dynprobe.probes._evaluating import evaluating
from dynprobe.prompts import load_prompts

__all__ = ["FALSE_HITS", "measure_centre"]

#: Largest share of unrelated tokens that hit one slot or another.
FALSE_HITS = 0.1
_MOST = 2048


def measure_centre(subject: Subject, site: Site, prompts: Any = None, *, slots: int = 1) -> tuple[Tensor, float]:
    """Return the mean of a site's states ``[dim]`` and the quantile 1 − 0.1/M of their pair cosines after centring.

    Args:
        subject: The model.
        site: Component and layer.
        prompts: Texts or lists of token ids; default the built-in calibration prompts.
        slots: M, slots that a token is compared with.

    Raises:
        CalibrationError: If there are fewer than three tokens.
    """
    chosen = [p.text for p in load_prompts(source="calibration")] if prompts is None else prompts
    seen: list[Tensor] = []
    for row in tokenize(subject, chosen):
        batch = make_batch(subject, [row])
        keep = _Keep(site)
        with torch.no_grad(), evaluating(subject.model), Instrument(subject, (), [keep], **batch.rows):
            subject.model(**batch.model_inputs(subject))
        assert keep.state is not None
        seen.append(keep.state[0, 1:])  # position 0 is an attention sink and takes no part, as in every metric
    x = torch.cat(seen).float()
    x = x[x.isfinite().all(-1)]
    if len(x) < 3:
        raise CalibrationError(f"the centre of {site[0]}.{site[1]} needs at least 3 tokens, found {len(x)}")
    mean = x.double().mean(0).float()
    unit = torch.nn.functional.normalize((x - mean)[:_MOST], dim=-1)
    cos = unit @ unit.T
    pairs = cos[torch.triu(torch.ones_like(cos, dtype=torch.bool), diagonal=1)]
    return mean, float(np.quantile(pairs.cpu().numpy(), 1 - FALSE_HITS / max(slots, 1)))


class _Keep:
    """A writer that changes nothing and keeps the state."""

    def __init__(self, site: Site) -> None:
        self.sites = (site,)
        self.state: Tensor | None = None

    def write(self, state: Tensor, site: Site, step: Any) -> Tensor:
        """Keep it."""
        self.state = state.detach().clone()
        return state
