"""Second versions of the metrics that compare units as a set, or a path, from their formulas and with loops.

As in ``slow``: nothing shared with the package, each function returns ``(value, reason, coverage, profile)`` or
``(value, reason, coverage)``.
"""

import itertools
import math

import numpy as np
from slow import NAN, _profile_mean, angle, valid_states

EPS = float(np.finfo(np.float64).eps)


def _per_depth(X, mask, term, least=0):
    """term(list of valid unit vectors, depth) → number or None; entries with fewer than ``least`` units are missing."""
    ok = valid_states(X, mask)
    rows, few = [], []
    for d in range(len(mask)):
        units = [X[d][n] for n in range(mask.shape[1]) if ok[d, n]]
        few.append(len(units) < least)
        rows.append((term(units) if len(units) >= max(least, 1) else None, len(units), int(mask[d].sum())))
    return _profile_mean(rows, empty=not mask.any(), few=f"units<{least}" if few and all(few) else None)


def _singular(units, centre):
    a = np.stack(units)
    if centre:
        top = max(np.linalg.norm(u) for u in units)
        a = a - a.mean(0)
        a[[np.linalg.norm(r) <= 16 * EPS * top for r in a]] = 0.0
    s = np.linalg.svd(a, compute_uv=False)
    return s[s > max(a.shape) * EPS * s[0]] if s[0] > 0 else None


def erank(X, mask, centre=False):
    def term(units):
        s = _singular(units, centre)
        if s is None:
            return None
        p = [v / s.sum() for v in s]
        return math.exp(-sum(v * math.log(v) for v in p))

    return _per_depth(X, mask, term)


def participation(X, mask, centre=False):
    def term(units):
        s = _singular(units, centre)
        return None if s is None else (s**2).sum() ** 2 / (s**4).sum()

    return _per_depth(X, mask, term)


def stable_rank(X, mask, centre=False):
    def term(units):
        a = np.stack(units) - (np.mean(units, axis=0) if centre else 0.0)
        top = max(np.linalg.norm(u) for u in units)
        if max(np.linalg.norm(r) for r in a) <= 16 * EPS * top:
            return None
        return np.linalg.norm(a) ** 2 / np.linalg.norm(a, 2) ** 2

    return _per_depth(X, mask, term)


def matrix_entropy(X, mask, order=1.0, norm="raw", centre=False):
    def term(units):
        a = np.stack(units)
        d = a.shape[1]
        if centre:
            top = max(np.linalg.norm(u) for u in units)
            a = a - a.mean(0)
            a = a[[np.linalg.norm(r) > 16 * EPS * top for r in a]]
        if not len(a):
            return None
        a = np.stack([r / np.linalg.norm(r) for r in a])
        n = len(a)
        s = np.linalg.svd(a, compute_uv=False)
        lam = [v**2 / n for v in s if v > max(a.shape) * EPS * s[0]]
        if order == 1.0:
            s = -sum(v * math.log(v) for v in lam)
        elif order == math.inf:
            s = -math.log(max(lam))
        else:
            s = math.log(sum(v**order for v in lam)) / (1 - order)
        ln, ld = math.log(n), math.log(d)
        bottom = {"raw": 1.0, "logn": ln, "logd": ld, "lognlogd": ln * ld, "logmin": min(ln, ld)}[norm]
        return s / bottom if bottom > 0 else None

    return _per_depth(X, mask, term)


def order_vector(X, mask):
    return _per_depth(X, mask, lambda u: np.linalg.norm(sum(x / np.linalg.norm(x) for x in u)) / len(u))


def order_pairwise(X, mask):
    def term(units):
        unit = [x / np.linalg.norm(x) for x in units]
        return np.mean([float(a @ b) for a, b in itertools.combinations(unit, 2)])

    return _per_depth(X, mask, term, least=2)


def _two_nearest(points):
    out = []
    for i, p in enumerate(points):
        r = sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)
        out.append((r[0], r[1]))
    return out


def twonn_of(points, est="ml", eps=EPS):
    """(value, number of duplicates, points left)."""
    kept = []
    for i, p in enumerate(points):
        others = [np.linalg.norm(p - q) for j, q in enumerate(points) if j != i]
        if not others or min(others) > 16 * eps * np.linalg.norm(p):
            kept.append(p)
    twins = len(points) - len(kept)
    if len(kept) < 10:
        return None, twins, len(kept)
    log_mu = sorted(math.log(b / a) for a, b in _two_nearest(kept))
    n = len(kept)
    if est == "ml":
        return ((n - 1) / sum(log_mu) if sum(log_mu) > 16 * EPS * n else None), twins, n
    x = log_mu[: int(n * 9 // 10)]
    y = [-math.log(1 - (i + 1) / n) for i in range(len(x))]
    return sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x), twins, n


def twonn(X, mask, est="ml"):
    ok = valid_states(X, mask)
    rows, few = [], []
    for d in range(len(mask)):
        points = [X[d][n] for n in range(mask.shape[1]) if ok[d, n]]
        value, _, n = twonn_of(points, est)
        few.append(n < 10)
        rows.append((value, len(points), int(mask[d].sum())))
    return _profile_mean(rows, empty=not mask.any(), few="units<10" if few and all(few) else None)


def _centred(units, est):
    a = np.stack(units)
    n = len(a)
    k = a @ a.T
    if est == "biased":
        h = np.eye(n) - np.ones((n, n)) / n
        return h @ k @ h
    k = k - np.diag(np.diag(k))
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                out[i, j] = k[i, j] - (k[i].sum() + k[:, j].sum()) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    return out


def cka_of(A, B, est, rows):
    if rows == "cosine":
        A, B = ([x / np.linalg.norm(x) for x in side] for side in (A, B))
    # centring the rows first changes nothing but the digits
    (A, B), n = (np.stack(A) - np.mean(A, axis=0), np.stack(B) - np.mean(B, axis=0)), len(A)
    a, b = _centred(A, est), _centred(B, est)
    aa, bb = (a * a).sum(), (b * b).sum()
    sizes = [np.mean([np.linalg.norm(x) ** 2 for x in side]) for side in (A, B)]
    if math.sqrt(aa / (n * (n - 1))) <= 16 * EPS * sizes[0] or math.sqrt(bb / (n * (n - 1))) <= 16 * EPS * sizes[1]:
        return None
    return (a * b).sum() / math.sqrt(aa * bb)


def _over_steps(X, Y, ok_x, ok_y, keep, lags, term, least, W):
    """Windows of W of the units that are unmasked anywhere; ``lags`` lists (index into X, index into Y)."""
    N = keep.shape[1]
    units = [n for n in range(N) if keep[:, n].any()]
    windows = [units[k : k + W] for k in range(0, len(units), W)]
    rows, few = [], []
    for i, j in lags:
        n_all = sum(bool(keep[i, n] and keep[j, n]) for n in range(N))
        n_ok = sum(bool(ok_x[i, n] and ok_y[j, n]) for n in range(N))
        few.append(n_ok < least)
        values = []
        for window in windows:
            both = [n for n in window if ok_x[i, n] and ok_y[j, n]]
            if len(both) >= least:
                value = term([X[i][n] for n in both], [Y[j][n] for n in both])
                if value is not None:
                    values.append(value)
        rows.append((np.mean(values) if values and n_ok >= least else None, n_ok, n_all))
    return rows, bool(few) and all(few)


def _adjacent(X, mask, term, least, W):
    ok = valid_states(X, mask)
    D = len(mask)
    rows, few = _over_steps(X, X, ok, ok, mask, [(d, d + 1) for d in range(D - 1)], term, least, W)
    return _profile_mean(
        rows, empty=not mask.any(), short="depth<2" if D < 2 else None, few=f"units<{least}" if few else None
    )


def _between(X, Y, mask, term, least, W):
    ok = valid_states(X, mask) & valid_states(Y, mask)
    rows, few = _over_steps(X, Y, ok, ok, mask, [(d, d) for d in range(len(mask))], term, least, W)
    return _profile_mean(rows, empty=not mask.any(), few=f"units<{least}" if few else None)


def cka(X, mask, est="unbiased", rows="raw", W=64):
    return _adjacent(X, mask, lambda a, b: cka_of(a, b, est, rows), 4 if est == "unbiased" else 2, W)


def cka_paired(X, Y, mask, est="unbiased", rows="raw", W=64):
    return _between(X, Y, mask, lambda a, b: cka_of(a, b, est, rows), 4 if est == "unbiased" else 2, W)


def _rank(values):
    return [
        1 + sum(w < v and v - w > 16 * EPS * v for w in values)
        + (sum(abs(w - v) <= 16 * EPS * max(v, w) for w in values) - 1) / 2
        for v in values
    ]  # fmt: skip


def rsa_of(A, B, corr, rows):
    if rows == "cosine":
        A, B = ([x / np.linalg.norm(x) for x in side] for side in (A, B))
    lists = []
    for side in (A, B):
        d = [np.linalg.norm(x - y) for x, y in itertools.combinations(side, 2)]
        if max(d) - min(d) <= 16 * EPS * max(np.linalg.norm(x) for x in side):
            return None
        lists.append(_rank(d) if corr == "spearman" else d)
    return np.corrcoef(*lists)[0, 1]


def rsa(X, mask, corr="pearson", rows="raw", W=64):
    return _adjacent(X, mask, lambda a, b: rsa_of(a, b, corr, rows), 4, W)


def rsa_paired(X, Y, mask, corr="pearson", rows="raw", W=64):
    return _between(X, Y, mask, lambda a, b: rsa_of(a, b, corr, rows), 4, W)


def rqa(h, mask, *, q=0.1, eps=0.0, theiler=None, lmin=3, vmin=3):
    """All four readings as metric name → (value, reason, coverage), by walking the matrix cell by cell."""
    ok = valid_states([h], mask[None])[0] if len(h) else np.zeros(0, bool)
    n = len(h)
    unit = [h[i] / np.linalg.norm(h[i]) if ok[i] else None for i in range(n)]
    dist = np.full((n, n), NAN)
    for i in range(n):
        for j in range(n):
            if ok[i] and ok[j]:
                dist[i, j] = np.sum((unit[i] - unit[j]) ** 2) / 2
    above = [dist[i, j] for i in range(n) for j in range(i + 1, n) if not math.isnan(dist[i, j])]
    limit = eps if eps > 0 else (float(np.quantile(above, q)) if above else NAN)
    R = np.array([[bool(dist[i, j] <= limit + 16 * EPS) for j in range(n)] for i in range(n)]).reshape(n, n)

    def runs(cells):
        lengths, now = [], 0
        for cell in [*cells, False]:
            if cell:
                now += 1
            elif now:
                lengths.append(now)
                now = 0
        return lengths

    w1, w0 = (1, 0) if theiler is None else (theiler, theiler)
    pairs = [(i, j) for i in range(n) for j in range(n) if abs(i - j) >= w1 and ok[i] and ok[j]]
    diagonals = [v for k in range(w1, n) for v in runs([R[i, i + k] for i in range(n - k)])]
    verticals = [v for j in range(n) for v in runs([R[i, j] and abs(i - j) >= w0 for i in range(n)])]
    long = [v for v in diagonals if v >= lmin]
    shares = [long.count(v) / len(long) for v in set(long)] if long else []
    values = {
        "rr": (sum(R[i, j] for i, j in pairs) / len(pairs) if pairs else NAN, w1 + 1),
        "det": (sum(long) / sum(diagonals) if diagonals else NAN, w1 + lmin),
        "lam": (sum(v for v in verticals if v >= vmin) / sum(verticals) if verticals else NAN, w0 + vmin),
        "entr": (-sum(p * math.log2(p) for p in shares) if long else NAN, w1 + lmin),
    }
    n_ok, n_all = int(ok.sum()), int(np.sum(mask))
    coverage = n_ok / n_all if n_all else NAN
    out = {}
    for name, (value, k) in values.items():
        if not n_all:
            reason = "empty"
        elif n_ok < k:
            reason = f"units<{k}"
        elif 2 * n_ok < n_all:
            reason = "coverage"
        else:
            reason = "zero-denominator" if math.isnan(value) else None
        out[name] = (NAN if reason else value, reason, coverage)
    return out


def block_influence(X, mask):
    return _lagged(X, mask, 1, mask, lambda a, b: 1 - float(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


def angular(X, mask, n=1, tokens="last"):
    chosen = mask.copy()
    if tokens == "last":
        anywhere = [u for u in range(mask.shape[1]) if mask[:, u].any()]
        chosen[:] = False
        if anywhere:
            chosen[:, anywhere[-1]] = mask[:, anywhere[-1]]
    return _lagged(X, mask, n, chosen, lambda a, b: angle(a, b) / math.pi)


def _lagged(X, mask, n, chosen, term):
    ok = valid_states(X, mask)
    rows = []
    for low in range(len(mask) - n):
        values, n_ok, n_all = [], 0, 0
        for u in range(mask.shape[1]):
            if chosen[low, u] and chosen[low + n, u]:
                n_all += 1
                if ok[low, u] and ok[low + n, u]:
                    n_ok += 1
                    values.append(term(X[low][u], X[low + n][u]))
        rows.append((np.mean(values) if values else None, n_ok, n_all))
    return _profile_mean(rows, empty=not chosen.any(), short=f"depth<{n + 1}" if len(mask) < n + 1 else None)


def line_shape(X, mask):
    D, N = mask.shape
    n_ok = n_all = 0
    values = []
    for u in range(N):
        steps = []
        for d in range(D - 1):
            if mask[d, u] and mask[d + 1, u]:
                n_all += 1
                a, b = X[d][u], X[d + 1][u]
                if np.isfinite(a).all() and np.isfinite(b).all():
                    n_ok += 1
                    if np.linalg.norm(b - a) > 16 * EPS * max(np.linalg.norm(a), np.linalg.norm(b)):
                        steps.append((b - a) / np.linalg.norm(b - a))
        if steps and np.linalg.norm(sum(steps)) > 16 * EPS * len(steps):
            values.append(max(len(steps) / np.linalg.norm(sum(steps)), 1.0))
    coverage = n_ok / n_all if n_all else NAN
    if not mask.any() or (not n_all and D >= 2):
        return NAN, "empty", NAN
    if D < 2:
        return NAN, "depth<2", NAN
    if 2 * n_ok < n_all:
        return NAN, "coverage", coverage
    if not values:
        return NAN, "zero-denominator", coverage
    return float(np.mean(values)), None, coverage


def distances(p, q):
    """js, half_jeffreys, tv, linf of two lists, in plain floats; None for a divergence that is infinite."""
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(x, y):
        if any(a > 0 and b == 0 for a, b in zip(x, y, strict=True)):
            return None
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True) if a > 0)

    both = (kl(p, q), kl(q, p))
    return {
        "js": (kl(p, m) + kl(q, m)) / 2,
        "half_jeffreys": None if None in both else sum(both) / 2,
        "tv": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "linf": max(abs(a - b) for a, b in zip(p, q, strict=True)),
    }
