"""Noise as a pure function: addresses, independence of neighbours, laws, golden values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dynprobe.errors import UsageError
from dynprobe.probes._noise import (
    NoiseSource,
    gaussian,
    gaussian_rows,
    hash64,
    row_key_from_tokens,
    uniform,
    uniform_rows,
)

SITE = "resid_post.15"


def fresh(seed: int, row_key: str, site: str, pos: int, law: int) -> np.random.Generator:
    key = np.array([seed, hash64(row_key, site)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, law, pos], dtype=np.uint64)))


@given(st.integers(0, 2**64 - 1), st.text(max_size=8), st.integers(0, 2**40), st.integers(1, 33))
@settings(max_examples=50)
def test_readdressing_equals_fresh_construction(seed: int, row_key: str, pos: int, dim: int) -> None:
    gaussian_rows(1, ["before"], "x", [[0, 1]], 7)  # odd length: half a word stays buffered
    expected = fresh(seed, row_key, SITE, pos, 0).standard_normal(dim, dtype=np.float32)
    np.testing.assert_array_equal(gaussian(seed, row_key, SITE, pos, dim), expected)
    expected = fresh(seed, row_key, SITE, pos, 1).random(dim, dtype=np.float32)
    np.testing.assert_array_equal(uniform(seed, row_key, SITE, pos, dim), expected)


def test_batches_are_stacks_of_single_draws() -> None:
    keys, positions = ["a", "b", "a", "c"], np.array([[0, 1, 5], [-1, 0, 1], [0, 1, 5], [7, -1, 2**33]])
    for rows, single in ((gaussian_rows, gaussian), (uniform_rows, uniform)):
        batch = rows(3, keys, SITE, positions, 17)
        assert batch.dtype == np.float32
        for row, key in enumerate(keys):
            for column, pos in enumerate(positions[row]):
                expected = single(3, key, SITE, int(pos), 17) if pos >= 0 else np.zeros(17)
                np.testing.assert_array_equal(batch[row, column], expected)
        np.testing.assert_array_equal(rows(3, keys[::-1], SITE, positions[::-1], 17), batch[::-1])
        np.testing.assert_array_equal(rows(3, keys[1:2], SITE, positions[1:2], 17), batch[1:2])
        np.testing.assert_array_equal(rows(3, keys, SITE, torch.tensor(positions), 17), batch)


def test_a_short_vector_is_the_beginning_of_a_long_one() -> None:
    for single in (gaussian, uniform):
        np.testing.assert_array_equal(single(0, "p", SITE, 4, 600)[:77], single(0, "p", SITE, 4, 77))


def test_neighbouring_positions_are_uncorrelated_at_every_lag() -> None:
    """A counter in the lowest word would make position p + 1 a copy of p, shifted by eight float32 draws."""
    n = 4096
    for single in (gaussian, uniform):
        x = np.stack([single(0, "p", SITE, pos, n) for pos in (10, 11, 12)]).astype(np.float64)
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        for a, b in ((0, 1), (1, 2), (0, 2)):
            lags = np.correlate(x[a], x[b], mode="full")[n // 2 : -n // 2] / n
            assert np.abs(lags).max() < 6 / np.sqrt(n / 2)
        assert len(np.intersect1d(single(0, "p", SITE, 10, 64), single(0, "p", SITE, 11, 64))) == 0


def test_the_low_word_would_shift() -> None:
    """The trap itself, so that the test above is known to be able to fail."""
    low = [np.random.Generator(np.random.Philox(key=1, counter=pos)).random(64, dtype=np.float32) for pos in (10, 11)]
    np.testing.assert_array_equal(low[0][8:], low[1][:-8])


def test_every_part_of_the_address_matters() -> None:
    base = gaussian(0, "p", SITE, 4, 64)
    others = [
        gaussian(1, "p", SITE, 4, 64),
        gaussian(0, "q", SITE, 4, 64),
        gaussian(0, "p", "resid_post.16", 4, 64),
        gaussian(0, "p", SITE, 5, 64),
        gaussian(2**32, "p", SITE, 4, 64),
        gaussian(0, "p", SITE, 4 + 2**32, 64),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.5
        assert not np.isin(base, other).any()


def test_normals_and_uniforms_of_one_address_are_independent() -> None:
    x, y = gaussian(0, "p", SITE, 4, 20000), uniform(0, "p", SITE, 4, 20000)
    assert abs(stats.spearmanr(x, y).statistic) < 0.03


def test_laws() -> None:
    positions = np.arange(100)[None]
    x = gaussian_rows(0, ["p"], SITE, positions, 576).ravel()
    u = uniform_rows(0, ["p"], SITE, positions, 576).ravel()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert u.min() >= 0
    assert u.max() < 1


def test_golden_values() -> None:
    """If NumPy changes its ziggurat, every stored run's noise changes: that must not pass unnoticed."""
    assert hash64("p1", SITE) == 16185350828069313396
    np.testing.assert_array_equal(
        gaussian(0, "p1", SITE, 3, 4), np.array([1.1308768, -0.31163585, 1.8528287, 0.79391366], dtype=np.float32)
    )
    np.testing.assert_array_equal(
        uniform(0, "p1", SITE, 3, 4), np.array([0.5670994, 0.97119194, 0.900296, 0.11838347], dtype=np.float32)
    )


def test_hash64_keeps_its_parts_apart() -> None:
    assert hash64("ab", "c") != hash64("a", "bc")
    assert hash64("", "a") != hash64("a", "")
    assert 0 <= hash64("é", SITE) < 2**64


def test_row_keys_of_texts_without_names() -> None:
    assert row_key_from_tokens([1, 2, 3]) == row_key_from_tokens(torch.tensor([1, 2, 3]))
    assert row_key_from_tokens(range(16)) == row_key_from_tokens(range(17))
    assert row_key_from_tokens(range(15)) != row_key_from_tokens(range(16))
    assert row_key_from_tokens([1, 2]) != row_key_from_tokens([2, 1])
    assert row_key_from_tokens([1]).startswith("tok-")
    with pytest.raises(UsageError, match="prompt id"):
        row_key_from_tokens([])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "0"])
def test_impossible_seeds(seed: object) -> None:
    with pytest.raises(UsageError, match="seed"):
        gaussian(seed, "p", SITE, 0, 4)  # type: ignore[arg-type]


def test_impossible_addresses() -> None:
    with pytest.raises(UsageError, match="position"):
        gaussian(0, "p", SITE, -1, 4)
    with pytest.raises(UsageError, match="2 row keys"):
        gaussian_rows(0, ["a", "b"], SITE, [[0, 1]], 4)


def test_a_source_draws_only_what_is_wanted() -> None:
    source = NoiseSource(["a", "b"], SITE, torch.tensor([[0, 1], [-1, 0]]))
    full = source.gaussian(5, 8)
    np.testing.assert_array_equal(full[1, 1], gaussian(5, "b", SITE, 0, 8))
    some = source.gaussian(5, 8, np.array([[True, False], [True, True]]))
    np.testing.assert_array_equal(some, full * [[[1], [0]], [[1], [1]]])
    np.testing.assert_array_equal(source.uniform(5, 8)[0, 1], uniform(5, "a", SITE, 1, 8))
