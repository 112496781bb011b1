"""Every protocol reads looped models through the same doors as decoders, and its tables have the same columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.models import CemConfig, CemForCausalLM, CsmConfig, CsmForCausalLM
from dynprobe.probes import Subject, discover
from dynprobe.testing import byte_tokenizer, tiny_llama

TEXTS = ["hello world", "it is raining", "no thank you", "what a day"]
VOCAB = 260


@pytest.fixture(scope="module")
def csm() -> Subject:
    torch.manual_seed(0)
    model = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=5, vocab_size=VOCAB))
    return discover(model.eval(), tokenizer=byte_tokenizer(), name="csm")


@pytest.fixture(scope="module")
def cem() -> Subject:
    torch.manual_seed(0)
    model = CemForCausalLM(CemConfig.preset("nano", steps_attention=2, steps_mlp=3, vocab_size=VOCAB))
    return discover(model.eval(), tokenizer=byte_tokenizer(), name="cem")


@pytest.fixture(scope="module")
def runs(csm: Subject, cem: Subject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("runs")
    llama = discover(tiny_llama(vocab=VOCAB).model, tokenizer=byte_tokenizer(), name="llama")
    made = {
        name: dp.run(subject, TEXTS, perturb="alpha=0.1,iterations=1", max_new_tokens=4, out=out)
        for name, subject in (("csm", csm), ("cem", cem))
    }
    return made | {"llama": dp.run(llama, TEXTS, perturb="alpha=0.1", max_new_tokens=4, out=out)}


def test_tables_have_the_same_columns(runs: dict[str, Any]) -> None:
    for table in ("samples", "tokens", "depths", "profiles", "conditions", "prompts"):
        columns = {name: list(run.table(table).columns) for name, run in runs.items()}
        assert columns["csm"] == columns["cem"] == columns["llama"], table


def test_rows_say_where_they_stand(runs: dict[str, Any]) -> None:
    depths = runs["cem"].depths.drop_duplicates("depth").sort_values("depth")
    assert depths["stage"].tolist()[:6] == ["embed", "attention", "attention", "mlp", "mlp", "mlp"]
    assert depths["iteration"].tolist()[:6] == [0, 1, 2, 1, 2, 3]
    assert depths["layer"].tolist() == [-1, *[0] * 5, *[1] * 5]
    assert depths["component"].tolist()[:6] == [
        "resid_pre", "resid_mid", "resid_mid", "resid_post", "resid_post", "resid_post",
    ]  # fmt: skip
    depths = runs["csm"].depths.drop_duplicates("depth").sort_values("depth")
    assert depths["iteration"].tolist() == list(range(6))
    assert set(depths["track"]) == {"core"}
    for name in ("csm", "cem"):
        rows = runs[name].depths.query("depth > 0 and pos > 0")
        assert rows["energy"].notna().all()
        assert rows["energy_prev"].notna().all()
    assert runs["llama"].depths["energy"].isna().all()


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_free_texts_have_energies_at_every_position(runs: dict[str, Any], which: str) -> None:
    """Decoding reads them step by step; where the texts are the same, they are those of one forward."""
    depths = runs[which].depths
    arm = depths["sample_id"].astype(str).str.extract(r"^(?P<prompt>.*)\|(?P<arm>[a-z.]+)\|0$")
    depths = depths.assign(prompt=arm["prompt"], arm=arm["arm"]).query("depth > 0 and pos > 0")
    free, forced = (
        depths[depths["arm"] == f"perturbed.{a}"].set_index(["prompt", "pos", "depth"]) for a in ("free", "forced")
    )
    assert free["energy"].notna().all()
    n_prompt = runs[which].samples.groupby("prompt_id", observed=True)["n_prompt"].first()
    both = free.join(forced["energy"], rsuffix="_forced", how="inner").reset_index()
    both = both[both["pos"] < both["prompt"].map(n_prompt).astype(int)]  # the prompt is the same text in both
    np.testing.assert_allclose(both["energy"], both["energy_forced"], rtol=1e-3, atol=1e-5)


def test_stored_states_are_labelled_like_depths(csm: Subject, cem: Subject, tmp_path: Path) -> None:
    for name, subject, where in (("csm", csm, "iterations=2"), ("cem", cem, "layers=1,iterations=1")):
        run = dp.run(
            subject, TEXTS, max_new_tokens=0, states=True, where=where, perturb="alpha=0.1", out=tmp_path / name
        )
        keys, states = run.states()
        label = ["track", "stage", "layer", "iteration", "component"]
        theirs = run.depths.drop_duplicates("depth").set_index("depth")[label].astype(str)
        found = keys.drop_duplicates("depth").set_index("depth")[label].astype(str)
        assert found.equals(theirs.loc[found.index])
        assert states.shape[1:] == ((16, 32) if name == "csm" else (64,))


def test_the_layer_of_a_write_is_spelt_out(runs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    where = runs["cem"].conditions.query("condition_id == 'perturbed.forced'")["where"].iloc[0]
    assert where.startswith("layers=50%,iterations=1,")
    from dynprobe.cli import _render

    _render.run(runs["cem"])
    assert "resume ok, by the slow road" in capsys.readouterr().out


def test_slots_have_no_order_and_say_so(runs: dict[str, Any]) -> None:
    samples = runs["csm"].samples.query("condition_id == 'clean'")
    assert samples["limen_ratio"].isna().all()
    assert samples["reasons"].str.contains('"limen_ratio": "slots"').all()
    assert samples["kappa_phase"].notna().all()


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_a_sweep_has_the_numbers_of_single_runs(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    subject: Subject = request.getfixturevalue(which)
    swept = dp.sweep(subject, TEXTS, alphas=[0.1, 0.5], layers="0+3", controls=("sham",), out=tmp_path)
    for turn in (0, 3):
        where = subject.where_of(("resid_post", turn))
        for alpha in (0.1, 0.5):
            alone = dp.run(subject, TEXTS, perturb=f"alpha={alpha},{where}", max_new_tokens=0, out=tmp_path / "one")
            theirs = alone.samples.query("condition_id == 'perturbed.forced'").set_index("prompt_id")
            cells = swept.conditions.query(f"arm == 'perturbed' and layer == {turn} and alpha == {alpha}")
            assert len(cells) == 1
            mine = swept.samples[swept.samples["condition_id"].isin(cells["condition_id"])].set_index("prompt_id")
            assert len(mine) == len(TEXTS)
            for column in ("kl_clean_pert", "kappa_phase_d", "nll_d"):
                np.testing.assert_allclose(
                    mine[column].sort_index(), theirs[column].sort_index(), rtol=2e-3, atol=1e-7, err_msg=column
                )
    with pytest.raises(UsageError, match="is looped: --layers counts the updates of its track"):
        dp.sweep(subject, TEXTS, alphas=[0.1], component="mlp_out", out=tmp_path)


@pytest.mark.parametrize("which", ["csm", "cem"])
def test_thresholds_of_iterations(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    subject: Subject = request.getfixturevalue(which)
    run = dp.threshold(subject, TEXTS, layers=1, level=1e-5, alpha_min=1e-3, n_boot=200, out=tmp_path)
    fits = run.table("fits")
    assert set(fits["scale"]) == {"relnorm", "coordstd"}
    best = fits[fits["headline"] & (fits["scale"] == "relnorm")].iloc[0]
    assert best["status"] == "resolved"
    level = []
    for alpha in (best["alpha50"] / 1.5, best["alpha50"] * 1.5):
        where = subject.where_of(("resid_post", 1))
        done = dp.run(subject, TEXTS, perturb=f"alpha={alpha},{where}", max_new_tokens=0, out=tmp_path / "one")
        level.append(done.samples.query("condition_id == 'perturbed.forced'")["kl_clean_pert"].median())
    assert level[0] < 1e-5 < level[1]


def test_calibration_knows_each_slots_coordinates(csm: Subject) -> None:
    known = dp.calibrate(csm, ["one two three", "four five six seven", "eight nine ten"])
    assert known.tensors["std"].shape == (6, 16, 32)
    tapes = [dp.capture(csm, [t]) for t in ("one two three", "four five six seven", "eight nine ten")]
    states = torch.cat([t.states[2][0, 1:] for t in tapes])
    np.testing.assert_allclose(known.tensors["std"][2], states.std(0), rtol=1e-4)
    with pytest.raises(UsageError, match=r"16 slots per position; scale=cov needs one vector"):
        dp.calibrate(csm, ["one two three", "four"], cov_layers=[1])


@pytest.mark.parametrize("name", ["tiny-csm", "tiny-cem"])
def test_loops_in_bfloat16_are_read_and_flagged(name: str, tmp_path: Path) -> None:
    from dynprobe.probes import check_fired, check_null, check_readout, tokenize

    texts = ["In the beginning God created", "And the earth"]
    half, whole = (dp.load(name, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    tape, exact = (dp.capture(subject, texts, logits="all") for subject in (half, whole))
    ids = tokenize(half, texts)
    assert {state.dtype for state in tape.states} == {torch.bfloat16}
    for a, b in zip(tape.states, exact.states, strict=True):  # rounding, and no other state
        real = exact.mask
        assert float((a[real].float() - b[real]).norm() / b[real].norm()) < 0.02
    for key, energy in tape.energies.items():  # energies of rounded states, not rounded themselves
        assert energy.dtype == torch.float64
        known = torch.isfinite(exact.energies[key])
        assert torch.equal(known, torch.isfinite(energy))
    assert all(c.passed for c in (check_null(half, ids), check_fired(half, ids), check_readout(half, tape)))
    first = "iterations=1" if name == "tiny-csm" else "layers=1,iterations=1"
    pushed = dp.capture(half, texts, perturb=f"alpha=0.1,{first}", logits="all")
    assert pushed.passport["alpha_relnorm"] == pytest.approx(0.1, rel=5e-3)
    small = CsmForCausalLM(CsmConfig.preset("nano", num_iterations=3, vocab_size=VOCAB))
    if name == "tiny-cem":
        small = CemForCausalLM(CemConfig.preset("nano", vocab_size=VOCAB))
    subject = discover(small.bfloat16().eval(), tokenizer=byte_tokenizer(), name=name)
    run = dp.run(subject, texts, max_new_tokens=0, out=tmp_path)
    assert run.manifest.dtypes["weights"] == "bfloat16"
    assert run.manifest.dtypes["low_precision_angles"] is True
    assert np.isfinite(run.samples["kappa_phase"]).all()
