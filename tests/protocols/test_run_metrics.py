"""Metrics that a run stores because it was asked to: columns, facts, identity, refusals."""

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.metrics import DEFAULT, column_name, compute
from dynprobe.protocols._config import RunConfig

ASKED = (
    "id.twonn/1", "erank.rv/1", "entropy.matrix/1{order=0.5}", "rqa.det/1", "influence.angular/1", "line.shape/1",
    "cka.linear/1",
)  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 3, 2] * 2, [9, 10, 11, 3, 2, 4, 8, 15, 1, 0, 12, 13]]


@pytest.fixture(scope="module")
def asked_run(llama, tmp_path_factory):
    return dp.run(
        llama, PROMPTS, metrics=list(ASKED), perturb="alpha=0.3", max_new_tokens=0, lens=True,
        states=True, out=tmp_path_factory.mktemp("asked"), quiet=True,
    )  # fmt: skip


def test_columns_and_values(asked_run):
    run = asked_run
    samples = run.samples.set_index("sample_id")
    profiles = run.table("profiles")
    for metric in ASKED:
        name = column_name(metric)
        assert name in samples, metric
        if metric not in ("rqa.det/1", "line.shape/1"):
            assert name in profiles, metric
    assert f"{column_name('erank.rv/1')}_d" in samples
    label = next(i for i in samples.index if i.endswith("|clean|0"))
    keys, states = run.states(sample_id=label)
    order = keys.reset_index(drop=True).sort_values(["depth", "pos"]).index
    x = np.asarray(states)[order].reshape(keys["depth"].nunique(), -1, states.shape[-1])[
        1:, 1:
    ]  # depth 0 and the first token stay out
    for metric in (*ASKED[:2], *ASKED[4:]):
        expected = float(compute(metric, x))
        assert np.isfinite(expected)
        assert samples.loc[label, column_name(metric)] == pytest.approx(expected, rel=1e-4), metric
    assert samples.loc[label, "rqa_det"] == pytest.approx(float(compute("rqa.det/1", x[-1])), rel=1e-4)


def test_facts(asked_run):
    facts = asked_run.columns().set_index(["table", "column"])
    assert facts.loc[("samples", "entropy_matrix_order0_5"), "id"] == "entropy.matrix/1{order=0.5}"
    assert facts.loc[("samples", "erank"), "span"] == "prompt"
    assert facts.loc[("samples", "line_shape"), "span"] == "all"
    assert facts.loc[("tokens", "prediction_depth"), "id"] == "lens.prediction_depth/1"
    assert tuple(asked_run.manifest.config["metrics"]) == RunConfig(metrics=ASKED).metrics


def test_prediction_depth(asked_run):
    depth = asked_run.tokens["prediction_depth"]
    n_depths = asked_run.table("depths")["depth"].nunique()
    assert depth.between(0, n_depths - 1).all()  # the last depth is the model, so it always agrees
    assert (depth == depth.round()).all()


def test_identity():
    plain, asked = RunConfig(), RunConfig(metrics=("erank.rv/1",))
    assert "metrics" not in plain.identity()
    assert asked.identity() == {**plain.identity(), "metrics": ["erank.rv/1"]}
    again = RunConfig(metrics=("kappa.phase/1", "id.twonn/1", "erank.rv/1{centre=none}", "erank.rv/1"))
    assert again.metrics == ("erank.rv/1", "id.twonn/1")
    assert RunConfig(metrics=("id.twonn/1", "erank.rv/1")).identity() == again.identity()
    assert RunConfig(metrics=DEFAULT).identity() == plain.identity()
    assert asked.measured_metrics == (*DEFAULT, "erank.rv/1")
    assert RunConfig.build(metrics="erank.rv/1") == asked


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("erank.rw/1", "erank.rv/1"),
        ("lens.kl/1", "--lens"),
        ("erank.rv/1{centre=median}", "centre"),
        ("erank", "erank.rv"),
    ],
)
def test_refusals_leave_no_folder(llama, tmp_path, metric, text):
    with pytest.raises(UsageError, match=text):
        dp.run(llama, PROMPTS, metrics=[metric], out=tmp_path, quiet=True)
    assert not any(tmp_path.iterdir())
