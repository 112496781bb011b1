"""What the workers of the engines' suite open: work without a model, that fails where it is told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynprobe.engines import Seat
from dynprobe.errors import PromptError

__all__ = ["open_job"]


def open_job(payload: Mapping[str, Any], seat: Seat) -> Callable[[int], dict[str, bytes]]:
    """Open a job whose units are numbers.

    Args:
        payload: ``scratch`` a folder; ``broken`` whether opening fails; ``wrong`` a unit that raises an error;
            ``deadly`` unit → how often it kills its worker before it is done.
        seat: Where the worker sits.
    """
    scratch = Path(payload["scratch"])
    if payload.get("broken"):
        raise PromptError("there is nothing to open")

    def work(unit: int) -> dict[str, bytes]:
        begun = scratch / f"begun-{unit}"
        before = len(begun.read_text()) if begun.exists() else 0
        with begun.open("a") as file:
            file.write(".")
        if before < payload.get("deadly", {}).get(unit, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == payload.get("wrong"):
            raise PromptError(f"unit {unit} has no prompt")
        return {"square": str(unit * unit).encode(), "bytes": bytes(range(256)) * (unit + 1)}

    return work
