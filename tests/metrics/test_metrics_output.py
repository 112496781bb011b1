"""Read-outs of logits: against loops, in float32, in pieces, and with bad rows."""

import math

import numpy as np
import pytest
import slow
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics import _output, compute, lens_output, output_metrics, paired_output


@pytest.mark.parametrize("vocab", [2, 5, 191, 767, 768, 769, 1000, 1919, 3000])
def test_top_two(vocab):
    g = torch.Generator().manual_seed(vocab)
    x = torch.randn(40, vocab, generator=g)
    x[3] = x[3].round()
    x[5, -1] = 50.0
    x[6, 0] = 50.0
    x[7, -1] = x[7, -2] = 50.0
    first, second, where = _output._top_two(x)
    expected = x.sort(-1, descending=True).values
    torch.testing.assert_close(first, expected[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(second, expected[:, 1], rtol=0, atol=0)
    assert where.tolist() == [int(np.argmax(row)) for row in x.numpy()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_against_loops(dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 7, 900, generator=g) * 4).to(dtype)
    targets = torch.randint(0, 900, (2, 7), generator=g)
    targets[1, 3] = -1
    out = output_metrics(x, targets)
    rel = 1e-12 if dtype == torch.float64 else 2e-6
    for b in range(2):
        for t in range(7):
            row = x[b, t].double().numpy()
            assert out["entropy"][b, t] == pytest.approx(slow.entropy(row), rel=rel)
            assert out["margin"][b, t] == pytest.approx(slow.margin(row), rel=rel * 10, abs=rel)
            if (b, t) == (1, 3):
                assert math.isnan(out["nll"][b, t])
            else:
                assert out["nll"][b, t] == pytest.approx(slow.nll(row, int(targets[b, t])), rel=rel)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_against_loops(size, dtype):
    """Small divergences keep their digits in float32: no difference of log-normalisers."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(1, 6, 5000, generator=g) * 3).to(dtype)
    y = (x + size * torch.randn(1, 6, 5000, generator=g).to(dtype)).to(dtype)
    out = paired_output(x, y)
    for t in range(6):
        a, b = x[0, t].double().numpy(), y[0, t].double().numpy()
        assert out["kl_clean_pert"][0, t] == pytest.approx(slow.kl(a, b), rel=1e-8 if dtype == torch.float64 else 1e-3)
        assert out["flip"][0, t] == float(np.argmax(a) != np.argmax(b))


def test_kl_of_nearly_disjoint():
    x = torch.full((1, 1, 900), -100.0)
    y = x.clone()
    x[..., 3], y[..., 5] = 100.0, 100.0
    out = paired_output(x, y)
    assert out["kl_clean_pert"][0, 0] == pytest.approx(200.0, rel=1e-6)
    assert out["flip"][0, 0] == 1.0


def test_bad_rows_are_nan():
    x = torch.zeros(1, 4, 800)
    x[0, 0, 3] = float("nan")
    x[0, 1, 3] = float("inf")
    x[0, 2, 3] = -float("inf")
    out = output_metrics(x, torch.zeros(1, 4, dtype=torch.long))
    both = paired_output(torch.zeros(1, 4, 800), x)
    for grid in (*out.values(), *both.values()):
        assert np.isnan(grid[0]).tolist() == [True, True, True, False]
    r = compute("output.entropy/1", x[0])
    assert (r.reason, r.coverage) == ("coverage", 0.25)
    half = compute("output.entropy/1", x[0], mask=[True, False, False, True])
    assert float(half) == pytest.approx(math.log(800))


def test_equal_logits_give_exact_zero():
    x = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(4))
    out = paired_output(x, x.clone())
    assert (out["kl_clean_pert"] == 0).all()
    assert (out["flip"] == 0).all()


def test_pieces_and_layout_do_not_matter(monkeypatch):
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 3, 4, 1000, generator=g)
    targets = torch.randint(0, 1000, (3, 4), generator=g)
    whole = {**output_metrics(x, targets), **paired_output(x, y)}
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    monkeypatch.setattr(_output, "CHUNK_BYTES", 5 * 1000 * 4)
    pieces = {**output_metrics(turned, targets), **paired_output(turned, y)}
    for key, grid in whole.items():
        np.testing.assert_allclose(pieces[key], grid, rtol=1e-6)


def test_lens():
    g = torch.Generator().manual_seed(6)
    model, lens = torch.randn(2, 1, 3, 50, generator=g)
    out = lens_output(lens, model)
    assert out["lens_kl"][0, 1] == pytest.approx(
        slow.kl(model[0, 1].double().numpy(), lens[0, 1].double().numpy()), rel=1e-5
    )
    assert out["lens_entropy"][0, 2] == pytest.approx(slow.entropy(lens[0, 2].double().numpy()), rel=1e-6)


def test_refusals():
    x = torch.zeros(1, 2, 5)
    for call, text in (
        (lambda: output_metrics(x[0]), "logits"),
        (lambda: output_metrics(x, torch.zeros(2, 2)), "targets"),
        (lambda: output_metrics(x, torch.full((1, 2), 5)), "vocabulary"),
        (lambda: paired_output(x, x[:, :1]), "one shape"),
    ):
        with pytest.raises(MetricError, match=text):
            call()
