from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynprobe.errors import ModelError, ModelNotFoundError, UsageError
from dynprobe.models import known_models, resolve


def test_known_name_comes_first_and_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("SmolLM2-135M").kind == "known"
    source = resolve("smollm2-135m")
    assert (source.kind, source.display_name) == ("known", "smollm2-135m")
    assert source.weights_id == Path(source.location).name == "smollm2-135m-instruct-q4_1-dequantised"
    assert any("./" in note for note in source.notes)
    assert not source.local_files_only
    assert list(known_models()) == ["smollm2-135m", "tiny-llama", "tiny-cem", "tiny-csm"]
    with pytest.raises(ModelNotFoundError, match=r"no config\.json \(found nothing, it is empty\)"):
        resolve("./smollm2-135m")


def test_folder(llama_folder: Path) -> None:
    source = resolve(llama_folder)
    assert (source.kind, source.display_name, source.local_files_only) == ("folder", "llama", True)
    assert Path(source.location) == llama_folder
    assert resolve(f"{llama_folder}/") == source


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"notes.txt": "x", "deep/config.json": "{}"}, r"found deep/, notes.txt.*Did you mean '.*deep'"),
        ({"m.gguf": "GGUF"}, r"--model .*m\.gguf"),
        ({"adapter_config.json": "{}"}, "merge_and_unload"),
        ({"snapshots/abc/config.json": "{}"}, r"Did you mean '.*snapshots/abc'"),
        ({"a.txt": ""}, "smollm2-135m"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: dict[str, str], wanted: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelNotFoundError, match=wanted):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"config.json": "{}"}, "no weights"),
        ({"config.json": "{"}, "cannot be read as JSON"),
        ({"config.json": "[]"}, "should hold a JSON object"),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "lfs pull"),
        ({"config.json": "{}", "model.safetensors": "short"}, "not a safetensors file"),
        ({"config.json": "{}", "model.safetensors": "\x05\0\0\0\0\0\0\0nope!"}, "damaged safetensors header"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "no weight_map"),
        (
            {"config.json": "{}", "model.safetensors.index.json": json.dumps({"weight_map": {"a": "m-1.safetensors"}})},
            "1 of 1 weight files are missing",
        ),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../x.safetensors"}}),
            },
            "outside its folder",
        ),
        ({"config.json": json.dumps({"transformers_weights": "adapter_model.bin"})}, "not safetensors"),
        ({"config.json": json.dumps({"transformers_weights": "../m.safetensors"})}, "outside its folder"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "--allow-bin"),
    ],
)
def test_damaged_or_unsafe_folders(tmp_path: Path, files: dict[str, str], wanted: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=wanted):
        resolve(tmp_path)


def test_cut_short_weights(tmp_path: Path, llama_folder: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short"):
        resolve(tmp_path / "m")


def test_files_and_missing_paths(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"--model {llama_folder}"):
        resolve(llama_folder / "model.safetensors")
    (tmp_path / "gpt-mine").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'gpt-mine'\?"):
        resolve(f"{tmp_path}/gpt-mien")
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve("a/b/c")
    (tmp_path / "x.gguf").write_bytes(b"HTML")
    with pytest.raises(ModelError, match="magic"):
        resolve(tmp_path / "x.gguf")
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="llama-gguf-split"):
        resolve(tmp_path / "x-00001-of-00002.gguf")


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_names(name: str) -> None:
    with pytest.raises(UsageError):
        resolve(name)


def test_names_that_cannot_be_hub_ids() -> None:
    with pytest.raises(ModelNotFoundError, match="--model org/name"):
        resolve("https://huggingface.co/org/name/tree/main")
    with pytest.raises(ModelNotFoundError, match="neither a path"):
        resolve("what is this?")


def test_revisions_belong_to_the_hub(llama_folder: Path) -> None:
    for name in ("smollm2-135m", str(llama_folder)):
        with pytest.raises(UsageError, match="has no revisions"):
            resolve(name, revision="main")


def test_resolving_imports_nothing_heavy(llama_folder: Path) -> None:
    code = (
        "import sys; from dynprobe.models import resolve; resolve(sys.argv[1]); resolve('smollm2-135m'); "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(llama_folder)], check=True, timeout=60)
