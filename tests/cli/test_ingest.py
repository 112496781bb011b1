"""``import`` and ``validate`` in this process; the printed template is run word for word."""

import json

import numpy as np
import pytest

import dynprobe as dp


@pytest.fixture
def states(here):
    x = 0.5 ** np.arange(8.0)[:, None, None] * np.random.default_rng(0).normal(size=(1, 16, 4))
    np.savez(here / "states.npz", states=x.astype(np.float32), meta=json.dumps({"model": "mine"}))
    return "states.npz"


def test_the_template_runs_as_printed(cli, here):
    printed = cli("import", "--template")
    assert printed.code == 0
    assert "dynprobe" not in "".join(line.partition("#")[0] for line in printed.out.splitlines())
    assert len(printed.out.splitlines()) < 25
    exec(compile(printed.out, "template", "exec"), {})  # the test is that exactly this text runs
    checked = json.loads(cli("validate", "states.npz", "--json").out)
    assert checked["valid"]
    assert checked["dims"] == {"iter": 11, "batch": 2, "pos": 3, "state": 16, "dim": 32}
    assert checked["remarks"] == []
    made = cli("import", "states.npz")
    assert made.code == 0, made.err
    (folder,) = (here / "runs").iterdir()
    run = dp.open(folder)
    assert run.manifest.model_name == "my-model"
    assert run.samples["converge_rho"].to_numpy() == pytest.approx([0.5, 0.5])


def test_validate_says_what_is_there_and_what_is_missing(cli, states):
    said = cli("validate", states)
    assert said.code == 0
    for words in ("valid", "8 iter", "16 state", "float32", "8 iterations, 0 … 7", "model=mine", "energy: none"):
        assert words in said.out
    assert "ids: samples are called s0" in said.out


def test_a_bad_file_leaves_with_2(cli, here):
    np.savez(here / "bad.npz", states=np.full((4, 2, 3), np.nan))
    for command in ("validate", "import"):
        said = cli(command, "bad.npz")
        assert said.code == 2
        assert "nan at iter=0, state=0, dim=0" in said.err
    data = json.loads(cli("validate", "bad.npz", "--json").out)
    assert data["valid"] is False
    assert "nan at" in data["error"]
    assert not (here / "runs").exists()
    assert cli("validate", "bda.npz").code == 2
    assert "Did you mean 'bad.npz'?" in cli("validate", "bda.npz").err


def test_import_prints_the_run(cli, states, here):
    made = cli("import", states, "--name", "another")
    assert made.code == 0
    assert "another, no weights; states of states.npz" in made.out
    assert "κ phase" in made.out
    assert "contraction 0.5 per update" in made.out
    assert "converge_iterations_influence_block: 1 iterations, 1 of 1 samples" in made.out
    (folder,) = (here / "runs").iterdir()
    assert "imported from states.npz (trajectory file: full trajectory)" in cli("show", folder).out
    assert "no weights; states of states.npz" in cli("show", folder).out
    assert "import" in cli("ls").out
    data = json.loads(cli("import", states, "--name", "another", "--json").out)
    assert data["run"].endswith(folder.name)
    assert data["summary"]["protocol"] == "import"
    assert cli("import", states, "--quiet", "--out", "elsewhere").out == ""
    assert "dynprobe import states.npz" in (folder / "README.md").read_text()


def test_import_needs_a_file_or_the_template(cli, states):
    assert "import --template" in cli("import").err
    assert cli("import").code == 2
    assert cli("import", states, "--template").code == 2
    assert cli("import", states, "--track", "H").code == 2
