"""``dynprobe sweep`` and ``threshold``: help, numbers on the screen and as JSON, settings from a file, refusals."""

import json
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.cli import _render_grid
from dynprobe.protocols import _execute, _sweep, _threshold
from dynprobe.protocols._criteria import CRITERIA

TEXTS = ("--prompt", "Hello there", "--prompt", "And so on", "--prompt", "Third thing")
SWEEP = (*TEXTS, "--alphas", "0.1,0.5", "--layers", "0+1", "--out", "runs")
SEARCH = (*TEXTS, "--scale", "relnorm", "--layers", 1, "--level", 0.05, "--out", "runs")


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Pictures are drawn from the tables and tested with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_execute, "_pictures", lambda *_: None)
        yield


def one_run(folder):
    (path,) = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return dp.open(path)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("sweep", ("--alphas", "--layers", "--scale", "--kind", "--seeds", "--positions", "--controls", "--tables")),
        ("threshold", ("--criterion", "--level", "--alphas", "--alpha-min", "--each-position", "--tolerance",
                       "--max-evaluations", "--n-boot", "--confidence", "--estimand", "--placement")),
    ],
)  # fmt: skip
def test_help_names_every_flag_and_shows_how(cli, command, flags):
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    for flag in (*flags, "--model", "--prompts", "--limit", "--batch-size", "--dtype", "--config", "--json", "--quiet"):
        assert f"{flag} " in done.out, flag
    assert f"dynprobe {command} --model smollm2-135m" in done.out
    assert command in cli("--help").out


def test_a_sweep_prints_its_responses(cli, model, here):
    done = cli("sweep", "--model", model, *SWEEP, "--controls", "sham,sign,twin")
    assert (done.code, done.err) == (0, "")
    run = one_run(here / "runs")
    for part in (
        "tiny-llama, float32", "sweep   α 0.1, 0.5 × layers 0, 1, resid_post, positions 1:; gaussian, seed 0; controls",
        "relnorm: α is the size of the write", "prompts 3 given in the call, chat template none, prefill only",
        "KL/nats", "Δκ (paired)", "sham rows (α = 0)", "control sign-flip: every write with −α", "control twin",
        "self-tests: null ok (0)", f"again: dynprobe show {run.path.relative_to(here)}", "with --plot",
        "KL perturbed", "flips perturbed", "Δκ perturbed", "expanded percentile bootstrap interval over prompts",
    ):  # fmt: skip
        assert part in done.out, part
    assert "Traceback" not in done.out
    table = {
        (r["layer"], r["alpha"]): r
        for r in run.summary["responses"]
        if (r["arm"], r["variant"]) == ("perturbed", "model")
    }
    assert set(table) == {(layer, alpha) for layer in (0, 1) for alpha in (0.1, 0.5)}
    for row in table.values():
        assert f"{row['kl_clean_pert']:.3g} [{row['kl_clean_pert_low']:.3g}" in done.out
        assert row["n"] == 3
    again = cli("sweep", "--model", model, *SWEEP, "--controls", "sign+twin+sham")
    assert (again.code, again.out) == (0, done.out)
    assert cli("show", run.path.relative_to(here)).out == done.out
    listed = cli("ls", "runs").out
    assert "2 α × 2 layers × relnorm; controls" in " ".join(listed.split())
    assert run.samples["condition_id"].nunique() == 1 + 2 * (1 + 2 + 2) + 1 + 2 * (1 + 2)


def test_a_sweep_as_json_is_one_object(cli, model, here):
    done = cli("sweep", "--model", model, *SWEEP, "--json", "--scale", "relnorm", "--scale", "mad", "--seeds", "0:2")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    run = one_run(here / "runs")
    assert (found["run"], found["status"]) == (str(run.path.relative_to(here)), "complete")
    assert found["summary"]["protocol"] == "sweep"
    assert {r["scale"] for r in found["summary"]["responses"]} == {"relnorm", "mad"}
    assert run.manifest.config["seeds"] == [0, 1]


def test_a_threshold_prints_unit_criterion_and_remarks(cli, model, here):
    done = cli("threshold", "--model", model, *SEARCH)
    assert (done.code, done.err) == (0, "")
    run = one_run(here / "runs")
    fit = run.table("fits").iloc[0]
    for part in (
        "asked   kl ≥ 0.05 nats, search over α 0.01 … 10",
        "writes  layer 1, resid_post, positions 1:; gaussian, seed 0", "prompts 3 given in the call",
        "thresholds", "kl ≥ 0.05", "relnorm", f"{fit['alpha50']:.4g}", "prompts<6",
        "perturbed rows per prompt", f"{run.summary['sham_rows']} sham rows (α = 0; a few texts of each batch",
        "self-tests: null ok (0)", str(run.path.relative_to(here)),
    ):  # fmt: skip
        assert part in done.out, part
    assert run.summary["rows_per_prompt"] <= 7
    assert cli("show", run.path.relative_to(here)).out == done.out
    facts = run.columns()
    facts = facts[facts["table"].isin(["trials", "fits"])]
    assert set(facts[facts["description"] == ""]["column"]) == set()
    assert facts.set_index(["table", "column"]).loc[("trials", "flip_rate"), "unit"] == "fraction"


def test_a_threshold_as_json_with_several_criteria_on_a_grid(cli, model, here):
    done = cli(
        "threshold", "--model", model, *TEXTS, "--layers", 1, "--criterion", "kl", "--criterion", "flip", "--alphas",
        "0.01:10:9", "--n-boot", 200, "--scale", "relnorm,coordstd", "--out", "runs", "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    fits = json.loads(done.out)["summary"]["fits"]
    assert {(f["criterion"], f["scale"]) for f in fits} == {
        (c, s) for c in ("kl", "flip") for s in ("relnorm", "coordstd")
    }
    assert "threshold.isotonic/1" in {f["estimator"] for f in fits}
    shown = cli(
        "threshold", "--model", model, *TEXTS, "--layers", 1, "--criterion", "flip,kl", "--alphas", "0.01:10:9",
        "--n-boot", 200, "--scale", "coordstd+relnorm", "--out", "runs",
    )  # fmt: skip
    assert shown.code == 0
    assert len(list((here / "runs").glob("2*"))) == 1  # the order of a list is no other search
    for part in ("flip ≥ 0.5 share of flips", "kl ≥ 1 nats", "threshold.isotonic/1"):
        assert part in shown.out, part


def test_what_lies_outside_the_range_is_said(cli, model, here):
    done = cli("threshold", "--model", model, *TEXTS, "--scale", "relnorm", "--level", 50, "--out", "runs")
    assert done.code == 0
    assert "above range" in done.out
    done = cli("threshold", "--model", model, *SEARCH, "--alpha-min", 5, "--alpha-max", 9)
    assert done.code == 0
    assert "below range" in done.out


def test_a_fragility_map_also_of_texts_of_one_token(cli, model, here):
    done = cli(
        "threshold", "--model", model, "--prompt", "Abc", "--prompt", "x", "--scale", "relnorm", "--level", 0.01,
        "--each-position", "--batch-size", 1, "--out", "runs", "--layers", "0+1",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    fits = one_run(here / "runs").table("fits")
    assert sorted(zip(fits["layer"], fits["pos"], strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for place in ("0:1", "1:2", "layer:position"):
        assert place in done.out
    assert "interval over prompts" not in done.out
    if "resolved" in set(fits["status"]):
        assert "the bracket of the search around this one text" in done.out
    nothing = cli("threshold", "--model", model, "--prompt", "x", "--scale", "relnorm", "--each-position", "--out", "b")
    assert nothing.code == 2
    assert "no position" in nothing.err
    assert not (here / "b").exists()


def test_texts_that_nothing_can_happen_to_have_no_threshold(cli, model, here):
    done = cli("threshold", "--model", model, "--prompt", "x", "--prompt", "y", "--scale", "relnorm", "--out", "runs")
    assert (done.code, done.err) == (0, "")
    assert "missing" in done.out
    assert one_run(here / "runs").table("fits")["alpha50"].isna().all()


def test_accuracy_needs_items_with_answers(cli, model, here):
    (here / "items.jsonl").write_text(
        '{"text": "Two and two is", "answer": " four"}\n{"text": "Up and", "answer": " down"}\n'
    )
    base = (
        "threshold",
        "--model",
        model,
        "--scale",
        "relnorm",
        "--criterion",
        "task",
        "--out",
        "runs",
        "--n-boot",
        200,
    )
    done = cli(*base, "--prompts", "items.jsonl", "--alphas", "0.1,1,10")
    assert (done.code, done.err) == (0, "")
    assert "task ≥ 0.2 accuracy loss" in done.out
    none = cli(*base, *TEXTS, "--alphas", "0.1,1")
    assert none.code == 2
    assert "3 have none" in none.err
    assert '"answer": " Paris"' in none.err


def test_a_config_file_is_read_and_near_misses_are_named(cli, model, here):
    prompts = "prompt: [Hello, World]\n"
    (here / "s.yaml").write_text(f"model: {model}\n{prompts}alphas: '0.1,0.2,0.4'\nlayers: 0+1\nout: elsewhere\n")
    done = cli("sweep", "--config", "s.yaml", "--layers", 1, "--json")
    assert done.code == 0
    run = one_run(here / "elsewhere")
    assert run.manifest.config["layers"] == "1"
    assert set(run.table("conditions")["layer"].dropna()) == {1}
    (here / "list.yaml").write_text(f"model: {model}\n{prompts}alphas: [0.1, 0.2, 0.4]\nlayers: [1]\nscale: relnorm\n")
    same = json.loads(cli("sweep", "--config", "list.yaml", "--out", "elsewhere", "--json").out)
    assert same["run"] == str(run.path.relative_to(here))
    for command, text, message in (
        ("sweep", "alfas: [0.1]", "unknown setting 'alfas'. Did you mean 'alphas'?"),
        ("threshold", "criterium: kl", "unknown setting 'criterium'. Did you mean 'criterion'?"),
        ("sweep", "criterion: kl", "unknown setting 'criterion'."),
        ("threshold", f"model: {model}\nn_boot: few", "n_boot='few'"),
        ("sweep", f"model: {model}\ntables: none", "tables='none'"),
    ):
        (here / "bad.yaml").write_text(text)
        found = cli(command, "--config", "bad.yaml")
        assert found.code == 2, text
        assert message in found.err
        assert found.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sweep", "--controls", "twins"), "unknown control 'twins'; known: sham, sign"),
        (("sweep", "--alphas", "0.1:0.01:4"), "low:high:number"),
        (("sweep", "--layers", 9), "9"),
        (("sweep", "--scale", "isokl"), "is not swept"),
        (("sweep", "--kind", "direction"), "direction"),
        (("sweep", "--kind", "sine"), "--kind sine needs its period in tokens; add --period 8"),
        (("sweep", "--alpha", 0.1), "--alpha"),
        (("threshold", "--criterion", "kll"), "Did you mean 'kl'"),
        (("threshold", "--estimand", "mean"), "add --alphas"),
        (("threshold", "--alphas", "-0.1,0.1"), "is negative"),
        (("threshold", "--criterion", "kl,flip", "--level", 1), "--level belongs to one criterion"),
        (("threshold", "--perturb", "alpha=0.1"), "--perturb"),
    ],
)
def test_refusals_say_what_to_type_and_leave_nothing_behind(cli, model, here, words, message):
    command, *rest = words
    done = cli(command, "--model", model, *TEXTS, "--out", "runs", *rest)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("command", "room", "words"), [("sweep", _sweep._Sweep, SWEEP), ("threshold", _threshold._Threshold, SEARCH)]
)
def test_an_interrupted_grid_exits_130_and_the_same_command_continues(
    cli, model, here, monkeypatch, command, room, words
):
    work = room.work
    done = []

    def stop(self, unit, early):
        if done:
            raise KeyboardInterrupt
        done.append(unit)
        return work(self, unit, early)

    monkeypatch.setattr(room, "work", stop)
    stopped = cli(command, "--model", model, *words, "--batch-size", 1)
    assert stopped.code == 130
    assert "the same command continues" in stopped.err
    monkeypatch.setattr(room, "work", work)
    again = cli(command, "--model", model, *words, "--batch-size", 1)
    assert again.code == 0
    assert one_run(here / "runs").status == "complete"


def test_controls_and_free_texts_are_printed_beside_the_perturbed_arm(cli, model, here):
    words = (*TEXTS, "--alphas", "0.1:10:16", "--layers", "all", "--out", "runs", "--max-new-tokens", 3)
    done = cli("sweep", "--model", model, *words, "--controls", "sham,sign,energy,scrambled")
    assert (done.code, done.err) == (0, "")
    run = one_run(here / "runs")
    table = pd.DataFrame(run.summary["responses"])
    lines = done.out.splitlines()
    for name in ("sign-flip", "energy-matched", "scrambled"):
        begin = next(i for i, line in enumerate(lines) if f"control {name}" in line)
        end = next(i for i, line in enumerate(lines[begin:]) if line.startswith("└")) + begin
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[begin:end] if line.startswith("│")]
        assert 3 <= len(rows) <= 12
        for scale, layer, alpha, kl, beside, *_ in rows:
            assert scale == "relnorm"
            at = int(layer.split(" for ")[-1])
            forced = table[
                (table["decode_mode"] == "forced") & np.isclose(table["alpha"].abs(), abs(float(alpha)), rtol=1e-3)
            ]
            write = forced[(forced["arm"] == "perturbed") & (forced["variant"] == "model") & (forced["layer"] == at)]
            assert beside == f"{write['kl_clean_pert'].item():.3g}"
            if name == "energy-matched":
                own = forced[(forced["arm"] == name) & (forced["matched"] == f"relnorm|gaussian|L{at}")]
                assert layer == f"{own['layer'].item():g} for {at}"
            elif name == "sign-flip":
                own = forced[(forced["arm"] == name) & (forced["layer"] == at)]
                assert float(alpha) < 0
            else:
                own = forced[(forced["variant"] == name) & (forced["arm"] == "perturbed") & (forced["layer"] == at)]
            assert kl.startswith(f"{own['kl_clean_pert'].item():.3g}")
    assert "12 of 48 lines; all of them: summary.json" in done.out
    begin = next(i for i, line in enumerate(lines) if "texts written under the perturbation" in line)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in lines[begin:] if line.startswith("│")]
    assert rows[-1][0] == "clean"
    assert len(rows) - 1 <= 12
    samples = run.samples.merge(run.conditions.drop(columns="alpha"), on="condition_id")
    samples = samples[samples["variant"] == "model"]
    clean = samples[samples["arm"] == "clean"].set_index("prompt_id")["text"]
    for _, layer, alpha, _, same, new, _ in rows[:-1]:
        own = samples[
            (samples["decode_mode"] == "free") & (samples["layer"] == int(layer))
            & np.isclose(samples["alpha"], float(alpha), rtol=1e-3)
        ]  # fmt: skip
        equal = [text == clean[prompt] for prompt, text in zip(own["prompt_id"], own["text"], strict=True)]
        assert same == f"{np.mean(equal):.0%}"
        assert new == f"{own['n_new'].mean():.1f}"


def test_what_is_printed_of_a_grid_and_of_quest(cli, model, here):
    words = ("threshold", "--model", model, *TEXTS, "--layers", 1, "--scale", "relnorm", "--level", 0.05)
    grid = cli(*words, "--alphas", "0.01:10:9", "--n-boot", 200, "--out", "a")
    assert grid.code == 0
    assert "asked   kl ≥ 0.05 nats, on the grid 9 α 0.01 … 10" in grid.out
    assert "9.0 perturbed rows per prompt and threshold; 3 sham rows (α = 0; one per prompt)" in grid.out
    quest = cli(*words, "--placement", "quest", "--trials", 24, "--out", "b")
    assert quest.code == 0
    run = one_run(here / "b")
    asked = int((run.table("trials")["alpha"] > 0).sum())
    assert f"{asked} perturbed rows, placed by one posterior over prompts; 3 sham rows" in quest.out


def test_a_grid_that_stopped_says_so_and_is_no_result(cli, model, here):
    assert cli("sweep", "--model", model, *SWEEP).code == 0
    run = one_run(here / "runs")
    manifest = json.loads((run.path / "manifest.json").read_text())
    done = cli("show", run.path).out
    assert "continues it" not in done
    (run.path / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted", "seal": None}))
    half = cli("show", run.path).out
    assert "status interrupted: 2 of 2 batches finished; the command that made it continues it" in half
    assert "sweep   α 0.1, 0.5 × layers 0, 1" in half
    assert "KL/nats" not in half


def test_the_help_names_the_ranges_of_the_criteria(cli):
    text = " ".join(cli("threshold", "--help").out.split())
    kl, kappa = CRITERIA["kl"].range, CRITERIA["kappa"].range
    assert f"Default {kl[0]:g} (kappa 1e-5)" in text
    assert kappa[0] == 1e-5
    assert f"Default {kl[1]:g} (kappa {kappa[1]:g};" in text
    assert {c.range for c in CRITERIA.values() if c.name != "kappa"} == {kl}


def test_uncertain_brackets_are_remarked():
    fit = {"n_left": 0, "n_right": 2, "n_nonmonotone": float("nan"), "n_uncertain": 3, "reason": None}
    assert _render_grid._remarks(fit) == "2 above range, 3 uncertain"
    del fit["n_uncertain"]
    assert _render_grid._remarks(fit) == "2 above range"


@pytest.mark.parametrize(
    ("status", "low", "high", "said"),
    [
        ("left-censored", -np.inf, 0.5, "< 0.5"), ("right-censored", 3.0, np.inf, "> 3"),
        ("right-censored", np.nan, np.inf, "above range"), ("missing", np.nan, np.nan, "missing"),
    ],
)  # fmt: skip
def test_of_a_censored_threshold_the_known_side_is_said(status, low, high, said):
    assert _render_grid._value({"status": status, "low": low, "high": high, "alpha50": np.nan}) == said
