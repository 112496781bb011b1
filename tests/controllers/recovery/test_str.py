"""STR's gate and its operators, against the published formulas written out again."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dynprobe as dp
from dynprobe.controllers import Seen, Steering, generate_with
from dynprobe.controllers.recovery import Gate, LoraPair, StrControl, TopComponents, make_mode
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Calibration, Instrument, Sampling, Subject, Where, generate, make_batch, sites_to_read
from dynprobe.probes._clock import Step
from dynprobe.testing import tiny_llama

ROWS, KEYS = [[5, 6, 7, 8, 9], [11, 12, 13], [3, 9, 27, 81]], ["a", "b", "c"]
SAMPLING = Sampling(12, temperature=1.0, seed=1, stop_at_eos=False)
DIM = 32
Known = Callable[..., Calibration]


@pytest.fixture(scope="module")
def known(made_up: Callable[..., Calibration]) -> Known:
    """``known(model, sigma)``: a calibration with this bandwidth."""

    def make(model: Subject, sigma: float = 1.0) -> Calibration:
        draw = torch.Generator().manual_seed(0)
        pcs = torch.linalg.qr(torch.randn(DIM, 4, generator=draw))[0].T
        tensors = {
            "str_sigma": torch.tensor(sigma, dtype=torch.float64),
            "mean": torch.randn(4, DIM, generator=draw), "pcs": pcs.expand(4, 4, DIM).clone(),
        }  # fmt: skip
        return made_up(model, {}, tensors)

    return make


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = torch.Generator().manual_seed(1)
    tensors = {
        f"{which}.{name}": torch.randn(*shape, generator=draw)
        for which in ("contraction", "expansion")
        for name, shape in (("A", (DIM, 4)), ("B", (4, DIM)))
    }
    tensors |= {"contraction.scale": torch.tensor(2.0), "expansion.scale": torch.tensor(1.5)}
    path = tmp_path_factory.mktemp("operators") / "pair.safetensors"
    save_file(tensors, path)
    return path


class _Slow:
    """The published loop for one row, written as in the paper: lists, loops and floats."""

    def __init__(self, sigma: float, kappa_p: float = 10.0) -> None:
        self.sigma, self.kappa_p, self.buffer, self.before = sigma, kappa_p, [], 0.0

    def str_of(self) -> float:
        n = len(self.buffer)
        if n < 2:
            return math.nan
        top = below = 0.0
        for i in range(n):
            for j in range(n):
                weight = 1 - math.exp(-abs(i - j) / 3.0)
                squared = float(((self.buffer[i] - self.buffer[j]) ** 2).sum())
                top, below = top + weight * math.exp(-squared / (2 * self.sigma**2)), below + weight
        return top / below

    def take(self, h: np.ndarray) -> float:
        self.buffer = [*self.buffer, h][-4:]
        return self.str_of()

    def gate(self, value: float) -> tuple[float, float]:
        """Share of the contraction, and 1 or 0: whether anything is done."""
        error = value - 0.70 if value > 0.70 else value - 0.56 if value < 0.56 else 0.0
        change, self.before = error - self.before, error
        raw = self.kappa_p * error + 2.0 * change - 2.0 * abs(change)
        return min(max(1 / (1 + math.exp(raw)), 0.05), 0.95), float(error != 0.0)


def test_the_vector_of_two_states_at_distance_sigma(llama: Subject, known: Known) -> None:
    control = StrControl(TopComponents())
    control.bind(llama, known(llama, 5.0))
    memory = control.start(1)
    for index, h in enumerate(([0.0, 0.0], [3.0, 4.0])):
        step = Step(0, np.array([[index + 1]]), np.array([2]), ("a",), None)
        control.act(torch.tensor([[h]], dtype=torch.float64), ("resid_post", 2), Seen(step), memory)
    assert memory["signal"][0] == pytest.approx(0.6065306597, rel=1e-7)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=25), st.sampled_from([10.0, 40.0]))
@settings(max_examples=80, deadline=None)
def test_the_gate_is_the_published_one(values: list[float], kappa_p: float) -> None:
    slow, gate, error = _Slow(1.0, kappa_p), Gate(kappa_p=kappa_p), np.zeros(1)
    for value in values:
        alpha, error = gate(np.array([value]), error)
        share, on = slow.gate(value)
        assert alpha[0] == pytest.approx(share, abs=1e-9)
        assert float(error[0] != 0) == on or abs(abs(value - 0.63) - 0.07) < 1e-9


def test_the_gate_closes_the_loop_negatively() -> None:
    alpha, _ = Gate()(np.array([0.9, 0.3, 0.63, np.nan]), np.zeros(4))
    assert alpha[0] < 0.5 < alpha[1]  # too alike expands, too far apart contracts
    assert alpha[2] == alpha[3] == 0.5
    assert Gate()(np.array([0.0, 1.0]), np.zeros(2))[0].tolist() == [0.95, pytest.approx(0.05, abs=0.03)]


def run(model: Subject, controls: list[Steering], rows: list[list[int]], keys: list[str]) -> tuple[Any, Any]:
    batch = make_batch(model, rows, side="left", row_keys=keys)
    read = sites_to_read(model, Where.parse("layers=last"))
    instrument = Instrument(model, read, controls, **batch.rows)
    written = generate_with(model, batch, SAMPLING, instrument, controls)
    return written, instrument.tape()


@pytest.mark.parametrize("kind", ["dom", "str"])
def test_its_writes_are_the_published_ones(llama: Subject, known: Known, operators: Path, kind: str) -> None:
    """One row, token by token, from the states that an unwritten run of the same text has."""
    calibration = known(llama, 6.0)
    (control,) = make_mode(kind, lambda: None, operators=operators)
    steering = Steering(control, llama, calibration)
    written, tape = run(llama, [steering], ROWS[:1], KEYS[:1])
    text = torch.tensor([[*ROWS[0], *written.new[0][:-1]]])
    plain = dp.capture(llama, text, logits=None).states[-1][0].double().numpy()
    after = tape.states[-1][0].double().numpy()
    table = steering.actions().set_index("pos")
    slow, from_file = _Slow(6.0), LoraPair(operators)
    mean, pcs = calibration.tensors["mean"][3].double().numpy(), calibration.tensors["pcs"][3].double().numpy()
    acted = 0
    for pos in range(1, len(plain)):
        value = slow.take(plain[pos])
        if pos < len(ROWS[0]):
            np.testing.assert_allclose(after[pos], plain[pos], atol=1e-5)
            continue
        share, on = slow.gate(value)
        assert table.loc[pos, "signal"] == pytest.approx(value, abs=1e-5)
        assert bool(table.loc[pos, "active"]) == bool(on)
        if kind == "dom":
            (a_s, b_s), (a_l, b_l) = ((a.numpy(), b.numpy()) for a, b in from_file._pairs)
            norm = np.linalg.norm(plain[1 : pos + 1], axis=1).mean()
            u = 0.08 * (share * plain[pos] @ a_s @ b_s + (1 - share) * plain[pos] @ a_l @ b_l) / norm
        else:
            u = 0.08 * (1 - 2 * share) * (pcs.T @ (pcs @ (plain[pos] - mean)))
        np.testing.assert_allclose(after[pos] - plain[pos], on * u, atol=2e-5)
        energy = float((u**2).sum() / (plain[pos] ** 2).sum()) * on
        assert table.loc[pos, "energy"] == pytest.approx(energy, rel=1e-2, abs=1e-9)
        acted += int(on)
    assert acted >= 3
    assert table.loc[len(ROWS[0]) - 1, "energy"] == 0


def test_the_sign_contracts_states_that_are_far_apart(llama: Subject, known: Known) -> None:
    for sigma, grows in ((0.05, False), (1e4, True)):  # STR 0 and 1
        calibration = known(llama, sigma)
        steering = Steering(StrControl(TopComponents(), gamma=0.5), llama, calibration)
        written, tape = run(llama, [steering], ROWS[:1], KEYS[:1])
        text = torch.tensor([[*ROWS[0], *written.new[0][:-1]]])
        plain = dp.capture(llama, text, logits=None).states[-1][0]
        pcs, mean = calibration.tensors["pcs"][3], calibration.tensors["mean"][3]
        before, after = ((x[len(ROWS[0]) :] - mean) @ pcs.T for x in (plain, tape.states[-1][0]))
        assert bool((after.norm(dim=-1) > before.norm(dim=-1)).all()) is grows


def test_inside_the_band_it_is_bit_identical(llama: Subject, known: Known) -> None:
    wide = Gate(tau=0.5, band=0.6)
    batch = make_batch(llama, ROWS, side="left", row_keys=KEYS)
    steering = Steering(StrControl(TopComponents(), gate=wide), llama, known(llama, 6.0))
    written, _ = run(llama, [steering], ROWS, KEYS)
    assert written.new == generate(llama, batch, SAMPLING)
    assert (written.actions[0]["energy"] == 0).all()
    assert not written.actions[0]["active"].any()
    none = Steering(StrControl(TopComponents(), gamma=0.0), llama, known(llama, 6.0))
    assert run(llama, [none], ROWS, KEYS)[0].new == written.new


def test_rows_together_are_rows_alone(llama: Subject, known: Known, operators: Path) -> None:
    def control() -> Steering:
        return Steering(StrControl(LoraPair(operators), gamma=3.0), llama, known(llama, 6.0))

    together, tape = run(llama, [control()], ROWS, KEYS)
    for number, ids in enumerate(ROWS):
        alone, own = run(llama, [control()], [ids], [KEYS[number]])
        assert alone.new[0] == together.new[number]
        mine = tape.states[-1][number][tape.mask[number]]
        torch.testing.assert_close(mine, own.states[-1][0], rtol=1e-4, atol=1e-4)
        all_rows = together.actions[0]
        theirs = all_rows[all_rows["row"] == number]
        np.testing.assert_allclose(theirs["signal"], alone.actions[0]["signal"], atol=1e-5)
        assert theirs["pos"].tolist() == alone.actions[0]["pos"].tolist()


def test_the_published_write_knows_no_scale_and_the_stand_in_does(
    llama: Subject, operators: Path, known: Known
) -> None:
    state, share = torch.randn(1, 1, DIM, dtype=torch.float64), torch.full((1, 1, 1), 0.3, dtype=torch.float64)
    pair, stand_in = LoraPair(operators), TopComponents()
    stand_in.bind(llama, known(llama))
    stand_in._mean = stand_in._mean * 0
    norm = state.norm().reshape(1, 1, 1)
    torch.testing.assert_close(pair(10 * state, share, 10 * norm), pair(state, share, norm))
    torch.testing.assert_close(stand_in(10 * state, share, 10 * norm), 10 * stand_in(state, share, norm))
    assert torch.equal(pair(state, share, torch.zeros(1, 1, 1)), torch.zeros(1, 1, DIM, dtype=torch.float64))


def test_names_tell_them_apart(operators: Path) -> None:
    (stand_in,), (dom,) = make_mode("str", lambda: None), make_mode("dom", lambda: None, operators=operators)
    assert stand_in.id == "recovery.str_standin/1"
    assert dom.id == "recovery.dom/1"
    assert "dom" not in stand_in.id
    assert len(dom.operators.digest) == 12
    with pytest.raises(UsageError, match=r"operators=<a safetensors file>.* the mode str"):
        make_mode("dom", lambda: None)


def test_files_that_hold_no_operators(llama: Subject, known: Known, operators: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    good = load_file(operators)
    with pytest.raises(UsageError, match="could not be read"):
        LoraPair(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(UsageError, match="could not be read"):
        LoraPair(tmp_path / "text.safetensors")
    broken = {
        "is not there": {k: v for k, v in good.items() if k != "expansion.B"},
        "transposed": good | {"contraction.A": good["contraction.A"].T.contiguous()},
        "not finite": good | {"expansion.scale": torch.tensor(float("nan"))},
        "different widths": good | {"expansion.A": torch.ones(8, 4), "expansion.B": torch.ones(4, 8)},
    }
    for message, tensors in broken.items():
        save_file(tensors, tmp_path / "broken.safetensors")
        with pytest.raises(UsageError, match=message):
            LoraPair(tmp_path / "broken.safetensors")
    wide = tiny_llama(dim=64)
    with pytest.raises(UsageError, match="of width 32; those of tiny-random-llama have 64"):
        Steering(StrControl(LoraPair(operators)), wide, known(wide))


def test_a_calibration_without_a_bandwidth_is_refused(llama: Subject, made_up: Any, known: Known) -> None:
    with pytest.raises(CalibrationError, match="there is none"):
        Steering(StrControl(TopComponents()), llama)
    with pytest.raises(CalibrationError, match=r"'str_sigma'.*--force"):
        Steering(StrControl(TopComponents()), llama, made_up(llama, {}))
    for sigma in (0.0, float("nan")):
        with pytest.raises(CalibrationError, match="zero-denominator"):
            Steering(StrControl(TopComponents()), llama, known(llama, sigma))
    with pytest.raises(CalibrationError, match="'mean'"):
        Steering(StrControl(TopComponents()), llama, made_up(llama, {}, {"str_sigma": torch.tensor(1.0)}))
    with pytest.raises(UsageError, match="gamma=-1"):
        StrControl(TopComponents(), gamma=-1)


def test_the_calibrations_bandwidth_is_the_median_distance_among_four_neighbours() -> None:
    model = dp.load("tiny-llama")
    prompts = ["The river ran past the old mill and on towards the sea.", "Two and two are four.", "abc"]
    made = dp.calibrate(model, prompts)
    distances = []
    for text in prompts:
        states = dp.capture(model, [text], logits=None).states[-1][0, 1:].double().numpy()
        for start in range(len(states) - 3):
            four = states[start : start + 4]
            distances += [np.linalg.norm(four[i] - four[j]) for i in range(4) for j in range(i)]
    assert float(made.tensors["str_sigma"]) == pytest.approx(np.median(distances), rel=1e-4)
    control = Steering(make_mode("str", lambda: None)[0], model, made)
    ids = model.tokenizer("Once there was")["input_ids"]
    written = generate_with(model, make_batch(model, [ids]), SAMPLING, None, [control])
    assert 0.3 < written.actions[0]["signal"].mean() < 0.9  # so that a target of 0.63 means something
