"""Definitions of the output and lens metrics, and their exact single-run form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_logits
from dynprobe.metrics._output import output_metrics, paired_output
from dynprobe.metrics._reduce import share
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

__all__ = ["close_positions"]


def close_positions(series: Array, metric_id: str, dtype: str, mask: Any, n_expected: Any = None) -> Result:
    """Mean of a per-position series [pos] or of a profile [depth, pos]."""
    grid = np.atleast_2d(series)
    keep = np.ones(grid.shape[1], bool) if mask is None else np.asarray(mask, dtype=bool)
    if keep.shape != (grid.shape[1],):
        raise MetricError(f"{metric_id}: the mask has shape {list(keep.shape)}, expected [{grid.shape[1]}].")
    if n_expected is not None:
        keep = keep & n_expected
    ok = np.isfinite(grid) & keep
    n_ok, n_keep = int(ok.sum()), int(keep.sum()) * len(grid)
    profile = share(np.where(ok, grid, 0.0).sum(-1), ok.sum(-1))
    profile = np.where(2 * ok.sum(-1) >= keep.sum(), profile, np.nan)
    reason = "empty" if n_keep == 0 else "coverage" if 2 * n_ok < n_keep else None
    return Result(
        float("nan") if reason else float(np.nanmean(profile)),
        reason,
        n_ok / n_keep if n_keep else float("nan"),
        int(keep.sum()),
        len(grid),
        metric_id,
        dtype=dtype,
        profile=profile if series.ndim == 2 else None,
        series=np.where(keep, grid, np.nan)[0] if series.ndim == 1 else None,
    )


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _single(key: str) -> Any:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        x = as_logits(inputs[0], metric_id)
        goal, expected = None, None
        if key == "nll":
            goal = torch.as_tensor(np.asarray(inputs[1]), dtype=torch.int64)
            if goal.shape != x.shape[:1]:
                raise MetricError(f"{metric_id}: targets have shape {list(goal.shape)}, logits need [{len(x)}].")
            expected, goal = (goal >= 0).numpy(), goal[None]
        return close_positions(output_metrics(x.double()[None], goal)[key][0], metric_id, _dtype(x), mask, expected)

    return compute


def _pair(key: str) -> Any:
    def compute(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
        clean, arm = (as_logits(x, metric_id) for x in inputs)
        return close_positions(
            paired_output(clean.double()[None], arm.double()[None])[key][0], metric_id, _dtype(arm), mask
        )

    return compute


def _lens_entropy(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    x = as_logits(inputs[0], metric_id, axes=3)
    return close_positions(output_metrics(x.double())["entropy"], metric_id, _dtype(x), mask)


def _lens_kl(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    model, lens = as_logits(inputs[0], metric_id), as_logits(inputs[1], metric_id, axes=3)
    clean = model.double().expand(lens.shape[0], *model.shape)
    return close_positions(paired_output(clean, lens.double())["kl_clean_pert"], metric_id, _dtype(lens), mask)


_SHIFT = frozenset({"shift"})
_TOKEN = {"token": "per position", "sample": "mean over positions"}
_DEFAULT = frozenset({"default"})

register(
    MetricSpec(
        id="output.entropy/1",
        span=True,
        sentence="Shannon entropy of the next-token distribution.",
        formula="−Σ_v p_v ln p_v, p = softmax(logits)",
        latex=r"H = -\sum_v p_v\ln p_v, \qquad p = \operatorname{softmax}(\mathrm{logits})",
        input="logits[pos,vocab]",
        value_range="[0, ln V]",
        unit="nat",
        invariances=_SHIFT,
        source="standard",
        column="entropy",
        levels=_TOKEN,
        vectors=("equal logits → ln V",),
        groups=_DEFAULT,
    ),
    _single("entropy"),
)
register(
    MetricSpec(
        id="output.margin/1",
        span=True,
        sentence="Difference between the two largest next-token probabilities.",
        formula="p₁ − p₂, p₁ ≥ p₂ ≥ …; p = softmax(logits)",
        latex=r"p_1-p_2, \qquad p_1\ge p_2\ge\dots, \quad p = \operatorname{softmax}(\mathrm{logits})",
        input="logits[pos,vocab]",
        value_range="[0, 1]",
        unit="1",
        invariances=_SHIFT,
        source="standard",
        column="margin",
        levels=_TOKEN,
        vectors=("logits ln(3,1) → 0.5",),
        groups=_DEFAULT,
    ),
    _single("margin"),
)
register(
    MetricSpec(
        id="output.nll/1",
        span=True,
        sentence="Negative log-likelihood of the token that came next.",
        formula="−ln p_target, p = softmax(logits)",
        latex=r"-\ln p_{\mathrm{target}}, \qquad p = \operatorname{softmax}(\mathrm{logits})",
        input="logits[pos,vocab], targets[pos] (−1 = none)",
        value_range="[0, ∞)",
        unit="nat",
        invariances=_SHIFT,
        source="standard",
        column="nll",
        levels=_TOKEN,
        vectors=("equal logits → ln V",),
        groups=_DEFAULT,
    ),
    _single("nll"),
    arity=2,
)
register(
    MetricSpec(
        id="output.kl/1",
        span=True,
        sentence="KL divergence of the arm's next-token distribution from the clean one.",
        formula="KL(clean ‖ arm) = Σ_v p_v (ln p_v − ln q_v), p clean, q arm, same positions under teacher forcing",
        latex=r"\mathrm{KL}(p\,\Vert\,q) = \sum_v p_v\,(\ln p_v-\ln q_v), \qquad p \text{ clean},\ q \text{ arm}",
        input="logits[pos,vocab]×2, clean first",
        value_range="[0, ∞)",
        unit="nat",
        invariances=_SHIFT,
        source="standard",
        column="kl_clean_pert",
        levels=_TOKEN,
        vectors=("(.75,.25) ‖ (.25,.75) → ln(3)/2", "equal → 0"),
        groups=frozenset({"paired"}),
    ),
    _pair("kl_clean_pert"),
    arity=2,
)
register(
    MetricSpec(
        id="output.flip/1",
        span=True,
        sentence="Whether the most probable next token differs between arm and clean.",
        formula="[argmax p ≠ argmax q], ties to the lower id",
        latex=r"\mathbb{1}\bigl[\arg\max_v p_v\ne\arg\max_v q_v\bigr]",
        input="logits[pos,vocab]×2, clean first",
        value_range="{0, 1}; mean = flip rate",
        unit="1",
        invariances=_SHIFT,
        source="standard",
        column="flip",
        levels=_TOKEN,
        vectors=("(.75,.25), (.25,.75) → 1", "equal → 0"),
        groups=frozenset({"paired"}),
    ),
    _pair("flip"),
    arity=2,
)
register(
    MetricSpec(
        id="lens.entropy/1",
        sentence="Entropy of the logit-lens distribution at each depth.",
        formula="entropy of softmax(W_U·norm(h_l)); profile = mean over positions, value = mean over depths",
        latex=(
            r"H_l = -\sum_v p_{l,v}\ln p_{l,v}, \qquad p_l = "
            r"\operatorname{softmax}\bigl(W_U\operatorname{norm}(h_l)\bigr), \qquad "
            r"\operatorname*{mean}_{l}\ \operatorname*{mean}_{\mathrm{pos}}\ H_l"
        ),
        input="logits[depth,pos,vocab]",
        value_range="[0, ln V]",
        unit="nat",
        invariances=_SHIFT,
        source="logit lens; AlignmentResearch/tuned-lens",
        column="lens_entropy",
        levels={"depth": "per position"},
        vectors=("equal logits → ln V at every depth",),
        groups=frozenset({"optional"}),
    ),
    _lens_entropy,
)
register(
    MetricSpec(
        id="lens.kl/1",
        sentence="KL divergence of the logit-lens distribution at each depth from the model's own.",
        formula="KL(model ‖ lens) per depth and position; profile = mean over positions, value = mean over depths",
        latex=(
            r"\begin{aligned} \mathrm{KL}(p\,\Vert\,p_l) &= \sum_v p_v\,(\ln p_v-\ln p_{l,v}), \qquad p_l = "
            r"\operatorname{softmax}\bigl(W_U\operatorname{norm}(h_l)\bigr) \\"
            r"\mathrm{value} &= \operatorname*{mean}_{l}\ \operatorname*{mean}_{\mathrm{pos}}\ "
            r"\mathrm{KL}(p\,\Vert\,p_l) \end{aligned}"
        ),
        input="logits[pos,vocab], logits[depth,pos,vocab]",
        value_range="[0, ∞)",
        unit="nat",
        invariances=_SHIFT,
        source="logit lens; AlignmentResearch/tuned-lens",
        column="lens_kl",
        levels={"depth": "per position"},
        vectors=("lens = model → 0",),
        groups=frozenset({"optional"}),
    ),
    _lens_kl,
    arity=2,
)
