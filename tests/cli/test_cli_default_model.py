"""With no ``--model`` the small model of the package is used, and said so on standard error."""

import json

from dynprobe.runs import open_run

SMALL = ("--limit", "2", "--max-new-tokens", "2", "--device", "cpu")


def test_run_without_a_model_uses_the_one_that_comes_along(cli, here):
    found = cli("run", *SMALL, "--perturb", "alpha=0.1", "--json")
    assert found.code == 0, found.err
    assert found.err.startswith("no --model was named: using tiny-llama")
    run = open_run(json.loads(found.out)["run"])
    assert run.manifest.model["model_id"] == "dynprobe/tiny-llama"
    rows = run.samples.merge(run.conditions[["condition_id", "arm"]], on="condition_id")
    clean = rows.loc[rows["arm"] == "clean", "nll"]
    assert len(clean) == 2
    assert clean.between(0.1, 5.0).all()


def test_quiet_keeps_the_note_back(cli, here):
    found = cli("plan", *SMALL, "--json")
    assert "using tiny-llama" in found.err
    assert found.code == 0
    assert "using tiny-llama" not in cli("run", *SMALL, "--dry-run", "--quiet", "--json").err


def test_a_model_that_is_named_is_not_replaced(cli, model, here):
    found = cli("plan", "--model", str(model), *SMALL, "--json")
    assert found.code == 0
    assert "tiny-llama" not in found.err
