from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError, UsageError
from dynprobe.models import load_model, resolve
from dynprobe.models._hub_errors import redact, translate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_offline_is_said_quickly_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    start = time.monotonic()
    with pytest.raises(OfflineError) as caught:
        resolve("gpt2", cache_dir=tmp_path)
    assert time.monotonic() - start < 8
    for wanted in ("not in the local cache", "--model smollm2-135m", "hf download gpt2", endpoint):
        assert wanted in str(caught.value)


def test_a_hub_that_never_answers_costs_three_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, silent_port: int
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent_port}")
    start = time.monotonic()
    with pytest.raises(OfflineError):
        resolve("gpt2", cache_dir=tmp_path)
    assert 2.5 < time.monotonic() - start < 8


def test_a_stalled_name_server_does_not_hold_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from dynprobe.models._hub import probe

    def stalled(*_: object, **__: object) -> None:
        time.sleep(3)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", stalled)
    start = time.monotonic()
    assert probe("http://stalled.invalid", seconds=0.3) == "no answer within 0.3 s"
    assert time.monotonic() - start < 2


def test_an_answer_that_is_not_http(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import threading

    from dynprobe.models._hub import probe

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail server ready\r\n")

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "*")
        assert "220 mail server" in str(probe(f"http://127.0.0.1:{listener.getsockname()[1]}"))


def test_offline_variable_means_no_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE is set"):
        resolve("org/tiny", cache_dir=tmp_path)
    assert hub.requests == []


def test_offline_suggests_a_known_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"Did you mean 'smollm2-135m'\?"):
        resolve("smolm2-135m", cache_dir=tmp_path)


def test_online_fetches_once_and_then_needs_no_network(tmp_path: Path, hub: Any, llama_folder: Path) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(llama_folder, repo)
    (repo / "onnx").mkdir()
    (repo / "onnx" / "model.onnx").write_bytes(b"big")
    (repo / "pytorch_model.bin").write_bytes(b"pickle")
    (repo / "modeling.py").write_text("raise SystemExit")
    hub.repos["org/tiny"] = repo
    cache = tmp_path / "hub"
    source = resolve("org/tiny", cache_dir=cache)
    assert (source.kind, source.revision, source.local_files_only) == ("hub", COMMIT, False)
    assert set(source.files) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not set(source.files) & {"pytorch_model.bin", "modeling.py", "onnx/model.onnx"}
    model, tokenizer, facts = load_model(source)
    assert facts["commit"] == COMMIT
    assert tokenizer is not None
    assert sum(p.numel() for p in model.parameters()) == facts["n_parameters"]
    fetched = {path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert "pytorch_model.bin" not in fetched
    hub.requests.clear()
    again = resolve("org/tiny", cache_dir=cache)
    assert (again.revision, again.local_files_only) == (COMMIT, True)
    assert load_model(again)[2]["weights_hash"] == facts["weights_hash"]
    assert resolve("org/tiny", revision=COMMIT, cache_dir=cache).local_files_only
    assert hub.requests == []


def test_absent_gated_and_unknown_revision(tmp_path: Path, hub: Any, llama_folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no model 'gpt3'.*Did you mean 'gpt2'"):
        resolve("gpt3", cache_dir=tmp_path)
    hub.repos["org/tiny"] = llama_folder
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        resolve("org/tiny", revision="v9", cache_dir=tmp_path)
    hub.gated.add("org/tiny")
    with pytest.raises(ModelError, match=r"is gated\. Accept its licence .* set HF_TOKEN"):
        load_model(resolve("org/tiny", cache_dir=tmp_path))


def test_a_pickle_only_repository_needs_the_flag(tmp_path: Path, hub: Any, bin_folder: Path) -> None:
    hub.repos["org/old"] = bin_folder
    with pytest.raises(ModelError, match="--allow-bin"):
        resolve("org/old", cache_dir=tmp_path)
    assert any("/discussions" in path for _, path in hub.requests)
    model, tokenizer, facts = load_model(resolve("org/old", allow_bin=True, cache_dir=tmp_path))
    assert facts["weights_format"] == "bin"
    assert tokenizer is None
    assert type(model).__name__ == "GPT2LMHeadModel"
    with pytest.raises(ModelError, match="--allow-bin"):
        resolve("org/old", cache_dir=tmp_path)


def test_a_repository_without_a_model(tmp_path: Path, hub: Any) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "m.Q4.gguf").write_bytes(b"GGUF")
    hub.repos["org/quant"] = folder
    with pytest.raises(ModelNotFoundError, match=r"hf download org/quant m\.Q4\.gguf"):
        resolve("org/quant", cache_dir=tmp_path / "hub")


def test_remote_code_needs_a_pinned_commit_before_any_request(tmp_path: Path, hub: Any) -> None:
    for revision in (None, "main", COMMIT[:12]):
        with pytest.raises(UsageError, match="pinned commit"):
            resolve("org/tiny", revision=revision, trust_remote_code=True, cache_dir=tmp_path)
    assert hub.requests == []


def test_the_old_name_of_a_cached_model_is_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_folder: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repo = tmp_path / "models--openai-community--gpt2"
    shutil.copytree(llama_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    source = resolve("gpt2", cache_dir=tmp_path)
    assert (source.weights_id, source.revision) == ("gpt2", COMMIT)
    assert resolve(repo / "snapshots" / COMMIT).revision == COMMIT
    assert resolve(repo / "snapshots" / COMMIT).display_name == "openai-community/gpt2"


def test_a_cut_short_cache_is_named_when_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_folder: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    shutil.copytree(llama_folder, snapshot)
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(OfflineError, match="cut short"):
        resolve("org/tiny", revision=COMMIT, cache_dir=tmp_path)


def test_tokens_are_never_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    assert redact("a very-secret b hf_ABCDEFGHIJKL") == "a <token> b <token>"
    assert "very-secret" not in str(translate(RuntimeError("bad header very-secret"), "org/x", None))


def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        resolve("gpt2", cache_dir=tmp_path)
