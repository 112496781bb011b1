"""What is measured as the token comes is what the metric of a whole run says of that token."""

from typing import Any

import numpy as np
import pytest
import torch
from toys import NEW, PROMPTS, calibration_of, fed

import dynprobe as dp
from dynprobe import metrics
from dynprobe.controllers import Controller, Seen
from dynprobe.controllers.recovery import SIGNALS, Deadband, Recovery, Signal
from dynprobe.errors import CalibrationError
from dynprobe.probes import Subject, discover
from dynprobe.probes._measured import measure_track
from dynprobe.testing import tiny_gpt2, tiny_llama

LENGTHS = [len(p) + len(n) - 1 for p, n in zip(PROMPTS, NEW, strict=True)]


class Listens(Controller):
    """Note one signal of the last ``width`` columns of every forward."""

    def __init__(self, signal: Signal, width: int = 1) -> None:
        self.signal, self.width, self.reads = signal, width, signal.reads
        self.seen: dict[tuple[int, int], float] = {}
        self.depth: dict[tuple[int, int], int] = {}

    def bind(self, subject: Any, calibration: Any) -> None:
        self.signal.bind(subject, calibration)

    def start(self, n_rows: int) -> Any:
        return self.signal.start(n_rows)

    def decide(self, seen: Seen, memory: Any) -> None:
        values, depth = self.signal.measure(seen, memory, self.width)
        positions = seen.step.positions[:, -values.shape[1] :]
        rows = np.arange(len(values)) if seen.step.rows is None else seen.step.rows
        for i, j in np.ndindex(*values.shape):
            if positions[i, j] >= 0:
                self.seen[int(rows[i]), int(positions[i, j])] = float(values[i, j])
                self.depth[int(rows[i]), int(positions[i, j])] = -2 if depth is None else int(depth[i, j])


def whole(subject: Subject, calibration: Any) -> dict[str, Any]:
    """Every signal of every token, from one forward per row and the metrics of whole runs."""
    out: dict[str, dict[tuple[int, int], float]] = {name: {} for name in SIGNALS}
    first = 0 if subject.loop is not None else 1
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        tape = dp.capture(subject, [[*prompt, *new[:-1]]], logits="all")
        which = ("kappa.phase/1", "limen.ct/1", "delta.angle/1", "resid.norm/1")
        m = measure_track(subject, list(tape.states), tape.mask, which)
        outputs = metrics.output_metrics(tape.logits, torch.full(tape.mask.shape, -1))
        for pos in range(LENGTHS[row]):
            at = row, pos
            out["kappa_phase"][at] = float(m.token["kappa_phase"][0, pos])
            out["entropy"][at] = float(outputs["entropy"][0, pos]) if pos else np.nan
            if "limen_ct" in m.token:
                out["limen_ct"][at] = float(m.token["limen_ct"][0, pos])
            if subject.n_slots is None:
                states = np.stack([tape.states[d][0, pos : pos + 1].double().numpy() for d in tape.depths])[first:]
                profile = (calibration.tensors[f"kappa_token_{k}"].numpy()[first + 1 :] for k in ("mu", "sigma"))
                mu, sigma = profile
                for name in ("kappa.phase.zmax/1", "kappa.phase.z/1"):
                    value = metrics.compute(name, states, mu=mu, sigma=sigma)
                    out[name[:-2].replace(".", "_")][at] = float(value) if pos else np.nan
                mu, sigma = (calibration.tensors[f"norm_step_{k}"].numpy()[first + 1 :] for k in ("mu", "sigma"))
                value = metrics.compute("norm.step.zmax/1", states, mu=mu, sigma=sigma)
                out["norm_step_zmax"][at] = float(value) if pos else np.nan
    return out


def check(subject: Subject, calibration: Any, name: str, expected: dict[str, Any], tolerance: float = 2e-4) -> None:
    listens = Listens(Signal(name))
    fed(subject, PROMPTS, NEW, listens, calibration=calibration)
    assert set(listens.seen) == {(r, p) for r in range(3) for p in range(len(PROMPTS[r]) - 1, LENGTHS[r])}
    wanted = np.array([expected[name][at] for at in listens.seen])
    got = np.array(list(listens.seen.values()))
    assert np.isfinite(got).sum() >= 21
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=["zoo", "gpt2", "cem"])
def subject_and_all(request: Any, zoo: Subject, calibrated: Any) -> Any:
    subject = {"zoo": lambda: zoo, "gpt2": tiny_gpt2, "cem": lambda: dp.load("tiny-cem")}[request.param]()
    calibration = calibrated if request.param == "zoo" else calibration_of(subject, first=int(request.param == "gpt2"))
    return subject, calibration, whole(subject, calibration)


@pytest.mark.parametrize("name", SIGNALS)
def test_streamed_is_whole_on_every_token(name: str, subject_and_all: Any) -> None:
    check(subject_and_all[0], subject_and_all[1], name, subject_and_all[2])


@pytest.mark.parametrize("name", ["kappa_phase", "entropy"])
def test_slots_are_taken_together_as_in_a_run(name: str) -> None:
    subject = dp.load("tiny-csm")
    calibration = dp.calibrate(subject, ["A line of text, and no more.", "Another one that is as short."])
    check(subject, calibration, name, whole(subject, calibration))


def test_half_precision_states_are_measured_in_float32() -> None:
    subject = discover(tiny_llama().model.to(torch.bfloat16))
    calibration = calibration_of(subject)
    for name in SIGNALS:
        listens = Listens(Signal(name))
        run = fed(subject, PROMPTS, NEW, listens, calibration=calibration)
        if name == "kappa_phase":
            for (row, pos), value in listens.seen.items():
                states = torch.stack([run.state(row, pos, d) for d in range(1, 4)]).double().numpy()[:, None]
                assert value == pytest.approx(float(metrics.compute("kappa.phase/1", states)), rel=1e-5)
        assert np.isfinite([v for (_, pos), v in listens.seen.items() if pos > 2]).all()


@pytest.mark.parametrize("name", SIGNALS)
def test_columns_of_a_prompt_are_its_tokens(name: str, zoo: Subject, calibrated: Any) -> None:
    """A prompt's last columns, as a whole or as new tokens: the same numbers, with padding before and position 0."""
    listens, one = Listens(Signal(name), width=4), Listens(Signal(name))
    fed(zoo, PROMPTS, NEW, listens, calibration=calibrated)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        one.seen.clear()
        fed(zoo, [prompt[:1]], [[*prompt[1:], *new]], one, calibration=calibrated)
        for (r, pos), value in listens.seen.items():
            if r == row:
                assert value == pytest.approx(one.seen[0, pos], rel=1e-4, abs=1e-4, nan_ok=True)
        assert np.isnan(one.seen[0, 0])
    assert len(listens.seen) == (21 + 3 if name == "entropy" else 21 + 4 + 3 + 4)


@pytest.mark.parametrize("name", ["kappa_phase_zmax", "norm_step_zmax"])
def test_the_depth_is_where_the_deviation_stands(name: str, zoo: Subject, calibrated: Any) -> None:
    listens = Listens(Signal(name))
    run = fed(zoo, PROMPTS, NEW, listens, calibration=calibrated)
    prefix = "norm_step" if name == "norm_step_zmax" else "kappa_token"
    mu, sigma = (calibrated.tensors[f"{prefix}_{k}"].numpy() for k in ("mu", "sigma"))
    for (row, pos), value in listens.seen.items():
        z = []
        for depth in range(2, zoo.n_layers + 1):
            a, b = run.state(row, pos, depth - 1).double(), run.state(row, pos, depth).double()
            cos = float(a @ b / a.norm() / b.norm())
            step = abs(float((b.norm() / a.norm()).log())) if prefix == "norm_step" else np.arccos(cos) / np.pi
            z.append((step - mu[depth]) / sigma[depth])
        assert value == pytest.approx(max(z), rel=1e-3)
        assert listens.depth[row, pos] == 2 + int(np.argmax(z))


def test_what_is_not_known_is_nan() -> None:
    """A broken state makes its signals NaN, not small; the detector then counts it as neither high nor low."""
    subject = tiny_llama()
    calibration = calibration_of(subject)

    class Breaks(Controller):
        writes = "layers=2"

        def act(self, state: Any, site: Any, seen: Any, memory: Any) -> Any:
            return torch.full_like(state, torch.nan) if seen.decoding else state

    for name in SIGNALS:
        listens = Listens(Signal(name))
        fed(subject, PROMPTS[:1], NEW[:1], Breaks(), listens, calibration=calibration)
        after = [v for (_, pos), v in listens.seen.items() if pos >= len(PROMPTS[0])]
        if name in ("entropy", "limen_ct"):
            assert np.isnan(after).all(), name
        else:  # two steps, one of them known: half is enough for a mean, and for the largest
            assert np.isfinite(after).all(), name

    class Zero(Breaks):
        writes = "layers=all"

    for name in SIGNALS:
        listens = Listens(Signal(name))
        fed(subject, PROMPTS[:1], NEW[:1], Zero(), listens, calibration=calibration)
        assert np.isnan([v for (_, pos), v in listens.seen.items() if pos >= len(PROMPTS[0])]).all(), name


def test_logits_that_are_minus_infinity_add_nothing_to_the_entropy() -> None:
    from types import SimpleNamespace

    from dynprobe.probes._clock import Step

    logits = torch.tensor([[[0.0, 0.0, -torch.inf]], [[torch.nan, 0.0, 0.0]]])
    seen = Seen(Step(1, np.array([[4], [4]]), np.array([4, 4]), ("a", "b"), None), {}, SimpleNamespace(logits=logits))
    value = Signal("entropy").measure(seen, {})[0][:, 0]
    assert value[0] == pytest.approx(np.log(2))
    assert np.isnan(value[1])


def test_quantiles_of_the_calibration_are_of_the_same_signal(zoo: Subject, calibrated: Any) -> None:
    """Fed with the calibration's own prompts, the stream has the calibration's quantiles."""
    from dynprobe.prompts import load_prompts
    from dynprobe.protocols._prompts import token_rows

    rows = [r for r in token_rows(zoo, load_prompts(source="calibration")) if len(r) > 1]
    listening = [Listens(Signal(name), width=1000) for name in SIGNALS if name != "entropy"]
    fed(zoo, [list(r) for r in rows], [[5]] * len(rows), *listening, calibration=calibrated)
    for listens in listening:
        values = np.array(list(listens.seen.values()))
        values = values[np.isfinite(values)]
        for q in (0.25, 0.75, 0.99, 1.0):
            expected = calibrated.quantile(listens.signal.name, q)
            assert float(np.quantile(values, q)) == pytest.approx(expected, rel=2e-3), (listens.signal.name, q)


def test_a_calibration_for_slots_without_ct_is_refused_and_not_guessed() -> None:
    subject = dp.load("tiny-csm")
    calibration = dp.calibrate(subject, ["A line of text, and no more.", "Another one that is as short."])
    for name in SIGNALS:
        band = Recovery(Deadband(name), None)
        if name in calibration.signals:
            with band.attach(subject, calibration):
                pass
        else:
            with (
                pytest.raises(CalibrationError, match=f"does not hold the signal {name}"),
                band.attach(subject, calibration),
            ):
                pass
