"""YAML files that users write: one reader, which makes plain data and nothing else.

YAML can do more than a settings file needs, and each of these would go wrong without a word: a key given twice (the
last one wins), an alias that contains itself, a few lines of aliases of aliases that stand for a billion items. They
are refused here, with the line, before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynprobe.errors import UsageError, near_path

__all__ = ["read_yaml"]

#: Items of a file, aliases written out; a hundred times more than any design needs.
_MOST = 100_000


def read_yaml(
    path: Path, what: str, *, as_text: bool = False, hint: str = "", same: Callable[[str], str] = str
) -> tuple[Any, Any]:
    """Read one YAML file.

    Args:
        path: The file.
        what: What it is, as messages call it (``panel file``).
        as_text: Leave every scalar as the text it is: YAML reads ``6:9`` as the number 369.
        hint: What messages add where the file is no YAML.
        same: What two keys of one mapping have in common if they are the same (``-`` and ``_``, say).

    Returns:
        The content, and its tree of nodes (None for an empty file), which knows the lines.

    Raises:
        UsageError: The file cannot be read, is no YAML, repeats a key, or is endless.
    """
    import yaml

    loader = yaml.BaseLoader if as_text else yaml.SafeLoader
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=loader)
        if root is not None:
            _size(root, f"{what} {path}", same, {})
        content = yaml.load(text, Loader=loader)
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror or error}.{near_path(path)}") from error
    except RecursionError as error:
        raise UsageError(f"{what} {path} is nested too deeply") from error
    except UsageError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # also a date that there is not
        raise UsageError(f"{what} {path} is not YAML: {error}{hint}") from error
    return content, root


def _size(node: Any, where: str, same: Callable[[str], str], known: dict[int, int]) -> int:
    """Number of items under a node, aliases written out; 0 stands for a node that is being counted."""
    import yaml

    place = f"{where}, line {node.start_mark.line + 1}"
    if id(node) in known:
        if not known[id(node)]:
            raise UsageError(f"{place}: an alias contains itself")
        return known[id(node)]
    known[id(node)], size = 0, 1
    lines: dict[str, int] = {}
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if key is not None:
            size += _size(key, where, same, known)
            if isinstance(key, yaml.ScalarNode):  # the text of a list of aliases would itself be endless
                name, line = same(str(key.value)), key.start_mark.line + 1
                if name in lines:
                    raise UsageError(f"{where}, line {line}: {name} stands there twice (line {lines[name]} too)")
                lines[name] = line
        size += _size(value, where, same, known)
        if size > _MOST:
            raise UsageError(f"{place}: more than {_MOST:,} items, aliases written out")
    known[id(node)] = size
    return size
