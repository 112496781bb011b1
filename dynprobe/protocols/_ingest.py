"""``ingest``: anyone's trajectory file, or dump of a Transformer's layers, becomes a run.

There is no model: what is known is the file. Its states are measured as those of a model would be, with depth 0 taking
part (an iteration has no embedding layer to skip) and, where a position has several state vectors, with the vectors as
the units; residuals, the contraction estimate and iterations to tolerance stand beside them. The tables have the
columns of a run of a model, so that the two can be compared; what only a readout could give (NLL, entropy, margin) is
NaN with the reason ``no-readout``.

The layers of a Transformer are measured as a run of that model measures them: the embedding takes no part, and columns
that speak of convergence are not there.

Every stage of the file is a track of its own: depths of two tracks are never paired. The samples table speaks of one
track, by default the one whose state ends the file; depths and profiles hold all.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dynprobe import __version__
from dynprobe.errors import UsageError, did_you_mean
from dynprobe.metrics.statistics import interval_words
from dynprobe.protocols._ingest_measure import Track, measure_track
from dynprobe.protocols._ingest_tables import batch_tables, converged, ingest_facts, state_rows
from dynprobe.protocols._summary import summarise
from dynprobe.runs import (
    CALLBACK,
    Run,
    RunWriter,
    Trace,
    Trajectory,
    identity,
    import_export,
    is_export,
    open_run,
    read_trajectory,
)
from dynprobe.runs._trajectory_layers import Reading, read_depths

__all__ = ["ingest"]

#: Rows of the depths table that are made at once.
_ROWS = 400_000


def ingest(
    path: Any,
    *,
    out: str | Path = "runs",
    name: str | None = None,
    track: str | None = None,
    sink: int | None = None,
    states: bool = False,
    force: bool = False,
    dims: str | Sequence[str] | None = None,
    depths: str | Sequence[int] | None = None,
    final_norm: str | None = None,
    allow_bin: bool = False,
    token_ids: Any = None,
    valid: Any = None,
    ids: Sequence[str] | None = None,
) -> Run:
    """Make a run of states that others saved, without the model that made them; or of an exported run.

    Args:
        path: A trajectory file (``.npz``, ``.safetensors``, ``.parquet``), a dump of the layers of a Transformer
            (``.pt``, ``.npy``, or under the names of TransformerLens), a folder of SAELens's cached activations or of
            speculators' files, an ``ActivationCache`` or other tensors in memory, what :func:`dynprobe.trace_callback`
            heard, or a folder that ``dynprobe export`` wrote; see ``docs/trajectories.md``.
        out: Folder of runs.
        name: Name of the model; default the file's own (``meta["model"]``), else the name of the file.
        track: Stage the samples table speaks of; default the one whose state ends the file.
        sink: First positions of a sample that stay out of its means. Default as in a run of a model, 1; 0 where
            there is one position only.
        states: Store the states in the run as well.
        force: Continue a run that another version began.
        dims: Names of the axes of a stack of layers, such as ``layer,batch,pos,dim``.
        depths: Depths of its layers, such as ``2,16,29`` or ``0:13``; d is the state entering block d.
        final_norm: ``applied`` where the last state is after the final norm (it is left out), ``none`` where it is not.
        allow_bin: Read a pickled file, with ``weights_only=True``.
        token_ids: Token ids ``[batch, pos]`` of states in memory.
        valid: Which of their positions exist ``[batch, pos]``.
        ids: Names of their samples; equal names pair with other runs.

    Returns:
        The run. The same file and options again find the run that was made of them.

    Raises:
        UsageError: The file cannot be read as a trajectory, or an option does not fit it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "states.npz"
        ...     start = np.random.default_rng(0).normal(size=(1, 16, 8))
        ...     np.savez(file, states=0.5 ** np.arange(8.0)[:, None, None] * start, meta='{"model": "halving"}')
        ...     run = ingest(file, out=folder)
        ...     run.samples["converge_rho"].item(), run.manifest.model_name
        (0.5, 'halving')
    """
    begun = time.perf_counter()
    told = {
        "name": name, "track": track, "sink": sink, "dims": dims, "depths": depths, "final_norm": final_norm,
        "token_ids": token_ids, "valid": valid, "ids": ids,
    }  # fmt: skip
    given = [key for key, value in told.items() if value is not None]
    if isinstance(path, str | Path):
        if is_export(path):
            if given:
                raise UsageError(f"{path} is an exported run, which says all of it itself; leave out {given[0]}")
            return import_export(path, out)
        if memory := [key for key in given if key in ("token_ids", "valid", "ids")]:
            raise UsageError(f"{memory[0]} is for states in memory; a file holds its own (see docs/trajectories.md)")
    axes = tuple(d.strip() for d in dims.split(",")) if isinstance(dims, str) else None if dims is None else tuple(dims)
    reading = Reading(axes, read_depths(depths), final_norm, allow_bin)
    found = path.trajectory if isinstance(path, Trace) else path
    if not isinstance(found, Trajectory):
        meta = {"model": name} if name else None
        found = read_trajectory(found, reading, token_ids=token_ids, valid=valid, ids=ids, meta=meta)
    chosen = _track(found, track)
    several = found.states.shape[2] > 1
    if sink is not None and sink < 0:
        raise UsageError(f"sink={sink}; it is a number of positions, 0 or more")
    sink = int(several) if sink is None else sink
    config = {
        "protocol": "import", "file": found.path.name, "sha256": found.sha256, "track": chosen, "sink": sink,
        "mode": found.mode, "states": states, "name": name, **_said(reading),
    }  # fmt: skip
    for line in found.remarks:
        warnings.warn(f"{found.path}: {line}", stacklevel=2)
    writer = RunWriter.begin(
        out,
        model_name=name or str(found.meta.get("model") or found.path.stem),
        config=config,
        ident=identity({k: v for k, v in config.items() if k != "file"}, list(found.ids), found.sha256),
        manifest_fields=_provenance(found, chosen, states),
        columns=ingest_facts(found, sink),
        force=force,
    )
    if writer.status == "complete":
        return open_run(writer.folder)
    with writer:
        _write(writer, found, chosen, sink, states)
        samples = open_run(writer.folder).samples
        writer.finish(
            {
                "protocol": "import", "conditions": summarise(samples), "convergence": converged(samples),
                "mean_intervals": interval_words(),
                "remarks": list(found.remarks),
                "seconds": round(time.perf_counter() - begun, 2),
            }
        )  # fmt: skip
    return open_run(writer.folder)


def _said(reading: Reading) -> dict[str, Any]:
    """What the user said of the file; nothing where nothing was said, so that ids stay what they were."""
    said = {"dims": reading.dims, "depths": reading.depths, "final_norm": reading.final_norm}
    return {key: value if isinstance(value, str) else list(value) for key, value in said.items() if value is not None}


def _track(found: Trajectory, track: str | None) -> str:
    known = list(found.stages)
    if track is None:
        return found.stage[-1]
    if track not in known:
        raise UsageError(f"{found.path} has no stage {track!r}.{did_you_mean(track, known)} It has {', '.join(known)}.")
    return track


def _provenance(found: Trajectory, chosen: str, states: bool) -> dict[str, Any]:
    heard = found.path == CALLBACK
    held = str(found.path) == "memory"
    command = ["dp.ingest", "trace"] if heard else ["dp.ingest", "cache"] if held else None
    return {
        "command": command or ["dynprobe", "import", str(found.path)],
        "model": {
            "source": "callback" if heard else "memory" if held else "trajectory file", "file": str(found.path),
            "file_sha256": found.sha256, "meta": dict(found.meta), "track": chosen,
        },
        "weights": {"hash": f"file-sha256:{found.sha256}"},
        "trajectory": found.describe(),
        "versions": {
            "dynprobe": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "dtypes": {
            "weights": found.dtype, "metrics": "float64" if found.dtype == "float64" else "float32",
            "low_precision_angles": found.dtype in ("bfloat16", "float16"),
        },
        "batch_plan": _plan(found),
    }  # fmt: skip


def _plan(found: Trajectory) -> list[list[int]]:
    """Samples of every batch, so many that its tables stay small."""
    n, batch, length = (int(s) for s in found.states.shape[:3])
    size = max(1, _ROWS // (n * length))
    return [[start, min(start + size, batch)] for start in range(0, batch, size)]


def _write(writer: RunWriter, found: Trajectory, chosen: str, sink: int, states: bool) -> None:
    for line in found.remarks:
        writer.event("remark", text=line)
    tokens = [[] if found.token_ids is None else found.token_ids[b, v].tolist() for b, v in enumerate(found.valid)]
    writer.write_table(
        "prompts",
        pd.DataFrame(
            {
                "prompt_id": list(found.ids), "text": None, "token_ids": tokens, "category": None,
                "source": found.path.name,
            }
        ),
    )  # fmt: skip
    writer.write_table(
        "conditions",
        pd.DataFrame(
            [
                {
                    "condition_id": "clean", "arm": "clean", "decode_mode": "forced", "scale": None, "alpha": 0.0,
                    "kind": None, "where": None, "seed": None, "controller": None, "params": None,
                    "temperature": float("nan"), "top_p": float("nan"), "max_new_tokens": 0,
                }
            ]
        ).astype({"seed": "Int64"}),
    )  # fmt: skip
    units = writer.manifest.batch_plan
    assert isinstance(units, list)
    for number, (start, stop) in enumerate(units):
        if number in writer.finished:
            continue
        rows = slice(start, stop)
        tracks = [
            measure_track(found, Track(name, tuple(at.tolist()), rows), sink) for name, at in found.stages.items()
        ]
        if states:
            for one in tracks:
                keys, stored = state_rows(found, one)
                writer.write_states(number, keys, stored, found.dtype)
        writer.write_batch(number, batch_tables(found, tracks, chosen, rows))
