"""Is a model's response to a push linear, and up to which strength?

At a layer, fixed random directions are added to the chosen tokens at +α and −α in units of each state's norm, all
strengths of a layer in one batch resumed from there. The response is what the last token's logits, or its last state,
differ by from the undisturbed row of the same batch. The null is of the same layer: half the distance of the responses
to two independent displacements of one rounding unit of the dtype, below three of which nothing is used. The verdict is
``gate.linear/1``; before it, no exponent and no gain should be quoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import UsageError
from dynprobe.metrics._gate import linear_gate
from dynprobe.probes import Subject, Where, as_subject, capture, resume, tokenize
from dynprobe.probes._inputs import Prompts
from dynprobe.probes._noise import gaussian_rows, row_key_from_tokens

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GateResult", "linear_response"]

_ALPHAS = tuple(float(a) for a in np.geomspace(1e-4, 1.0, 17))


@dataclass(frozen=True, eq=False)
class GateResult:
    """Verdicts of the linear-response gate.

    Attributes:
        rows: One entry per prompt and layer.
        points: One entry per prompt, layer and strength.
    """

    rows: tuple[dict[str, Any], ...]
    points: tuple[dict[str, Any], ...]

    def frame(self) -> pd.DataFrame:
        """Return one row per prompt and layer: ``passes``, ``slope``, linear range, ``gain`` = response/α there."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def responses(self) -> pd.DataFrame:
        """Return one row per prompt, layer and strength: ``response``, ``even`` part, ``null``, ``usable``."""
        import pandas as pd

        return pd.DataFrame(list(self.points))


def linear_response(
    model: Subject | nn.Module,
    prompts: Prompts,
    *,
    layers: str = "mid",
    alphas: Sequence[float] = _ALPHAS,
    positions: str = "1:",
    read: str = "logits",
    seed: int = 0,
    chat_template: str = "none",
) -> GateResult:
    """Measure the response to ±α along a fixed direction and decide where it is linear.

    Args:
        model: A subject or a module.
        prompts: Texts or lists of token ids; each is run alone.
        layers: Layers after which is written, in the mini-language.
        alphas: Strengths relative to the norm of each state (``relnorm``), positive.
        positions: Tokens that are written, in the mini-language.
        read: ``"logits"`` or ``"state"`` (depth L) of the last token.
        seed: Seed of the directions.
        chat_template: ``"auto"`` wraps texts as a user turn.

    Returns:
        Verdict per prompt and layer.

    Raises:
        UsageError: If ``read`` is unknown.
        SiteError: If a layer does not exist.
        MetricError: If a strength is not positive or occurs twice.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> result = linear_response(tiny_llama(), [[5, 6, 7, 8]], layers="1")
        >>> row = result.frame().iloc[0]
        >>> bool(row["passes"]), bool(0.9 <= row["slope"] <= 1.1), row["metric_id"]
        (True, True, 'gate.linear/1')
    """
    subject = as_subject(model)
    if read not in ("logits", "state"):
        raise UsageError(f"read={read!r}; it is 'logits' or 'state'")
    where = Where.parse(f"layers={layers},positions={positions}")
    chosen = where.resolve_layers(subject.n_layers)
    strengths = np.sort(np.asarray(alphas, dtype=np.float64))
    linear_gate(strengths, strengths)  # refuses what it cannot use before any forward is run
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for number, row in enumerate(tokenize(subject, prompts, chat_template=chat_template)):
        tape = capture(subject, [row], logits=None)
        mask = where.position_mask(np.arange(len(row)), len(row))
        for layer in chosen:
            plus, minus, null = _responses(tape, row, layer + 1, mask, strengths, read, seed)
            gate = linear_gate(strengths, np.stack([plus, minus], axis=1), null)
            reason = gate.reason if mask.any() else "empty"
            head = {"prompt": number, "row_key": row_key_from_tokens(row), "layer": layer}
            rows.append({
                **head, "model": subject.name, "metric_id": "gate.linear/1", "read": read, "scale": "relnorm",
                "positions": positions, "seed": seed, "dtype": str(subject.state_dtype).removeprefix("torch."),
                "passes": gate.passes, "slope": gate.slope, "alpha_low": gate.low, "alpha_high": gate.high,
                "gain": gate.gain, "null": null, "n": int(gate.usable.sum()), "reason": reason,
            })  # fmt: skip
            points += [
                {**head, "alpha": float(a), "response": float(r), "even": float(e), "null": null, "usable": bool(u)}
                for a, r, e, u in zip(gate.alphas, gate.response, gate.even, gate.usable, strict=True)
            ]
    return GateResult(tuple(rows), tuple(points))


def _responses(
    tape: Any, row: Sequence[int], depth: int, mask: np.ndarray, alphas: np.ndarray, read: str, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Responses to +α and −α ``[n, m]``, and the floor, from one batch."""
    h = tape.states[depth][0]
    norm = torch.linalg.vector_norm(h.double(), dim=-1, keepdim=True)

    def direction(name: str) -> Tensor:
        where = np.where(mask, np.arange(len(row)), -1)[None]
        eps = gaussian_rows(seed, [row_key_from_tokens(row)], f"{name}.depth.{depth}", where, h.shape[-1])[0]
        noise = torch.from_numpy(eps.astype(np.float64)).to(h.device)
        return norm * noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True).clamp_min(1e-300)

    step, unit = direction("gate"), float(torch.finfo(h.dtype).eps)
    sizes = torch.from_numpy(np.concatenate([alphas, -alphas])).to(h.device)[:, None, None]
    jitter = torch.stack([unit * direction("gate.null.0"), unit * direction("gate.null.1")])
    states = h.double() + torch.cat([sizes * step, jitter, torch.zeros_like(jitter[:1])])
    again = resume(tape, depth, states.to(h.dtype), logits="last" if read == "logits" else None)
    found = again.logits if again.logits is not None else again.states[-1][:, -1]
    values = found.double().cpu().numpy()
    moved = values - values[-1]
    n = len(alphas)
    return moved[:n], moved[n : 2 * n], float(np.linalg.norm(values[2 * n] - values[2 * n + 1]) / 2)
