"""A small run in two batches, and the frames it is made of."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynprobe.runs import RunWriter

IDENT = "0123abcd"


def tick() -> dt.datetime:
    return dt.datetime(2026, 11, 21, 23, 15, 2, tzinfo=dt.UTC)


def begin(out: Path, ident: str = IDENT, **options: Any) -> RunWriter:
    options = {"model_name": "org/tiny", "config": {"perturb": "alpha=0.1", "layers": [1, 2]}, "clock": tick} | options
    fields = {"batch_plan": [["p0"], ["p1"]], "versions": {"dynprobe": "0.1.0"}} | options.pop("manifest_fields", {})
    return RunWriter.begin(out, ident=ident, manifest_fields=fields, **options)


def batch(number: int) -> dict[str, pd.DataFrame]:
    return {name: frame.copy() for name, frame in _batch(number).items()}


@functools.cache
def _batch(number: int) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(number)
    samples = [f"p{number}/{arm}" for arm in ("clean", "noisy")]
    tokens = pd.DataFrame([(s, p) for s in samples for p in range(3)], columns=["sample_id", "pos"])
    depths = tokens.merge(pd.DataFrame({"track": "resid", "depth": range(4)}), how="cross")
    return {
        "samples": pd.DataFrame(
            {
                "sample_id": samples,
                "prompt_id": f"p{number}",
                "condition_id": ["clean", "noisy"],
                "replicate": 0,
                "nll": rng.normal(size=2),
                "text": ["a ‘b’ \n", ""],
            }
        ),
        "tokens": tokens.assign(phase="prefill", nll=rng.normal(size=len(tokens)), flip=[True, False] * 3),
        "depths": depths.assign(layer=depths["depth"] - 1, norm=rng.normal(size=len(depths))),
    }


def whole_tables(writer: RunWriter) -> None:
    writer.write_table(
        "prompts",
        pd.DataFrame(
            {"prompt_id": ["p0", "p1"], "text": ["x", "y"], "token_ids": [[1, 2], [3]], "category": ["easy", "hard"]}
        ),
    )
    writer.write_table(
        "conditions",
        pd.DataFrame({"condition_id": ["clean", "noisy"], "arm": ["clean", "perturbed"], "alpha": [np.nan, 0.1]}),
    )


def write_all(out: Path, tidy: bool = True, **options: Any) -> Path:
    """Begin or continue, write what is missing, finish; untidy: as if nothing ran after an error."""
    writer = begin(out, **options)
    if writer.status == "complete":
        return writer.folder
    with writer if tidy else contextlib.nullcontext():
        fill(writer)
    return writer.folder


def fill(writer: RunWriter) -> None:
    whole_tables(writer)
    for number in (0, 1):
        if number not in writer.finished:
            keys = batch(number)["depths"][["sample_id", "pos", "track", "depth", "layer"]]
            states = np.random.default_rng(number).normal(size=(len(keys), 4)).astype(np.float32)
            writer.write_states(number, keys, states, "float32")
            writer.write_batch(number, batch(number), {"seconds": 0.5})
    writer.finish({"samples": 4})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_all(tmp_path / "runs")


@pytest.fixture
def make() -> dict[str, Callable[..., Any]]:
    return {"begin": begin, "batch": batch, "whole_tables": whole_tables, "write_all": write_all, "tick": tick}
