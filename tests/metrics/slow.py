"""A second version of every metric, written from the formulas with loops over NumPy scalars.

Nothing here is shared with the package: no masks trick, no vectorisation, no common geometry. Each function returns
``(value, reason, coverage)``; values are NaN where a reason says so.
"""

import math

import mpmath
import numpy as np

NAN = float("nan")


def angle(a, b):
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2.0 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))


def valid_states(X, mask):
    """X: list of [N, d] by depth; mask [D, N]."""
    D, N = mask.shape
    ok = np.zeros((D, N), bool)
    for d in range(D):
        norms = [np.linalg.norm(X[d][n]) for n in range(N) if mask[d, n] and np.all(np.isfinite(X[d][n]))]
        median = np.median(norms) if norms else 0.0
        for n in range(N):
            x = X[d][n]
            if mask[d, n] and np.all(np.isfinite(x)):
                size = np.linalg.norm(x)
                ok[d, n] = size > 0 and not size < 1e-12 * median
    return ok


def _profile_mean(entries, *, empty, short=None, few=None):
    """entries: per profile row (values of usable terms, number of valid terms, number of unmasked terms)."""
    total_ok = sum(e[1] for e in entries)
    total = sum(e[2] for e in entries)
    if empty:
        return NAN, "empty", NAN, []
    if short:
        return NAN, short, NAN, []
    coverage = total_ok / total if total else NAN
    profile = [
        e[0] if e[2] and 2 * e[1] >= e[2] and e[1] and e[0] is not None and not math.isnan(e[0]) else NAN
        for e in entries
    ]
    if total == 0:
        return NAN, "empty", NAN, profile
    if few:
        return NAN, few, coverage, profile
    if 2 * total_ok < total:
        return NAN, "coverage", coverage, profile
    left = [p for p in profile if not math.isnan(p)]
    if not left:
        return NAN, "zero-denominator", coverage, profile
    return sum(left) / len(left), None, coverage, profile


def _steps(X, mask, term):
    D, N = mask.shape
    ok = valid_states(X, mask)
    rows = []
    for step in range(D - 1):
        values, n_ok, n_all = [], 0, 0
        for n in range(N):
            if mask[step, n] and mask[step + 1, n]:
                n_all += 1
                if ok[step, n] and ok[step + 1, n]:
                    n_ok += 1
                    values.append(term(X[step][n], X[step + 1][n]))
        rows.append((values, n_ok, n_all))
    return rows


def _step_metric(X, mask, term, close=np.mean):
    rows = [(close(v) if v else None, a, b) for v, a, b in _steps(X, mask, term)]
    return _profile_mean(rows, empty=not mask.any(), short="depth<2" if len(mask) < 2 else None)


def kappa_phase(X, mask):
    return _step_metric(X, mask, lambda a, b: angle(a, b) / math.pi)


def rel_prev(X, mask):
    return _step_metric(X, mask, lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(a))


def rel_next(X, mask):
    return _step_metric(X, mask, lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(b))


def rel_prev_fro(X, mask):
    def close(pairs):
        return math.sqrt(sum(p[0] for p in pairs)) / math.sqrt(sum(p[1] for p in pairs))

    return _step_metric(X, mask, lambda a, b: (np.sum((b - a) ** 2), np.sum(a**2)), close)


def rel_next_fro(X, mask):
    def close(pairs):
        return math.sqrt(sum(p[0] for p in pairs)) / math.sqrt(sum(p[1] for p in pairs))

    return _step_metric(X, mask, lambda a, b: (np.sum((b - a) ** 2), np.sum(b**2)), close)


def rms(X, mask):
    dim = X[0].shape[1]
    return _step_metric(X, mask, lambda a, b: np.sum((b - a) ** 2), lambda v: math.sqrt(sum(v) / (len(v) * dim)))


def resid_norm(X, mask):
    ok = valid_states(X, mask)
    rows = []
    for d in range(len(mask)):
        values = [np.linalg.norm(X[d][n]) for n in range(mask.shape[1]) if ok[d, n]]
        rows.append((np.mean(values) if values else None, len(values), int(mask[d].sum())))
    return _profile_mean(rows, empty=not mask.any())


def diverge(X, Y, mask):
    ok = valid_states(X, mask) & valid_states(Y, mask)
    rows = []
    for d in range(len(mask)):
        values = [angle(X[d][n], Y[d][n]) / math.pi for n in range(mask.shape[1]) if ok[d, n]]
        rows.append((np.mean(values) if values else None, len(values), int(mask[d].sum())))
    return _profile_mean(rows, empty=not mask.any())


def phase_paired(X, Y, mask):
    D, N = mask.shape
    a, b = valid_states(X, mask), valid_states(Y, mask)
    rows = []
    for step in range(D - 1):
        values, n_all = [], 0
        for n in range(N):
            if mask[step, n] and mask[step + 1, n]:
                n_all += 1
                if a[step, n] and a[step + 1, n] and b[step, n] and b[step + 1, n]:
                    values.append((angle(Y[step][n], Y[step + 1][n]) - angle(X[step][n], X[step + 1][n])) / math.pi)
        rows.append((np.mean(values) if values else None, len(values), n_all))
    return _profile_mean(rows, empty=not mask.any(), short="depth<2" if D < 2 else None)


def _moved(a, b, eps):
    return np.linalg.norm(b - a) > 16 * eps * max(np.linalg.norm(a), np.linalg.norm(b))


def curv_depth(X, mask, eps):
    D, N = mask.shape
    ok = valid_states(X, mask)
    rows = []
    for d in range(D - 2):
        values, n_ok, n_all = [], 0, 0
        for n in range(N):
            if all(mask[d + k, n] for k in range(3)):
                n_all += 1
                if all(ok[d + k, n] for k in range(3)):
                    n_ok += 1
                    a, b, c = X[d][n], X[d + 1][n], X[d + 2][n]
                    if _moved(a, b, eps) and _moved(b, c, eps):
                        values.append(angle(b - a, c - b))
        rows.append((np.mean(values) if values else None, n_ok, n_all))
    return _profile_mean(rows, empty=not mask.any(), short="depth<3" if D < 3 else None)


def curv_token(X, mask, eps):
    D, N = mask.shape
    ok = valid_states(X, mask)
    rows = []
    for d in range(D):
        values, n_ok, n_all = [], 0, 0
        for n in range(N - 2):
            if all(mask[d, n + k] for k in range(3)):
                n_all += 1
                if all(ok[d, n + k] for k in range(3)):
                    n_ok += 1
                    a, b, c = (X[d][n + k] for k in range(3))
                    if _moved(a, b, eps) and _moved(b, c, eps):
                        values.append(angle(b - a, c - b))
        rows.append((np.mean(values) if values else None, n_ok, n_all))
    tokens = int(mask.any(0).sum()) if D else 0
    return _profile_mean(rows, empty=not mask.any(), short="tokens<3" if tokens < 3 else None)


def _u_centre(K):
    N = len(K)
    K = K.copy()
    np.fill_diagonal(K, 0.0)
    out = np.zeros_like(K)
    for i in range(N):
        for j in range(N):
            if i != j:
                out[i, j] = K[i, j] - K[i].sum() / (N - 2) - K[:, j].sum() / (N - 2) + K.sum() / ((N - 1) * (N - 2))
    return out


def cka_u(A, B, eps):
    N = len(A)
    a, b = _u_centre(A @ A.T), _u_centre(B @ B.T)
    for m in (a, b):
        if math.sqrt((m * m).sum() / (N * (N - 1))) <= 16 * eps:
            return None
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def cka_trace(A, B):
    """The trace form of 5.4, an algebraic cross-check."""

    def hsic(K, M):
        N = len(K)
        K, M = K - np.diag(np.diag(K)), M - np.diag(np.diag(M))
        one = np.ones(N)
        middle = (one @ K @ one) * (one @ M @ one) / ((N - 1) * (N - 2))
        return (np.trace(K @ M) + middle - 2 * (one @ K @ M @ one) / (N - 2)) / (N * (N - 3))

    K, M = A @ A.T, B @ B.T
    return hsic(K, M) / math.sqrt(hsic(K, K) * hsic(M, M))


def cka_extended(A, B):
    """U-centred form in 50 digits, for near-degenerate Gram matrices."""
    with mpmath.workdps(50):

        def centred(x):
            rows = [[mpmath.mpf(float(v)) for v in row] for row in x]
            rows = [[v / mpmath.sqrt(mpmath.fdot(r, r)) for v in r] for r in rows]
            return _u_centre(np.array([[mpmath.fdot(r, s) for s in rows] for r in rows], dtype=object))

        a, b = centred(A), centred(B)
        return float((a * b).sum() / mpmath.sqrt((a * a).sum() * (b * b).sum()))


def kappa_geom(X, mask, eps, W=64):
    D, N = mask.shape
    ok = valid_states(X, mask)
    units = [n for n in range(N) if mask[:, n].any()]
    windows = [units[k : k + W] for k in range(0, len(units), W)]
    rows, few = [], []
    for step in range(D - 1):
        n_all = sum(bool(mask[step, n] and mask[step + 1, n]) for n in range(N))
        n_ok = sum(bool(ok[step, n] and ok[step + 1, n]) for n in range(N))
        few.append(n_ok < 4)
        values = []
        for window in windows:
            both = [n for n in window if ok[step, n] and ok[step + 1, n]]
            if len(both) < 4:
                continue
            A, B = (np.stack([X[d][n] / np.linalg.norm(X[d][n]) for n in both]) for d in (step, step + 1))
            value = cka_u(A, B, eps)
            if value is not None:
                values.append(1.0 - value)
        rows.append((np.mean(values) if values and n_ok >= 4 else None, n_ok, n_all))
    return _profile_mean(
        rows,
        empty=not mask.any(),
        short="depth<2" if D < 2 else None,
        few="units<4" if few and all(few) else None,
    )


def kappa_sync(X, mask, eps):
    D, N = mask.shape
    ok = valid_states(X, mask)
    n_ok = n_all = 0
    values = []
    for n in range(N):
        units = []
        for step in range(D - 1):
            if mask[step, n] and mask[step + 1, n]:
                n_all += 1
                if ok[step, n] and ok[step + 1, n]:
                    n_ok += 1
                    if _moved(X[step][n], X[step + 1][n], eps):
                        u = X[step + 1][n] - X[step][n]
                        units.append(u / np.linalg.norm(u))
        if len(units) >= 2:
            cosines = [float(units[i] @ units[j]) for i in range(len(units)) for j in range(i)]
            values.append(1.0 - sum(cosines) / len(cosines))
    coverage = n_ok / n_all if n_all else NAN
    if not mask.any():
        return NAN, "empty", NAN
    if D < 3:
        return NAN, "depth<3", coverage
    if not n_all:
        return NAN, "empty", NAN
    if 2 * n_ok < n_all:
        return NAN, "coverage", coverage
    if not values:
        return NAN, "zero-denominator", coverage
    return sum(values) / len(values), None, coverage


def kappa_xcorr(X, mask, eps):
    D, N = mask.shape
    ok = valid_states(X, mask)
    delta = np.full((D, N), NAN)
    n_ok = n_all = 0
    for d in range(D):
        for t in range(1, N):
            if mask[d, t] and mask[d, t - 1]:
                n_all += 1
                if ok[d, t] and ok[d, t - 1]:
                    n_ok += 1
                    a, b = X[d][t] / np.linalg.norm(X[d][t]), X[d][t - 1] / np.linalg.norm(X[d][t - 1])
                    delta[d, t] = np.linalg.norm(a - b)
    tokens = int(mask.any(0).sum()) if D else 0
    coverage = n_ok / n_all if n_all else NAN
    if not tokens:
        return NAN, "empty", coverage
    if D < 2:
        return NAN, "depth<2", coverage
    if tokens < 4:
        return NAN, "tokens<4", coverage
    if not n_all:
        return NAN, "empty", coverage
    if 2 * n_ok < n_all:
        return NAN, "coverage", coverage
    live = []
    for d in range(D):
        seen = delta[d][~np.isnan(delta[d])]
        if len(seen) >= 1 and seen.max() - seen.min() > 16 * eps:
            live.append(d)
    if len(live) < 2:
        return NAN, "depth<2", coverage
    values, sampled = [], False
    for i in live:
        for j in live:
            if i < j:
                both = ~np.isnan(delta[i]) & ~np.isnan(delta[j])
                if both.sum() >= 3:
                    sampled = True
                    a, b = delta[i][both], delta[j][both]
                    if np.ptp(a) > 16 * eps and np.ptp(b) > 16 * eps:
                        values.append(np.corrcoef(a, b)[0, 1])
    if not values:
        return NAN, "depth<2" if sampled else "tokens<4", coverage
    return 1.0 - float(np.mean(values)), None, coverage


def ct(h, mask, eps):
    """Series of ct (T − 2), with NaN at invalid triples; and which triples are unmasked."""
    T = len(h)
    ok = valid_states([h], mask[None])[0]
    out, unmasked = [], []
    for t in range(2, T):
        unmasked.append(bool(mask[t] and mask[t - 1] and mask[t - 2]))
        if not (ok[t] and ok[t - 1] and ok[t - 2]):
            out.append(NAN)
            continue
        a, b, c = (h[k] / np.linalg.norm(h[k]) for k in (t - 2, t - 1, t))
        d0, d1 = np.linalg.norm(b - a), np.linalg.norm(c - b)
        out.append(0.0 if d0 <= 16 * eps or d1 <= 16 * eps else d1 * angle(b - a, c - b))
    return np.array(out), np.array(unmasked, bool)


def ct2(h, mask, eps):
    T = len(h)
    ok = valid_states([h], mask[None])[0]
    out, unmasked = [], []
    for t in range(1, T - 1):
        unmasked.append(bool(mask[t] and mask[t - 1] and mask[t + 1]))
        if not (ok[t] and ok[t - 1] and ok[t + 1]):
            out.append(NAN)
            continue
        a, b, c = (h[k] / np.linalg.norm(h[k]) for k in (t - 1, t, t + 1))
        d = np.linalg.norm(b - a)
        out.append(0.0 if d <= 16 * eps else d * np.linalg.norm(c - 2 * b + a))
    return np.array(out), np.array(unmasked, bool)


def mean_ct(series, unmasked, mask):
    tokens = int(np.sum(mask))
    if tokens == 0:
        return NAN, "empty", NAN
    if tokens < 3:
        return NAN, "tokens<3", NAN
    if not unmasked.any():
        return NAN, "empty", NAN
    good = [v for v, u in zip(series, unmasked, strict=True) if u and not math.isnan(v)]
    coverage = len(good) / unmasked.sum()
    if coverage < 0.5:
        return NAN, "coverage", coverage
    return sum(good) / len(good), None, coverage


def _usable(x, mask):
    """Values left, or the reason why there are none."""
    kept = [v for v, m in zip(x, mask, strict=True) if m]
    good = [v for v in kept if math.isfinite(v)]
    if not kept:
        return None, "empty" if len(x) else "tokens<3"
    if len(good) * 2 < len(kept):
        return None, "coverage"
    return good, None


def ratio(x, mask):
    good, reason = _usable(x, mask)
    if good is None:
        return NAN, reason
    mean = sum(good) / len(good)
    if mean == 0:
        return NAN, "zero-denominator"
    return max(good) / mean, "steps<2" if len(good) == 1 else None


def _quantile(values, q):
    values = sorted(values)
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def ratio_winsor(x, mask):
    good, reason = _usable(x, mask)
    if good is None:
        return NAN, reason
    m = _quantile(good, 0.5)
    s = 1.4826 * _quantile([abs(v - m) for v in good], 0.5)
    capped = [min(v, m + 5 * s) for v in good] if s > 0 else good
    mean = sum(capped) / len(capped)
    if mean == 0:
        return NAN, "zero-denominator"
    return max(capped) / mean, "steps<2" if len(good) == 1 else None


def qratio(x, mask):
    good, reason = _usable(x, mask)
    if good is None:
        return NAN, reason
    median = _quantile(good, 0.5)
    return (NAN, "zero-denominator") if median == 0 else (_quantile(good, 0.95) / median, None)


def gini(x, mask):
    good, reason = _usable(x, mask)
    if good is None:
        return NAN, reason
    mean = sum(good) / len(good)
    if mean == 0:
        return NAN, "zero-denominator"
    return sum(abs(a - b) for a in good for b in good) / (2 * len(good) ** 2 * mean), None


def excess(x, mask, theta):
    good, reason = _usable(x, mask)
    return (NAN, reason) if good is None else (sum(max(0.0, v - theta) for v in good), None)


def cusum(x, mask, theta):
    good, reason = _usable(x, mask)
    if good is None:
        return NAN, reason
    level, top = 0.0, 0.0
    for v, m in zip(x, mask, strict=True):
        if m and math.isfinite(v):
            level = max(0.0, level + v - theta)
            top = max(top, level)
    return top, None


def late(x, mask):
    kept = [v for v, m in zip(x, mask, strict=True) if m]
    good = [v for v in kept if math.isfinite(v)]
    if not kept:
        return NAN, "empty" if len(x) else "tokens<3"
    if len(good) < 12:
        return NAN, "steps<12"
    if len(good) * 2 < len(kept):
        return NAN, "coverage"
    last = good[-math.ceil(0.25 * len(good)) :]
    return sum(last) / len(last), None


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def entropy(x):
    p = softmax(x)
    return -sum(v * math.log(v) for v in p if v > 0)


def margin(x):
    p = sorted(softmax(x))
    return p[-1] - p[-2]


def nll(x, target):
    return -(x[target] - x.max() - math.log(np.exp(x - x.max()).sum()))


def kl(x, y):
    lp = x - x.max() - math.log(np.exp(x - x.max()).sum())
    lq = y - y.max() - math.log(np.exp(y - y.max()).sum())
    return float(np.sum(np.exp(lp) * (lp - lq)))
