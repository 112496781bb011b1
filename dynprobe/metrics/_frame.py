"""``frame``: state metrics of a tape as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynprobe.errors import MetricError
from dynprobe.metrics._measure import measure

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frame"]


def frame(ids: Sequence[str] | str, tape: Any, *, reasons: bool = False, **options: Any) -> pd.DataFrame:
    """Compute sample-level metrics of every row of a tape.

    Args:
        ids: Metric ids, with parameters where wanted.
        tape: Anything with ``states`` (indexable by depth, with a length) and ``mask`` [B, T].
        reasons: Also one ``<column>_reason`` per column.
        **options: Passed to :func:`measure` (``embed``, ``sink``, ``span``, ``debt_theta``, ``dtype``).

    Returns:
        One row per batch row, one column per metric; ``frame.attrs["ids"]`` maps columns to exact ids.

    Raises:
        MetricError: An id is unknown or is not computed from states.

    Example:
        >>> import torch, types
        >>> states = [torch.eye(4)[None] * (d + 1) for d in range(3)]
        >>> tape = types.SimpleNamespace(states=states, mask=torch.ones(1, 4, dtype=torch.bool))
        >>> frame(["delta.rel_prev/1"], tape)["delta_rel_prev"].tolist()
        [0.5]
    """
    import pandas as pd

    wanted = [ids] if isinstance(ids, str) else list(ids)
    if any(text.startswith("output.") for text in wanted):
        raise MetricError("frame reads states only; for entropy, margin and NLL use output_metrics(logits, targets).")
    m = measure(tape.states, tape.mask, metrics=wanted, **options)
    table: dict[str, list[Any]] = {}
    for column in m.ids:
        table[column] = [row[column].value for row in m.sample]
        if reasons:
            table[f"{column}_reason"] = [row[column].reason for row in m.sample]
    out = pd.DataFrame(table, index=pd.RangeIndex(len(m.sample), name="row"))
    out.attrs["ids"] = dict(m.ids)
    return out
