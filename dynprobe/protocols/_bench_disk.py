"""Hidden states on disk: what writing and reading them gives, and capture-to-disk beside other libraries.

A write counts when it is synced. In ``states`` the bytes lie in memory already: they are written as a run writes them
(keys, file, SHA-256, sync, rename, manifest) beside the same bytes by ``write`` and ``fsync``, and read back as views.
In ``disk`` a forward captures every block's output at every token and all of it is on disk at the end. What a library
captured is written for it as one safetensors file of all layers, which is about as fast as a file can be, and synced.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynprobe.probes import Subject
from dynprobe.protocols._bench_case import Case, Size, random_ids
from dynprobe.protocols._bench_forward import BARE, bare_forward, blocks_of, capturing_peers, reader
from dynprobe.protocols._bench_peers import largest_difference
from dynprobe.runs import RunWriter, open_run
from dynprobe.runs._states import decode_bfloat16, read_states

__all__ = ["disk_case", "plain_write", "state_keys", "states_case", "write_states"]


def state_keys(rows: int, per_sample: int, depth: int) -> pd.DataFrame:
    """Return keys of states of one depth, ``per_sample`` tokens in a sample."""
    ids = [f"p{i}|clean|0" for i in range((rows - 1) // per_sample + 1)]
    return pd.DataFrame(
        {
            "sample_id": pd.Categorical.from_codes((np.arange(rows) // per_sample).tolist(), pd.Index(ids)),
            "pos": (np.arange(rows) % per_sample).astype(np.int32), "track": pd.Categorical(["resid"] * rows),
            "depth": np.full(rows, depth, np.int32),
        }
    )  # fmt: skip


def write_states(writer: RunWriter, number: int, parts: Sequence[tuple[pd.DataFrame, Any]], dtype: str) -> None:
    """Write states as one batch of a run and make it visible."""
    for keys, states in parts:
        writer.write_states(number, keys, states, dtype)
    writer.write_batch(number, {})


def plain_write(place: Path, data: memoryview) -> None:
    """Write bytes, sync, and nothing else."""
    with place.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class _Scratch:
    """A folder beside where the result goes (another disk would give another number), and the runs open in it."""

    def __init__(self, folder: Path | None) -> None:
        self.temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".dynprobe-bench-", ignore_cleanup_errors=True)
        self.path = Path(self.temporary.name)
        self.writers: list[RunWriter] = []
        self.numbers = itertools.count()

    def writer(self, name: str) -> RunWriter:
        made = RunWriter.begin(
            self.path / name, ident=f"{len(self.writers):08x}", model_name="bench", config={"arm": name}
        )
        self.writers.append(made)
        return made

    def clear(self) -> None:
        """Delete the states, which are large; the manifests stay."""
        for path in self.path.rglob("*"):
            if path.suffix in (".parquet", ".bin", ".safetensors"):
                path.unlink()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.temporary.cleanup()


def states_case(subject: Subject, size: Size, folder: Path | None) -> Case:
    """States that lie in memory, ``[rows, dim]`` of the model's width, float32."""
    dim = subject.width
    rows = max(int(size.megabytes * 1e6 / (4 * dim)), 1)
    states = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    scratch, kept = _Scratch(folder), _Scratch(folder)
    keys, data = state_keys(rows, 512, 6), memoryview(states.view(np.uint8).reshape(-1))  # type: ignore[arg-type]
    writer, first = scratch.writer("states"), kept.writer("states")
    write_states(first, 0, [(keys, states)], "float32")
    first.finish({})
    run = open_run(first.folder)

    def back() -> list[np.ndarray]:
        return [array for _, array in run.state_parts()]

    def close() -> None:
        scratch.close()
        kept.close()

    found = back()
    difference = float(np.abs(np.concatenate(found) - states).max())
    views = all(array.base is not None and not array.flags.owndata for array in found)
    del found
    arms: dict[str, Callable[[], object]] = {
        "write and fsync": lambda: plain_write(scratch.path / "plain.bin", data),
        "states to Parquet": lambda: write_states(writer, next(scratch.numbers), [(keys, states)], "float32"),
        "read as views": back,
    }
    facts = {
        "bytes": states.nbytes, "shape": list(states.shape), "read_without_copy": views,
        "file_system": file_system(scratch.path),
    }  # fmt: skip
    return Case(
        "states", f"{rows} × {dim}", "write and fsync", arms, differences={"read as views": difference}, facts=facts,
        after=scratch.clear, close=close,
    )  # fmt: skip


def disk_case(subject: Subject, size: Size, wanted: Sequence[str] | None, folder: Path | None) -> Case:
    """Every block's output at every token of a forward, on disk at the end."""
    ids = random_ids(subject, size.batch, size.length)
    read, dtype = reader(subject, ids), str(subject.state_dtype or subject.dtype).removeprefix("torch.")
    scratch = _Scratch(folder)
    separate, whole = scratch.writer("separate"), scratch.writer("whole")

    def rows_of(states: Sequence[Tensor]) -> list[tuple[pd.DataFrame, Tensor]]:
        n = size.batch * size.length
        return [
            (state_keys(n, size.length, depth), state.reshape(n, -1).cpu()) for depth, state in enumerate(states, 1)
        ]

    def by_layer() -> None:
        write_states(separate, next(scratch.numbers), rows_of(blocks_of(read())), dtype)

    def at_once() -> None:
        parts = rows_of(blocks_of(read()))
        joined = pd.concat([keys for keys, _ in parts], ignore_index=True)
        write_states(whole, next(scratch.numbers), [(joined, torch.cat([states for _, states in parts]))], dtype)

    peers, absent, _ = capturing_peers(subject, ids, wanted)
    reference = blocks_of(read())
    arms: dict[str, Callable[[], object]] = {
        BARE: bare_forward(subject, ids), "dynprobe, a file per layer": by_layer, "dynprobe, one file": at_once
    }  # fmt: skip
    differences = {
        name: _read_back(scratch, arms[name], reference) for name in list(arms) if name.startswith("dynprobe")
    }
    over: dict[str, str] = {}
    for name, peer in peers.items():
        place = scratch.path / f"{peer.package}.safetensors"

        def to_file(peer: Any = peer, place: Path = place) -> None:
            states = {f"layer.{i}": state.contiguous().cpu() for i, state in enumerate(peer.capture(ids))}
            save_file(states, place)
            with place.open("rb+") as file:
                os.fsync(file.fileno())

        label = f"{name} → safetensors"
        to_file()
        kept = load_file(place)
        differences[label] = largest_difference(reference, [kept[f"layer.{i}"] for i in range(len(kept))])
        arms[label] = to_file
        if peer.own_forward:
            bare = f"{name}, bare"
            arms[bare] = lambda peer=peer: peer.forward(ids)  # type: ignore[misc]
            over[label] = over[bare] = bare
        place.unlink()
    facts = {
        "bytes": sum(state.nbytes for state in reference), "file_system": file_system(scratch.path),
        "state_dtype": dtype,
    }  # fmt: skip
    return Case(
        "disk", f"{size.batch} × {size.length}", BARE, arms, over, differences, absent, facts, after=scratch.clear,
        close=scratch.close,
    )  # fmt: skip


def _read_back(scratch: _Scratch, write: Callable[[], object], reference: Sequence[Tensor]) -> float:
    """Write once, read what lies on disk, and compare it with what was captured."""
    scratch.clear()
    write()
    found: dict[int, list[Tensor]] = {}
    for path in sorted(scratch.path.rglob("*.parquet")):
        for depth in range(1, len(reference) + 1):
            for _, array, dtype in read_states(path, {"depth": depth}):
                values = decode_bfloat16(array) if dtype == "bfloat16" else np.array(array)
                found.setdefault(depth, []).append(torch.from_numpy(values))
    scratch.clear()
    flat = [state.reshape(-1, state.shape[-1]) for state in reference]
    return largest_difference(flat, [torch.cat(found[depth]) for depth in sorted(found)])


def file_system(path: Path) -> str | None:
    """Return the kind of file system a path lies on, where the system says so."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return None
    lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    inside = [(len(line[1]), line[2]) for line in lines if path.resolve().is_relative_to(line[1])]
    return max(inside)[1] if inside else None
