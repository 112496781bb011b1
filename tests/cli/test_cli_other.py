"""The commands beside ``run``, help, and how the program behaves in a shell."""

import json

import dynprobe as dp
from dynprobe import metrics


def test_show(cli, finished):
    shown = cli("show", finished)
    assert shown.code == 0
    assert "perturbed.forced" in shown.out
    assert "prompts 3 given in the call" in shown.out
    data = json.loads(cli("show", finished, "--json").out)
    assert data["status"] == "complete"
    assert data["manifest"]["config"]["max_new_tokens"] == 3
    columns = cli("show", finished, "--columns")
    assert columns.code == 0
    assert "kappa.phase/1" in columns.out


def test_a_run_is_shown_by_the_id_that_ls_prints(cli, finished, here, monkeypatch):
    import shutil

    monkeypatch.chdir(here)
    name = dp.open(finished).manifest.id8
    assert "There is no run folder" in cli("show", name).err  # and no folder of runs to look in
    shutil.copytree(finished, here / "runs" / "one")
    assert "perturbed.forced" in cli("show", name).out
    assert "There is no run folder" in cli("show", "00000000").err


def test_an_unfinished_run_says_so(cli, finished, here):
    import shutil

    half = shutil.copytree(finished, here / "half")
    manifest = json.loads((half / "manifest.json").read_text())
    (half / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted", "seal": None}))
    (half / "summary.json").unlink()
    assert "status interrupted: 1 of 1 batches finished; the command that made it continues it" in cli("show", half).out
    assert "continues it" not in cli("show", finished).out
    wrong = cli("show", half, "--figure", "f.xyz")
    assert wrong.code == 2
    assert "f.xyz" in wrong.err


def test_colour_is_for_terminals_that_want_it(finished, monkeypatch):
    import io

    from dynprobe.cli._console import console as new_console

    for variable, coloured in (("FORCE_COLOR", True), ("NO_COLOR", False)):
        monkeypatch.setenv("FORCE_COLOR", "1")  # stands for a terminal
        monkeypatch.setenv(variable, "1")
        console = new_console()
        console.file = io.StringIO()
        console.print("red [bold]", style="red")
        assert ("\x1b[31m" in console.file.getvalue()) == coloured
        assert "red [bold]" in console.file.getvalue()


def test_ls(cli, finished, here):
    found = cli("ls", finished.parent)
    assert found.code == 0
    assert dp.open(finished).manifest.id8 in found.out
    rows = json.loads(cli("ls", finished.parent, "--json").out)
    assert [r["status"] for r in rows] == ["complete"]
    (here / "none").mkdir()
    assert "no runs in none" in cli("ls", "none").out


def test_metrics_are_printed_whole(cli):
    text, again = cli("metrics").out, cli("show", "--metrics").out
    assert text == again
    data = json.loads(cli("metrics", "--json").out)
    assert [d["id"] for d in data] == list(metrics.ids())
    for name in metrics.ids():
        spec = metrics.spec(name)
        assert name in text
        assert " ".join(spec.formula.split()) in text  # square brackets are no markup
        assert spec.digest in text
        assert spec.unit in text
    assert "trajectory[depth,unit,dim]" in text


def test_doctor(cli, model):
    found = cli("doctor", model)
    assert found.code == 0
    for part in ("null", "alone", "resume", "fired", "readout", "model.layers.*", "self_attn", "files-sha256:"):
        assert part in found.out
    data = json.loads(cli("doctor", model, "--json").out)
    assert data["healthy"] is True
    assert data["checks"]["null"]["value"] == 0


def test_calibrate(cli, model, here):
    found = cli("calibrate", model)
    assert found.code == 0
    assert "36 prompts" in found.out
    assert "limen_ct" in found.out
    header = json.loads(cli("calibrate", model, "--json").out)
    assert header["hash"] in found.out
    (here / "mine.txt").write_text("A text of my own to calibrate with\nand a second one\n")
    mine = json.loads(cli("calibrate", model, "--prompts", "mine.txt", "--cov-layers", "0:2", "--json").out)
    assert mine["n_prompts"] == 2
    assert mine["cov_depths"] == [1, 2]
    assert mine["hash"] != header["hash"]


def test_bare_program_prints_help_and_version(cli):
    assert "One model:\n  run " in cli().out
    assert cli("--version").out == f"dynprobe {dp.__version__}\n"


def test_progress_on_a_terminal():
    """The listener by itself: stages, rates, one early table."""
    import io

    from rich.console import Console

    from dynprobe.cli._progress import Listener
    from dynprobe.protocols import Progress

    screen = io.StringIO()
    listener = Listener()
    listener._console = Console(file=screen, force_terminal=True, width=120)
    listener._on = True
    with listener:
        listener(Progress("load"))
        listener(Progress("batch", 1, 3))
        early = {"clean": {"samples": 4, "kappa_phase": {"mean": 0.25, "low": None, "high": None, "n": 4}}}
        listener(Progress("batch", 1, 3, summary=early))
        listener(Progress("batch", 2, 3, rows=8, tokens=100, seconds=2.0))
        assert "4.0 rows/s" in str(listener._status.status)
        assert "50 tokens/s" in str(listener._status.status)
        assert "2 s left" in str(listener._status.status)  # one batch took 2 s here; the other was found finished
        listener(Progress("done", 3, 3, notes=("already done: runs/x",)))
    assert "so far: the forced arms of 4" in screen.getvalue()
    assert "0.2500" in screen.getvalue()
    assert "already done: runs/x" in screen.getvalue()


def test_one_metric_in_full(cli):
    text = cli("metrics", "kappa.geom/1{W=16}").out
    spec = metrics.spec("kappa.geom/1")
    for piece in (spec.sentence, spec.formula, spec.input, spec.value_range, spec.source, spec.digest, *spec.vectors):
        assert " ".join(piece.split()) in text
    assert "W = 16" in text
    assert "kappa_geom_w16" in text
    assert "R_l: rotation per depth" in text
    found = json.loads(cli("metrics", "erank.rv/1", "--json").out)
    assert (found["id"], found["params"], found["column"]) == ("erank.rv/1", {"centre": "none"}, "erank")
    missed = cli("metrics", "erank.rw/1")
    assert missed.code == 2
    assert "erank.rv/1" in missed.err
