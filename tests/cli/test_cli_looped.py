"""What the commands say about loops: the model that has one, updates in place of layers, depths beyond the trained."""

import json

import pytest

from dynprobe.runs import open_run

TEXTS = ("--prompt", "In the beginning God created", "--prompt", "And the earth was", "--device", "cpu")


def test_iterate_without_a_model_takes_one_that_has_a_loop(cli, here):
    found = cli("iterate", *TEXTS, "--iterations", "2,31", "--json")
    assert found.code == 0, found.err
    assert found.err.startswith("no --model was named: using tiny-csm")
    assert "and has a loop" in found.err
    assert found.err.count("above the trained depth") == 1
    assert "dynprobe: warning: tiny-csm: T = 31 lies above the trained depth of 30 iterations" in found.err
    assert "UserWarning" not in found.err
    run = open_run(json.loads(found.out)["run"])
    assert run.manifest.model["model_id"] == "dynprobe/tiny-csm"
    assert run.summary["notes"] == ["T = 31 lies above the trained depth of 30 iterations"]


def test_layers_of_a_looped_model_are_updates(cli, here):
    found = cli("sweep", "--model", "tiny-csm", *TEXTS, "--layers", "40")
    assert found.code == 2
    assert "--layers 40 names no update of tiny-csm: it has loops, and --layers counts the 18 updates" in found.err
    assert "0…17; update 0 makes the state of depth 1, update 17 the last, of depth 18" in found.err


@pytest.mark.parametrize(
    ("alphas", "said"),
    [
        ("3:0.01:16", "'3:0.01:16' falls from 3 to 0.01; write low:high:number, the smaller strength first: 0.01:3:16"),
        ("3:0.01", "'3:0.01' lacks the number of strengths; write low:high:number, 0.01:3:16"),
    ],
)
def test_a_range_that_falls_is_turned_round(cli, model, here, alphas, said):
    found = cli("sweep", "--model", str(model), *TEXTS, "--alphas", alphas)
    assert found.code == 2
    assert said in found.err
