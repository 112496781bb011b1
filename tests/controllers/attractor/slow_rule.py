"""The update rule once more, one token and one slot at a time in NumPy, written from the formulas."""

from __future__ import annotations

import math

import numpy as np


class SlowSlots:
    """State of one row."""

    def __init__(self, settings, dim):
        self.p = settings
        self.A = np.zeros((settings.slots, dim))
        self.s = np.zeros(settings.slots)
        self.stamp = np.zeros(settings.slots, int)
        self.born = np.full(settings.slots, -1)
        self.z = np.zeros((settings.slots, 3))
        self.n = 0

    def strength(self, m, n=None):
        n = self.n if n is None else n
        return self.s[m] * 2.0 ** (-(n - self.stamp[m]) / self.p.half_life)

    def token(self, y, mean, theta):
        """Return y′ and g."""
        p = self.p
        y = np.asarray(y, dtype=np.float64)
        if not np.isfinite(y).all() or np.linalg.norm(y) < 1e-6:
            return y, 0.0
        u = y - mean
        u = u / np.linalg.norm(u)
        live = [m for m in range(p.slots) if self.strength(m) >= p.s_min]
        w = {}
        for m in live:
            c, cos = self.strength(m), float(u @ self.A[m])
            if p.read == "field":
                w[m] = c
            elif p.read == "match":
                w[m] = c * max(0.0, cos - p.theta_read)
            else:
                w[m] = math.exp(p.beta * cos + math.log(c))
        if p.read == "hopfield" and w:
            total = sum(w.values())
            w = {m: v / total for m, v in w.items()}
        if p.clocks:
            w = {m: v * min(z / (z + p.z_ref) for z in self.z[m]) for m, v in w.items()}
        f = sum((v * self.A[m] for m, v in w.items()), np.zeros_like(y))
        f = f / np.linalg.norm(f) if np.linalg.norm(f) > 1e-12 else np.zeros_like(y)
        burnt = self.n >= p.burn_in if p.burn == "tokens" else sum(self.strength(m) for m in live) >= p.burn_in
        g = p.gate * math.tanh(sum(w.values()) / p.s_ref) * burnt
        delta = g * p.strength * f * (np.linalg.norm(y) if p.inject == "relative" else 1.0)
        out = y + delta if g > 0 else y
        if p.observe == "post":
            u = (out - mean) / np.linalg.norm(out - mean)
        self.write(u, live, theta)
        return out, g

    def write(self, u, live, theta):
        p, hit = self.p, None
        if live:
            best = max(live, key=lambda m: (float(u @ self.A[m]), -m))
            if float(u @ self.A[best]) >= theta:
                hit = best
        if hit is not None:
            c = self.strength(hit)
            moved = (1 - p.rate) * self.A[hit] + p.rate * u
            self.A[hit] = moved / np.linalg.norm(moved)
            self.s[hit], self.stamp[hit] = min(p.s_max, c + 1), self.n + 1
        else:
            dead = [m for m in range(p.slots) if m not in live]
            if dead:
                slot = dead[0]
            elif p.evict == "none" or not p.slots:
                slot = None
            elif p.evict == "weakest":
                slot = min(range(p.slots), key=lambda m: (self.strength(m), m))
            else:
                slot = min(range(p.slots), key=lambda m: (self.born[m], m))
            if slot is not None:
                self.A[slot], self.s[slot], self.stamp[slot] = u, p.s_new, self.n + 1
                self.born[slot], self.z[slot] = self.n, 0.0
        keep = 2.0 ** (-1.0 / np.array([10.0, 100.0, 1000.0]))
        if p.clocks:
            self.z *= keep
            if hit is not None:
                self.z[hit] += 1 - keep
        self.n += 1
