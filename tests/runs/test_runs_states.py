from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynprobe.errors import RunFolderError
from dynprobe.runs import decode_bfloat16, open_run
from dynprobe.runs._states import read_states, states_table, write_states_file


def keys(rows, **more):
    frame = {"sample_id": "s", "pos": np.arange(rows), "track": "resid", "depth": 1, "layer": 0}
    return pd.DataFrame(frame | more, index=range(rows))


def store(tmp_path, make, states, dtype, **more):
    writer = make["begin"](tmp_path)
    writer.write_states(0, keys(len(states), **more), states, dtype)
    writer.write_batch(0, {})
    return open_run(writer.folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 4)])
def test_every_dtype_and_shape_round_trips(tmp_path, make, dtype, shape):
    states = torch.randn(shape).to(getattr(torch, dtype))
    frame, back = store(tmp_path, make, states, dtype).states(depth=1)
    assert back.shape == shape
    assert frame["pos"].tolist() == list(range(5))
    expected = states.float() if dtype == "bfloat16" else states
    np.testing.assert_array_equal(back, expected.numpy())
    assert back.dtype == expected.numpy().dtype


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint16, (3, 4)))
def test_bfloat16_is_exact_in_every_bit(bits):
    tensor = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
    decoded = decode_bfloat16(bits)
    np.testing.assert_array_equal(decoded.view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(decoded, tensor.float().numpy())
    table = states_table(keys(3), tensor, "bfloat16", {})
    assert b"".join(v.as_py() for v in table["state"]) == bits.tobytes()


def test_raw_bits_of_bfloat16(tmp_path, make):
    states = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    run = store(tmp_path, make, states, "bfloat16")
    assert run.states(raw=True)[1].tolist() == [[0x3F80, 0xC000]]
    assert run.states()[1].tolist() == [[1.0, -2.0]]


def test_writing_does_not_copy():
    states = torch.randn(4, 8)
    column = states_table(keys(4), states, "float32", {})["state"].chunk(0)
    assert column.buffers()[1].address == states.data_ptr()


def test_reading_is_a_view(tmp_path, make):
    run = store(tmp_path, make, np.ones((6, 4), np.float32), "float32")
    _, states = run.states(layer=0)
    assert not states.flags.owndata
    _, some = run.states(pos=[2, 3])
    assert some.shape == (2, 4)
    assert not some.flags.owndata


def test_file_is_plain(tmp_path, make):
    run = store(tmp_path, make, np.ones((6, 4), np.float32), "float32")
    file = pq.ParquetFile(run.path / run.manifest.parts_of("states")[0].path)
    meta = file.metadata.row_group(0)
    state = next(meta.column(i) for i in range(meta.num_columns) if meta.column(i).path_in_schema == "state")
    assert "PLAIN" in state.encodings
    assert not state.has_dictionary_page
    assert state.compression == "UNCOMPRESSED"
    field = file.schema_arrow.field("state")
    assert str(field.type) == "fixed_size_binary[16]"
    assert field.metadata == {b"dynprobe.dtype": b"float32", b"dynprobe.shape": b"[4]", b"dynprobe.order": b"little"}


def test_lz4(tmp_path):
    table = states_table(keys(6), np.ones((6, 64), np.float32), "float32", {})
    write_states_file(tmp_path / "x.parquet", table, "lz4")
    ((_, states, _),) = read_states(tmp_path / "x.parquet", {})
    assert (states == 1).all()


def test_rows_are_found_by_label_over_parts_and_row_groups(tmp_path, make, monkeypatch):
    monkeypatch.setattr("dynprobe.runs._states._ROW_GROUP_BYTES", 64)
    writer = make["begin"](tmp_path)
    for number in (0, 1):
        for depth in (1, 2):
            frame = keys(6, depth=depth, layer=depth - 1, sample_id=f"s{number}")
            states = np.full((6, 4), 10 * number + depth, np.float32) + np.arange(6, dtype=np.float32)[:, None] / 10
            writer.write_states(number, frame, states, "float32")
        writer.write_batch(number, {})
    run = open_run(writer.folder)
    frame, states = run.states(layer=1)
    expected = [10 * int(s[1]) + 2 + p / 10 for s, p in zip(frame["sample_id"], frame["pos"], strict=True)]
    np.testing.assert_allclose(states[:, 0], expected)
    assert len(states) == 12
    assert len(run.states(layer=1, pos=[0, 5], sample_id="s1")[1]) == 2
    assert len(list(run.state_parts(depth=1))) == 4


@given(st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_non_contiguous_tensors(rows, dim):
    states = torch.randn(dim, rows).T
    table = states_table(keys(rows), states, "float32", {})
    assert b"".join(v.as_py() for v in table["state"]) == states.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("states", "dtype", "message"),
    [
        (torch.zeros(2, 3), "bfloat16", "States are float32, and bfloat16 was announced"),
        (np.zeros((2, 3), np.int32), "float32", "int32"),
        (torch.zeros(3, 3), "float32", r"shape \[3, 3\] and 2 rows"),
        (torch.zeros(2, 0), "float32", "without any number"),
        (torch.zeros(2), "float32", r"\[rows, …\]"),
        (torch.zeros(2, 3), "flaot32", "Did you mean 'float32'"),
    ],
)
def test_disagreements_are_named(states, dtype, message):
    with pytest.raises(RunFolderError, match=message):
        states_table(keys(2), states, dtype, {})


def test_questions_without_an_answer(tmp_path, make, run_folder):
    run = open_run(run_folder)
    with pytest.raises(RunFolderError, match=r"layer=9.*Stored are.*layer: -1, 0, 1, 2"):
        run.states(layer=9)
    with pytest.raises(RunFolderError, match=r"no key 'layr'.*'layer'"):
        run.states(layr=1)
    writer = make["begin"](tmp_path / "none")
    with pytest.raises(RunFolderError, match="--states"):
        open_run(writer.folder).states(layer=0)
    for width in (2, 3):
        writer.write_states(0, keys(2, depth=width), np.zeros((2, width)), "float64")
    writer.write_batch(0, {})
    with pytest.raises(RunFolderError, match="different shapes"):
        open_run(writer.folder).states()
    assert open_run(writer.folder).states(depth=3)[1].shape == (2, 3)
