"""``dynprobe attract`` from the command line."""

from __future__ import annotations

import json

import pytest

from dynprobe.cli import main

SMALL = [
    "--arms", "layer", "--strengths", "2", "--slots", "2", "--burn-in", "4", "--dose-texts", "1", "--dose-tokens", "8",
    "--max-new-tokens", "10", "--prompt", "The king called all his men to the hall.", "--quiet",
]  # fmt: skip


def test_tables_and_json(tmp_path, capsys):
    arguments = ["attract", *SMALL, "--out", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for word in ("dose: mean KL", "layer", "after 10 new tokens", "bare, sampled", "broken:", "warning"):
        assert word in shown
    assert main([*arguments, "--json"]) == 0  # the same run, found done
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["protocol"] == "attract"
    (path,) = tmp_path.iterdir()
    assert found["run"] == str(path)
    assert main(["show", str(path)]) == 0
    assert "attract generate" in capsys.readouterr().out
    assert main(["ls", str(tmp_path)]) == 0
    assert "layer at ε" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "reeding"], "reading"), (["--arms", "layers"], "layer"), (["--attractor", "slot=4"], "slots"),
        (["--task", "recall", "--prompt", "x"], "brings its own texts"), (["--doses", "0"], "positive"),
    ],
)  # fmt: skip
def test_usage_errors(arguments, said, capsys):
    assert main(["attract", *arguments, "--quiet"]) == 2
    assert said in capsys.readouterr().err
