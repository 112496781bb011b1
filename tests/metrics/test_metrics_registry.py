"""Ids, parameters, specs, columns, and refusals of compute."""

import math

import numpy as np
import pytest
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics import (
    CORE,
    DEFAULT,
    Result,
    column_name,
    columns,
    compute,
    format_id,
    ids,
    parse_id,
    spec,
)  # fmt: skip


def test_ids_are_complete_and_well_formed():
    assert len(ids()) == len(set(ids()))
    for metric in ids():
        s = spec(metric)
        assert s.id == metric == format_id(metric)
        assert s.sentence.endswith(".")
        assert s.formula
        assert s.value_range
        assert s.unit
        assert s.source
        assert s.vectors, metric
        assert s.invariances <= {"R", "R_l", "S", "S_l", "P", "T", "scale-per-state", "shift"}
        assert len(s.digest) == 12
        assert set(s.levels) <= {"depth", "token", "profile", "sample"}
        assert str(parse_id(metric)) == metric
    assert set(map(str, CORE)) <= set(DEFAULT)
    assert {parse_id(m).id for m in DEFAULT} <= set(ids())
    assert {parse_id(m).id for m in CORE} == set(ids(group="core"))
    assert {parse_id(m).id for m in DEFAULT} == set(ids(group="default"))
    assert not any(m.startswith("lens") for m in DEFAULT)


def test_digests_differ_and_follow_the_text():
    from dataclasses import replace

    digests = [spec(m).digest for m in ids()]
    assert len(set(digests)) == len(digests)
    s = spec("kappa.phase/1")
    assert replace(s, formula=s.formula + " ").digest != s.digest
    assert replace(s, vectors=s.vectors[:-1]).digest != s.digest
    assert replace(s, sentence="other").digest == s.digest


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("kappa.geom/1{W=64}", "kappa.geom/1"),
        ("kappa.geom/1{W=16}", "kappa.geom/1{W=16}"),
        ("kappa.geom/1{ W = 16 }", "kappa.geom/1{W=16}"),
        ("kappa.phase/1{centre=none,embed=0,final_norm=pre,sink=drop1}", "kappa.phase/1"),
        ("kappa.phase/1{sink=drop0,embed=1}", "kappa.phase/1{embed=1,sink=drop0}"),
        ("limen.ratio/1{norm=winsor_mad,ref=calib}", "limen.ratio/1{norm=winsor_mad,ref=calib}"),
        ("norm.winsor_mad/1{c=3.5}", "norm.winsor_mad/1{c=3.5}"),
    ],
)
def test_parse_and_format(text, canonical):
    assert str(parse_id(text)) == canonical
    assert str(parse_id(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("kappa", "kappa.phase/1"), ("delta", "delta"), ("ratio", "limen.ratio/1"), ("kappa.phase", "kappa.phase/1"),
        ("kappa.phase/2", "kappa.phase/1"), ("kapa.phase/1", "kappa.phase/1"), ("kappa.geom/1{w=3}", "'W'"),
        ("kappa.geom/1{W}", "key=value"), ("kappa.geom/1{W=x}", "number"), ("", "family.estimator"),
    ],
)  # fmt: skip
def test_near_misses(text, hint):
    with pytest.raises(MetricError, match=hint):
        parse_id(text)


def test_columns():
    table = columns()
    for name in (
        "norm", "angle", "delta_rel_prev", "delta_rel_next", "delta_rms", "curv_depth", "kappa_phase", "kappa_path",
        "kappa_geom", "kappa_sync", "kappa_xcorr", "limen_ct", "limen_ct2", "limen_ratio", "limen_qratio", "limen_gini",
        "limen_regime", "debt_cusum", "debt_excess", "collapse_late_ct", "curv_token", "entropy", "margin", "nll",
        "kl_clean_pert", "flip", "kappa_phase_d",
    ):  # fmt: skip
        column = table[name]
        assert column.name == name
        assert spec(column.metric_id).digest == column.digest
        assert column.levels
        assert column.unit
    assert "kappa" not in table
    assert column_name("delta.rel_prev/1{agg=fro}") == "delta_rel_prev_fro"
    assert column_name("kappa.phase.paired/1") == "kappa_phase_d"
    assert ids(level="depth")[0] == "delta.rel_prev/1"
    assert "output.nll/1" in ids(level="token")


def test_compute_refuses():
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    for args, kwargs, text in (
        (("kappa.phase/1", x[0]), {}, "trajectory"),
        (("kappa.phase/1", x), {"mask": np.ones(3)}, "mask"),
        (("kappa.phase/1", x), {"W": 3}, "no parameter"),
        (("kappa.geom/1", x), {"w": 3}, "'W'"),
        (("kappa.geom/1", x), {"W": 3}, "at least 4"),
        (("kappa.phase/1", x, x), {}, "1 input"),
        (("kappa.phase.paired/1", x), {}, "2 input"),
        (("kappa.phase.paired/1", x, x[:, :2]), {}, "one shape"),
        (("kappa.phase.paired/1", x, x), {"inject": 3}, "inject"),
        (("kappa.phase/1", x + 1j), {}, "real"),
        (("kappa.phase/1", "text"), {}, "real|read"),
        (("kappa.phase/1{centre=calib}", x), {}, "inverts"),
        (("delta.rel_prev/1", x), {"agg": "max"}, "fro"),
        (("limen.ct/1", x), {}, "tokens"),
        (("limen.ratio/1", x[0]), {}, "series"),
        (("limen.ratio/1{norm=zmad}", [1.0, 2.0]), {}, "refuses"),
        (("limen.ratio/1{norm=winsor_mad,ref=calib}", [1.0, 2.0]), {}, "reference"),
        (("limen.regime/1", [1.0, 2.0]), {}, "one ratio"),
        (("kappa.phase.z/1", x), {}, "mu"),
        (("kappa.phase.z/1", x), {"mu": [0.1], "sigma": [0.1]}, "2 steps"),
        (("output.nll/1", x[0], [0, 1]), {}, "targets"),
        (("output.entropy/1", x[0, 0]), {}, "logits"),
    ):
        with pytest.raises(MetricError, match=text):
            compute(*args, **kwargs)
    with pytest.raises(MetricError, match="one dim"):
        compute("kappa.phase/1", [x[0], x[1][:, :3]])


def test_inputs_of_all_kinds():
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    expected = float(compute("kappa.phase/1", x))
    for form in (torch.from_numpy(x), x.tolist(), list(x), list(torch.from_numpy(x)), np.asfortranarray(x)):
        assert float(compute("kappa.phase/1", form)) == expected
    assert compute("kappa.phase/1", (x * 100).astype(int)).dtype == "float64"
    unit_mask = [True, True, False, True]
    assert float(compute("kappa.phase/1", x, mask=unit_mask)) == pytest.approx(
        float(compute("kappa.phase/1", x[:, unit_mask])), rel=1e-14
    )


def test_params_join_the_id_and_extraction_goes_to_the_extractor():
    x = np.random.default_rng(0).normal(size=(3, 20, 5))
    a, b = compute("kappa.geom/1{W=8}", x), compute("kappa.geom/1", x, W=8)
    assert a.metric_id == b.metric_id == "kappa.geom/1{W=8}"
    assert float(a) == float(b) != float(compute("kappa.geom/1", x))
    marked = compute("kappa.phase/1{embed=1,sink=drop0}", x)
    assert marked.metric_id == "kappa.phase/1"
    assert marked.extractor_id == "embed=1,sink=drop0"
    assert float(marked) == float(compute("kappa.phase/1", x))


def test_result():
    r = Result(0.5, None, 1.0, 3, 2, "kappa.phase/1")
    assert float(r) == 0.5
    assert repr(r) == "<kappa.phase/1 = 0.5; coverage 1, 3 units, 2 steps, float64>"
    with pytest.raises(AttributeError):
        r.value = 1.0
    label = compute("limen.regime/1", 2.5)
    with pytest.raises(ValueError, match="ADAPTIVE"):
        float(label)
    assert math.isnan(float(compute("kappa.phase/1", np.ones((1, 1, 1)))))
