"""A sweep holds every prompt under every cell once, with the numbers that a run of the one condition gives."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import DynprobeError, InterruptedRunError, PromptError, SiteError, UsageError
from dynprobe.probes import Fork, discover
from dynprobe.prompts import Prompt
from dynprobe.protocols import SweepConfig, _execute, _sweep, _trunk
from dynprobe.protocols._controls import energy_matched, scrambled, twin_of
from dynprobe.protocols._grid import parse_strengths
from dynprobe.protocols._prepare import prepare
from dynprobe.protocols._sweep import _side, _writes
from dynprobe.testing import tiny_llama

#: What is said of a row in words, or of its place among others, is compared by itself.
LABELS = ("sample_id", "prompt_id", "condition_id", "replicate", "category")
#: Columns that only a run has: its longer list of metrics, and where along the depth a write is felt.
ALPHAS = (0.05, 0.4, 1.5)


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Pictures are drawn from the tables and tested with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_execute, "_pictures", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(f"p{i}", text, "odd" if i % 2 else "even", "test") for i, text in enumerate(texts)]


def samples(run: Any, condition: str | None = None) -> pd.DataFrame:
    frame = run.samples
    frame = frame.astype({c: object for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)})
    if condition is not None:
        frame = frame[frame["condition_id"] == condition]
        assert len(frame), condition
    return frame.set_index("prompt_id").sort_index()


def same_rows(mine: pd.DataFrame, theirs: pd.DataFrame, tolerance: float = 1e-5, skip: tuple[str, ...] = ()) -> int:
    """Compare all columns that both have; returns how many hold numbers."""
    assert list(mine.index) == list(theirs.index)
    numbers = 0
    for column in mine.columns.intersection(theirs.columns):
        if column in (*LABELS, *skip):
            continue
        a, b = mine[column], theirs[column]
        if a.dtype.kind == "f" or b.dtype.kind == "f":
            np.testing.assert_allclose(
                a.to_numpy(np.float64), b.to_numpy(np.float64), rtol=tolerance, atol=tolerance, err_msg=column
            )
            numbers += bool(np.isfinite(a.to_numpy(np.float64)).any())
        elif column == "reasons":
            for x, y in zip(a, b, strict=True):  # a run measures more, so it has more to give reasons for
                x, y = (json.loads(v) if isinstance(v, str) else {} for v in (x, y))
                assert {k: v for k, v in y.items() if k in x} == x
        else:
            assert a.where(a.notna(), None).tolist() == b.where(b.notna(), None).tolist(), column
    return numbers


@pytest.fixture(scope="module")
def whole(llama: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two scales, two layers, two seeds, every control."""
    return dp.sweep(
        llama, prompts, alphas=ALPHAS, layers="0+2", seeds=[0, 3], scale=["relnorm", "coordstd"],
        controls="sham,sign,energy,twin,scrambled", out=tmp_path_factory.mktemp("sweeps"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(llama: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``alone(spec)``: the samples of the perturbed arm of a run of one condition."""
    out, made = tmp_path_factory.mktemp("alone"), {}

    def run(spec: str, arm: str = "perturbed.forced", model: Any = llama, **settings: Any) -> pd.DataFrame:
        key = (spec, id(model), *sorted(settings))
        if key not in made:
            made[key] = dp.run(model, prompts, perturb=spec, out=out, **{"max_new_tokens": 0} | settings)
        return samples(made[key], arm)

    return run


def test_every_prompt_stands_under_every_cell_once(whole: Any, prompts: Any) -> None:
    table = whole.table("conditions")
    frame = whole.samples
    assert table["condition_id"].is_unique
    assert frame["sample_id"].is_unique
    count = frame.groupby("condition_id", observed=True)["prompt_id"].nunique()
    assert set(count.index.astype(str)) == set(table["condition_id"].astype(str))
    assert (count == len(prompts)).all()
    cells = 2 * 2 * 2 * 3
    expected = {
        ("model", "clean"): 1, ("model", "sham"): 2, ("model", "perturbed"): cells, ("model", "sign-flip"): cells,
        ("model", "energy-matched"): cells, ("twin", "clean"): 1, ("twin", "sham"): 2, ("twin", "perturbed"): cells,
        ("scrambled", "clean"): 1, ("scrambled", "sham"): 2, ("scrambled", "perturbed"): cells,
    }  # fmt: skip
    assert table.groupby(["variant", "arm"], observed=True).size().to_dict() == expected
    assert len(frame) == len(table) * len(prompts)
    assert whole.status == "complete"


def test_the_conditions_say_what_each_cell_is(whole: Any) -> None:
    table = whole.table("conditions").set_index("condition_id")
    row = table.loc["coordstd|gaussian|L2|s3|0.4"]
    assert (row["arm"], row["scale"], row["kind"], row["layer"], row["seed"]) == (
        "perturbed", "coordstd", "gaussian", 2, 3,
    )  # fmt: skip
    assert row["alpha"] == 0.4
    assert "layers=2,positions=1:" in row["where"]
    assert (row["decode_mode"], row["variant"]) == ("forced", "model")
    assert table.loc["relnorm|gaussian|L0|s0|-0.4", "arm"] == "sign-flip"
    assert table.loc["relnorm|gaussian|L0|s0|-0.4", "alpha"] == -0.4
    energy = table.loc["energy|L1|relnorm|gaussian|L0|s0|0.4"]
    assert (energy["layer"], energy["arm"], energy["matched_to"]) == (1, "energy-matched", "relnorm|gaussian|L0|s0|0.4")
    assert np.isnan(energy["alpha"])
    assert table.loc["clean", "alpha"] == 0
    assert pd.isna(table.loc["clean", "layer"])
    assert table.loc["twin:relnorm|gaussian|L0|s0|0.4", "variant"] == "twin"
    shams = table[table["arm"] == "sham"]
    assert (shams["alpha"] == 0).all()


@pytest.mark.parametrize("scale", ["relnorm", "coordstd"])
@pytest.mark.parametrize(("layer", "seed", "alpha"), [(0, 3, 0.4), (2, 0, 1.5)])
def test_a_row_is_the_row_of_a_run(whole: Any, alone: Any, scale: str, layer: int, seed: int, alpha: float) -> None:
    theirs = alone(f"alpha={alpha},scale={scale},layers={layer},seed={seed}")
    mine = samples(whole, f"{scale}|gaussian|L{layer}|s{seed}|{alpha}")
    assert same_rows(mine, theirs) > 20
    for column in ("kl_clean_pert", "flip_rate", "kappa_phase_d", "nll_d", "alpha_relnorm", "alpha_coordstd"):
        assert np.isfinite(mine.loc["p0", column]), column
    assert (mine["alpha"] == alpha).all()
    assert mine.loc["p4", "status"] == theirs.loc["p4", "status"] == "not-written"  # a single token


def test_clean_rows_are_those_of_a_run(whole: Any, alone: Any) -> None:
    assert same_rows(samples(whole, "clean"), alone("alpha=0.4,scale=relnorm,layers=0,seed=3", "clean")) > 10


def test_the_sham_does_nothing(whole: Any) -> None:
    frame = whole.samples
    sham = frame[frame["condition_id"].astype(str).str.contains("sham")]
    real = sham[sham["status"] == "ok"]
    assert len(real) == 6 * 4
    assert (real["kl_clean_pert"].abs() <= 1e-9).all()
    assert (real["flip_rate"] == 0).all()
    assert (real["alpha_abs"] == 0).all()
    assert (real["kappa_phase_d"].abs() <= 1e-7).all()


def test_the_flipped_sign_is_the_negative_strength(whole: Any, alone: Any) -> None:
    mine = samples(whole, "relnorm|gaussian|L2|s0|-1.5")
    assert same_rows(mine, alone("alpha=-1.5,scale=relnorm,layers=2,seed=0")) > 20
    straight = samples(whole, "relnorm|gaussian|L2|s0|1.5")
    written = mine.index != "p4"
    np.testing.assert_allclose(mine["alpha_abs"][written], straight["alpha_abs"][written], rtol=1e-5)
    assert (mine["kl_clean_pert"][written] != straight["kl_clean_pert"][written]).all()


def test_the_energy_is_the_one_that_was_written_at_the_other_depth(whole: Any) -> None:
    table = whole.table("conditions").set_index("condition_id")
    for name, row in table[table["arm"] == "energy-matched"].iterrows():
        mine, theirs = samples(whole, str(name)), samples(whole, str(row["matched_to"]))
        written = theirs["status"] == "ok"
        assert written.sum() == 4
        np.testing.assert_allclose(mine["alpha_abs"][written], theirs["alpha_abs"][written], rtol=2e-5)
        assert (mine["status"][~written] == "not-written").all()
        assert row["layer"] == (table.loc[str(row["matched_to"]), "layer"] + 1) % 3
        assert (mine["kl_clean_pert"][written] > 0).all()


@pytest.mark.parametrize("component", ["attn_out", "mlp_out", "resid_pre"])
def test_energy_and_effects_at_other_components(
    llama: Any, prompts: Any, alone: Any, tmp_path: Path, component: str
) -> None:
    run = dp.sweep(
        llama, prompts[:2], alphas=[0.5], layers=1, component=component, controls="energy,sham", out=tmp_path
    )
    name = "relnorm|gaussian|L1|s0|0.5"
    mine, energy = samples(run, name), samples(run, f"energy|L2|{name}")
    np.testing.assert_allclose(energy["alpha_abs"], mine["alpha_abs"], rtol=2e-5)
    theirs = alone(f"alpha=0.5,layers=1,component={component}")
    assert same_rows(mine, theirs.loc[["p0", "p1"]]) > 20


def test_the_twin_is_another_model_of_the_same_make(whole: Any, llama: Any) -> None:
    twin = twin_of(llama)
    assert type(twin.model) is type(llama.model)
    assert twin.n_layers == llama.n_layers
    for (name, a), (_, b) in zip(llama.model.named_parameters(), twin.model.named_parameters(), strict=True):
        if "norm" not in name:
            assert not torch.allclose(a, b), name
    assert all(
        torch.equal(a, b) for a, b in zip(twin.model.parameters(), twin_of(llama).model.parameters(), strict=True)
    )
    before = torch.random.get_rng_state()
    twin_of(llama)
    assert torch.equal(before, torch.random.get_rng_state())
    name = "relnorm|gaussian|L2|s0|1.5"
    mine, theirs = samples(whole, name), samples(whole, f"twin:{name}")
    written = mine.index != "p4"
    assert not np.isclose(mine["kl_clean_pert"], theirs["kl_clean_pert"], rtol=1e-3)[written].any()
    assert not np.isclose(samples(whole, "clean")["nll"], samples(whole, "twin:clean")["nll"], rtol=1e-4)[written].any()
    np.testing.assert_allclose(theirs["alpha_relnorm"][written], 1.5, rtol=1e-5)


def test_the_twins_rows_are_those_of_a_run_of_the_twin(whole: Any, llama: Any, alone: Any) -> None:
    twin = twin_of(llama)
    for scale in ("relnorm", "coordstd"):
        theirs = alone(f"alpha=0.4,scale={scale},layers=2,seed=3", model=twin)
        assert same_rows(samples(whole, f"twin:{scale}|gaussian|L2|s3|0.4"), theirs) > 20


def test_scrambled_texts_keep_their_tokens_and_the_first_of_them(
    whole: Any, llama: Any, prompts: Any, tmp_path: Path
) -> None:
    rows = [llama.tokenizer(p.text)["input_ids"] for p in prompts]
    mixed = [scrambled(row, p.prompt_id) for row, p in zip(rows, prompts, strict=True)]
    for row, new in zip(rows, mixed, strict=True):
        assert sorted(row) == sorted(new)
        assert row[0] == new[0]
    assert mixed[0] != rows[0]
    assert scrambled(rows[0], "p0") == mixed[0]
    assert scrambled(rows[0], "other") != mixed[0]
    run = dp.run(
        llama, [Prompt(p.prompt_id, "", p.category, "test", tuple(row)) for p, row in zip(prompts, mixed, strict=True)],
        perturb="alpha=0.4,layers=0,seed=3", max_new_tokens=0, out=tmp_path,
    )  # fmt: skip
    mine = samples(whole, "scrambled:relnorm|gaussian|L0|s3|0.4")
    assert same_rows(mine, samples(run, "perturbed.forced"), skip=("n_prompt",)) > 20


def test_the_order_of_the_axes_is_no_other_sweep(whole: Any, llama: Any, prompts: Any) -> None:
    """Neither in identity, so that it is found finished, nor in values, which is shown on sweeps of other folders."""
    again = dp.sweep(
        llama, prompts, alphas=ALPHAS[::-1], layers=[2, 0], seeds="3+0", scale="coordstd,relnorm",
        controls=["scrambled", "twin", "sign", "energy", "sham"], out=whole.path.parent,
    )  # fmt: skip
    assert again.path == whole.path


def test_what_changes_a_number_is_another_sweep(llama: Any, prompts: Any) -> None:
    base = {"alphas": [0.1, 0.2], "layers": "1", "seeds": 0, "scale": "relnorm"}

    def ident(texts: Any = prompts, **change: Any) -> str:
        return prepare(llama, texts, base | change, kind=SweepConfig, resolve=_writes).ident

    changes: list[dict[str, Any]] = [
        {}, {"alphas": [0.1, 0.3]}, {"alphas": [0.1]}, {"layers": "2"}, {"layers": "1+2"}, {"seeds": 1},
        {"scale": "coordstd"}, {"kind": "rotate"}, {"positions": "last"}, {"component": "mlp_out"},
        {"controls": "none"}, {"controls": "sham,sign"}, {"tables": "all"}, {"max_new_tokens": 2}, {"padding": "left"},
    ]  # fmt: skip
    found = [ident(**change) for change in changes]
    assert len(set(found)) == len(found)
    for same in ({"layers": "50%"}, {"layers": 1}, {"alphas": "0.2,0.1"}, {"batch_size": 1}, {"alphas": "0.2+0.1"}):
        assert ident(**same) == found[0], same
    assert ident(prompts[::-1]) != found[0]


@pytest.fixture(scope="module")
def small(llama: Any, prompts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(out: Path, **change: Any) -> Any:
        settings = {"alphas": [0.1, 0.7], "layers": "0+1", "seeds": "0:2", "batch_size": 2, "tables": "all"}
        settings |= {"controls": "sham,scrambled", "out": out}
        return dp.sweep(llama, prompts[:3], **settings | change)

    return run, run(tmp_path_factory.mktemp("uncut"))


def test_values_do_not_know_the_order_or_size_of_anything(small: Any, tmp_path: Path) -> None:
    run, uncut = small
    mixed = run(tmp_path, alphas=[0.7, 0.1], layers=[1, 0], seeds=[1, 0], batch_size=1)
    assert mixed.manifest.id8 == uncut.manifest.id8
    assert mixed.path != uncut.path
    for name in ("samples", "tokens", "depths"):
        keys = [k for k in ("sample_id", "pos", "track", "depth") if k in uncut.table(name)]
        mine, theirs = (r.table(name).astype({"sample_id": str}).set_index(keys).sort_index() for r in (mixed, uncut))
        assert mine.index.equals(theirs.index)
        for column in mine:
            if mine[column].dtype.kind == "f":
                np.testing.assert_allclose(mine[column], theirs[column], rtol=3e-5, atol=3e-5, err_msg=column)


def test_a_sweep_cut_at_any_unit_and_continued_equals_the_uncut_one(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = small
    uncut = run(tmp_path / "uncut", layers=1)
    units = uncut.manifest.batch_plan
    assert len(units) == 2 * 2  # variant × group of prompts
    work = _sweep._Sweep.work
    for cut in range(len(units)):
        count = itertools.count()

        def interrupted(self: Any, unit: Any, early: Any, count: Any = count, cut: int = cut) -> Any:
            if next(count) == cut:
                raise KeyboardInterrupt
            return work(self, unit, early)

        monkeypatch.setattr(_sweep._Sweep, "work", interrupted)
        with pytest.raises(InterruptedRunError, match="the same command continues"):
            run(tmp_path / str(cut), layers=1)
        monkeypatch.setattr(_sweep._Sweep, "work", work)
        (folder,) = (tmp_path / str(cut)).iterdir()
        assert dp.open(folder).manifest.finished == list(range(cut))
        done = run(tmp_path / str(cut), layers=1)
        assert done.path == folder
        assert done.status == "complete"
        assert done.manifest.batch_plan == units
        for name in ("samples", "tokens", "depths", "profiles", "conditions"):
            mine, theirs = done.table(name), uncut.table(name)
            pd.testing.assert_frame_equal(mine, theirs, check_exact=True, obj=f"{name}, cut at {cut}")
        assert done.summary["responses"] == uncut.summary["responses"]


def test_free_arms_are_those_of_a_run(ending: Any, texts: list[str], tmp_path: Path) -> None:
    """Rows of all strengths decode together and end apart; texts and numbers are those of one condition alone."""
    settings: dict[str, Any] = {"max_new_tokens": 8, "out": tmp_path}
    swept = dp.sweep(
        ending, texts, alphas=[0.3, 1.5], layers=1, seeds=[0, 1], controls="sham", tables="all", **settings
    )
    for alpha, seed in ((0.3, 0), (1.5, 1)):
        run = dp.run(ending, texts, perturb=f"alpha={alpha},layers=1,seed={seed}", **settings)
        name = f"relnorm|gaussian|L1|s{seed}|{alpha}"
        mine, theirs = samples(swept, f"{name}|free"), samples(run, "perturbed.free")
        assert mine["text"].tolist() == theirs["text"].tolist()
        assert mine["n_new"].nunique() > 1
        assert same_rows(mine, theirs, 5e-5) > 10
        assert same_rows(samples(swept, name), samples(run, "perturbed.forced"), 5e-5) > 20
        tokens = swept.tokens[swept.tokens["sample_id"].astype(str).str.contains(f"{name}|free|", regex=False)]
        for prompt in mine.index:
            own = tokens[tokens["sample_id"].astype(str).str.startswith(f"{prompt}|")]
            other = run.tokens[run.tokens["sample_id"].astype(str) == f"{prompt}|perturbed.free|0"]
            assert own["token_id"].tolist() == other["token_id"].tolist()
            np.testing.assert_allclose(own["nll"], other["nll"], atol=1e-4)
    assert same_rows(samples(swept, "clean"), samples(run, "clean"), 5e-5) > 10
    table = swept.table("conditions").set_index("condition_id")
    assert (table.loc[table["decode_mode"] == "free", "arm"] == "perturbed").all()
    assert (table["decode_mode"] == "free").sum() == 4


def test_sampled_free_arms_too(llama: Any, texts: list[str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.9, "top_p": 0.95, "seed": 4, "out": tmp_path}
    swept = dp.sweep(llama, texts[:3], alphas=[0.3, 1.5], layers=1, **settings)
    run = dp.run(llama, texts[:3], perturb="alpha=1.5,layers=1,seed=0", **settings)
    mine, theirs = samples(swept, "relnorm|gaussian|L1|s0|1.5|free"), samples(run, "perturbed.free")
    assert mine["text"].tolist() == theirs["text"].tolist()
    assert same_rows(mine, theirs, 5e-5) > 10


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"kind": "rotate"}, "kind=rotate"),
        ({"kind": "dropout"}, "kind=dropout"),
        ({"scale": "mad", "positions": "last"}, "scale=mad,positions=last"),
        ({"scale": "abs", "positions": "-3:"}, "scale=abs,positions=-3:"),
        ({"scale": "interp"}, "scale=interp"),
        ({"scale": "cov"}, "scale=cov"),
        ({"scale": "neftune", "positions": "all"}, "scale=neftune,positions=all"),
        ({"kind": "impulse", "positions": "2"}, "kind=impulse,positions=2"),
        ({"kind": "sine", "period": 4.0}, "kind=sine,period=4"),
        ({"positions": "0"}, "positions=0"),
        ({"padding": "left"}, ""),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_kind_scale_and_place_is_what_a_run_does(
    llama: Any, prompts: Any, tmp_path: Path, settings: dict[str, Any], spec: str
) -> None:
    swept = dp.sweep(llama, prompts, alphas=[0.2, 0.6], layers=1, out=tmp_path, **settings)
    text = f"alpha=0.6,layers=1,{spec}".rstrip(",")
    run = dp.run(llama, prompts, perturb=text, max_new_tokens=0, out=tmp_path / "run")
    name = next(c for c in swept.table("conditions")["condition_id"] if str(c).endswith("|s0|0.6"))
    assert same_rows(samples(swept, str(name)), samples(run, "perturbed.forced")) > 20
    assert [tuple(f["roads"][0]["refusals"]) for f in facts(swept)] == [()]


def facts(run: Any) -> list[dict[str, Any]]:
    """What each unit said about itself."""
    return list(run.manifest.batch_facts.values())


def test_a_write_at_the_first_token_of_short_texts_is_not_left_out(llama: Any, tmp_path: Path) -> None:
    """Nothing before the write is shared that is itself written."""
    rows = [[5, 6, 7], [8, 9, 10]]
    swept = dp.sweep(llama, rows, alphas=[0.8], layers=1, positions="0", out=tmp_path)
    run = dp.run(llama, rows, perturb="alpha=0.8,layers=1,positions=0", max_new_tokens=0, out=tmp_path / "run")
    mine, theirs = samples(swept, "relnorm|gaussian|L1|s0|0.8"), samples(run, "perturbed.forced")
    assert (mine["kl_clean_pert"] > 1e-6).all()
    assert same_rows(mine, theirs) > 20


def test_directions_are_swept(llama: Any, prompts: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.linspace(-1, 1, 32))
    settings: dict[str, Any] = {"direction": tmp_path / "v.npy"}
    swept = dp.sweep(
        llama,
        prompts[:2],
        alphas=[-0.5, 0.5],
        layers=1,
        kind="direction",
        controls="sign",
        out=tmp_path / "s",
        **settings,
    )
    run = dp.run(
        llama,
        prompts[:2],
        perturb="alpha=-0.5,layers=1,kind=direction",
        max_new_tokens=0,
        out=tmp_path / "r",
        **settings,
    )
    mine = samples(swept, "relnorm|direction|L1|s0|-0.5")
    assert same_rows(mine, samples(run, "perturbed.forced")) > 20
    assert "sign-flip" not in set(swept.table("conditions")["arm"])  # both signs were asked for


def test_shared_columns_are_used_where_writes_begin_late(llama: Any, prompts: Any, tmp_path: Path) -> None:
    swept = dp.sweep(llama, prompts[:4], alphas=[0.4], layers="all", positions="last", out=tmp_path)
    assert all(f["roads"][0]["prefix"] > 0 for f in facts(swept)[-1:])
    run = dp.run(llama, prompts[:4], perturb="alpha=0.4,layers=0,positions=last", max_new_tokens=0, out=tmp_path / "r")
    assert same_rows(samples(swept, "relnorm|gaussian|L0|s0|0.4"), samples(run, "perturbed.forced")) > 20
    assert (
        _side(
            SweepConfig(positions="last"),
            prepare(llama, prompts, {"positions": "last"}, kind=SweepConfig, resolve=_writes).perturbs,
        )
        == "left"
    )


def test_a_model_that_does_not_resume_takes_the_slow_road_to_the_same_numbers(
    llama_folder: Path, prompts: Any, tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dp.load(str(llama_folder))
    monkeypatch.setattr(_execute, "all_checks", _unresumable(_execute.all_checks))
    _, uncut = small
    done = dp.sweep(slow, prompts[:3], alphas=[0.1, 0.7], layers="0+1", seeds="0:2", out=tmp_path)
    assert done.manifest.self_tests["resume"]["passed"] is False
    assert all(f["roads"][0]["whole"] > 0 and f["roads"][0]["resumed"] == 0 for f in facts(done))
    name = "relnorm|gaussian|L1|s1|0.7"
    assert same_rows(samples(done, name), samples(uncut, name)) > 20


def _unresumable(checks: Any) -> Any:
    """The self-tests, of a subject whose blocks look back past the state they are given."""

    def run(subject: Any, *args: Any, **kwargs: Any) -> Any:
        from dataclasses import replace

        found = dict(checks(subject, *args, **kwargs))
        subject.resumable = False
        found["resume"] = replace(found["resume"], passed=False)
        return found

    return run


def test_models_whose_padding_matters_get_rows_of_one_length(
    no_positions: Any, texts: list[str], tmp_path: Path
) -> None:
    model = no_positions.model
    for new in (0, 4):
        swept = dp.sweep(no_positions, texts, alphas=[0.4], layers=1, max_new_tokens=new, out=tmp_path)
        run = dp.run(no_positions, texts, perturb="alpha=0.4,layers=1", max_new_tokens=new, out=tmp_path)
        assert swept.manifest.exact_length_batches
        assert same_rows(samples(swept, "relnorm|gaussian|L1|s0|0.4"), samples(run, "perturbed.forced")) > 20
        if new:
            mine = samples(swept, "relnorm|gaussian|L1|s0|0.4|free")
            assert mine["text"].tolist() == samples(run, "perturbed.free")["text"].tolist()
    assert model is no_positions.model


def test_texts_that_end_apart_have_trunks_apart_where_lengths_must_be_exact(
    no_positions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    begin = _trunk.Trunk.__post_init__

    def note(self: Any) -> None:
        seen.append({len(t.fed) for t in self.texts})
        begin(self)

    monkeypatch.setattr(_trunk.Trunk, "__post_init__", note)
    model = no_positions.model
    before = model.generation_config.eos_token_id
    texts = ["Hello there", "Hi you over", "Longer text", "And another"]
    free = dp.run(no_positions, texts, max_new_tokens=8, stop_at_eos=False, out=tmp_path / "free").tokens
    first = free[(free["phase"] == "decode") & free["sample_id"].astype(str).str.contains("clean")]
    model.generation_config.eos_token_id = [int(first["token_id"].iloc[1])]
    seen.clear()
    try:
        swept = dp.sweep(
            no_positions,
            texts,
            alphas=[0.4],
            layers=1,
            max_new_tokens=8,
            padding="none",
            positions="last",
            out=tmp_path,
        )
    finally:
        model.generation_config.eos_token_id = before
    assert swept.samples["n_new"].nunique() > 1
    assert len(seen) > 1
    assert all(len(lengths) == 1 for lengths in seen)


def test_rows_that_do_not_fit_are_halved_and_recorded(
    llama: Any, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Any
) -> None:
    branch = Fork.branch

    def crowded(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        if len(source) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return branch(self, source, *args, **kwargs)

    monkeypatch.setattr(Fork, "branch", crowded)
    done = dp.sweep(llama, prompts[:3], alphas=[0.1, 0.7], layers="0+1", seeds="0:2", out=tmp_path)
    assert facts(done)[0]["halved"] == [15, 7]
    name = "relnorm|gaussian|L1|s1|0.7"
    assert same_rows(samples(done, name), samples(small[1], name)) > 20
    monkeypatch.setattr(Fork, "branch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        dp.sweep(llama, prompts[:3], alphas=[0.2], out=tmp_path)


def test_more_metrics_where_they_are_asked_for(llama: Any, prompts: Any, tmp_path: Path) -> None:
    swept = dp.sweep(llama, prompts[:2], alphas=[0.4], layers=1, metrics=("erank.rv/1",), out=tmp_path)
    run = dp.run(
        llama, prompts[:2], perturb="alpha=0.4,layers=1", metrics=("erank.rv/1",), max_new_tokens=0, out=tmp_path
    )
    mine, theirs = samples(swept, "relnorm|gaussian|L1|s0|0.4"), samples(run, "perturbed.forced")
    (column,) = [c for c in mine if "erank" in c and not c.endswith("_d")]
    np.testing.assert_allclose(mine[column], theirs[column], rtol=1e-5)


def test_the_response_table_averages_seeds_inside_prompts(whole: Any) -> None:
    table = pd.DataFrame(whole.summary["responses"])
    frame = whole.samples.astype({"condition_id": str})
    row = table[
        (table["variant"] == "model") & (table["arm"] == "perturbed") & (table["scale"] == "relnorm")
        & (table["layer"] == 2) & (table["alpha"] == 1.5)
    ]  # fmt: skip
    assert len(row) == 1
    chosen = frame[frame["condition_id"].isin([f"relnorm|gaussian|L2|s{s}|1.5" for s in (0, 3)])]
    chosen = chosen[chosen["status"] == "ok"]
    per_prompt = chosen.groupby("prompt_id", observed=True)["kl_clean_pert"].mean()
    assert row["n"].item() == 4
    assert row["kl_clean_pert"].item() == pytest.approx(per_prompt.mean(), rel=1e-6)
    assert row["kl_clean_pert_low"].item() < row["kl_clean_pert"].item() < row["kl_clean_pert_high"].item()
    for side, end in (("low", min), ("high", max)):
        value = row[f"kl_clean_pert_{side}"].item()
        room = 1e-6 * per_prompt.mean()  # these means are of float32 columns
        assert abs(value - row["kl_clean_pert"].item()) <= abs(end(per_prompt) - per_prompt.mean()) + room
    energies = table[table["arm"] == "energy-matched"]
    assert len(energies) == 2 * 2 * 3  # scale × layer × α: energies of two scales are not one
    assert set(energies["matched"]) == {f"{s}|gaussian|L{n}" for s in ("relnorm", "coordstd") for n in (0, 2)}
    assert sorted(set(energies["alpha"])) == sorted(ALPHAS)


def test_intervals_of_responses_with_gaps_are_those_of_the_prompts_that_have_one() -> None:
    from dynprobe.metrics.statistics._bootstrap import expanded_level
    from dynprobe.protocols._responses import _interval

    values = np.array([1.0, 2.0, 3.0, 10.0, np.nan])
    with_gap, without = _interval("x", values), _interval("x", values[:4])
    assert with_gap == without
    draws = np.random.default_rng(1).choice(values[:4], (200_000, 4)).mean(1)
    low, high = np.quantile(draws, [expanded_level(0.95, 4), 1 - expanded_level(0.95, 4)])
    assert with_gap["x_low"] == pytest.approx(low, abs=0.3)
    assert with_gap["x_high"] == pytest.approx(high, abs=0.3)
    assert np.isnan(_interval("x", np.full(3, np.nan))["x"])
    assert np.isnan(_interval("x", values[:2])["x_low"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"controls": "shan"}, UsageError, "unknown control 'shan'; known: sham, sign"),
        ({"alphas": "0.1:x"}, UsageError, "write strengths as 0.1,0.3,1 or as low:high:number"),
        ({"alphas": "1:0.1:4"}, UsageError, "falls from 1 to 0.1; write low:high:number, the smaller strength first"),
        ({"alphas": "1:-1:4"}, UsageError, "write strengths as"),
        ({"alphas": []}, UsageError, "give at least one finite strength"),
        ({"alphas": [0.1, float("nan")]}, UsageError, "give at least one finite strength"),
        ({"alphas": [0.1, 0.1]}, UsageError, "a strength stands there twice"),
        ({"perturb": "alpha=0.1"}, UsageError, "not --perturb"),
        ({"scale": "isokl"}, UsageError, "isokl solves for a strength and is not swept"),
        ({"scale": "relnrom"}, UsageError, "Did you mean 'relnorm'"),
        ({"scale": "relnorm,relnorm"}, UsageError, "stands there twice"),
        ({"seeds": [1, 1]}, UsageError, "stands there twice"),
        ({"seeds": "3:3"}, UsageError, "give at least one"),
        ({"seeds": "a"}, UsageError, "seeds"),
        ({"layers": 9}, SiteError, "9"),
        ({"component": "mlp"}, UsageError, "mlp"),
        ({"kind": "direction"}, UsageError, "direction"),
        ({"kind": "dropout", "alphas": [1.5]}, UsageError, "dropout"),
        ({"kind": "sine", "period": 8, "controls": "energy"}, UsageError, "energy of kind=sine"),
        ({"num_samples": 2}, UsageError, "takes no --num-samples"),
        ({"lens": True}, UsageError, "takes no"),
        ({"tables": "some"}, UsageError, "tables='some'"),
        ({"alpha": 0.1}, UsageError, "unknown setting 'alpha'. Did you mean 'alphas'"),
        ({"scale": "coordstd"}, UsageError, "has no tokenizer"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_a_folder_is_made(
    settings: dict[str, Any], error: type[DynprobeError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        dp.sweep(tiny_llama(), [[5, 6, 7], [8, 9]], **{"alphas": [0.1]} | settings, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_prompt_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(PromptError):
        dp.sweep(tiny_llama(), [], out=tmp_path)


def test_strengths_are_read() -> None:
    assert parse_strengths("0.01:1:3") == (0.01, 0.1, 1.0)
    assert parse_strengths("0.1, 0.3") == (0.1, 0.3)
    assert parse_strengths(0.5) == (0.5,)
    assert parse_strengths(np.array([1, 2])) == (1.0, 2.0)


def test_a_twin_cannot_be_made_of_what_has_no_configuration() -> None:
    from dynprobe.errors import ModelError

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(20, 8)
            self.stack = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
            self.head = torch.nn.Linear(8, 20)

        def forward(self, tokens: Any) -> Any:
            h = self.embed(tokens)
            for block in self.stack:
                h = h + torch.tanh(block(h))
            return self.head(h)

    with pytest.raises(ModelError, match="no configuration to build a random twin from"):
        twin_of(discover(Bare(), layers="stack.*"))


def test_a_twins_texts_end_at_the_same_tokens(ending: Any) -> None:
    config: Any = ending.model.generation_config
    twin: Any = twin_of(ending).model
    assert twin.generation_config.eos_token_id == config.eos_token_id
    assert twin.generation_config is not config


def test_the_matched_write_keeps_what_it_can() -> None:
    matched = energy_matched(dp.Perturb(0.3, layers=1, kind="rotate", seed=5, positions="last"), 2)
    assert str(matched) == "alpha=1,scale=relnorm,layers=2,positions=last,kind=gaussian,seed=5"
