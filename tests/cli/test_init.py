"""``init``: an untouched file says what the bare command says, for every protocol."""

import pytest
import yaml

from dynprobe import protocols
from dynprobe.cli._init_commands import PROTOCOLS, template

#: Words beside the bare command that make it small, and settings that it cannot do without.
SMALL = {
    "run": ["--limit", "2", "--max-new-tokens", "2"],
    "sweep": ["--limit", "2"],
    "threshold": ["--limit", "2", "--scale", "relnorm", "--n-boot", "200"],
    "iterate": ["--limit", "2"],
    "recover": ["--limit", "2", "--max-new-tokens", "8"],
    "attract": ["--limit", "1", "--max-new-tokens", "24", "--lengths", "12", "--dose-texts", "1", "--doses", "0.3"],
    "dissociate": ["--limit", "6", "--alphas", "0,1"],
    "eval": ["--limit", "2"],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_untouched_file_holds_the_defaults(protocol, tmp_path):
    kind = getattr(protocols, PROTOCOLS[protocol][0])
    text = template(protocol)
    settings = yaml.safe_load(text)
    assert max(map(len, text.splitlines())) <= 120
    if protocol == "panel":
        (tmp_path / "panel.yaml").write_text(text)
        models = ["tiny-llama", "tiny-cem"]
        assert protocols.read_panel(tmp_path / "panel.yaml") == kind.build({"models": models})
        assert settings.keys() == kind.model_fields.keys()
        return
    (tmp_path / "file.yaml").write_text(text)
    read = protocols.load_config(tmp_path / "file.yaml", kind)
    said, bare = kind.build(**read), kind.build()
    different = {n for n in kind.model_fields if getattr(said, n) != getattr(bare, n)}
    # A task must be named, and recover's function brings the perturbation that its settings leave to it.
    assert different == {"eval": {"tasks"}, "recover": {"perturb"}}.get(protocol, set())


def test_every_setting_has_its_meaning_above_it():
    lines = template("run").splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
            assert len(lines[number - 1]) > 8


def test_a_file_is_written_once_and_never_over_another(cli, here):
    done = cli("init")
    assert done.code == 0
    assert "run.yaml" in done.out
    assert "dynprobe run --config run.yaml" in done.out
    (here / "run.yaml").write_text("limit: 1\n")
    refused = cli("init", "run.yaml")
    assert refused.code == 1
    assert "--force" in refused.err
    assert (here / "run.yaml").read_text() == "limit: 1\n"
    assert cli("init", "run.yaml", "--force", "--quiet").out == ""
    assert (here / "run.yaml").read_text() == template("run")
    assert cli("init", "-", "--for", "sweep").out == template("sweep")
    assert sorted(p.name for p in here.iterdir()) == ["run.yaml"]


def test_a_file_in_a_folder_that_is_not_there_is_refused(cli, here):
    (here / "settings").mkdir()
    refused = cli("init", "setings/x.yaml")
    assert refused.code == 1
    assert "there is no folder setings. Did you mean 'settings'?" in refused.err
    assert not (here / "setings").exists()


@pytest.mark.parametrize("protocol", [p if p == "run" else pytest.param(p, marks=pytest.mark.slow) for p in SMALL])
def test_the_untouched_file_and_the_bare_command_are_one_run(protocol, cli, here):
    assert cli("init", "settings.yaml", "--for", protocol).code == 0
    words = ["--tasks", "dynprobe_cloze"] if protocol == "eval" else []
    bare = cli(protocol, *words, *SMALL[protocol], "--quiet")
    assert bare.code == 0, bare.err
    again = cli(protocol, "--config", "settings.yaml", *SMALL[protocol], "--quiet")
    assert again.code == 0, again.err
    runs = [p for p in (here / "runs").iterdir() if (p / "manifest.json").exists()]
    assert len(runs) == 1  # the same id8: the second found the first one done
