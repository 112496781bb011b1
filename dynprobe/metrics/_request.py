"""Which metrics a run can be asked to store beside the default ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._lists import DEFAULT
from dynprobe.metrics._measure import measure
from dynprobe.metrics._registry import entry, format_id, loaded, measurable, parse_id

__all__ = ["requested"]


def requested(wanted: Iterable[str]) -> tuple[str, ...]:
    """Check ids that a run is to store beside the default ones.

    Args:
        wanted: Metric ids, with parameters where wanted.

    Returns:
        Canonical ids, each once, in the order of the catalogue, without those that are stored anyway.

    Raises:
        MetricError: An id is unknown, is not computed from the states of one run, names an extraction option, or has a
            parameter without meaning.

    Example:
        >>> requested(["id.twonn/1", "erank.rv/1{centre=none}", "kappa.phase/1"])
        ('erank.rv/1', 'id.twonn/1')
    """
    found: dict[str, None] = {}
    for text in wanted:
        parsed = parse_id(text)
        if parsed.extraction:
            raise MetricError(
                f"{text!r} names {', '.join(parsed.extraction)}, which a run decides for all its metrics (--span, and "
                f"embed=0, sink=drop1); write {format_id(parsed.id, parsed.params)!r}."
            )
        full = format_id(parsed.id, parsed.params)
        if full in DEFAULT:
            continue
        if entry(parsed.id).score is None:
            raise MetricError(f"a run cannot be asked for {parsed.id!r}: {_why_not(parsed.id)}")
        _try(full)
        found[full] = None
    order = {name: place for place, name in enumerate(loaded())}
    return tuple(sorted(found, key=lambda full: (order[parse_id(full).id], full)))


def _why_not(metric: str) -> str:
    spec = entry(metric).spec
    if metric.startswith("lens."):
        return "lens metrics come with --lens."
    if "paired" in spec.groups:
        return "it compares two runs; what a run pairs is stored whenever it perturbs, the rest goes through compute."
    return f"its input is {spec.input}. It can be asked for {', '.join(measurable())}."


def _try(metric: str) -> None:
    """Compute it once on a small trajectory, so that a parameter without meaning is refused before a run begins."""
    states = torch.eye(12, dtype=torch.float64)[None] + torch.arange(4.0, dtype=torch.float64)[:, None, None, None]
    measure(list(states), torch.ones(1, 12, dtype=torch.bool), metrics=[metric], debt_theta=1.0)
