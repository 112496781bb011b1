"""Hysteresis on hand-made series; timings; what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from toys import NEW, PROMPTS, calibration_of, fed

from dynprobe.controllers import Seen
from dynprobe.controllers.recovery import Always, Deadband, Never, Oracle, Recovery, Slerp
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Calibration, Perturb
from dynprobe.probes._clock import Step
from dynprobe.testing import tiny_llama

NAN = float("nan")


class _Scripted:
    """Stands in for a signal: hands out a series, column by column."""

    def __init__(
        self, prompt: list[list[float]], series: list[list[float]], depth: list[list[int]] | None = None
    ) -> None:
        self.prompt, self.series, self.depth, self.t = prompt, series, depth, -1

    def start(self, n_rows: int) -> Any:
        return {}

    def measure(self, seen: Seen, memory: Any, width: int = 1) -> Any:
        self.t += 1
        if self.t == 0:
            q = np.array(self.prompt)[:, -width:]
            return q, None if self.depth is None else np.full(q.shape, self.depth[0][0])
        at = None if self.depth is None else np.array([[d[self.t]] for d in self.depth])
        return np.array([[row[self.t - 1]] for row in self.series]), at


def follow(
    series: Any, *, prompt: Any = None, depth: Any = None, lo: float = 1.0, hi: float = 2.0, **settings: Any
) -> Any:
    """What is in force at each new token and one after the last: ``active, gain, depth`` ``[row, token]``."""
    series = np.atleast_2d(np.asarray(series, float)).tolist()
    band = Deadband(**{"horizon": 1000} | settings)
    band.q_lo, band.q_hi = lo, hi
    band._signal = _Scripted(prompt or [[NAN]] * len(series), series, depth)  # type: ignore[assignment]
    n = len(series)
    memory = band.start(n)
    out = []
    for t in range(len(series[0]) + 1):
        step = Step(t, np.full((n, 1), 3 + t), np.full(n, 3), ("a",) * n, None)
        band.decide(Seen(step), memory)
        out.append((memory["active"].copy(), memory["gain"].copy(), memory["depth"].copy()))
    return tuple(np.stack(part, axis=1) for part in zip(*out, strict=True))


def active(series: Any, **settings: Any) -> list[int]:
    return follow(series, **settings)[0][0].astype(int).tolist()


def test_it_switches_on_after_m_tokens_above_and_not_before() -> None:
    assert active([3, 3, 3, 3]) == [0, 0, 0, 1, 1]
    assert active([3, 3, 1, 3, 3, 3]) == [0, 0, 0, 0, 0, 0, 1]
    assert active([3, 3], m=1) == [0, 1, 1]
    assert active([0, 0, 1.5, 1.99], m=1) == [0] * 5


def test_exactly_at_a_level_is_neither_above_nor_below() -> None:
    assert active([2, 2, 2, 2], m=1) == [0] * 5
    assert active([3, 1, 1, 1], m=1, m_off=1) == [0, 1, 1, 1, 1]
    assert active([3, 1, 0.999, 1], m=1, m_off=1) == [0, 1, 1, 0, 0]


def test_it_switches_off_after_m_off_tokens_below() -> None:
    assert active([3, 0, 0, 0, 0, 0, 0], m=1) == [0, 1, 1, 1, 1, 1, 0, 0]
    assert active([3, 0, 0, 1.5, 0, 0, 0], m=1, m_off=3) == [0, 1, 1, 1, 1, 1, 1, 0]
    assert active([3, 0, 0, 3, 3], m=1, m_off=2) == [0, 1, 1, 0, 1, 1]


def test_an_undefined_signal_counts_as_neither() -> None:
    assert active([3, 3, NAN, 3, 3, 3]) == [0, 0, 0, 0, 0, 0, 1]
    assert active([3, 0, NAN, 0], m=1, m_off=2) == [0, 1, 1, 1, 1]
    on, gain, _ = follow([3, NAN, 1.5], m=1)
    assert on[0].tolist() == [False, True, True, True]
    assert gain[0].tolist() == [0, 0.5, 0, 0.25]
    assert active([NAN] * 4, m=1) == [0] * 5


def test_the_gain_rises_from_lo_to_hi_and_is_zero_when_inactive() -> None:
    _, gain, _ = follow([3, 2, 1.75, 1.5, 1.25, 1, 0.5, 99], m=1, g_max=0.8, m_off=2)
    np.testing.assert_allclose(gain[0], [0, 0.8, 0.8, 0.6, 0.4, 0.2, 0, 0, 0.8], atol=1e-12)
    assert (follow([1.9] * 5)[1] == 0).all()
    assert (follow([3.0] * 5, m=1, g_max=0.0)[1] == 0).all()


def test_the_budget_is_a_share_of_the_tokens_and_is_never_exceeded() -> None:
    on, gain, _ = follow([9] * 40, m=1, horizon=32)
    assert on[0][:41].sum() == 8
    assert on[0].tolist() == [False, *[True] * 8, *[False] * 32]
    assert (gain[0][9:] == 0).all()
    # Two stretches share one budget; inactive tokens cost nothing.
    assert active([9, 9, 0, 9, 9, 9, 9], m=1, m_off=1, horizon=16) == [0, 1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(("budget", "horizon", "n"), [(0.25, 32, 8), (0.25, 7, 1), (0.29, 100, 29), (1.0, 5, 5)])
def test_the_budget_in_tokens(budget: float, horizon: int, n: int) -> None:
    assert Deadband(budget=budget, horizon=horizon).n_active == n


def test_rows_do_not_touch_each_other() -> None:
    series = np.random.default_rng(0).uniform(0, 3.2, (6, 60))
    series[2, 10:20] = NAN
    together = follow(series, m=2, m_off=2, horizon=60)
    for row in range(6):
        alone = follow(series[row], m=2, m_off=2, horizon=60)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[row])
    assert together[0].any(axis=1).sum() >= 4


def test_the_last_m_tokens_of_the_prompt_count() -> None:
    assert active([3], prompt=[[3, 3, 3]]) == [1, 1]
    assert active([3], prompt=[[0, 3, 3]]) == [0, 1]
    assert active([3], prompt=[[9, 9, 9, 9, 0]]) == [0, 0]
    assert active([3, 3], prompt=[[NAN, 3]]) == [0, 0, 1]  # a prompt shorter than m
    # A prompt is never active itself: nothing of it is spent.
    assert active([9] * 12, prompt=[[9, 9, 9]], horizon=16) == [1, 1, 1, 1, *[0] * 9]


def test_the_depth_is_that_of_activation_and_is_held() -> None:
    series, depth = [3, 3, 9, 0, 0, 3, 3], [[5, 2, 3, 7, 1, 1, 4, 6]]
    on, _, at = follow(series, depth=depth, m=2, m_off=2)
    assert on[0].astype(int).tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    assert at[0].tolist() == [-1, -1, 3, 3, 3, 3, 3, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"m": 0}, "both are at least 1"),
        ({"m_off": 0}, "both are at least 1"),
        ({"g_max": 1.5}, r"a gain lies in \[0, 1\]"),
        ({"budget": 0.0}, r"share of the tokens in \(0, 1\]"),
        ({"budget": 0.1, "horizon": 9}, r"not one whole token.*generate more tokens or raise the budget"),
        ({"lo": 0.9, "hi": 0.9}, "0 ≤ lo < hi ≤ 1"),
        ({"lo": 0.99, "hi": 0.75}, "0 ≤ lo < hi ≤ 1"),
        ({"hi": 99.0}, "0 ≤ lo < hi ≤ 1"),
        (
            {"signal": "kapa_phase"},
            r"unknown signal 'kapa_phase'; known: kappa_phase_zmax.*Did you mean 'kappa_phase'\?",
        ),
    ],
)
def test_settings_that_make_no_detector(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Deadband(**settings)


@pytest.mark.parametrize("signal", ["kappa_phase_zmax", "kappa_phase", "norm_step_zmax", "entropy", "limen_ct"])
def test_levels_come_from_this_models_calibration(signal: str) -> None:
    subject = tiny_llama()
    with pytest.raises(CalibrationError, match=r"judged against a calibration and there is none; .*dynprobe calibrate"):
        Deadband(signal).bind(subject, None)
    band = Deadband(signal, lo=0.5, hi=0.75)
    band.bind(subject, calibration_of(subject, signals={signal: (0.0, 4.0)}))
    assert (band.q_lo, band.q_hi) == pytest.approx((2.0, 3.0))
    with pytest.raises(CalibrationError, match=rf"degenerate-band: the clean {signal} has q75 = 1 and q99 = 1"):
        Deadband(signal).bind(subject, calibration_of(subject, signals={signal: (1.0, 1.0)}))


def test_a_calibration_of_an_older_schema_says_what_it_lacks() -> None:
    subject = tiny_llama()
    whole = calibration_of(subject)
    old = {k: v for k, v in whole.tensors.items() if not k.startswith("norm_")}
    signals = {k: v for k, v in whole.signals.items() if k not in ("kappa_phase_z", "norm_step_zmax")}
    for signal in ("norm_step_zmax", "kappa_phase_z"):
        for held in (Calibration(old, signals, whole.header), Calibration(old, whole.signals, whole.header)):
            if signal == "kappa_phase_z" and held.signals is whole.signals:
                continue
            with (
                pytest.raises(CalibrationError, match=f"does not hold the signal {signal}; make it again with"),
                Recovery(Deadband(signal), Slerp()).attach(subject, held),
            ):
                pass


def test_always_oracle_and_never_act_at_exactly_these_tokens() -> None:
    subject = tiny_llama()

    def acted(timing: Any) -> list[list[int]]:
        table = fed(subject, PROMPTS, NEW, Recovery(timing, Slerp())).actions
        hit = table[table["energy"] > 0]
        assert (hit["active"] & (hit["gain"] == timing.g_max)).all()
        assert set(table[table["active"]]["pos"]) == set(hit["pos"])
        return [sorted(hit[hit["row"] == row]["pos"]) for row in range(3)]

    lengths = [len(p) for p in PROMPTS]
    assert acted(Always()) == [list(range(n, n + 7)) for n in lengths]
    assert acted(Always(0.2)) == [list(range(n, n + 7)) for n in lengths]
    assert acted(Never()) == [[], [], []]
    assert acted(Oracle((Perturb.parse("alpha=1,positions=5:9"),))) == [[7, 8], [5, 6, 7, 8], [5, 6, 7, 8]]
    decode = Oracle((Perturb.parse("alpha=1,phase=decode"), Perturb.parse("alpha=1,positions=2")))
    assert acted(decode) == [list(range(n, n + 7)) for n in lengths]
    assert acted(Oracle((Perturb.parse("alpha=1,positions=last"),))) == [[], [], []]  # the prompt's last token
    assert acted(Oracle(())) == [[], [], []]


def test_an_oracle_acts_where_the_perturbation_writes() -> None:
    subject, spec = tiny_llama(), "alpha=0.5,layers=0,positions=8:11"
    oracle = Recovery(Oracle((Perturb.parse(spec),)), Slerp(), site="layers=2")
    run = fed(subject, PROMPTS, NEW, oracle, perturb=spec)
    clean = fed(subject, PROMPTS, NEW)
    hit = run.actions[run.actions["energy"] > 0]
    for row in range(3):
        moved = [
            pos
            for pos in range(1, len(PROMPTS[row]) + 7)
            if not torch.equal(run.state(row, pos, 1), clean.state(row, pos, 1))
        ]
        first = [p for p in (8, 9, 10) if p < len(PROMPTS[row]) + 7]
        assert moved[: len(first)] == first
        assert sorted(hit[hit["row"] == row]["pos"]) == [p for p in first if p >= len(PROMPTS[row])]
