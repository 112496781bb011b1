"""Panels: the design as a file, cells that are ordinary runs, continuing, failing models, the tables."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.errors import InterruptedRunError, PromptError, RunFolderError, UsageError
from dynprobe.metrics.statistics import variance_table
from dynprobe.protocols import PanelConfig, _panel_standing, _panel_work, plan_panel, read_panel
from dynprobe.protocols._panel_cells import cells_of
from dynprobe.runs import open_panel

LLAMA = ["panel/llama-depth2-width32-seed0", "panel/llama-depth2-width32-seed1"]
SMALL = {
    "models": LLAMA, "categories": ["factual", "narrative"], "prompts_per_category": 2, "seeds": [0, 1],
    "alphas": [0, 0.2], "perturb": "layers=50%", "max_new_tokens": 3, "decompose": ["nll", "kl_clean_pert"],
    "n_boot": 50, "n_permutations": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A panel of two models, and where it lies."""
    out = tmp_path_factory.mktemp("panel")
    return dp.panel(**SMALL, out=str(out))


def write(folder: Path, text: str) -> Path:
    file = folder / "panel.yaml"
    file.write_text(text)
    return file


# --- the design


def test_seeds_without_anything_drawn_are_left_out():
    config = PanelConfig.build({**SMALL, "temperatures": [0, 1.0]})
    cells, copies = cells_of(config)
    # per model: T = 0, α = 0 once; T = 0, α = 0.2 twice; T = 1 four times
    assert len(cells) == 2 * (1 + 2 + 4)
    assert copies == 2
    assert len({c.key for c in cells}) == len(cells)
    assert [c.model for c in cells] == sorted(c.model for c in cells)


def test_patterns_stand_for_the_shipped_models():
    config = PanelConfig.build({"models": ["panel/*", "tiny-llama"]})
    assert len(config.models) == 19
    assert len(PanelConfig.build({"models": {"model": "panel/cem-*", "family": "cem"}}).models) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [tiny-llama]\nseedss: 3\n", r"line 2: unknown key 'seedss'\. Did you mean 'seeds'\?"),
        ("models:\n  - panel/llama-*\n  - {model: tiny-cem, famly: x}\n", r"line 3: models.famly: unknown.*'family'"),
        ("models:\n  - panel/llma-*\n", r"line 2: models: no shipped model fits panel/llma-\*"),
        ("seeds: [0]\n", r"models is missing; type models: \[tiny-llama"),
        ("models: [tiny-llama]\nseeds: [0, two]\n", r"line 2: seeds.1: expected a whole number.*found 'two'"),
        ("models: [tiny-llama]\nseeds: [0, 0]\n", r"line 2: seeds: one of them stands there twice"),
        ("models: [tiny-llama]\nalphas: [0, 0.1]\n", r"line 2: alphas above 0 need perturb, such as"),
        ("models: [tiny-llama]\nalphas: 0.1\nperturb: alpha=1\n", r"line 3: perturb is written without alpha"),
        ("models: [tiny-llama]\nalphas: 0.1\nperturb: seed=1\n", r"line 3: perturb is written without seed"),
        ("models: [tiny-llama]\nperturb: layers=1\n", r"line 2: perturb has no strength"),
        ("models: [tiny-llama]\ncovariates: [depht]\n", r"line 2: covariates: depht is none .*Did you mean 'depth'"),
        ("models: [tiny-llama]\ndecompose: [nll, nlll]\n", r"line 2: decompose: nlll is no column.*mean 'nll'\?"),
        ("models: [tiny-llama]\ndecompose: kappa.phase/1\n", r"line 2: decompose: .*its column is kappa_phase"),
        ("models: [tiny-llama]\ndecompose: delta_last\n", r"line 2: decompose: delta_last is no column"),
        ("models: [tiny-llama]\ndecompose: qqqq\n", r"line 2: decompose: qqqq .*see dynprobe metrics$"),
        ("models: [tiny-llama]\nsettings: {seed: 3}\n", r"line 2: settings: seed is part of the design"),
        ("models: [tiny-llama]\nsettings: {dtpye: float32}\n", r"settings of the panel: unknown .*'dtype'"),
        ("models: [tiny-llama, tiny-llama]\n", r"line 1: models: tiny-llama stands there twice; give"),
        ("models: [tiny-llama]\nprotocol: iterate\ntemperatures: [1]\n", r"line 3: temperatures: protocol: iterate"),
        ("models: [tiny-llama]\niterations: [1]\n", r"line 2: iterations belong to protocol: iterate"),
        ("- tiny-llama\n", r"holds list; it must be a mapping with a key models"),
        ("models: [", r"is not YAML"),
        ("", r"is empty; it must be a mapping with a key models"),
        ("models: []\n", r"line 1: models is an empty list; name one at least"),
        ("models: [tiny-llama]\nseeds: []\n", r"line 2: seeds is an empty list; name one at least"),
        ("models: [tiny-llama]\nmodels: [tiny-cem]\n", r"line 2: models stands there twice \(line 1 too\)"),
        ("models:\n- {model: tiny-llama, label: a,\n   label: b}\n", r"line 3: label stands there twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_design_is_said_with_its_line(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        dp.panel(write(tmp_path, text), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_columns_of_other_metrics_can_be_decomposed():
    config = PanelConfig.build({"models": "tiny-csm", "decompose": ["erank", "kappa_path_d", "n_new", "ppl"]})
    assert config.decompose[0] == "erank"
    looped = {"models": "tiny-csm", "protocol": "iterate", "iterations": [1, 2]}
    assert PanelConfig.build({**looped, "decompose": ["delta_last", "converge_iterations_time"]})


def test_a_design_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        dp.panel(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"folder without panel\.json"):
        dp.panel(tmp_path)
    with pytest.raises(UsageError, match="a panel needs a YAML file"):
        dp.panel()
    with pytest.raises(PromptError, match="no prompt of category 'fcatual'"):
        dp.panel(models="tiny-llama", categories="fcatual", out=str(tmp_path))


def test_prompts_are_looked_for_beside_the_file(tmp_path):
    (tmp_path / "own.txt").write_text("one two\nthree four\n")
    config = read_panel(write(tmp_path, "models: tiny-llama\nprompts: own.txt\nseeds: 3\n"))
    assert config.prompts == str(tmp_path / "own.txt")
    assert config.seeds == (3,)


# --- what a panel is


def test_every_cell_is_the_run_that_its_name_says(made, tmp_path):
    assert made.status == "complete"
    assert len(made.cells) == 6
    cell = made.manifest["cells"][1]
    assert (cell["alpha"], cell["seed"]) == (0.2, 0)
    run = made.run(cell["key"])
    again = dp.run(
        LLAMA[0], _panel_work.prompts_of(PanelConfig.build(SMALL)), perturb="alpha=0.2,layers=50%", seed=0,
        max_new_tokens=3, out=tmp_path,
    )  # fmt: skip
    assert again.manifest.id8 == run.manifest.id8 == cell["id8"]
    ours = run.samples.set_index(["prompt_id", "condition_id"])["nll"].astype(float).sort_index()
    theirs = again.samples.set_index(["prompt_id", "condition_id"])["nll"].astype(float).sort_index()
    assert np.array_equal(ours.to_numpy(), theirs.to_numpy(), equal_nan=True)
    assert hashlib.sha256((run.path / "manifest.json").read_bytes()).hexdigest() == cell["manifest_sha256"]


def test_observations_hold_every_condition_once(made):
    observed = made.table("observations")
    count = observed.groupby(["condition", "alpha", "seed"], observed=True).size().to_dict()
    assert count == {
        ("clean", 0.0, 0): 8, ("perturbed.forced", 0.2, 0): 8, ("perturbed.forced", 0.2, 1): 8,
        ("perturbed.free", 0.2, 0): 8, ("perturbed.free", 0.2, 1): 8,
    }  # fmt: skip
    one = observed[(observed["condition"] == "perturbed.forced") & (observed["seed"] == 1)]
    run = made.run(f"{LLAMA[1]}|seed=1|temperature=0|max_new_tokens=3|alpha=0.2")
    samples = run.samples[run.samples["condition_id"] == "perturbed.forced"].astype({"prompt_id": object})
    own = one[one["model"] == LLAMA[1]].set_index("prompt_id")["kl_clean_pert"]
    assert own.to_dict() == pytest.approx(samples.set_index("prompt_id")["kl_clean_pert"].astype(float).to_dict())


def test_the_variance_table_is_that_of_the_runs(made):
    table = made.table("variance")
    part = table[(table["condition"] == "perturbed.forced") & (table["metric"] == "kl_clean_pert")].set_index("term")
    frames = []
    for run, cell in zip(made.runs, made.manifest["cells"], strict=True):
        rows = run.samples[run.samples["condition_id"] == "perturbed.forced"]
        if not len(rows):
            continue
        frames.append(rows[["prompt_id", "category", "kl_clean_pert"]].astype({"prompt_id": object, "category": object})
                      .assign(model=cell["model"]))  # fmt: skip
    rows = pd.concat(frames)
    found = variance_table(rows["kl_clean_pert"], list(rows["model"]), list(rows["category"]), list(rows["prompt_id"]))
    assert part["eta2"].to_dict() == pytest.approx({r.term: r.eta2 for r in found.rows}, rel=1e-9)
    assert part["n"].iloc[0] == 16
    assert part.loc["seed", "df"] == 8
    clean = table[(table["condition"] == "clean") & (table["metric"] == "nll")].set_index("term")
    assert clean.loc["seed", "reason"] == "df<1"
    assert clean.loc["model:prompt", "includes"] == "seed"


def test_models_are_known_by_their_skeleton(made):
    models = made.table("models").set_index("model")
    row = models.loc[LLAMA[0]]
    assert (row["family"], row["depth"], row["width"], row["heads"]) == ("llama", 2, 32, 4)
    assert (row["norm"], row["positions"]) == ("rms", "rope")
    assert row["log10_parameters"] == pytest.approx(np.log10(40288))
    skeleton = made.table("skeleton")
    assert set(skeleton["reason"]) == {"p<1"}  # two models of one skeleton
    assert any("too few models per family (2 llama" in w for w in made.summary["warnings"])


def test_skeletons_of_other_architectures():
    from dynprobe.protocols._model_skeleton import skeleton_of

    cem, csm = (skeleton_of(dp.load(f"panel/{f}-depth2-width32-seed0")) for f in ("cem", "csm"))
    assert (cem["norm"], cem["positions"], cem["heads"]) == ("rms", "alibi", 4)
    assert (csm["norm"], csm["positions"], csm["heads"], csm["depth"]) == ("rms", "recurrent", None, 8)


def test_the_folder_opens_again(made):
    again = open_panel(made.path)
    assert "2 models, 6 cells: 6 done" in repr(again)
    assert again.table("variance").equals(made.table("variance"))
    assert len(again.runs) == 6
    with pytest.raises(RunFolderError, match=r"no table 'varaince'\. Did you mean 'variance'"):
        again.table("varaince")
    with pytest.raises(RunFolderError, match="no cell 'x'"):
        again.run("x")
    with pytest.raises(RunFolderError, match=r"is a panel of many runs; open it with dynprobe\.runs\.open_panel"):
        dp.open(made.path)
    with pytest.raises(RunFolderError, match=r"is no panel folder"):
        open_panel(made.path / "runs")


def test_damaged_and_newer_panels_are_refused(made, tmp_path):
    (tmp_path / "panel.json").write_text("{")
    with pytest.raises(RunFolderError, match="is damaged"):
        open_panel(tmp_path)
    (tmp_path / "panel.json").write_text(json.dumps({**made.manifest, "schema_version": "2.0"}))
    with pytest.raises(RunFolderError, match=r"has the panel schema 2\.0"):
        open_panel(tmp_path)
    (tmp_path / "panel.json").write_text(json.dumps({k: v for k, v in made.manifest.items() if k != "cells"}))
    with pytest.raises(RunFolderError, match="it has no 'cells'"):
        open_panel(tmp_path)


# --- continuing


def test_a_second_call_loads_nothing_and_runs_nothing(made, monkeypatch):
    monkeypatch.setattr(_panel_work, "load_subject", lambda *a, **k: pytest.fail("a model was loaded"))
    before = (made.path / "panel.json").read_bytes()
    again = dp.panel(**SMALL, out=str(made.path.parent))
    assert again.path == made.path
    assert (made.path / "panel.json").read_bytes() == before
    assert dp.panel(made.path).path == made.path


def test_an_interrupted_panel_goes_on_where_it_stopped(tmp_path, monkeypatch):
    run, loaded, calls = _panel_work.run, [], []

    def stopping(*given, **settings):
        calls.append(settings["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*given, **settings)

    monkeypatch.setattr(_panel_work, "run", stopping)
    with pytest.raises(InterruptedRunError, match="the same command continues"):
        dp.panel(**SMALL, out=str(tmp_path))
    found = open_panel(next(tmp_path.glob("*_panel_*")))
    assert found.status == "interrupted"
    assert list(found.cells["state"]) == ["done"] * 2 + ["planned"] * 4
    load = _panel_work.load_subject
    monkeypatch.setattr(_panel_work, "load_subject", lambda name, **k: loaded.append(name) or load(name, **k))
    done = dp.panel(**SMALL, out=str(tmp_path))
    assert done.path == found.path
    assert done.status == "complete"
    assert loaded == LLAMA  # each once
    assert len(calls) == 3 + 4


def test_a_lost_run_is_made_again_and_an_edited_one_is_noticed(made, tmp_path):
    import shutil

    copy = tmp_path / made.path.name
    shutil.copytree(made.path, copy)
    lost, edited = made.manifest["cells"][0], made.manifest["cells"][4]
    shutil.rmtree(copy / lost["run"])
    manifest = copy / edited["run"] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"complete" '))
    done = dp.panel(copy)
    assert done.status == "complete"
    assert done.run(lost["key"]).manifest.id8 == lost["id8"]
    assert done.table("variance").equals(made.table("variance"))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_lost_or_cut_part_is_made_again(made, tmp_path, damage, monkeypatch):
    import shutil

    copy = tmp_path / made.path.name
    shutil.copytree(made.path, copy)
    hurt = made.manifest["cells"][1]
    part = next((copy / hurt["run"] / "samples").glob("*.parquet"))
    whole = part.read_bytes()
    part.unlink() if damage == "missing" else part.write_bytes(whole[:200])
    ran, told, run = [], [], _panel_work.run
    monkeypatch.setattr(_panel_work, "run", lambda *a, **k: ran.append(k["seed"]) or run(*a, **k))
    done = dp.panel(copy, listener=lambda p: told.extend(p.notes))
    assert ran == [hurt["seed"]]  # the other five stand
    assert any(part.name in note for note in told)
    assert done.status == "complete"
    assert done.run(hurt["key"]).manifest.status == "complete"
    assert len(done.run(hurt["key"]).samples) == len(made.run(hurt["key"]).samples)
    assert done.table("variance").equals(made.table("variance"))
    assert (copy / hurt["run"] / "damaged").is_dir()  # what was taken out is kept


@pytest.mark.parametrize("damage", ["older", "lost", "emptied"])
def test_a_run_that_cannot_be_mended_is_made_afresh(made, tmp_path, damage, monkeypatch):
    import shutil

    copy = tmp_path / made.path.name
    shutil.copytree(made.path, copy)
    hurt = made.manifest["cells"][1]
    run = copy / hurt["run"]
    if damage == "older":  # a run of an older schema is read, and not continued
        monkeypatch.setattr(_panel_standing, "SCHEMA_VERSION", "1.9")
        next((run / "samples").glob("*.parquet")).unlink()
    else:
        for file in run.glob("*"):
            if damage == "emptied" or file.name.startswith("manifest") or file.suffix == ".parquet":
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        if damage == "emptied":
            (run / "notes.txt").write_text("kept")
    told = []
    done = dp.panel(copy, listener=lambda p: told.extend(p.notes))
    assert done.status == "complete"
    (note,) = [note for note in told if note.startswith("mended")]
    assert f"moved {run.name} to damaged/{run.name} (" in note
    assert (copy / "damaged" / run.name).is_dir()  # nothing is deleted
    assert ("schema 1.1" in note) == (damage == "older")
    assert any(cell.get("mended") for cell in json.loads((copy / "panel.json").read_text())["cells"])
    assert done.run(hurt["key"]).manifest.id8 == hurt["id8"]
    assert done.run(hurt["key"]).path.parent == copy / "runs"
    assert done.table("variance").equals(made.table("variance"))


def test_a_leftover_file_in_a_run_of_an_older_schema_is_no_reason_to_make_it_again(made, tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / made.path.name
    shutil.copytree(made.path, copy)
    cell = made.manifest["cells"][0]
    monkeypatch.setattr(_panel_standing, "SCHEMA_VERSION", "1.9")
    (copy / cell["run"] / "samples" / "stranger.parquet").write_bytes(b"PAR1")
    steps = _panel_standing.mend(copy, cell)
    assert any("stranger.parquet" in step for step in steps)
    assert (copy / cell["run"] / "manifest.json").is_file()
    assert not (copy / "damaged").exists()


def test_models_are_let_go(tmp_path, monkeypatch):
    load, alive = _panel_work.load_subject, []

    def loading(name, **settings):
        gc.collect()
        assert not [w for w in alive if w() is not None], "the model before is still in memory"
        subject = load(name, **settings)
        alive.append(weakref.ref(subject.model))
        return subject

    monkeypatch.setattr(_panel_work, "load_subject", loading)
    dp.panel(**{**SMALL, "seeds": 0, "alphas": [0], "perturb": None}, out=str(tmp_path))
    assert len(alive) == 2


def test_a_model_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    asked = {**SMALL, "models": [LLAMA[0], str(tmp_path / "not-there"), LLAMA[1]], "alphas": [0], "perturb": None}
    found = dp.panel(**asked, out=str(tmp_path / "out"))
    assert found.status == "partial"
    assert list(found.cells["state"]) == ["done", "failed", "done"]
    assert "not-there" in found.failed["error"].iloc[0]
    assert found.table("variance")["n_models"].max() == 2
    assert any("1 of 3 cells failed" in w for w in found.summary["warnings"])
    with pytest.raises(RunFolderError, match="is failed"):
        found.run(found.failed["key"].iloc[0])
    # an error inside one cell is that cell's alone, and is tried again
    run = _panel_work.run

    def failing(held, *given, **settings):
        if held.name == LLAMA[1]:
            raise MemoryError("out of memory")
        return run(held, *given, **settings)

    monkeypatch.setattr(_panel_work, "run", failing)
    other = dp.panel(**{**SMALL, "alphas": [0], "perturb": None}, out=str(tmp_path / "two"))
    assert list(other.cells["state"]) == ["done", "failed"]
    assert other.failed["error"].iloc[0] == "MemoryError: out of memory"
    assert set(other.table("variance")["reason"]) == {"models<2"}
    monkeypatch.setattr(_panel_work, "run", run)
    assert dp.panel(other.path).status == "complete"


def test_a_full_disk_stops_the_panel(tmp_path, monkeypatch):
    def full(*given, **settings):
        raise RunFolderError("no room") from OSError(28, "No space left on device")

    monkeypatch.setattr(_panel_work, "run", full)
    with pytest.raises(RunFolderError, match="no room"):
        dp.panel(**SMALL, out=str(tmp_path))


def test_another_panel_in_the_named_folder_is_refused(made):
    with pytest.raises(RunFolderError, match="holds another panel"):
        dp.panel(**{**SMALL, "seeds": [5]}, out=str(made.path))


# --- other designs


def test_iterate_as_a_panel(tmp_path):
    found = dp.panel(
        models=["panel/csm-depth1-width32-seed0", "panel/csm-depth1-width32-seed1", LLAMA[0]], protocol="iterate",
        iterations=[1, 3], categories="factual", prompts_per_category=2, decompose="nll", out=str(tmp_path),
    )  # fmt: skip
    assert list(found.cells["state"]) == ["done", "done", "failed"]  # a Llama has no loop
    assert set(found.table("variance")["condition"]) == {"T1", "T3"}


def test_temperature_gives_seeds_a_term(tmp_path):
    found = dp.panel(
        **{**SMALL, "alphas": [0], "perturb": None, "temperatures": [1.0], "decompose": ["entropy"]}, out=str(tmp_path)
    )
    part = found.table("variance").set_index("term")
    assert part.loc["seed", "df"] == 8
    assert part.loc["seed", "eta2"] > 0
    assert not np.isnan(part.loc["model", "omega2"])


def test_the_cost_is_told_before(tmp_path):
    cost = plan_panel(**{**SMALL, "models": [LLAMA[0], "tiny-llma"]}, measure=False, out=str(tmp_path / "out"))
    assert (cost["cells"], cost["done"], cost["copies_left_out"], cost["prompts"]) == (6, 0, 2, 4)
    good, bad = cost["models"]
    assert good["cells"] == 3
    assert good["samples"] == 4 + 2 * 16
    assert "tiny-llma" in bad["reason"]
    assert cost["samples"] == good["samples"]
    assert cost["seconds"] is None
    assert not (tmp_path / "out").exists()


def test_the_seconds_told_before_hold_loading_runs_and_tables(tmp_path):
    design = {**SMALL, "models": LLAMA[:1], "out": str(tmp_path / "out")}
    cost = plan_panel(**design)
    (one,) = cost["models"]
    assert cost["table_seconds"] > 0
    assert cost["seconds"] == pytest.approx(one["seconds"] + cost["table_seconds"])
    clean = plan_panel(**{**design, "alphas": [0], "perturb": None})
    assert clean["table_seconds"] < cost["table_seconds"]  # one condition of three
    dp.panel(**design)
    assert plan_panel(**design)["seconds"] == 0  # nothing is left
