"""Set metrics in the batched road: rows equal the exact call, on any padding; and what a run may ask for."""

import numpy as np
import pytest
import torch
from test_metrics_measure import batch, one_row, same

from dynprobe.errors import MetricError
from dynprobe.metrics import CORE, DEFAULT, compute, ids, measure, parse_id, requested
from dynprobe.metrics._registry import measurable

ON_SPAN = [
    "erank.rv/1", "erank.rv/1{centre=mean}", "erank.participation/1", "erank.stable/1", "entropy.matrix/1",
    "entropy.matrix/1{norm=logn}", "id.twonn/1", "id.twonn/1{est=base}", "cka.linear/1", "cka.linear/1{est=biased}",
    "rsa.dist/1", "rsa.dist/1{corr=spearman,rows=cosine}", "order.vector/1", "order.pairwise/1",
]  # fmt: skip
RQA = ["rqa.rr/1", "rqa.det/1{lmin=2}", "rqa.lam/1{vmin=2}", "rqa.entr/1{lmin=2}"]
PER_UNIT = ["influence.block/1", "influence.angular/1", "influence.angular/1{n=2,tokens=all}", "line.shape/1"]
ALL = [*ON_SPAN, *RQA, *PER_UNIT]


@pytest.mark.parametrize("dirt", [False, True])
@pytest.mark.parametrize(("embed", "sink"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("with_span", [False, True])
def test_rows_equal_compute(dirt, embed, sink, with_span):
    x, mask = batch(dirt=dirt, T=18)
    span = None
    if with_span:
        span = np.zeros_like(mask)
        span[:, 3:17] = True
    m = measure(
        [torch.from_numpy(s) for s in x], torch.from_numpy(mask), metrics=ALL, embed=embed, sink=sink,
        span=None if span is None else torch.from_numpy(span),
    )  # fmt: skip
    columns = {i: c for c, i in m.ids.items()}
    assert set(columns) == set(ALL)
    for row, got in enumerate(m.sample):
        full, part = one_row(x, mask, row, embed, sink, span)
        for metric in ALL:
            states = full if metric in PER_UNIT else part[-1] if metric in RQA else part
            expected = compute(metric, states)
            same(got[columns[metric]], expected, 1e-9)
            assert got[columns[metric]].metric_id == metric
            if expected.profile is not None and len(expected.profile):
                column = columns[metric]
                offset = len(x) - len(expected.profile)
                np.testing.assert_allclose(
                    m.profile[column][offset:, row], expected.profile, rtol=1e-8, atol=1e-10, err_msg=metric
                )
                assert (m.profile_reason[column][:offset, row] == "first").all()


def test_neighbours_and_precision():
    """A row alone gives the same value; float32 states differ by their rounding only."""
    x, mask = batch(dirt=False)
    x[:, ~mask] = 0
    states = [torch.from_numpy(s) for s in x]
    whole = measure(states, torch.from_numpy(mask), metrics=ALL)
    half = measure([s.float() for s in states], torch.from_numpy(mask), metrics=ALL)
    for row in range(len(mask)):
        alone = measure([s[row : row + 1] for s in states], torch.from_numpy(mask[row : row + 1]), metrics=ALL)
        for column, result in whole.sample[row].items():
            assert float(alone.sample[0][column]) == pytest.approx(float(result), rel=1e-9, abs=1e-12, nan_ok=True)
            assert float(half.sample[row][column]) == pytest.approx(float(result), rel=2e-4, abs=1e-4, nan_ok=True), (
                column
            )


def test_not_in_the_default_lists():
    for metric in ALL:
        assert parse_id(metric).id not in {parse_id(m).id for m in (*CORE, *DEFAULT)}
        assert parse_id(metric).id in measurable()
        assert parse_id(metric).id in ids(group="optional")


def test_requested():
    assert requested([]) == ()
    assert requested(["kappa.phase/1", "output.nll/1", "kappa.geom/1{W=64}"]) == ()
    asked = requested(["id.twonn/1", "kappa.geom/1{W=16}", "erank.rv/1{centre=none}", "erank.rv/1"])
    assert asked == ("kappa.geom/1{W=16}", "erank.rv/1", "id.twonn/1")
    assert requested(reversed(asked)) == asked
    assert len(requested(ALL)) == len(ALL)
    for bad, text in (
        ("erank.rv/2", "erank.rv/1"), ("erank", "erank.rv/1"), ("erank.rw/1", "erank.rv/1"), ("lens.kl/1", "--lens"),
        ("diverge.angle/1", "compares two runs"), ("norm.raw/1", "its input is"), ("erank.rv/1{sink=drop0}", "sink"),
        ("erank.rv/1{centre=median}", "centre"), ("kappa.phase/1{centre=calib}", "inverts"),
        ("rqa.det/1{theiler=0}", "theiler"), ("limen.ratio/1{norm=winsor_mad,ref=calib}", "reference"),
    ):  # fmt: skip
        with pytest.raises(MetricError, match=text):
            requested([bad])
