"""The pictures of the function generator: what is drawn is what is stored, and what cannot be drawn is said."""

import os
import subprocess
import sys

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.errors import RunFolderError, UsageError
from dynprobe.runs._plot_response import _combined
from dynprobe.testing import tiny_llama

ROWS = [[(7 * i + 5 * j + 1) % 96 for i in range(n)] for j, n in enumerate((30, 22, 41, 26))]


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures")
    before = os.environ.get("DYNPROBE_CACHE")
    os.environ["DYNPROBE_CACHE"] = str(out / "cache")
    yield lambda spec, rows=ROWS: dp.run(tiny_llama(4), rows, perturb=spec, max_new_tokens=0, out=out / "runs")
    os.environ.pop("DYNPROBE_CACHE")
    if before is not None:
        os.environ["DYNPROBE_CACHE"] = before


@pytest.fixture(scope="module")
def driven(go):
    return go("alpha=0.3,kind=sine,period=4,layers=1")


@pytest.fixture(scope="module")
def pushed(go):
    return go("alpha=0.3,kind=impulse,layers=1,positions=3")


def test_a_finished_run_has_its_pictures(driven, pushed, go):
    for run, name in ((driven, "bode"), (pushed, "impulse")):
        folder = run.path / "figures"
        assert sorted(p.name for p in folder.iterdir()) == [f"{name}.png", f"{name}.svg"]
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()[:1000]
    assert not (go("alpha=0.1").path / "figures").exists()


def test_a_picture_is_the_same_file_twice(driven, tmp_path):
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        driven.plot.bode(save=file)
    assert files[0].read_bytes() == files[1].read_bytes()


def of_arm(run, table):
    rows = run.table(table)
    rows = rows[rows["sample_id"].astype(str).str.contains("perturbed.forced")]
    return rows.assign(prompt=rows["sample_id"].astype(str).str.split("|").str[0])


def test_the_bode_plot_shows_the_stored_gains_and_phases(driven):
    upper, lower = driven.plot.bode().axes
    rows = of_arm(driven, "profiles")
    rows = rows[rows["depth"] >= 2]
    by_depth = rows.groupby("depth")
    lines = {line.get_label(): line for line in upper.get_lines()}
    for label, column in (("along the drive", "lockin_gain"), ("all directions", "lockin_total")):
        expected = by_depth[column].apply(lambda g: np.mean(20 * np.log10(g)))
        x, y = lines[label].get_data()
        np.testing.assert_array_equal(x, [2, 3, 4])
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    phases = by_depth["lockin_phase"].apply(lambda p: np.angle(np.mean(np.exp(1j * p))))
    np.testing.assert_allclose(lower.get_lines()[0].get_ydata(), np.degrees(np.unwrap(phases)), atol=1e-5)
    low, high = upper.collections[0].get_paths()[0].vertices[:, 1].min(), upper.get_lines()[0].get_ydata().max()
    assert low <= high
    assert "period=4" in driven.plot.bode().get_suptitle()


def test_points_are_hollow_where_nothing_stands_out(driven, monkeypatch):
    from matplotlib.colors import to_rgba

    import dynprobe.runs._plot_response as module

    def faces(figure):
        scatters = [c for c in figure.axes[0].collections if hasattr(c, "get_sizes") and len(c.get_sizes())]
        return {
            tuple(np.round(c.get_facecolor()[0], 3)): len(c.get_offsets()) for c in scatters if len(c.get_offsets())
        }

    colours = {tuple(np.round(to_rgba(c), 3)) for c in (module.BLUE, module.GREY)}
    assert set(faces(driven.plot.bode())) == colours
    monkeypatch.setattr(module, "_combined", lambda p: np.array([0.0, 0.5, 0.0]))
    figure = driven.plot.bode()
    assert faces(figure)[to_rgba("white")] == 1
    assert "hollow" in figure.get_suptitle()
    monkeypatch.undo()
    monkeypatch.setattr(module, "_TWICE", 1e9)  # nothing is that loud over all directions but what was written
    assert faces(driven.plot.bode())[to_rgba("white")] >= 2


def test_p_values_combine_after_fisher():
    from scipy.stats import combine_pvalues

    p = np.random.default_rng(0).uniform(size=(7, 3))
    expected = [combine_pvalues(column).pvalue for column in p.T]
    np.testing.assert_allclose(_combined(p), expected, rtol=1e-10)
    p[:4, 1], p[:, 2] = np.nan, np.nan
    found = _combined(p)
    assert found[1] == pytest.approx(combine_pvalues(p[4:, 1]).pvalue)
    assert found[2] == 1.0
    assert _combined(np.zeros((2, 1)))[0] < 1e-100


def test_the_map_shows_the_stored_responses(pushed):
    panel, bar = pushed.plot.impulse().axes
    (mesh,) = panel.collections
    values = mesh.get_array().reshape(-1, mesh.get_coordinates().shape[1] - 1)
    rows = of_arm(pushed, "depths")
    expected = rows[rows["track"] == "resid"].groupby(["depth", "pos"])["response_rel"].median().unstack("pos")
    expected = expected.loc[:, :29]  # what at least half of the prompts have
    np.testing.assert_array_equal(np.ma.getmaskarray(values), expected.to_numpy() == 0)
    np.testing.assert_allclose(values.filled(0), expected.to_numpy(), rtol=1e-6)
    assert np.ma.getmaskarray(values)[:, :3].all()  # before the write
    assert bar.get_ylabel().endswith("median over prompts")
    (mark,) = panel.get_lines()
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (3, 2)
    assert panel.get_xlabel() == "position (tokens)"


def test_one_prompt_and_impulses_at_different_places(pushed, go):
    name = str(pushed.prompts["prompt_id"].iloc[2])
    panel = pushed.plot.impulse(prompt=name).axes[0]
    assert panel.collections[0].get_coordinates().shape[1] - 1 == 41
    with pytest.raises(UsageError, match="is not in"):
        pushed.plot.impulse(prompt="nobody")
    late = go("alpha=0.3,kind=impulse,layers=1,positions=50%").plot.impulse().axes[0]
    assert late.get_xlabel() == "tokens after the impulse"
    assert (late.get_lines()[0].get_xdata()[0], late.get_lines()[0].get_ydata()[0]) == (0, 2)


def test_what_cannot_be_drawn_is_said(driven, pushed, go, tmp_path):
    with pytest.raises(RunFolderError, match="no lock-in"):
        pushed.plot.bode()
    with pytest.raises(RunFolderError, match="no single impulse"):
        driven.plot.impulse()
    with pytest.raises(RunFolderError, match=r"no condition 'perturbed\.force'.*Did you mean"):
        driven.plot.bode(condition="perturbed.force")
    with pytest.raises(UsageError, match=r"cannot be written"):
        driven.plot.bode(save=tmp_path / "a.nonsense")
    with pytest.raises(UsageError, match=r"cannot be written"):
        driven.plot.bode(save=tmp_path / "nowhere" / "a.png")
    short = go("alpha=0.3,kind=sine,period=16,layers=1", ROWS[1:2])
    assert "no-figure" in set(short.events()["kind"])
    assert short.status == "complete"
    with pytest.raises(RunFolderError, match="two periods"):
        short.plot.bode()
    with pytest.raises(RunFolderError, match="nothing responded"):
        go("alpha=0,kind=impulse,layers=1").plot.impulse()


def test_one_prompt_has_no_band_and_is_drawn_all_the_same(go, tmp_path):
    run = go("alpha=0.3,kind=sine,period=4,layers=1", ROWS[:1])
    run.plot.bode(save=tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_the_figure_of_a_perturbed_run(driven, tmp_path):
    figure = driven.plot.depth(save=tmp_path / "depth.pdf")
    assert len(figure.axes) == 3
    assert (tmp_path / "depth.pdf").read_bytes().startswith(b"%PDF")
    assert "bode()" in repr(driven.plot)


def test_drawing_leaves_the_process_alone(driven):
    code = (
        f"import sys, dynprobe as dp; run = dp.open({str(driven.path)!r}); figure = run.plot.bode(); "
        "print('matplotlib.pyplot' in sys.modules, type(figure).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Figure"]
