"""Numbers about populations of models: what their intervals are about."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dynprobe import claims
from dynprobe.claims._populations import _balanced, skeleton, variance
from dynprobe.claims._sides import Side

MODELS, CATEGORIES, PER = 5, 4, 6


def side(name: str, frame: pd.DataFrame, **facts: float) -> Side:
    conditions = pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"]})
    samples = frame.assign(condition_id="clean", sample_id=frame["prompt_id"])
    return Side("model", name, {"samples": samples, "conditions": conditions}, facts)


def test_the_interval_of_a_share_is_about_panels_of_this_design() -> None:
    """Categories mean nothing here. Resampled prompts repeat and alone would put the interval far above the share."""
    parts = {part.factor: part for part in claims.find("variance.shares").parts}
    rng = np.random.default_rng(3)
    prompts = [f"p{i}" for i in range(CATEGORIES * PER)]
    labels = [f"c{i // PER}" for i in range(CATEGORIES * PER)]

    def draw() -> np.ndarray:
        return rng.normal(size=len(prompts)) + 0.6 * rng.normal(size=(MODELS, len(prompts)))

    expected = {f: np.mean([_balanced(draw(), [PER] * CATEGORIES, f) for _ in range(400)]) for f in parts}
    missed = dict.fromkeys(parts, 0)
    for _ in range(8):
        y = draw()
        frames = [pd.DataFrame({"prompt_id": prompts, "category": labels, "limen_ratio": row}) for row in y]
        sides = {"model": [side(f"m{i}", frame) for i, frame in enumerate(frames)]}
        for factor, part in parts.items():
            (found,) = variance(part, sides)
            assert 0 <= found.low < found.value < found.high <= 1
            missed[factor] += not found.low <= expected[factor] <= found.high
    assert max(missed.values()) <= 2, missed


def test_models_are_compared_on_the_prompts_that_all_have() -> None:
    (part,) = claims.find("kappa.skeleton_r2").parts
    rng = np.random.default_rng(0)
    sizes, depths, noise = rng.normal(size=12), rng.normal(size=12), rng.normal(size=12)
    prompts = np.array([0.0, 1.0, 50.0])

    def sides(without: int | None) -> dict[str, list[Side]]:
        out = []
        for i in range(12):
            values = sizes[i] + noise[i] + prompts
            if i == without:
                values[2] = np.nan  # a hard prompt that one model has no number for
            frame = pd.DataFrame({"prompt_id": list("abc"), "category": "c", "kappa_phase": values})
            out.append(side(f"m{i}", frame, n_parameters=10.0 ** sizes[i], n_layers=depths[i]))
        return {"model": out}

    (whole,), (lacking,) = skeleton(part, sides(None)), skeleton(part, sides(4))
    assert whole.value > 0.2
    assert lacking.value == pytest.approx(whole.value)
