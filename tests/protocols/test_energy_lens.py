"""The energy lens where the answer is known: tied weights, CEM's own trace, and nothing to see."""

import math

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import DynprobeError, ModelError, UsageError
from dynprobe.metrics import compute
from dynprobe.models import CemConfig, CemDynamics, CemForCausalLM
from dynprobe.probes import discover
from dynprobe.probes._attention_descent import energy_probe
from dynprobe.protocols import energy_lens
from dynprobe.testing import tiny_causal_lm, tiny_gpt2, tiny_llama

ROWS = [[5, 6, 7, 8, 9], [9, 10, 11], [3, 27, 81, 44, 12, 13]]


def cem(**changes):
    torch.manual_seed(0)
    plain = {"preconditioner": "none", "diagonal": "none", "steps_attention": 1} | changes
    model = CemForCausalLM(CemConfig.preset("nano", initializer_range=0.2, **plain)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".diagonal", ".biases", ".V")):
                p.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def llama():
    subject = tiny_llama()
    return subject, energy_lens(subject, ROWS, n_boot=500)


def test_table_is_the_metrics_of_the_descents(llama):
    subject, result = llama
    lens = energy_probe(subject)
    tokens = result.tokens.set_index(["prompt", "layer", "iteration", "pos"]).sort_index()
    table = result.table.set_index("layer")
    per_prompt = np.zeros((3, len(ROWS), 3))
    for p, row in enumerate(ROWS):
        found = lens.descend(row)
        for d in found:
            aligned = compute("energy.align/1", d.force[1:], d.update[1:])
            energy = d.energy[:, 1:].sum(0)
            here = tokens.loc[p, d.layer, 0]
            assert list(here.index) == list(range(1, len(row)))
            np.testing.assert_allclose(here["cos"], aligned.per_unit, rtol=1e-9)
            np.testing.assert_allclose(here["energy"], energy)
            others = [compute("energy.align/1", d.force[1:], o.update[1:]).per_unit for o in found if o is not d]
            np.testing.assert_allclose(here["cos_other_layers"], np.mean(others, axis=0), rtol=1e-9)
            crossed = compute("energy.align/1", d.crossed[1:], d.update[1:]).per_unit
            np.testing.assert_allclose(here["cos_other_heads"], crossed, rtol=1e-9)
            per_prompt[d.layer, p] = float(aligned), aligned.extras["slope"], energy.mean()
    for i, name in enumerate(("cos", "slope", "energy")):
        np.testing.assert_allclose(table[name], per_prompt[:, :, i].mean(1), rtol=1e-9)
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    assert list(table["n_tokens"]) == [sum(len(r) - 1 for r in ROWS)] * 3
    assert table["reason"].isna().all()
    heads = result.heads.set_index(["layer", "head"])
    assert len(heads) == 12
    for layer, row in table.iterrows():
        for name in ("circuit", "tying_qo", "tying_kv", "subspace_qo", "subspace_kv", "energy"):
            over = heads.loc[layer][name].sum() if name == "energy" else heads.loc[layer][name].mean()
            assert over == pytest.approx(row[name], rel=1e-9)
    for name, metric in result.metric_ids.items():
        assert name in table
        assert dp.metrics.spec(metric).id in metric


def test_tying_is_that_of_the_weights(llama):
    subject, result = llama
    attention = subject.blocks[0].self_attn
    q = attention.q_proj.weight.detach().view(4, 8, 32)
    k, v = (m.weight.detach().view(2, 8, 32) for m in (attention.k_proj, attention.v_proj))
    o = attention.o_proj.weight.detach().T.reshape(4, 8, 32)
    row = result.table.iloc[0]
    assert row["tying_qo"] == pytest.approx(float(compute("energy.tying/1", q, o)))
    assert row["tying_kv"] == pytest.approx(float(compute("energy.tying/1", k, v)))
    assert row["subspace_kv"] == pytest.approx(float(compute("energy.tying/1{kind=subspace}", k, v)))
    other = compute("energy.tying/1{kind=subspace}", k, v).extras
    assert (row["subspace_kv_other_heads"], row["subspace_kv_chance"]) == (other["other_heads"], other["chance"])
    many = [m.repeat_interleave(2, 0) for m in (k, v)]
    assert row["circuit"] == pytest.approx(float(compute("energy.circuit/1", q, *many, o)))


def test_twin_gain_and_reproducibility(llama):
    subject, result = llama
    again = energy_lens(subject, ROWS, n_boot=500)
    assert again.table.equals(result.table)
    assert result.head["baseline"].endswith("(random)")
    table = result.table
    np.testing.assert_allclose(table["cos_gain"], table["cos"] - table["cos_random"], rtol=1e-9, atol=1e-12)
    other = energy_lens(subject, ROWS, n_boot=500, seed=5).table
    np.testing.assert_array_equal(other["cos"], table["cos"])
    assert (other["cos_random"] != table["cos_random"]).all()
    assert table["cos_random_sd"].isna().all()
    seeds = [energy_lens(subject, ROWS, n_boot=200, seed=s).table["cos_random"] for s in (0, 1)]
    both = energy_lens(subject, ROWS, n_boot=200, twins=2).table
    np.testing.assert_allclose(both["cos_random"], np.mean(seeds, axis=0))
    np.testing.assert_allclose(both["cos_random_sd"], np.std(seeds, axis=0, ddof=1))
    same = energy_lens(subject, ROWS, baseline=subject, n_boot=200).table
    assert (same["cos_gain"] == 0).all()
    alone = energy_lens(subject, ROWS, baseline=None, n_boot=200)
    assert alone.head["baseline"] is None
    assert not [c for c in alone.table if "random" in c or "gain" in c]


def tied_gpt2(sign=1.0):
    """A GPT-2 whose attention is one descent step: learned positions, so nothing has to be rotated back."""
    subject = tiny_gpt2()
    with torch.no_grad():
        for block in subject.blocks:
            q, k, _ = block.attn.c_attn.weight.chunk(3, 1)
            block.attn.c_attn.weight.copy_(torch.cat([q, k, k], 1))
            bias = torch.randn(q.shape[1])
            block.attn.c_attn.bias.copy_(torch.cat([torch.randn_like(bias), bias, bias]))
            block.attn.c_proj.weight.copy_(sign * q.T)
            block.attn.c_proj.bias.zero_()
    return subject


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_tied_transformer_descends(sign):
    table = energy_lens(tied_gpt2(sign), ROWS, n_boot=200).table
    np.testing.assert_allclose(table["cos"], sign, atol=1e-5)
    np.testing.assert_allclose(table["circuit"], sign, atol=1e-6)
    for name in ("tying_qo", "tying_kv", "subspace_qo", "subspace_kv"):
        np.testing.assert_allclose(table[name], 0, atol=1e-3)
        assert (table[f"{name}_random"] > 0.5).all()
    assert (table["cos_other_heads"].abs() < 0.9).all()
    assert (table["cos_random"].abs() < 0.9).all()


def test_a_tied_rotary_transformer_does_not_quite():
    """Rotary attention does not rotate its output back, so tied weights alone do not make it descend."""
    subject = discover(tiny_causal_lm("gpt_neox"), name="neox")
    with torch.no_grad():
        for block in subject.blocks:
            fused, heads = block.attention.query_key_value, 4
            weight = fused.weight.unflatten(0, (heads, 3, -1))
            weight[:, 2] = weight[:, 1]
            bias = fused.bias.unflatten(0, (heads, 3, -1))
            bias[:, 2] = bias[:, 1]
            block.attention.dense.weight.copy_(weight[:, 0].flatten(0, 1).T)
            block.attention.dense.bias.zero_()
    table = energy_lens(subject, ROWS, baseline=None, n_boot=200).table
    np.testing.assert_allclose(table["circuit"], 1, atol=1e-5)
    assert ((table["cos"] > 0.2) & (table["cos"] < 0.999)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"steps_attention": 2}, {"norm_gain": False}, {"diagonal": "per_head"}, {"diagonal": "shared"},
        {"position": "rope"}, {"position": "none", "self_bias": False}, {"tau": "head", "step_size_attention": 0.3},
        {"norm_in_recursion": False},
    ],
)  # fmt: skip
def test_cem_without_preconditioner_descends(changes):
    """update="gradient", P = I, the diagonal in the update: every step of the recursion is along −∂ε/∂u."""
    model = cem(**changes)
    table = energy_lens(model, ROWS, n_boot=200).table
    steps = model.config.steps_attention
    assert list(table["iteration"]) == list(range(steps + 1)) * 2
    moved = table[table["iteration"] < steps]
    np.testing.assert_allclose(moved["cos"], 1, atol=1e-5)
    np.testing.assert_allclose(moved["cos_random"], 1, atol=1e-5)  # by construction, not by training
    last = table[table["iteration"] == steps]
    assert last["cos"].isna().all()
    assert set(last["reason"]) == {"last"}
    for name in ("tying_qo", "tying_kv"):
        np.testing.assert_allclose(table[name], 0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"preconditioner": "diag_low_rank"}, {"diagonal": "shared", "diag_in_update": False}, {"update": "chain"},
        {"update": "cccp"},
    ],
)  # fmt: skip
def test_cem_with_another_step_does_not(changes):
    cos = energy_lens(cem(**changes), ROWS, baseline=None, n_boot=200).table.query("iteration == 0")["cos"]
    assert (cos < 0.9999).all()
    assert cos.notna().all()


def test_cem_energies_are_its_own():
    model = cem(steps_attention=2, diagonal="per_head", preconditioner="diag_low_rank")
    result = energy_lens(model, ROWS, first=0, baseline=None, n_boot=200)
    tokens = result.tokens.set_index(["prompt", "layer", "iteration"])
    for p, row in enumerate(ROWS):
        with torch.no_grad():
            out = model(
                torch.tensor([row]), output_energies=True,
                dynamics=CemDynamics(keep="cpu", what=("slope", "energy_head")),
            )  # fmt: skip
        for layer in range(2):
            for t in range(3):
                own = out.energies["attention"][layer][t, 0].numpy()
                np.testing.assert_allclose(tokens.loc[p, layer, t]["energy"], own, rtol=1e-5)
            for t in range(2):
                slope = out.dynamics.attn[layer].slope[t, 0].numpy()
                np.testing.assert_allclose(tokens.loc[p, layer, t]["slope"], slope, rtol=1e-4, atol=1e-5)
    assert (result.table["tying_qo"] > 0).all()  # the preconditioner is folded into W_O
    np.testing.assert_allclose(result.table["tying_kv"], 0, atol=1e-9)


def test_same_columns_for_both():
    ours = energy_lens(tiny_llama(), ROWS, n_boot=200).table
    theirs = energy_lens(cem(), ROWS, n_boot=200).table
    assert set(ours.columns) == set(theirs.columns)
    assert ours["energy"].notna().all()
    assert theirs["energy"].notna().all()


def test_a_layer_that_cannot_be_read_has_a_reason():
    table = energy_lens(cem(attention=["cem", "llama"]), ROWS, n_boot=200).table
    assert math.isnan(table.query("layer == 1")["energy"].item())
    assert "untied" in table.query("layer == 1")["reason"].item()
    assert table.query("layer == 0")["energy"].notna().all()


def test_few_tokens_and_few_prompts():
    subject = tiny_llama()
    one = energy_lens(subject, ROWS[:1], n_boot=200).table
    assert one["cos"].notna().all()
    assert one["cos_low"].isna().all()
    assert set(one["reason"]) == {"prompts<3: no interval"}
    short = energy_lens(subject, [[5], [6]], n_boot=200).table
    assert short["energy"].isna().all()
    assert short["reason"].str.startswith("empty").all()
    assert energy_lens(subject, [[5], [6]], first=0, n_boot=200).table["energy"].notna().all()
    mixed = energy_lens(subject, [*ROWS, [5]], n_boot=200).table
    assert set(mixed["n_prompts"]) == {3}
    np.testing.assert_allclose(mixed["cos"], energy_lens(subject, ROWS, n_boot=200).table["cos"])


def test_refusals():
    with pytest.raises(ModelError, match="soft-capped"):
        energy_lens(discover(tiny_causal_lm("gemma2"), name="gemma2"), ROWS)
    subject = tiny_llama()
    for wrong in (
        {"baseline": "trained"},
        {"twins": 0},
        {"twins": 2, "baseline": None},
        {"first": -1},
        {"n_boot": -1},
        {"confidence": 95},
    ):
        with pytest.raises(UsageError):
            energy_lens(subject, ROWS, **wrong)
    with pytest.raises(UsageError, match="one shape"):
        energy_lens(subject, ROWS, baseline=tiny_llama(layers=4))
    with pytest.raises(DynprobeError):
        energy_lens(subject, [])
