"""What a loop is asked for beyond what its model was trained with: allowed, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynprobe.probes._subject import Subject

__all__ = ["warn_beyond"]


def warn_beyond(subject: Subject, asked: Sequence[int] | None = None) -> str:
    """Warn once where a loop makes, or is to make, more iterations than its model was trained with.

    Args:
        subject: The subject.
        asked: Numbers of iterations that are asked for; None means the number that the model makes now.

    Returns:
        The remark; empty where there is nothing to remark, or where it is not known what the model was trained with.
    """
    loop = subject.loop
    trained = loop.trained(subject.model) if loop is not None and loop.trained is not None else None
    if loop is None or trained is None:
        return ""
    if asked is None:
        asked = [loop.iterations(subject.model)] if loop.iterations is not None else []
    beyond = sorted({T for T in asked if trained < T})
    if not beyond:
        return ""
    lies = "lies" if len(beyond) == 1 else "lie"
    remark = f"T = {', '.join(map(str, beyond))} {lies} above the trained depth of {trained} iterations"
    warnings.warn(f"{subject.name}: {remark}; nothing was learned about what happens there", stacklevel=2)
    return remark
