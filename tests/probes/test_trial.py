"""What one watched forward shows, and what it must not be taken to show."""

import pytest
import torch
from models import CONTAINERS, Block, Looped, Mixer, Net, open_container, seeded
from torch import Tensor, nn

from dynprobe.errors import ModelError
from dynprobe.probes._trial import _adds_up, watch
from dynprobe.probes._trial_calls import TrialError, trial_ids

INPUT = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    """Blocks in a list, called in some order."""

    def __init__(self, blocks: list[nn.Module], order: list[int] | None = None) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(blocks), order if order is not None else list(range(len(blocks)))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            out = self.blocks[i](x)
            x = open_container(getattr(self.blocks[i], "kind", "tensor"), out)
        return self.norm(x)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_everything_about_a_plain_stack(kind: str, in_place: bool) -> None:
    net = seeded(lambda: Stack([Block(16, kind, in_place) for _ in range(4)]))
    trial = watch(net, None, INPUT.clone())
    assert trial.block_path == "blocks.*"
    assert trial.blocks == tuple(net.blocks)
    assert (trial.dim, trial.state_dtype) == (16, torch.float32)
    assert trial.final_norm == "norm"
    assert trial.chained
    assert trial.mutates is in_place
    # With `x += attn(x)` the input is overwritten before the block returns; only a copy made on entry shows the sum.
    assert trial.updates == {"attn_out": ("attn",) * 4, "mlp_out": ("mlp",) * 4}
    assert trial.sequential


def test_nothing_is_left_on_the_module_and_grad_is_off() -> None:
    net = seeded(lambda: Stack([Block() for _ in range(2)]))
    watch(net, None, INPUT)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_hooks_are_gone_after_a_failure() -> None:
    net = seeded(lambda: Stack([Block(), nn.Linear(3, 3)]))
    with pytest.raises(TrialError, match=r"trial forward of Stack failed \(RuntimeError.*trial_input="):
        watch(net, None, INPUT)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_memory_that_runs_out_says_nothing_of_the_structure() -> None:
    class Large(Stack):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        watch(Large([Block(16), Block(16)]), None, INPUT.clone())


def test_parallel_blocks_have_two_updates_and_no_middle() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln, self.attention, self.mlp = nn.LayerNorm(16), Mixer(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.ln(x)
            return self.mlp(h) + self.attention(h) + x

    trial = watch(seeded(lambda: Stack([Parallel() for _ in range(3)])), None, INPUT)
    # The MLP runs first; its name, not its place, says what it is.
    assert trial.updates == {"attn_out": ("attention",) * 3, "mlp_out": ("mlp",) * 3}
    assert not trial.sequential


def test_a_single_update_is_named_for_what_it_is() -> None:
    class One(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.get_submodule(self.name)(x)

    assert watch(seeded(lambda: Stack([One("mixer"), One("mixer")])), None, INPUT).updates == {
        "attn_out": ("mixer",) * 2
    }
    assert watch(seeded(lambda: Stack([One("ffn"), One("ffn")])), None, INPUT).updates == {"mlp_out": ("ffn",) * 2}
    # A hybrid has no component that every block has.
    assert watch(seeded(lambda: Stack([One("mixer"), One("ffn")])), None, INPUT).updates == {}


def test_scaled_updates_are_not_found_rather_than_found_wrong() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = Mixer(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.22 * self.attn(x)
            return x + 0.22 * self.mlp(x)

    assert watch(seeded(lambda: Stack([Scaled(), Scaled()])), None, INPUT).updates == {}


def test_a_large_coordinate_does_not_hide_a_wrong_sum() -> None:
    """In real models one coordinate is a thousand times the others; a tolerance relative to it proves nothing."""
    pre = torch.randn(1, 5, 16)
    pre[..., 3] = 1e6
    update = 1e-2 * torch.randn(1, 5, 16)
    half = 0.5 * update
    post = pre + update
    assert _adds_up(post, pre, update)
    assert not _adds_up(post, pre, half)
    assert not _adds_up(post, pre)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        a, b = torch.randn(2, 1, 5, 16, dtype=dtype).unbind()
        h = torch.randn(1, 5, 16, dtype=dtype)
        assert _adds_up((h + a) + b, h, a, b)
        assert _adds_up(h + (a + b), h, a, b)
        assert not _adds_up(h + a, h, a, b)
        assert not _adds_up(h + a + b, h, a)


def test_states_with_nan_prove_nothing() -> None:
    nan = torch.full((1, 2, 4), float("nan"))
    assert not _adds_up(nan, nan, nan)


def test_the_longest_outermost_chain_is_taken() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
            self.blocks = nn.ModuleList([nn.Sequential(*[nn.Linear(16, 16) for _ in range(9)]) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.short(x)
            for block in self.blocks:
                x = block(x)
            return x

    assert watch(seeded(Deep), None, INPUT).block_path == "blocks.*"


def test_a_root_that_is_itself_the_list() -> None:
    net = seeded(lambda: nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)]))
    trial = watch(net, None, INPUT)
    assert trial.block_path == "*"
    assert trial.blocks == tuple(net)


def test_states_rescaled_between_blocks_are_still_blocks_but_no_chain() -> None:
    class Rescaled(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 3:
                    x = x / 2
            return x

    trial = watch(seeded(lambda: Rescaled([Block() for _ in range(6)])), None, INPUT)
    assert len(trial.blocks) == 6
    assert not trial.chained


def test_no_chain_is_an_error_that_names_the_loop() -> None:
    with pytest.raises(ModelError, match=r"no chain of blocks.*called more than once: groups\.0.*looped"):
        watch(seeded(Looped), None, None)
    with pytest.raises(ModelError, match="no chain of blocks was found in Linear"):
        watch(nn.Linear(16, 16), None, INPUT)


def test_named_modules_must_run_once_and_in_order() -> None:
    looped = seeded(Looped)
    with pytest.raises(ModelError, match=r"groups\.0 ran 4 times in one forward"):
        watch(looped, tuple(looped.groups), None)
    swapped = seeded(lambda: Stack([Block() for _ in range(3)], [0, 2, 1]))
    with pytest.raises(ModelError, match="do not run in the order of their names"):
        watch(swapped, tuple(swapped.blocks), INPUT)
    skipped = seeded(lambda: Stack([Block() for _ in range(3)], [0, 1]))
    with pytest.raises(ModelError, match="ran 0 times"):
        watch(skipped, tuple(skipped.blocks), INPUT)
    net = seeded(Net)
    with pytest.raises(ModelError, match="module embed does not map a state"):
        watch(net, (net.embed,), None)


def test_named_modules_may_have_anything_between_them() -> None:
    class Funnel(nn.Module):
        """Two stages of different width, as in vision models."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.between, self.b = nn.Linear(16, 8), nn.Linear(8, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.between(self.a(x)).relu())

    net = seeded(Funnel)
    trial = watch(net, (net.a, net.b), INPUT)
    assert not trial.chained
    assert trial.dim == 4
    assert trial.updates == {}


class Adding(nn.Module):
    """Blocks that return what the model adds to its state; each is a chain of its own."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share, self.embed = share, nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = h + self.share * block(h)
        return h


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_chain_inside_one_of_the_blocks_is_no_stream(share: float) -> None:
    net = seeded(lambda: Adding(share))
    with pytest.raises(
        ModelError, match=r"the modules blocks\.\* run once each and in order, but none of them is given"
    ):
        watch(net, None, None)


def test_blocks_that_return_updates_are_read_with_a_warning() -> None:
    net = seeded(Adding)
    with pytest.warns(UserWarning, match="the 4 blocks return what is added to the state, and not the state"):
        assert not watch(net, tuple(net.blocks), None).chained


def test_a_chain_that_begins_at_zero_is_not_taken_for_updates(recwarn: pytest.WarningsRecorder) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    assert watch(net, tuple(net), torch.zeros(1, 3, 16)).chained
    assert not recwarn.list


def test_trial_ids_fit_every_vocabulary() -> None:
    for vocab in (2, 3, 5, 100):
        net = nn.Sequential(nn.Embedding(vocab, 4), nn.Embedding(vocab + 7, 4))
        ids = trial_ids(net)
        assert ids.shape == (1, 5)
        assert 0 <= int(ids.min()) <= int(ids.max()) < vocab
    with pytest.raises(TrialError, match="trial_input="):
        trial_ids(nn.Linear(2, 2))
