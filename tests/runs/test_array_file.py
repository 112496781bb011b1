"""One array from somebody else's file: the numbers, or an error that names the file."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from dynprobe.errors import UsageError
from dynprobe.runs._array_file import load_npy, load_tensors, physical_memory


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "|i1", "<c8"])
def test_an_array_comes_back(tmp_path, order, dtype):
    array = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    found = load_npy(tmp_path / "a.npy")
    assert found.dtype == array.dtype
    assert (found == array).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "cut short"), (lambda data: data + b"x", "cut short"), (lambda data: b"", "no .npy"),
        (lambda data: data[:20], "no .npy"), (lambda data: data.replace(b"(6,)", b"(7,)"), "cut short"),
        (lambda data: data.replace(b"'<f8'", b"'|O' "), "pickled"),
        (lambda data: data.replace(b"{", b"(", 1), "no .npy"),
        (lambda data: data.replace(b"(6,)", b"-6, "), "no .npy"), (lambda data: b"PK\x03\x04" + data, "no .npy"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, change, said):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6.0))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match=said) as caught:
        load_npy(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_npy(tmp_path / "no.npy")
    with pytest.raises(UsageError, match=r"no\.safetensors"):
        load_tensors(tmp_path / "no.safetensors")


def test_tensors_come_back_or_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.arange(3.0)}, path)
    assert load_tensors(path)["x"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"no \.safetensors file"):
        load_tensors(path)


def test_memory_is_a_number_of_bytes():
    assert physical_memory() > 2**28
