"""Timing and actuator together: when it acts, where, and when it does nothing at all."""

from typing import Any

import numpy as np
import pytest
import torch
from toys import NEW, PROMPTS, calibration_of, fed

import dynprobe as dp
from dynprobe.controllers import Controller
from dynprobe.controllers.recovery import Always, Clamp, Deadband, Never, Recovery, Shrink, Slerp, Subspace
from dynprobe.errors import SiteError, UsageError
from dynprobe.metrics import phase_lag
from dynprobe.probes import Instrument as Instruments
from dynprobe.probes import Sampling, Subject, discover, generate, identical, make_batch
from dynprobe.protocols._arms import Text
from dynprobe.protocols._streams import check_streams, streamed
from dynprobe.testing import tiny_causal_lm, tiny_gpt2, tiny_llama

#: Fires at every token: the calibration's range lies far below any signal.
LOW = {"kappa_phase": (-2.0, -1.0), "kappa_phase_zmax": (-1e3, -1e2), "entropy": (-2.0, -1.0), "limen_ct": (-2.0, -1.0)}


def same_bits(one: Any, other: Any) -> None:
    for a, b in zip(one.tape.states, other.tape.states, strict=True):
        assert identical(a, b)
    assert one.logits.keys() == other.logits.keys()
    for at, logits in one.logits.items():
        assert identical(logits, other.logits[at])


# ------------------------------------------------------------------------------------------------ doing nothing at all


@pytest.mark.parametrize("actuator", [Slerp, Shrink, Clamp, Subspace])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_signal_below_its_level_is_energy_zero_and_the_bits_of_none(make: Any, actuator: Any) -> None:
    subject = make()
    calibration = calibration_of(subject)
    run = fed(subject, PROMPTS, NEW, Recovery(Deadband(), actuator()), calibration=calibration)
    same_bits(run, fed(subject, PROMPTS, NEW))
    assert (run.actions["energy"] == 0).all()
    assert not run.actions["active"].any()
    assert run.actions["signal"].notna().all()
    same_bits(fed(subject, PROMPTS, NEW, Recovery(Never(), actuator()), calibration=calibration), run)


def test_sham_and_passive_have_the_bits_of_none_while_they_are_active() -> None:
    subject = tiny_llama()
    calibration = calibration_of(subject, signals=LOW)
    none = fed(subject, PROMPTS, NEW, perturb="alpha=0.5,layers=0")
    for controller in (
        Recovery(Deadband(horizon=100), Slerp(), sham=True), Recovery(Always(), Slerp(), sham=True, site="layers=all"),
        Recovery(Deadband(horizon=100), None), Recovery(Always(0.0), Slerp(), site="layers=all"),
    ):  # fmt: skip
        run = fed(subject, PROMPTS, NEW, controller, calibration=calibration, perturb="alpha=0.5,layers=0")
        same_bits(run, none)
        assert run.actions["active"].any()
        assert (run.actions["energy"] == 0).all()


def test_sham_goes_through_the_computation() -> None:
    calls = []

    class Counted(Slerp):
        def __call__(self, *args: Any) -> Any:
            calls.append(args)
            return super().__call__(*args)

    fed(tiny_llama(), PROMPTS, NEW, Recovery(Always(), Counted(), sham=True))
    assert len(calls) == 7


# ---------------------------------------------------------------------------------------------------------------- when


def test_it_decides_at_one_token_and_acts_at_the_next() -> None:
    subject = tiny_llama()
    calibration = calibration_of(subject, signals={"kappa_phase": (0.0, 1.0)})
    quiet = fed(subject, PROMPTS[:1], NEW[:1], Recovery(Deadband("kappa_phase"), None), calibration=calibration)
    q = quiet.actions["signal"].to_numpy()
    chosen = int(np.argmax(q[1:-2])) + 1  # a token whose signal stands out, and its level just below
    level = (np.sort(q[: chosen + 1])[-2] + q[chosen]) / 2
    calibration = calibration_of(subject, signals={"kappa_phase": (level - 1.0, level + 1e-9)})
    band = Deadband("kappa_phase", m=1, lo=0.0, hi=1.0, horizon=100)
    run = fed(subject, PROMPTS[:1], NEW[:1], Recovery(band, Slerp()), calibration=calibration)
    assert run.actions["active"].tolist()[: chosen + 2] == [False] * (chosen + 1) + [True]
    assert run.actions["energy"].to_numpy()[chosen + 1] > 0
    pos = run.actions["pos"].to_numpy()
    for before in range(pos[chosen] + 1):
        for depth in run.tape.depths:
            assert identical(run.state(0, before, depth), quiet.state(0, before, depth))
    assert not identical(run.state(0, int(pos[chosen + 1]), 3), quiet.state(0, int(pos[chosen + 1]), 3))


def test_the_prompt_is_observed_and_never_acted_on() -> None:
    subject = tiny_llama()
    calibration = calibration_of(subject, signals=LOW)
    run = fed(subject, PROMPTS, NEW, Recovery(Deadband(horizon=100), Slerp()), calibration=calibration)
    clean = fed(subject, PROMPTS, NEW)
    for row, prompt in enumerate(PROMPTS):
        for pos in range(len(prompt)):
            for depth in run.tape.depths:
                assert identical(run.state(row, pos, depth), clean.state(row, pos, depth))
    table = run.actions
    assert [table[table["row"] == r].iloc[0]["active"] for r in range(3)] == [False] * 3
    # The prompt's last three tokens are above the level; of the row of three, one is position 0, which counts not.
    assert [bool(table[table["row"] == r].iloc[1]["active"]) for r in range(3)] == [True, False, True]


# --------------------------------------------------------------------------------------------------------------- where


def test_the_default_site_is_the_block_after_the_signals_depth_and_is_held() -> None:
    subject = tiny_llama(layers=6)
    clean = calibration_of(subject, signals=LOW)
    for depth in range(2, 7):  # the step into this depth is made to stand out
        tensors = dict(clean.tensors)
        tensors["kappa_token_mu"] = torch.where(torch.arange(7) == depth, 0.0, clean.tensors["kappa_token_mu"])
        tensors["kappa_token_sigma"] = torch.where(torch.arange(7) == depth, 1e-6, clean.tensors["kappa_token_sigma"])
        calibration = dp.probes.Calibration(tensors, clean.signals, clean.header)
        run = fed(subject, PROMPTS[:1], NEW[:1], Recovery(Deadband(horizon=100), Slerp()), calibration=calibration)
        hit = run.actions[run.actions["energy"] > 0]
        assert len(hit) == 7
        assert set(hit["site"]) == {f"resid_post.{min(depth, 5)}"}


@pytest.mark.parametrize(("layers", "block"), [(1, 0), (2, 1), (3, 1), (5, 3), (6, 3)])
def test_a_signal_of_no_depth_acts_at_sixty_percent(layers: int, block: int) -> None:
    subject = tiny_llama(layers=layers)
    calibration = calibration_of(subject, signals=LOW)
    controller = Recovery(Deadband("entropy", m=1, horizon=100), Slerp())
    run = fed(subject, PROMPTS, NEW, controller, calibration=calibration)
    assert set(run.actions[run.actions["energy"] > 0]["site"]) == {f"resid_post.{block}"}
    run = fed(subject, PROMPTS, NEW, Recovery(Always(), Slerp()))
    assert set(run.actions[run.actions["energy"] > 0]["site"]) == {f"resid_post.{block}"}


def test_a_site_that_is_named() -> None:
    subject = tiny_llama()
    for site, expected in (
        ("layers=0", {"resid_post.0"}), ("layers=-1", {"resid_post.2"}),
        ("layers=0+2", {"resid_post.0", "resid_post.2"}),
        ("layers=2,component=resid_pre", {"resid_post.1"}), ("layers=50%", {"resid_post.1"}),
    ):  # fmt: skip
        run = fed(subject, PROMPTS, NEW, Recovery(Always(), Slerp(), site=site))
        assert set(run.actions[run.actions["energy"] > 0]["site"]) == expected


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        ("layers=1,component=attn_out", UsageError, "acts on states of the residual stream; .* names attn_out"),
        ("layers=1,component=resid_post+mlp_out", UsageError, "names mlp_out"),
        ("layers=0,component=resid_pre", UsageError, "names the state before the first one"),
        ("layers=7", SiteError, "out of range"),
        ("layers=1,positions=3", UsageError, "positions was given"),
        ("layers=1,phase=decode", UsageError, "phase was given"),
    ],
)
def test_sites_that_are_none(site: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), Recovery(Always(), Slerp(), site=site).attach(tiny_llama()):
        pass


# ---------------------------------------------------------------------------------------------------------------- what


@pytest.mark.parametrize("g", [0.5, 0.2, 1.0])
def test_slerp_makes_the_controlled_step_shorter_by_its_gain(g: float) -> None:
    """At the site, in the model, on every token that it acts at: the lag of the step is (1 − g) of what it met."""
    subject = tiny_gpt2(layers=4)

    class Meets(Controller):
        """Sees the state before slerp does."""

        writes = "layers=2"
        met: dict[tuple[int, int], torch.Tensor] = {}  # noqa: RUF012

        def act(self, state: Any, site: Any, seen: Any, memory: Any) -> Any:
            for row in range(len(state)):
                self.met[row, int(seen.step.positions[row].max())] = state[row, -1].clone()
            return state

    meets = Meets()
    run = fed(subject, PROMPTS, NEW, meets, Recovery(Always(g), Slerp(), site="layers=2"))
    hit = run.steerings[1].actions()
    hit = hit[hit["energy"] > 0]
    assert len(hit) == 21
    for row, pos in hit[["row", "pos"]].itertuples(index=False):
        below, after, before = run.state(row, pos, 2), run.state(row, pos, 3), meets.met[row, pos]
        met, left = (float(phase_lag([below.double(), h.double()])[0]) for h in (before, after))
        assert left == pytest.approx((1 - g) * met, rel=1e-5, abs=1e-6)
        assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-6)


def test_a_state_that_would_not_be_finite_is_left_alone() -> None:
    subject = tiny_llama()
    calibration = calibration_of(subject)
    calibration.tensors["mean"][2] = torch.nan  # a depth that had nothing to be calibrated on
    clean = fed(subject, PROMPTS, NEW)
    for actuator in (Shrink(), Subspace()):
        run = fed(subject, PROMPTS, NEW, Recovery(Always(), actuator, site="layers=1"), calibration=calibration)
        same_bits(run, clean)
        assert (run.actions["energy"] == 0).all()


@pytest.mark.parametrize("actuator", [Slerp, Clamp, Shrink])
def test_slots(actuator: Any) -> None:
    subject = dp.load("tiny-csm")
    calibration = dp.calibrate(subject, ["A line of text, and no more.", "Another one that is as short."])
    run = fed(subject, PROMPTS, NEW, Recovery(Always(), actuator(), site="iterations=4"), calibration=calibration)
    written = run.actions[run.actions["energy"] > 0]
    assert len(written) in ((0,) if actuator is Clamp and written.empty else range(1, 22))
    assert set(written["site"]) <= {"resid_post.3"}
    assert all(torch.isfinite(s).all() for s in run.tape.states)


# --------------------------------------------------------------------------------------------------- rows of one batch


def _tables(subject: Subject, prompts: Any, calibration: Any, ends: Any) -> Any:
    from dynprobe.controllers import Steering

    subject.model.generation_config.eos_token_id = ends
    batch = make_batch(subject, prompts, side="left")
    steering = Steering(Recovery(Deadband("kappa_phase", m=1, horizon=40), Slerp()), subject, calibration)
    instrument = Instruments(subject, (), [steering], **batch.rows)
    new = generate(subject, batch, Sampling(max_new_tokens=14, temperature=1.0, seed=5), instrument)
    fed_tokens = np.array([len(p) + len(n) for p, n in zip(prompts, new, strict=True)])
    return new, steering.actions(fed_tokens)


def test_sampled_texts_under_control_are_each_rows_own() -> None:
    subject = tiny_gpt2()
    _, table = _tables(subject, PROMPTS, calibration_of(subject), [10**6])
    q = table["signal"].dropna()
    calibration = calibration_of(subject, signals={"kappa_phase": (q.min(), q.median())})
    free, table = _tables(subject, PROMPTS, calibration, [10**6])
    assert 5 < (table["energy"] > 0).sum() < 35
    ends = [free[0][3], free[2][8]]
    new, table = _tables(subject, PROMPTS, calibration, ends)
    assert len({len(n) for n in new}) > 1
    for row, prompt in enumerate(PROMPTS):
        alone, own = _tables(subject, [prompt], calibration, ends)
        assert alone[0] == new[row]
        mine = table[table["row"] == row].reset_index(drop=True).iloc[: len(own)]
        assert mine["active"].tolist() == own["active"].tolist()[: len(mine)]
        np.testing.assert_allclose(mine["energy"], own["energy"][: len(mine)], rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ streamed


TEXTS = [Text(f"row-{i}", tuple(p), tuple(n)) for i, (p, n) in enumerate(zip(PROMPTS, NEW, strict=True))]


def test_streamed_texts_are_those_of_one_forward(zoo: Subject) -> None:
    from dynprobe.protocols._arms import forced

    for subject in (zoo, dp.load("tiny-csm")):
        ragged = [Text(t.row_key, t.prompt, t.new[: 3 + 2 * i]) for i, t in enumerate(TEXTS)]
        one, other = streamed(subject, ragged), forced(subject, ragged)
        for row, text in enumerate(ragged):
            for pos in range(len(text.fed)):
                a, b = (
                    p.tape.states[-1][row, int((p.tape.positions[row] == pos).nonzero()[0, 0])] for p in (one, other)
                )
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert (one.positions >= 0).sum() == (other.positions >= 0).sum() == sum(len(t.fed) for t in ragged)
        for name in ("nll", "entropy"):
            a, b = (np.sort(p.outputs[name][p.mask.numpy()]) for p in (one, other))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_models_that_cannot_be_fed_token_by_token_are_refused() -> None:
    from dynprobe.errors import ModelError

    with pytest.raises(ModelError, match="takes no cache"):
        check_streams(discover(tiny_causal_lm("openai-gpt")))
    subject = tiny_llama()
    forward = subject.model.forward

    def forgets(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """A cache that is handed out and not taken up, as some recurrent states are."""
        out = forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            out.logits = out.logits.roll(1, -1)
        return out

    import functools

    subject.model.forward = functools.wraps(forward)(forgets)
    with pytest.raises(ModelError, match="cannot be fed token by token in a padded batch: its logits differ by"):
        check_streams(subject)
    with pytest.raises(ModelError, match="cannot be fed token by token"):
        streamed(subject, TEXTS)


def test_a_text_without_continuation_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one token after its prompt"):
        streamed(tiny_llama(), [TEXTS[0], Text("b", (1, 2, 3))])
