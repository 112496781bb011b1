"""The loop through an attractor layer, measured by a kick: does an injection call for further injections?

Let a_t = ‖δ_t‖/‖y_t‖ be the size of the injection at token t. A kick adds η along the injected direction at the last
token of a prompt, and nothing else. The response is S = Σ_{t>t₀} (a'_t − a_t)/η, and where the loop is linear and
stationary its gain is G = S/(1 + S), since the kick comes round again and again: S = G + G² + … .

There are two ways round. *Through the states*, the text held fixed: the injection at block ℓ reaches later tokens only
through blocks above ℓ, and what block ℓ reads was made by the blocks below it. So with ``observe='pre'`` at one block
this way is open in every feed-forward decoder: S is 0, exactly. *Through the text*: the injection changes which token
comes next, and that token is what the layer sees. This is measured with common random numbers: both texts are sampled
with the same noise at every position, so they differ only because of the kick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.controllers import AttractorLayer, Controller, Memory, Seen, Steering
from dynprobe.controllers.attractor import AttractorSite
from dynprobe.errors import UsageError
from dynprobe.metrics.statistics import mean_interval
from dynprobe.probes import Batch, Instrument, Sampling, Site, Subject, generate, make_batch, tokenize
from dynprobe.probes._evaluating import evaluating

__all__ = ["LoopGain", "loop_gain"]


@dataclass(frozen=True)
class LoopGain:
    """The response of the loop to a kick.

    Attributes:
        gain: G = S/(1 + S) of the way through the text; NaN with a reason where it has no meaning.
        response: S, the injections that the kick called for, in units of the kick, mean over texts.
        low: Lower end of its 95 % interval, expanded percentile bootstrap over texts; NaN below three.
        high: Upper end.
        states: S with the text held fixed.
        n: Texts.
        reason: ``no-injection`` where nothing was injected at the kick, ``negative`` where S ≤ −1.
    """

    gain: float
    response: float
    low: float
    high: float
    states: float
    n: int
    reason: str | None = None


class _Kicked(Controller):
    """An attractor site that notes its injections, with a kick at the last token of the prompt."""

    def __init__(self, inner: AttractorSite, kick: float) -> None:
        self.inner, self.kick, self.kicked = inner, kick, False
        self._sizes: list[Tensor] = []
        self._new: list[np.ndarray] = []

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """Those of the layer."""
        return self.inner.sites_of(subject, spec, writing=writing)

    def start(self, n_rows: int) -> Memory:
        """A new text."""
        self._sizes, self._new, self.kicked = [], [], False
        return {}

    def act(self, state: Tensor, site: Site, seen: Seen, memory: Memory) -> Tensor:
        """Inject, note how much, and kick."""
        after = self.inner.act(state, site, seen, memory)
        size, n = state.float().norm(dim=-1), seen.step.n_prompt[:, None]
        self._sizes.append((after.float() - state.float()).norm(dim=-1) / size.clamp_min(1e-12))
        self._new.append(seen.step.positions >= n)
        at = torch.from_numpy(seen.step.positions == n - 1).to(state.device)
        assert self.inner.passed is not None
        field = self.inner.passed.field
        if not bool((at & (field.norm(dim=-1) > 0)).any()):
            return after
        self.kicked = True
        if not self.kick:
            return after
        pushed = (after.float() + self.kick * size[..., None] * field).to(after.dtype)
        return torch.where(at[..., None], pushed, after)

    def total(self) -> np.ndarray:
        """Summed size of the injections at new tokens, of each row."""
        sizes = torch.cat(self._sizes, 1).double().cpu().numpy()
        return np.where(np.concatenate(self._new, 1), sizes, 0.0).sum(1)


def loop_gain(
    subject: Subject, layer: AttractorLayer, texts: Sequence[Any], *, layers: Any = None, kick: float = 1.0,
    horizon: int = 32, samples: int = 8, temperature: float = 1.0, seed: int = 0,
) -> LoopGain:  # fmt: skip
    """Measure the gain of the loop from injection to injection by the response to a kick.

    G = S/(1 + S) with S = E[Σ_{t>t₀} (a'_t − a_t)]/η, both texts sampled with the same noise.

    Args:
        subject: The model.
        layer: The layer with its strength.
        texts: Prompts, or lists of token ids, longer than burn-in; the kick comes at their last token.
        layers: One block; default the middle one.
        kick: η, relative to ‖y‖.
        horizon: Tokens that are written after the kick.
        samples: Texts per prompt.
        temperature: Of sampling, above 0: greedy choice has no response to a small kick.
        seed: Of sampling.

    Returns:
        The gain with its response.

    Raises:
        UsageError: If a setting is wrong, or several blocks are named.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> layer = AttractorLayer(centre="none", strength=0.5, burn_in=2, theta=0.5, theta_read=0.0)
        >>> found = loop_gain(tiny_llama(), layer, [[5, 6, 7, 5, 6, 7]], layers=1, horizon=4, samples=1)
        >>> found.states, found.n
        (0.0, 1)
    """
    if not kick > 0 or temperature <= 0 or horizon < 2 or samples < 1:
        raise UsageError(
            f"kick={kick:g}, temperature={temperature:g}, horizon={horizon}, samples={samples}; a kick and a "
            "temperature are above 0, a horizon is at least 2 tokens, and there is at least one sample"
        )
    if len(layer.sites(subject, layers)) != 1:
        raise UsageError("the loop is measured at one block; name one in layers")
    rows = tokenize(subject, list(texts))
    batch = make_batch(subject, rows, side="left", row_keys=[f"text-{i}" for i in range(len(rows))])
    responses, fed, kicked = np.zeros((samples, len(rows))), [list(row) for row in rows], False
    for sample in range(samples):
        sampling = Sampling(horizon, temperature, 1.0, seed, sample, False)
        totals = []
        for size in (0.0, kick):
            controller = _Kicked(layer.controllers(subject, layers)[0], size)
            steering = Steering(controller, subject)
            new = generate(subject, batch, sampling, Instrument(subject, (), [steering], **batch.rows))
            totals.append(controller.total())
            kicked = kicked or controller.kicked
            if not sample and not size:
                fed = [[*row, *more[:-1]] for row, more in zip(rows, new, strict=True)]
        responses[sample] = (totals[1] - totals[0]) / kick
    if not kicked:
        return LoopGain(math.nan, math.nan, math.nan, math.nan, math.nan, len(rows), "no-injection")
    still = make_batch(subject, fed, row_keys=batch.row_keys, n_prompt=[len(row) for row in rows])
    fixed = [_read(subject, layer, layers, still, size) for size in (0.0, kick)]
    states = float(((fixed[1] - fixed[0]) / kick).mean())
    values = responses.mean(0)
    low, high = mean_interval(values)
    mean = float(values.mean())
    gain, reason = (mean / (1 + mean), None) if mean > -1 else (math.nan, "negative")
    return LoopGain(gain, mean, low, high, states, len(rows), reason)


def _read(subject: Subject, layer: AttractorLayer, layers: Any, batch: Batch, kick: float) -> np.ndarray:
    controller = _Kicked(layer.controllers(subject, layers)[0], kick)
    instrument = Instrument(subject, (), [Steering(controller, subject)], **batch.rows)
    with torch.no_grad(), evaluating(subject.model), instrument:
        subject.model(**batch.model_inputs(subject))
    return controller.total()
