"""The formats that a run can be exported in.

A format is one file in ``formats/`` and one line of the table. Another package adds one through the entry-point group
``dynprobe.exporters``; :func:`dynprobe.testing.check_exporter` tries whether it gives back what it was given.
"""

from __future__ import annotations

from typing import Any

from dynprobe._plugins import Registry
from dynprobe.runs._export_format import Format

__all__ = ["FORMATS"]


def _plugin(name: str, found: Any) -> Format:
    if not isinstance(found, Format):
        raise TypeError(f"it is a {type(found).__name__}, not a dynprobe.runs.Format")
    return found


FORMATS: Registry[Format] = Registry(
    "dynprobe.exporters", "export format",
    {
        "hf": "dynprobe.runs.formats._parquet:FORMAT",
        "arrow": "dynprobe.runs.formats._arrow:FORMAT",
        "csv": "dynprobe.runs.formats._csv:FORMAT",
        "npz": "dynprobe.runs.formats._npz:FORMAT",
        "safetensors": "dynprobe.runs.formats._safetensors:FORMAT",
        "zarr": "dynprobe.runs.formats._zarr:FORMAT",
    },
    _plugin,
)  # fmt: skip
