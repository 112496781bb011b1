"""``slots=16,half_life=46,layers=50%`` ↔ an attractor layer and where it is put."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dynprobe.controllers.attractor._layer import AttractorLayer
from dynprobe.controllers.attractor._settings import PRESETS, Settings
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["attractor_spec", "parse_attractor"]

_EXAMPLE = "slots=16,half_life=46,strength=0.5,layers=50%"


def parse_attractor(text: str) -> tuple[AttractorLayer, str | None]:
    """Return the layer that a text describes, and the layers it goes to.

    Keys are ``preset``, ``layers`` and the fields of :class:`Settings`; what is left out keeps its default. ``-`` and
    ``_`` are the same, and ``on`` and ``default`` are a layer with all its defaults.

    Args:
        text: ``key=value`` pairs with commas between them; layers are joined by ``+``.

    Returns:
        The layer, and the layers as a spec, or None where none were named (the middle one).

    Raises:
        UsageError: If a key is unknown or given twice, or a value is not of its kind.

    Example:
        >>> layer, layers = parse_attractor("slots=8,half-life=138,layers=25%+50%")
        >>> layer.settings.slots, layer.settings.half_life, layers
        (8, 138.0, '25%+50%')
        >>> parse_attractor("preset=duality_v1")[0].settings.read
        'field'
    """
    kinds = {f.name: str(f.type) for f in fields(Settings)}
    known = ("preset", "layers", *kinds)
    values: dict[str, Any] = {}
    for pair in [] if text.strip() in ("", "on", "default") else text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        key = key.replace("-", "_")
        if not equals or not value:
            raise UsageError(f"attractor {text!r}: {pair.strip()!r} is no key=value pair; type for example {_EXAMPLE}")
        if key not in known:
            raise UsageError(f"attractor {text!r}: unknown key {key!r}.{did_you_mean(key, known)}")
        if key in values:
            raise UsageError(f"attractor {text!r}: {key} is given twice")
        values[key] = value if key in ("preset", "layers") else _value(text, key, value, kinds[key])
    layers, preset = values.pop("layers", None), values.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"attractor {text!r}: no preset {preset!r}.{did_you_mean(preset, PRESETS)}")
    return AttractorLayer(preset, **values), layers


def attractor_spec(settings: Settings, layers: str | None = None) -> str:
    """Return the text of settings that are not the default; :func:`parse_attractor` reads it back.

    Example:
        >>> attractor_spec(Settings(slots=8, clocks=True), "50%")
        'slots=8,clocks=true,layers=50%'
    """
    default, parts = Settings().as_dict(), []
    for key, value in settings.as_dict().items():
        if value != default[key]:
            parts.append(f"{key}={str(value).lower() if isinstance(value, bool | None) else value}")
    return ",".join([*parts, *([f"layers={layers}"] if layers is not None else [])])


def _value(text: str, key: str, value: str, kind: str) -> Any:
    """A value as the setting takes it; what settings allow is checked by the settings."""
    if kind == "bool":
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UsageError(f"attractor {text!r}: {key}={value}; it is true or false")
        return value.lower() in ("true", "1", "yes")
    if kind.startswith("Literal"):
        return value
    if "None" in kind and value.lower() in ("none", "auto"):
        return None
    try:
        return int(value) if kind == "int" else float(value)
    except ValueError:
        word = "a whole number" if kind == "int" else "a number"
        raise UsageError(f"attractor {text!r}: {key}={value}; it is {word}") from None
