"""States heard from a loop are what a file of them would be, and mistakes are refused where they are made."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.runs import read_trajectory, trace_callback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def states(*shape: int, n: int = 6, seed: int = 0) -> list[torch.Tensor]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return [start * 0.5**k for k in range(n)]


@pytest.mark.parametrize(
    ("shape", "more", "dims"),
    [
        ((16, 8), {}, ("iter", "state", "dim")),
        ((2, 16, 8), {"dims": "batch,state,dim"}, ("iter", "batch", "state", "dim")),
        ((2, 3, 8), {"dims": ["batch", "pos", "dim"]}, ("iter", "batch", "pos", "dim")),
        ((2, 3, 8), {"token_ids": [[1, 2, 3], [4, 5, 6]]}, ("iter", "batch", "pos", "dim")),
        ((2, 3, 16, 8), {}, ("iter", "batch", "pos", "state", "dim")),
        ((8, 3), {"dims": "dim,pos"}, ("iter", "dim", "pos")),
    ],
)
def test_what_is_heard_is_what_a_file_of_it_says(shape, more, dims, tmp_path):
    heard = states(*shape)
    with trace_callback(meta={"model": "m"}, **more) as cb:
        for k, state in enumerate(heard):
            cb(k, state)
    found = cb.trajectory
    assert set(found.dims) == set(dims)
    named = [d for d in dims if d != "iter"]
    given = more.get("dims", named)
    given = given.split(",") if isinstance(given, str) else list(given)
    np.savez(
        tmp_path / "states.npz", states=torch.stack(heard).numpy(), dims=["iter", *given], meta='{"model": "m"}',
        **({"token_ids": np.array(more["token_ids"])} if "token_ids" in more else {}),
    )  # fmt: skip
    file = read_trajectory(tmp_path / "states.npz")
    assert torch.equal(found.states, file.states)
    for name in ("iter", "valid", "positions"):
        assert np.array_equal(getattr(found, name), getattr(file, name)), name
    assert (found.stage, found.ids, found.meta, found.mode) == (file.stage, file.ids, file.meta, file.mode)
    assert (found.has_slots, found.remarks) == (file.has_slots, file.remarks)


def test_a_loop_that_works_in_place_loses_nothing():
    x = torch.ones(4, 2)
    with trace_callback() as cb:
        for k in range(5):
            cb(k, x)
            x *= 2
    assert cb.trajectory.states.flatten(1)[:, 0].tolist() == [1, 2, 4, 8, 16]


def test_a_generator_is_followed():
    def refine(x):
        yield x
        for _ in range(4):
            x = x / 2
            yield x

    with trace_callback(meta={"seed": 0}) as cb:
        cb.follow(refine(np.ones((4, 2))))
    assert cb.trajectory.iter.tolist() == [0, 1, 2, 3, 4]
    assert cb.trajectory.dtype == "float64"


def test_stages_energies_and_iterations_are_kept():
    with trace_callback("batch,pos,dim", ids=["a", "b"]) as cb:
        for k in range(4):
            for stage, seed in (("L", 1), ("H", 2)):
                energy = torch.full((2, 3), -float(k)) if stage == "H" else None
                cb(k, states(2, 3, 4, seed=seed)[k], stage, energy)
    found = cb.trajectory
    assert [(name, found.iter[at].tolist()) for name, at in found.stages.items()] == [(s, [0, 1, 2, 3]) for s in "LH"]
    assert found.energy is not None
    assert np.isnan(found.energy[0::2]).all()
    assert found.energy[1::2, 0, 0].tolist() == [0, -1, -2, -3]
    assert found.ids == ("a", "b")


def test_batches_of_other_lengths_become_one_trajectory():
    first, second = states(2, 4, 8), states(1, 2, 8, seed=1)
    with trace_callback("batch,pos,dim", ids=["a", "b"], token_ids=[[1, 2, 3, 4], [5, 6, 7, 0]],
                        valid=[[1, 1, 1, 1], [1, 1, 1, 0]]) as cb:  # fmt: skip
        cb.follow(first)
        cb.batch(ids=["c"], token_ids=[[8, 9]])
        cb.follow(second)
    found = cb.trajectory
    assert found.ids == ("a", "b", "c")
    assert found.valid.tolist() == [[True] * 4, [True] * 3 + [False], [True, True, False, False]]
    assert torch.equal(found.states[:, :2, :, 0], torch.stack(first))
    assert torch.equal(found.states[:, 2:, :2, 0], torch.stack(second))
    assert found.token_ids is not None
    assert found.token_ids[2].tolist() == [8, 9, -1, -1]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_was_heard_can_be_given_to_others(suffix, tmp_path):
    with trace_callback("batch,pos,dim", ids=["a", "b"], token_ids=[[1, 2], [3, 4]], meta={"model": "m"}) as cb:
        for k, state in enumerate(states(2, 2, 8)):
            cb(k, state, "core", torch.zeros(2, 2) - k)
    file = read_trajectory(cb.save(tmp_path / f"states.{suffix}"))
    found = cb.trajectory
    assert torch.equal(found.states, file.states)
    for name in ("iter", "valid", "energy", "token_ids"):
        assert np.array_equal(getattr(found, name), getattr(file, name)), name
    assert (found.stage, found.ids, found.meta) == (file.stage, file.ids, file.meta)


def test_bfloat16_is_kept_and_said(tmp_path):
    with trace_callback() as cb:
        cb.follow([s.bfloat16() for s in states(4, 8)])
    assert cb.trajectory.dtype == "bfloat16"
    assert any("bfloat16" in line for line in cb.trajectory.remarks)
    assert read_trajectory(cb.save(tmp_path / "s.safetensors")).dtype == "bfloat16"
    with pytest.raises(UsageError, match=r"to \.npz where it is not bfloat16"):
        cb.save(tmp_path / "s.npz")


def test_a_run_of_a_trace_is_the_run_of_its_file(tmp_path: Path):
    with dp.trace_callback("batch,pos,dim", ids=["a", "b"], meta={"model": "halving"}) as cb:
        cb.follow(states(2, 5, 8))
    heard, again = dp.ingest(cb, out=tmp_path / "one"), dp.ingest(cb.trajectory, out=tmp_path / "one")
    read = dp.ingest(cb.save(tmp_path / "states.npz"), out=tmp_path / "two")
    assert heard.path == again.path
    assert heard.manifest.model_name == "halving"
    assert heard.manifest.model["source"] == "callback"
    assert read.manifest.model["source"] == "trajectory file"
    for table in ("samples", "depths", "profiles"):
        one, two = getattr(heard, table), getattr(read, table)
        assert list(one.columns) == list(two.columns)
        for name in one.columns:
            assert (
                one[name].astype(object).where(one[name].notna(), None).tolist()
                == two[name].astype(object).where(two[name].notna(), None).tolist()
            ), (table, name)
    assert heard.samples["converge_rho"].to_numpy() == pytest.approx([0.5, 0.5], rel=1e-4)


def test_other_states_are_another_run(tmp_path: Path):
    found = []
    for seed in (0, 1):
        with dp.trace_callback("batch,pos,dim") as cb:
            cb.follow(states(1, 3, 4, seed=seed))
        found.append(dp.ingest(cb, out=tmp_path).path)
    assert found[0] != found[1]


def test_latents_of_a_perceiver_and_both_states_of_an_hrm_can_be_heard():
    """What has no place on a track of tokens is measured from the user's own forward."""
    from transformers import HrmTextConfig, HrmTextForCausalLM, PerceiverConfig, PerceiverForMaskedLM

    config = PerceiverConfig(
        num_latents=4, d_latents=32, d_model=32, num_blocks=5, num_self_attends_per_block=1,
        num_self_attention_heads=4, num_cross_attention_heads=4, vocab_size=60, max_position_embeddings=16,
    )  # fmt: skip
    model = PerceiverForMaskedLM(config).eval()
    with trace_callback("batch,state,dim") as cb, torch.no_grad():
        k = 0

        def note(_module, args, output):
            nonlocal k
            if k == 0:
                cb(0, args[0])
            k += 1
            cb(k, output[0])

        handle = model.perceiver.encoder.self_attends[-1].register_forward_hook(note)
        out = model(inputs=torch.tensor([[5, 6, 7]]), output_hidden_states=True)
        handle.remove()
    found = cb.trajectory
    assert list(found.states.shape) == [6, 1, 1, 4, 32]
    assert torch.equal(found.states[-1, 0], out.hidden_states[-1])

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    hrm = HrmTextForCausalLM(HrmTextConfig(vocab_size=60, intermediate_size=48, H_cycles=2, L_cycles=3, **sizes)).eval()
    with trace_callback("batch,pos,dim") as cb, torch.no_grad():
        heard = {"L": 0, "H": 0}
        handles = []
        for stage in heard:

            def hear(_module, _args, output, stage=stage):
                heard[stage] += 1
                cb(heard[stage], output, stage)

            handles.append(hrm.model.get_submodule(f"{stage}_module").register_forward_hook(hear))
        last = hrm.model(torch.tensor([[5, 6, 7]])).last_hidden_state
        for handle in handles:
            handle.remove()
    found = cb.trajectory
    assert {name: found.iter[at].tolist() for name, at in found.stages.items()} == {
        "L": [1, 2, 3, 4, 5, 6], "H": [1, 2]
    }  # fmt: skip
    assert torch.equal(found.states[-1, :, :, 0], last)


def refused(match, *calls, dims="batch,pos,dim", **more):
    with pytest.raises(UsageError, match=match):
        heard(calls, dims, more)


def heard(calls, dims, more):
    with trace_callback(dims, **more) as cb:
        for call in calls:
            cb(*call)


def test_mistakes_are_refused_where_they_are_made():
    x = torch.zeros(1, 3, 4)
    refused(r"iteration 1 of stage 'core' after 1; iterations increase.*another batch.*another stage", (1, x), (1, x))
    refused(r"iteration -1; count updates from 0", (-1, x))
    refused(r"the shape changes: \[1, 2, 1, 4\] at core iteration 1, \[1, 3, 1, 4\] before", (0, x), (1, x[:, :2]))
    refused(r"its axes could be several; say trace_callback\(dims='batch,pos,dim'\)", (0, x), dims=None)
    refused(r"a state has the shape \[3, 4\], and its axes are batch, pos, dim", (0, x[0]))
    refused(r"dtype torch.int64; states are floats", (0, x.long()))
    refused(r"the energy at iteration 0 has the shape \[2, 3\]", (0, x, "core", torch.zeros(2, 3)))
    refused(r"name iter, and a call brings one state", dims="iter,pos,dim")
    refused(r"'sequence' that is not known. Did you mean 'pos'", dims="batch,sequence,dim")
    refused(r"nothing called back")
    refused(r"stage 'core' has 1 iteration, and a change needs 2", (0, x))
    bad = x.clone()
    bad[0, 2, 3] = torch.nan
    refused(r"not finite: nan at iter=1, batch=0, pos=2, dim=3 \(iteration 5\)", (0, x), (5, bad))
    refused(r"batch 0 has 1 samples and 2 ids", (0, x), (1, x), ids=["a", "b"])
    refused(r"valid is \[1, 2\], and the states have \[1, 3\]", (0, x), (1, x), valid=[[1, 1]])


def test_batches_must_agree():
    x = torch.zeros(1, 3, 4)

    def two(first, second, **more):
        with trace_callback("batch,pos,dim", **more) as cb:
            cb.follow(first)
            cb.batch().follow(second)

    with pytest.raises(UsageError, match=r"batch 1 has 3 states and other iterations than batch 0, which has 2"):
        two([x, x + 1], [x, x + 1, x + 2])
    with pytest.raises(UsageError, match=r"ids and token_ids are given for every batch or for none"):
        two([x, x + 1], [x, x + 1], ids=["a"])


def test_after_the_block_nothing_is_heard_and_before_its_end_nothing_is_there():
    with trace_callback() as cb:
        cb.follow([torch.zeros(2, 2), torch.ones(2, 2)])
        with pytest.raises(UsageError, match=r"when the with block has closed"):
            _ = cb.trajectory
    with pytest.raises(UsageError, match=r"after the with block had closed"):
        cb(2, torch.ones(2, 2))


def test_an_error_of_the_model_is_the_models():
    with pytest.raises(ZeroDivisionError), trace_callback():
        raise ZeroDivisionError
