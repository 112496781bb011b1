"""A weight changed in one place of an iterated model is found at the depth and slot where it first acts."""

from __future__ import annotations

import pytest
import torch

import dynprobe as dp
from dynprobe.runs import diff


@pytest.mark.parametrize(
    ("name", "weight", "index", "depth", "place"),
    [
        ("tiny-cem", "model.layers.1.mlp.step.preconditioner.p", ..., 7, {"layer": 1, "iteration": 1, "stage": "mlp"}),
        ("tiny-csm", "model.refine.memory", 5, 1, {"iteration": 1, "slot": 5}),
    ],
)
def test_the_first_depth_is_where_the_weight_acts(tmp_path, name, weight, index, depth, place):
    runs = []
    for word, factor in (("a", 1.0), ("b", 1.5)):
        subject = dp.load(name)
        with torch.no_grad():
            dict(subject.model.named_parameters())[weight][index] *= factor
        runs.append(dp.run(subject, ["The sky"], out=tmp_path / word, states=True, max_new_tokens=1))
    found = diff(*runs, condition="clean")
    row = found.samples.iloc[0]
    assert row["depth_depth"] == depth
    assert {key: row[f"depth_{key}"] for key in place} == place
    below = found.cells[found.cells["depth"] < depth]
    assert len(below)
    assert (below["rel"] == 0).all()
