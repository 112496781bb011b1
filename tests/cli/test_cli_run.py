"""``dynprobe run`` and ``plan``: flags, files, spellings, exit codes."""

import io
import json
import sys
import types
from datetime import datetime, timedelta

import pytest

import dynprobe as dp
from dynprobe.probes import PerturbWriter

SHORT = ("--max-new-tokens", 2, "--out", "runs")


def one_run(folder):
    (path,) = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return dp.open(path)


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=1)


def test_a_run_prints_what_it_took_and_what_came_out(cli, model, here, monkeypatch):
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
    words = ["run", "--model", str(model), "--prompt", "Hello [there]", "--perturb", "alpha=0.2", *map(str, SHORT)]
    assert run.manifest.command == ["dynprobe", *words]
    assert dp.run(model, ["Hello"], max_new_tokens=0, out=here / "python").manifest.command is None
    assert "finished already" not in done.out
    monkeypatch.setattr("dynprobe.cli._progress.datetime", Tomorrow)
    again = cli("run", "--model", model, "--prompt", "Hello [there]", "--perturb", "alpha=0.2", *SHORT)
    said = f"        was finished already ({run.manifest.updated}); nothing ran again\n"
    assert said in again.out
    assert (again.code, again.out.replace(said, "")) == (0, done.out)
    assert len(list((here / "runs").glob("2*"))) == 1


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
        f"model: {model}\nmax-new-tokens: 7\nperturb: alpha=0.2\nprompt: [Hello, World]\nout: elsewhere\n"
    )
    assert json.loads(cli("plan", "--config", "run.yaml", "--max-new-tokens", 1, "--json").out)["token_rows"] == 3 * 10
    for text, message in (
        ("modl: x", "unknown setting 'modl'. Did you mean 'model'?"), ("- x", "must be a mapping"),
        ("a: b: c", "is not YAML"), (
            f"model: {model}\nmax_new_tokens: many",
            "config file bad.yaml, line 2: max_new_tokens='many': expected a whole number",
        ),
        (f"model: {model}\nlimit: 0", "line 2: limit=0: expected a number of at least 1"),
        (f"model: {model}\ntop-p: 3", "line 2: top_p=3: "), ("quiet: maybe", "quiet='maybe': expected true or false"),
        (f"model: {model}\naddress: auto", "line 2: address='auto': engine='local' does not take it"),

        (f"model: {model}\nprompts: nowhere.txt", "There is no prompt file 'nowhere.txt'"),
    ):  # fmt: skip
        (here / "bad.yaml").write_text(text)
        found = cli("run", "--config", "bad.yaml")
        assert found.code == 2
        assert message in found.err
    assert cli("run", "--config", "none.yaml").code == 2
    (here / "bad.yaml").write_text(f"model: {model}\nlimit: 0\n")
    typed = cli("run", "--config", "bad.yaml", "--limit", "-1")  # the flag is to blame, and has no line
    assert typed.err == "dynprobe: limit=-1: expected a number of at least 1\n"


def test_metrics_that_were_asked_for_are_printed(cli, model, here):
    words = ["--metrics", "erank.stable/1", "--metrics", "line.shape/1", "--perturb", "alpha=0.5"]
    texts = [word for text in ("Hello there", "And so on", "Third one") for word in ("--prompt", text)]
    done = cli("run", "--model", model, *texts, *words, *SHORT)
    table = done.out.split("asked with --metrics")[1].split("means; in brackets")[0]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    lines = {row[0]: row for row in rows if row[0]}
    assert set(lines) == {"erank_stable", "erank_stable_d", "line_shape", "line_shape_d"}
    run = one_run(here / "runs")
    means = run.sql("select condition_id, avg(erank_stable) m, avg(erank_stable_d) d from samples group by 1")
    means = means.set_index("condition_id")
    assert lines["erank_stable"][1] == "erank.stable/1"
    assert float(lines["erank_stable"][3]) == pytest.approx(means.loc["clean", "m"], rel=1e-3)
    assert float(lines["erank_stable"][4]) == pytest.approx(means.loc["perturbed.forced", "m"], rel=1e-3)
    assert lines["erank_stable_d"][3] == "–"
    assert float(lines["erank_stable_d"][4]) == pytest.approx(means.loc["perturbed.forced", "d"], rel=1e-2)
    assert "in table 'profiles': erank_stable" in done.out
    assert "asked with" not in cli("run", "--model", model, *texts, *SHORT).out
    few = cli("run", "--model", model, "--prompt", "Hello there", *words, *SHORT)  # one prompt has no interval
    assert (few.code, few.err) == (0, "")
    assert "│ erank_stable " in few.out


def test_prompts_come_from_files_and_from_standard_input(cli, model, here, monkeypatch):
    (here / "p.txt").write_text("First one\n\nSecond one\n")
    (here / "p.jsonl").write_text('{"text": "First one", "id": "a", "category": "x"}\n{"text": "Second", "id": "b"}\n')
    base = ("run", "--model", model, "--max-new-tokens", 0, "--quiet")
    done = cli(*base, "--prompts", "p.jsonl", "--out", "ids")
    assert "prompts 2 from p.jsonl" in done.out
    prompts = one_run(here / "ids").prompts
    assert list(prompts["text"]) == ["First one", "Second"]
    assert list(prompts["prompt_id"]) == ["a", "b"]
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


def test_directions_files_and_several_perturbations(cli, model, here):
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
    assert "perturbed.forced: 1 of 2 texts had no state that could be written" in late.out
