from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests away from the user's caches and tokens."""
    monkeypatch.setenv("DYNPROBE_CACHE", str(tmp_path_factory.mktemp("dynprobe-cache")))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tied embeddings and a word-level tokenizer, saved as safetensors in bfloat16."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghi"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 whose weights exist only as a pickle."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny") / "gpt2-bin"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


class HubServer:
    """As much of the hub as a client needs: model info, file listing, file contents."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        self.requests.append((request.command, path))
        status, body, headers = self.find(path)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def find(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if path == "/":
            return 200, b"", {}
        repo = next((name for name in self.repos if f"/{name}/" in path + "/"), None)
        if repo is None:
            return 401, b'{"error": "Invalid username or password."}', {"X-Error-Message": "Invalid username"}
        if repo in self.gated and "/resolve/" in path:
            return 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
        folder = self.repos[repo]
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if path.startswith("/api/models/") and "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": f"{n}-oid"} for n in names]
            return 200, json.dumps(rows).encode(), {"Content-Type": "application/json"}
        if path.startswith(f"/api/models/{repo}/discussions"):
            return 200, b'{"discussions": [], "count": 0, "start": 0}', {"Content-Type": "application/json"}
        if path.startswith("/api/models/"):
            if "/revision/" in path and not path.endswith(("/main", COMMIT)):
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name in names:
            return 200, (folder / name).read_bytes(), {"ETag": f'"{name}-etag"', "X-Repo-Commit": COMMIT}
        return 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine, set as HF_ENDPOINT."""
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]
