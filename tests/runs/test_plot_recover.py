"""The pictures of a recovery study: what is drawn is what is stored, and what cannot be drawn is said."""

import numpy as np
import pandas as pd
import pytest

from dynprobe.errors import RunFolderError
from dynprobe.runs import RunWriter, open_run

PROMPTS, TOKENS, N_PROMPT = ("p0", "p1", "p2", "p3"), 6, 4
BAND = {"signal": "entropy", "lower": 0.75, "upper": 0.99, "q_lo": 1.0, "q_hi": 2.0, "m": 3, "m_off": 5}
ARMS = {
    "clean.free": "clean", "perturbed.free": "perturbed", "perturbed+slerp.free": "recovered",
    "perturbed+random:slerp.free": "random-control",
}  # fmt: skip


def fit(condition, metric, rf, low=-0.2, high=0.9, reason=None, acted_on=False):
    mode = condition.split("+")[1].split(".")[0].removeprefix("random:")
    timing = "replay" if "random:" in condition else "always" if ".always" in condition else "detector"
    return {
        "fit_id": f"{condition}|{metric}", "condition_id": condition, "mode": mode, "timing": timing,
        "decode_mode": condition.rsplit(".")[-1], "metric": metric, "rf": rf, "low": low, "high": high,
        "reason": reason, "acted_on": acted_on, "estimator": "recovery.fraction/1",
    }  # fmt: skip


FITS = [
    fit("perturbed+slerp.free", "nll_bare", 0.25), fit("perturbed+random:slerp.free", "nll_bare", -0.1),
    fit("perturbed+slerp.free", "kappa_geom", 4.0, -np.inf, np.inf),
    fit("perturbed+random:slerp.free", "kappa_geom", 0.5),
    fit("perturbed+slerp.free", "kappa_phase", 0.8, acted_on=True),
    fit("perturbed+random:slerp.free", "kappa_phase", 0.0, acted_on=True),
    fit("perturbed+slerp.always.free", "nll_bare", np.nan, np.nan, np.nan, "DETECTOR_BLIND"),
]  # fmt: skip


def signal(condition, prompt, token):
    return (condition != "clean.free") * 2.0 + PROMPTS.index(prompt) + 0.1 * token


def acting(condition, prompt, token):
    return condition == "perturbed+slerp.free" and token >= 2 and prompt in ("p0", "p1")


def made(out, fits=FITS, **config):
    config = {"mode": ["slerp", "passive"], "timings": ["detector"], "detector": "entropy", "perturb": [], **config}
    writer = RunWriter.begin(
        out, model_name="made", config=config, ident="0123abcd",
        manifest_fields={"batch_plan": [0], "detector_band": BAND},
    )  # fmt: skip
    rows = [(f"{p}|{c}|0", p, c) for c in ARMS for p in PROMPTS]
    samples = pd.DataFrame(rows, columns=["sample_id", "prompt_id", "condition_id"])
    samples = samples.assign(n_prompt=N_PROMPT, n_watched=TOKENS, n_new=TOKENS + 1)
    actions = [
        # The prompt's last token is looked at and belongs to no picture; a token may have a row per controller.
        {"sample_id": s, "pos": N_PROMPT + t, "signal": signal(c, p, t) if t >= 0 else 99.0, "gain": 0.0,
         "active": acting(c, p, t) and again == 0, "site": "", "energy": 0.0, "controller": str(again),
         "detected": False}
        for s, p, c in rows for t in range(-1, TOKENS) for again in range(2)
    ]  # fmt: skip
    with writer:
        writer.write_table(
            "prompts", pd.DataFrame({"prompt_id": PROMPTS, "text": "x", "token_ids": [[1] * N_PROMPT] * 4})
        )
        writer.write_table("conditions", pd.DataFrame({"condition_id": list(ARMS), "arm": list(ARMS.values())}))
        writer.write_batch(0, {"samples": samples, "actions": pd.DataFrame(actions)})
        if fits:
            writer.write_table("fits", pd.DataFrame(fits))
        writer.finish({"protocol": "recover"})
    return open_run(writer.folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("studies"))


def by_label(panel):
    return {line.get_label(): line for line in panel.lines}


def test_the_signal_of_every_arm_with_its_band(run):
    figure = run.plot.signal()
    panel, share = figure.axes
    assert panel.get_title(loc="left") == "slerp · own text"  # passive has no arm of its own here
    lines = by_label(panel)
    for label, condition in (
        ("clean", "clean.free"), ("perturbed", "perturbed.free"), ("perturbed + mode", "perturbed+slerp.free"),
    ):  # fmt: skip
        wanted = [np.mean([signal(condition, p, t) for p in PROMPTS]) for t in range(TOKENS)]
        np.testing.assert_array_equal(lines[label].get_xdata(), range(TOKENS))
        np.testing.assert_allclose(lines[label].get_ydata(), wanted, rtol=1e-6)
    assert lines["q99 of clean text"].get_ydata()[0] == BAND["q_hi"]
    assert lines["q75 of clean text"].get_ydata()[0] == BAND["q_lo"]
    assert "entropy" in panel.get_ylabel()
    (filled,) = share.collections
    heights = filled.get_paths()[0].vertices
    assert heights[:, 1].max() == pytest.approx(0.5)  # two of four texts
    assert heights[heights[:, 1] > 0, 0].min() == pytest.approx(1.5)
    assert share.get_ylim() == (0, 4)


def test_the_fractions_beside_their_random_control(run):
    figure = run.plot.recovery()
    panels = [panel for panel in figure.axes if panel.get_visible()]
    titles = [panel.get_title() for panel in panels]
    assert titles == ["NLL of the own text,\nbare model", "κ geom", "κ phase\n(acted on)"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["slerp", "slerp, always"]
    drawn = [
        {(round(float(line.get_xdata()[0]), 6), line.get_marker(), line.get_markerfacecolor() == "white")
         for line in panel.lines if line.get_marker() in ("o", "<", ">")} for panel in panels
    ]  # fmt: skip
    assert drawn[0] == {(0.25, "o", False), (-0.1, "o", False)}
    assert drawn[1] == {(2.0, ">", False), (0.5, "o", False)}  # beyond the axis
    assert drawn[2] == {(0.8, "o", True), (0.0, "o", True)}
    assert [text.get_text() for text in panels[0].texts] == ["blind"]
    dotted = [line for line in panels[1].lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "--"]
    assert len(dotted) + sum(line.is_dashed() for line in panels[1].lines) >= 1  # an open interval is no solid line


def test_pictures_are_written_with_the_run(run, tmp_path):
    assert list(run.plot.own()) == ["recovery", "signal"]
    files = run.plot.write()
    assert sorted(file.name for file in files) == ["recovery.png", "recovery.svg", "signal.png", "signal.svg"]
    assert all(file.stat().st_size > 5000 for file in files)
    run.plot.draw("signal", save=tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_without_fractions_the_signal_is_what_there_is(tmp_path):
    clean = made(tmp_path, fits=[])
    assert list(clean.plot.own()) == ["signal"]
    with pytest.raises(RunFolderError, match="holds no recovery fractions"):
        clean.plot.recovery()


def test_other_runs_have_no_such_picture(run_folder):
    other = open_run(run_folder)
    with pytest.raises(RunFolderError, match="holds no recovery study"):
        other.plot.signal()
    with pytest.raises(RunFolderError, match="holds no recovery fractions"):
        other.plot.recovery()
