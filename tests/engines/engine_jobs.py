"""What the workers of these tests open; imported by name in processes of their own."""

import os
import signal
import time
from pathlib import Path

from dynprobe.errors import ModelNotFoundError, PromptError


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def open_job(payload, seat):
    scratch = Path(payload["scratch"])
    with (scratch / f"opened-{payload.get('name', '')}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if payload.get("broken"):
        raise PromptError("there is nothing to open")
    if payload.get("absent") == "open":
        raise ModelNotFoundError("there is no model here")

    def work(unit):
        deadly = payload["deadly"].get(unit, 0)
        begun = scratch / f"begun-{unit}"
        before = len(begun.read_text()) if begun.exists() else 0
        with begun.open("a") as file:
            file.write(".")
        if before < deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if payload.get("absent") == "work":
            raise ModelNotFoundError("there is no model here")
        if unit == payload.get("wrong"):
            raise PromptError(f"unit {unit} has no prompt")
        if unit == payload.get("defect"):
            raise UnpicklableError("this", "that")
        time.sleep(payload.get("sleep", 0.0))
        told = {"square": unit * unit, "threads": seat.threads, "here": seat.here}
        return {f"{name}.txt": str(value).encode() for name, value in told.items()}

    return work
