"""Measure the states of a subject under the convention of its kind.

Transformers leave depth 0 (the embedding) out of metrics and count one vector per position; iterative models keep it,
since it is a state of the loop like any other, and may have slots. The convention stands in every result's extractor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynprobe import metrics
from dynprobe.errors import ModelError
from dynprobe.metrics import Measurement
from dynprobe.probes._subject import Subject

__all__ = ["measure_track"]


def measure_track(
    subject: Subject | None,
    states: Sequence[Tensor],
    mask: Tensor,
    which: Sequence[str],
    *,
    span: Tensor | None = None,
    span_name: str = "all",
    theta: float | None = None,
) -> Measurement:
    """Return the measurement of a track.

    Args:
        subject: Whose states they are; None stands for a plain decoder.
        states: One tensor per depth, ``[batch, pos, dim]`` or ``[batch, pos, slot, dim]``.
        mask: ``[batch, pos]`` real tokens.
        which: Metric ids.
        span: ``[batch, pos]`` tokens of token-axis and set metrics; None means all.
        span_name: What to call it.
        theta: Level of the debts.

    Raises:
        ModelError: If a position of a decoder holds several vectors, of which nobody has said how they are one state.
    """
    loop, device = subject.loop if subject is not None else None, states[0].device
    mask, span = mask.to(device), span.to(device) if span is not None else None
    if loop is None and states[0].dim() > 3:
        raise _several(subject, states[0])
    if loop is None:
        return metrics.measure(states, mask, metrics=which, span=span, debt_theta=theta)
    unit = ",unit=slot" if loop.slots else ""
    extractor = f"embed=1,final_norm=pre,grain=iteration{unit},sink=drop1,span={span_name}"
    if loop.slots:
        return metrics.measure_slots(states, mask, metrics=which, span=span, sink=1, extractor=extractor)
    return metrics.measure(states, mask, metrics=which, span=span, debt_theta=theta, embed=1, extractor=extractor)


def _several(subject: Subject | None, state: Tensor) -> ModelError:
    name, streams = "the model" if subject is None else subject.name, " × ".join(map(str, state.shape[2:-1]))
    return ModelError(
        f"{name} keeps {streams} streams of width {state.shape[-1]} at each position (found states of shape "
        f"{list(state.shape)}), and what is measured here is one vector per position; no number is made of a mixture. "
        "In Python dp.capture(model, rows).states has the streams, and dp.metrics.measure takes one of them "
        "(states[..., i, :]); as the slots of a trajectory they are read by: dynprobe import FILE"
    )
