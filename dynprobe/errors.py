"""Every error dynprobe raises on purpose.

Each message says three things: what was asked, what was found, and what to type instead. The command line prints
the message alone and leaves with ``exit_code``; a traceback means a defect in dynprobe, never a mistake of the user.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "DynprobeError",
    "EngineError",
    "InterruptedRunError",
    "MetricError",
    "ModelError",
    "ModelNotFoundError",
    "OfflineError",
    "PluginError",
    "PromptError",
    "RunFolderError",
    "SelfTestError",
    "SiteError",
    "SpecError",
    "UsageError",
    "did_you_mean",
    "near_path",
]


class DynprobeError(Exception):
    """Base class of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(DynprobeError, ValueError):
    """The request itself is malformed: a flag, a configuration key, a combination that has no meaning."""

    exit_code = 2


class SpecError(UsageError):
    """A string of the mini-language does not parse; the message points at the exact character."""

    def __init__(self, message: str, text: str = "", position: int | None = None) -> None:
        self.text, self.position = text, position
        if position is not None:
            message = f"{message}\n  {text}\n  {' ' * position}^"
        super().__init__(message)


class SiteError(UsageError):
    """A site was named that the subject does not have: a layer out of range, a component that was not found."""


class PromptError(UsageError):
    """Prompts are missing, empty, or in a file that cannot be read as prompts."""


class MetricError(UsageError):
    """A metric id is unknown, or its input does not have the declared shape."""


class ModelError(DynprobeError):
    """A model was loaded but cannot be used as a subject."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model stands behind the name, folder or file that was given."""


class OfflineError(ModelNotFoundError):
    """The hub is needed and cannot be reached."""


class CalibrationError(DynprobeError):
    """A calibration is missing, damaged, or was made on another model."""


class RunFolderError(DynprobeError):
    """A run folder is missing, damaged, of a newer schema, or in use by another process."""


class SelfTestError(DynprobeError):
    """A self-test failed, so no number of this run could be trusted."""

    exit_code = 3


class EngineError(DynprobeError):
    """The workers of an engine cannot be started, or keep dying."""


class PluginError(DynprobeError):
    """Something another package adds was asked for and cannot be had: it does not load, or its name is not its own."""


class InterruptedRunError(DynprobeError):
    """The run was interrupted; the same command continues it."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known word, or an empty string.

    Example:
        >>> did_you_mean("relnrom", ["relnorm", "coordstd"])
        " Did you mean 'relnorm'?"
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def near_path(path: str | os.PathLike[str]) -> str:
    """Return ``" Did you mean 'folder/x'?"`` for the nearest name beside a path that is not there, or an empty string.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (pathlib.Path(folder) / "prompts.txt").touch()
        ...     near_path(pathlib.Path(folder) / "promts.txt").removesuffix("prompts.txt'?") != ""
        True
    """
    folder, name = os.path.split(os.fspath(path))
    if os.path.lexists(path):  # what is wrong with it is not its name
        return ""
    try:
        beside = os.listdir(folder or ".")  # noqa: PTH208 - a file's owner may forbid it, and then nothing is near
    except OSError:
        return ""
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.6)
    return f" Did you mean {os.path.join(folder, near[0])!r}?" if near else ""  # noqa: PTH118
