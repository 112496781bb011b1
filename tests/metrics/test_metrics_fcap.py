"""Functional capacity: vectors, controls, what is refused, and the probe against Newton's method."""

import math

import numpy as np
import pytest
import slow_recovery as slow

from dynprobe.errors import MetricError
from dynprobe.metrics import above_chance, compute, functional_capacity


def blobs(seed, n=60, dim=6, gap=1.0, classes=2):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = gap * rng.normal(size=(classes, dim))
    return rng.normal(size=(n, dim)) + centres[y], y


def test_vectors():
    assert above_chance(0.75, 2) == pytest.approx(0.5)
    assert above_chance(0.0, 4) == pytest.approx(-1 / 3)
    x = np.repeat(np.eye(3), 10, axis=0)
    y = np.repeat([0, 1, 2], 10)
    assert functional_capacity(x, y).value.tolist() == [1.0]
    # one feature that agrees with the class three times out of four
    y = np.repeat([0, 1], 40)
    x = np.where(np.arange(80) % 4 == 0, 1 - y, y)[:, None].astype(float)
    found = functional_capacity(x, y, folds=2)
    assert found.balanced_accuracy[0, 0] == pytest.approx(0.75)
    assert found.value[0] == pytest.approx(0.5)
    assert float(compute("fcap.probe/1", x[None], y, folds=2)) == pytest.approx(0.5)


def test_independent_labels_have_no_capacity():
    values = []
    for seed in range(12):
        x, y = blobs(seed, n=80, gap=0.0)
        values.append(functional_capacity(x, y, n_shuffles=1).value[0])
    assert abs(np.mean(values)) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_controls(seed):
    x, y = blobs(seed, n=90, gap=1.2, classes=3)
    found = functional_capacity(x, y, random_states=np.random.default_rng(seed).normal(size=(90, 4)))
    assert found.rotated == pytest.approx(found.value, abs=1e-9)
    assert found.value[0] > 0.4
    assert abs(found.shuffled[0]) < 0.25
    assert abs(found.random_init[0]) < 0.35
    assert found.chance == (pytest.approx(1 / 3),)


@pytest.mark.parametrize("seed", range(3))
def test_declared_invariances(seed):
    rng = np.random.default_rng(seed)
    x, y = blobs(seed, n=50, gap=0.7)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    base = functional_capacity(x, y, n_shuffles=1).value[0]
    for other in (x @ q, 7.0 * x, x + 3.0 * rng.normal(size=6)):
        assert functional_capacity(other, y, n_shuffles=1).value[0] == pytest.approx(base, abs=1e-9)
    assert float(compute("fcap.probe/1", np.stack([x, 2 * x @ q]), y)) == pytest.approx(base, abs=1e-9)


def test_the_probe_is_the_penalised_logistic_one():
    from dynprobe.metrics._functional_capacity import _folds, _predict

    x, y = blobs(3, n=60, gap=0.5)
    for C in (0.1, 1.0, 10.0):
        split, why = _folds(y, None, 5, 0)
        assert why is None
        guess = _predict(x, y, split, C)
        for train, test in split:
            centre = x[train].mean(0)
            size = math.sqrt(((x[train] - centre) ** 2).mean())
            w = slow.logistic((x[train] - centre) / size, y[train], C)
            score = (x[test] - centre) / size @ w[:-1] + w[-1]
            assert ((score > 0) == (guess[test] == 1)).all()


def test_groups_stay_together():
    """A label that follows the prompt and nothing else is no capacity once prompts are not split."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(20), 6)
    where = rng.normal(size=(20, 40))
    y = rng.permutation(np.arange(20) % 2)[prompt]
    x = where[prompt] + 0.05 * rng.normal(size=(120, 40))
    split = functional_capacity(x, y, n_shuffles=1).value[0]
    together = functional_capacity(x, y, groups=prompt.tolist(), n_shuffles=1).value[0]
    assert split > 0.9
    assert together < 0.5


def test_tasks_and_depths():
    x, y = blobs(1, n=60, gap=2.0)
    other = (np.arange(60) // 2) % 3
    both = functional_capacity(np.stack([x, 0 * x + x[:, :1]]), np.stack([y, other]), n_shuffles=1)
    one, two = (functional_capacity(x, t, n_shuffles=1).value[0] for t in (y, other))
    assert both.value[0] == pytest.approx((one + two) / 2)
    assert both.value.shape == (2,)
    assert both.chance == (0.5, pytest.approx(1 / 3))


def test_undefined():
    x, y = blobs(0, n=20)
    assert functional_capacity(x, np.zeros(20)).reasons == ("one-class",)
    assert compute("fcap.probe/1", x[None], np.zeros(20)).reason == "one-class"
    rare = np.zeros(20)
    rare[:3] = 1
    assert functional_capacity(x, rare).reasons == ("units<5",)
    assert functional_capacity(x, y, groups=["a"] * 20).reasons == ("groups<5",)
    # the label is the prompt's, so some fold of prompts has one class
    assert functional_capacity(x, np.repeat([0, 1], 10), groups=np.repeat(range(5), 4).tolist()).reasons == (
        "one-class",
    )
    broken = np.stack([x, np.full(x.shape, np.nan)])
    found = compute("fcap.probe/1", broken, y)
    assert (found.reason, found.coverage) == (None, 0.5)
    assert np.isnan(found.profile).tolist() == [False, True]
    assert compute("fcap.probe/1", broken[1:], y).reason == "coverage"


def test_refusals():
    x, y = blobs(0, n=20)
    for bad, text in (
        ({"standardise": True}, "axes"), ({"penalty": "l1"}, "L1"), ({"C": math.inf, "folds": 2}, None),
        ({"folds": 1}, "folds"), ({"groups": ["a"]}, "groups"), ({"random_states": x[:5]}, "same 20"),
    ):  # fmt: skip
        if text is None:
            assert np.isfinite(functional_capacity(x, y, **bad).value).all()
            continue
        with pytest.raises(MetricError, match=text):
            functional_capacity(x, y, **bad)
    with pytest.raises(MetricError, match="penalty"):
        functional_capacity(np.ones((20, 30)), y, C=math.inf)
    with pytest.raises(MetricError, match="labels"):
        functional_capacity(x, y[:5])
