"""Second versions of the metrics of recovery, written from the formulas with plain loops; nothing is shared."""

import itertools
import math

import numpy as np

NAN = float("nan")


def str_series(h, sigma, window=4, tau=3.0):
    out = []
    for t in range(len(h)):
        first = max(0, t - window + 1)
        top = bottom = 0.0
        good = total = 0
        for i in range(first, t + 1):
            for j in range(first, t + 1):
                if i == j:
                    continue
                total += 1
                if not (np.all(np.isfinite(h[i])) and np.all(np.isfinite(h[j]))):
                    continue
                good += 1
                weight = 1 - math.exp(-abs(i - j) / tau)
                top += weight * math.exp(-sum((a - b) ** 2 for a, b in zip(h[i], h[j], strict=True)) / (2 * sigma**2))
                bottom += weight
        out.append(top / bottom if good and 2 * good >= total else NAN)
    return out


def recync(c):
    """Fires of the detector, with the window kept as the text says."""
    window, streak, fires = [], 0, []
    for t, value in enumerate(c):
        low = False
        if len(window) == 20:
            mean = sum(window) / 20
            sd = math.sqrt(sum((v - mean) ** 2 for v in window) / 20)
            low = math.isfinite(value) and value < mean - 0.6 * sd - 1e-12
        if low:
            streak += 1
            if streak == 3:
                fires.append(t)
        else:
            streak = 0
            if math.isfinite(value):
                window = [*window, value][-20:]
    return fires


def cycle_runs(collapse, rivalry, w):
    """Labelled runs (label, start, stop) by walking along the tokens."""
    letters = ["C" if a else "R" if b else "-" for a, b in zip(collapse, rivalry, strict=True)]
    out, at = [], 0
    for letter, group in itertools.groupby(letters):
        n = len(list(group))
        if letter != "-" and n >= w:
            out.append((letter, at, at + n))
        at += n
    return out


def reopening(runs, n_tokens):
    """(reopened, uncensored, [(time, event)]) of the COLLAPSE runs."""
    opened = closed = 0
    clock = []
    for k, (letter, start, _) in enumerate(runs):
        if letter != "C":
            continue
        after = runs[k + 1] if k + 1 < len(runs) else None
        if after is None:
            clock.append((n_tokens - start, False))
            continue
        closed += 1
        opened += after[0] == "R"
        clock.append((after[1] - start, after[0] == "R"))
    return opened, closed, clock


def kaplan_meier(clock):
    """[(time, survival)] at event times; events before censorings at ties."""
    out, s = [], 1.0
    for t in sorted({t for t, event in clock if event}):
        at_risk = sum(1 for u, _ in clock if u >= t)
        s *= 1 - sum(1 for u, event in clock if event and u == t) / at_risk
        out.append((t, s))
    return out


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def path_distance(word, path="BAD"):
    """Least distance to any word of the path up to one letter longer than the word."""
    n = len(word) + 1
    targets = [
        path[0] * b + path[1] * a + path[2] * d for b in range(n + 1) for a in range(n + 1 - b)
        for d in range(n + 1 - b - a)
    ]  # fmt: skip
    return min(levenshtein(word, t) for t in targets)


def auc(clean, pert):
    wins = [1.0 if p > c else 0.5 if p == c else 0.0 for c in clean for p in pert]
    return sum(wins) / len(wins)


def bad(lag, turn, entropy, vocab, limits):
    out = ""
    for step in range(len(lag)):
        drop = (entropy[step] - entropy[step + 1]) / math.log(vocab)
        angle = turn[step - 1] if step else None
        if math.isnan(drop):
            out += "?"
        elif drop >= limits[2]:
            out += "D"
        elif lag[step] >= limits[0] or (angle is not None and angle >= limits[1]):
            out += "B"
        elif math.isnan(lag[step]) or (angle is not None and math.isnan(angle)):
            out += "?"
        else:
            out += "A"
    return out


def logistic(x, y, C):
    """L2-penalised logistic weights by Newton's method: ½‖w‖² + C·Σ log(1 + exp(−s·f)), intercept free."""
    design = np.hstack([x, np.ones((len(x), 1))])
    keep = np.diag([1.0] * x.shape[1] + [0.0])
    weights = np.zeros(design.shape[1])
    for _ in range(60):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = keep @ weights + C * design.T @ (p - y)
        hessian = keep + C * (design * (p * (1 - p))[:, None]).T @ design
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights
