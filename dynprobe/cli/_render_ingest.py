"""What is printed of a trajectory file, and of a run that was made of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynprobe.cli._console import console as new_console

if TYPE_CHECKING:
    from dynprobe.runs import Run, Trajectory

__all__ = ["imported", "imported_export", "trajectory"]

_MODES = {
    "trajectory": "full trajectory",
    "layers": "layers of a Transformer",
    "final_per_depth": "last states of one run per depth (final_per_depth)",
}
_MOST = 6


def trajectory(found: Trajectory) -> None:
    """Print what is in a file and what is missing."""
    console = new_console()
    console.print(f"{found.path}: valid", soft_wrap=True)
    for line in _lines(found.describe()):
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"  next      dynprobe import {found.path}", soft_wrap=True)


def imported(found: Run) -> list[str]:
    """Return the lines that say where an imported run comes from."""
    facts = (found.manifest.model_extra or {}).get("trajectory") or {}
    config, model = found.manifest.config, found.manifest.model if isinstance(found.manifest.model, dict) else {}
    mode = _MODES.get(str(config.get("mode")), config.get("mode"))
    source = model.get("source") or "trajectory file"
    named = f"model     {found.manifest.model_name}, no weights; states of {config.get('file')}"
    lines = [f"imported from {config.get('file')} ({source}: {mode})"]
    lines += [f"{named}, sha256 {str(config.get('sha256'))[:16]}", *(_lines(facts) if facts else [])]
    if len(facts.get("stages") or ()) > 1:
        lines.append(f"samples   speak of track {config.get('track')}; --track NAME takes another")
    return [*lines, *_convergence(found.summary.get("convergence") or {})]


def imported_export(found: Run) -> list[str]:
    """Return the line that says of a run that it came back from an export; empty where it was made here."""
    told = (found.manifest.model_extra or {}).get("imported_from")
    if not isinstance(told, Mapping):
        return []
    name = told.get("name") or "an export"
    return [f"imported from {name} (export of a run, format {told.get('to')}); it cannot be continued here"]


def _convergence(found: Mapping[str, Any]) -> list[str]:
    """The contraction, and after how many iterations each tolerance was met."""
    if not found:
        return []
    rho, rules = found.get("converge_rho"), {k: v for k, v in found.items() if isinstance(v, Mapping)}
    lines = [
        "converge  " + ("no contraction estimate" if rho is None else f"contraction {rho:.4g} per update (median)")
    ]
    for name, rule in rules.items():
        known = rule["reached"] + rule["censored"]
        if known:
            median = rule["median"]
            said = "not reached by half" if median is None else f"{median:g} iterations"
            lines.append(f"          {name}: {said}, {rule['reached']} of {known} samples")
    return lines


def _lines(facts: Mapping[str, Any]) -> list[str]:
    dims: Mapping[str, int] = facts["dims"]
    given = set(facts["dims_in_file"])
    words = {"iter": "layer"} if facts["mode"] == "layers" else {}
    shape = " × ".join(f"{size} {words.get(axis, axis)}" for axis, size in dims.items() if axis in given or size > 1)
    lines = [f"states    {shape}, {facts['dtype']}, {_MODES.get(facts['mode'], facts['mode'])}"]
    word = "iteration" if facts["mode"] == "trajectory" else "depth"
    lines += [f"stage     {name}: {len(at)} {word}s, {_span(at)}" for name, at in facts["stages"].items()]
    samples = list(facts["samples"])
    some = ", ".join(samples[:_MOST]) + (" …" if len(samples) > _MOST else "")
    padding = f", {facts['padding']} of padding" if facts["padding"] else ""
    lines.append(f"samples   {len(samples)} ({some}), {facts['positions']} positions{padding}")
    more = [name for name in ("energy", "delta", "token_ids") if facts[name]]
    lines += [f"also      {', '.join(more)}"] if more else []
    lines += [f"meta      {', '.join(f'{k}={v}' for k, v in facts['meta'].items())}"] if facts["meta"] else []
    if facts["prefix"]:
        worst = max(facts["prefix"].values())
        lines.append(f"prefix    {len(facts['prefix'])} runs per depth compared, largest relative distance {worst:.2g}")
    lines += [f"remark    {text}" for text in facts["remarks"]]
    lines += [f"missing   {text}" for text in facts["assumed"]]
    return lines


def _span(at: Sequence[int]) -> str:
    if len(at) <= _MOST:
        return ", ".join(map(str, at))
    gaps = "" if list(at) == list(range(at[0], at[-1] + 1)) else ", with gaps"
    return f"{at[0]} … {at[-1]}{gaps}"
