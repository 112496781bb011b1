"""A second version of the delay-embedding numbers, written from the formulas with loops and scalars."""

import cmath
import math


def pearson(a, b):
    n = len(a)
    ma, mb = math.fsum(a) / n, math.fsum(b) / n
    top = math.fsum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(math.fsum((x - ma) ** 2 for x in a) * math.fsum((y - mb) ** 2 for y in b))


def windows(x, m, lag):
    return [[x[i + k * lag] for k in range(m)] for i in range(len(x) - (m - 1) * lag)]


def correlation_matrix(x, m, lag):
    rows = windows(x, m, lag)
    return [[pearson([r[i] for r in rows], [r[j] for r in rows]) for j in range(m)] for i in range(m)]


def false_neighbours(x, m, lag, theiler, rtol=15.0, atol=2.0):
    """Shares (either, distance, size), points counted, points whose neighbour is equal."""
    n = len(x)
    mean = math.fsum(x) / n
    sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / n)
    either = one = two = counted = equal = 0
    for i in range(n - m * lag):
        best, at = math.inf, None
        for j in range(n - m * lag):
            if abs(i - j) < theiler:
                continue
            d = math.sqrt(math.fsum((x[i + k * lag] - x[j + k * lag]) ** 2 for k in range(m)))
            if d < best:
                best, at = d, j
        if at is None:
            continue
        counted += 1
        step = abs(x[i + m * lag] - x[at + m * lag])
        if best == 0:
            equal += 1
            false_distance = step > 0
        else:
            false_distance = step / best > rtol
        false_size = math.sqrt(best**2 + step**2) / sigma > atol
        one += false_distance
        two += false_size
        either += false_distance or false_size
    return either / counted, one / counted, two / counted, counted, equal


def amplitudes(x):
    n = len(x)
    return [
        abs(sum(v * cmath.exp(-2j * math.pi * k * t / n) for t, v in enumerate(x))) for k in range(n // 2 + 1)
    ]  # fmt: skip
