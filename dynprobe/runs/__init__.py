"""Runs on disk: one folder of Parquet tables with a manifest, written so that a kill loses at most one batch.

* :class:`RunWriter` writes a run in batches and continues an interrupted one;
* :func:`open_run` reads one back as a :class:`Run`: pandas, SQL, pivots, hidden states as NumPy views;
* :func:`open_panel` opens the folder of a panel as a :class:`Panel`;
* :func:`list_runs` lists those in a folder;
* :func:`report` makes one page about a run, or several, that needs nothing else to be read;
* :func:`compare` sets any number of runs beside each other, as a :class:`Comparison`;
* :func:`diff` finds the first depth and token at which two runs part, as a :class:`Difference`;
* :func:`examine` looks for damage in a folder, and :func:`repair` mends it;
* :func:`export_run` writes one for others, :func:`import_export` makes a run of that again;
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
from dynprobe.runs._damage import Examination, examine
from dynprobe.runs._damage_report import Damage
from dynprobe.runs._diff import diff
from dynprobe.runs._diff_found import Difference
from dynprobe.runs._diff_found import place as difference_place
from dynprobe.runs._export import EXPORT_FORMATS, Export, export_run
from dynprobe.runs._export_format import Format, as_schema
from dynprobe.runs._export_import import import_export, is_export
from dynprobe.runs._figures import draw_run
from dynprobe.runs._identity import hash_prompts, identity
from dynprobe.runs._listing import list_runs
from dynprobe.runs._manifest import Manifest, Part
from dynprobe.runs._open_run import open_run
from dynprobe.runs._panel_folder import Panel, open_panel
from dynprobe.runs._repair import repair
from dynprobe.runs._report import report
from dynprobe.runs._run import Run
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
    "EXPORT_FORMATS",
    "SCHEMA_VERSION",
    "TABLES",
    "TEMPLATE",
    "Column",
    "Comparison",
    "Damage",
    "Difference",
    "Examination",
    "Export",
    "Format",
    "Manifest",
    "Panel",
    "Part",
    "Run",
    "RunWriter",
    "Table",
    "Trace",
    "Trajectory",
    "as_schema",
    "compare",
    "decode_bfloat16",
    "diff",
    "difference_place",
    "draw_run",
    "examine",
    "export_run",
    "hash_prompts",
    "identity",
    "import_export",
    "is_export",
    "list_runs",
    "open_panel",
    "open_run",
    "read_trajectory",
    "register_converter",
    "registry_facts",
    "repair",
    "report",
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
