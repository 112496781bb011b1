"""How large a difference may be and still mean nothing.

Two runs of one model on the same tokens differ by what their arithmetic rounds away: another order of a sum, another
kernel, another batch shape. At depth d the states of a residual stream have been rounded about d + 1 times; were the
roundings independent, their relative size would grow with √(d + 1). So the floor of depth d is

    floor(d) = max( 8 · u · √(d + 1),  √dim · measured )

``u`` is the unit roundoff of the coarser of the two dtypes (half the distance of neighbouring numbers at 1), 8 leaves
room for the sums inside a block, and ``measured`` is what the runs themselves found: the self-test *alone* of each
manifest stores the largest deviation of one coordinate between a row in a padded batch and the row alone, relative to
the largest state. A run whose self-test failed went on without padding, so its number says nothing and is left out.

The readout turns a relative error of the state into one of the logits, which is about as large a part of their spread
of a few nats, and the loss moves by at most twice the error of one of them; so NLL and entropy have the floor
8 · floor(last depth), in nats. Both rules are conventions, not theorems: a model with huge single activations rounds
worse. ``floor=`` puts a number of the reader's own in place of the rule, the same at every depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import UsageError
from dynprobe.runs._manifest import Manifest

__all__ = ["UNIT_ROUNDOFF", "Floor", "floor_of"]

#: Half the distance between 1 and the next number of a dtype.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

_ROOM = 8.0
_NATS = 8.0


@dataclass(frozen=True)
class Floor:
    """The noise floor of a pair of runs.

    Attributes:
        unit: Unit roundoff of the coarser dtype.
        dtype: That dtype.
        measured: Relative error that the self-tests measured, times √dim; 0 where there is none.
        fixed: The reader's own floor, or None.
    """

    unit: float
    dtype: str
    measured: float = 0.0
    fixed: float | None = None

    def at(self, depth: Any) -> NDArray[np.float64]:
        """Return the floor of relative differences of states at these depths.

        Example:
            >>> floor = Floor(2.0**-24, "float32")
            >>> [float(f"{v:.3g}") for v in floor.at([0, 3, 99])]
            [4.77e-07, 9.54e-07, 4.77e-06]
        """
        depths = np.asarray(depth, dtype=np.float64)
        if self.fixed is not None:
            return np.full(depths.shape, self.fixed)
        return np.maximum(_ROOM * self.unit * np.sqrt(depths + 1.0), self.measured)

    def nats(self, last_depth: int) -> float:
        """Return the floor of NLL and entropy, in nats."""
        return _NATS * float(self.at(last_depth))

    def as_dict(self) -> dict[str, Any]:
        """Return the floor and its rule as plain data."""
        rule = "given" if self.fixed is not None else "max(8·u·√(depth + 1), √dim · measured)"
        return {"rule": rule, "u": self.unit, "dtype": self.dtype, "measured": self.measured, "floor": self.fixed}

    def __str__(self) -> str:
        if self.fixed is not None:
            return f"{self.fixed:.3g} at every depth (given)"
        low = float(self.at(0))
        said = "8·u·√(depth + 1)" if low > self.measured else "the self-tests' own, √dim · measured"
        return f"{low:.3g} at depth 0 ({self.dtype}; {said})"


def floor_of(a: Manifest, b: Manifest, given: float | None = None) -> Floor:
    """Return the noise floor of two runs.

    Args:
        a: Manifest of one run.
        b: Manifest of the other.
        given: A floor of the reader's own.

    Raises:
        UsageError: The given floor is negative or no number.
    """
    if given is not None and not (math.isfinite(given) and given >= 0):
        raise UsageError(f"--floor {given}: a relative difference of 0 or more is needed, such as 1e-5")
    dtypes = [dtype_of(a), dtype_of(b)]
    coarse = max(dtypes, key=lambda name: UNIT_ROUNDOFF[name])
    return Floor(UNIT_ROUNDOFF[coarse], coarse, max(_measured(a), _measured(b)), given)


def dtype_of(manifest: Manifest) -> str:
    """Return the dtype of a run's states; float32 where it does not say."""
    dtypes = manifest.dtypes
    named = dtypes.get("weights") if isinstance(dtypes, Mapping) else dtypes
    return str(named) if named in UNIT_ROUNDOFF else "float32"


def _measured(manifest: Manifest) -> float:
    tests = manifest.self_tests
    alone = tests.get("alone") if isinstance(tests, Mapping) else None
    if not isinstance(alone, Mapping) or not alone.get("passed"):
        return 0.0
    detail = alone.get("detail")
    value = detail.get("states") if isinstance(detail, Mapping) else None
    return math.sqrt(_dim(manifest)) * value if isinstance(value, float) and math.isfinite(value) else 0.0


def _dim(manifest: Manifest) -> int:
    model = manifest.model if isinstance(manifest.model, Mapping) else {}
    structure = model.get("structure")
    dim = structure.get("dim") if isinstance(structure, Mapping) else None
    return dim if isinstance(dim, int) and dim > 0 else 1
