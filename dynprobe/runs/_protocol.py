"""What a run is, from its manifest alone: its protocol, what it wrote in a few words, and its main table.

Listings, cards and pictures ask this of every folder, so no table is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynprobe.runs._manifest import Manifest

__all__ = ["MAIN_TABLE", "counted", "in_short", "layers_of", "perturbation", "protocol_of"]

#: Protocol → the table with a row for each thing that was measured.
MAIN_TABLE = {
    "run": "samples", "import": "samples", "sweep": "samples", "threshold": "trials", "iterate": "samples",
    "eval": "items", "recover": "samples", "dissociate": "samples", "attract": "samples",
}  # fmt: skip


def protocol_of(config: Mapping[str, Any]) -> str:
    """Return a run's protocol: ``sweep``, ``threshold``, ``iterate``, ``recover``, ``attract``, ``import``, ``run``, ….

    Example:
        >>> protocol_of({"alphas": [], "criterion": ["kl"]}), protocol_of({"perturb": ["alpha=0.1"]})
        ('threshold', 'run')
    """
    if "split_by" in config:
        return "iterate"
    if "include_path" in config:
        return "eval"
    if "half_life" in config:
        return "attract"
    if "timings" in config:
        return "dissociate" if "semantic" in config else "recover"
    if "alphas" not in config:
        return "import" if config.get("protocol") == "import" else "run"
    return "threshold" if "criterion" in config else "sweep" if "controls" in config else "run"


def perturbation(config: Mapping[str, Any]) -> str:
    """Return what was written into the model, in one line.

    Example:
        >>> perturbation({"perturb": [{"alpha": 0.1, "layers": "6"}, "alpha=0.2"]})
        'alpha=0.1,layers=6; alpha=0.2'
    """
    value = config.get("perturb", config.get("perturbation"))
    items = value if isinstance(value, list | tuple) else [value] if value else []
    return "; ".join(
        ",".join(f"{k}={v}" for k, v in item.items() if v is not None) if isinstance(item, Mapping) else str(item)
        for item in items
    )


def in_short(manifest: Manifest) -> str:
    """Return what a run wrote, in one line: its perturbations, or the axes of its grid.

    Example:
        >>> facts = dict(id8="00000000", created="", updated="", model_name="m")
        >>> config = {"alphas": [0.1, 0.3], "layers": "7+15", "scale": ["relnorm"], "controls": ["sham", "sign"]}
        >>> in_short(Manifest(config=config, **facts))
        '2 α × layers 7+15 × relnorm; controls sham, sign'
        >>> in_short(Manifest(config={"alphas": [], "criterion": ["kl"], "scale": ["mad"], "layers": "15"}, **facts))
        'kl, mad × layer 15'
    """
    config = manifest.config
    protocol = protocol_of(config)
    if protocol in ("run", "import"):
        return perturbation(config)
    if protocol == "attract":
        raw = config.get("strengths")
        ladder = f"ε {', '.join(_items(raw))}" if raw else f"{', '.join(_items(config.get('doses')))} nats"
        return f"{config.get('task')}: {', '.join(_items(config.get('arms')))} at {ladder}"
    if protocol == "eval":
        return "; ".join(part for part in (", ".join(_items(config.get("tasks"))), perturbation(config)) if part)
    if protocol == "dissociate":
        doses = perturbation(config) if config.get("fixed") else "α " + ", ".join(_items(config.get("alphas")))
        modes = ", ".join(_items(config.get("mode")))
        return f"{modes} by {config.get('detector')}, items {config.get('items')}; {doses}"
    if protocol == "recover":
        said = f"{', '.join(_items(config.get('mode')))} by {config.get('detector')}"
        return f"{said}; {perturbation(config) or 'no perturbation'}"
    if protocol == "iterate":
        numbers = _items(config.get("iterations"))
        said = f"T = {', '.join(numbers)}" if numbers else "default iterations"
        return "; ".join(part for part in (said, perturbation(config)) if part)
    scales, kinds, seeds, controls, alphas, criteria = (
        _items(config.get(key)) for key in ("scale", "kind", "seeds", "controls", "alphas", "criterion")
    )
    write = ",".join(scales) + ("" if kinds in ([], ["gaussian"]) else " " + ",".join(kinds))
    layers = layers_of(manifest)
    place = counted(layers, "layer", 1) if layers else _spelt(str(config.get("layers")))
    place += f" × {len(seeds)} seeds" if len(seeds) > 1 else ""
    if protocol == "sweep":
        said = f"{len(alphas)} α × {place} × {write}"
        return said + (f"; controls {', '.join(controls)}" if controls not in ([], ["sham"]) else "")
    place += ", each position" if config.get("each_position") else ""
    place += f", grid of {len(alphas)} α" if alphas else ", quest" if config.get("placement") == "quest" else ""
    return f"{','.join(criteria)}, {write} × {place}"


def counted(values: Sequence[Any], word: str, most: int) -> str:
    """Return values in words: all of them where they are few, else how many.

    Example:
        >>> counted([15], "layer", 1), counted([7, 15], "layer", 1), counted([0.1, 0.3], "α", 6)
        ('layer 15', '2 layers', 'α 0.1, 0.3')
    """
    many = word if word == "α" else f"{word}s"
    if len(values) <= most:
        return f"{word if len(values) == 1 else many} " + ", ".join(f"{value:g}" for value in values)
    return f"{len(values)} {many}" + (f" {min(values):g} … {max(values):g}" if most > 1 else "")


def layers_of(manifest: Manifest) -> list[int]:
    """Return the layers that a grid writes, from its planned units; empty where it has none yet."""
    plan = manifest.batch_plan if isinstance(manifest.batch_plan, list) else []
    units = [unit for unit in plan if isinstance(unit, Mapping)]
    found = {unit["layer"] for unit in units if "layer" in unit}
    found |= {str(unit.get("write", "")).rpartition("|L")[2] for unit in units}
    return sorted(int(layer) for layer in found if str(layer).isdigit())


def _items(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)] if value else []


def _spelt(layers: str) -> str:
    return f"layer {layers}" if layers.lstrip("-").isdigit() else f"layers {layers}"
