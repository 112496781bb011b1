"""Models in bfloat16 and float16: what is read is what they hold, and what is measured is measured in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe import metrics
from dynprobe.testing import save_tiny_model

TEXTS = ["Hello there, world", "A second prompt"]
KINDS = {"bfloat16": 2.0**-7, "float16": 2.0**-9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest, folder: Path) -> Any:
    return dp.load(str(folder), dtype=request.param)


def _kind(subject: Any) -> str:
    return str(subject.dtype).removeprefix("torch.")


def test_states_keep_their_dtype_and_are_near_those_of_float32(subject: Any, folder: Path) -> None:
    tape, full = dp.capture(subject, TEXTS), dp.capture(dp.load(str(folder)), TEXTS)
    assert tape.states[2].dtype == subject.dtype
    real = full.mask
    for low, high in zip(tape.states, full.states, strict=True):
        off = (low.float() - high)[real].norm() / high[real].norm()
        assert float(off) < 4 * KINDS[_kind(subject)]


def test_angles_are_computed_in_float32_from_the_rounded_states(subject: Any) -> None:
    tape = dp.capture(subject, TEXTS)
    mask = tape.mask
    low = metrics.measure(list(tape.states), mask)
    high = metrics.measure([s.float() for s in tape.states], mask)
    for name in ("angle", "delta_rel_prev"):
        kept = low.keep & np.isfinite(high.depth[name])
        assert kept.any()
        np.testing.assert_allclose(low.depth[name][kept], high.depth[name][kept], rtol=1e-5, atol=1e-6)
    direct = tape.states[2].double(), tape.states[1].double()
    cosine = (direct[0] * direct[1]).sum(-1) / (direct[0].norm(dim=-1) * direct[1].norm(dim=-1))
    row = int(np.argmax(mask.sum(1).numpy()))
    np.testing.assert_allclose(low.depth["angle"][2][row, 1:4], torch.arccos(cosine)[row, 1:4], rtol=1e-4, atol=1e-5)


def test_a_write_has_the_asked_size_up_to_the_rounding_of_the_state(subject: Any) -> None:
    clean, pushed = (dp.capture(subject, TEXTS, perturb=p) for p in (None, "alpha=0.2,layers=1"))
    moved = (pushed.states[2].float() - clean.states[2].float()).norm(dim=-1) / clean.states[2].float().norm(dim=-1)
    real = clean.mask & (clean.positions >= 1)
    np.testing.assert_allclose(moved[real].numpy(), 0.2, rtol=0.1)
    assert torch.equal(pushed.states[1], clean.states[1])


def test_the_same_noise_is_drawn_in_every_dtype(subject: Any, folder: Path) -> None:
    """The direction does not depend on the dtype; only its last digits are rounded."""
    whole = dp.load(str(folder))
    moved = []
    for one in (subject, whole):
        clean, pushed = (dp.capture(one, TEXTS[:1], perturb=p) for p in (None, "alpha=0.5,layers=0"))
        moved.append((pushed.states[1].float() - clean.states[1].float())[0, 1:])
    assert float(torch.nn.functional.cosine_similarity(*moved, dim=-1).min()) > 0.99


def test_a_run_is_flagged_and_its_paired_differences_are_finite(subject: Any, folder: Path, tmp_path: Path) -> None:
    kind = _kind(subject)
    run = dp.run(str(folder), TEXTS, dtype=kind, perturb="alpha=0.3", max_new_tokens=3, states=True, where="layers=1",
                 out=tmp_path)  # fmt: skip
    assert run.manifest.dtypes["weights"] == kind
    assert run.manifest.dtypes["metrics"] == "float32"
    assert run.manifest.dtypes["low_precision_angles"] is True
    assert run.manifest.self_tests["null"]["passed"]
    forced = run.samples[run.samples["condition_id"].astype(str) == "perturbed.forced"]
    assert np.isfinite(forced[["kl_clean_pert", "kappa_phase_d"]].to_numpy(float)).all()
    _, values = run.states(layer=1, raw=True)
    assert values.dtype == (np.uint16 if kind == "bfloat16" else np.float16)
