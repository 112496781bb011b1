"""B/A/D states without limits: a hidden Markov model finds three kinds of step by itself.

Each step along depth is described by κ, its turning angle, and the lens entropy of the depth it leads to as a share of
ln V. A Gaussian hidden Markov model with three states and diagonal covariances (hmmlearn) is fitted to all sequences
together, and each step gets its state on the most probable path. States are numbered by their mean κ, the smallest
first; they are not called B, A and D, because nothing makes them so.

Features are standardised over all steps before the fit, or the library's floor under the variances would decide what
counts as a state. Expectation–maximisation ends in local optima: it is begun several times from seeded starts and the
fit with the largest likelihood is kept; how many of them reached it is reported. A step without a turning angle, or
with any other number missing, carries no label and cuts its sequence in two.

Needs the extra ``hmm``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Bools, Result
from dynprobe.metrics._symbols import GAP

__all__ = ["HmmStates", "hmm_states", "state_features"]

N_STATES = 3
#: A fit of 3 states in 3 dimensions has 26 free parameters; fewer steps than this say nothing about them.
FEWEST = 30
#: Binary exponent of a feature beyond which it is scaled by a power of two first.
FARTHEST = 300


@dataclass(frozen=True, slots=True, eq=False)
class HmmStates:
    """Fitted states.

    Args:
        labels: State of each step of each sequence, 0 … 2 by rising mean κ; −1 without a label.
        means: Mean features [state, feature] in the units handed in.
        sd: Standard deviations [state, feature].
        transitions: Transition matrix [state, state].
        log_likelihood: Of the standardised features.
        n_steps: Steps the fit was made on.
        n_missing: Steps left out.
        n_best: Starts that reached the best likelihood to 1e-3.
        n_starts: Starts.
        converged: Whether the best one converged.
        reason: Why there are no states, or ``not-converged`` beside some.
    """

    labels: tuple[NDArray[np.int64], ...]
    means: Array
    sd: Array
    transitions: Array
    log_likelihood: float
    n_steps: int
    n_missing: int
    n_best: int
    n_starts: int
    converged: bool
    reason: str | None

    @property
    def words(self) -> list[str]:
        """Labels as words over "012", gaps as "?", for :func:`~dynprobe.metrics.symbols`."""
        return ["".join(GAP if k < 0 else str(k) for k in row) for row in self.labels]


def state_features(lag: Any, turn: Any, entropy: Any, vocab: int) -> Array:
    """Features of every step: κ_l, turning angle, and lens entropy of depth l + 1 over ln V.

    Args:
        lag: κ terms [step, …].
        turn: Turning angles [step − 1, …] in rad; the first belongs to step 1.
        entropy: Logit-lens entropies [step + 1, …] in nats.
        vocab: Size of the vocabulary.

    Returns:
        [step, …, 3]; the turning angle of step 0 is NaN.

    Example:
        >>> state_features([0.1, 0.2], [1.0], [2.0, 1.0, 0.0], vocab=10)[1].round(3).tolist()
        [0.2, 1.0, 0.0]
    """
    from dynprobe.metrics._bad_states import _read

    k, t, _ = _read(lag, turn, entropy, vocab)
    return np.stack([k, t, as_array(entropy, "states.hmm/1")[0][1:] / np.log(vocab)], axis=-1)


def hmm_states(sequences: Any, *, n_starts: int = 8, n_iter: int = 300, tol: float = 1e-4, seed: int = 0) -> HmmStates:
    """Fit three Gaussian states to sequences of step features, and label every step.

    Args:
        sequences: One array [step, 3] from :func:`state_features` per unit, or one such array, or [step, unit, 3].
        n_starts: Seeded starts.
        n_iter: Most iterations of each.
        tol: Gain of log-likelihood that ends one.
        seed: Seed of the starts.

    Returns:
        Labels and fit. With fewer than 30 known steps (``"steps<30"``), or a feature that is constant
        (``"zero-denominator"``), every label is −1.

    Raises:
        MetricError: The features have another shape, or hmmlearn is not installed.

    Source:
        ``states.hmm/1``; hmmlearn's GaussianHMM.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> level = np.repeat([0.1, 0.5, 0.9], 20)[:, None]
        >>> found = hmm_states(level + 0.01 * rng.normal(size=(60, 3)))
        >>> found.words[0] == "0" * 20 + "1" * 20 + "2" * 20
        True
    """
    rows = _sequences(sequences)
    known: list[Bools] = [np.logical_and.reduce(np.isfinite(x), axis=1) for x in rows]
    n_all = sum(len(x) for x in rows)
    n_steps = int(sum(ok.sum() for ok in known))
    pieces, lengths = _pieces(rows, known)
    exponent = np.frexp(np.abs(pieces).max(0, initial=0.0))[1]
    exponent = np.where(np.abs(exponent) > FARTHEST, exponent, 0)
    pieces = np.ldexp(pieces, -exponent)  # features whose squares leave the range of the arithmetic
    blank = tuple(np.full(len(x), -1) for x in rows)
    spread = pieces.std(0) if n_steps else np.zeros(3)
    why = "empty" if not n_all else f"steps<{FEWEST}" if n_steps < FEWEST else None
    if why is None and 2 * n_steps < n_all:
        why = "coverage"
    if why is None and (spread <= 1e-12 * np.abs(pieces).max(0)).any():
        why = "zero-denominator"
    if why is not None:
        nothing = np.full((N_STATES, 3), np.nan)
        return HmmStates(
            blank, nothing, nothing, nothing[:, :N_STATES], float("nan"), n_steps, n_all - n_steps, 0, n_starts, False,
            why,
        )  # fmt: skip
    centre = pieces.mean(0)
    scaled = (pieces - centre) / spread
    best, scores = _fit(scaled, lengths, n_starts, n_iter, tol, seed)
    order = np.argsort(best.means_[:, 0], kind="stable")
    rank = np.argsort(order)
    path = rank[best.predict(scaled, lengths)]
    at = 0
    for out, ok in zip(blank, known, strict=True):
        out[ok] = path[at : at + int(ok.sum())]
        at += int(ok.sum())
    top = max(scores)
    converged = bool(best.monitor_.converged)
    sd = np.sqrt(np.stack([np.diag(c) for c in best.covars_]))[order] * spread
    sd, centres = (np.ldexp(v, exponent) for v in (sd, best.means_[order] * spread + centre))
    return HmmStates(
        blank, centres, sd, best.transmat_[np.ix_(order, order)], float(top), n_steps,
        n_all - n_steps, sum(top - s <= 1e-3 for s in scores), n_starts, converged,
        None if converged else "not-converged",
    )  # fmt: skip


def _sequences(sequences: Any) -> list[Array]:
    if isinstance(sequences, (list, tuple)) and sequences and np.ndim(sequences[0]) == 2:
        rows = [as_array(x, "states.hmm/1")[0] for x in sequences]
    else:
        x = as_array(sequences, "states.hmm/1")[0]
        rows = [x] if x.ndim == 2 else list(np.moveaxis(x, 1, 0)) if x.ndim == 3 else []
    if not rows or any(x.ndim != 2 or x.shape[1] != 3 for x in rows):
        raise MetricError(
            "states.hmm/1 takes [step, 3], [step, unit, 3], or a list of [step, 3]: κ, turning angle, entropy/ln V."
        )
    return rows


def _pieces(rows: Sequence[Array], known: Sequence[Bools]) -> tuple[Array, list[int]]:
    """All known steps one after the other, and the lengths of the stretches without a gap."""
    lengths: list[int] = []
    for ok in known:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ok.astype(np.int8), [0]])))
        lengths += [int(b - a) for a, b in edges.reshape(-1, 2)]
    return np.concatenate([x[ok] for x, ok in zip(rows, known, strict=True)]), lengths


def _fit(x: Array, lengths: list[int], n_starts: int, n_iter: int, tol: float, seed: int) -> tuple[Any, list[float]]:
    try:
        from hmmlearn.hmm import GaussianHMM
    except ImportError:
        raise MetricError('states.hmm/1 needs hmmlearn: pip install "dynprobe[hmm]".') from None
    log = logging.getLogger("hmmlearn")
    level = log.level
    log.setLevel(logging.ERROR)  # whether it converged is in the result
    try:
        fits = []
        for k in range(n_starts):
            model = GaussianHMM(
                N_STATES, covariance_type="diag", n_iter=n_iter, tol=tol, random_state=seed + k, min_covar=1e-3
            )
            fits.append(model.fit(x, lengths))
        scores = [float(model.score(x, lengths)) for model in fits]
    finally:
        log.setLevel(level)
    return fits[int(np.argmax(scores))], scores


def _compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    x = as_array(inputs[0], metric_id)[0]
    if x.ndim != 2:
        raise MetricError(f"{metric_id} takes table[step, 3]; hmm_states takes many at once. Found {list(x.shape)}.")
    if mask is not None:
        keep = np.asarray(mask, bool)
        if keep.shape != (len(x),):
            raise MetricError(f"{metric_id}: the mask has shape {list(keep.shape)}, expected {[len(x)]}.")
        x = x[keep]
    found = hmm_states(x, n_starts=params["n_starts"], seed=params["seed"])
    undefined = np.isnan(found.log_likelihood)
    extras = {"log_likelihood": found.log_likelihood, "n_best": found.n_best, "converged": found.converged}
    coverage = found.n_steps / len(x) if len(x) else float("nan")
    value = float("nan") if undefined else found.words[0]
    return Result(value, found.reason, coverage, 1, found.n_steps, metric_id, extras=extras)


register(
    MetricSpec(
        id="states.hmm/1",
        sentence="Kind of every step along depth, as three Gaussian states of a hidden Markov model.",
        formula=(
            "features (κ_l, turning angle, h_{l+1}/ln V), standardised over all steps; 3-state Gaussian HMM, diagonal "
            "covariances, EM from n_starts seeded starts, largest likelihood kept; Viterbi path; states numbered by "
            "rising mean κ; < 30 steps → NaN; steps with a missing number carry no label and cut the sequence"
        ),
        latex=(
            r"\hat z = \arg\max_{z}\,P\bigl(z\mid\kappa_l,\ \text{turn}_l,\ h_{l+1}/\ln V\bigr), \qquad "
            r"z_l\in\{0,1,2\}"
        ),
        input="table[step,3]: κ_l, turning angle, lens entropy / ln V",
        value_range="word over 0, 1, 2, ?",
        unit="letters",
        invariances=frozenset({"S", "shift"}),
        source="dynprobe; GaussianHMM of hmmlearn",
        params={"n_starts": 8, "seed": 0},
        vectors=("three levels well apart, 20 steps each → 0…0 1…1 2…2", "29 steps → NaN steps<30"),
        groups=frozenset({"optional", "states"}),
    ),
    _compute,
)
