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
    "_line_shape",
    "_block_influence",
    "_order",
    "_cka",
    "_rsa",
    "_rank",
    "_twonn",
    "_rqa",
    "_delay_metrics",
    "_limen_ct",
    "_limen",
    "_norm",
    "_debt",
    "_output_metrics",
    "_lens",
    "_distance",
    "_paired",
    "_response",
    "_relax",
    "_lockin_metrics",
    "_phase_z",
    "_gate",
    "_lyapunov",
    "_residual",
    "_convergence",
    "_exit_rules",
    "_coupling",
    "_energy",
    "_energy_tying",
    "_plateau",
    "_criteria",
    "_readiness",
    "_signals",
    "_str_kernel",
    "_recync",
    "_recovery_metrics",
    "_bad_states",
    "_hmm_states",
    "_cycles",
    "_functional_capacity",
)


for _name in MODULES:
    import_module(f"dynprobe.metrics.{_name}")
