"""One comparison of a benchmark: arms that do the same work, and the one that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynprobe.probes import Subject
from dynprobe.protocols._bench_timing import rounds_of, spread, waiter

__all__ = ["Case", "Measurement", "Size", "random_ids"]


@dataclass(frozen=True)
class Size:
    """How large the work is.

    Attributes:
        batch: Rows.
        length: Tokens of each.
        new_tokens: Tokens that are written.
        strengths: Strengths of a sweep.
        layers: Layers of a sweep, at most.
        megabytes: Size of the states that are written and read by themselves.
        rounds: Rounds.
    """

    batch: int = 8
    length: int = 64
    new_tokens: int = 32
    strengths: int = 16
    layers: int = 4
    megabytes: float = 64.0
    rounds: int = 7


def random_ids(subject: Subject, rows: int, length: int, seed: int = 0) -> Tensor:
    """Return tokens to feed, ``[rows, length]``, on the model's device; what they say does not change the time."""
    vocab = subject.vocab_size or 100
    least = min(5, vocab - 1)
    high = max(vocab - 5, least + 1)
    return torch.randint(least, high, (rows, length), generator=torch.Generator().manual_seed(seed)).to(subject.device)


@dataclass
class Case:
    """Arms to be timed, and what is known of them before.

    Attributes:
        section: What is measured: ``capture``, ``metrics``, ``states``, ``disk``, ``generation``, ``sweep`` or
            ``attractor``.
        name: The size, e.g. ``8 × 64``.
        baseline: Name of the arm that the others are compared with.
        arms: Name → the work, the baseline among them.
        over: Arm → its own baseline, where that is another one.
        differences: Arm → largest absolute difference of what it gave from what dynprobe gave.
        absent: Arm → why it is not there.
        facts: Whatever else is to be told, e.g. bytes.
        warmup: Calls of each arm before the clock runs.
        after: Called behind each arm, outside the time.
        close: Called at the end.
    """

    section: str
    name: str
    baseline: str
    arms: dict[str, Callable[[], object]]
    over: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1
    after: Callable[[], object] | None = None
    close: Callable[[], object] | None = None

    def measure(self, device: torch.device, rounds: int) -> Measurement:
        """Time the arms."""
        try:
            seconds = rounds_of(self.arms, rounds=rounds, warmup=self.warmup, wait=waiter(device), after=self.after)
        finally:
            if self.close is not None:
                self.close()
        over = {name: self.over.get(name, self.baseline) for name in self.arms}
        return Measurement(
            self.section, self.name, self.baseline, seconds, over, self.differences, self.absent, self.facts
        )


@dataclass(frozen=True)
class Measurement:
    """What a case took.

    Attributes:
        section: As in :class:`Case`.
        name: As in :class:`Case`.
        baseline: As in :class:`Case`.
        seconds: Arm → its seconds, round by round.
        over: Arm → the arm it is compared with.
        differences: As in :class:`Case`.
        absent: As in :class:`Case`.
        facts: As in :class:`Case`.

    Example:
        >>> m = Measurement("capture", "1 × 4", "bare", {"bare": [1.0, 2.0], "read": [1.5, 2.0]}, {"read": "bare"})
        >>> m.ratio("read")
        (1.25, 1.125, 1.375)
    """

    section: str
    name: str
    baseline: str
    seconds: Mapping[str, list[float]]
    over: Mapping[str, str]
    differences: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def ratio(self, arm: str) -> tuple[float, float, float]:
        """Return the median over rounds of an arm's time over its baseline's, and the quartiles."""
        other = self.seconds[self.over[arm]]
        return spread([a / b for a, b in zip(self.seconds[arm], other, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """Return it as a plain mapping, with the raw times."""
        arms = {}
        for name, seconds in self.seconds.items():
            ratio, low, high = self.ratio(name)
            arms[name] = {
                "over": self.over[name], "ratio": ratio, "low": low, "high": high, "seconds_median": spread(seconds)[0],
                "seconds": seconds, "difference": self.differences.get(name),
            }  # fmt: skip
        return {
            "section": self.section, "case": self.name, "baseline": self.baseline, "arms": arms,
            "absent": dict(self.absent), "facts": dict(self.facts),
        }  # fmt: skip
