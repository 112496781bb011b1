"""``dynprobe run`` and ``plan``: flags, files, spellings, exit codes."""

import io
import json
import sys
import types

import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.probes import PerturbWriter

SHORT = ("--max-new-tokens", 2, "--out", "runs")


def one_run(folder):
    (path,) = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return dp.open(path)


def test_a_run_prints_what_it_took_and_what_came_out(cli, model, here):
    done = cli("run", "--model", model, "--prompt", "Hello [there]", "--perturb", "alpha=0.2", *SHORT)
    assert done.code == 0
    assert done.err == ""  # no progress where there is no terminal
    run = one_run(here / "runs")
    for part in (
        str(run.path.relative_to(here)), "tiny-llama, float32", "alpha=0.2,scale=relnorm,layers=50%,positions=1:",
        "share of each state's norm", "prompts 1 given in the call, chat template none, prefill + 2 new tokens, greedy",
        "κ phase", "perturbed.forced", "perturbed.free", "equal to clean, bit for bit", "self-tests: null ok (0)",
    ):  # fmt: skip
        assert part in done.out, part
    assert "Traceback" not in done.out
    again = cli("run", "--model", model, "--prompt", "Hello [there]", "--perturb", "alpha=0.2", *SHORT)
    assert (again.code, again.out) == (0, done.out)
    assert len(list((here / "runs").glob("2*"))) == 1


def test_json_is_one_object_without_nan(cli, model, here):
    done = cli("run", "--model", model, "--prompt", "Hi", "--perturb", "alpha=0.2", *SHORT, "--json")
    found = json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["status"] == "complete"
    assert found["summary"]["conditions"]["clean"]["kappa_phase"]["low"] is None  # one prompt has no interval
    assert dp.open(found["run"]).status == "complete"


def test_the_spellings_of_the_field_are_understood(cli, model, here):
    words = ["--perturb", "alpha=0.2", "--prompt", "Hello"]
    assert cli("run", "--model", model, *words, "--max-new-tokens", 2, "--out", "runs").code == 0
    same = cli(
        "run", "--model_args", f"pretrained={model},dtype=float32", *words, "--max_new_tokens", 2,
        "--output_path", "runs", "--batch_size", "auto", "--num_fewshot", 0, "--json",
    )  # fmt: skip
    assert json.loads(same.out)["run"] == str(one_run(here / "runs").path.relative_to(here))
    chat = cli("plan", "--model", model, *words, "--apply_chat_template", "--json")
    assert json.loads(chat.out)["samples"] == 4
    shots = cli("run", "--model", model, *words, "--num_fewshot", 3)
    assert (shots.code, shots.out) == (2, "")
    assert "task evaluation" in shots.err
    wrong = cli("run", "--model_args", f"pretraned={model}")
    assert wrong.code == 2
    assert "known keys: pretrained" in wrong.err


def test_a_config_file_is_read_and_flags_win(cli, model, here):
    (here / "run.yaml").write_text(
        f"model: {model}\nmax-new-tokens: 7\nperturb: alpha=0.2\nprompt: [Hello, World]\nbatch_size: 1\nout: elsewhere\n"
    )
    assert cli("run", "--config", "run.yaml", "--max-new-tokens", 1, "--out", "runs", "--quiet").code == 0
    run = one_run(here / "runs")
    assert run.manifest.config["max_new_tokens"] == 1
    assert run.manifest.config["batch_size"] == 1
    assert list(run.prompts["text"]) == ["Hello", "World"]
    assert not (here / "elsewhere").exists()
    for text, message in (
        ("modl: x", "unknown setting 'modl'. Did you mean 'model'?"), ("- x", "must be a mapping"),
        ("a: b: c", "is not YAML"), (f"model: {model}\nmax_new_tokens: many", "max_new_tokens='many'"),
        (f"model: {model}\nprompts: nowhere.txt", "There is no prompt file 'nowhere.txt'"),
    ):  # fmt: skip
        (here / "bad.yaml").write_text(text)
        found = cli("run", "--config", "bad.yaml")
        assert found.code == 2
        assert message in found.err
    assert cli("run", "--config", "none.yaml").code == 2


def test_prompts_come_from_files_and_from_standard_input(cli, model, here, monkeypatch):
    (here / "p.txt").write_text("First one\n\nSecond one\n")
    (here / "p.jsonl").write_text('{"text": "First one", "id": "a", "category": "x"}\n{"text": "Second", "id": "b"}\n')
    pd.DataFrame({"prompt": ["First one", "Second one"], "prompt_id": ["a", "b"]}).to_parquet(here / "p.parquet")
    base = ("run", "--model", model, "--max-new-tokens", 0, "--quiet")
    for name in ("p.txt", "p.jsonl", "p.parquet"):
        out = name.replace(".", "-")
        done = cli(*base, "--prompts", name, "--out", out)
        assert done.code == 0
        assert f"prompts 2 from {name}" in done.out
        run = one_run(here / out)
        assert list(run.prompts["text"])[0] == "First one"
        if name != "p.txt":
            assert list(run.prompts["prompt_id"]) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"From a pipe\nAnd more\n")))
    assert "prompts 2 from stdin" in cli(*base, "--prompts", "-", "--out", "piped").out
    both = cli(*base, "--prompts", "p.txt", "--prompt", "Third", "--limit", 3, "--out", "both")
    assert "prompts 3 from p.txt and given in the call" in both.out
    some = cli(*base, "--prompts", "p.jsonl", "--category", "x", "--out", "some")
    assert "prompts 1 from p.jsonl, x" in some.out


def test_prompts_that_cannot_be_used(cli, model, here):
    (here / "empty.txt").write_text("\n \n")
    (here / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    for words, message in (
        (("--prompts", "empty.txt"), "has no prompts in it"), (("--prompts", "emptyy.txt"), "Did you mean 'empty.txt'"),
        (("--prompts", "bad.jsonl"), "line 2"), (("--prompts", here), "is a folder"), (("--prompt", " "), "is empty"),
        (("--category", "fact"), "there are: code, dialogue"), (("--limit", 0), "limit=0"),
    ):  # fmt: skip
        found = cli("run", "--model", model, *words, "--out", "runs")
        assert (found.code, found.out) == (2, ""), words
        assert message in found.err
    assert not (here / "runs").exists()


def test_a_plan_runs_nothing(cli, model, here):
    words = ("--model", model, "--prompt", "Hello", "--perturb", "alpha=0.1", "--out", "runs")
    table, dry = cli("plan", *words), cli("run", *words, "--dry-run")
    assert table.code == dry.code == 0
    for part in ("rows of samples", "rows of depths", "time after loading"):
        assert part in table.out
        assert part in dry.out
    assert json.loads(cli("plan", *words, "--json").out)["token_rows"] == (5 + 31) * 3
    assert not (here / "runs").exists()


def test_stdin_of_flags_for_directions(cli, model, here):
    words = ("run", "--model", model, "--prompt", "Hello", "--prompt", "World", "--max-new-tokens", 0, "--quiet")
    done = cli(
        *words, "--perturb", "alpha=2,kind=direction,layers=1", "--contrast", "I love it", "I hate it", "--out", "a"
    )
    assert done.code == 0
    assert one_run(here / "a").manifest.config["contrast"] == ["I love it", "I hate it"]
    (here / "spec.yaml").write_text("- alpha: 0.1\n  layers: 0\n- alpha: 0.2\n  layers: 2\n  seed: 4\n")
    assert cli(*words, "--perturb", "@spec.yaml", "--out", "b").code == 0
    assert [p[:9] for p in one_run(here / "b").manifest.config["perturb"]] == ["alpha=0.1", "alpha=0.2"]
    assert cli(*words, "--perturb", "alpha=0.1,layers=0", "--perturb", "alpha=0.1,layers=1", "--out", "c").code == 0
    assert len(one_run(here / "c").manifest.config["perturb"]) == 2


def test_an_interrupt_is_130_and_the_same_command_continues(cli, model, here, monkeypatch):
    from dynprobe.protocols import _run

    words = ("run", "--model", model, "--prompt", "Hello", "--prompt", "World", "--batch-size", 1, *SHORT)
    honest = _run.BatchRunner.run

    def interrupted(self, batch):
        if list(batch) == [1]:
            raise KeyboardInterrupt
        return honest(self, batch)

    monkeypatch.setattr(_run.BatchRunner, "run", interrupted)
    stopped = cli(*words)
    assert stopped.code == 130
    assert stopped.err.startswith("dynprobe: interrupted; the same command continues")
    assert "Traceback" not in stopped.err
    run = one_run(here / "runs")
    assert run.status == "interrupted"
    shown = cli("show", run.path)
    assert "status interrupted: 1 batches finished; the same command continues it" in shown.out
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert cli(*words).code == 0
    assert one_run(here / "runs").status == "complete"


def test_an_interrupt_while_loading_is_130_too(cli, model, monkeypatch):
    from dynprobe.protocols import _run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "prepare", interrupted)
    assert cli("run", "--model", model).code == 130


def test_a_refused_self_test_is_3_and_leaves_nothing(cli, model, here, monkeypatch):
    monkeypatch.setattr(PerturbWriter, "write", lambda self, state, site, step: state + 1e-6)
    found = cli("run", "--model", model, "--prompt", "Hello", "--perturb", "alpha=0.1", *SHORT)
    assert (found.code, found.out) == (3, "")
    assert found.err.startswith("dynprobe: self-test null failed")
    assert not (here / "runs").exists()


def test_the_table_says_which_rows_did_not_go_as_asked(cli, model, here):
    words = ("run", "--model", model, "--prompt", "Hello", "--prompt", "A longer one", "--max-new-tokens", 0, "--quiet")
    far = cli(*words, "--perturb", "alpha=90,scale=isokl", "--out", "a")
    assert "perturbed.forced: 2 of 2 texts did not reach the KL at any strength" in far.out
    late = cli(*words, "--perturb", "alpha=0.1,positions=8:", "--out", "b")
    assert "perturbed.forced: 1 of 2 texts had no position to write at" in late.out
