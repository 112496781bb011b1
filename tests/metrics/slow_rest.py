"""Second versions of what the other slow modules leave out: output, two runs, maps, energies, plateaus, thresholds.

Written from the formulas with loops; softmax and its logarithms in 40 digits. Each returns the bare value, NaN where
the formula has none.
"""

import itertools
import math

import mpmath
import numpy as np
from slow import NAN, _quantile, angle

EPS = float(np.finfo(np.float64).eps)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- series


def mad_scale(reference):
    m = _quantile(reference, 0.5)
    return m, 1.4826 * _quantile([abs(v - m) for v in reference], 0.5)


def winsor(x, c=5.0):
    m, s = mad_scale(x)
    return mean(min(v, m + c * s) if s > 0 else v for v in x)


def zmad(x, c=5.0):
    m, s = mad_scale(x)
    return mean(min(max((v - m) / s, -c), c) for v in x) if s > 0 else NAN


def regime(ratio):
    if math.isnan(ratio):
        return "UNDEFINED"
    for edge, closed, label in (
        (1.55, False, "BELOW_RANGE"), (1.70, True, "UNDERACTIVE"), (2.27, False, "GAP_UA"), (2.92, True, "ADAPTIVE"),
        (4.42, False, "TRANSITION_OR_GAP"), (35.55, True, "CHAOTIC"),
    ):  # fmt: skip
        if ratio < edge or (closed and ratio == edge):
            return label
    return "ABOVE_RANGE"


def first_below(series, tol, patience):
    """k of the first ``patience`` values below tol in a row, counted from 1."""
    for k in range(patience, len(series) + 1):
        if all(v < tol for v in series[k - patience : k]):
            return float(k)
    return NAN


def q_exit(p, q):
    for t in range(1, len(p) + 1):
        if math.fsum(p[:t]) >= q:
            return float(t)
    return NAN


def band(x, low, high):
    return [1 - min(max((v - low) / (high - low), 0.0), 1.0) for v in x]


def gmean_of_bands(rows, low, high):
    ready = [band(r, a, b) for r, a, b in zip(rows, low, high, strict=True)]
    return mean(math.prod(column) ** (1 / len(ready)) for column in zip(*ready, strict=True))


def rate(collapse, rivalry, w):
    import slow_recovery

    opened, closed, _ = slow_recovery.reopening(slow_recovery.cycle_runs(collapse, rivalry, w), len(collapse))
    return opened / closed if closed else NAN


# ---------------------------------------------------------------- distributions


def _log_softmax(row):
    with mpmath.workdps(40):
        x = [mpmath.mpf(float(v)) for v in row]
        total = mpmath.log(mpmath.fsum(mpmath.exp(v - max(x)) for v in x)) + max(x)
        return [v - total for v in x]


def entropy(row):
    with mpmath.workdps(40):
        return float(-mpmath.fsum(mpmath.exp(v) * v for v in _log_softmax(row)))


def margin(row):
    with mpmath.workdps(40):
        top = sorted(_log_softmax(row))[-2:]  # of one token alone the second has probability 0
        return float(mpmath.exp(top[-1]) - (mpmath.exp(top[0]) if len(top) > 1 else 0))


def nll(row, target):
    return float(-_log_softmax(row)[target])


def kl(row, other):
    with mpmath.workdps(40):
        p, q = _log_softmax(row), _log_softmax(other)
        return float(mpmath.fsum(mpmath.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))


def top(row):
    return next(i for i, v in enumerate(row) if v == max(row))


def prediction_depth(model, lens):
    """model [pos, vocab], lens [depth, pos, vocab]."""
    found = []
    for p in range(len(model)):
        depth = len(lens)
        while depth > 0 and top(lens[depth - 1][p]) == top(model[p]):
            depth -= 1
        found.append(depth)
    return mean(found)


def tuned(h, weight, bias, head):
    """Lens logits [depth][pos] of states [depth, pos, dim]: h + A h + b at every depth but the last."""
    moved = [[h[d][p] + weight[d] @ h[d][p] + bias[d] for p in range(h.shape[1])] for d in range(len(h) - 1)]
    return [[head @ x for x in row] for row in [*moved, h[-1]]]


def argmax_stable(logits):
    out = []
    for p in range(logits.shape[1]):
        tops = [top(step[p]) for step in logits]
        run = 0
        while run < len(tops) - 1 and tops[-1 - run] == tops[-2 - run]:
            run += 1
        out.append(run)
    return mean(out)


# ---------------------------------------------------------------- two runs


def response(x, y):
    return mean(
        mean(np.linalg.norm(y[d][n] - x[d][n]) / np.linalg.norm(x[d][n]) for n in range(x.shape[1]))
        for d in range(len(x))
    )


def relaxation(x, y, along, inject, pos, fit="ls", eps=EPS):
    def size(d, n):
        return np.linalg.norm(y[d][n] - x[d][n]) / np.linalg.norm(x[d][n])

    if along == "depth":
        series = [(t, size(inject + t, pos)) for t in range(len(x) - inject)]
    else:
        series = [(t, size(len(x) - 1, pos + t)) for t in range(1, x.shape[1] - pos)]
    points = [(t, math.log(r)) for t, r in series if r > 16 * eps]
    if len(points) < 3:
        return NAN
    if fit == "theil":
        return -float(np.median([(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2)]))
    n, sx, sy = len(points), sum(t for t, _ in points), sum(v for _, v in points)
    sxx, sxy = sum(t * t for t, _ in points), sum(t * v for t, v in points)
    return -(n * sxy - sx * sy) / (n * sxx - sx * sx)


def lags(x):
    """θ/π [step][unit]."""
    return [[angle(a, b) / math.pi for a, b in zip(x[d], x[d + 1], strict=True)] for d in range(len(x) - 1)]


def phase_z(x, mu, sigma):
    rows = [(mean(row) - m) / s for row, m, s in zip(lags(x), mu, sigma, strict=True) if s > 0]
    return mean(max(0.0, z) for z in rows)


def _zmax(rows, mu, sigma):
    known = [(row, m, s) for row, m, s in zip(rows, mu, sigma, strict=True) if s > 0]
    return mean(max((row[n] - m) / s for row, m, s in known) for n in range(len(rows[0])))


def phase_zmax(x, mu, sigma):
    return _zmax(lags(x), mu, sigma)


def norm_step_zmax(x, mu, sigma):
    rows = [
        [abs(math.log(np.linalg.norm(b) / np.linalg.norm(a))) for a, b in zip(x[d], x[d + 1], strict=True)]
        for d in range(len(x) - 1)
    ]
    return _zmax(rows, mu, sigma)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def recovery(clean, pert, rec):
    return (math.fsum(pert) - math.fsum(rec)) / (math.fsum(pert) - math.fsum(clean))


def dissociation(dyn, sem, draws=400, seed=7):
    """Verdict from a bootstrap of its own: RF of resampled runs, percentile intervals."""
    rng = np.random.default_rng(seed)
    n = dyn.shape[1]
    picks = [rng.integers(n, size=n) for _ in range(draws)]
    ends = []
    for table in (dyn, sem):
        values = sorted(recovery(*(row[p] for row in table)) for p in picks)
        ends.append({q: _quantile(values, q) for q in (0.025, 0.05, 0.95, 0.975)})
    d, s = ends
    if d[0.025] > 0.1 and s[0.025] > 0.1:
        return "COUPLED"
    if d[0.025] > 0.5 and s[0.05] > -0.1 and s[0.95] < 0.1:
        return "DISSOCIATED"
    return "INDETERMINATE"


# ---------------------------------------------------------------- strengths


def linear_gate(alphas, responses):
    """Slope over the widest run of linear stretches, without a floor; responses [n, sign, dim]."""
    points = sorted(
        (math.log(a), math.log(np.linalg.norm(r[0] - r[1]) / 2)) for a, r in zip(alphas, responses, strict=True)
    )

    def slope(part):
        mx, my = mean(p[0] for p in part), mean(p[1] for p in part)
        return sum((p[0] - mx) * (p[1] - my) for p in part) / sum((p[0] - mx) ** 2 for p in part)

    linear = {}
    for i in range(len(points)):
        for j in range(i + 2, len(points)):
            if points[j][0] - points[i][0] >= 0.5 * math.log(10) - 1e-9:
                part = points[i : j + 1]
                flat = [p[1] - p[0] for p in part]
                wide = max(flat) - min(flat) <= 0.1 * (points[j][0] - points[i][0]) + 1e-9
                linear[i] = j if abs(slope(part) - 1) <= 0.1 + 1e-9 and wide else None
                break
    unions = []
    for i, j in sorted(linear.items()):
        if j is None:
            continue
        if unions and unions[-1][2] == i - 1:
            unions[-1] = [unions[-1][0], j, i]
        else:
            unions.append([i, j, i])
    if not unions:
        return slope(points)
    i, j, _ = max(unions, key=lambda u: (points[u[1]][0] - points[u[0]][0], -u[0]))
    return slope(points[i : j + 1])


def crossing(alphas, responses, level):
    """First crossing from below, log–log between doses, linear in the response where the lower one is not positive."""
    points = sorted(zip(alphas, responses, strict=True))
    for (x, a), (y, b) in itertools.pairwise(points):
        if a < level <= b:
            share = (math.log(level) - math.log(a)) / (math.log(b) - math.log(a)) if a > 0 else (level - a) / (b - a)
            return x * (y / x) ** share
    return NAN


def prompt_threshold(table):
    inside = [float(np.median([math.log(v) for v in row])) for row in table]
    return math.exp(float(np.median(inside)))


def up(t, d, level):
    for i in range(len(t) - 1):
        if d[i] < level <= d[i + 1]:
            return t[i] + (level - d[i]) / (d[i + 1] - d[i]) * (t[i + 1] - t[i])
    return NAN


def plateau_d(outputs, a, b):
    return mean(np.linalg.norm(f - a) / (np.linalg.norm(f - a) + np.linalg.norm(f - b)) for f in outputs)


def steepest(t, d):
    return max((d[i + 1] - d[i]) / (t[i + 1] - t[i]) for i in range(len(t) - 1))


def share_on_plateaus(t, d):
    """Length outside (0.1, 0.9), by cutting every segment at both levels."""
    outside = 0.0
    for i in range(len(t) - 1):
        cuts = sorted(
            {0.0, 1.0} | {s for v in (0.1, 0.9) if d[i] != d[i + 1] and 0 < (s := (v - d[i]) / (d[i + 1] - d[i])) < 1}
        )
        for low, high in itertools.pairwise(cuts):
            middle = d[i] + (low + high) / 2 * (d[i + 1] - d[i])
            if not 0.1 < middle < 0.9:
                outside += (high - low) * (t[i + 1] - t[i])
    return outside / (t[-1] - t[0])


# ---------------------------------------------------------------- maps and weights


def ftle(maps, start=None, states=None):
    """ln of the growth of the first tangent, carried through the maps in 40 digits."""
    with mpmath.workdps(40):
        n, dim = len(maps), maps.shape[1]
        v = mpmath.matrix([float(x) for x in (np.eye(dim)[0] if start is None else start)])
        h = None if states is None else [mpmath.matrix([float(x) for x in s]) for s in states]

        def across(v, at):
            return v - at * ((at.T * v)[0] / (at.T * at)[0])

        if h is not None:
            v = across(v, h[0])
        begin = mpmath.norm(v) / (mpmath.norm(h[0]) if h else 1)
        for m in maps:
            v = mpmath.matrix(m.tolist()) * v
        if h is not None:
            v = across(v, h[-1])
        end = mpmath.norm(v) / (mpmath.norm(h[-1]) if h else 1)
        return float(mpmath.log(end / begin) / n)


def finite_difference(start, end, n):
    """start, end [eps, sign, dim]."""
    rates = []
    for a, b in zip(start, end, strict=True):
        rates.append(math.log(np.linalg.norm(b[0] - b[1]) / np.linalg.norm(a[0] - a[1])) / n)
    return float(np.median(rates))


def coupling(one, two, k=1):
    """Frame of the second Jacobian from the eigenvectors of JᵀJ, not from a singular value decomposition."""
    values, vectors = np.linalg.eigh(two.T @ two)
    v = vectors[:, ::-1][:, :k]
    u = two @ v / np.sqrt(values[::-1][:k])
    s = np.sqrt(np.linalg.eigvalsh(one.T @ one)[::-1][:k])
    return math.sqrt(((u.T @ one @ v - np.diag(s)) ** 2).sum() / (s**2).sum())


def interaction(q, k):
    """Causal, τ = √dh, mean over queries of the sum over heads."""
    with mpmath.workdps(40):
        tau, total = mpmath.sqrt(q.shape[-1]), []
        for i in range(q.shape[1]):
            for h in range(len(q)):
                logits = [mpmath.fdot(q[h, i].tolist(), k[h, j].tolist()) / tau for j in range(i + 1)]
                total.append(
                    -tau * (mpmath.log(mpmath.fsum(mpmath.exp(v - max(logits)) for v in logits)) + max(logits))
                )
        return float(mpmath.fsum(total) / q.shape[1])


def tying(a, b):
    return mean(
        1 - abs(float((x * y).sum())) / math.sqrt(float((x * x).sum()) * float((y * y).sum()))
        for x, y in zip(a, b, strict=True)
    )


def circuit(wq, wk, wv, wo):
    """Whole matrices dim × dim, head by head; W_Oᵀ is handed in."""
    found = []
    for q, k, v, o in zip(wq, wk, wv, wo, strict=True):
        ov, qk = o.T @ v, q.T @ k
        found.append(float((ov * qk).sum()) / math.sqrt(float((ov * ov).sum()) * float((qk * qk).sum())))
    return mean(found)


# ---------------------------------------------------------------- hidden Markov states


def hmm_word(rows, guess, rounds=60):
    """Baum–Welch in plain probabilities from a given labelling; Viterbi letters by rising mean of the first feature."""
    x = (rows - rows.mean(0)) / rows.std(0)
    T = len(x)
    means = np.stack([x[guess == k].mean(0) for k in range(3)])
    var = np.stack([x[guess == k].var(0) + 1e-3 for k in range(3)])
    start, move = np.full(3, 1 / 3), np.full((3, 3), 1 / 3)

    def density(t, k):
        return math.prod(
            math.exp(-((x[t, j] - means[k, j]) ** 2) / (2 * var[k, j])) / math.sqrt(2 * math.pi * var[k, j])
            for j in range(3)
        )

    for _ in range(rounds):
        b = np.array([[density(t, k) for k in range(3)] for t in range(T)]) + 1e-300
        forward, backward = np.zeros((T, 3)), np.ones((T, 3))
        forward[0] = start * b[0] / (start * b[0]).sum()
        for t in range(1, T):
            now = forward[t - 1] @ move * b[t]
            forward[t] = now / now.sum()
        for t in range(T - 2, -1, -1):
            now = move @ (b[t + 1] * backward[t + 1])
            backward[t] = now / now.sum()
        gamma = forward * backward
        gamma /= gamma.sum(1, keepdims=True)
        pairs = np.zeros((3, 3))
        for t in range(T - 1):
            joint = forward[t][:, None] * move * (b[t + 1] * backward[t + 1])[None]
            pairs += joint / joint.sum()
        start, move = gamma[0], pairs / pairs.sum(1, keepdims=True)
        means = (gamma.T @ x) / gamma.sum(0)[:, None]
        var = np.stack([(gamma[:, k] @ (x - means[k]) ** 2) / gamma[:, k].sum() + 1e-3 for k in range(3)])
    with np.errstate(divide="ignore"):
        log_move, score, back = np.log(move), np.log(start) + np.log(b[0]), []
        for t in range(1, T):
            options = score[:, None] + log_move
            back.append(options.argmax(0))
            score = options.max(0) + np.log(b[t])
    path = [int(score.argmax())]
    for choice in reversed(back):
        path.append(int(choice[path[-1]]))
    rank = np.argsort(np.argsort(means[:, 0]))
    return "".join(str(rank[k]) for k in reversed(path))


def balanced_capacity(x, y, split, C=1.0):
    """(balanced accuracy − ½)/½ of the penalised logistic probe on given folds, two classes."""
    from slow_recovery import logistic

    hit = {0: 0, 1: 0}
    for train, test in split:
        centre = x[train].mean(0)
        size = math.sqrt(((x[train] - centre) ** 2).mean())
        w = logistic((x[train] - centre) / size, y[train], C)
        for row in test:
            hit[int(y[row])] += int(((x[row] - centre) / size @ w[:-1] + w[-1] > 0) == y[row])
    recall = mean(hit[c] / int((y == c).sum()) for c in (0, 1))
    return (recall - 0.5) / 0.5
