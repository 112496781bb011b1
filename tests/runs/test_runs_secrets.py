from __future__ import annotations

import json

import pytest

from dynprobe.runs import scrub, scrub_command

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


@pytest.mark.parametrize(
    "key", ["token", "HF_TOKEN", "hf_token", "use_auth_token", "api_key", "apiKey", "OPENAI-API-KEY", "password"]
)
def test_keys_that_name_a_secret(key):
    assert scrub({"a": [{key: "x"}]}) == {"a": [{key: "[redacted]"}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 32),
        ("tokenizer", "gpt2"),
        ("pad_token", "<pad>"),
        ("eos_token_id", 5),
        ("token_ids", [1, 2]),
        ("tokens", "all"),
        ("token", None),
        ("use_auth_token", True),
        ("token", 3),
    ],
)
def test_words_of_the_field_survive(key, value):
    assert scrub({key: value}) == {key: value}


@pytest.mark.parametrize(
    "value",
    [TOKEN, "hf_x", f"see {TOKEN}.", "ghp_0123456789abcdefABCD", "https://me:pw@host/x", "sk-0123456789abcdef01"],
)
def test_values_with_the_shape_of_a_secret(value):
    text = json.dumps(scrub({"note": [value]}))
    assert "[redacted]" in text
    assert TOKEN not in text
    assert "pw" not in text


def test_value_of_the_environment_is_found_anywhere(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plainlooking-0815")
    assert scrub({"note": "x plainlooking-0815 y"}) == {"note": "x [redacted] y"}


def test_command_lines():
    words = scrub_command(["dynprobe", "--token", "abc", "--model", "gpt2", "--max-new-tokens", "3", f"--x={TOKEN}"])
    assert words == ["dynprobe", "--token", "[redacted]", "--model", "gpt2", "--max-new-tokens", "3", "--x=[redacted]"]
    assert scrub_command("dynprobe --hf-token=abc --api-key 'x y' --limit 2") == (
        "dynprobe --hf-token=[redacted] --api-key [redacted] --limit 2"
    )


def test_nothing_secret_reaches_the_disk(tmp_path, make, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    writer = make["begin"](
        tmp_path,
        config={"hf_token": TOKEN, "model": "gpt2", "deep": [{"password": "opensesame"}]},
        manifest_fields={"command": ["dynprobe", "run", "--token", TOKEN], "extra": {"api_key": "opensesame"}},
    )
    writer.event("warning", message=f"401 for {TOKEN}", secret="opensesame")
    writer.update(later={"token": "opensesame"})
    for number in (0, 1):
        writer.write_batch(number, make["batch"](number), {"token": "opensesame"})
    writer.finish({"note": TOKEN})
    text = "".join(p.read_text() for p in writer.folder.iterdir() if p.suffix in {".json", ".jsonl", ".md"})
    assert "opensesame" not in text
    assert TOKEN not in text
    assert text.count("[redacted]") >= 6


def test_a_value_that_speaks_of_passwords_hides_no_other_word() -> None:
    words = ["dynprobe", "run", "--prompt=my password is", "--limit", "3", "--token", "abc"]
    assert scrub_command(words) == [*words[:-1], "[redacted]"]
