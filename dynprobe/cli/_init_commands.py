"""What ``init`` writes: the settings of a protocol as a commented YAML file.

The settings, their defaults and what they may be come from the protocol's configuration and signature; their words are
those of the command's help. So an untouched file says what the bare command says.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dynprobe.cli._help import PANELS, Program
from dynprobe.errors import RunFolderError, UsageError, did_you_mean, near_path

__all__ = ["PROTOCOLS", "init_command", "template"]

#: Protocol → configuration and function, in :mod:`dynprobe.protocols`.
PROTOCOLS = {
    "run": ("RunConfig", "run"),
    "sweep": ("SweepConfig", "sweep"),
    "threshold": ("ThresholdConfig", "threshold"),
    "iterate": ("IterateConfig", "iterate"),
    "recover": ("RecoverConfig", "recover"),
    "attract": ("AttractConfig", "attract"),
    "dissociate": ("DissociateConfig", "dissociate"),
    "panel": ("PanelConfig", "panel"),
    "eval": ("EvaluateConfig", "evaluate"),
}
#: Settings without which a protocol does nothing: what the file says in place of a default.
_ASKED = {("panel", "models"): ["tiny-llama", "tiny-cem"], ("eval", "tasks"): ["dynprobe_cloze"]}
_WIDTH = 118
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def init_command(file: str | None, protocol: str, *, force: bool, quiet: bool) -> None:
    """``dynprobe init``."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"--for {protocol}: no such protocol.{did_you_mean(protocol, PROTOCOLS)} {_listed(PROTOCOLS)}")
    text = template(protocol)
    if file == "-":
        sys.stdout.write(text)
        return
    path = Path(file or f"{protocol}.yaml")
    if path.exists() and not force:
        raise RunFolderError(f"{path} is there already; --force replaces it, - prints to standard output")
    if not path.parent.is_dir():
        raise RunFolderError(
            f"{path} cannot be written: there is no folder {path.parent}.{near_path(path.parent)} Make it first."
        )
    from dynprobe.runs._atomic import write_bytes

    write_bytes(path, text.encode())
    if not quiet:
        print(f"written: {path}. Edit it, then type: {_usage(protocol, str(path))}")  # noqa: T201


def template(protocol: str) -> str:
    """Return the settings of a protocol as commented YAML, every one at its default.

    Args:
        protocol: ``run``, ``sweep``, ``threshold``, ``iterate``, ``recover``, ``attract``, ``dissociate``, ``panel`` or
            ``eval``.

    Example:
        >>> print(template("run"))  # doctest: +ELLIPSIS
        # Settings of `dynprobe run`, each at its default...
        max_new_tokens: 32
        ...
    """
    from dynprobe import __version__, protocols

    kind, function = (getattr(protocols, name) for name in PROTOCOLS[protocol])
    signature = inspect.signature(function).parameters
    options: dict[str, Any] = {str(p.name): p for p in Program(name="dynprobe").commands[protocol].params}
    sections: dict[str, list[str]] = {"": [], **{panel: [] for panel in PANELS}}
    for name, field in kind.model_fields.items():
        option = options.get(name)
        if option is None and protocol != "panel":  # filled in by the protocol, or another protocol's
            continue
        heading = getattr(option, "rich_help_panel", None) or ""
        words = str(field.description if option is None else option.help)
        said = _ASKED.get((protocol, name), _default(field, signature.get(name)))
        sections[heading].append(f"{_comment(words + _allowed(field, words))}\n{_yaml(name)}: {_yaml(said)}\n")
    own = "design" if protocol == "panel" else "settings"
    head = (
        f"Settings of `dynprobe {protocol}`, each at its default (dynprobe {__version__}): the file as it is says what "
        f"the bare command says. Use: {_usage(protocol, 'FILE')}. Options typed beside it win. A line may be left out."
    )
    blocks = [_comment(head) + "\n"]
    for heading, entries in sections.items():
        if entries:
            title = heading or f"{protocol}: its own {own}"
            blocks.append("\n".join([f"# ---- {title} ".ljust(_WIDTH, "-") + "\n", *entries]))
    return "\n".join(blocks)


def _usage(protocol: str, file: str) -> str:
    return f"dynprobe panel {file}" if protocol == "panel" else f"dynprobe {protocol} --config {file}"


def _default(field: Any, parameter: inspect.Parameter | None) -> Any:
    """What holds where nothing is said: the signature's value where it has one, else the configuration's."""
    given = None if parameter is None else parameter.default
    if given not in (None, (), inspect.Parameter.empty):
        return [given] if isinstance(given, str) and field.default == () else given
    return field.get_default(call_default_factory=True)


def _allowed(field: Any, words: str) -> str:
    """What a setting may be, as far as its words do not say it."""
    bounds = [f"{sign} {getattr(m, key):g}" for m in field.metadata for key, sign in _BOUNDS.items() if hasattr(m, key)]
    choices = [str(v) for literal in _literals(field.annotation) for v in get_args(literal)]
    said = f" One of: {', '.join(choices)}." if any(choice not in words for choice in choices) else ""
    return said + (f" ({', '.join(bounds)})" if bounds else "")


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [annotation]
    return [found for part in get_args(annotation) for found in _literals(part)]


def _comment(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _yaml(value: Any) -> str:
    """A value as one line of YAML; all of JSON is YAML, but for the floats that YAML takes for texts."""
    import yaml

    plain = json.loads(json.dumps(value))
    line = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return line.removesuffix("...").strip()


def _listed(names: Any) -> str:
    return f"There are: {', '.join(names)}."
