"""A second version of the convergence metrics, from the formulas, one number at a time."""

import itertools
import math

import numpy as np
from slow import NAN, _profile_mean, _step_metric, _steps, angle, rel_next, rel_prev, valid_states

EPS = np.finfo(np.float64).eps


def deq(X, mask, eps=1e-9):
    def close(pairs):
        return math.sqrt(sum(p[0] for p in pairs)) / (math.sqrt(sum(p[1] for p in pairs)) + eps)

    return _step_metric(X, mask, lambda a, b: (np.sum((b - a) ** 2), np.sum(b**2)), close)


def accel(X, mask, norm="state"):
    ok = valid_states(X, mask)
    rows = []
    for k in range(1, len(mask) - 1):
        values, n_ok, n_all = [], 0, 0
        for n in range(mask.shape[1]):
            three = [k - 1, k, k + 1]
            if all(mask[d, n] for d in three):
                n_all += 1
                if all(ok[d, n] for d in three):
                    n_ok += 1
                    change = np.linalg.norm((X[k + 1][n] - X[k][n]) - (X[k][n] - X[k - 1][n]))
                    values.append(change / np.linalg.norm(X[k + 1][n]) if norm == "state" else change)
        rows.append((np.mean(values) if values else None, n_ok, n_all))
    return _profile_mean(rows, empty=not mask.any(), short="depth<3" if len(mask) < 3 else None)


def _rms_and_scale(X, mask):
    dim, rows = X[0].shape[1], []
    for values, n_ok, n_all in _steps(X, mask, lambda a, b: (np.sum((b - a) ** 2), max(a @ a, b @ b))):
        if not values or 2 * n_ok < n_all:
            rows.append((NAN, NAN))
            continue
        rows.append(tuple(math.sqrt(sum(v[i] for v in values) / (len(values) * dim)) for i in (0, 1)))
    return rows


def _counts(X, mask):
    steps = _steps(X, mask, lambda a, b: 0.0)
    return sum(s[1] for s in steps), sum(s[2] for s in steps)


def rho(X, mask):
    n_ok, n_all = _counts(X, mask)
    coverage = n_ok / n_all if n_all else NAN
    if not mask.any() or (len(mask) > 1 and not n_all):
        return NAN, "empty", NAN
    if len(mask) < 3:
        return NAN, "depth<3", NAN
    if 2 * n_ok < n_all:
        return NAN, "coverage", coverage
    rows, ratios = _rms_and_scale(X, mask), []
    for (a, scale), (b, _) in itertools.pairwise(rows):
        if not math.isnan(a) and not math.isnan(b) and a > 16 * EPS * scale:
            ratios.append(b / a)
    if not ratios:
        return NAN, "zero-denominator", coverage
    return float(np.median(ratios)), None, coverage


def _profile(X, mask, of):
    def entries(term, close=np.mean):
        rows = []
        for values, n_ok, n_all in _steps(X, mask, term):
            rows.append(NAN if not values or 2 * n_ok < n_all else close(values))
        return rows

    if of == "delta_rms":
        return [a for a, _ in _rms_and_scale(X, mask)]
    if of == "converge_accel":
        found = accel(X, mask)
        return list(found[3])
    terms = {
        "delta_rel_prev": lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(a),
        "delta_rel_next": lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(b),
        "delta_angle": lambda a, b: angle(a, b) / math.pi,
        "influence_block": lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
    }
    if of in terms:
        return entries(terms[of])
    which = {"delta_rel_prev_fro": (0, 0.0), "delta_rel_next_fro": (1, 0.0), "deq_residual": (1, 1e-9)}[of]

    def ratio(pairs):
        return math.sqrt(sum(p[2] for p in pairs)) / (math.sqrt(sum(p[which[0]] for p in pairs)) + which[1])

    return entries(lambda a, b: (a @ a, b @ b, (b - a) @ (b - a)), ratio)


def iterations(X, mask, of="delta_rms", tol=1e-3, patience=1):
    """Value, reason, coverage, time, event."""
    first = 2 if of == "converge_accel" else 1
    n_ok, n_all = _counts(X, mask)
    coverage = n_ok / n_all if n_all else NAN
    if not mask.any() or (len(mask) > 1 and not n_all):
        return NAN, "empty", NAN, NAN, NAN
    if len(mask) <= first:
        return NAN, f"depth<{first + 1}", coverage, NAN, NAN
    if 2 * n_ok < n_all:
        return NAN, "coverage", coverage, NAN, NAN
    row = 0
    for k, r in enumerate(_profile(X, mask, of)):
        if math.isnan(r):
            return NAN, "coverage", coverage, NAN, NAN
        row = row + 1 if r < tol else 0
        if row == patience:
            return float(k + first), None, coverage, float(k + first), 1.0
    return NAN, "censored", coverage, float(len(mask) - 1), 0.0


def minp_kl(before, now, minp=0.1):
    def soften(logits):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        top = p.max()
        p = np.array([1 / len(p) if x < minp * top else x for x in p])
        return p / p.sum()

    p, q = soften(before), soften(now)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


__all__ = ["accel", "deq", "iterations", "minp_kl", "rel_next", "rel_prev", "rho"]
