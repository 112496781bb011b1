"""``dynprobe run --backend`` and ``--remote``."""

import json

import pytest

import dynprobe as dp

pytest.importorskip("nnsight")

WORDS = ("--prompt", "Hello there, friend", "--perturb", "alpha=0.2", "--out", "runs", "--device", "cpu")


def test_a_run_through_nnsight_prints_the_table_of_a_run_through_hooks(cli, model, here):
    hooked = cli("run", "--model", model, *WORDS, "--max-new-tokens", 3, "--json")
    traced = cli("run", "--model", model, *WORDS, "--max-new-tokens", 3, "--json", "--backend", "nnsight")
    assert (hooked.code, traced.code) == (0, 0)
    one, other = json.loads(hooked.out), json.loads(traced.out)
    assert one["run"] != other["run"]
    for a, b in zip(one["summary"]["conditions"].items(), other["summary"]["conditions"].items(), strict=True):
        assert a[0] == b[0]
        assert str(a[1]) == str(b[1])
    assert dp.open(here / other["run"]).manifest.config["backend"] == "nnsight"


def test_the_dry_run_of_the_remote_road(cli, model, here):
    done = cli("run", "--model", model, *WORDS, "--backend", "nnsight", "--remote-host", "local", "--max-new-tokens", 0)
    assert done.code == 0, done.err
    assert "perturbed.forced" in done.out
    assert "null ok (0)" in done.out
    (path,) = (here / "runs").glob("2*")
    assert dp.open(path).manifest.config["remote"] == "local"


def test_remote_without_a_key_says_what_to_type_and_prints_no_key(cli, here, monkeypatch):
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    words = ("run", "--model", "org/large", "--prompt", "Hello", "--backend", "nnsight", "--remote")
    refused = cli(*words, "--max-new-tokens", 0)
    assert refused.code == 2
    assert refused.out == ""
    for part in ("org/large", "none was found in NDIF_API_KEY", "export NDIF_API_KEY=…"):
        assert part in refused.err.replace("\n", " "), part
    usual = cli(*words)
    assert usual.code == 2
    assert "--max-new-tokens 0" in usual.err.replace("\n", " ")
    hooks = cli("run", "--model", "org/large", "--prompt", "Hello", "--remote")
    assert hooks.code == 2
    assert "--backend nnsight" in hooks.err.replace("\n", " ")
    wrong = cli("run", "--model", "org/large", "--prompt", "Hello", "--backend", "nnsite")
    assert wrong.code == 2
    assert "backend='nnsite'" in wrong.err
    assert not (here / "runs").exists()
