"""Plan a run before it starts: which rows go together, how many bytes it writes, how long it takes.

Batches are planned once and stored; they are the unit of work and of continuation, so another batch size on the command
line continues an interrupted run without moving a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BYTES_PER_DEPTH_ROW", "BYTES_PER_TOKEN_ROW", "Estimate", "estimate", "plan_batches"]

#: Rows of a planned batch hold at most this many bytes of states and of logits.
_BATCH_BYTES = 512 * 2**20
#: A decode step of 24 rows costs little more than one of 4 (the weights are read once), so batches are large …
_MAX_ROWS = 32
#: … except the first, which brings a first table on screen soon and fails early where something is wrong.
_FIRST_ROWS = 4

#: Fitted to 45 runs of five models (``benchmarks/cost.py``; 4.7 and 14.7 bytes, relative error 9 % in the median and
#: 30 % at worst): compressed rows of the tokens and of the depths table.
BYTES_PER_TOKEN_ROW, BYTES_PER_DEPTH_ROW = 5, 15
#: Headers, footers and dictionaries of the files of one batch, however few rows they hold: what 314 batches of ten
#: thousand prompts took beyond their rows, 56 kB each (docs/benchmarks.md).
_BYTES_PER_BATCH = 60_000
#: What a run does once (folder, tables of prompts and conditions, summary, figures): the mean of the same fits.
_SECONDS_ONCE = 0.3


def plan_batches(
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    n_layers: int,
    dim: int,
    vocab: int,
    batch_size: int | str = "auto",
    exact: bool = False,
    early: bool = True,
) -> list[list[int]]:
    """Group prompts into batches, shortest first, so that little is padded.

    Args:
        lengths: Tokens of each prompt.
        max_new_tokens: Tokens each may grow by.
        n_layers: Number of blocks.
        dim: Width of the residual stream.
        vocab: Size of the vocabulary.
        batch_size: Rows per batch, or ``"auto"`` to keep states and logits of a batch within memory.
        exact: Only prompts of one length share a batch.
        early: Keep the first batch small, for a table soon.

    Returns:
        Indices of the prompts of each batch.

    Example:
        >>> plan_batches([5, 9, 5, 7], max_new_tokens=0, n_layers=2, dim=8, vocab=10, batch_size=2)
        [[0, 2], [3, 1]]
        >>> plan_batches([5, 9, 5, 7], max_new_tokens=0, n_layers=2, dim=8, vocab=10, exact=True)
        [[0, 2], [3], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    per_token = 4 * ((n_layers + 1) * dim + vocab)
    batches: list[list[int]] = []
    for index in order:
        width = lengths[index] + max_new_tokens
        most = _FIRST_ROWS if early and len(batches) == 1 and len(order) > 2 * _FIRST_ROWS else _MAX_ROWS
        limit = batch_size if isinstance(batch_size, int) else max(1, min(most, _BATCH_BYTES // (per_token * width)))
        fits = batches and len(batches[-1]) < limit
        if fits and exact and lengths[batches[-1][0]] != lengths[index]:
            fits = False
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class Estimate:
    """What a run will cost.

    Attributes:
        samples: Rows of the samples table.
        token_rows: Rows of the tokens table.
        depth_rows: Rows of the depths table.
        metric_bytes: Size of the tables on disk, compressed (estimate).
        state_bytes: Size of the states on disk; 0 without ``--states``.
        memory_bytes: States, logits and working memory of the largest batch.
        forward_tokens: Tokens that go through the model in all arms.
        seconds: Estimated time after loading, or None where the speed of the machine is unknown.
        weight_bytes: The weights, as they are stored in memory.
        free_bytes: What the device has free now; None where it does not say.
        rows_at_once: Rows of the largest batch that fit by this count; fewer than it has are done in parts.
    """

    samples: int
    token_rows: int
    depth_rows: int
    metric_bytes: int
    state_bytes: int
    memory_bytes: int
    forward_tokens: int
    seconds: float | None
    weight_bytes: int | None = None
    free_bytes: int | None = None
    rows_at_once: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as a plain mapping."""
        return asdict(self)


def estimate(
    lengths: Sequence[int],
    batches: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int,
    n_layers: int,
    dim: int,
    vocab: int,
    forced_arms: int,
    free_arms: int,
    state_sites: int = 0,
    update_sites: int = 0,
    itemsize: int = 4,
    tokens_per_second: float | None = None,
    steps_per_second: float | None = None,
) -> Estimate:
    """Count rows, bytes and forwards of a run.

    Args:
        lengths: Tokens of each prompt.
        batches: The batch plan.
        max_new_tokens: Tokens generated per text.
        num_samples: Texts per prompt.
        n_layers: Number of blocks.
        dim: Width.
        vocab: Vocabulary.
        forced_arms: Arms that are teacher-forced, sham included.
        free_arms: Arms that write their own text, the clean one included.
        state_sites: Sites whose states are written.
        update_sites: Of those, attention and MLP outputs, which have rows of their own in the depths table.
        itemsize: Bytes of one coordinate.
        tokens_per_second: Measured speed of whole texts, forward and metrics.
        steps_per_second: Measured speed of decoding steps, with what is measured at each.
    """
    grown = max(max_new_tokens - 1, 0)
    tokens = sum(n + grown for n in lengths) * num_samples
    stored_arms = max(forced_arms - 1, 1) + max(free_arms - 1, 0)  # sham rows equal to clean are one digest
    arms = forced_arms + max(free_arms - 1, 0)
    token_rows = tokens * stored_arms
    depth_rows = token_rows * (n_layers + 1 + update_sites)
    widest = max(sum(lengths[i] + grown for i in batch) for batch in batches) if batches else 0
    prefill = sum(lengths) * num_samples * free_arms
    steps = max_new_tokens * free_arms * num_samples * len(batches)
    seconds = None
    if tokens_per_second:
        seconds = _SECONDS_ONCE + (tokens * forced_arms + prefill) / tokens_per_second
        seconds += steps / steps_per_second if steps_per_second else 0.0
    return Estimate(
        samples=len(lengths) * num_samples * arms,
        token_rows=token_rows,
        depth_rows=depth_rows,
        metric_bytes=token_rows * BYTES_PER_TOKEN_ROW
        + depth_rows * BYTES_PER_DEPTH_ROW
        + len(batches) * _BYTES_PER_BATCH,
        state_bytes=token_rows * state_sites * dim * itemsize,
        memory_bytes=widest * 4 * ((n_layers + 1) * dim * 2 + vocab * 2),
        forward_tokens=tokens * forced_arms + prefill + max_new_tokens * free_arms * num_samples * len(lengths),
        seconds=seconds,
    )
