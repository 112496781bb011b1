"""Trajectory files: every format into one shape, and every bad one refused with its place and the way out."""

import io
import json
import pickle
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from dynprobe.errors import UsageError
from dynprobe.runs import read_trajectory

DIMS = ["iter", "batch", "pos", "state", "dim"]


def states(n=6, batch=2, pos=3, slots=4, dim=5, dtype=np.float32):
    start = np.random.default_rng(0).standard_normal((1, batch, pos, slots, dim))
    return (0.5 ** np.arange(n)[:, None, None, None, None] * start).astype(dtype)


def table(x, iters=None):
    rows = [
        {"sample": f"p{b}", "pos": t, "iter": int(k if iters is None else iters[k]), "state": s, "vec": x[k, b, t, s]}
        for k, b, t, s in np.ndindex(x.shape[:4])
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        file = tmp_path / "states.npz"
        np.savez(file, **arrays)
        return file

    return write


@pytest.fixture
def parquet(tmp_path):
    def write(frame, meta=None):
        file, made = tmp_path / "states.parquet", pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(made.replace_schema_metadata({"meta": json.dumps(meta)} if meta else None), file)
        return file

    return write


def refused(file, *words):
    with pytest.raises(UsageError) as caught:
        read_trajectory(file)
    for word in (str(file), *words):
        assert word in str(caught.value)
    return str(caught.value)


def test_npz_holds_everything(npz):
    x = states()
    energy = -np.arange(36.0).reshape(6, 2, 3)
    valid = np.array([[True, True, True], [True, True, False]])
    found = read_trajectory(
        npz(
            states=x, dims=DIMS, iter=np.arange(6), stage=["core"] * 6, energy=energy, valid=valid, ids=["a", "b"],
            token_ids=np.arange(6).reshape(2, 3), meta=json.dumps({"model": "m", "trained_iterations": 9}),
        )
    )  # fmt: skip
    assert np.array_equal(found.states.numpy(), x)
    assert found.states.dtype == torch.float32
    assert found.iter.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.stages.keys() == {"core"}
    assert np.array_equal(found.energy, energy)
    assert np.array_equal(found.valid, valid)
    assert found.ids == ("a", "b")
    assert found.token_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.meta["model"] == "m"
    assert (found.mode, found.remarks, found.assumed) == ("trajectory", (), ())
    assert found.has_slots
    assert len(found.sha256) == 64
    said = found.describe()
    assert said["padding"] == 1
    json.dumps(said)


def test_three_formats_are_one_trajectory(npz, parquet, tmp_path):
    x = states()
    of_npz = read_trajectory(npz(states=x, dims=DIMS, ids=["p0", "p1"]))
    file = tmp_path / "states.safetensors"
    header = {"dims": ",".join(DIMS), "ids": json.dumps(["p0", "p1"]), "meta": json.dumps({"seed": 1})}
    safetensors.numpy.save_file({"states": x, "iter": np.arange(6)}, file, metadata=header)
    of_safetensors = read_trajectory(file)
    shuffled = table(x).sample(frac=1, random_state=0)
    of_table = read_trajectory(parquet(shuffled, meta={"seed": 1}))
    order = [of_table.ids.index(name) for name in ("p0", "p1")]
    for other, theirs in ((of_safetensors, of_safetensors.states), (of_table, of_table.states[:, order])):
        assert torch.equal(of_npz.states, theirs)
        assert other.meta == {"seed": 1}
        assert np.array_equal(of_npz.iter, other.iter)
    wide = table(x)
    wide = wide.drop(columns="vec").join(pd.DataFrame(np.stack(wide["vec"]), columns=[f"dim_{i}" for i in range(5)]))
    assert torch.equal(read_trajectory(parquet(wide)).states, of_npz.states)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_is_kept(npz, parquet, dtype):
    assert read_trajectory(npz(states=states(dtype=dtype), dims=DIMS)).dtype == np.dtype(dtype).name
    assert read_trajectory(parquet(table(states(dtype=dtype)))).dtype == np.dtype(dtype).name
    swapped = states(dtype=dtype).astype(np.dtype(dtype).newbyteorder(">"))
    assert torch.equal(read_trajectory(npz(states=swapped, dims=DIMS)).states, torch.from_numpy(states(dtype=dtype)))


def test_bfloat16_comes_in_safetensors(tmp_path):
    x = torch.from_numpy(states()).bfloat16()
    file = tmp_path / "s.safetensors"
    safetensors.torch.save_file({"states": x}, file, metadata={"dims": ",".join(DIMS)})
    found = read_trajectory(file)
    assert found.dtype == "bfloat16"
    assert torch.equal(found.states, x)
    assert any("bfloat16" in line for line in found.remarks)


def test_axes_come_in_any_order_and_may_be_missing(npz):
    x = states()
    turned = read_trajectory(npz(states=x.transpose(1, 0, 4, 2, 3), dims=["batch", "iter", "dim", "pos", "state"]))
    assert np.array_equal(turned.states.numpy(), x)
    bare = read_trajectory(npz(states=x[:, 0, 0]))
    assert list(bare.states.shape) == [6, 1, 1, 4, 5]
    assert bare.dims == ("iter", "state", "dim")
    assert any("dims" in line for line in bare.assumed)
    tokens = read_trajectory(npz(states=x[:, :, :, 0], dims="iter,batch,pos,dim"))
    assert list(tokens.states.shape) == [6, 2, 3, 1, 5]
    assert not tokens.has_slots
    energy = read_trajectory(npz(states=x[:, 0, 0], energy=np.arange(6.0))).energy
    assert energy.shape == (6, 1, 1)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"states": states()}, ["[6, 2, 3, 4, 5]", "no dims", "dims=["]),
        ({"states": states(), "dims": [*DIMS[:4], "feature"]}, ["'feature'", "Did you mean 'dim'?"]),
        ({"states": states(), "dims": [*DIMS[:3], "stats", "dim"]}, ["'stats'", "Did you mean 'state'?"]),
        ({"states": states(), "dims": ["iter", "iter", "pos", "state", "dim"]}, ["twice"]),
        ({"states": states(), "dims": DIMS[:4]}, ["no dim axis"]),
        ({"states": states(), "dims": DIMS[1:]}, ["no iter axis"]),
        ({"states": states(), "dims": ["iter", "state", "dim"]}, ["5 axes", "name 3"]),
        ({"states": states().astype(int), "dims": DIMS}, ["int64", "astype(np.float32)"]),
        ({"states": states().astype(complex), "dims": DIMS}, ["complex128"]),
        ({"states": states()[:, :0], "dims": DIMS}, ["[6, 0, 3, 4, 5]"]),
        ({"states": states()[:1], "dims": DIMS}, ["1 iteration", "needs 2"]),
        ({"states": states(), "dims": DIMS, "iter": [0, 1, 2, 2, 3, 4]}, ["iter[3] = 2 after iter[2] = 2"]),
        ({"states": states(), "dims": DIMS, "iter": [0, 1, 3, 2, 4, 5]}, ["iter[3] = 2 after iter[2] = 3"]),
        ({"states": states(), "dims": DIMS, "iter": [-1, 0, 1, 2, 3, 4]}, ["iter[0] = -1"]),
        ({"states": states(), "dims": DIMS, "iter": [0, 1, 2]}, ["3 entries", "6"]),
        ({"states": states(), "dims": DIMS, "iter": np.arange(6) + 0.5}, ["whole numbers"]),
        ({"states": states(), "dims": DIMS, "iter": np.arange(6), "depth": np.arange(6)}, ["both iter and depth"]),
        ({"states": states(), "dims": DIMS, "stage": ["a", "b"]}, ["2 names", "6 iterations"]),
        ({"states": states(), "dims": DIMS, "energy": np.zeros((6, 3, 2))}, ["energy", "[6, 3, 2]", "[6, 2, 3]"]),
        ({"states": states(), "dims": DIMS, "energy": np.full((6, 2, 3), np.inf)}, ["infinite", "[0, 0, 0]"]),
        ({"states": states(), "dims": DIMS, "valid": np.full((2, 3), 2)}, ["True and False"]),
        ({"states": states(), "dims": DIMS, "valid": np.zeros((2, 3), bool)}, ["False everywhere"]),
        ({"states": states(), "dims": DIMS, "valid": [[1, 0, 1], [1, 1, 1]]}, ["sample 0", "hole at position 1"]),
        ({"states": states(), "dims": DIMS, "ids": ["a", "a"]}, ["'a'", "twice"]),
        ({"states": states(), "dims": DIMS, "ids": ["a"]}, ["1 names", "2 samples"]),
        ({"states": states(), "dims": DIMS, "ids": np.zeros((2, 3), int)}, ["token_ids"]),
        ({"states": states(), "dims": DIMS, "meta": "{'a': 1}"}, ["no JSON", "json.dumps"]),
        ({"states": states(), "dims": DIMS, "meta": "[1]"}, ["meta is a list"]),
        ({"state": states(), "dims": DIMS}, ["no array called states", "Did you mean 'states'?"]),
        ({}, ["nothing"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else "-".join(value)[:24],
)
def test_a_bad_file_is_refused_with_what_was_found(npz, arrays, words):
    refused(npz(**arrays), *words)


def test_the_first_number_that_is_none_is_named(npz):
    x = states()
    x[4, 1, 2, 3, 0], x[3, 0, 1, 2, 4] = np.inf, np.nan
    refused(npz(states=x, dims=DIMS), "nan at iter=3, batch=0, pos=1, state=2, dim=4 (iteration 3), the first of 2")
    refused(npz(states=x[:, 0, 1]), "iter=3, state=2, dim=4")
    padded = np.array([[True, False, False], [True, True, False]])
    assert read_trajectory(npz(states=x, dims=DIMS, valid=padded)).valid.sum() == 3


def test_pickles_are_refused_unread(npz, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    refused(npz(states=np.array([Bomb()], dtype=object), dims=DIMS), "pickled", "np.stack")
    refused(npz(states=states(), dims=DIMS, meta=np.array({"a": 1}, dtype=object)), "meta", "json.dumps")
    for name in ("s.pt", "s.pkl", "s.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        refused(tmp_path / name, "pickle", "np.savez")
    assert not (tmp_path / "ran").exists()


def test_doubled_and_damaged_archives(npz, tmp_path):
    file = npz(states=states(), dims=DIMS)
    twice, again = tmp_path / "twice.npz", io.BytesIO()
    np.save(again, states())
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(twice, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        with pytest.warns(UserWarning, match="Duplicate"):
            new.writestr("states.npy", again.getvalue())
    refused(twice, "'states' stands twice")
    half = tmp_path / "half.npz"
    half.write_bytes(file.read_bytes()[:200])
    refused(half, "no .npz file")
    for name in ("x.safetensors", "x.parquet"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        refused(tmp_path / name, "is no .")
    (tmp_path / "x.csv").write_text("1")
    refused(tmp_path / "x.csv", ".csv", ".parquet")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "stats.npz", "Did you mean", "states.npz'?")


def test_two_stages_count_by_themselves(npz):
    x = states(n=8)
    stage = ["L", "H"] * 4
    found = read_trajectory(npz(states=x, dims=DIMS, stage=stage))
    assert {name: at.tolist() for name, at in found.stages.items()} == {"L": [0, 2, 4, 6], "H": [1, 3, 5, 7]}
    assert found.iter.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sum("needs 5" in line for line in found.remarks) == 2
    refused(npz(states=x, dims=DIMS, stage=stage, iter=[0, 0, 1, 1, 1, 2, 2, 3]), "stage 'L'", "iter[4] = 1")
    refused(npz(states=x[:3], dims=DIMS, stage=["L", "L", "H"]), "'H' has 1 iteration")


def test_thin_files_are_read_with_remarks(npz):
    few = read_trajectory(npz(states=states(n=3), dims=DIMS))
    assert any("needs 5" in line for line in few.remarks)
    gaps = read_trajectory(npz(states=states(), dims=DIMS, iter=[0, 5, 10, 15, 20, 25]))
    assert any("gaps" in line for line in gaps.remarks)
    late = read_trajectory(npz(states=states(), dims=DIMS, iter=np.arange(1, 7)))
    assert any("begins at iteration 1" in line for line in late.remarks)
    deep = read_trajectory(npz(states=states(), dims=DIMS, meta=json.dumps({"trained_iterations": 4})))
    assert any("above the depth" in line for line in deep.remarks)
    other = read_trajectory(npz(states=states(), dims=DIMS, energies=np.zeros(6)))
    assert any("energies is not read. Did you mean 'energy'?" in line for line in other.remarks)
    energy = np.zeros((6, 2, 3))
    energy[0] = np.nan
    assert any(
        "missing at 6 of 36" in line for line in read_trajectory(npz(states=states(), dims=DIMS, energy=energy)).remarks
    )


def test_a_run_per_depth(npz):
    x = states(n=6)
    alone = read_trajectory(npz(**{f"states_depth_{k}": x[k] for k in (1, 3, 5)}, dims=DIMS[1:]))
    assert alone.mode == "final_per_depth"
    assert alone.iter.tolist() == [1, 3, 5]
    assert np.array_equal(alone.states.numpy(), x[[1, 3, 5]])
    assert any("one run per depth" in line for line in alone.remarks)
    assert read_trajectory(npz(states=x[[1, 3, 5]], dims=DIMS, depth=[1, 3, 5])).mode == "final_per_depth"
    assert list(read_trajectory(npz(states_depth_1=x[1, 0, 0], states_depth_2=x[2, 0, 0])).states.shape) == [
        2,
        1,
        1,
        4,
        5,
    ]
    refused(npz(states_depth_1=x[1], states_depth_2=x[2, :, :2], dims=DIMS), "shape changes", "states_depth_2")
    refused(npz(states=x[[1, 3, 5]], dims=DIMS, depth=[1, 3, 3]), "depth[2] = 3 after depth[1] = 3")
    refused(npz(states_depth_1=x[1], states_depth_2=x[2]), "no dims")


def test_the_prefix_property_is_checked(npz):
    x = states(n=6)
    same = read_trajectory(npz(states=x, dims=DIMS, states_depth_2=x[2], states_depth_9=x[5]))
    assert same.mode == "trajectory"
    assert same.prefix == {2: 0.0}
    assert any("depths 9 are not among" in line for line in same.remarks)
    assert not any("fails" in line for line in same.remarks)
    with_noise = x[2].copy()
    with_noise[1, 2] *= 1.1
    broken = read_trajectory(npz(states=x, dims=DIMS, states_depth_2=with_noise, states_depth_4=x[4]))
    assert broken.prefix[2] == pytest.approx(0.1 / 1.1, rel=1e-5)
    (line,) = (line for line in broken.remarks if "prefix property fails" in line)
    assert "depth 2 ends 0.091" in line
    refused(npz(states=x, dims=DIMS, states_depth_2=x[2, :, :2]), "shape changes")


def test_a_long_table_with_depths(parquet):
    x = states()
    full = pd.concat([table(x[: k + 1]).assign(depth=k) for k in (2, 5)], ignore_index=True)
    found = read_trajectory(parquet(full))
    assert found.mode == "trajectory"
    assert found.prefix == {2: 0.0}
    assert np.array_equal(found.states.numpy(), x)
    last = table(x[[2, 5]], iters=[2, 5]).rename(columns={"iter": "depth"})
    finals = read_trajectory(parquet(last))
    assert (finals.mode, finals.iter.tolist()) == ("final_per_depth", [2, 5])
    assert np.array_equal(finals.states.numpy(), x[[2, 5]])
    short = full[(full["depth"] == 5) | (full["iter"] < 2)]
    refused(parquet(short), "the run of depth 2 ends at iteration 1")


def test_a_long_table_of_unequal_texts(parquet):
    x = states()
    rows = table(x).assign(energy=lambda f: -f["iter"] * 1.0, delta=lambda f: f["state"] * 1.0)
    rows = rows[(rows["sample"] != "p1") | (rows["pos"] < 2)].assign(pos=lambda f: f["pos"] + 7)
    found = read_trajectory(parquet(rows))
    assert found.valid.tolist() == [[True] * 3, [True, True, False]]
    assert found.positions[0].tolist() == [7, 8, 9]
    assert found.energy[3, 0, 0] == -3
    assert found.delta[2, 1, 1] == 1.5
    assert np.isnan(found.energy[:, 1, 2]).all()
    assert np.array_equal(found.states[:, 1, 1].numpy(), x[:, 1, 1])


def test_bad_long_tables(parquet):
    x = states(n=3)
    rows = table(x)
    refused(parquet(pd.concat([rows, rows.iloc[[17]]])), "two rows", "iter=0", "state=1")
    refused(parquet(rows.drop(index=[30, 40])), "2 rows are missing, the first: sample 'p0', pos 1, iter 1", "state 2")
    refused(parquet(rows.rename(columns={"iter": "itr"})), "no column iter", "Did you mean 'iter'?")
    refused(parquet(rows.drop(columns="vec")), "neither vec nor dim_0")
    refused(parquet(rows.assign(iter=rows["iter"] + 0.5)), "whole numbers")
    short = rows.copy()
    short.at[5, "vec"] = short.at[5, "vec"][:3]
    refused(parquet(short), "shape changes", "3 in row 5")
    broken = rows.copy()
    broken.at[29, "vec"] = np.array([0, 0, np.nan, 0, 0], np.float32)
    refused(parquet(broken), "nan at iter=1, batch=0, pos=1, state=1, dim=2")
    wide = rows.drop(columns="vec").assign(dim_0=1.0, dim_2=1.0)
    refused(parquet(wide), "dim_1 is missing")
    refused(parquet(wide.assign(dim_1=None)), "dim_1")
    refused(parquet(rows.assign(energy=np.arange(len(rows)) * 1.0)), "different energies")
    refused(parquet(rows.iloc[:0]), "no rows")
    assert read_trajectory(parquet(rows.assign(note="x"))).remarks[0].startswith("note is not read")
