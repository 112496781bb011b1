"""An engine: crews of one worker process each, and a thread of the caller that waits for each of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe.engines import Done, Engine, Item, Job, Local

__all__ = ["Threads"]


class Threads(Engine):
    """Several small crews of one worker each, every one driven by a thread of its own.

    Args:
        workers: Number of crews.
    """

    name = "threads"

    def __init__(self, workers: int | str = "auto") -> None:
        super().__init__()
        self.workers = 2 if workers == "auto" else int(workers)
        self._crews = [Local(1, threads=1) for _ in range(self.workers)]

    @classmethod
    def made(cls, settings: Mapping[str, Any], out: Path) -> Threads:
        """Make it of a run's settings."""
        return cls(settings["workers"])

    def begin(self, job: Job) -> None:
        """Open the job in every crew."""
        for crew in self._crews:
            crew.begin(job)

    def map(self, job: Job, items: Sequence[Item]) -> Generator[Done, None, None]:
        """Yield the items as they are done; an error of one is raised once the others have stopped."""
        self.begin(job)
        done: queue.Queue[Done | BaseException | None] = queue.Queue()
        shares = [list(items[number :: self.workers]) for number in range(self.workers)]

        def work(crew: Local, share: list[Item]) -> None:
            try:
                for one in crew.map(job, share):
                    done.put(one)
            except BaseException as error:
                done.put(error)
            done.put(None)

        threads = [
            threading.Thread(target=work, args=pair, daemon=True) for pair in zip(self._crews, shares, strict=True)
        ]
        for thread in threads:
            thread.start()
        failed, running = None, len(threads)
        while running:
            found = done.get()
            if found is None:
                running -= 1
            elif isinstance(found, BaseException):
                failed = failed or found
            elif failed is None:
                yield found
        if failed is not None:
            raise failed

    def facts(self) -> dict[str, Any]:
        """Return what the crews tell, under one name."""
        told = [crew.facts() for crew in self._crews]
        workers = [
            {**worker, "id": f"threads-{number}-{worker['id']}"}
            for number, facts in enumerate(told)
            for worker in facts["workers"]
        ]
        return {"name": self.name, "workers": workers, "lost": [lost for facts in told for lost in facts["lost"]]}

    def close(self) -> None:
        """End the workers."""
        for crew in self._crews:
            crew.close()
