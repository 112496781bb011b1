"""The part of a page that is about one run: facts, pictures it holds data for, tables, and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from dynprobe.errors import DynprobeError
from dynprobe.runs._card import facts_lines
from dynprobe.runs._json import dumps, plain
from dynprobe.runs._manifest import Manifest
from dynprobe.runs._protocol import protocol_of
from dynprobe.runs._quantity import is_sweep, is_threshold
from dynprobe.runs._report import _figures_depth as depth
from dynprobe.runs._report import _figures_grid as grid
from dynprobe.runs._report import _figures_studies as studies
from dynprobe.runs._report._concluded import concluded
from dynprobe.runs._report._figures_dissociation import dissociation_figure
from dynprobe.runs._report._looks import facts_for
from dynprobe.runs._report._parts import Figure, Frame, Section, Table
from dynprobe.runs._secrets import scrub, scrub_command

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["run_section"]

_FILTERS = (
    "condition_id",
    "condition",
    "arm",
    "category",
    "decode_mode",
    "metric",
    "task",
    "criterion",
    "mode",
    "timing",
    "status",
    "table",
    "quantity",
)
#: Columns of samples that come first in their table; the rest follow.
_FIRST = (
    "prompt_id",
    "condition_id",
    "category",
    "status",
    "n_new",
    "text",
    "nll",
    "kappa_phase",
    "kappa_phase_d",
    "kl_clean_pert",
    "flip_rate",
    "limen_regime",
    "repetition",
)
#: A table of what was concluded that is longer than this is folded: two pages of it.
_MOST_OPEN = 50
_LEFT_OUT = ("sample_id", "reasons", "digest", "token_ids", "token_texts", "equal_to")


def run_section(run: Run, key: str, most_rows: int, *, name: str = "", unfolded: bool = True) -> Section:
    """Return the section of a run under a name (default its model's), unfolded or not."""
    figures, missing = _figures(run, key, most_rows)
    return Section(
        key=key, title=f"{name or run.manifest.model_name} · {protocol_of(run.manifest.config)}",
        facts=_facts(run), figures=figures, tables=_tables(run, key, most_rows), missing=missing,
        warnings=_warnings(run), provenance=_provenance(run.manifest), blocks=_blocks(run.manifest),
        closing=_closing(run, key), open=unfolded,
    )  # fmt: skip


def _figures(run: Run, key: str, most_rows: int) -> tuple[list[Figure], list[tuple[str, str]]]:
    """Every picture the run has data for, and why the others are not there."""
    protocol = protocol_of(run.manifest.config)
    makers: dict[str, Callable[[], Figure]] = {}
    if is_sweep(run) or is_threshold(run):
        makers |= {
            "Thresholds": lambda: grid.thresholds_figure(run, key),
            "Response against α": lambda: grid.response_figure(run, key, most_rows // 4),
            "Layer × α": lambda: grid.layer_map_figure(run, key),
            "Fragile tokens": lambda: grid.fragility_figure(run, key, most_rows // 2),
        }
        if is_sweep(run):
            makers.pop("Thresholds")
            makers.pop("Fragile tokens")
    if protocol == "iterate":
        makers["What more iterations buy"] = lambda: studies.iteration_figure(run, key)
    if protocol == "recover":
        makers["Recovery"] = lambda: studies.recovery_figure(run, key)
        makers["Detector and action"] = lambda: studies.signal_figure(run, key)
    if protocol == "dissociate":
        makers["Dissociation"] = lambda: dissociation_figure(run, key)
    if protocol == "attract":
        makers["How texts go on"] = lambda: studies.length_figure(run, key)
        makers["Slots of the attractor layer"] = lambda: studies.slot_figure(run, key, most_rows // 2)
    if run.manifest.rows().get("items"):
        makers["Right answers"] = lambda: depth.accuracy_figure(run, key)
    makers |= {
        "κ and other metrics along depth": lambda: depth.profile_figure(run, key),
        "Layer × token": lambda: depth.token_figure(run, key, most_rows),
        "Trajectory in its principal plane": lambda: depth.pca_figure(run, key),
        "Regimes": lambda: depth.regime_figure(run, key),
    }
    figures, missing = [], []
    for name, make in makers.items():
        try:
            figures.append(make())
        except DynprobeError as error:
            missing.append((name, _without_path(str(error), run)))
    return figures, missing


def _without_path(text: str, run: Run) -> str:
    """A page is shared; where its run lay on somebody's disk is not part of it."""
    return text.replace(f"{run.path} ", "the run ").replace(str(run.path), run.path.name)


def _facts(run: Run) -> list[tuple[str, str]]:
    rows = run.manifest.rows()
    facts = {"folder": run.path.resolve().name, "status": run.status, **facts_lines(run.manifest)}
    for name in ("device", "dtypes", "noise_floor"):
        value = getattr(run.manifest, name)
        if isinstance(value, Mapping):
            facts[name.replace("_", " ")] = ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in value.items())
    facts["rows"] = " · ".join(f"{name} {n:,}" for name, n in sorted(rows.items()))
    return [(name, str(scrub(value))) for name, value in facts.items()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _warnings(run: Run) -> list[str]:
    """What a reader must know first: an unfinished run, failed self-tests, notes that the run made about itself."""
    manifest = run.manifest
    found = []
    if run.status != "complete":
        found.append(f"The run is {run.status}: what is shown is what there was when this page was made.")
    tests = manifest.self_tests if isinstance(manifest.self_tests, Mapping) else {}
    for name, test in tests.items():
        if isinstance(test, Mapping) and test.get("passed") is False:
            value = f"{_shown(test.get('value'))} {test.get('unit', '')}".strip()
            found.append(f"Self-test {name} failed: {value} (limit {test.get('limit')}).")
    dtypes = manifest.dtypes if isinstance(manifest.dtypes, Mapping) else {}
    if dtypes.get("low_precision_angles"):
        found.append(f"States were read in {dtypes.get('weights')}: angles are coarser than many effects.")
    notes = run.summary.get("notes")
    found += [str(note) for note in notes] if isinstance(notes, list) else []
    samples = manifest.rows().get("samples")
    if samples:
        bad = run.samples["status"].astype(str).value_counts() if "status" in run.samples else pd.Series(dtype=int)
        bad = bad[[s not in ("ok", "nan") for s in bad.index]]
        found += [f"{n} of {samples} samples ended as {status}." for status, n in sorted(bad.items()) if n]
    if manifest.interruptions:
        found.append(f"The run was interrupted {len(manifest.interruptions)} times and continued.")
    return [str(scrub(text)) for text in found]


def _tables(run: Run, key: str, most_rows: int) -> list[Table]:
    tables = []
    summary = concluded(run.summary)
    if len(summary):
        tables.append(
            Table("What the run concluded", Frame(f"{key}-summary", summary.iloc[:most_rows], {}, len(summary)),
                  "Every estimate of summary.json with its interval; missing values have a reason.", ["quantity"],
                  open=len(summary) <= _MOST_OPEN)
        )  # fmt: skip
    rows = run.manifest.rows()
    if rows.get("samples"):
        samples = run.samples
        order = [c for c in _FIRST if c in samples] + [c for c in samples if c not in _FIRST]
        shown = samples[[c for c in order if c not in _LEFT_OUT and samples[c].notna().any()]]
        most = max(50, most_rows // max(1, shown.shape[1] // 4))
        tables.append(_table(run, key, "samples", shown, most, "One row per prompt, condition and replicate."))
    for name, words in (
        ("fits", "Estimates."),
        ("items", "Answers to task items."),
        ("conditions", "What was done in each condition."),
        ("prompts", "The prompts."),
    ):
        if rows.get(name):
            frame = run.table(name)
            shown = frame[[c for c in frame if c not in _LEFT_OUT and frame[c].notna().any()]]
            tables.append(_table(run, key, name, shown, most_rows // 8, words))
    return tables


def _table(run: Run, key: str, name: str, frame: pd.DataFrame, most: int, words: str) -> Table:
    facts = facts_for(run, name, [str(c) for c in frame])
    kept = [c for c in _FILTERS if c in frame and 1 < frame[c].nunique() <= 200]
    some = f" The first {most:,} of {len(frame):,} rows are on this page." if len(frame) > most else ""
    return Table(
        name, Frame(f"{key}-{name}", frame.iloc[:most].reset_index(drop=True), facts, len(frame)), words + some, kept
    )


def _provenance(manifest: Manifest) -> list[tuple[str, str]]:
    model = manifest.model if isinstance(manifest.model, Mapping) else {"model": manifest.model}
    kept = {
        k: v
        for k, v in model.items()
        if k not in ("location", "folder", "structure", "tokenizer") and v not in (None, {}, [])
    }
    facts: dict[str, Any] = {
        "schema version": manifest.schema_version, "id": manifest.id8, "made": manifest.created,
        "finished": manifest.updated, "command": _command(manifest), **{f"model {k}": v for k, v in kept.items()},
        "weights": manifest.weights, "prompts hash": manifest.prompts_hash,
        "calibration hash": manifest.calibration_hash, **{f"version of {k}": v for k, v in manifest.versions.items()},
        "device": manifest.device, "dtypes": manifest.dtypes, "seeds": manifest.seeds,
        "noise floor": manifest.noise_floor, "continuations": manifest.continuations,
        "interruptions": manifest.interruptions, "files": len(manifest.parts),
    }  # fmt: skip
    return [
        (k, v if isinstance(v, str) else dumps(scrub(plain(v, k))))
        for k, v in facts.items()
        if v not in (None, [], {}, "")
    ]


def _command(manifest: Manifest) -> str:
    command = scrub_command(manifest.command)
    return shlex.join(command) if isinstance(command, list) else str(command or "made from Python")


def _blocks(manifest: Manifest) -> list[tuple[str, str]]:
    return [("Configuration", dumps(scrub(plain(manifest.config, "config")), indent=1))]


def _closing(run: Run, key: str) -> list[Table]:
    found = []
    tests = run.manifest.self_tests
    if isinstance(tests, Mapping):
        rows = [
            {"self-test": name, "passed": t.get("passed"), "value": t.get("value"), "limit": t.get("limit"),
             "unit": t.get("unit"), "detail": dumps(scrub(plain(t.get("detail"), "detail")))}
            for name, t in tests.items() if isinstance(t, Mapping)
        ]  # fmt: skip
        if rows:
            found.append(
                Table(
                    "Self-tests",
                    Frame(f"{key}-selftests", pd.DataFrame(rows)),
                    "What the run checked about itself before it measured.",
                )
            )
    columns = run.columns()
    found.append(
        Table(
            "Columns",
            Frame(f"{key}-columns", columns),
            "Every column of every table: unit, metric id, aggregation.",
            ["table"],
        )
    )
    return found
