"""The energy lens: is a layer's attention a step down the interaction energy of its own queries and keys?

A CEM is built so that it is. A Transformer has queries and keys too, hence an energy, but values and output of its own:
the lens evaluates the energy with the weights it has, and asks how far the attention update points along −∇ε and how
near the four matrices are to the tying that would make it exact. Each number stands beside what it must be told from:

- a **random twin**: the same configuration, freshly initialised (a cosine that it shows as well was not learned);
- **other heads**: every head's pull sent back through the W_Q of another head of the layer; pairs of heads that do not
  belong together for the weights;
- **other layers**: −∇ε of a layer against the attention updates of all the others, at the same tokens.

Rows are run one at a time, so there is no padding. The first token is left out by default: it sees only itself, and in
trained models it is where attention is parked. A mean is taken over the tokens of a prompt and then over prompts, and
its interval resamples prompts. Energies of different layers have no common scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from dynprobe.errors import UsageError
from dynprobe.metrics._result import Array
from dynprobe.metrics.statistics import mean_interval
from dynprobe.metrics.statistics._bootstrap import check_bootstrap
from dynprobe.probes import Subject, as_subject, tokenize
from dynprobe.probes._inputs import Prompts
from dynprobe.probes._noise import row_key_from_tokens
from dynprobe.probes._random_twin import random_twin
from dynprobe.protocols._energy_rows import Seen, look
from dynprobe.protocols._energy_weights import tying_columns

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EnergyLensResult", "energy_lens"]

#: Means per prompt that the table holds with an interval, and those it holds without.
_WITH_INTERVAL = ("energy", "cos", "slope")
_PLAIN = ("cos_other_heads", "cos_other_layers")


@dataclass(frozen=True, eq=False)
class EnergyLensResult:
    """What the lens saw.

    Attributes:
        table: One row per layer (and iteration, for a CEM). ``energy``: ε per token, sum over heads. ``cos``,
            ``slope``: of −∇ε and the update, where an update follows. ``…_low``, ``…_high``: interval over prompts.
            ``cos_other_heads``, ``cos_other_layers``: nulls. ``…_random``: the twin's; ``cos_gain``: cos less the
            twin's, prompt by prompt. ``circuit``, ``tying_qo``, ``tying_kv``, ``subspace_qo``, ``subspace_kv``: of the
            weights, mean over heads, with ``…_other_heads``, ``…_random`` and, for subspaces, ``…_chance``.
            ``reason``: why numbers are missing.
        tokens: One row per prompt, layer, iteration and position: ``energy``, ``cos``, ``slope`` and the nulls.
        heads: One row per layer, iteration and head: ``energy``, and the distances of its weights.
        metric_ids: Column → metric id.
        head: What holds for all rows: model, dtype, baseline, prompts, first position, seed, confidence.
    """

    table: pd.DataFrame
    tokens: pd.DataFrame
    heads: pd.DataFrame
    metric_ids: dict[str, str]
    head: dict[str, Any]


def energy_lens(
    model: Subject | nn.Module,
    prompts: Prompts,
    *,
    baseline: Subject | nn.Module | str | None = "random",
    twins: int = 1,
    first: int = 1,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    chat_template: str = "none",
) -> EnergyLensResult:
    """Evaluate the interaction energy of every layer's attention, and how far its update follows −∇ε.

    ε(u_i) = −τ Σ_k log Σ_j exp(q_ikᵀk_jk/τ + b_ijk) with the model's own queries and keys, keys constant; the table
    shows ε/K.

    Args:
        model: A decoder whose attention goes through ``scaled_dot_product_attention``, or a CEM.
        prompts: Texts or lists of token ids; two or more for an interval.
        baseline: ``"random"`` builds a twin of random weights, None leaves it out, a model is taken as it is.
        twins: Random twins, of seeds ``seed``, ``seed`` + 1, …; their mean stands in the table, and from two on their
            spread ``cos_random_sd``, without which a cosine of 0.05 cannot be told from one lucky initialisation.
        first: First position that enters means.
        seed: Seed of the twin and of the resampling.
        n_boot: Resamples of prompts.
        confidence: Of the intervals.
        chat_template: ``"auto"`` wraps texts as a user turn.

    Returns:
        Table, tokens and heads. A layer that cannot be read has NaN and a reason.

    Raises:
        ModelError: If no layer can be read; the reason is that of the first.
        UsageError: If a setting has no meaning.

    Source: Causal Energy Minimization, arXiv 2605.07588.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> result = energy_lens(tiny_llama(), [[5, 6, 7, 8], [9, 10, 11]], n_boot=200)
        >>> len(result.table), bool(result.table["cos"].abs().max() < 1)
        (3, True)
    """
    check_bootstrap(n_boot, confidence)
    if first < 0:
        raise UsageError(f"first={first}; it is a position counted from 0")
    if isinstance(baseline, str) and baseline != "random":
        raise UsageError(f"baseline={baseline!r}; it is 'random', None or a model")
    if twins < 1 or (twins > 1 and baseline != "random"):
        raise UsageError(f"twins={twins} with baseline={baseline!r}; several twins are random ones, at least one")
    subject = as_subject(model)
    rows = tokenize(subject, prompts, chat_template=chat_template)
    seen = look(subject, rows, first)
    others: list[Subject] = []
    if isinstance(baseline, str):
        others = [random_twin(subject, seed=seed + i) for i in range(twins)]
    elif baseline is not None:
        others = [as_subject(baseline)]
    against = [look(other, rows, first) for other in others]
    for other, looked in zip(others, against, strict=True):
        if looked.tokens.keys() != seen.tokens.keys():
            raise UsageError(
                f"of the baseline {other.name} other layers or iterations can be read than of {subject.name} "
                f"({len(looked.tokens)} and {len(seen.tokens)}); they must be of one shape"
            )
    draw = _Draw(n_boot, confidence, seed)
    table, heads = [], []
    for layer, weights in enumerate(seen.weights):
        tied, per_head = tying_columns(weights, [a.weights[layer] for a in against])
        if layer in seen.reasons:
            table.append({"layer": layer, "iteration": 0, "reason": seen.reasons[layer]})
            continue
        for key in (k for k in seen.tokens if k[0] == layer):
            means = _means(seen.tokens[key])
            row: dict[str, Any] = {"layer": layer, "iteration": key[1], "n_heads": weights.heads}
            row |= {"n_prompts": int(np.isfinite(means["energy"]).sum()), "n_tokens": _count(seen.tokens[key])}
            row |= _summary(means, draw)
            if against:
                row |= _against(means, [_means(a.tokens[key]) for a in against], draw)
            row |= tied | {"reason": _reason(row, key, seen)}
            table.append(row)
            energies = _mean_rows([e.mean(1) for e in seen.heads[key] if e.shape[1]], weights.heads)
            heads += [
                {"layer": layer, "iteration": key[1], "head": h, "energy": energies[h]}
                | {name: values[h] for name, values in per_head.items()}
                for h in range(weights.heads)
            ]
    head = {
        "model": subject.name, "dtype": str(subject.dtype).removeprefix("torch."), "n_prompts": len(rows),
        "baseline": others[0].name if others else None, "twins": len(others), "first": first, "seed": seed,
        "n_boot": n_boot, "confidence": confidence,
    }  # fmt: skip
    return _frames(table, heads, seen, rows, head)


@dataclass(frozen=True)
class _Draw:
    """How intervals are drawn; columns with the same prompts get the same resamples."""

    n_boot: int
    confidence: float
    seed: int

    def __call__(self, name: str, values: Array) -> dict[str, float]:
        """Mean over prompts and its expanded percentile interval; prompts without a value take no part."""
        low, high = mean_interval(values, confidence=self.confidence, n_boot=self.n_boot, seed=self.seed)
        return {name: _mean(values), f"{name}_low": low, f"{name}_high": high}


def _means(prompts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Mean over the tokens of each prompt, NaN where it has none."""
    out = {}
    for name in (*_WITH_INTERVAL, *_PLAIN):
        kept = [p[name][np.isfinite(p[name])] for p in prompts]
        out[name] = np.array([v.mean() if v.size else np.nan for v in kept])
    return out


def _count(prompts: Sequence[dict[str, Array]]) -> int:
    return int(sum(np.isfinite(p["energy"]).sum() for p in prompts))


def _mean(values: Array) -> float:
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")


def _mean_rows(rows: Sequence[Array], n: int) -> Array:
    return np.mean(rows, axis=0) if rows else np.full(n, np.nan)


def _summary(means: dict[str, Array], draw: _Draw) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in _WITH_INTERVAL:
        row |= draw(name, means[name])
    return row | {name: _mean(means[name]) for name in _PLAIN}


def _against(means: dict[str, Array], twins: Sequence[dict[str, Array]], draw: _Draw) -> dict[str, float]:
    twin = {name: np.mean([t[name] for t in twins], axis=0) for name in means}
    row = draw("cos_random", twin["cos"]) | draw("cos_gain", means["cos"] - twin["cos"])
    spread = np.std([_mean(t["cos"]) for t in twins], ddof=1) if len(twins) > 1 else float("nan")
    row |= {"cos_random_sd": float(spread)}
    return row | {"energy_random": _mean(twin["energy"]), "slope_random": _mean(twin["slope"])}


def _reason(row: dict[str, Any], key: tuple[int, int], seen: Seen) -> str | None:
    if not row["n_tokens"]:
        return "empty: no prompt has a token at or after first"
    if np.isfinite(row["cos"]):
        return None if row["n_prompts"] >= 3 else "prompts<3: no interval"
    return "last" if key[1] == max(k[1] for k in seen.tokens if k[0] == key[0]) and key[1] else "zero-denominator"


def _frames(
    table: list[dict[str, Any]], heads: list[dict[str, Any]], seen: Seen, rows: Sequence[Sequence[int]],
    head: dict[str, Any],
) -> EnergyLensResult:  # fmt: skip
    import pandas as pd

    tokens = [
        pd.DataFrame({
            "prompt": p, "row_key": row_key_from_tokens(rows[p]), "layer": layer, "iteration": iteration,
            "pos": head["first"] + np.arange(len(values["energy"])), **values,
        })
        for (layer, iteration), prompts in seen.tokens.items()
        for p, values in enumerate(prompts)
    ]  # fmt: skip
    ids = {
        "energy": "energy.interaction/1", "cos": "energy.align/1", "slope": "energy.align/1",
        "circuit": "energy.circuit/1", "tying_qo": "energy.tying/1", "tying_kv": "energy.tying/1",
        "subspace_qo": "energy.tying/1{kind=subspace}", "subspace_kv": "energy.tying/1{kind=subspace}",
    }  # fmt: skip
    return EnergyLensResult(
        pd.DataFrame(table), pd.concat(tokens, ignore_index=True) if tokens else pd.DataFrame(), pd.DataFrame(heads),
        ids, head,
    )  # fmt: skip
