"""What ``bench`` does: one call, then printing."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from dynprobe.cli._commands import print_json, settings_of

__all__ = ["bench_command"]


def bench_command(given: dict[str, Any]) -> None:
    """``dynprobe bench``."""
    as_json = bool(given.pop("json", False))
    settings = settings_of(given)
    quiet = bool(settings.pop("quiet", False)) or as_json
    model = settings.pop("model")
    from dynprobe.protocols import bench

    name = re.sub(r"[^\w.-]+", "-", Path(model).name or "model")
    settings.setdefault("out", Path(f"bench-{name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}.json"))

    def tell(words: str) -> None:
        print(words, file=sys.stderr, flush=True)  # noqa: T201

    found = bench(model, listener=tell if sys.stderr.isatty() and not quiet else None, **settings)
    if as_json:
        print_json(found.as_dict() | {"path": str(found.path)})
    else:
        from dynprobe.cli import _render_bench

        _render_bench.result(found)
