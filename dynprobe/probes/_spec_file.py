"""Spec files: YAML in which every scalar stays text, so that the mini-language has one parser.

YAML 1.1 has opinions about scalars that are wrong here: ``layers: 6:9`` would be the sexagesimal number 369, ``1e-3`` a
string, ``no`` a boolean. The base loader makes nothing but text, lists and mappings, which is also the safest choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynprobe.errors import UsageError


def load_yaml(path: Path) -> Any:
    """Return the file's lists and mappings with every scalar as text.

    Raises:
        UsageError: The file cannot be read, is no YAML, or repeats a key.
    """
    import yaml

    class TextLoader(yaml.BaseLoader):
        """PyYAML's loader that makes nothing but text, lists and mappings; refuses a key that is given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = self.construct_pairs(node, deep=True)
            names = [str(key) for key, _ in pairs]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UsageError(f"{path}: key {twice!r} is given twice (line {node.start_mark.line + 1} and below).")
            return dict(pairs)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=TextLoader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        hint = "values that end in a colon need quotes, positions: '1:'"
        raise UsageError(f"{path} is no YAML of perturbations: {error}\n({hint})") from error
