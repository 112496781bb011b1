"""The suite of metrics: every metric of ours passes it, and each of its checks fails a metric that is wrong."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from twins import TWINS

from dynprobe.errors import SelfTestError, UsageError
from dynprobe.metrics import Metric, MetricSpec, compute, ids, spec, trajectory_metric
from dynprobe.metrics._registry import _OURS
from dynprobe.testing import METRIC_CHECKS, Vector, check_metric


@pytest.mark.parametrize("metric", [i for i in ids() if spec(i).name in _OURS])
def test_ours_pass(metric):
    done = check_metric(metric, make=TWINS[metric].make)
    assert {"declared", "repeatable", "untouched", "reasons"} <= set(done)


SPEC = MetricSpec(
    id="acme.reach/1", sentence="Distance from the first depth to the last.", formula="mean_n ‖x_D − x_0‖",
    input="trajectory[depth,unit,dim]", value_range="[0, ∞)", unit="model units",
    invariances=frozenset({"R", "P", "shift"}), source="Acme", column="acme_reach",
    levels={"sample": "mean over units"}, vectors=("0, 3e₁ → 3",),
)  # fmt: skip


def reach(x, ok):
    both = ok[0] & ok[-1]
    return float(np.linalg.norm(x[-1] - x[0], axis=-1)[both].mean()) if both.any() else (np.nan, "units<1")


GOOD = trajectory_metric(SPEC, reach)
FROM_ZERO = Vector(([[[1.0, 0.0]], [[4.0, 0.0]]],), 3.0)


def test_a_good_one_passes_all():
    assert check_metric(GOOD, vectors=[FROM_ZERO]) == METRIC_CHECKS
    with pytest.raises(UsageError, match="Did you mean 'vectors'"):
        check_metric(GOOD, only="vector")
    assert "acme.reach/1" not in ids()


@pytest.mark.parametrize("check", METRIC_CHECKS)
def test_as_an_author_writes_it(check):
    check_metric(GOOD, vectors=[FROM_ZERO], only=check)


def changing(x: Any, ok: Any) -> Any:
    x += 1.0
    return reach(x, ok)


def _raw(compute_one: Any, **changes: Any) -> Metric:
    return Metric(dataclasses.replace(SPEC, **changes), compute_one, score=GOOD.score)


class _Random:
    state = 0

    def __call__(self, x, ok):
        self.state += 1
        return float(self.state)


def _untidy(inputs, mask, params, metric_id):
    result = GOOD.compute(inputs, mask, params, metric_id)
    inputs[0][...] = 7.0
    return result


def _unmasked(inputs, mask, params, metric_id):
    return GOOD.compute(inputs, None, params, metric_id)


def _crashing(inputs, mask, params, metric_id):
    np.linalg.inv(np.zeros((2, 2)))


def _zero_for_nothing(inputs, mask, params, metric_id):
    found = GOOD.compute(inputs, mask, params, metric_id)
    return dataclasses.replace(found, value=0.0, reason=None) if found.reason else found


WRONG = {
    "declared": trajectory_metric(dataclasses.replace(SPEC, source=""), reach),
    "vectors": trajectory_metric(SPEC, lambda x, ok: 2 * reach(x, ok)),
    "repeatable": trajectory_metric(SPEC, _Random()),
    "untouched": _raw(_untidy, invariances=frozenset()),
    "invariant": trajectory_metric(dataclasses.replace(SPEC, invariances=frozenset({"S"})), reach),
    "in_range": trajectory_metric(dataclasses.replace(SPEC, value_range="[0, 1]"), reach),
    "reasons": _raw(_zero_for_nothing),
    "masked": _raw(_unmasked),
    "batched": dataclasses.replace(GOOD, score=lambda c, p: GOOD.score(c, p).take(np.array([1, 0, 2]))),
}


@pytest.mark.parametrize("check", METRIC_CHECKS)
def test_each_check_fails_what_is_wrong(check):
    with pytest.raises(SelfTestError, match=rf"acme\.reach/1 breaks the contract of metrics \({check}\)"):
        check_metric(WRONG[check], vectors=[FROM_ZERO], only=check)


def test_vectors_that_are_named_are_given():
    with pytest.raises(SelfTestError, match=r"\(vectors\): .*none is given to try"):
        check_metric(GOOD)


@pytest.mark.parametrize(
    "borrowed", [{"column": "ppl"}, {"id": "output.reach/1"}, {"id": "lens.reach/1"}, {"id": "delta.reach/1"}]
)
@pytest.mark.parametrize("check", ["declared", "batched"])
def test_names_of_ours_are_not_borrowed(borrowed, check):
    metric = trajectory_metric(dataclasses.replace(SPEC, **borrowed), reach)
    if check == "batched":  # it is measured all the same, and no KeyError
        check_metric(metric, only=check)
        return
    with pytest.raises(SelfTestError, match=r"\(declared\): its (family|column)"):
        check_metric(metric, only=check)


def test_a_crash_is_a_failure():
    with pytest.raises(SelfTestError, match=r"\(reasons\): .*LinAlgError"):
        check_metric(_raw(_crashing), only="reasons")


def test_reasons_of_vectors_count():
    empty = Vector((np.zeros((2, 0, 3)),), None, "empty")
    check_metric(GOOD, vectors=[empty], only="vectors")
    with pytest.raises(SelfTestError, match="not NaN for 'coverage'"):
        check_metric(GOOD, vectors=[dataclasses.replace(empty, reason="coverage")], only="vectors")
    assert compute("kappa.phase/1", np.ones((1, 3, 4))).reason == "depth<2"
