import numpy as np
import pandas as pd
import pytest
import torch

from dynprobe.errors import RunFolderError
from dynprobe.runs import RunWriter, open_run
from dynprobe.runs._pack import facts_in, n_rows, pack, table_of

TOKENS = pd.DataFrame({"sample_id": ["a", "a", "b"], "pos": [0, 1, 0], "nll": [2.5, float("nan"), 1.0]})
COLUMNS = {"nll": {"id": "nll/1", "unit": "nats"}}


def states(dtype=torch.float32):
    keys = pd.DataFrame({"sample_id": ["a", "a"], "pos": [0, 1], "track": "resid", "depth": [1, 1]})
    return keys, torch.arange(8, dtype=torch.float32).reshape(2, 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_batch_is_the_batch_bit_for_bit(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    direct = RunWriter.begin(tmp_path / "a", model_name="m", config={}, ident="0123abcd", columns=COLUMNS)
    direct.write_states(0, *states(dtype), name)
    direct.write_batch(0, {"tokens": TOKENS}, facts={"halved": [3]})
    direct.finish({})
    packed = RunWriter.begin(tmp_path / "b", model_name="m", config={}, ident="0123abcd", columns=COLUMNS)
    files = pack({"tokens": TOKENS}, [states(dtype)], dtype=name, facts={"halved": [3]}, columns=COLUMNS)
    assert packed.write_files(0, files) == {"tokens": 3, "states": 2}
    packed.finish({})
    a, b = open_run(direct.folder), open_run(packed.folder)
    assert {(p.path, p.rows, p.sha256) for p in a.manifest.parts} == {
        (p.path, p.rows, p.sha256) for p in b.manifest.parts
    }
    assert a.manifest.batch_facts == b.manifest.batch_facts == {"0": {"halved": [3]}}
    assert a.columns().equals(b.columns())
    for one, other in zip(np.atleast_1d(a.tokens["nll"]), np.atleast_1d(b.tokens["nll"]), strict=True):
        assert one == other or (one != one and other != other)


def test_a_table_without_rows_is_left_out():
    assert pack({"tokens": TOKENS.iloc[:0]}) == {}


def test_what_no_worker_sends_is_refused(tmp_path):
    with RunWriter.begin(tmp_path, model_name="m", config={}, ident="0123abcd") as writer:
        good = pack({"tokens": TOKENS})["tokens.parquet"]
        for name, content, words in [
            ("../tokens.parquet", good, "which is no table"),
            ("tokens.csv", good, "which is no table"),
            ("prompts.parquet", good, "not written in batches"),
            ("tokens.parquet", good[:-9], "no whole Parquet file"),
        ]:
            with pytest.raises(RunFolderError, match=words):
                writer.write_files(0, {name: content})
            assert writer.finished == set()
        writer.write_files(0, {"tokens.parquet": good})
        with pytest.raises(RunFolderError, match="finished already"):
            writer.write_files(0, {"tokens.parquet": good})


def test_facts_and_names():
    files = pack({}, facts={"roads": ["fast"]})
    assert facts_in(files) == {"roads": ["fast"]}
    assert facts_in({}) == {}
    assert table_of("facts.json") is None
    assert table_of("states-03.parquet") == "states"
    assert n_rows(pack({"tokens": TOKENS})["tokens.parquet"]) == 3
