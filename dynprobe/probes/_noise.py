"""Noise as a pure function: ε(seed, row_key, site, pos) is the same vector wherever and whenever it is asked for.

A generator with a running state makes a row's noise depend on what was drawn before it: batch size, order, worker, the
step at which decoding began. Here a counter-based generator (Philox 4×64-10, Salmon et al. 2011, the one in NumPy) is
addressed instead of run: the seed and a hash of (row, site) are its key, the position is its counter. So no bookkeeping
can change a row's noise, a run can be continued in the middle, and all strengths of a sweep share their directions.
Vectors are drawn in float32 on the CPU and moved, hence equal on every device.

**Where the position stands in the counter matters.** The 256-bit counter counts *blocks* of four words and advances by
one per block, so with ``counter=pos`` in the lowest word the stream of position p + 1 is the stream of p shifted by
four words: neighbouring positions would receive shifted copies of one noise, and every statistic over positions would
be wrong while each single vector looks perfect. The position therefore stands in the **highest** word (2⁶⁴ blocks lie
between neighbours) and the distribution in the second highest, so that normals and uniforms asked for at one place are
independent as well.

A vector of length n is the beginning of the vector of length n + 1. Two writes with the same seed at the same site draw
the same noise, by definition; give them different seeds where that is not wanted.

Refused: negative seeds and positions. NumPy guarantees the bits of Philox for ever, the ziggurat that turns them into
normals only within a version line; a golden test watches it and the run's manifest records the version.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import UsageError

__all__ = [
    "NoiseSource",
    "gaussian",
    "gaussian_rows",
    "hash64",
    "row_key_from_tokens",
    "shared",
    "uniform",
    "uniform_rows",
]

Float32: TypeAlias = NDArray[np.float32]

_NORMAL: Final = 0
_UNIFORM: Final = 1
_SHARED: Final = 2
_KEY_TOKENS: Final = 16


@lru_cache(maxsize=65536)
def hash64(row_key: str, site: str) -> int:
    """Return 64 bits of BLAKE2b over both texts, each preceded by its length.

    The lengths keep ("ab", "c") and ("a", "bc") apart.

    Example:
        >>> hash64("ab", "c") == hash64("a", "bc")
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (row_key, site):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def row_key_from_tokens(ids: Iterable[Any]) -> str:
    """Return the row key of a text whose prompt has no name: a hash of its first 16 real tokens.

    Args:
        ids: Token ids without padding (a list, array or tensor); everything after the 16th is ignored, so the answer
            choices of one task item share their noise.

    Raises:
        UsageError: There is no token.

    Example:
        >>> row_key_from_tokens(range(16)) == row_key_from_tokens(range(40))
        True
    """
    first = [int(token) for _, token in zip(range(_KEY_TOKENS), ids, strict=False)]
    if not first:
        raise UsageError("a row without real tokens has no row key; give it a prompt id.")
    data = b"".join(token.to_bytes(8, "little", signed=True) for token in first)
    return "tok-" + hashlib.blake2b(data, digest_size=8).hexdigest()


def gaussian(seed: int, row_key: str, site: str, pos: int, dim: int) -> Float32:
    """Return ε ~ N(0, I), float32 [dim], as a pure function of its address.

    Args:
        seed: 0 ≤ seed < 2⁶⁴.
        row_key: The prompt's id (``row_key_from_tokens`` where none is known).
        site: The caller's name of the site, such as ``"resid_post.15"``.
        pos: 0-based position among real tokens.
        dim: Length of the vector.

    Raises:
        UsageError: The seed or the position is negative or too large.

    Example:
        >>> a = gaussian(0, "p1", "resid_post.15", 3, 576)
        >>> bool((a[:10] == gaussian(0, "p1", "resid_post.15", 3, 10)).all())
        True
    """
    return gaussian_rows(seed, [row_key], site, np.array([[_position(pos)]]), dim)[0, 0]


def uniform(seed: int, row_key: str, site: str, pos: int, dim: int) -> Float32:
    """Return independent uniforms in [0, 1), float32 [dim]; the arguments are those of ``gaussian``."""
    return uniform_rows(seed, [row_key], site, np.array([[_position(pos)]]), dim)[0, 0]


def shared(seed: int, site: str, dim: int) -> Float32:
    """Return ε ~ N(0, I), float32 [dim], that all rows and positions of a site share.

    It has a distribution word of its own in the counter, so it is independent of every row's noise.

    Args:
        seed: 0 ≤ seed < 2⁶⁴.
        site: Name of the site, such as ``"resid_post.15"``.
        dim: Length of the vector.

    Example:
        >>> bool((shared(0, "resid_post.15", 8) == gaussian(0, "", "resid_post.15", 0, 8)).any())
        False
    """
    return _rows(_SHARED, seed, [""], site, np.zeros((1, 1), np.int64), dim)[0, 0]


def gaussian_rows(seed: int, row_keys: Sequence[str], site: str, positions: Any, dim: int) -> Float32:
    """Return ``gaussian`` for a batch, float32 [batch, pos, dim].

    Args:
        seed: 0 ≤ seed < 2⁶⁴.
        row_keys: One key per row; rows with equal keys and positions are drawn once.
        site: Name of the site.
        positions: Integers [batch, pos] (array or CPU tensor); entries below 0 are skipped and stay zero.
        dim: Length of each vector.

    Raises:
        UsageError: The seed is negative or the numbers of rows differ.
    """
    return _rows(_NORMAL, seed, row_keys, site, positions, dim)


def uniform_rows(seed: int, row_keys: Sequence[str], site: str, positions: Any, dim: int) -> Float32:
    """Return ``uniform`` for a batch, float32 [batch, pos, dim]; the arguments are those of ``gaussian_rows``."""
    return _rows(_UNIFORM, seed, row_keys, site, positions, dim)


@dataclass(frozen=True)
class NoiseSource:
    """The address of a batch at one site, from which any seed's noise can be drawn.

    Args:
        row_keys: One key per row of the batch.
        site: Name of the site, such as ``"resid_post.15"``.
        positions: Integers [batch, pos]; below 0 = padding.
    """

    row_keys: Sequence[str]
    site: str
    positions: Any

    def gaussian(self, seed: int, dim: int, wanted: Any = None) -> Float32:
        """Return ε [batch, pos, dim]; entries where ``wanted`` [batch, pos] is false are not drawn and stay zero."""
        return gaussian_rows(seed, self.row_keys, self.site, self._wanted(wanted), dim)

    def uniform(self, seed: int, dim: int, wanted: Any = None) -> Float32:
        """Return uniforms in [0, 1), [batch, pos, dim], skipping like ``gaussian``."""
        return uniform_rows(seed, self.row_keys, self.site, self._wanted(wanted), dim)

    def _wanted(self, wanted: Any) -> NDArray[np.int64]:
        positions = _integers(self.positions)
        return positions if wanted is None else np.where(np.asarray(wanted), positions, -1)


def _rows(law: int, seed: int, row_keys: Sequence[str], site: str, positions: Any, dim: int) -> Float32:
    where = _integers(positions)
    if where.ndim != 2 or len(where) != len(row_keys):
        raise UsageError(f"noise for {len(row_keys)} row keys was asked at positions of shape {where.shape}.")
    # One generator is re-addressed through its state: building a fresh one costs more than drawing 576 normals, and
    # plain lists are read by the setter in half the time of arrays.
    bits = np.random.Philox(key=0)
    counter, key = [0, 0, law, 0], [_seed(seed), 0]
    state: Any = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": key},
        "buffer": [0, 0, 0, 0],
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    draw = np.random.Generator(bits).random if law == _UNIFORM else np.random.Generator(bits).standard_normal
    out = np.zeros((*where.shape, dim), dtype=np.float32)
    drawn: dict[tuple[str, bytes], int] = {}
    for row, row_key in enumerate(row_keys):
        twin = drawn.setdefault((row_key, where[row].tobytes()), row)
        if twin != row:
            out[row] = out[twin]
            continue
        key[1] = hash64(row_key, site)
        for column, pos in enumerate(where[row].tolist()):
            if pos >= 0:
                counter[3] = pos
                bits.state = state
                draw(out=out[row, column], dtype=np.float32)
    return out


def _integers(positions: Any) -> NDArray[np.int64]:
    return np.asarray(positions).astype(np.int64, copy=False)


def _position(pos: int) -> int:
    if pos < 0:
        raise UsageError(f"a position counts real tokens from 0, not {pos}.")
    return pos


def _seed(seed: int) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise UsageError(f"a seed is a whole number, 0 ≤ seed < 2^64, not {seed!r}.")
    return value
