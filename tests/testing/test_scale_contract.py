"""The suite of noise scales: ours pass it, and each of its checks fails a scale that is wrong."""

import dataclasses
from typing import Any

import pytest
import torch

from dynprobe.errors import SelfTestError, UsageError
from dynprobe.probes import NoiseScale
from dynprobe.probes._scales import SCALES
from dynprobe.testing import SCALE_CHECKS, check_scale


@pytest.mark.parametrize("name", SCALES.builtin)
def test_ours_pass(name):
    unsized = () if SCALES[name].passport else ("sized",)
    assert check_scale(name) == tuple(check for check in SCALE_CHECKS if check not in unsized)


def peak(h: Any, eps: Any, alpha: Any, stats: Any) -> Any:
    return alpha * h.abs().amax(-1, keepdim=True) * eps


GOOD = NoiseScale(
    name="peak", meaning="α is in largest coordinates", unit="largest coordinates", update=peak,
    equivariances=frozenset("S"),
)  # fmt: skip
ABS = dataclasses.replace(SCALES["abs"], name="peak")


def test_a_good_one_passes_and_leaves_no_name():
    assert check_scale(GOOD) == tuple(check for check in SCALE_CHECKS if check != "sized")
    assert "peak" not in SCALES


@pytest.mark.parametrize("check", SCALE_CHECKS)
def test_as_an_author_writes_it(check):
    check_scale(ABS, only=check)


def _with(formula: Any, **changes: Any) -> NoiseScale:
    return dataclasses.replace(GOOD, update=formula, **changes)


def _in_place(h: Any, eps: Any, alpha: Any, stats: Any) -> Any:
    u = peak(h, eps, alpha, stats)
    stats.site.std.mul_(2)
    return u


class _Forgetful:
    """Another write at every call."""

    calls = 0

    def __call__(self, h, eps, alpha, stats):
        self.calls += 1
        return self.calls * peak(h, eps, alpha, stats)


WRONG = {
    "identity": _with(lambda h, eps, alpha, stats: (alpha + 1e-6) * eps),
    "linear": _with(lambda h, eps, alpha, stats: alpha * alpha * eps),
    "repeatable": _with(_Forgetful()),
    "alone": _with(lambda h, eps, alpha, stats: alpha * h.abs().max() * eps),
    "untouched": _with(_in_place),
    "guarded": _with(lambda h, eps, alpha, stats: alpha * stats.norm.mean() * eps),
    "sized": dataclasses.replace(ABS, per_alpha=2.0),
    "equivariant": _with(peak, equivariances=frozenset("RS")),
}


@pytest.mark.parametrize("check", SCALE_CHECKS)
def test_each_check_fails_what_is_wrong(check):
    with pytest.raises(SelfTestError, match=rf"peak breaks the contract of noise scales \({check}\)"):
        check_scale(WRONG[check], only=check)


def test_what_holds_and_is_not_declared_is_said():
    with pytest.raises(SelfTestError, match=r"follows positive scalings \(S\), which it does not declare"):
        check_scale(_with(peak, equivariances=frozenset()), only="equivariant")


@pytest.mark.parametrize(
    ("formula", "found"),
    [(lambda h, eps, alpha, stats: 1.0, "float"), (lambda h, eps, alpha, stats: eps[:2], r"\(2, 48\)"),
     (lambda h, eps, alpha, stats: (alpha * eps).float(), "float32")],
)  # fmt: skip
def test_what_is_no_update_is_refused(formula, found):
    with pytest.raises(UsageError, match=f"scale=peak gave .*{found}.* it is broken"):
        check_scale(_with(formula), only="linear")


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"name": "Peak-1"}, "small letters"), ({"needs": frozenset({"luck"})}, "needs .* luck"),
     ({"law": "cauchy"}, "law .* cauchy"), ({"passport": "alpha_cos"}, "passport"),
     ({"equivariances": frozenset("T")}, "equivariances"), ({"law": None}, "cannot write a direction"),
     ({"law": "uniform"}, "cannot write a direction")],
)  # fmt: skip
def test_what_cannot_be_declared(changes, why):
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(GOOD, **changes)


def test_a_direction_is_what_is_written_along():
    signless = _with(lambda h, eps, alpha, stats: alpha * eps.abs())
    with pytest.raises(SelfTestError, match=r"\(linear\): a direction turned round does not give"):
        check_scale(signless, only="linear")
    check_scale(dataclasses.replace(signless, own_write="the size of the noise"), only="linear")


def test_the_contract_says_what_is_tried():
    assert "u is linear in α" in str(NoiseScale.__doc__)


def test_a_write_without_unit_is_counted():
    """States that the scale says have none are left alone, as for our own."""
    dead = _with(lambda h, eps, alpha, stats: (alpha * stats.norm * eps, stats.norm[:, 0] < torch.inf))
    with pytest.raises(SelfTestError, match="nothing is written"):
        check_scale(dead, only="linear")
