from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dynprobe.metrics
from dynprobe.errors import RunFolderError
from dynprobe.runs import COLUMNS, TABLES, open_run, registry_facts
from dynprobe.runs._encode import conform, to_bytes
from dynprobe.runs._tables import to_frame


def through(name, data, facts=None):
    return to_frame(pq.read_table(pa.BufferReader(to_bytes(conform(name, data, facts or {})))))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
BY_KIND = {
    "label": texts,
    "text": st.none() | texts,
    "json": st.dictionaries(st.text("ab", max_size=2), st.integers(0, 9), max_size=2),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.none() | st.floats(width=32, allow_subnormal=False),
    "float64": st.none() | st.floats(),
    "ids": st.lists(st.integers(0, 2**31 - 1), max_size=3),
}


@st.composite
def frames(draw):
    name = draw(st.sampled_from([n for n in TABLES if n != "states"]))
    table = TABLES[name]
    rows = draw(st.integers(1, 5))
    names = [*table.keys, *(c for c in table.columns if draw(st.booleans()))]
    data = {}
    for column in names:
        unique = table.unique and column == table.keys[0]
        data[column] = draw(st.lists(BY_KIND[COLUMNS[column].kind], min_size=rows, max_size=rows, unique=unique))
    if not data or draw(st.booleans()):
        data["kappa_phase"] = draw(st.lists(st.none() | st.floats(width=32), min_size=rows, max_size=rows))
        data["threshold_star"] = draw(st.lists(st.floats(), min_size=rows, max_size=rows))
        data["flip"] = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    if "alpha" in data:
        data["alpha"] = [0.5 if v is None or v != v else v for v in data["alpha"]]
    return name, data


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames())
def test_every_table_and_type_round_trips(case):
    name, data = case
    back = through(name, pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in data.items()}))
    assert set(back.columns) == set(data)
    for column, values in data.items():
        kind = COLUMNS[column].kind if column in COLUMNS else None
        got = back[column].tolist()
        if kind == "label":
            assert isinstance(back[column].dtype, pd.CategoricalDtype)
            assert got == values
        elif kind == "json":
            assert [json.loads(v) for v in got] == values
        elif kind == "ids":
            assert [list(v) for v in got] == values
        elif kind == "text":
            assert [None if pd.isna(v) else v for v in got] == values
        elif kind in {"int32", "int64"} or column == "flip":
            assert got == values
            assert str(back[column].dtype) == (kind or "bool")
        else:
            expected = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            np.testing.assert_array_equal(np.asarray(got, dtype=np.float64), expected)


def test_metrics_are_float32_and_strengths_float64():
    facts = {"mass": {"dtype": "float64"}}
    frame = {"sample_id": ["a"], "pos": [0], "nll": [0.1], "alpha_l2": [0.1], "threshold_kl": [0.1], "mass": [0.1]}
    types = through("tokens", frame, facts).dtypes.astype(str)
    assert types[["nll", "alpha_l2", "threshold_kl", "mass"]].tolist() == ["float32", "float64", "float64", "float64"]


@pytest.mark.parametrize("value", [1e50, 1e-60, 1e-40])
def test_what_float32_cannot_hold_stays_double(value):
    back = through("tokens", {"sample_id": ["a", "b"], "pos": [0, 0], "ppl": [value, float("nan")]})
    assert back["ppl"].tolist()[0] == value


def test_wider_type_wins_over_parts_and_a_missing_column_is_nan(tmp_path, make):
    writer = make["begin"](tmp_path)
    for number, extra in enumerate([{"ppl": [2.0, 3.0]}, {"ppl": [1e50, 1.0], "regime": ["a", "b"]}]):
        samples = make["batch"](number)["samples"].assign(**extra)
        writer.write_batch(number, {"samples": samples})
    back = open_run(writer.folder).samples.set_index("sample_id").sort_index()
    assert back["ppl"].tolist() == [2.0, 3.0, 1e50, 1.0]
    assert back["regime"].isna().tolist() == [True, True, False, False]


def test_null_column_has_a_type_that_joins_with_any_later_part(tmp_path, make):
    writer = make["begin"](tmp_path)
    for number, (why, score) in enumerate([(None, None), ("too short", 0.5)]):
        writer.write_batch(number, {"samples": make["batch"](number)["samples"].assign(fit_reason=why, score=score)})
    run = open_run(writer.folder)
    back = run.samples.set_index("sample_id").sort_index()
    assert back["score"].tolist()[2:] == [0.5, 0.5]
    assert back["fit_reason"].tolist()[2:] == ["too short"] * 2
    assert back["score"].isna().tolist() == back["fit_reason"].isna().tolist() == [True, True, False, False]
    assert run.sql("select count(fit_reason) as n from samples")["n"].item() == 2


def test_categories_are_unified_over_parts(run_folder):
    samples = open_run(run_folder).samples
    assert samples["prompt_id"].dtype.categories.tolist() == ["p0", "p1"]
    assert open_run(run_folder).depths["track"].dtype.categories.tolist() == ["resid"]


def test_part_order_is_irrelevant(tmp_path, make):
    frames_by_order = []
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        writer = make["begin"](tmp_path / name)
        for number in order:
            writer.write_batch(number, make["batch"](number))
        writer.finish({})
        frames_by_order.append(open_run(writer.folder))
    for table in ("samples", "tokens", "depths"):
        pd.testing.assert_frame_equal(*(run.table(table) for run in frames_by_order))


def test_arrow_tables_and_named_indexes_are_accepted():
    frame = pd.DataFrame({"sample_id": ["a", "a"], "pos": [0, 1], "nll": [1.0, np.nan]})
    expected = through("tokens", frame)
    pd.testing.assert_frame_equal(through("tokens", pa.Table.from_pandas(frame)), expected)
    pd.testing.assert_frame_equal(through("tokens", frame.set_index(["sample_id", "pos"])), expected)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokens", {"sample_id": ["a"]}, "without its key column 'pos'"),
        ("tokens", {"sample_id": ["a", None], "pos": [0, 1]}, "'sample_id' of table tokens has 1 empty"),
        ("tokens", {"sample_id": ["a"], "pos": [0.5]}, "'pos' of table tokens cannot be stored as int32"),
        ("tokens", {"sample_id": [0.5], "pos": [0]}, "'sample_id' of table tokens cannot be stored as label"),
        ("tokens", {"sample_id": ["a"], "pos": [2**40]}, "'pos'"),
        ("tokens", {"sample_id": ["a"], "pos": [0], "x": [{"a": 1}]}, "'x'.*nested"),
        ("tokens", {"sample_id": ["a"], "pos": [0], "x": [object()]}, "'x'"),
        ("tokens", {"sample_id": ["a", "b"], "pos": [0]}, "different lengths.*'sample_id': 2, 'pos': 1"),
        ("prompts", {"prompt_id": ["a", "a"]}, "several rows with prompt_id 'a'"),
        ("tokenz", {}, "Did you mean 'tokens'"),
        ("tokens", 3, "int"),
        ("tokens", pd.DataFrame([["a", 0]], columns=["sample_id", 0]), "no text"),
    ],
)
def test_defects_are_named(name, data, message):
    with pytest.raises(RunFolderError, match=message):
        conform(name, data, {})


def test_encodings_in_the_file(run_folder):
    meta = pq.ParquetFile(run_folder / "depths/part-00000.parquet").metadata.row_group(0)
    columns = {meta.column(i).path_in_schema: meta.column(i) for i in range(meta.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["norm"].encodings
    assert columns["norm"].compression == columns["sample_id"].compression == "ZSTD"
    for key in ("sample_id", "track", "depth"):
        assert columns[key].has_dictionary_page


def test_facts_of_the_registry_differ_by_table(tmp_path, make):
    facts = registry_facts(dynprobe.metrics.columns())
    writer = make["begin"](tmp_path, columns=facts)
    batch = make["batch"](0)
    batch["samples"] = batch["samples"].assign(limen_regime=["ADAPTIVE", None])
    writer.write_batch(0, batch)
    run = open_run(writer.folder)
    columns = run.columns().set_index(["table", "column"])
    registered = dynprobe.metrics.columns()["nll"]
    for table, level in (("samples", "sample"), ("tokens", "token")):
        assert columns.loc[(table, "nll"), ["id", "unit", "digest", "aggregation"]].tolist() == [
            registered.metric_id,
            registered.unit,
            registered.digest,
            registered.levels[level],
        ]
    assert isinstance(run.samples["limen_regime"].dtype, pd.CategoricalDtype)


def test_facts_are_stored_and_read_back(tmp_path, make):
    facts = {"nll": {"id": "nll.token/1", "unit": "nat", "digest": "ab12", "span": "new", "aggregation": "mean"}}
    writer = make["begin"](tmp_path, columns=facts)
    writer.write_batch(0, make["batch"](0))
    columns = open_run(writer.folder).columns().set_index(["table", "column"])
    assert columns.loc[("tokens", "nll"), ["id", "unit", "span", "dtype"]].tolist() == [
        "nll.token/1",
        "nat",
        "new",
        "float32",
    ]
    assert columns.loc[("tokens", "pos"), "description"].startswith("Number of the token")
    field = pq.read_schema(writer.folder / "tokens/part-00000.parquet").field("nll")
    assert json.loads(field.metadata[b"dynprobe"])["id"] == "nll.token/1"
