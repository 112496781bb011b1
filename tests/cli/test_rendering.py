"""What is printed around the numbers: widths, reasons, names of what a number is."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.table import Table

import dynprobe.cli
from dynprobe.cli import _console, _render, _render_diff, _render_grid, _render_head
from dynprobe.probes._scales import SCALES
from dynprobe.protocols._summary import summarise, without_remarks
from dynprobe.runs import _quantity, open_run


def test_scales_mean_the_same_where_a_run_does_not_say_it():
    ours = {name: SCALES[name] for name in SCALES.builtin}
    assert {name: scale.meaning for name, scale in ours.items()} == _render_head._UNITS
    assert {name: scale.unit for name, scale in ours.items()} == {n: _quantity._UNITS.get(n) for n in ours}


def test_a_table_in_a_pipe_is_as_wide_as_its_content(capsys):
    table = Table(title="wide")
    for number in range(40):
        table.add_column(f"column {number}", no_wrap=number % 2 == 0)
    table.add_row(*[f"{number} " + "word " * 8 for number in range(40)])
    _console.console().print(table)
    out = capsys.readouterr().out
    assert "…" not in out
    for number in range(40):
        assert f"column {number} " in out
        assert f"{number} " + "word " * 8 in out


@pytest.mark.parametrize("width", [40, 60, 80, 97, 120, 160, 200])
def test_no_digit_is_lost_on_a_narrow_terminal(width):
    table = Table(title="narrow", caption="what it says below")
    cells = [f"+0.{number:05d} … +1.{number:05d}" for number in range(9)]
    table.add_column("arm", no_wrap=True)
    for number in range(9):
        table.add_column(f"heading-{number}", no_wrap=number % 2 == 0)
    table.add_row("perturbed", *cells)
    table.add_row("again", *reversed(cells))
    out = io.StringIO()
    _console._Console(file=out, width=width, force_terminal=True, color_system=None, markup=False).print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for number in range(9):
        assert sum(f"heading-{number} " in line for line in lines) == 1
        low, high = f"+0.{number:05d}", f"+1.{number:05d}"
        assert sum(low in line for line in lines) == sum(high in line for line in lines) == 2
    parts = [line for line in lines if "arm" in line]
    assert sum("perturbed" in line for line in lines) == sum("again" in line for line in lines) == len(parts)
    assert (len(parts) == 1) == (width == 200)
    assert sum("narrow" in line for line in lines) == sum("what it says below" in line for line in lines) == 1


def test_parts_of_a_table_repeat_what_tells_the_rows_apart():
    table, out = Table("criterion", "scale", "layer", "threshold", "interval", "remarks"), io.StringIO()
    for scale in ("relnorm", "coordstd"):
        table.add_row("kl ≥ 1 nats", scale, "2", "1.23456789", "[1.23456789,1.23456789]", "a-long-remark-on-it")
    _console._Console(file=out, width=60, force_terminal=True, color_system=None, markup=False).print(table)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    named = [row[1] for row in rows if row[1]]
    assert named == ["relnorm", "coordstd"] * (len(named) // 2)
    assert len(named) > 2


def test_a_path_stays_whole_and_settings_go_on_below():
    out, path, long = io.StringIO(), "runs/2026-01-01T00-00-00_tiny-llama_00000000", "alpha=0.1," * 9
    table = Table("path", "perturbation", "rows")
    table.add_row(path, long, "12")
    _console._Console(file=out, width=80, force_terminal=True, color_system=None, markup=False).print(table)
    lines = out.getvalue().splitlines()
    assert any(f" {path} " in line for line in lines)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in cells if row[0]] == ["1", "1"]  # a name so long is not repeated
    assert "".join(row[1] for row in cells[1:]) == long
    assert cells[1][-1] == "12"


@pytest.mark.parametrize("seed", range(60))
def test_every_word_of_a_table_of_any_kind_is_there_and_no_line_is_too_long(seed):
    rng, out = random.Random(seed), io.StringIO()
    table, words = Table(title="any"), []
    for number in range(rng.randint(1, 9)):
        table.add_column(f"h{number}", no_wrap=rng.random() < 0.3, justify=rng.choice(["left", "right"]))
    for _ in range(rng.randint(0, 3)):
        row = []
        for _ in table.columns:
            number = f"{rng.random():.{rng.randint(1, 8)}f}"
            text = " ".join(rng.choice("abc") * rng.randint(2, 9) for _ in range(rng.randint(1, 5)))
            row.append(rng.choice([number, text]))
            words += row[-1].split()
        table.add_row(*row)
    width = rng.choice([70, 80, 100, 120])
    _console._Console(file=out, width=width, force_terminal=True, color_system=None, markup=False).print(table)
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert {*words} <= {*out.getvalue().replace("│", " ").split()}


def test_no_command_sets_a_width_of_its_own():
    for file in Path(dynprobe.cli.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "console.width" not in text, file.name
        if file.name not in ("_console.py", "_progress.py"):  # standard error is no place for tables
            assert not re.search(r"(?<!_)\bConsole\(", text), file.name


def samples(reasons):
    return pd.DataFrame({
        "prompt_id": ["a", "b", "c"], "condition_id": "clean", "status": "ok", "kappa_phase": np.nan,
        "nll": [1.0, 2, 3], "reasons": reasons,
    })  # fmt: skip


def test_a_column_without_a_value_keeps_its_place_with_the_reason_of_most_rows():
    rows = samples([json.dumps({"kappa_phase": why}) for why in ("depth<2", "coverage", "depth<2")])
    entry = summarise(rows)["clean"]["kappa_phase"]
    assert np.isnan(entry["mean"])
    assert (entry["n"], entry["missing"], entry["reason"]) == (0, 3, "depth<2")
    assert entry["reasons"] == {"depth<2": 2, "coverage": 1}
    assert "kappa_phase" not in summarise(samples([None] * 3))["clean"]  # nothing was measured, so nothing is missing
    for mean in (float("nan"), None):  # as made, and as read from JSON
        assert _render._number({**entry, "mean": mean}, 4, False) == "– depth<2"


def test_remarks_are_dropped_also_where_no_regime_was_called():
    rows = pd.DataFrame({"limen_ratio": [1.0, 2.0], "reasons": [None, json.dumps({"limen_ratio": "steps<2"})]})
    kept = without_remarks(rows)
    assert kept["limen_ratio"].isna().tolist() == [False, True]
    assert list(kept.columns) == ["limen_ratio", "reasons"]
    called = without_remarks(rows.assign(limen_regime=["LOW", "HIGH"]))
    assert called["limen_regime"].isna().tolist() == [False, True]


def test_a_model_of_one_layer_says_why_it_has_no_kappa(cli, tmp_path):
    done = cli(
        "run", "--model", "panel/llama-depth1-width32-seed0", "--limit", "1", "--max-new-tokens", "2", "--perturb",
        "alpha=0.1", "--out", tmp_path, "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "κ phase" in done.out
    assert re.search(r"│ clean +│ +– depth<2 │", done.out)
    assert "expanded percentile bootstrap interval over prompts" in done.out
    run = open_run(next(tmp_path.glob("*depth1*")))
    assert run.summary["mean_intervals"] == "95 % expanded percentile bootstrap interval over prompts"
    assert f"again: dynprobe show {run.path}" in done.out


def test_intervals_of_older_runs_are_not_called_by_a_new_name():
    assert "did not record its kind" in _render_head.mean_intervals({"seconds": 1.0})
    assert _render_head.mean_intervals({}).startswith("95 % expanded percentile")  # a run that still goes on
    said = {"seconds": 1.0, "mean_intervals": "95 % other interval over prompts"}
    assert _render_head.mean_intervals(said, "items") == "95 % other interval over items"


@pytest.mark.parametrize(
    ("name", "test", "said"),
    [
        (
            "resume",
            {"passed": False, "value": 0.7612},
            "ok, by the slow road (all blocks run; the fast road would be 0.76 SD of the logits off and is not",
        ),
        ("resume", {"passed": False, "value": None}, "the fast road would fail and is not taken"),
        ("resume", {"passed": True, "value": 0.0}, "ok (0)"),
        ("alone", {"passed": False, "value": 0.5}, "FAILED (0.5)"),
    ],
)
def test_the_number_of_a_self_test_says_what_it_is(name, test, said):
    assert said in _render._verdict(name, test)


def test_headings_of_a_control_are_told_apart():
    headings = _render_grid._CONTROL_HEADINGS
    assert len(set(headings)) == len(headings)
    assert [h for h in headings if "perturbed" in h] == ["KL perturbed", "flips perturbed", "Δκ perturbed"]


def difference(tracks, grown):
    rows = pd.DataFrame({"condition_id": ["clean"] * len(grown), "growth_track": grown})
    return SimpleNamespace(samples=rows, depths=pd.DataFrame({"track": tracks}))


def test_growth_names_its_track_where_there_are_several():
    assert _render_diff._growing(difference(["resid"], ["resid", "resid"])) == {}
    assert _render_diff._growing(difference(["z_L", "z_H"], ["z_H", None])) == {"clean": " on z_H"}
    mixed = _render_diff._growing(difference(["z_L", "z_H"], ["z_H", "z_L", "z_H"]))
    assert mixed == {"clean": " on z_H (2), z_L (1)"}


def test_a_table_on_a_narrow_terminal_loses_no_digit():
    table = Table()
    for name in ("metric", "interval", "p"):
        table.add_column(name)
    table.add_row("kappa_phase_of_the_step", "[-0.07655, -0.07391]", "1.234e-05")
    screen = io.StringIO()
    _console._Console(file=screen, force_terminal=True, width=30, color_system=None).print(table)
    parts = [part.splitlines() for part in screen.getvalue().split("┏")[1:]]
    rows = [[line.split("│")[1:-1] for line in part if "│" in line] for part in parts]
    cells = [["".join(row[i].strip() for row in part) for i in range(len(part[0]))] for part in rows]
    assert cells == [["1", "kappa_phase_of_the_step"], ["1", "[-0.07655,-0.07391]", "1.234e-05"]]


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (0.1234567, "+0.1235"), (0.0012, "+0.0012"), (0.00053, "+0.00053"), (0.0001234, "+0.00012"),
        (-2.34e-7, "-2.3e-07"), (0.0, "+0.0000"),
    ],
)  # fmt: skip
def test_a_small_number_keeps_two_digits(mean, said):
    entry = {"mean": mean, "low": mean / 10, "high": mean * 2, "n": 4}
    assert _render._number(entry, 4, True).split("\n")[0] == said
    low = _render._number(entry, 4, True).split("\n")[1].split(" … ")[0]
    assert float(low) == pytest.approx(mean / 10, rel=0.05)


def test_a_small_number_without_an_interval_keeps_two_digits():
    assert _render._number({"mean": 0.00123}, 2, False) == "0.0012"
    assert _render._number({"mean": 1.5}, 2, False) == "1.50"


def test_tables_have_one_style_and_escape_codes_only_where_they_are_wanted(monkeypatch):
    import io

    from rich import box

    from dynprobe.cli import _console

    for variable, value, coloured in (("NO_COLOR", "1", False), ("TERM", "dumb", False), ("FORCE_COLOR", "1", True)):
        with monkeypatch.context() as patch:
            for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
                patch.delenv(name, raising=False)
            patch.setenv("TERM", "xterm")
            patch.setenv(variable, value)
            made = _console.console()
            made.file = io.StringIO()
            table = Table(title="t", box=box.SIMPLE_HEAD, title_justify="center")
            table.add_column("a", style="green")
            table.add_row("1")
            made.print(table)
            out = made.file.getvalue()
            assert ("\x1b[" in out) == coloured, variable
            assert "┏━━━┓" in out
            assert out.lstrip("\x1b[3m").startswith("t")


def test_no_command_styles_its_tables():
    for file in Path(dynprobe.cli.__file__).parent.glob("_render*.py"):
        assert not re.search(r"\bbox=|_justify=", file.read_text(encoding="utf-8")), file.name
