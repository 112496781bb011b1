"""The order of the catalogue: every module that registers definitions, in the order ``ids()`` lists them."""

from __future__ import annotations

from importlib import import_module

__all__ = ["MODULES"]

MODULES = (
    "_kappa_phase",
    "_kappa_geom",
    "_kappa_sync",
    "_kappa_xcorr",
    "_delta",
    "_curvature",
    "_limen_ct",
    "_limen",
    "_norm",
    "_debt",
    "_output_metrics",
    "_paired",
    "_phase_z",
)


for _name in MODULES:
    import_module(f"dynprobe.metrics.{_name}")
