"""Find tasks of lm-evaluation-harness by name, fast, and refuse at once what cannot be read.

The harness knows some fourteen thousand names and reads every one of its files before it looks one up, which takes half
a minute. Here the files are searched as text first: a name that stands in none of them is unknown, and a plain task is
loaded from its own folder alone. Only groups and tags, which may gather tasks from anywhere, take the harness's long
road.

Three places are searched, and a later one wins, as in the harness: the harness's own tasks, those that come with
dynprobe, and the folders given by ``include_path``.
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe.errors import OfflineError, UsageError

__all__ = ["BUILT_IN", "find_tasks", "refuse_unreachable"]

#: Names of the tasks that come with dynprobe.
BUILT_IN = ("dynprobe_cloze", "dynprobe_stories_short", "dynprobe_stories_long")
#: Builders of ``datasets`` that read files.
_FILES = frozenset(("json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset", "imagefolder"))
_NAMED = re.compile(rb"^\s*-?\s*(?:task|group|tag)\s*:\s*[\"']?([^\s\"'#\[\]{}]+)", re.MULTILINE)


def find_tasks(names: Sequence[str], include_path: Sequence[str | Path] = ()) -> Any:
    """Return a task manager of the harness that knows all names.

    Args:
        names: Tasks, groups or tags.
        include_path: Folders of task files.

    Raises:
        UsageError: A name is unknown, or a folder is not there.
        OfflineError: A group's data are on the hub, and neither the hub nor a copy of them can be reached.
    """
    from lm_eval.tasks import TaskManager

    own = [Path(str(importlib.resources.files("dynprobe.prompts"))) / "data" / "tasks", *_folders(include_path)]
    manager = TaskManager(include_defaults=False, include_path=[*own])
    missing = [name for name in names if name not in manager.task_index]
    if not missing:
        return manager
    files = _contents(_harness_folder())
    unknown = [name for name in missing if not any(name.encode() in text for text in files.values())]
    if unknown:
        raise _unknown(unknown[0], [*manager.all_tasks, *_names(files.values())], include_path)
    narrow = TaskManager(include_defaults=False, include_path=[*_homes(missing, files), *own])
    if all(_plain(narrow.task_index.get(name)) for name in missing):
        return narrow
    refuse_unreachable(narrow, missing)  # what is known already may be enough to spare half a minute
    whole = TaskManager(include_defaults=True, include_path=[*own])
    for name in missing:
        if name not in whole.task_index:
            raise _unknown(name, whole.all_tasks, include_path)
    return whole


def _folders(include_path: Sequence[str | Path]) -> list[Path]:
    found = [Path(path).expanduser() for path in include_path]
    for path in found:
        if not path.is_dir():
            what = "is a file; name the folder it lies in" if path.exists() else "does not exist"
            raise UsageError(f"--include-path {path} {what}; it is a folder with the task's .yaml file")
    return found


def _harness_folder() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent


def _contents(root: Path) -> dict[Path, bytes]:
    return {
        Path(folder) / name: (Path(folder) / name).read_bytes()
        for folder, _, names in os.walk(root)
        for name in sorted(names)
        if name.endswith(".yaml")
    }


def _homes(names: Iterable[str], files: Mapping[Path, bytes]) -> list[Path]:
    """Folders of the files that define tasks or groups, where each has one such file."""
    homes: list[Path] = []
    for name in names:
        defined = re.compile(
            rb"^(?:task|group)\s*:\s*[\"']?" + re.escape(name.encode()) + rb"[\"']?\s*(?:#.*)?$", re.MULTILINE
        )
        at = [path for path, text in files.items() if defined.search(text)]
        if len(at) == 1:
            homes.append(at[0].parent)
    return list(dict.fromkeys(homes))


def _plain(entry: Any) -> bool:
    return entry is not None and entry.kind.name in ("TASK", "PY_TASK")


def _names(texts: Iterable[bytes]) -> set[str]:
    return {name.decode(errors="replace") for text in texts for name in _NAMED.findall(text)}


def _unknown(name: str, known: Iterable[str], include_path: Sequence[str | Path]) -> UsageError:
    near = difflib.get_close_matches(name, sorted(set(known)), n=4, cutoff=0.6)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    where = f" and none in {', '.join(map(str, include_path))}" if include_path else ""
    return UsageError(
        f"lm-evaluation-harness has no task {name!r}{where}.{hint} Built in: {', '.join(BUILT_IN)}; a task of your own "
        "needs --include-path FOLDER with its .yaml file; lm-eval ls tasks lists the harness's own."
    )


def refuse_unreachable(manager: Any, names: Sequence[str]) -> bool:
    """Look whether tasks need the network, and refuse where the network is not there and neither is the data.

    Returns:
        Whether ``datasets`` is to read from its cache alone: the hub is not there, or the environment says so.

    Raises:
        OfflineError: A task's data is on the hub, and neither the hub nor a copy of it can be reached.
    """
    from dynprobe.models._hub import probe
    from dynprobe.models._hub_errors import endpoint

    needed = _on_the_hub(manager.task_index, names)
    if not needed:
        return False
    told = next((key for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE") if _true(os.environ.get(key))), None)
    why = f"{told} is set" if told else probe(endpoint())
    if why is None:
        return False
    for task, data in needed.items():
        if not _cached(data):
            raise OfflineError(
                f"The task {task!r} reads {data!r} from the hub, which cannot be reached ({endpoint()}: {why}), and "
                "the local cache of datasets does not have it.\nType one of:\n"
                f"  --tasks {BUILT_IN[0]}     (built in, needs no network)\n"
                "  --include-path FOLDER     (a task of your own: dataset_path: json, and data_files)\n"
                f"  python -c \"import datasets; datasets.load_dataset('{data}')\"     (on a connected machine; then "
                "copy its cache here)"
            )
    return True


def _on_the_hub(index: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Tasks whose data are on the hub, with the name of the data."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        entry = index.get(name)
        if entry is None or name in seen:
            continue
        seen.add(name)
        waiting += list(entry.tags) if entry.kind.name == "TAG" else []
        settings = entry.cfg or {}
        members = settings.get("task") if entry.kind.name == "GROUP" else None
        for member in members if isinstance(members, list) else ():
            if isinstance(member, Mapping):
                waiting += [str(member[key]) for key in ("task", "group") if isinstance(member.get(key), str)]
            else:
                waiting.append(str(member))
        data = settings.get("dataset_path")
        if isinstance(data, str) and not settings.get("custom_dataset") and not _local(data, settings):
            found[name] = data
    return found


def _local(data: str, settings: Mapping[str, Any]) -> bool:
    """Whether a data set is read from files of this machine."""
    if data not in _FILES:
        return Path(data).expanduser().exists()
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    return not any("://" in path for path in _texts(files))


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [str(value)] if value is not None else []


def _cached(data: str) -> bool:
    """Whether ``datasets`` or the hub's own cache holds something of a data set."""
    import datasets
    from huggingface_hub import constants

    prepared = Path(datasets.config.HF_DATASETS_CACHE) / data.replace("/", "___")
    fetched = Path(constants.HF_HUB_CACHE) / f"datasets--{data.replace('/', '--')}" / "snapshots"
    return any(folder.is_dir() and any(folder.iterdir()) for folder in (prepared, fetched))


def _true(text: str | None) -> bool:
    return str(text or "").upper() in ("1", "ON", "YES", "TRUE")
