"""Words that a shell completes.

A key press cannot wait the seconds that torch needs to be imported. So names that the code defines are read from its
source (a tuple, the keys of a dictionary, a ``Literal``, a registry), and those on disk from the folders' names:
nothing of either is written down here a second time.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

__all__ = [
    "claims",
    "defined",
    "files",
    "folders",
    "known_models",
    "listed",
    "metrics",
    "models",
    "models_and_runs",
    "one_of",
    "perturbation",
    "runs",
]

_PACKAGE = Path(__file__).parents[1]
Completion = Callable[[str], list[str]]


def defined(file: str, name: str) -> list[str]:
    """Return the texts of a constant: a tuple's items, a dictionary's keys, what an annotated ``Literal`` allows.

    Of a registry these are its own names and those that other packages add.

    Args:
        file: Module, as a path inside the package.
        name: The constant, or a field of a class in the module.

    Raises:
        LookupError: The module has no such constant.

    Example:
        >>> defined("probes/_perturb_values.py", "KINDS")[:2]
        ['gaussian', 'direction']
        >>> defined("protocols/_config.py", "padding")
        ['auto', 'left', 'right', 'none']
    """
    for node in ast.walk(ast.parse((_PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == name:
            allowed = _literal(node.annotation)
            return allowed or _texts(node.value)
        if isinstance(node, ast.Assign) and name in [getattr(target, "id", None) for target in node.targets]:
            return _texts(node.value)
    raise LookupError(f"{file} does not define {name}")


def _literal(annotation: ast.expr) -> list[str]:
    named = [
        n for n in ast.walk(annotation) if isinstance(n, ast.Subscript) and getattr(n.value, "id", "") == "Literal"
    ]
    return [text for literal in named for text in _texts(literal.slice)]


def _texts(value: ast.expr | None) -> list[str]:
    if isinstance(value, ast.Call):  # a registry: its group, what it is, and its table of names
        group = next(iter(_texts(value.args[0])), "")
        own = [name for argument in value.args if isinstance(argument, ast.Dict) for name in _texts(argument)]
        return [*own, *(point.name for point in entry_points(group=group) if point.name not in own)]
    if isinstance(value, ast.Dict):
        items: list[ast.expr] = [key for key in value.keys if key is not None]
    else:
        items = list(value.elts) if isinstance(value, ast.Tuple | ast.List) else [value] if value is not None else []
    return [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def one_of(file: str, name: str, *more: str) -> Completion:
    """Return the completion of a value that is one of those a constant has."""
    return lambda incomplete: _starting((*defined(file, name), *more), incomplete)


def listed(file: str, name: str, *more: str) -> Completion:
    """Return the completion of values with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = set(before.split(","))
        return [before + comma + word for word in one_of(file, name, *more)(last) if word not in given]

    return complete


def models(incomplete: str) -> list[str]:
    """Complete a model: the zoo, the panel, what was fetched or lies in the hub's cache, and folders."""
    from dynprobe.models._known import near_names

    return _starting((*near_names(), *_cached()), incomplete) + _paths(incomplete, folders=True)


def models_and_runs(incomplete: str) -> list[str]:
    """Complete a model or a run."""
    return list(dict.fromkeys([*models(incomplete), *runs(incomplete)]))


def known_models(incomplete: str) -> list[str]:
    """Complete a name that ``fetch`` takes."""
    from dynprobe.models._known import near_names

    return _starting(near_names(), incomplete)


def _cached() -> Iterator[str]:
    """Models in the hub's cache, whose folders are called ``models--owner--name``."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for folder in sorted(cache.glob("models--*")):
        yield folder.name.removeprefix("models--").replace("--", "/")


def metrics(incomplete: str) -> list[str]:
    """Complete a metric's id.

    Those that are registered in a loop (``crit.*``, ``lockin.*``, ``plateau.*``, ``relax.*``) are missing: only running
    the module says them. None of them is among those that a run can be asked for.
    """
    found: set[str] = set()
    for module in sorted((_PACKAGE / "metrics").glob("*.py")):
        found.update(re.findall(r'MetricSpec\(\s*id="([^"]+)"', module.read_text(encoding="utf-8")))
    return _starting(sorted(found), incomplete)


def claims(incomplete: str) -> list[str]:
    """Complete a claim's id."""
    rows = (_PACKAGE / "claims" / "claims.yaml").read_text(encoding="utf-8")
    return _starting(re.findall(r"^ *- id: *([\w.]+)", rows, re.MULTILINE), incomplete)


def runs(incomplete: str) -> list[str]:
    """Complete a run: the newest under ``runs/`` first, then folders."""
    found = [str(manifest.parent) for manifest in sorted(Path("runs").glob("*/manifest.json"), reverse=True)]
    return list(dict.fromkeys([*_starting(found, incomplete), *_paths(incomplete, folders=True)]))


def perturbation(incomplete: str) -> list[str]:
    """Complete a key of the perturbation language, or the scale or kind that stands at its end."""
    if incomplete.startswith("@"):
        return ["@" + path for path in _paths(incomplete[1:])]
    before, comma, last = incomplete.rpartition(",")
    key, equals, value = last.partition("=")
    values = {
        "scale": ("probes/_scales.py", "SCALES"), "kind": ("probes/_perturb_values.py", "KINDS"),
        "phase": ("_types.py", "PHASES"), "component": ("_types.py", "COMPONENTS"),
    }  # fmt: skip
    if equals:
        words = _starting(defined(*values[key]), value) if key in values else []
        return [f"{before}{comma}{key}={word}" for word in words]
    keys = [word for name in ("WRITE_KEYS", "PLACE_KEYS") for word in defined("probes/_grammar.py", name)]
    return [f"{before}{comma}{word}=" for word in _starting(keys, key)]


def files(incomplete: str) -> list[str]:
    """Complete a path."""
    return _paths(incomplete)


def folders(incomplete: str) -> list[str]:
    """Complete the path of a folder."""
    return _paths(incomplete, folders=True)


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete)]


def _paths(incomplete: str, *, folders: bool = False) -> list[str]:
    """Paths that begin so; a shell that was told words completes no files by itself."""
    folder, _, name = incomplete.rpartition("/")
    place = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".")
    if not place.is_dir():
        return []
    found = [p for p in sorted(place.iterdir()) if p.name.startswith(name) and (p.is_dir() or not folders)]
    return [f"{folder}/{p.name}" if "/" in incomplete else p.name for p in found if name or not p.name.startswith(".")]
