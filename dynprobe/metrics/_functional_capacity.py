"""Functional capacity: how well a linear read-out of the states tells apart what the model is to tell apart.

A linear probe is trained on states and scored on states it has not seen; its balanced accuracy is put on a scale where
0 is guessing and 1 is perfect. Three controls say whether the number is about the states:

- **label shuffle**: the same probe on shuffled labels has to come out at 0;
- **rotation**: the same probe on states turned by a random orthogonal matrix has to come out the same;
- **random initialisation**: states of the same architecture with random weights, handed in by the caller.

The second holds only for probes that do not know the axes: an L2 penalty or none. Standardising every feature before a
penalised probe, or an L1 penalty, ties it to the axes, and a "rotation proof" with such a probe proves nothing; both
are refused. States are centred and divided by **one** number, the root mean square over all features of the training
fold, so that the strength of the penalty means the same for every model.

Examples of one prompt are kept in one fold when ``groups`` says so: otherwise the probe may recognise the prompt.
Predictions of all folds are pooled, so every example is judged once. A fold of one class makes no number.

Needs the extra ``probe``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._range import in_range
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["FunctionalCapacity", "above_chance", "functional_capacity"]

NAN = float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class FunctionalCapacity:
    """Functional capacity per depth, beside its controls.

    Args:
        value: F [depth], mean over tasks.
        balanced_accuracy: Mean recall per class [task, depth].
        shuffled: F with shuffled labels [depth], mean over shuffles.
        rotated: F of rotated states [depth].
        random_init: F of the states of a randomly initialised model [depth]; None when none were given.
        chance: 1/classes of each task.
        n: Examples.
        folds: Folds.
        reasons: Why F is NaN, per depth.
    """

    value: Array
    balanced_accuracy: Array
    shuffled: Array
    rotated: Array
    random_init: Array | None
    chance: tuple[float, ...]
    n: int
    folds: int
    reasons: tuple[str | None, ...]


def above_chance(balanced_accuracy: Any, n_classes: int) -> Any:
    """Accuracy on the scale of functional capacity, (a − 1/c)/(1 − 1/c).

    Example:
        >>> above_chance(0.75, 2)
        0.5
    """
    if n_classes < 2:
        raise MetricError(f"A task has at least 2 classes, found {n_classes!r}.")
    chance = 1.0 / n_classes
    return (balanced_accuracy - chance) / (1.0 - chance)


def functional_capacity(
    states: Any,
    labels: Any,
    *,
    groups: Sequence[Any] | None = None,
    random_states: Any = None,
    folds: int = 5,
    C: float = 1.0,
    seed: int = 0,
    n_shuffles: int = 5,
    penalty: str = "l2",
    standardise: bool = False,
) -> FunctionalCapacity:
    """Cross-validated linear probe of every depth, with its controls.

    F_l = mean_task (balanced accuracy_l − chance)/(1 − chance), chance = 1/classes.

    Args:
        states: [depth, example, dim], or [example, dim] for one depth.
        labels: Class of each example [example], or [task, example].
        groups: Prompt of each example; examples of one stay in one fold.
        random_states: The same of a randomly initialised model of the same architecture.
        folds: Folds of the cross-validation, stratified.
        C: Inverse strength of the L2 penalty on centred states of unit root mean square; ``inf`` for none.
        seed: Seed of folds, shuffle and rotation.
        n_shuffles: Shuffles of the labels, averaged.
        penalty: Only ``"l2"``.
        standardise: Only False.

    Returns:
        F per depth with its controls; NaN with a reason where a fold has one class (``"one-class"``), a class is
        rarer than the folds (``"units<k"``), or a state is not finite (``"coverage"``).

    Raises:
        MetricError: L1 or per-feature standardisation is asked for, no penalty with as many features as examples,
            shapes do not fit, or scikit-learn is not installed.

    Source:
        ``fcap.probe/1``.

    Example:
        >>> x = np.repeat(np.eye(2), 20, axis=0)
        >>> found = functional_capacity(x, [0] * 20 + [1] * 20)
        >>> found.value.tolist(), found.rotated.tolist()
        ([1.0], [1.0])
    """
    _refuse(penalty, standardise, folds, C, n_shuffles)
    x = _read(states)
    tasks = np.atleast_2d(np.asarray(labels))
    if tasks.ndim != 2 or tasks.shape[1] != x.shape[1]:
        raise MetricError(f"labels is [example] or [task, example] for {x.shape[1]} examples, found {tasks.shape}.")
    if groups is not None and len(groups) != x.shape[1]:
        raise MetricError(f"groups names the prompt of each of {x.shape[1]} examples, found {len(groups)}.")
    if np.isinf(C) and x.shape[2] >= x.shape[1] * (folds - 1) // folds:
        raise MetricError(
            f"A probe without penalty on {x.shape[2]} features and {x.shape[1]} examples separates anything; declare "
            "a penalty, C=1.0."
        )
    rng = np.random.default_rng(seed)
    mixed = [np.stack([rng.permutation(row) for row in tasks]) for _ in range(n_shuffles)]
    turn, upper = np.linalg.qr(rng.normal(size=(x.shape[2], x.shape[2])))
    turn = turn * np.sign(np.diag(upper))

    def capacity(states_: Array, labels_: NDArray[Any]) -> tuple[Array, Array, list[str | None]]:
        return _depths(states_, labels_, groups, folds, C, seed)

    value, accuracy, reasons = capacity(x, tasks)
    random_init = None
    if random_states is not None:
        other = _read(random_states)
        if other.shape[1] != x.shape[1]:
            raise MetricError(f"random_states is of the same {x.shape[1]} examples, found {other.shape[1]}.")
        random_init = capacity(other, tasks)[0]
    shuffled = np.mean([capacity(x, labels_)[0] for labels_ in mixed], axis=0)
    with np.errstate(invalid="ignore"):
        turned = x @ turn
    chance = tuple(1.0 / max(len(set(row.tolist())), 1) for row in tasks)
    return FunctionalCapacity(
        value, accuracy, shuffled, capacity(turned, tasks)[0], random_init, chance, x.shape[1], folds,
        tuple(reasons),
    )  # fmt: skip


def _refuse(penalty: str, standardise: bool, folds: int, C: float, n_shuffles: int) -> None:
    if standardise:
        raise MetricError(
            "fcap.probe/1 does not standardise features: a penalised probe on z-scored features depends on the axes, "
            "so the rotation control would prove nothing. Leave standardise=False."
        )
    if penalty != "l2":
        raise MetricError(f"fcap.probe/1 has an L2 penalty or none (C=inf), found {penalty!r}: L1 depends on the axes.")
    if folds < 2 or not C > 0 or n_shuffles < 1:
        raise MetricError(f"fcap.probe/1 needs folds ≥ 2, C > 0 and n_shuffles ≥ 1; found {folds}, {C}, {n_shuffles}.")


def _read(states: Any) -> Array:
    x = as_array(states, "fcap.probe/1")[0]
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3:
        raise MetricError(f"fcap.probe/1 takes states [depth, example, dim], found {list(x.shape)}.")
    if not x.shape[2]:
        raise MetricError(f"fcap.probe/1 takes states of at least one dimension, found {list(x.shape)}.")
    return x


def _depths(
    x: Array, tasks: NDArray[Any], groups: Sequence[Any] | None, folds: int, C: float, seed: int
) -> tuple[Array, Array, list[str | None]]:
    accuracy = np.full((len(tasks), len(x)), NAN)
    f = np.full(accuracy.shape, NAN)
    reasons: list[str | None] = [None] * len(x)
    for i, labels in enumerate(tasks):
        classes, y = np.unique(labels, return_inverse=True)
        split, why = _folds(y, groups, folds, seed)
        for depth, layer in enumerate(x):
            reason = why or (None if np.isfinite(layer).all() else "coverage")
            if reason is not None:
                reasons[depth] = reasons[depth] or reason
                continue
            guess = _predict(layer, y, split, C)
            accuracy[i, depth] = np.mean([(guess[y == k] == k).mean() for k in range(len(classes))])
            f[i, depth] = above_chance(accuracy[i, depth], len(classes))
    return f.mean(axis=0), accuracy, reasons


def _folds(y: Any, groups: Sequence[Any] | None, folds: int, seed: int) -> tuple[list[tuple[Any, Any]], str | None]:
    try:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    except ImportError:
        raise MetricError('fcap.probe/1 needs scikit-learn: pip install "dynprobe[probe]".') from None
    counts = np.bincount(y)
    if len(counts) < 2:
        return [], "one-class" if len(counts) else "empty"
    if counts.min() < folds:
        return [], f"units<{folds}"
    if groups is None:
        split = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y))
    else:
        _, which = np.unique(np.asarray(groups).astype(str), return_inverse=True)
        if which.max() + 1 < folds:
            return [], f"groups<{folds}"
        split = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(y, y, which))
    if any(len(np.unique(y[side])) < 2 for pair in split for side in pair):
        return [], "one-class"
    return split, None


def _predict(x: Array, y: Any, split: list[tuple[Any, Any]], C: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    guess = np.full(len(y), -1)
    for train, test in split:
        (x,) = in_range(x)
        centre = x[train].mean(axis=0)
        seen, unseen = x[train] - centre, x[test] - centre
        size = float(np.sqrt((seen**2).mean()))
        size = size if size > 0 else 1.0
        probe = LogisticRegression(C=C, max_iter=2000, tol=1e-8)
        guess[test] = probe.fit(seen / size, y[train]).predict(unseen / size)
    return guess


def _compute(
    inputs: tuple[Any, ...],
    mask: Any,
    params: dict[str, Any],
    metric_id: str,
    groups: Any = None,
    random_states: Any = None,
) -> Result:
    x, labels = _read(inputs[0]), np.asarray(inputs[1])
    if mask is not None:
        keep = np.asarray(mask, bool)
        if keep.shape != (x.shape[1],):
            raise MetricError(f"{metric_id}: the mask has shape {list(keep.shape)}, expected {[x.shape[1]]}.")
        x, labels = x[:, keep], labels[..., keep]
        groups = None if groups is None else [g for g, k in zip(groups, keep, strict=True) if k]
        random_states = None if random_states is None else _read(random_states)[:, keep]
    found = functional_capacity(x, labels, groups=groups, random_states=random_states, **params)
    seen = np.isfinite(found.value)
    reason = None if 2 * seen.sum() >= len(seen) and seen.any() else next(filter(None, found.reasons), "empty")
    extras = {"shuffled": found.shuffled, "rotated": found.rotated, "balanced_accuracy": found.balanced_accuracy}
    if found.random_init is not None:
        extras["random_init"] = found.random_init
    coverage = float(seen.mean()) if len(seen) else NAN
    value = NAN if reason else float(found.value[seen].mean())
    return Result(
        value, reason, coverage, x.shape[1], len(x), metric_id, profile=found.value, extras=extras,
    )  # fmt: skip


register(
    MetricSpec(
        id="fcap.probe/1",
        sentence="How far above chance a linear probe of the states tells the classes of a task apart.",
        formula=(
            "F_l = mean_task (balanced_acc_l − chance)/(1 − chance), chance = 1/classes, balanced_acc = mean recall "
            "per class over pooled out-of-fold predictions; logistic probe, L2 penalty C, states centred and divided "
            "by one RMS of the training fold, no per-feature scaling; stratified folds, groups kept together; one "
            "class in a fold → NaN; value = mean_l F_l"
        ),
        latex=(
            r"F_l = \operatorname*{mean}_{\mathrm{task}}\frac{\mathrm{bacc}_l-\mathrm{chance}}{1-\mathrm{chance}}, "
            r"\qquad \mathrm{chance} = \frac{1}{\mathrm{classes}}, \qquad \operatorname*{mean}_{l} F_l"
        ),
        input="trajectory[depth,unit,dim], labels[unit] or [task,unit]",
        value_range="[−chance/(1 − chance), 1]",
        unit="1",
        invariances=frozenset({"R", "R_l", "S", "S_l", "shift"}),
        source="dynprobe; linear probes under rotation controls are named in DOI 10.5281/zenodo.20361289",
        params={"folds": 5, "C": 1.0, "seed": 0},
        vectors=(
            "separable classes → 1",
            "labels independent of the states → 0 in expectation",
            "two classes, balanced accuracy 0.75 → 0.5",
            "one class → NaN one-class",
        ),
        groups=frozenset({"optional", "probe"}),
    ),
    _compute,
    arity=2,
)
