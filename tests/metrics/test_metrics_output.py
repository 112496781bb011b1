"""Read-outs of logits: against loops, in float32, in pieces, and with bad rows."""

import math

import numpy as np
import pytest
import slow
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics import _output, compute, lens_output, output_metrics, paired_arms, paired_output


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
    assert _output._best(x, _output._group_tops(x)).tolist() == where.tolist()


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


#: Sizes of arms that take every road: nothing written, the series, expm1, exp, float64.
SIZES = (0.0, 1e-5, 1e-3, 0.1, 0.3, 1.0, 4.0, 40.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 3, 191, 193, 769, 5000])
def test_arms_together_equal_arms_alone(vocab, dtype, monkeypatch):
    g = torch.Generator().manual_seed(vocab)
    clean = (torch.randn(7, vocab, generator=g) * 3).to(dtype)
    arms = [(clean.float() + size * torch.randn(7, vocab, generator=g)).to(dtype) for size in SIZES]
    arms[3][2, 0] = float("nan")
    monkeypatch.setattr(_output, "CHUNK_BYTES", 3 * vocab * 8)
    together = paired_arms(clean, arms)
    backwards = paired_arms(clean, torch.stack(arms[::-1]))
    for k, arm in enumerate(arms):
        alone = paired_output(clean[None], arm[None])
        for key, grid in together.items():
            assert grid[k].tobytes() == alone[key][0].tobytes() == backwards[key][-1 - k].tobytes()
    assert (together["kl_clean_pert"][0] == 0).all()
    assert (together["flip"][0] == 0).all()
    assert np.isnan(together["kl_clean_pert"]).sum() == 1
    assert (np.isnan(together["flip"]) == np.isnan(together["kl_clean_pert"])).all()
    for k, t in ((4, 1), (7, 6)):
        found = together["flip"][k, t]
        assert found == float(clean[t].double().numpy().argmax() != arms[k][t].double().numpy().argmax())


@pytest.mark.parametrize("shift", [0.0, 8.0, -700.0])
@pytest.mark.parametrize("sharp", [1.0, 8.0])
def test_float32_keeps_its_digits_at_every_size(shift, sharp):
    """From 1e-10 to 10 nats, flat and sharp rows, and whatever is added to all logits of an arm."""
    g = torch.Generator().manual_seed(3)
    clean = torch.randn(4, 20000, generator=g) * sharp
    sizes = (1e-4, 1e-3, 5e-3, 2e-2, 0.1, 0.3, 1.0, 3.0, 5.0)
    arms = [clean + size * torch.randn(4, 20000, generator=g) + shift for size in sizes]
    found = paired_arms(clean, arms)["kl_clean_pert"]
    for k, arm in enumerate(arms):
        for t in range(4):
            c, a = (torch.log_softmax(x[t].double(), -1).numpy().astype(np.longdouble) for x in (clean, arm))
            expected = float((np.exp(c) * (c - a)).sum())
            assert found[k, t] == pytest.approx(expected, rel=1e-4, abs=2e-15)


def test_arms_of_no_positions_and_no_arms():
    clean = torch.randn(3, 900, generator=torch.Generator().manual_seed(8))
    assert paired_arms(clean, [])["kl_clean_pert"].shape == (0, 3)
    assert paired_arms(clean[:0], [clean[:0]] * 2)["flip"].shape == (2, 0)


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
        (lambda: paired_arms(x[0], [x[0], x[0, :1]]), "same shape"),
        (lambda: paired_arms(x[0], [x[0], x[0].double()]), "one dtype"),
    ):
        with pytest.raises(MetricError, match=text):
            call()
