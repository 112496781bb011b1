"""What the contract suites have in common: checks by name, run in order, each of which says what it found."""

from __future__ import annotations

from typing import ClassVar, NoReturn

from dynprobe.errors import SelfTestError, UsageError, did_you_mean

__all__ = ["Suite"]


class Suite:
    """Checks of one contract; each is a method of its name that fails, or returns False where it does not apply."""

    #: What is tried, in words.
    kind: ClassVar[str]
    checks: ClassVar[tuple[str, ...]]
    #: Name of the one that is tried.
    name: str = ""

    def run(self, only: str | None = None) -> tuple[str, ...]:
        """Run the checks, or one of them; return those that were made.

        Raises:
            SelfTestError: If one fails; the message says which and why.
            UsageError: If there is no such check.
        """
        if only is not None and only not in self.checks:
            raise UsageError(
                f"unknown check {only!r} of {self.kind}; known: {', '.join(self.checks)}."
                f"{did_you_mean(only, self.checks)}"
            )
        wanted = [check for check in self.checks if only in (None, check)]
        return tuple(check for check in wanted if getattr(self, check)() is not False)

    def fail(self, check: str, what: str) -> NoReturn:
        """Refuse the one that is tried."""
        raise SelfTestError(f"{self.name} breaks the contract of {self.kind} ({check}): {what}")
