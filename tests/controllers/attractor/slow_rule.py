"""The update rule once more, one token and one slot at a time in NumPy, written from the formulas; and in chunks."""

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
        self.hits = np.zeros(settings.slots, int)
        self.z = np.zeros((settings.slots, 3))
        self.n = 0
        self.sum = np.zeros(dim)

    def strength(self, m, n=None):
        n = self.n if n is None else n
        return self.s[m] * 2.0 ** (-(n - self.stamp[m]) / self.p.half_life)

    def token(self, y, mean, theta):
        """Return y′ and g."""
        p = self.p
        y = np.asarray(y, dtype=np.float64)
        if not np.isfinite(y).all() or np.linalg.norm(y) < 1e-6:
            return y, 0.0
        if p.centre == "running":
            mean = self.sum / max(self.n, 1)
            self.sum = self.sum + y
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

    def vacancy(self, n):
        """The slot that a new direction gets at token count n, or None."""
        dead = [m for m in range(self.p.slots) if self.strength(m, n) < self.p.s_min]
        if dead:
            return dead[0]
        if self.p.evict == "none" or not self.p.slots:
            return None
        if self.p.evict == "weakest":
            return min(range(self.p.slots), key=lambda m: (self.strength(m, n), m))
        return min(range(self.p.slots), key=lambda m: (self.born[m], m))

    def open(self, slot, u, n):
        self.A[slot], self.s[slot], self.stamp[slot] = u, self.p.s_new, n + 1
        self.born[slot], self.z[slot], self.hits[slot] = n, 0.0, 0

    def tick(self, hit):
        """One token of the three traces."""
        keep = 2.0 ** (-1.0 / np.array([10.0, 100.0, 1000.0]))
        if self.p.clocks:
            self.z *= keep
            if hit is not None:
                self.z[hit] += 1 - keep

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
            self.hits[hit] += 1
        else:
            slot = self.vacancy(self.n)
            if slot is not None:
                self.open(slot, u, self.n)
        self.tick(hit)
        self.n += 1


class SlowChunks(SlowSlots):
    """The same reads, and writes that wait for the end of their chunk."""

    def __init__(self, settings, dim):
        super().__init__(settings, dim)
        self.waiting = []

    def write(self, u, live, theta):
        self.waiting.append((self.n, u))
        self.n += 1
        if self.n % self.p.commit_every == 0:
            self.commit(theta)
            self.waiting = []

    def reinforce(self, m, tokens):
        """Hits in order; unit length and the ceiling are put right once, after the last of them."""
        moved, s = self.A[m], self.s[m]
        for n, u in tokens:
            moved = (1 - self.p.rate) * moved + self.p.rate * u
            s = s * 2.0 ** (-(n - self.stamp[m]) / self.p.half_life) + 1
            self.stamp[m] = n + 1
        self.A[m], self.s[m] = moved / np.linalg.norm(moved), min(self.p.s_max, s)
        self.hits[m] += len(tokens)

    def commit(self, theta):
        tokens, slots = self.waiting, range(self.p.slots)
        struck = {}  # number of a token in the chunk → its slot
        for k, (n, u) in enumerate(tokens):
            live = [m for m in slots if self.strength(m, n) >= self.p.s_min]
            best = max(live, key=lambda m, u=u: (float(u @ self.A[m]), -m), default=None)
            if best is not None and float(u @ self.A[best]) >= theta:
                struck[k] = best
        for m in set(struck.values()):
            self.reinforce(m, [tokens[k] for k in struck if struck[k] == m])
        missed = [k for k in range(len(tokens)) if k not in struck]
        for _ in slots:
            if not missed:
                break
            n, leader = tokens[missed.pop(0)]
            slot = self.vacancy(n)
            if slot is None:
                continue
            struck = {k: m for k, m in struck.items() if m != slot}
            self.open(slot, leader, n)
            near = [k for k in missed if float(tokens[k][1] @ leader) >= theta]
            if near:
                self.reinforce(slot, [tokens[k] for k in near])
            struck |= dict.fromkeys(near, slot)
            missed = [k for k in missed if k not in near]
        for k in range(len(tokens)):
            self.tick(struck.get(k))
