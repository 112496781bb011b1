"""dynprobe: an oscilloscope and a function generator for neural-network inference.

It reads the trajectory of hidden states of a model, pushes on it by a measured amount, and stores what happened so that
architectures can be compared on the same axes. Everything public is reachable from here; importing this package loads
nothing but the standard library, and each name brings its room in when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name → module that defines it. This table is the public API; a test guards it.
_PUBLIC: dict[str, str] = {
    "AttractorLayer": "dynprobe.controllers",
    "Controller": "dynprobe.controllers",
    "DynprobeError": "dynprobe.errors",
    "Perturb": "dynprobe.probes",
    "Subject": "dynprobe.probes",
    "Tape": "dynprobe.probes",
    "Where": "dynprobe.probes",
    "attract": "dynprobe.protocols",
    "bench": "dynprobe.protocols",
    "calibrate": "dynprobe.protocols",
    "capture": "dynprobe.probes",
    "compare": "dynprobe.runs",
    "delay_diagnostics": "dynprobe.protocols",
    "diff": "dynprobe.runs",
    "discover": "dynprobe.probes",
    "dissociate": "dynprobe.protocols",
    "doctor": "dynprobe.protocols",
    "evaluate": "dynprobe.protocols",
    "fetch": "dynprobe.models",
    "ingest": "dynprobe.protocols",
    "load": "dynprobe.probes",
    "open": "dynprobe.runs",
    "panel": "dynprobe.protocols",
    "perturb": "dynprobe.probes",
    "plan": "dynprobe.protocols",
    "readout": "dynprobe.probes",
    "record": "dynprobe.probes",
    "recover": "dynprobe.protocols",
    "report": "dynprobe.runs",
    "resume": "dynprobe.probes",
    "run": "dynprobe.protocols",
    "iterate": "dynprobe.protocols",
    "sweep": "dynprobe.protocols",
    "threshold": "dynprobe.protocols",
    "trace_callback": "dynprobe.runs",
}
_ALIASES = {"open": "open_run"}
#: Old public name → its new one, and the version in which the old one goes; until then it works and warns.
_RENAMED: dict[str, tuple[str, str]] = {}
_ROOMS = (
    "claims", "cli", "controllers", "engines", "errors", "metrics", "models", "probes", "prompts", "protocols", "runs",
    "testing",
)  # fmt: skip

__all__ = ["__version__", *sorted(_PUBLIC), *_ROOMS]

if TYPE_CHECKING:
    from dynprobe import controllers as controllers
    from dynprobe import engines as engines
    from dynprobe import errors as errors
    from dynprobe import metrics as metrics
    from dynprobe import models as models
    from dynprobe import probes as probes
    from dynprobe import prompts as prompts
    from dynprobe import protocols as protocols
    from dynprobe import runs as runs
    from dynprobe.controllers import AttractorLayer as AttractorLayer
    from dynprobe.controllers import Controller as Controller
    from dynprobe.errors import DynprobeError as DynprobeError
    from dynprobe.models import fetch as fetch
    from dynprobe.probes import Perturb as Perturb
    from dynprobe.probes import Subject as Subject
    from dynprobe.probes import Tape as Tape
    from dynprobe.probes import Where as Where
    from dynprobe.probes import capture as capture
    from dynprobe.probes import discover as discover
    from dynprobe.probes import load as load
    from dynprobe.probes import perturb as perturb
    from dynprobe.probes import readout as readout
    from dynprobe.probes import record as record
    from dynprobe.probes import resume as resume
    from dynprobe.protocols import attract as attract
    from dynprobe.protocols import bench as bench
    from dynprobe.protocols import calibrate as calibrate
    from dynprobe.protocols import delay_diagnostics as delay_diagnostics
    from dynprobe.protocols import dissociate as dissociate
    from dynprobe.protocols import doctor as doctor
    from dynprobe.protocols import evaluate as evaluate
    from dynprobe.protocols import ingest as ingest
    from dynprobe.protocols import iterate as iterate
    from dynprobe.protocols import panel as panel
    from dynprobe.protocols import plan as plan
    from dynprobe.protocols import recover as recover
    from dynprobe.protocols import run as run
    from dynprobe.protocols import sweep as sweep
    from dynprobe.protocols import threshold as threshold
    from dynprobe.runs import compare as compare
    from dynprobe.runs import diff as diff
    from dynprobe.runs import open_run as open  # noqa: F401
    from dynprobe.runs import report as report
    from dynprobe.runs import trace_callback as trace_callback


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), _ALIASES.get(name, name))
    elif name in _ROOMS:
        value = importlib.import_module(f"dynprobe.{name}")
    else:
        from dynprobe._renamed import renamed

        return renamed(__name__, _RENAMED)(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
