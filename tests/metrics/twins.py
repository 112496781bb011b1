"""Every metric of the catalogue beside its slow version, and inputs to compare them on.

``TWINS`` maps an id to a :class:`Twin`: ``make(rng)`` draws inputs (and side inputs) the metric takes, and ``slow``
computes the value from them by another road. The tests go through the catalogue, so a metric without an entry here
fails.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import slow
import slow_convergence
import slow_delay
import slow_recovery
import slow_rest as rest
import slow_sets
import torch
from test_metrics_lockin import slow as slow_lockin

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Twin:
    """What a metric is compared with.

    ``kind`` says how its inputs are transformed: trajectory, tokens, series, logits, probs, or none of these.
    """

    kind: str
    make: Callable[[np.random.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    slow: Callable[..., Any]
    rel: float = 1e-9


def path(rng, depth=None, units=None, dim=None):
    shape = (depth or int(rng.integers(4, 7)), units or int(rng.integers(5, 9)), dim or int(rng.integers(3, 8)))
    return np.cumsum(rng.normal(size=shape), axis=0) + 0.3


def _traj(slow_one, rel=1e-9, **size):
    return Twin(
        "trajectory", lambda rng: ((path(rng, **size),), {}),
        lambda x: slow_one(x, np.ones(x.shape[:2], bool))[0], rel,
    )  # fmt: skip


def _pair(slow_two, rel=1e-9, **size):
    def make(rng):
        x = path(rng, **size)
        return (x, x + 0.4 * rng.normal(size=x.shape)), {}

    return Twin("trajectory", make, lambda x, y: slow_two(x, y, np.ones(x.shape[:2], bool))[0], rel)


def _eps(function):
    return lambda x, mask: function(x, mask, EPS)


def _walk(rng, n=12, d=5):
    return np.cumsum(rng.normal(size=(n, d)), axis=0) + 1.0


def _tokens(slow_one):
    return Twin("tokens", lambda rng: ((_walk(rng),), {}), slow_one)


def _ct(which):
    def value(h):
        mask = np.ones(len(h), bool)
        return slow.mean_ct(*which(h, mask, EPS), mask)[0]

    return value


def _rqa(name):
    def make(rng):
        return (rng.normal(size=(int(rng.integers(14, 22)), 3)),), {"q": 0.3}

    return Twin("tokens", make, lambda h, q: slow_sets.rqa(h, np.ones(len(h), bool), q=q)[name][0])


def _series(slow_one, low=0.05, high=2.0, n=(12, 25), **more):
    def make(rng):
        return (rng.uniform(low, high, size=int(rng.integers(*n))),), dict(more)

    return Twin("series", make, slow_one)


def _masked(function):
    return lambda x, **more: function(x, np.ones(len(x), bool), **more)[0]


def _delay(slow_one, **more):
    def make(rng):
        noise = rng.normal(size=int(rng.integers(60, 80)))
        return (np.array([sum(0.6 ** (t - s) * noise[s] for s in range(t + 1)) for t in range(len(noise))]),), more

    return Twin("series", make, slow_one, 1e-7)


def _axes(x, m, lag):
    values, vectors = np.linalg.eigh(np.array(slow_delay.correlation_matrix(list(x), m, lag)))
    return values[::-1], vectors[:, ::-1]


def _cosines(m):
    waves = [[math.cos(math.pi * j * (i + 0.5) / m) for i in range(m)] for j in range(m)]
    return [np.array(w) / np.linalg.norm(w) for w in waves]


def _logits(slow_row, positions=4, vocab=9):
    return Twin(
        "logits", lambda rng: ((3 * rng.normal(size=(positions, vocab)),), {}),
        lambda x: rest.mean(slow_row(row) for row in x),
    )  # fmt: skip


def _logit_pair(slow_rows):
    return Twin(
        "logits", lambda rng: (tuple(2 * rng.normal(size=(2, 4, 9))), {}),
        lambda x, y: rest.mean(slow_rows(a, b) for a, b in zip(x, y, strict=True)),
    )  # fmt: skip


def _stack(slow_stack):
    return Twin("logits", lambda rng: ((2 * rng.normal(size=(4, 3, 7)),), {}), slow_stack)


def _between_steps(slow_rows):
    return _stack(
        lambda x: rest.mean(slow_rows(a[p], b[p]) for a, b in itertools.pairwise(x) for p in range(x.shape[1]))
    )


def _lens(slow_both):
    def make(rng):
        model = 2 * rng.normal(size=(4, 7))
        lens = np.stack([model * w + rng.normal(size=(4, 7)) * (1 - w) for w in (0.1, 0.5, 0.9, 1.0)])
        return (model, lens), {}

    return Twin("logits", make, slow_both)


def _tuned():
    def make(rng):
        from dynprobe.metrics import Translators

        h, head = rng.normal(size=(3, 4, 5)), rng.normal(size=(7, 5))
        weight, bias = 0.3 * rng.normal(size=(2, 5, 5)), rng.normal(size=(2, 5))
        lens = Translators()
        for d in range(2):
            lens.weight[d], lens.bias[d] = torch.from_numpy(weight[d]), torch.from_numpy(bias[d])
        side = {"translators": lens, "readout": lambda x: x @ torch.from_numpy(head).to(x.dtype).T}
        return (h[-1] @ head.T + 0.1 * rng.normal(size=(4, 7)), h), side

    def value(model, h, translators, readout):
        weight, bias = ([t[d].numpy() for d in range(2)] for t in (translators.weight, translators.bias))
        head = readout(torch.eye(h.shape[-1], dtype=torch.float64)).numpy().T
        lens = rest.tuned(h, weight, bias, head)
        return rest.mean(rest.kl(model[p], row[p]) for row in lens for p in range(len(model)))

    return Twin("none", make, value)


def _probs(name):
    return Twin(
        "probs", lambda rng: (tuple(rng.dirichlet(np.ones(6), size=(2, 3))), {}),
        lambda p, q: rest.mean(slow_sets.distances(a.tolist(), b.tolist())[name] for a, b in zip(p, q, strict=True)),
    )  # fmt: skip


def _relax(along):
    def make(rng):
        x = path(rng, 6, 8)
        return (x, x + 0.4 * rng.normal(size=x.shape)), {"inject": 1, "pos": 2}

    return Twin("trajectory", make, lambda x, y, inject, pos: rest.relaxation(x, y, along, inject, pos))


def _lockin(name):
    def make(rng):
        n, dim = 40, 4
        wave = np.cos(2 * np.pi * np.arange(n) / 8)[:, None] * rng.normal(size=dim)
        x = rng.normal(size=(2, n, dim))
        moved = np.stack([wave, wave @ rng.normal(size=(dim, dim)) + 0.1 * rng.normal(size=(n, dim))])
        return (x, x + moved), {"inject": 0, "period": 8}

    def value(x, y, inject, period):
        return slow_lockin((y - x)[-1], (y - x)[inject], period)[f"lockin_{name}"]

    return Twin("trajectory", make, value, 1e-7)


def _calibrated(slow_one, spread=0.05):
    def make(rng):
        x = path(rng, 5, 6)
        return (x,), {"mu": rng.uniform(0.05, 0.2, 4), "sigma": rng.uniform(0.5, 2, 4) * spread}

    return Twin("trajectory", make, slow_one)


def _gate():
    def make(rng):
        a = np.geomspace(1e-3, 1, 13) * np.exp(0.05 * rng.normal(size=13))
        u, v = rng.normal(size=(2, 3))
        bend = float(rng.uniform(0.5, 4))
        odd = (a / (1 + bend * a))[:, None] * u
        even = (a**2)[:, None] * v
        return (a, np.stack([odd + even, -odd + even], axis=1)), {}

    return Twin("none", make, rest.linear_gate)


def _maps(rng):
    return ((np.eye(4) + 0.4 * rng.normal(size=(5, 4, 4)),), {})


def _fd():
    def make(rng):
        a = np.eye(3) + 0.4 * rng.normal(size=(3, 3))
        h, way = rng.normal(size=(2, 3))
        start = np.stack([[h + e * way, h - e * way] for e in (1e-3, 3e-3, 1e-2)])
        return (start, np.sin(start) @ a), {"n": 2}

    return Twin("none", make, rest.finite_difference, 1e-8)


def _weights(count):
    return lambda rng: (tuple(rng.normal(size=(count, 2, 3, 5))), {})


def _monotone(rng):
    d = np.sort(rng.uniform(size=15))
    d[0], d[-1] = 0.0, 1.0
    return (np.sort(rng.uniform(size=15)), d), {}


def _rough(rng):
    (t, d), more = _monotone(rng)
    d = np.clip(d + 0.15 * rng.normal(size=15), 0, 1)
    d[0], d[-1] = 0.0, 1.0
    return (t, d), more


def _plateau(slow_one):
    return Twin("none", _rough, slow_one)


def _crit(level, **more):
    def make(rng):
        a = np.geomspace(0.05, 3, 9)
        return (a, level * (a / rng.uniform(0.1, 2)) ** rng.uniform(0.7, 2.5)), dict(more)

    return Twin("none", make, lambda a, r: rest.crossing(a, r, level))


def _crit_kappa():
    def make(rng):
        a = np.geomspace(0.05, 3, 9)
        return (a, 0.02 * (a / rng.uniform(0.2, 1)) ** 2), {"null": 0.01 * rng.normal(size=200)}

    return Twin("none", make, lambda a, r, null: rest.crossing(a, r, slow._quantile(list(null), 0.99)))


def _threshold_mean():
    def make(rng):
        a = np.geomspace(0.02, 3, 11)
        return (a, (a / rng.uniform(0.1, 1, size=(5, 3, 1))) ** 2), {}

    def value(a, r):
        return rest.crossing(a, [rest.mean(rest.mean(s[i] for s in p) for p in r) for i in range(len(a))], 1.0)

    return Twin("prompts", make, value)


def _gmean():
    return Twin(
        "none", lambda rng: ((rng.uniform(0, 1.5, size=(3, 9)),), {"low": [0.2] * 3, "high": [1.3, 1.6, 2.0]}),
        lambda x, low, high: rest.gmean_of_bands(x, low, high),
    )  # fmt: skip


def _recync():
    def make(rng):
        c = 1 - 0.02 * rng.random(60)
        for at in (28, 44):
            c[at : at + 4] = 0.9 - 0.1 * rng.random(4)
        return (c,), {}

    return Twin("series", make, lambda c: float(len(slow_recovery.recync(c))))


def _recovery_values(rng, n=24, left=0.3):
    clean = rng.normal(1.0, 0.1, n)
    pert = clean + rng.normal(2.0, 0.2, n)
    return np.stack([clean, pert, clean + left * (pert - clean) + 0.02 * rng.normal(size=n)])


def _dissoc():
    def make(rng):
        left = [(0.1, 0.2), (0.1, 1.0), (0.95, 0.1)][int(rng.integers(3))]
        return tuple(_recovery_values(rng, left=v) for v in left), {}

    return Twin("none", make, rest.dissociation)


def _bad():
    def make(rng):
        n = 12
        side = {"vocab": 50, "limits": (0.15, 1.2, 0.12)}
        return (rng.uniform(0, 0.3, n), rng.uniform(0, 2, n - 1), rng.uniform(0, 3.5, n + 1)), side

    return Twin("none", make, slow_recovery.bad)


def _hmm():
    def make(rng):
        state = np.repeat(rng.permutation(np.array([0, 1, 2, 1, 0, 2])), 12)
        means = np.array([[0.05, 0.5, 0.9], [0.2, 1.5, 0.6], [0.4, 1.0, 0.2]])
        return (means[state] + rng.normal(size=(72, 3)) * [0.02, 0.1, 0.05],), {"n_starts": 3}

    def value(x, n_starts):
        edges = np.quantile(x[:, 0], [1 / 3, 2 / 3])  # a start that knows nothing of the states
        return rest.hmm_word(x, np.searchsorted(edges, x[:, 0]))

    return Twin("none", make, value)


def _fcap():
    def make(rng):
        y = np.arange(40) % 2
        x = rng.normal(size=(1, 40, 4))
        x[0, :, 0] += 1.2 * y
        return (x, y), {}

    def value(x, y):
        from dynprobe.metrics._functional_capacity import _folds  # the folds are drawn, not computed

        return rest.balanced_capacity(x[0], y, _folds(y, None, 5, 0)[0])

    return Twin("none", make, value)


def _huginn_minp(x):
    return rest.mean(slow_convergence.minp_kl(a[p], b[p]) for a, b in itertools.pairwise(x) for p in range(x.shape[1]))


TWINS = {
    "kappa.phase/1": _traj(slow.kappa_phase),
    "kappa.geom/1": _traj(_eps(slow.kappa_geom), 1e-8),
    "kappa.sync/1": _traj(_eps(slow.kappa_sync)),
    "kappa.xcorr/1": _traj(_eps(slow.kappa_xcorr), 1e-8),
    "delta.rel_prev/1": _traj(slow.rel_prev),
    "delta.rel_next/1": _traj(slow.rel_next),
    "delta.rms/1": _traj(slow.rms),
    "delta.angle/1": _traj(slow.kappa_phase),
    "resid.norm/1": _traj(slow.resid_norm),
    "curv.depth/1": _traj(_eps(slow.curv_depth)),
    "curv.token/1": _traj(_eps(slow.curv_token)),
    "line.shape/1": _traj(slow_sets.line_shape),
    "influence.block/1": _traj(slow_sets.block_influence),
    "influence.angular/1": _traj(slow_sets.angular),
    "order.vector/1": _traj(slow_sets.order_vector),
    "order.pairwise/1": _traj(slow_sets.order_pairwise),
    "cka.linear/1": _traj(slow_sets.cka, 1e-8),
    "cka.linear.paired/1": _pair(slow_sets.cka_paired, 1e-8),
    "rsa.dist/1": _traj(slow_sets.rsa, 1e-8),
    "rsa.dist.paired/1": _pair(slow_sets.rsa_paired, 1e-8),
    "erank.rv/1": _traj(slow_sets.erank),
    "erank.participation/1": _traj(slow_sets.participation),
    "erank.stable/1": _traj(slow_sets.stable_rank),
    "entropy.matrix/1": _traj(slow_sets.matrix_entropy),
    "id.twonn/1": _traj(slow_sets.twonn, 1e-8, units=14),
    "rqa.rr/1": _rqa("rr"),
    "rqa.det/1": _rqa("det"),
    "rqa.lam/1": _rqa("lam"),
    "rqa.entr/1": _rqa("entr"),
    "delay.autocorr/1": _delay(lambda x, lag: slow_delay.pearson(list(x[:-lag]), list(x[lag:])), lag=2),
    "delay.fnn/1": _delay(
        lambda x, m, lag, theiler: slow_delay.false_neighbours(list(x), m, lag, theiler)[0], m=2, lag=1, theiler=1
    ),
    "delay.pc_share/1": _delay(lambda x, m, lag, k: _axes(x, m, lag)[0][k - 1] / m, m=4, lag=1, k=2),
    "delay.pc_mirror/1": _delay(
        lambda x, m, lag, k: abs(_axes(x, m, lag)[1][:, k - 1] @ _axes(x, m, lag)[1][::-1, k - 1]), m=4, lag=1, k=1
    ),
    "delay.pc_cosine/1": _delay(
        lambda x, m, lag, k: max(abs(_axes(x, m, lag)[1][:, k - 1] @ c) for c in _cosines(m)), m=4, lag=1, k=1
    ),
    "limen.ct/1": _tokens(_ct(slow.ct)),
    "limen.ct2/1": _tokens(_ct(slow.ct2)),
    "norm.raw/1": _series(rest.mean),
    "norm.winsor_mad/1": _series(lambda x: rest.winsor(list(x))),
    "norm.zmad/1": _series(lambda x: rest.zmad(list(x))),
    "limen.ratio/1": _series(_masked(slow.ratio)),
    "limen.qratio/1": _series(_masked(slow.qratio)),
    "limen.gini/1": _series(_masked(slow.gini)),
    "limen.regime/1": Twin("none", lambda rng: ((float(np.exp(rng.uniform(0, 4))),), {}), rest.regime),
    "debt.cusum/1": _series(_masked(slow.cusum), theta=0.9),
    "debt.excess/1": _series(_masked(slow.excess), theta=0.9),
    "collapse.late_ct/1": _series(_masked(slow.late)),
    "output.entropy/1": _logits(rest.entropy),
    "output.margin/1": _logits(rest.margin),
    "output.nll/1": Twin(
        "logits", lambda rng: ((3 * rng.normal(size=(4, 9)), rng.integers(9, size=4)), {}),
        lambda x, y: rest.mean(rest.nll(a, int(b)) for a, b in zip(x, y, strict=True)),
    ),
    "output.kl/1": _logit_pair(rest.kl),
    "output.flip/1": _logit_pair(lambda a, b: float(rest.top(a) != rest.top(b))),
    "lens.entropy/1": _stack(lambda x: rest.mean(rest.entropy(row) for depth in x for row in depth)),
    "lens.kl/1": _lens(lambda m, x: rest.mean(rest.kl(m[p], depth[p]) for depth in x for p in range(len(m)))),
    "lens.prediction_depth/1": _lens(rest.prediction_depth),
    "lens.tuned_kl/1": _tuned(),
    "dist.js/1": _probs("js"),
    "dist.half_jeffreys/1": _probs("half_jeffreys"),
    "dist.tv/1": _probs("tv"),
    "dist.linf/1": _probs("linf"),
    "kappa.phase.paired/1": _pair(slow.phase_paired),
    "diverge.angle/1": _pair(slow.diverge),
    "response.rel/1": Twin("trajectory", _pair(slow.diverge).make, rest.response),
    "relax.depth/1": _relax("depth"),
    "relax.token/1": _relax("token"),
    "lockin.gain/1": _lockin("gain"),
    "lockin.phase/1": _lockin("phase"),
    "lockin.total/1": _lockin("total"),
    "lockin.snr/1": _lockin("snr"),
    "kappa.phase.z/1": _calibrated(rest.phase_z),
    "kappa.phase.zmax/1": _calibrated(rest.phase_zmax),
    "gate.linear/1": _gate(),
    "lyap.ftle/1": Twin("none", _maps, rest.ftle),
    "lyap.fd/1": _fd(),
    "deq.residual/1": _traj(slow_convergence.deq),
    "converge.accel/1": _traj(slow_convergence.accel),
    "converge.rho/1": _traj(slow_convergence.rho),
    "converge.iterations/1": Twin(
        "trajectory",
        lambda rng: ((1 + rng.normal(size=(9, 4, 3)) * 0.4 ** np.arange(9)[:, None, None],), {"tol": 0.1}),
        lambda x, tol: slow_convergence.iterations(x, np.ones(x.shape[:2], bool), tol=tol)[0],
    ),
    "converge.exit/1": Twin(
        "none", lambda rng: ((rng.uniform(size=20) * 0.8 ** np.arange(20),), {"tol": 0.2, "patience": 2}),
        rest.first_below,
    ),
    "converge.alignment/1": Twin(
        "tokens", lambda rng: (tuple(rng.normal(size=(2, 6, 4))), {}),
        lambda x, y: rest.mean(rest.cosine(a, b) for a, b in zip(x, y, strict=True)),
    ),
    "huginn.entropy_diff/1": _between_steps(lambda a, b: abs(rest.entropy(b) - rest.entropy(a))),
    "huginn.kl/1": _between_steps(rest.kl),
    "huginn.minp_kl/1": _stack(_huginn_minp),
    "huginn.argmax_stable/1": Twin(
        "logits", lambda rng: ((np.eye(3)[rng.integers(3, size=(5, 4))] * 2 + rng.normal(size=(5, 4, 3)) * 0.1,), {}),
        rest.argmax_stable,
    ),
    "ouro.q_exit/1": Twin(
        "none", lambda rng: ((rng.dirichlet(np.ones(8)),), {"q": float(rng.uniform(0.1, 0.95))}), rest.q_exit
    ),
    "coupling.mk/1": Twin("none", lambda rng: (tuple(rng.normal(size=(2, 5, 5))), {"K": 2}),
                          lambda a, b, K: rest.coupling(a, b, K), 1e-7),
    "energy.interaction/1": Twin("none", lambda rng: (tuple(rng.normal(size=(2, 2, 5, 4))), {}), rest.interaction),
    "energy.align/1": Twin(
        "tokens", lambda rng: (tuple(rng.normal(size=(2, 6, 4))), {}),
        lambda x, y: rest.mean(rest.cosine(a, b) for a, b in zip(x, y, strict=True)),
    ),
    "energy.tying/1": Twin("none", _weights(2), rest.tying),
    "energy.circuit/1": Twin("none", _weights(4), rest.circuit),
    "plateau.d/1": Twin("none", lambda rng: ((rng.normal(size=(9, 4)), *rng.normal(size=(2, 4))), {}), rest.plateau_d),
    "plateau.t10/1": _plateau(lambda t, d: rest.up(t, d, 0.1)),
    "plateau.t50/1": _plateau(lambda t, d: rest.up(t, d, 0.5)),
    "plateau.t90/1": _plateau(lambda t, d: rest.up(t, d, 0.9)),
    "plateau.width/1": _plateau(lambda t, d: rest.up(t, d, 0.9) - rest.up(t, d, 0.1)),
    "plateau.slope/1": _plateau(rest.steepest),
    "plateau.share/1": _plateau(rest.share_on_plateaus),
    "crit.kl/1": _crit(1.0),
    "crit.flip/1": _crit(0.5),
    "crit.kappa/1": _crit_kappa(),
    "crit.task/1": _crit(0.2),
    "threshold.prompt/1": Twin(
        "prompts", lambda rng: ((np.exp(rng.normal(size=(7, 3))),), {}), rest.prompt_threshold
    ),
    "threshold.mean/1": _threshold_mean(),
    "readiness.band/1": Twin(
        "series", lambda rng: ((rng.uniform(0, 1.5, size=9),), {"low": 0.3, "high": 1.2}),
        lambda x, low, high: rest.mean(rest.band(x, low, high)),
    ),
    "readiness.gmean/1": _gmean(),
    "norm.step.zmax/1": _calibrated(rest.norm_step_zmax, 0.3),
    "str.kernel/1": Twin(
        "tokens", lambda rng: ((rng.normal(size=(8, 3)),), {"sigma": 1.3}),
        lambda h, sigma: rest.mean(v for v in slow_recovery.str_series(h, sigma) if not math.isnan(v)),
    ),
    "recync.detect/1": _recync(),
    "recovery.fraction/1": Twin("runs", lambda rng: (tuple(_recovery_values(rng)), {}), rest.recovery),
    "dissoc.rf2/1": _dissoc(),
    "states.bad/1": _bad(),
    "states.hmm/1": _hmm(),
    "cycles.margin/1": Twin(
        "none", lambda rng: ((np.repeat(rng.choice([0.1, 0.5, 0.95], 25), rng.integers(1, 7, 25)),), {}),
        lambda m: rest.rate(m >= 0.9, m <= 0.2, 3),
    ),
    "cycles.ct/1": Twin(
        "none",
        lambda rng: (
            (np.repeat(rng.choice([0.1, 0.5, 0.95], 25), rng.integers(1, 7, 25)),), {"low": 0.2, "high": 0.9}
        ),
        lambda c, low, high: rest.rate(c < low, c > high, 3),
    ),
    "fcap.probe/1": _fcap(),
}  # fmt: skip
