"""The hub: first its cache on this machine, then one question whether it answers, and only then the network.

A model that is complete in the local cache is used as it is, at the commit the cache knows, and no packet is sent. If
it is not there, one request with a hard limit of three seconds decides between "online" and "offline"; the request
runs in a thread of its own because a stalled name server does not honour any time limit. What is fetched is pinned to
the commit the hub named, and only configuration, tokenizer and weight files are fetched.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError, UsageError
from dynprobe.models._folder import inspect_folder, is_weight_file
from dynprobe.models._hub_errors import endpoint, offline_message, redact, translate

if TYPE_CHECKING:
    from dynprobe.models._source import ModelSource

__all__ = ["cached_snapshot", "download", "hub_source", "probe"]

_PROBE_SECONDS = 3.0
_ANSWER_SECONDS = 10.0
_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# The hub answers to both names; a cache filled under one must serve the other.
_RENAMED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def cached_snapshot(repo: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    """Return the snapshot folder of ``repo`` at ``revision`` (default main) in the local hub cache, if there is one."""
    root = cache_dir
    if root is None:
        from huggingface_hub import constants

        root = Path(constants.HF_HUB_CACHE)
    for name in dict.fromkeys((repo, _RENAMED.get(repo, repo))):
        folder = root / f"models--{name.replace('/', '--')}"
        wanted = revision or "main"
        ref = folder / "refs" / wanted
        commit = ref.read_text(encoding="ascii").strip() if ref.is_file() else wanted
        snapshot = folder / "snapshots" / commit
        if re.fullmatch(r"[0-9a-f]{40}", commit) and (snapshot / "config.json").is_file():
            return snapshot
    return None


def probe(address: str, seconds: float = _PROBE_SECONDS) -> str | None:
    """Ask once whether ``address`` answers.

    Args:
        address: an http(s) address; any answer below status 500 counts.
        seconds: hard limit, name resolution included.

    Returns:
        None if it answered, else the reason in a few words.
    """
    outcome: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                outcome.append(None)
        except urllib.error.HTTPError as exc:
            outcome.append(f"it answered with status {exc.code}" if exc.code in (407,) or exc.code >= 500 else None)
        except urllib.error.URLError as exc:
            # The hub's own client brings its own certificates; that Python's do not know the hub is no sign of being
            # offline.
            trusted = not isinstance(exc.reason, ssl.SSLCertVerificationError)
            outcome.append(str(exc.reason) if trusted else None)
        except (OSError, ValueError, http.client.HTTPException) as exc:
            outcome.append(str(exc) or type(exc).__name__)

    thread = threading.Thread(target=ask, name="dynprobe-hub-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return redact(outcome[0]) if outcome and outcome[0] else (None if outcome else f"no answer within {seconds:g} s")


def hub_source(
    repo: str, *, revision: str | None, trust_remote_code: bool, allow_bin: bool, cache_dir: Path | None
) -> ModelSource:
    """Resolve a hub id; see :func:`dynprobe.models.resolve`."""
    snapshot = cached_snapshot(repo, revision, cache_dir)
    in_cache: ModelSource | None = None
    why_not_cache = "the model is not in the local cache"
    if snapshot is not None:
        try:
            found = inspect_folder(snapshot, allow_bin=allow_bin)
        except ModelError as exc:
            why_not_cache = f"the local cache cannot be used: {exc}"
        else:
            notes = [f"from the local hub cache at commit {snapshot.name[:12]}; the hub was not asked"]
            if found.is_bin:
                notes.append(f"pickled weights opened with weights_only=True: {', '.join(found.weight_files)}")
            in_cache = _source(
                repo, snapshot.name, revision, notes, local=True, flags=(trust_remote_code, allow_bin), cache=cache_dir
            )
            if found.has_tokenizer:
                return in_cache
    reason = _offline_reason()
    if reason is not None:
        if in_cache is not None:
            return in_cache
        raise OfflineError(offline_message(repo, revision, reason, why_not_cache))
    commit, names = _ask(repo, revision)
    notes = []
    if not any(name.endswith(".safetensors") and is_weight_file(name) for name in names):
        converted = _conversion(repo) if revision is None else None
        if converted is not None:
            commit, names = converted
            notes.append("the main revision has only pickles; the hub's own safetensors conversion of it is used")
    wanted = _choose(repo, names, allow_bin=allow_bin, code=trust_remote_code)
    return _source(
        repo,
        commit,
        revision,
        notes,
        local=False,
        flags=(trust_remote_code, allow_bin),
        cache=cache_dir,
        files=wanted,
    )


def download(source: ModelSource) -> Path:
    """Fetch the files of a hub source into the hub's own cache and return the snapshot folder."""
    from huggingface_hub import constants, snapshot_download

    root = Path(source.cache_dir or constants.HF_HUB_CACHE)
    try:
        folder = Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                allow_patterns=list(source.files),
                cache_dir=root,
                endpoint=endpoint(),
            )
        )
    except Exception as exc:
        raise translate(exc, source.location, source.requested_revision) from exc
    wanted = source.requested_revision or "main"
    if source.revision and wanted != source.revision:
        # Fetching by commit leaves no name behind; with it, the next look-up finds the model without the network.
        ref = root / f"models--{source.location.replace('/', '--')}" / "refs" / wanted
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(source.revision, encoding="ascii")
    return folder


def _offline_reason() -> str | None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{name} is set"
    address = endpoint()
    if urlsplit(address).scheme not in {"http", "https"}:
        raise UsageError(f"HF_ENDPOINT={address!r} is not an http address. Type for example https://huggingface.co")
    return probe(address)


def _ask(repo: str, revision: str | None) -> tuple[str, list[str]]:
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=endpoint()).model_info(repo, revision=revision, timeout=_ANSWER_SECONDS)
    except Exception as exc:
        raise translate(exc, repo, revision) from exc
    if not info.sha:
        raise ModelError(f"The hub at {endpoint()} did not say which commit {repo!r} is at.")
    return str(info.sha), [sibling.rfilename for sibling in info.siblings or []]


def _conversion(repo: str) -> tuple[str, list[str]] | None:
    """The hub's own safetensors conversion of a repository, if one was made: (commit, file names)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        threads = HfApi(endpoint=endpoint()).get_repo_discussions(
            repo, author="SFconvertbot", discussion_type="pull_request"
        )
        numbers = [t.num for t in threads if t.author == "SFconvertbot" and t.title.startswith("Adding `safetensors`")]
    except HfHubHTTPError:  # pull requests are switched off for this repository: then there is no conversion
        return None
    for number in numbers:
        commit, names = _ask(repo, f"refs/pr/{number}")
        if any(name.endswith(".safetensors") and is_weight_file(name) for name in names):
            return commit, names
    return None


def _choose(repo: str, names: list[str], *, allow_bin: bool, code: bool) -> tuple[str, ...]:
    """Which files of a repository to fetch: configuration, tokenizer, one set of weights."""
    top = [name for name in names if "/" not in name]
    if "config.json" not in top:
        ggufs = [name for name in names if name.endswith(".gguf")]
        what = (
            f"It holds GGUF files; type: hf download {repo} {ggufs[0]} --local-dir . and then --model ./{ggufs[0]}"
            if ggufs
            else "Is it a data set, an adapter, or a model of another library?"
        )
        raise ModelNotFoundError(f"The hub repository {repo!r} has no config.json, so it is no model. {what}")
    weights = [name for name in top if is_weight_file(name)]
    safe = [n for n in weights if ".safetensors" in n]
    chosen = ["model.safetensors"] if "model.safetensors" in safe else safe
    if not chosen:
        bins = [name for name in weights if ".bin" in name]
        if not bins:
            raise ModelError(f"The hub repository {repo!r} has no weights that transformers can load.")
        if not allow_bin:
            raise ModelError(
                f"The hub repository {repo!r} has its weights only as pickles ({bins[0]} …), and opening a pickle can "
                "run code. If you trust its owner, type --allow-bin (opened with weights_only=True, hash recorded)."
            )
        chosen = ["pytorch_model.bin"] if "pytorch_model.bin" in bins else bins
    small = [n for n in top if n.endswith(_SMALL_FILES) and not is_weight_file(n)]
    templates = [n for n in names if n.startswith("additional_chat_templates/") and n.endswith(".jinja")]
    scripts = [n for n in names if n.endswith(".py")] if code else []
    return tuple(sorted({*chosen, *small, *templates, *scripts}))


def _source(
    repo: str,
    commit: str,
    revision: str | None,
    notes: list[str],
    *,
    local: bool,
    flags: tuple[bool, bool],
    cache: Path | None,
    files: tuple[str, ...] = (),
) -> ModelSource:
    from dynprobe.models._source import ModelSource

    return ModelSource(
        kind="hub",
        location=repo,
        revision=commit,
        display_name=repo,
        weights_id=repo,
        local_files_only=local,
        notes=tuple(notes),
        requested_revision=revision,
        files=files,
        trust_remote_code=flags[0],
        allow_bin=flags[1],
        cache_dir=None if cache is None else str(cache),
    )
