"""Sending an export to the hub: a dataset repository, private unless the user says otherwise.

The token is ``huggingface_hub``'s own business: it is read by that library, and neither asked for, printed nor stored
here. What the hub says back is scrubbed before it is shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dynprobe.errors import OfflineError, RunFolderError, UsageError
from dynprobe.runs._secrets import scrub

__all__ = ["check_repository", "push_folder"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def check_repository(name: str) -> None:
    """Refuse what cannot be the name of a repository, before anything is written.

    Raises:
        UsageError: It cannot.
    """
    if not _NAME.match(name) or name.endswith((".git", ".", "-")) or ".." in name or "--" in name:
        raise UsageError(f"--push {name!r}; it is NAME/REPOSITORY, such as me/my-run")


def push_folder(folder: Path, repository: str, private: bool, api: Any = None) -> str:
    """Send a folder to a dataset repository and return its address.

    Args:
        folder: The export.
        repository: ``name/repository``.
        private: Whether it is private. A repository that is there already keeps what it is: a public one is refused
            where a private one was asked for.
        api: Stands in for ``huggingface_hub.HfApi()``.

    Raises:
        OfflineError: The hub cannot be reached.
        RunFolderError: The hub refused; the folder stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    hub = api if api is not None else HfApi()
    kept = f"The export stays in {folder}; to send it later: hf upload {repository} {folder} --repo-type dataset"
    try:
        if hub.repo_exists(repository, repo_type="dataset"):
            if private and not hub.repo_info(repository, repo_type="dataset").private:
                raise RunFolderError(
                    f"{repository} is there already and is public; nothing was sent. Add --public to send it all the "
                    f"same, or name another repository. {kept}"
                )
        else:
            hub.create_repo(repository, repo_type="dataset", private=private)
        hub.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=str(folder),
            commit_message="dynprobe export",
        )  # fmt: skip
    except (OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise OfflineError(f"the hub cannot be reached ({_said(error)}); nothing was sent. {kept}") from None
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = " Log in with: hf auth login." if status in (None, 401, 403) else ""
        raise RunFolderError(f"the hub refused {repository} ({_said(error)}).{login} {kept}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise OfflineError(f"the hub cannot be reached ({_said(error)}); nothing was sent. {kept}") from None
    return f"https://huggingface.co/datasets/{repository}"


def _said(error: Exception) -> str:
    """The first line of an error, without anything that looks like a secret."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return str(scrub(lines[0] if lines else type(error).__name__))[:200]
