"""Where a model comes from: the answer to "what does ``--model X`` mean?", before anything heavy is imported.

A name is tried in one fixed order: a known short name, an existing path (a model folder or a ``.gguf`` file), a hub id.
All checks that can fail cheaply happen here: what a folder holds, whether the hub's cache is complete, whether the hub
answers. So a mistyped name costs milliseconds and an unreachable hub at most a few seconds, never the half minute of
retries a loader makes.

Refused here: pickled weights without ``allow_bin``, remote code without a pinned commit, folders that are no model.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynprobe.errors import ModelError, ModelNotFoundError, UsageError, did_you_mean
from dynprobe.models._folder import inspect_folder
from dynprobe.models._known import canonical_name, known_model, near_names
from dynprobe.models._panel import panel_models

__all__ = ["ModelSource", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_HUB_URL = re.compile(r"https?://huggingface\.co/(?P<id>[\w.-]+(/[\w.-]+)?)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class ModelSource:
    """Something loadable, and where it is.

    Attributes:
        kind: ``hub``, ``folder``, ``gguf`` or ``known``.
        location: the path of a folder or file, or the hub id.
        revision: the commit (40 hexadecimal digits) where one is known.
        display_name: how tables and run folders call it.
        weights_id: the model id a run records; the same for the same name, whatever the bytes (the hash tells those).
        local_files_only: nothing needs to be fetched: loading touches no network.
        gguf_file: name of the ``.gguf`` file, if that is what was named.
        notes: what was decided on the way, for the run's record.
        requested_revision: the branch, tag or commit that was asked for.
        files: for a hub model that must be fetched, the files to fetch.
        trust_remote_code: Python code that comes with the model may run.
        allow_bin: pickled weights may be opened (with ``weights_only=True``).
        cache_dir: the hub cache to use, or None for its default.
    """

    kind: Literal["hub", "folder", "gguf", "known"]
    location: str
    revision: str | None
    display_name: str
    weights_id: str
    local_files_only: bool
    gguf_file: str | None = None
    notes: tuple[str, ...] = ()
    requested_revision: str | None = None
    files: tuple[str, ...] = ()
    trust_remote_code: bool = False
    allow_bin: bool = False
    cache_dir: str | None = None


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_bin: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ModelSource:
    """Find out what ``name`` stands for, without loading it.

    Args:
        name: a known short name (:func:`dynprobe.models.known_models`), the path of a model folder or ``.gguf`` file,
            or a hub id.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let Python code that comes with the model run; for a hub model only together with a full
            commit as ``revision``, so that the code cannot change afterwards.
        allow_bin: accept pickled weights where no safetensors exist.
        cache_dir: the hub cache folder, if it is not the default one.

    Returns:
        The source, to be handed to :func:`dynprobe.models.load_model`.

    Raises:
        UsageError: remote code without a pinned commit, or a revision of something that has none.
        ModelNotFoundError: nothing of that name exists.
        OfflineError: the hub is needed and cannot be reached (within 8 s).
        ModelError: what was found cannot be opened safely or is incomplete.

    Example:
        >>> resolve("smollm2-135m").weights_id
        'smollm2-135m-instruct-q4_1-dequantised'
        >>> resolve("./no/such/folder")
        Traceback (most recent call last):
        ...
        dynprobe.errors.ModelNotFoundError: No model at './no/such/folder': ...
    """
    text = os.fspath(name).strip()
    if not text:
        raise UsageError("--model is empty. Type a hub id such as gpt2, a folder, a .gguf file, or smollm2-135m.")
    canonical = canonical_name(text)
    if canonical is not None:
        return _known_source(canonical, text, revision)
    if text.startswith("panel/") and not Path(text).exists():
        panel = [cell.name for cell in panel_models()]
        raise ModelNotFoundError(
            f"The panel has no model {text!r}.{did_you_mean(text, panel)} dynprobe.models.panel_models() lists its "
            f"{len(panel)} models; for a hub model of an owner called panel, give the path of a local copy."
        )
    path = Path(text).expanduser()
    if path.exists():
        _refuse_revision(revision, text)
        if path.is_dir():
            return _folder_source(path, trust_remote_code=trust_remote_code, allow_bin=allow_bin)
        return _file_source(path)
    url = _HUB_URL.match(text)
    if url:
        raise ModelNotFoundError(f"{text} is a web address. Type the hub id alone: --model {url['id']}")
    if _looks_like_path(text):
        raise ModelNotFoundError(_missing_path_message(text, path))
    if not _HUB_ID.fullmatch(text):
        raise ModelNotFoundError(
            f"{text!r} is neither a path that exists nor a hub id (ORGANISATION/NAME, letters, digits, '-', '_', '.')."
            f"{did_you_mean(text, near_names())}"
        )
    if trust_remote_code and not (revision and _COMMIT.fullmatch(revision)):
        raise UsageError(
            f"--trust-remote-code was asked for {text!r} with revision {revision!r}, but runs code from the hub only "
            "at a pinned commit: add --revision with the full 40-digit commit (on the model's page under 'History')."
        )
    from dynprobe.models._hub import hub_source

    return hub_source(
        text,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )


def _known_source(canonical: str, text: str, revision: str | None) -> ModelSource:
    _refuse_revision(revision, text)
    known = known_model(canonical)
    folder = known.folder()
    notes = [f"{canonical}: {known.description}"]
    if Path(text).exists():
        notes.append(f"a path {text!r} exists too; type ./{text} for that one")
    return ModelSource(
        kind="known",
        location=str(folder),
        revision=None,
        display_name=canonical,
        weights_id=known.weights_id,
        local_files_only=(folder / "dynprobe-model.json").is_file(),
        notes=tuple(notes),
    )


def _folder_source(path: Path, *, trust_remote_code: bool, allow_bin: bool) -> ModelSource:
    found = inspect_folder(path, allow_bin=allow_bin)
    absolute = path.absolute()
    # A folder of the hub's cache is called by its commit, which says more than the path does.
    parts = absolute.parts
    in_hub_cache = len(parts) > 2 and parts[-2] == "snapshots" and _COMMIT.fullmatch(parts[-1]) is not None
    name = parts[-3].removeprefix("models--").replace("--", "/") if in_hub_cache else absolute.resolve().name
    weights_id = str(found.record.get("id") or name)
    notes = [f"pickled weights opened with weights_only=True: {', '.join(found.weight_files)}"] if found.is_bin else []
    if trust_remote_code:
        notes.append("code in the model's folder was allowed to run; its hashes are recorded")
    return ModelSource(
        kind="folder",
        location=str(absolute),
        revision=parts[-1] if in_hub_cache else None,
        display_name=weights_id,
        weights_id=weights_id,
        local_files_only=True,
        notes=tuple(notes),
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )


def _file_source(path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        hint = (
            f"Type the folder it is in: --model {path.parent}"
            if path.suffix in {".safetensors", ".bin", ".json"}
            else "Type a model folder, a .gguf file, a hub id, or smollm2-135m."
        )
        raise ModelNotFoundError(f"{path} is a file, but not a .gguf file. {hint}")
    if _SPLIT_GGUF.search(path.name):
        raise ModelError(
            f"{path} is one part of a split GGUF. Merge the parts first: "
            f"llama-gguf-split --merge {path} {path.parent / 'merged.gguf'}"
        )
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{path} is called .gguf but does not start with the GGUF magic bytes (found {magic!r}). Download it again."
        )
    absolute = path.resolve()
    return ModelSource(
        kind="gguf",
        location=str(absolute),
        revision=None,
        display_name=absolute.stem,
        weights_id=absolute.stem,
        local_files_only=True,
        gguf_file=absolute.name,
        notes=("quantised weights are expanded to float32 once and kept in the user's cache",),
    )


def _refuse_revision(revision: str | None, text: str) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision} was given, but {text!r} is not on the hub and has no revisions.")


def _looks_like_path(text: str) -> bool:
    separators = text.count("/") + text.count(os.sep if os.sep != "/" else "\\")
    has_suffix = Path(text).suffix in {".gguf", ".safetensors", ".bin", ".pt", ".pth"}
    return text.startswith((".", "/", "~")) or text.endswith("/") or separators > 1 or "\\" in text or has_suffix


def _missing_path_message(text: str, path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        known = next((folder for folder in parent.parents if folder.is_dir()), Path())
        return (
            f"No model at {text!r}: the folder {parent} does not exist (the part that does is {known.absolute()}). "
            "Type a model folder, a .gguf file, a hub id, or smollm2-135m."
        )
    near = did_you_mean(path.name, [entry.name for entry in parent.iterdir()])
    return f"No model at {text!r}: {parent.absolute()} has no entry {path.name!r}.{near}" + (
        "" if near else " Type a model folder, a .gguf file, a hub id, or smollm2-135m."
    )
