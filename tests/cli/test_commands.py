"""The command line as a user meets it: exit codes, one-line errors, spellings of the field."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynprobe.cli import main
from dynprobe.testing import save_tiny_model


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = os.environ.get("DYNPROBE_CACHE")
    os.environ["DYNPROBE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("DYNPROBE_CACHE")
    if before is not None:
        os.environ["DYNPROBE_CACHE"] = before


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """One finished run and the words that made it."""
    out = tmp_path_factory.mktemp("runs")
    words = [
        "run",
        "--model",
        model,
        "--perturb",
        "alpha=0.2",
        "--prompt",
        "Hello there",
        "--prompt",
        "A longer one here",
    ]
    words += ["--max-new-tokens", "4", "--out", str(out), "--quiet"]
    assert main(words) == 0
    (folder,) = [p for p in out.iterdir() if p.is_dir()]
    return folder, words


def refused(capsys, *words, code=2):
    """Run a command that must fail; return its message after checking that it is one and not a traceback."""
    assert main(list(words)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dynprobe: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_run_prints_unit_site_and_prompts(done, capsys):
    folder, words = done
    assert main([w for w in words if w != "--quiet"]) == 0  # finished already: printed again, not run again
    out = capsys.readouterr().out
    assert "‖u‖/‖h‖ = α" in out
    assert "scale=relnorm,layers=50%,positions=1:" in out
    assert "prompts 2 given in the call" in out
    assert "perturbed.forced" in out
    assert "null ok (0)" in out
    assert len(list(folder.parent.glob("*_*"))) == 1


def test_json_is_one_object_without_nan(done, capsys):
    _, words = done
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert found["status"] == "complete"
    assert set(found["summary"]["conditions"]) == {"clean", "sham", "perturbed.forced", "perturbed.free"}


def test_underscores_and_other_tools_spellings_are_understood(done, capsys):
    folder, words = done
    swap = {"--max-new-tokens": "--max_new_tokens", "--out": "--output_path"}
    words = [swap.get(w, w) for w in words]
    at = words.index("--model")
    words[at : at + 2] = ["--model_args", f"pretrained={words[at + 1]},dtype=float32"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(folder)


def test_a_config_file_serves_and_flags_win(model, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\nmax-new-tokens: 9\nprompt: [Hello]\nout: {tmp_path / 'runs'}\n")
    assert main(["run", "--config", str(config), "--max-new-tokens", "2", "--json"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["run"])
    settings = json.loads((folder / "manifest.json").read_text())["config"]
    assert (settings["max_new_tokens"], settings["prompt"]) == (2, ["Hello"])
    config.write_text("max_new_token: 9\n")
    assert "Did you mean 'max_new_tokens'?" in refused(capsys, "run", "--model", model, "--config", str(config))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "stdin"])
def test_prompts_come_from_files_and_standard_input(kind, model, tmp_path, capsys, monkeypatch):
    texts = ["One here", "Two there"]
    path = tmp_path / f"prompts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif kind == "parquet":
        import pandas as pd

        pd.DataFrame({"text": texts}).to_parquet(path)
    else:
        path.write_text("\n".join(texts) + "\n")
    if kind == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes()), encoding="utf-8"))
    name = "-" if kind == "stdin" else str(path)
    words = [
        "run",
        "--model",
        model,
        "--prompts",
        name,
        "--max-new-tokens",
        "0",
        "--out",
        str(tmp_path / "runs"),
        "--json",
    ]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["conditions"]["clean"]["samples"] == 2


def test_dry_run_and_plan_write_nothing(model, tmp_path, capsys):
    words = ["--model", model, "--perturb", "alpha=0.1", "--out", str(tmp_path / "runs"), "--json"]
    assert main(["run", *words, "--dry-run"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["plan", *words]) == 0
    other = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert one["samples"] == 24 * 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rum"], "Did you mean 'run'?"),
        (["run", "--modle", "x"], "--model"),
        (["run"], "--model smollm2-135m"),
        (["run", "--model", "MODEL", "--perturb", "alpha=0.1,scale=relnrom"], "Did you mean 'relnorm'?"),
        (["run", "--model", "MODEL", "--perturb", "alpha=0.1,layers=99"], "0…2"),
        (["run", "--model", "MODEL", "--perturb", "layers=1"], "alpha, the strength, is missing"),
        (["run", "--model", "MODEL", "--perturb", "alpha=0.1,kind=direction"], "--direction FILE or --contrast"),
        (["run", "--model", "MODEL", "--batch-size", "many"], "number or 'auto'"),
        (["run", "--model", "MODEL", "--temperature", "-1"], "temperature"),
        (["run", "--model", "MODEL", "--dtype", "float8"], "dtype"),
        (["run", "--model", "MODEL", "--num-fewshot", "3"], "--num-fewshot"),
        (["run", "--model", "MODEL", "--category", "poetry"], "poetry"),
        (["run", "--model", "MODEL", "--prompts", "none.txt"], "none.txt"),
        (["run", "--model", "MODEL", "--where", "layers=9", "--states"], "0…2"),
        (["show"], "dynprobe ls"),
    ],
)
def test_usage_errors_say_what_to_type(words, expected, model, tmp_path, capsys):
    words = [model if w == "MODEL" else w for w in words]
    out = ["--out", str(tmp_path / "runs")] if words[0] == "run" else []
    assert expected in refused(capsys, *words, *out)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*_*"))


def test_a_mistake_in_the_mini_language_is_pointed_at(model, tmp_path, capsys):
    text = "alpha=0.1,layrs=3"
    message = refused(capsys, "run", "--model", model, "--perturb", text, "--out", str(tmp_path))
    lines = message.splitlines()
    assert lines[-2].strip() == text
    assert lines[-1].index("^") - (len(lines[-2]) - len(lines[-2].lstrip())) == text.index("layrs")


def test_what_is_no_model_is_named(tmp_path, capsys):
    assert "config.json" in refused(capsys, "run", "--model", str(tmp_path), "--out", str(tmp_path / "r"), code=1)
    assert "No model at" in refused(capsys, "doctor", str(tmp_path / "none"), code=1)


def test_an_empty_prompt_file_is_refused_before_anything_is_written(model, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    message = refused(capsys, "run", "--model", model, "--prompts", str(empty), "--out", str(tmp_path / "runs"))
    assert str(empty) in message
    assert not (tmp_path / "runs").exists()


def test_an_unreachable_hub_is_said_within_eight_seconds(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://192.0.2.1:9", "HF_HUB_OFFLINE": "0"}
    begun = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-m", "dynprobe", "run", "--model", "gpt2", "--out", str(tmp_path / "runs")],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert time.monotonic() - begun < 8 + 4  # the interpreter's own start on a busy machine is not the lookup
    assert found.returncode == 1
    assert found.stderr.startswith("dynprobe: ")
    assert "Traceback" not in found.stderr
    assert "smollm2-135m" in found.stderr


def test_a_full_disk_is_said_and_nothing_is_half_written(model, tmp_path, capsys, monkeypatch):
    real, count = os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    words = [
        "run",
        "--model",
        model,
        "--prompt",
        "Hello there",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "runs"),
    ]
    message = refused(capsys, *words, "--quiet", code=1)
    assert "No space left" in message or "full" in message
    monkeypatch.setattr(os, "fsync", real)
    listed = {part["path"] for m in tmp_path.rglob("manifest.json") for part in json.loads(m.read_text())["parts"]}
    assert main([*words, "--json"]) == 0  # with space again the same command continues
    folder = Path(json.loads(capsys.readouterr().out)["run"])
    assert listed <= {str(p.relative_to(folder)) for p in folder.rglob("*.parquet")}
    assert not list(folder.rglob("*.tmp*"))


def test_interruption_leaves_130_and_the_same_command_continues(model, tmp_path, capsys, monkeypatch):
    from dynprobe.protocols import _batch

    words = [
        "run",
        "--model",
        model,
        "--perturb",
        "alpha=0.2",
        "--batch-size",
        "1",
        "--prompt",
        "One",
        "--prompt",
        "Two more",
    ]
    words += ["--max-new-tokens", "3", "--out", str(tmp_path / "runs"), "--quiet"]
    real, calls = _batch.BatchRunner.run, []

    def stop_at_second(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(_batch.BatchRunner, "run", stop_at_second)
    assert main(words) == 130
    assert "continues" in capsys.readouterr().err
    assert main(words) == 0
    assert len(calls) == 3  # the first batch was not run again
    assert main(["ls", str(tmp_path / "runs"), "--json"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out[out.rindex("[\n {") :])
    assert row["status"] == "complete"


def test_doctor_prints_its_numbers_and_fails_with_three(model, capsys, monkeypatch):
    assert main(["doctor", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checks"]["null"]["value"] == 0.0
    assert set(found["checks"]) == {"null", "alone", "resume", "fired", "readout"}
    assert all(check["passed"] for check in found["checks"].values())
    assert main(["doctor", model]) == 0
    assert "model.layers.* (3 × LlamaDecoderLayer)" in capsys.readouterr().out

    from dynprobe.probes import _writers

    monkeypatch.setattr(_writers, "apply", lambda h, u, mask: h * 1.0000001)
    assert main(["doctor", model]) == 3
    assert "null" in capsys.readouterr().err


def test_show_prints_a_run_its_columns_and_its_figure(done, tmp_path, capsys):
    folder, _ = done
    assert main(["show", str(folder)]) == 0
    assert "perturbed.forced" in capsys.readouterr().out
    assert main(["show", str(folder), "--columns"]) == 0
    assert "kappa.phase/1" in capsys.readouterr().out
    assert main(["show", str(folder), "--figure", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_printed_with_everything_that_defines_them(capsys):
    from dynprobe import metrics

    assert main(["metrics"]) == 0
    text = capsys.readouterr().out
    assert main(["show", "--metrics"]) == 0
    assert capsys.readouterr().out == text
    for name in metrics.ids():
        assert name in text
        assert metrics.spec(name).digest in text


def test_calibrate_prints_quantiles(model, capsys):
    assert main(["calibrate", model, "--cov-layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "limen_ct" in out
    assert "q90" in out


def test_unknown_names_are_refused_with_a_neighbour(capsys):
    assert "smollm2-135m" in refused(capsys, "fetch", "smollm2-135", code=1)


@pytest.mark.parametrize("command", ["run", "plan", "doctor", "calibrate", "fetch", "show", "metrics", "ls"])
def test_every_command_has_help(command, capsys):
    assert main([command, "-h"]) == 0
    assert "Usage: dynprobe" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error():
    piped = f"{sys.executable} -m dynprobe metrics | head -n 1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", piped], capture_output=True, text=True, timeout=120)
    assert found.stdout.startswith("kappa.phase/1")
    assert found.stderr == ""
