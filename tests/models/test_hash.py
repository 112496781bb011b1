from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch

from dynprobe.errors import ModelError
from dynprobe.models import weights_hash
from dynprobe.models._hash import file_sha256


def _age(path: Path, seconds: float) -> None:
    stamp = time.time() - seconds
    os.utime(path, (stamp, stamp))


def test_file_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    _age(path, 60)
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    calls: list[object] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: calls.append(a) or real(*a))  # type: ignore[func-returns-value]
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert not calls
    path.write_bytes(b"two")
    _age(path, 30)
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    assert len(calls) == 1


def test_a_young_file_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    stamp = path.stat().st_mtime_ns
    file_sha256(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_a_damaged_or_unwritable_memory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    _age(path, 60)
    wanted = file_sha256(path)
    (memo,) = (Path(os.environ["DYNPROBE_CACHE"]) / "hashes").iterdir()
    memo.write_text("[")
    assert file_sha256(path) == wanted
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNPROBE_CACHE", str(tmp_path / "file"))
    assert file_sha256(path) == wanted


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def test_live_hash_sees_names_bytes_shapes_dtypes_and_buffers() -> None:
    base = weights_hash(_model())
    assert base == weights_hash(_model())
    changed = {base}
    for change in range(5):
        model = _model()
        with torch.no_grad():
            if change == 0:
                model[0].weight[0, 0] += 1e-6
            elif change == 1:
                model = torch.nn.ModuleDict({"a": model[0], "b": model[1]})
            elif change == 2:
                model[0].weight = torch.nn.Parameter(model[0].weight.reshape(3, 4))
            elif change == 3:
                model = model.to(torch.bfloat16)
            else:
                model[1].running_mean += 1
        changed.add(weights_hash(model))
    assert len(changed) == 6


def test_live_hash_of_tied_and_strided_weights() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    plain = weights_hash(model)
    untied = model["b"].weight.detach().clone()
    model["b"].weight = torch.nn.Parameter(untied.T.contiguous().T)
    assert weights_hash(model) == plain
    model["b"].weight = model["a"].weight
    tied = weights_hash(model)
    assert tied != plain
    model["b"].weight = torch.nn.Parameter(model["a"].weight.detach().clone())
    assert weights_hash(model) == tied


def test_live_hash_refuses_what_has_no_bytes() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="no storage"):
        weights_hash(model)


def test_gguf_hash_does_not_depend_on_the_file_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUFxyz")
    assert weights_hash(tmp_path / "a.gguf") == weights_hash(tmp_path / "b.gguf")
