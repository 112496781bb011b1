"""Runs on disk: one folder of Parquet tables with a manifest, written so that a kill loses at most one batch.

* :class:`RunWriter` writes a run in batches and continues an interrupted one;
* :func:`open_run` reads one back as a :class:`Run`: pandas, SQL, pivots, hidden states as NumPy views;
* :func:`list_runs` lists those in a folder;
* :func:`compare` sets any number of runs beside each other, as a :class:`Comparison`;
* :func:`read_trajectory` reads anyone's trajectory file as a :class:`Trajectory`; :data:`TEMPLATE` writes one;
* :func:`trace_callback` hears one from a loop that calls back;
* :func:`identity` says which run a configuration, its prompts and weights are.

The folder is the interface: any tool that reads Parquet and JSON can use it without this library. A newer layout than
this library knows is refused; secrets are never stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynprobe.runs._compare import compare
from dynprobe.runs._compare_columns import CORE as CORE_METRICS
from dynprobe.runs._compare_columns import register_converter
from dynprobe.runs._comparison import Comparison
from dynprobe.runs._figures import draw_run
from dynprobe.runs._identity import hash_prompts, identity
from dynprobe.runs._listing import list_runs
from dynprobe.runs._manifest import Manifest, Part
from dynprobe.runs._run import Run, open_run
from dynprobe.runs._schema import COLUMNS, SCHEMA_VERSION, TABLES, Column, Table, registry_facts
from dynprobe.runs._secrets import scrub, scrub_command
from dynprobe.runs._series import run_series
from dynprobe.runs._states import decode_bfloat16
from dynprobe.runs._trajectory_template import TEMPLATE
from dynprobe.runs._writer import RunWriter

if TYPE_CHECKING:
    from dynprobe.runs._trajectory_file import Trajectory as Trajectory
    from dynprobe.runs._trajectory_file import read_trajectory as read_trajectory
    from dynprobe.runs._trajectory_trace import CALLBACK as CALLBACK
    from dynprobe.runs._trajectory_trace import Trace as Trace
    from dynprobe.runs._trajectory_trace import trace_callback as trace_callback

__all__ = [
    "CALLBACK",
    "COLUMNS",
    "CORE_METRICS",
    "SCHEMA_VERSION",
    "TABLES",
    "TEMPLATE",
    "Column",
    "Comparison",
    "Manifest",
    "Part",
    "Run",
    "RunWriter",
    "Table",
    "Trace",
    "Trajectory",
    "compare",
    "decode_bfloat16",
    "draw_run",
    "hash_prompts",
    "identity",
    "list_runs",
    "open_run",
    "read_trajectory",
    "register_converter",
    "registry_facts",
    "run_series",
    "scrub",
    "scrub_command",
    "trace_callback",
]


def __getattr__(name: str) -> Any:
    if name in ("Trajectory", "read_trajectory"):  # the one part of this room that needs torch
        from dynprobe.runs import _trajectory_file

        return getattr(_trajectory_file, name)
    if name in ("CALLBACK", "Trace", "trace_callback"):
        from dynprobe.runs import _trajectory_trace

        return getattr(_trajectory_trace, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
