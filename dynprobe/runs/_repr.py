"""A run in a terminal and in a notebook: what it is, what was done to the model, how much there is, did it pass.

Nothing but the manifest and the small table of conditions is read, and a run whose tables are damaged is shown all the
same: looking at a thing must not fail. Everything is escaped for the place it is shown in.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dynprobe.errors import DynprobeError
from dynprobe.runs._card import facts_lines
from dynprobe.runs._schema import TABLES

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["as_html", "as_text"]

_MOST = 8


def as_text(run: Run) -> str:
    """Return the few lines that stand for a run in a terminal."""
    lines = [f"Run {run.path.resolve().name} ({run.status})"]
    lines += [f"  {key:<12} {_one_line(value)}" for key, value in _facts(run).items()]
    return "\n".join(lines)


def as_html(run: Run) -> str:
    """Return the box that stands for a run in a notebook: one table, in the colours of the page it stands on."""
    cell = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
    facts = "".join(
        f"<tr><th style='{cell}'>{html.escape(key)}</th><td style='{cell}'>{html.escape(_one_line(value))}</td></tr>"
        for key, value in _facts(run).items()
    )
    rows = run.manifest.rows()
    tables = "".join(
        f"<tr><td style='{cell}'><code>{name}</code></td><td style='{cell};text-align:right'>{rows[name]:,}</td>"
        f"<td style='{cell}'>{html.escape(TABLES[name].description)}</td></tr>"
        for name in TABLES
        if name in rows
    )
    title = f"Run {html.escape(run.path.resolve().name)} ({html.escape(run.status)})"
    return (
        f"<table><caption style='text-align:left'><b>{title}</b></caption><tbody>{facts}</tbody></table>"
        f"<details><summary>{len(rows)} tables</summary><table><tbody>{tables}</tbody></table></details>"
    )


def _facts(run: Run) -> dict[str, str]:
    rows = run.manifest.rows()
    tables = " · ".join(f"{name} {rows[name]:,}" for name in TABLES if name in rows) or "none yet"
    lines = facts_lines(run.manifest)
    for name, value in (("arms", _arms(run)), ("self-tests", _checks(run.manifest.self_tests))):
        if value:
            lines[name] = value
    return {**lines, "tables": tables, "folder": str(run.path)}


def _arms(run: Run) -> str:
    """The arms, with how many conditions each has where it has several."""
    try:
        arms = [str(arm) for arm in run.table("conditions", ["arm"])["arm"]]
    except (DynprobeError, OSError):
        return ""
    names = list(dict.fromkeys(arms))
    shown = [name if (n := arms.count(name)) == 1 else f"{name} ×{n}" for name in names[:_MOST]]
    return ", ".join(shown) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def _checks(found: Any) -> str:
    """Every self-test with its outcome."""
    if not isinstance(found, Mapping):
        return ""
    said = []
    for name, check in found.items():
        passed = check.get("passed") if isinstance(check, Mapping) else None
        # A model that cannot be resumed fast is resumed through all its blocks: slower, and right.
        otherwise = "ok (slow road)" if name == "resume" else "FAILED"
        said.append(f"{name} {'ok' if passed else 'not run' if passed is None else otherwise}")
    return " · ".join(said)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
