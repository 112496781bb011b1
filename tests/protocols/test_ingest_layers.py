"""States of layers that others saved: the numbers of a run of the same model, whoever stored them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.runs import read_trajectory
from dynprobe.runs._trajectory_layers import Reading, read_depths

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
#: What needs the model's head or its calibration.
READOUT = {"nll", "ppl", "nll_prompt", "entropy", "margin", "readiness", "repetition"}


@pytest.fixture(scope="module")
def asked():
    """A small random Llama, token ids, and the states before its final norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    tape = dp.capture(model, ids)
    states = [tape.states[d] for d in tape.depths]
    assert torch.equal(torch.stack(states[:-1]), torch.stack(hidden[:-1]))
    assert not torch.allclose(states[-1], hidden[-1])  # the trap: the last of hidden_states is normalised
    return model, ids, states, hidden


@pytest.fixture(scope="module")
def run(asked, tmp_path_factory):
    model, ids, _, _ = asked
    return dp.run(model, ids.tolist(), max_new_tokens=0, out=tmp_path_factory.mktemp("model"))


def agree(run, found, least=20, depths=None):
    """Every metric of the run of the model, in every table, is that of the import."""
    compared = 0
    for name in ("samples", "tokens", "depths", "profiles"):
        a, b = run.table(name), found.table(name)
        if "sample_id" in a:
            order = [k for k in ("sample_id", "track", "depth", "pos") if k in a]
            a = a.assign(sample_id=a["sample_id"].astype(str)).sort_values(order, ignore_index=True)
            b = b.assign(sample_id=b["sample_id"].astype(str)).sort_values(order, ignore_index=True)
        if depths is not None and "depth" in a:
            a = a[a["depth"].isin(depths)].reset_index(drop=True)
        assert len(a) == len(b), name
        for column in a.columns.intersection(b.columns):
            if a[column].dtype.kind == "f" and column not in READOUT:
                np.testing.assert_allclose(a[column], b[column], rtol=2e-5, atol=1e-6, err_msg=f"{name}.{column}")
                compared += 1
            elif column in ("layer", "iteration", "component", "stage", "track", "pos", "token_id", "target_id"):
                assert a[column].astype(str).tolist() == b[column].astype(str).tolist(), (name, column)
    assert compared >= least
    facts = run.columns().merge(found.columns(), on=["table", "column"])
    facts = facts[facts["id_x"] != ""]
    assert (facts["id_x"] == facts["id_y"]).all()


def test_a_cache_of_hooks_gives_the_numbers_of_the_model(asked, run, tmp_path):
    _, ids, states, _ = asked
    cache = {f"blocks.{i}.hook_resid_pre": s for i, s in enumerate(states[:-1])}
    cache |= {f"blocks.{i}.hook_resid_post": s for i, s in enumerate(states[1:])}
    cache["blocks.0.attn.hook_pattern"] = torch.zeros(2, 2, 9, 9)
    names = [str(p) for p in run.prompts["prompt_id"]]
    found = dp.ingest(cache, token_ids=ids, ids=names, out=tmp_path, name="mine")
    agree(run, found)
    assert found.manifest.config["mode"] == "layers"
    assert "converge_rho" not in found.samples
    assert json.loads(found.samples["reasons"].iloc[0])["nll"] == "no-readout"
    compared = dp.compare([run, found], metric=["kappa_phase"])
    assert np.allclose(compared.pairs["difference"], 0, atol=1e-6)
    save_file({**{k: v.contiguous().clone() for k, v in cache.items()}, "token_ids": ids}, tmp_path / "c.safetensors")
    saved = dp.ingest(tmp_path / "c.safetensors", out=tmp_path / "s")
    assert saved.samples["kappa_phase"].tolist() == found.samples["kappa_phase"].tolist()


def test_the_real_transformer_lens(asked, tmp_path):
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed (pip install 'dynprobe[peers]')")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model, ids, states, _ = asked
    folder = dp.load("tiny-llama").facts["folder"]  # any tokenizer will do: token ids are handed over
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    found = read_trajectory(cache, token_ids=ids)
    assert found.mode == "layers"
    assert found.iter.tolist() == list(range(6))
    assert torch.allclose(found.states[:, :, :, 0], torch.stack(states), atol=1e-5)
    mine = dp.ingest(cache, token_ids=ids, out=tmp_path)
    m = dp.metrics.measure(states, np.ones((2, 9), bool), metrics=dp.metrics.DEFAULT)
    kappa = [float(r["kappa_phase"]) for r in m.sample]
    assert mine.samples["kappa_phase"].to_numpy() == pytest.approx(kappa, rel=1e-4)


def test_hidden_states_of_transformers_lose_their_last(asked, run, tmp_path):
    _, ids, states, hidden = asked
    torch.save({"hidden_states": tuple(h.clone() for h in hidden), "input_ids": ids}, tmp_path / "h.pt")
    with pytest.raises(UsageError, match="--allow-bin"):
        read_trajectory(tmp_path / "h.pt")
    found = read_trajectory(tmp_path / "h.pt", Reading(allow_bin=True))
    assert found.iter.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found.states[:, :, :, 0], torch.stack(states[:-1]))
    assert any("final norm" in line for line in found.remarks)
    assert found.token_ids.tolist() == ids.tolist()
    torch.save(list(states), tmp_path / "pre.pt")
    whole = dp.ingest(tmp_path / "pre.pt", allow_bin=True, final_norm="none", out=tmp_path / "runs")
    assert whole.samples["kappa_phase"].tolist() == pytest.approx(run.samples["kappa_phase"].tolist(), rel=1e-5)
    cut = dp.ingest(tmp_path / "h.pt", allow_bin=True, out=tmp_path / "runs")
    assert cut.samples["kappa_phase"].tolist() != pytest.approx(run.samples["kappa_phase"].tolist(), rel=1e-3)
    assert cut.depths["depth"].max() == 4
    assert cut.manifest.id8 != whole.manifest.id8
    torch.save({"hidden_states": tuple(hidden), "code": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UsageError, match="more than tensors"):
        read_trajectory(tmp_path / "bomb.pt", Reading(allow_bin=True))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_numpy_stacks_need_names_for_their_axes(asked, run, tmp_path):
    _, _, states, _ = asked
    x = torch.stack(states).numpy()
    np.save(tmp_path / "x.npy", x.transpose(1, 2, 0, 3))
    with pytest.raises(UsageError, match=r"\[2, 9, 6, 16\].*--dims"):
        read_trajectory(tmp_path / "x.npy")
    found = dp.ingest(tmp_path / "x.npy", dims="batch,pos,layer,dim", final_norm="none", out=tmp_path / "runs")
    assert found.samples["kappa_phase"].tolist() == pytest.approx(run.samples["kappa_phase"].tolist(), rel=1e-5)
    for dims in ("batch,pos,dim,dim", "layer,pos,dim", "iter,batch,pos,dim"):
        with pytest.raises(UsageError, match="name every axis once"):
            read_trajectory(tmp_path / "x.npy", Reading(tuple(dims.split(","))))
    np.savez(tmp_path / "x.npz", states=x)
    named = read_trajectory(tmp_path / "x.npz", Reading(("layer", "batch", "pos", "dim"), final_norm="none"))
    assert np.array_equal(named.states[:, :, :, 0].numpy(), x)
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"pickled objects"):
        read_trajectory(tmp_path / "o.npy")


def test_a_folder_of_speculators(asked, run, tmp_path):
    _, ids, states, _ = asked
    folder = tmp_path / "hidden_states"
    folder.mkdir()
    lengths = (9, 6)
    for i, n in enumerate(lengths):
        one = torch.stack([s[i, :n] for s in states], dim=1).contiguous()  # [seq, layers, dim]
        save_file({"hidden_states": one, "token_ids": ids[i, :n].contiguous()}, folder / f"hs_{i * 9}.safetensors")
    with pytest.raises(UsageError, match=r"does not say which.*--depths"):
        read_trajectory(folder)
    found = read_trajectory(folder, Reading(depths=tuple(range(6))))
    assert found.ids == ("hs_0", "hs_9")
    assert found.valid.sum(1).tolist() == list(lengths)
    mine = dp.ingest(folder, depths="0:6", out=tmp_path / "runs")
    assert mine.samples["kappa_phase"].iloc[0] == pytest.approx(run.samples["kappa_phase"].iloc[0], rel=1e-5)
    assert mine.depths.groupby("sample_id", observed=True).size().tolist() == [54, 36]
    assert mine.prompts["token_ids"].iloc[1].tolist() == ids[1, :6].tolist()
    one = read_trajectory(folder / "hs_0.safetensors", Reading(depths=(0, 1, 2, 3, 4, 5)))
    assert torch.equal(one.states[:, 0, :, 0], torch.stack(states)[:, 0])
    save_file({"hidden_states": torch.zeros(3, 2, 4), "token_ids": torch.zeros(5)}, tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match="5 token ids and 3 positions"):
        read_trajectory(tmp_path / "bad.safetensors", Reading(depths=(1, 2)))


def sae_dataset(folder, hooks, ids):
    """What SAELens's CacheActivationsRunner leaves: Array2D columns and token ids, as Arrow streams."""
    datasets = pytest.importorskip("datasets")
    _, pos, dim = next(iter(hooks.values())).shape
    features = datasets.Features(
        {
            **{name: datasets.Array2D(shape=(pos, dim), dtype="float32") for name in hooks},
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=pos),
        }
    )
    columns = {name: x.numpy() for name, x in hooks.items()} | {"token_ids": ids.to(torch.int32).numpy()}
    made = datasets.Dataset.from_dict(columns, features=features)
    datasets.disable_progress_bars()
    made.save_to_disk(str(folder), num_shards=2)
    return made


def test_activations_of_saelens(asked, run, tmp_path):
    _, ids, states, _ = asked
    hooks = {f"blocks.{i}.hook_resid_post": s for i, s in enumerate(states[1:])}
    made = sae_dataset(tmp_path / "acts", hooks, ids)
    found = dp.ingest(tmp_path / "acts", out=tmp_path / "runs")
    assert found.depths["depth"].unique().tolist() == [1, 2, 3, 4, 5]
    assert found.samples["kappa_phase"].tolist() == pytest.approx(run.samples["kappa_phase"].tolist(), rel=1e-5)
    assert found.tokens["token_id"].tolist() == ids.flatten().tolist()
    made.to_parquet(str(tmp_path / "acts.parquet"))
    again = read_trajectory(tmp_path / "acts.parquet")
    assert torch.equal(again.states[:, :, :, 0], torch.stack(states[1:]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="folder without states"):
        read_trajectory(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="is a run already; type: dynprobe show"):
        read_trajectory(tmp_path / "empty")


def test_one_layer_has_what_needs_no_step(asked, run, tmp_path):
    _, ids, states, _ = asked
    found = dp.ingest({"blocks.2.hook_resid_post": states[3]}, token_ids=ids, out=tmp_path)
    assert found.samples["kappa_phase"].isna().all()
    assert json.loads(found.samples["reasons"].iloc[0])["kappa_phase"]
    ours = run.depths[run.depths["depth"] == 3].sort_values(["sample_id", "pos"])["norm"].to_numpy()
    assert found.depths["norm"].to_numpy() == pytest.approx(ours, rel=1e-6)
    assert any("one depth (3)" in line for line in found.summary["remarks"])
    with pytest.raises(UsageError, match="embedding"):
        dp.ingest({"blocks.0.hook_resid_pre": states[0]}, out=tmp_path)


def test_missing_layers_are_not_compared_with_all(asked, run, tmp_path):
    _, ids, states, _ = asked
    names = [str(p) for p in run.prompts["prompt_id"]]
    some = {f"blocks.{d - 1}.hook_resid_post": states[d] for d in (1, 3, 5)}
    found = dp.ingest(some, token_ids=ids, ids=names, out=tmp_path)
    assert any("between stored depths" in line for line in found.summary["remarks"])
    facts = found.columns().query("table == 'samples' and column == 'kappa_phase'")["aggregation"].item()
    assert "[1, 3, 5]" in facts
    with pytest.raises(dp.DynprobeError):
        dp.compare([run, found], metric=["kappa_phase"])


def test_a_patched_cache_is_refused(asked):
    _, _, states, _ = asked
    cache = {"blocks.0.hook_resid_post": states[1], "blocks.1.hook_resid_pre": states[1] + 1}
    with pytest.raises(UsageError, match="both depth 1 and differ"):
        read_trajectory(cache)
    with pytest.raises(UsageError, match="shape changes"):
        read_trajectory({"blocks.0.hook_resid_post": states[1], "blocks.1.hook_resid_post": states[2][:, :4]})
    with pytest.raises(UsageError, match="no tensor is a state"):
        read_trajectory({"ln_final.hook_scale": states[0]})
    with pytest.raises(UsageError, match="dtype"):
        read_trajectory({"blocks.0.hook_resid_post": torch.zeros(1, 2, 3, dtype=torch.long)})


def test_centred_weights_are_remarked(asked):
    _, _, states, _ = asked
    cache = {f"blocks.{i}.hook_resid_post": s for i, s in enumerate(states[1:])}
    assert not any("centred" in line for line in read_trajectory(cache).remarks)
    centred = {name: s - s.mean(-1, keepdim=True) for name, s in cache.items()}
    assert any("centred" in line for line in read_trajectory(centred).remarks)


def test_a_cache_without_a_batch_and_with_padding(asked, tmp_path):
    _, ids, states, _ = asked
    alone = read_trajectory({f"blocks.{i}.hook_resid_post": s[0] for i, s in enumerate(states[1:])})
    assert list(alone.states.shape) == [5, 1, 9, 1, 16]
    cache = {f"blocks.{i}.hook_resid_post": s for i, s in enumerate(states[1:])}
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    found = dp.ingest(cache, token_ids=ids, valid=valid, out=tmp_path)
    assert found.samples["n_prompt"].tolist() == [9, 6]


def test_depths_in_words():
    assert read_depths("0:3,7") == (0, 1, 2, 7)
    for text in ("a", "", "3:2"):
        with pytest.raises(UsageError, match="--depths"):
            read_depths(text)
    with pytest.raises(UsageError, match="final_norm='maybe'"):
        Reading(final_norm="maybe")


def test_old_arrow_without_the_library(tmp_path):
    """The lists are read with or without the library that named their type."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    lists = pa.array(x.tolist(), pa.list_(pa.list_(pa.float32())))
    table = pa.table({"blocks.6.hook_resid_post": lists, "token_ids": pa.array([[1, 2, 3]] * 2, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read_trajectory(tmp_path / "a.parquet")
    assert found.iter.tolist() == [7]
    assert np.array_equal(found.states[0, :, :, 0].numpy(), x)
    uneven = pa.table(
        {"blocks.6.hook_resid_post": pa.array([[[1.0]], [[1.0], [2.0]]], pa.list_(pa.list_(pa.float32())))}
    )
    pq.write_table(uneven, tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="different lengths"):
        read_trajectory(tmp_path / "b.parquet")
    assert found.token_ids.tolist() == [[1, 2, 3]] * 2
