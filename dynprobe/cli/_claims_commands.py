"""What ``claims`` does: one call each, then printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["list_command", "log_command", "show_command", "test_command"]


def list_command(topic: str | None, testable: bool, log: Path | None, as_json: bool) -> None:
    """``dynprobe claims``."""
    from dynprobe.claims import ClaimLog, load
    from dynprobe.cli import _render_claims

    found = load()
    topics = dict.fromkeys(c.topic for c in found)
    if topic is not None and topic not in topics:
        raise UsageError(f"no topic {topic!r}.{did_you_mean(topic, topics)} Topics: {', '.join(topics)}.")
    chosen = [c for c in found if topic in (None, c.topic) and (c.testable or not testable)]
    last = {} if log is None else {r["claim"]: r for r in ClaimLog(log).records() if r["kind"] == "outcome"}
    if as_json:
        rows = [
            c.model_dump(mode="json", exclude_defaults=True)
            | {"testable": c.testable, "last_outcome": last.get(c.id, {}).get("outcome")}
            for c in chosen
        ]
        print_json({"claims": rows})
    else:
        _render_claims.listing(chosen, last)


def show_command(claim: str, as_json: bool) -> None:
    """``dynprobe claims show``."""
    from dynprobe.claims import find, texts
    from dynprobe.cli import _render_claims

    found = find(claim)
    if as_json:
        print_json(found.model_dump(mode="json", exclude_defaults=True) | {"testable": found.testable})
    else:
        _render_claims.claim(found, texts())


def test_command(
    claim: str, models: str | None, runs: Sequence[Path], out: str, log: Path | None, given: Mapping[str, Any],
    settings: Sequence[str], as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """``dynprobe claims test``."""
    import yaml

    from dynprobe.claims import test
    from dynprobe.cli import _render_claims
    from dynprobe.cli._progress import Listener

    asked = {k: v for k, v in given.items() if v is not None}
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"--set {text!r}; it is KEY=VALUE, such as max_new_tokens=64")
        asked[key.replace("-", "_")] = yaml.safe_load(value)
    if "prompts" in asked:  # a text would be read as a list of prompts
        asked["prompts"] = Path(asked["prompts"])
    with Listener(quiet=quiet or as_json, tables=False) as listener:
        verdict = test(claim, models or (), runs=runs, out=out, log=log, listener=listener, **asked)
    print_json(verdict.to_dict()) if as_json else _render_claims.verdict(verdict)


def log_command(log: Path | None, verify: bool, as_json: bool) -> None:
    """``dynprobe claims log``."""
    from dynprobe.claims import PILOT_FILE, ClaimLog, LogError
    from dynprobe.cli import _render_claims

    if log is not None and not log.exists():
        raise UsageError(f"--log {log}: there is no such file; `dynprobe claims test … --log {log}` makes it")
    book = ClaimLog(log or PILOT_FILE)
    wrong = book.verify()
    if not verify:
        records = book.records()
        print_json({"records": records}) if as_json else _render_claims.records(records)
    if wrong:
        said = [f"  {f'line {p.line}: ' if p.line else ''}{p.what}" for p in wrong]
        raise LogError("\n".join([f"{book.path} does not hold together:", *said]))
    if not verify:
        return
    n = len(book.records())
    print_json({"log": str(book.path), "ok": True, "records": n}) if as_json else _render_claims.verified(book.path, n)
