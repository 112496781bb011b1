"""``recovery.sampling/1``: no state is changed; what the next token is drawn from is narrowed.

Where the timing is active with gain g, the logits of that forward are divided by 1 − g and then cut to the nucleus of
probability 1 − g. The public texts name a mode that lowers temperature and nucleus without saying by how much; tying
both to the gain in this way is ours. The sampler's own temperature and nucleus come afterwards, so the temperatures
multiply. A forward's gain was decided at the end of the one before, as for every other mode, and the prompt's own
forward, from which the first new token comes, is never narrowed.

Measured logits are those of the model, so its entropy does not fall by construction; that of the text may. Under greedy
decoding the largest logit stays the largest and nothing changes, which ``needs_sampling`` tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.controllers.recovery._mode import Mode
from dynprobe.controllers.recovery._recovery import Timing
from dynprobe.probes import Calibration, Site, Subject

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MODE", "Narrowing", "narrowed"]


def narrowed(logits: Tensor, gain: Tensor) -> Tensor:
    """Logits divided by 1 − g, without what lies outside the nucleus of probability 1 − g.

    The smallest set of tokens whose probabilities under softmax(logits/(1 − g)) reach 1 − g is kept, at least the
    largest one; all others become −∞. g = 0 keeps everything as it is, g = 1 leaves the largest alone.

    Args:
        logits: ``[rows, vocab]``.
        gain: ``[rows]`` in [0, 1].

    Returns:
        ``[rows, vocab]`` in the dtype of ``logits``.

    Source:
        dynprobe (``recovery.sampling/1``).

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> narrowed(logits, torch.tensor([0.5]))
        tensor([[4., -inf, -inf]])
        >>> narrowed(logits, torch.tensor([0.1])).isfinite()
        tensor([[ True,  True, False]])
    """
    keep = 1.0 - gain.to(logits.device, torch.float32)[:, None]
    cooled = logits.float() / torch.where(keep > 0, keep, 1.0)
    ordered, order = cooled.sort(dim=-1, descending=True, stable=True)
    share = ordered.softmax(-1)
    outside = share.cumsum(-1) - share >= keep
    outside[:, 0] = False
    outside = torch.where(keep < 1, outside, False)
    cut = torch.zeros_like(outside).scatter(-1, order, outside)
    return cooled.masked_fill(cut, -torch.inf).to(logits.dtype)


class Narrowing(Controller):
    """Narrow what the next token is drawn from while a timing says so.

    Args:
        timing: When.
        name: Id in tables.
    """

    needs_sampling = True

    def __init__(self, timing: Timing, *, name: str = "recovery.sampling/1") -> None:
        self.id, self.timing = name, timing

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Prepare the timing for a model.

        Raises:
            CalibrationError: If it needs a calibration that is not there.
        """
        self.timing.bind(subject, calibration)

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """What the timing looks at; no state is written."""
        return [] if writing else super().sites_of(subject, self.timing.reads, writing=False)

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows."""
        return {"in_force": np.zeros(n_rows), **self.timing.start(n_rows)}

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Keep the gain that is in force in this forward, and let the timing decide on the next."""
        memory["in_force"] = np.where(memory["active"] & seen.decoding, memory["gain"], 0.0)
        self.timing.decide(seen, memory)

    def choose(
        self, logits: Float[Tensor, "batch pos vocab"], seen: Seen, memory: Memory
    ) -> Float[Tensor, "batch pos vocab"]:
        """Narrow the last column of the rows that are active."""
        rows = torch.from_numpy(np.flatnonzero(memory["in_force"] > 0)).to(logits.device)
        if not len(rows):
            return logits
        gain = torch.from_numpy(memory["in_force"]).to(logits.device)[rows]
        after = logits.clone()
        after[rows, -1] = narrowed(logits[rows, -1], gain)
        return after


#: A narrow nucleus gives likely tokens.
MODE = Mode(lambda timing, site=None, **_: Narrowing(timing()), selects=("nll_bare",))
