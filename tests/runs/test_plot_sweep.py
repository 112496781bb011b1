"""The pictures of sweeps and thresholds: what is drawn is what is stored, and what cannot be drawn is said."""

import json
import math
import sys

import numpy as np
import pandas as pd
import pytest

from dynprobe.cli import main
from dynprobe.errors import RunFolderError, UsageError
from dynprobe.protocols import sweep, threshold
from dynprobe.protocols._criteria import CRITERIA
from dynprobe.runs import RunWriter, _quantity, open_run
from dynprobe.runs._tokens import visible
from dynprobe.testing import tiny_llama

ROWS = [[(7 * i + 5 * j + 1) % 96 for i in range(n)] for j, n in enumerate((6, 5, 7, 4))]
ALPHAS = [0.1, 1.0, 10.0, 100.0]
LABEL = {
    "sign-flip": "sign flipped", "energy-matched": "same energy, other depth", "twin": "random weights",
    "scrambled": "scrambled tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def swept(out):
    return sweep(
        tiny_llama(), ROWS, alphas=ALPHAS, layers="all", scale=["relnorm", "mad"], out=out,
        controls=["sham", "sign", "energy", "twin", "scrambled"], seeds="0:2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def searched(out):
    return threshold(tiny_llama(), ROWS, scale="relnorm", layers=[0, 2], criterion=["flip"], n_boot=200, out=out)


@pytest.fixture(scope="module")
def placed(out):
    return threshold(
        tiny_llama(), ROWS[:2], scale="relnorm", layers="all", criterion="flip", level=0.2, each_position=True, out=out
    )


def made(out, fits, trials, prompts=None, **config):
    """A threshold run with these tables."""
    config = {
        "criterion": ["kl"], "alphas": [], "scale": sorted({f["scale"] for f in fits}), "positions": None, "seeds": [0],
        "layers": "all", "each_position": False, **config,
    }  # fmt: skip
    ident = f"{abs(hash(json.dumps([fits, trials, config], default=str))):08x}"[:8]
    writer = RunWriter.begin(out, model_name="made", config=config, ident=ident, manifest_fields={"batch_plan": [0]})
    trials, fits = pd.DataFrame(trials), pd.DataFrame(fits)
    facts = {"kind": "gaussian", "criterion": "kl"}
    with writer:
        for table in (trials, fits):
            for name, value in facts.items():
                table[name] = value
            table["write"] = table["scale"].astype(str) + "|gaussian|L" + table["layer"].astype(str)
        prompts = prompts or [{"prompt_id": p, "text": p, "token_ids": [1, 2, 3]} for p in trials["prompt_id"].unique()]
        writer.write_table("prompts", pd.DataFrame(prompts))
        writer.write_table(
            "conditions",
            pd.DataFrame({"condition_id": sorted(set(fits["write"])), "arm": "perturbed"}).assign(
                layer=lambda t: t["condition_id"].str.rsplit("L").str[-1].astype(int)
            ),
        )
        writer.write_batch(0, {"trials": trials.assign(seed=0, trial_round=0)})
        defaults = {
            "level": 1.0, "floor": 0.0, "headline": True, "estimator": "threshold.prompt/1", "confidence": 0.95, "n": 4,
        }  # fmt: skip
        for name, value in defaults.items():
            if name not in fits:
                fits[name] = value
        writer.write_table("fits", fits.assign(fit_id=[f"f{i}" for i in range(len(fits))]))
        writer.finish({})
    return open_run(writer.folder)


def curve(prompt, values, alphas=(0.1, 1.0, 10.0), scale="relnorm", layer=1, **more):
    return [
        {"prompt_id": prompt, "scale": scale, "layer": layer, "alpha": a, "response": v, "level": 1.0, "floor": 0.0}
        | more
        for a, v in zip(alphas, values, strict=True)
    ]


def fit(alpha50, low, high, status="resolved", scale="relnorm", layer=1, **more):
    return {"scale": scale, "layer": layer, "alpha50": alpha50, "low": low, "high": high, "status": status} | more


def panels_of(figure):
    return [panel for panel in figure.axes if panel.get_label() != "<colorbar>"]


def by_gid(panel, name):
    return [artist for artist in panel.get_children() if artist.get_gid() == name]


def labelled(panel, label):
    return [line for line in panel.lines if line.get_label() == label]


def words(figure):
    return figure.get_suptitle()


def test_levels_are_those_of_the_criteria():
    named = {_quantity.COLUMN_OF[c.name]: c.level for c in CRITERIA.values()}
    assert all(named[column] == level for column, level in _quantity.LEVELS.items())
    assert set(_quantity.COLUMN_OF) == set(CRITERIA)


def test_a_finished_run_has_its_pictures(swept, searched, placed):
    for run, names in (
        (swept, {"response", "heatmap"}), (searched, {"thresholds", "response"}), (placed, {"fragility"}),
    ):  # fmt: skip
        files = sorted(p.name for p in (run.path / "figures").iterdir())
        assert files == sorted(f"{n}{e}" for n in names for e in (".png", ".svg"))
        assert all(f"figures/{name}" in run.manifest.figures for name in files)
        assert f"figures/{min(names)}.png" in (run.path / "README.md").read_text(encoding="utf-8")
        assert run.verify()


def test_response_draws_every_prompt_and_their_mean_as_summarised(swept):
    figure = swept.plot.response()
    panels = panels_of(figure)
    assert len(panels) == 6  # 2 scales × 3 layers
    table = pd.DataFrame(swept.summary["responses"])
    for i, scale in enumerate(("relnorm", "mad")):
        for layer in range(3):
            panel = panels[3 * i + layer]
            assert f"layer {layer}, {scale}" in panel.get_title(loc="left")
            assert len(by_gid(panel, "prompt")) == len(ROWS)
            own = table.query("variant == 'model' and arm == 'perturbed' and scale == @scale and layer == @layer")
            own = own.sort_values("alpha")
            (mean,) = by_gid(panel, "mean")
            np.testing.assert_allclose(mean.get_xdata(), ALPHAS, rtol=1e-6)
            np.testing.assert_allclose(mean.get_ydata(), own["kl_clean_pert"], rtol=1e-6)
            (band,) = [c for c in panel.collections if str(c.get_label()).startswith("95 %")]
            corners = band.get_paths()[0].vertices
            for alpha, low, high in zip(ALPHAS, own["kl_clean_pert_low"], own["kl_clean_pert_high"], strict=True):
                at = corners[np.isclose(corners[:, 0], alpha), 1]
                np.testing.assert_allclose([at.min(), at.max()], [low, high], rtol=0.15)
            assert panel.get_xscale() == panel.get_yscale() == "log"
            (level,) = labelled(panel, "criterion: 1 nat")
            assert set(level.get_ydata()) == {1.0}
    assert "tiny-random-llama" in words(figure)
    assert "4 prompts" in words(figure)
    assert "relnorm, mad" in words(figure)
    assert "positions 1:" in words(figure)


def test_controls_are_drawn_where_they_belong(swept):
    panel = panels_of(swept.plot.response(layer=1, scale="relnorm"))[0]
    table = pd.DataFrame(swept.summary["responses"])
    of = {
        "twin": table.query("variant == 'twin' and arm == 'perturbed'"),
        "scrambled": table.query("variant == 'scrambled' and arm == 'perturbed'"),
        "sign-flip": table.query("variant == 'model' and arm == 'sign-flip'"),
    }
    for name, rows in of.items():
        own = (
            rows.query("scale == 'relnorm' and layer == 1").assign(size=lambda t: t["alpha"].abs()).sort_values("size")
        )
        (line,) = labelled(panel, LABEL[name])
        np.testing.assert_allclose(line.get_ydata(), own["kl_clean_pert"], rtol=1e-6)
    # The energy of layer 1 is written at layer 2 of 3, and drawn where it comes from, at the strength it comes from.
    samples = swept.samples.merge(swept.conditions[["condition_id", "arm", "matched_to"]], on="condition_id")
    samples = samples[samples["matched_to"].astype(str).str.startswith("relnorm|gaussian|L1|")]
    samples["size"] = samples["matched_to"].astype(str).str.rsplit("|").str[-1].astype(float)
    (line,) = labelled(panel, LABEL["energy-matched"])
    np.testing.assert_allclose(line.get_xdata(), ALPHAS)
    np.testing.assert_allclose(line.get_ydata(), samples.groupby("size")["kl_clean_pert"].mean(), rtol=1e-6)
    assert labelled(panel, LABEL["sign-flip"])[0].get_linestyle() == "--"


def test_shares_and_differences_have_linear_axes(swept):
    share = panels_of(swept.plot.response("flip_rate", layer=0, scale="mad"))[0]
    assert share.get_xscale() == "log"
    assert share.get_yscale() == "linear"
    assert labelled(share, "criterion: 0.5")
    (sham,) = labelled(share, "sham (nothing written)")
    assert set(sham.get_ydata()) == {0.0}
    kappa = panels_of(swept.plot.response("kappa_phase_d", layer=0, scale="mad"))[0]
    assert "half-turns" in kappa.get_ylabel()
    assert not [line for line in kappa.lines if str(line.get_label()).startswith("criterion")]


def test_heatmap_holds_the_means_and_the_line_of_the_level(swept):
    figure = swept.plot.heatmap()
    panels = panels_of(figure)
    table = pd.DataFrame(swept.summary["responses"]).query("variant == 'model' and arm == 'perturbed'")
    assert len(panels) == 2
    for panel, scale in zip(panels, ("relnorm", "mad"), strict=True):
        own = table[table["scale"] == scale].pivot_table(index="layer", columns="alpha", values="kl_clean_pert")
        (mesh,) = [c for c in panel.collections if hasattr(c, "get_coordinates")]
        np.testing.assert_allclose(np.asarray(mesh.get_array()).ravel(), own.to_numpy().ravel(), rtol=1e-6)
        for white in by_gid(panel, "level")[-1:]:
            x = white.get_xdata()[::2]
            for row, at in zip(own.to_numpy(), x, strict=True):
                crossed = np.flatnonzero(row >= 1.0)
                assert math.isnan(at) == (not len(crossed))
                assert not len(crossed) or ALPHAS[crossed[0] - 1] <= at <= ALPHAS[crossed[0]]
    assert any(by_gid(panel, "level") for panel in panels)
    change = panels_of(swept.plot.heatmap("kappa_phase_d"))[0]
    (mesh,) = [c for c in change.collections if hasattr(c, "get_coordinates")]
    assert mesh.norm.vmin == -mesh.norm.vmax


def test_a_search_shows_its_trials_and_its_fit(searched):
    figure = searched.plot.response(layer=2)
    (panel,) = panels_of(figure)
    trials = searched.table("trials").query("layer == 2 and alpha > 0")
    drawn = by_gid(panel, "prompt")
    assert len(drawn) == len(ROWS)
    assert sum(len(line.get_xdata()) for line in drawn) == len(trials)
    stored = searched.table("fits").query("layer == 2 and headline").iloc[0]
    (line,) = by_gid(panel, "alpha50")
    np.testing.assert_allclose(line.get_xdata(), stored["alpha50"])
    (ticks,) = by_gid(panel, "crossings")
    np.testing.assert_allclose(np.median(np.log(ticks.get_xdata())), np.log(stored["alpha50"]), rtol=1e-9)
    assert set(ticks.get_ydata()) == {0.5}
    assert not by_gid(panel, "mean")  # no two prompts saw the same strengths
    assert not by_gid(panel, "interval")  # four prompts have no 95 % order interval, and none is drawn


def test_several_criteria_have_a_panel_each(out):
    run = threshold(
        tiny_llama(), ROWS, scale="relnorm", layers=[1], criterion=["kl", "flip"], alphas=[0.1, 0.5, 2.0, 8.0],
        n_boot=200, out=out,
    )  # fmt: skip
    figure = run.plot.response()
    kl, flip = panels_of(figure)
    assert "nats" in kl.get_ylabel()
    assert "top-1" in flip.get_ylabel()
    trials = run.table("trials").query("alpha > 0")
    for panel, name, level in ((kl, "kl", 1.0), (flip, "flip", 0.5)):
        means = trials[trials["criterion"] == name].groupby("alpha", observed=True)["response"].mean()
        (mean,) = by_gid(panel, "mean")
        np.testing.assert_allclose(mean.get_ydata(), means)
        (line,) = labelled(panel, "level of the criterion")
        assert set(line.get_ydata()) == {level}
    assert len(panels_of(run.plot.response("flip"))) == 1
    assert "responses of each criterion" in words(figure)


@pytest.mark.parametrize("criterion", [["kl"], ["kl", "flip"]])
def test_the_legend_lies_inside_the_figure(out, criterion):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    run = threshold(
        tiny_llama(), [*ROWS, *([t + 1 for t in row] for row in ROWS)], scale="relnorm", layers=[1],
        criterion=criterion, alphas=[0.1, 0.5, 2.0, 8.0], level=0.2 if len(criterion) == 1 else None, n_boot=200,
        out=out,
    )  # fmt: skip
    figure = run.plot.response()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y0 >= 0


def test_thresholds_are_those_of_the_fits(searched):
    (panel,) = panels_of(searched.plot.thresholds())
    (line,) = by_gid(panel, "alpha50")
    stored = searched.table("fits").query("headline").sort_values("layer")
    np.testing.assert_allclose(line.get_ydata(), stored["alpha50"])
    np.testing.assert_allclose(line.get_xdata(), [0, 2])
    assert panel.get_yscale() == "log"


def test_intervals_and_censored_ends(tmp_path):
    trials = [
        *curve("a", [0.01, 2.0, 9.0]), *curve("b", [0.02, 0.5, 8.0]), *curve("c", [2.0, 3.0, 9.0]),
        *curve("d", [0.01, 0.1, 0.4]), *curve("e", [math.nan] * 3),
        *(t for p in "ab" for layer in (2, 3, 4) for t in curve(p, [0.01, 0.1, 0.4], layer=layer)),
    ]  # fmt: skip
    nan = math.nan
    fits = [
        fit(0.7, 0.4, 1.5), fit(2.0, 1.2, math.inf, layer=2), fit(nan, 3.0, math.inf, "right-censored", layer=3),
        fit(nan, nan, nan, "missing", layer=4),
    ]  # fmt: skip
    run = made(tmp_path, fits, trials)
    (panel,) = panels_of(run.plot.response(layer=1))
    (band,) = by_gid(panel, "interval")
    np.testing.assert_allclose([band.get_x(), band.get_x() + band.get_width()], [0.4, 1.5])
    (right,), (left,) = by_gid(panel, "right-censored"), by_gid(panel, "left-censored")
    np.testing.assert_allclose(right.get_offsets()[0], [panel.get_xlim()[1], 0.4])
    np.testing.assert_allclose(left.get_offsets()[0], [panel.get_xlim()[0], 2.0])
    (ticks,) = by_gid(panel, "crossings")
    assert len(ticks.get_xdata()) == 2  # a and b cross; c and d point out; e has nothing
    (panel,) = panels_of(run.plot.response(layer=3))
    assert not by_gid(panel, "alpha50")
    assert any(text.get_text() == "α50 > 3" for text in panel.texts)  # a median may be bound inside the range

    (panel,) = panels_of(run.plot.thresholds())
    lines = [segment for c in by_gid(panel, "interval") for segment in c.get_segments()]
    np.testing.assert_allclose([segment[:, 1] for segment in lines], [[0.4, 1.5], [1.2, 10.0], [3.0, 10.0]])
    arrows = [c.get_offsets()[0] for c in by_gid(panel, "right-censored")]
    np.testing.assert_allclose(arrows, [[2, 10.0], [3, 10.0]])
    (line,) = by_gid(panel, "alpha50")
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), [False, False, True, True])


def test_fragility_is_a_map_of_the_fits(placed):
    order = list(placed.prompts["prompt_id"].astype(str))
    for prompt in (None, order[1]):
        figure = placed.plot.fragility(prompt)
        (panel,) = panels_of(figure)
        prompt = prompt or order[0]
        stored = placed.table("fits").query("headline").astype({"prompt_id": str})
        stored = stored[stored["prompt_id"] == prompt]
        (mesh,) = [c for c in panel.collections if hasattr(c, "get_coordinates")]
        grid = np.ma.filled(mesh.get_array().reshape(3, -1), np.nan)
        row = placed.prompts.set_index("prompt_id").loc[prompt]
        assert grid.shape[1] == len(row["token_ids"])
        for _, one in stored.iterrows():
            np.testing.assert_allclose(grid[one["layer"], one["pos"]], one["alpha50"])
        assert np.isnan(grid[:, 0]).all()  # the first position is not written
        ticks = [label.get_text() for label in panel.get_xticklabels()]
        assert ticks == [f"{i}: id {token}" for i, token in enumerate(row["token_ids"])]
        assert prompt in words(figure)


def test_fragility_names_tokens_and_hatches_what_is_censored(tmp_path):
    texts = ["<s>", " cost", "$5", "\n"]
    prompts = [{"prompt_id": "p", "text": "cost $5 or $6", "token_ids": [0, 1, 2, 3], "token_texts": json.dumps(texts)}]
    trials = [t for pos in (1, 2, 3) for t in curve("p", [0.1, 2.0, 3.0], pos=pos)]
    fits = [
        fit(0.5, math.nan, math.nan, prompt_id="p", pos=1),
        fit(math.nan, math.nan, math.nan, "right-censored", prompt_id="p", pos=2),
        fit(math.nan, math.nan, math.nan, "left-censored", prompt_id="p", pos=3),
    ]
    figure = made(tmp_path, fits, trials, prompts, each_position=True).plot.fragility(save=tmp_path / "f.png")
    (panel,) = panels_of(figure)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["<s>", "·cost", "$5", "⏎"]
    for name, pos in (("right-censored", 2), ("left-censored", 3)):
        (cell,) = by_gid(panel, name)
        assert cell.get_hatch()
        assert (cell.get_x() + 0.5, cell.get_y() + 0.5) == (pos, 0)
    assert "cost $5 or $6" in words(figure)
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_a_map_of_nothing_resolved_is_hatched_throughout(tmp_path):
    fits = [fit(math.nan, math.nan, math.nan, "right-censored", prompt_id="p", pos=pos) for pos in (1, 2)]
    trials = [t for pos in (1, 2) for t in curve("p", [0.1, 0.2, 0.3], pos=pos)]
    figure = made(tmp_path, fits, trials, each_position=True).plot.fragility(save=tmp_path / "f.svg")
    assert len(by_gid(panels_of(figure)[0], "right-censored")) == 2
    assert len(figure.axes) == 1  # no numbers, no colour bar


def test_missing_responses_leave_gaps(tmp_path):
    trials = [*curve("a", [0.1, math.nan, 9.0]), *curve("b", [0.2, math.nan, 8.0]), *curve("c", [0.3, math.nan, 7.0])]
    trials += [*curve("a", [0.1, 0.5, 9.0], layer=2)]
    run = made(tmp_path, [fit(0.7, 0.4, 1.5), fit(0.7, 0.4, 1.5, layer=2)], trials, alphas=[0.1, 1.0, 10.0])
    one, two = panels_of(run.plot.response())
    np.testing.assert_array_equal(np.isnan(by_gid(one, "mean")[0].get_ydata()), [False, True, False])
    assert not [c for c in two.collections if str(c.get_label()).startswith("95 %")]  # one prompt has no interval
    (panel,) = panels_of(run.plot.heatmap())
    (mesh,) = [c for c in panel.collections if hasattr(c, "get_coordinates")]
    assert np.ma.getmaskarray(mesh.get_array()).ravel().tolist() == [False, True, False, False, False, False]


def test_what_cannot_be_drawn_says_what_to_run(swept, searched, placed, tmp_path):
    with pytest.raises(RunFolderError, match="dynprobe sweep"):
        searched.plot.heatmap()
    with pytest.raises(RunFolderError, match="dynprobe threshold"):
        swept.plot.thresholds()
    for run in (swept, searched):
        with pytest.raises(RunFolderError, match="--each-position"):
            run.plot.fragility()
    for draw in (placed.plot.response, placed.plot.thresholds):
        with pytest.raises(RunFolderError, match="fragility"):
            draw()
    with pytest.raises(UsageError, match="kl_clean_pert"):
        swept.plot.response("kl_clean_prt")
    with pytest.raises(UsageError, match="searched flip"):
        searched.plot.response("kl_clean_pert")
    with pytest.raises(UsageError, match="layers 0, 1, 2"):
        swept.plot.response(layer=9)
    with pytest.raises(UsageError, match="relnorm"):
        swept.plot.heatmap(scale="relnrm")
    with pytest.raises(UsageError, match="no thresholds of prompt"):
        placed.plot.fragility("nobody")
    with pytest.raises(RunFolderError, match="holds no kl_clean_pert"):
        made(tmp_path, [fit(math.nan, math.nan, math.nan, "missing")], curve("a", [math.nan] * 3)).plot.response()


def test_a_run_that_has_just_begun_says_so(tmp_path):
    for config in ({"criterion": ["kl"], "alphas": []}, {"controls": [], "alphas": [0.1]}):
        writer = RunWriter.begin(tmp_path, model_name="m", config=config, ident=f"{len(config['alphas']):08d}")
        writer.interrupt("test")
        with pytest.raises(RunFolderError, match=r"interrupted and has no (trials|samples) yet"):
            open_run(writer.folder).plot.response()


def test_show_draws_the_fitting_picture(swept, searched, placed, tmp_path, capsys):
    for run, name in ((swept, "response"), (searched, "thresholds"), (placed, "fragility")):
        file = tmp_path / f"{name}.svg"
        assert main(["show", str(run.path), "--figure", str(file)]) == 0
        assert file.read_bytes() == (run.path / "figures" / f"{name}.svg").read_bytes()
    capsys.readouterr()
    assert main(["show", str(swept.path), "--figure", str(tmp_path / "h.png"), "--plot", "heatmap"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(tmp_path / "h.png")
    assert second == "drawn: heatmap; other pictures of this run: --plot response"
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["show", str(swept.path), "--figure", str(tmp_path / "h.png"), "--plot", "heatmp"]) == 2
    assert "heatmap" in capsys.readouterr().err
    assert main(["show", str(swept.path), "--plot", "heatmap"]) == 2
    assert "--figure heatmap.png" in capsys.readouterr().err


def test_without_matplotlib_a_run_finishes_and_says_how_to_get_it(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    run = threshold(tiny_llama(), ROWS[:2], scale="relnorm", criterion="flip", n_boot=200, out=tmp_path)
    assert run.status == "complete"
    assert "dynprobe[plot]" in run.manifest.no_figures
    assert "dynprobe\\[plot\\]" in (run.path / "README.md").read_text(encoding="utf-8")
    assert not (run.path / "figures").exists()
    with pytest.raises(UsageError, match=r"dynprobe\[plot\]"):
        run.plot.response()


def test_tokens_as_labels():
    assert visible("\t") == "⇥"
    assert visible("\U0001f9ea") == "□"
    assert len(visible("x" * 50)) == 14


def test_the_map_of_a_page_names_its_noise_scales(swept):
    from dynprobe.runs._report._figures_grid import layer_map_figure

    figure = layer_map_figure(swept, "run1")
    asked = figure.charts[0].layout["xaxis"]["$title"]
    assert asked["column"] == "write"
    assert set(asked["texts"]) == set(figure.frames[0].rows["write"]) == {"relnorm", "mad"}
    assert all(write in text for write, text in asked["texts"].items())
    assert not any("(scale)" in text for text in asked["texts"].values())
