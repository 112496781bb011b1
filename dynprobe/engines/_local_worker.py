"""The process behind :class:`dynprobe.engines.Local`: opens a job, does its items, answers over one line.

Called as ``python -m dynprobe.engines._local_worker ADDRESS SEAT`` (as JSON) with the line's key on standard input.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from multiprocessing.connection import Client, Connection

from dynprobe.engines._contract import Seat, Worker

__all__: list[str] = []


def serve(line: Connection, worker: Worker) -> None:
    """Answer until the other end is gone."""
    while True:
        try:
            kind, value = pickle.loads(line.recv_bytes())  # noqa: S301 (from the caller, over a line with its key)
        except (EOFError, OSError):
            return
        answer: tuple[str, object]
        try:
            answer = ("done", worker.open(value) if kind == "open" else worker.work(value))
        except Exception as error:
            answer = ("error", sendable(error))
        try:
            line.send_bytes(pickle.dumps(answer))
        except OSError:  # the caller is gone, and nobody waits for this any more
            return


def sendable(error: Exception) -> Exception:
    """Return the error as it will arrive: itself where it survives the way, else its words."""
    import traceback

    from dynprobe.errors import DynprobeError, EngineError

    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301 (made one line above)
            if not isinstance(error, DynprobeError):  # a defect: where it happened is on the other side
                error.add_note("In the worker:\n" + "".join(traceback.format_exception(error)))
            return error
    except Exception:  # noqa: BLE001, S110, RUF100 (whatever goes wrong on the way, the words are sent)
        return EngineError(f"{type(error).__name__}: {error}")
    return EngineError(f"{type(error).__name__}: {error}")


def main(address: str, seat: str) -> None:
    """Call back, then serve."""
    key = bytes.fromhex(sys.stdin.read())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a library prints must not mix with the caller's output
    line = Client(address, authkey=key)
    serve(line, Worker(Seat(**json.loads(seat))))


if __name__ == "__main__":
    main(*sys.argv[1:])
