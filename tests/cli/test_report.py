"""``dynprobe report`` from the command line."""

import json
import shutil
from pathlib import Path


def test_a_page_is_written_and_its_path_told(cli, finished, here):
    run = shutil.copytree(finished, here / "run")
    done = cli("report", run, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    page = Path(told["report"])
    assert page == run / "report.html"
    assert page.stat().st_size == told["bytes"] < 15e6
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_wrong_questions_are_answered(cli, finished, here):
    done = cli("report", finished, "--out", "page.pdf")
    assert done.code == 2
    assert "a page ends in .html" in done.err
    assert cli("report", here / "nothing").code != 0
