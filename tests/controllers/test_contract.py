"""The suite that authors run on their controller: good ones pass, and each kind of bad one fails where it should."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import History, Scale

from dynprobe.controllers import Controller
from dynprobe.controllers.recovery import Always, Deadband, Narrowing, Recovery, Slerp
from dynprobe.errors import ModelError, SelfTestError, UsageError
from dynprobe.probes import Subject, discover, live_hooks
from dynprobe.testing import CONTROLLER_CHECKS, check_controller, tiny_causal_lm, tiny_llama

WROTE = tuple(c for c in CONTROLLER_CHECKS if c != "quiet")


@pytest.fixture(scope="module")
def tiny() -> Subject:
    return tiny_llama()


class Integrates(Scale):
    """A good one: remembers, per row, what it saw."""

    reads = "layers=1"

    def start(self, n_rows: int) -> Any:
        return {"sum": torch.zeros(n_rows)}

    def decide(self, seen: Any, memory: Any) -> None:
        memory["sum"] += seen.states["resid_post", 1][:, -1].mean(-1)

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state * (1 + memory["sum"].tanh()[:, None, None]) if seen.decoding else state


def test_good_ones_pass(tiny: Subject) -> None:
    before = dict(tiny.facts)
    assert check_controller(Scale, tiny) == WROTE
    assert check_controller(Integrates, tiny) == WROTE
    assert check_controller(History, tiny) == CONTROLLER_CHECKS
    assert check_controller(lambda: Recovery(Always(), Slerp()), tiny) == WROTE
    assert live_hooks(tiny.model) == 0
    assert tiny.facts == before


def test_one_that_asks_for_a_calibration_gets_it(zoo: Subject, calibrated: Any) -> None:
    for given in (None, calibrated):
        made = check_controller(lambda: Recovery(Deadband(m=1, lo=0.2, hi=0.5), Slerp()), zoo, given)
        assert made == WROTE
    assert check_controller(lambda: Narrowing(Deadband(m=1, lo=0.2, hi=0.5)), zoo, calibrated) == CONTROLLER_CHECKS


class OnSelf(Integrates):
    """Keeps what it knows of rows on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.sum: Any = 0.0

    def start(self, n_rows: int) -> Any:
        return {}

    def decide(self, seen: Any, memory: Any) -> None:
        self.sum = self.sum + float(seen.states["resid_post", 1].mean())

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state * (1 + np.tanh(self.sum)) if seen.decoding else state


class Draws(Scale):
    """Random directions that nobody can draw again."""

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state + 0.1 * torch.randn_like(state) if seen.decoding else state


class BatchMean(Scale):
    """Lets the rows of a batch see each other."""

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state.mean(0, keepdim=True) + 0.5 * state if seen.decoding else state


class ByPlace(Scale):
    """Treats a row by its place in the batch."""

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        place = torch.arange(len(state))[:, None, None]
        return state * (1 + 0.1 * place) if seen.decoding else state


class Columns(Scale):
    """Counts columns, padding included, where positions are meant."""

    def start(self, n_rows: int) -> Any:
        return {"n": torch.zeros(n_rows)}

    def decide(self, seen: Any, memory: Any) -> None:
        memory["n"] = memory["n"] + seen.step.positions.shape[1]

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state * (1 + 0.1 * memory["n"][:, None, None]) if seen.decoding else state


class InPlace(Scale):
    """Changes the state it was given and says that it did nothing."""

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        if seen.decoding:
            state.mul_(0.5)
        return state


class Sleeper(Scale):
    """Calls itself idle in forwards in which it would act."""

    def idle(self, seen: Any, memory: Any) -> bool:
        return bool((seen.step.positions.max() % 2) == 0)

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state * 1.1 if seen.decoding else state


class Hooks(Scale):
    """Puts a hook of its own on the model and leaves it there."""

    def bind(self, subject: Any, calibration: Any) -> None:
        self.handle = subject.blocks[0].register_forward_hook(lambda m, a, out: out * 1.01)


class Counter(Scale):
    """Counts forwards on itself from each start on: right until a token is taken back."""

    def start(self, n_rows: int) -> Any:
        self.n = 0
        return {}

    def decide(self, seen: Any, memory: Any) -> None:
        self.n += 1

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        return state * (1 + 0.1 * self.n) if seen.decoding else state


class Rows(Scale):
    """Remembers rows on itself from each start on: right until one leaves."""

    def start(self, n_rows: int) -> Any:
        self.first: Any = None
        return {}

    def decide(self, seen: Any, memory: Any) -> None:
        if self.first is None:
            self.first = torch.from_numpy(seen.step.positions.max(axis=1))

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        if not seen.decoding:
            return state
        return state * (1 + 0.1 * self.first[: len(state), None, None])


class Beams(Rows):
    """Finds its rows again when some leave, and not when they change places."""

    def act(self, state: Tensor, site: Any, seen: Any, memory: Any) -> Tensor:
        if not seen.decoding:
            return state
        rows = sorted(range(len(state)) if seen.step.rows is None else seen.step.rows)
        return state * (1 + 0.1 * self.first[list(rows)][:, None, None])


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (OnSelf, "repeatable"), (Draws, "repeatable"), (BatchMean, "alone"), (ByPlace, "alone"), (Columns, "alone"),
        (InPlace, "quiet"), (Sleeper, "idle"), (Counter, "rewound"), (Rows, "leaving"), (Beams, "reordered"),
    ],
)  # fmt: skip
def test_bad_ones_fail_where_they_are_bad(make: Any, check: str, tiny: Subject) -> None:
    with pytest.raises(SelfTestError, match=rf"{make.__name__} breaks the contract of controllers \({check}\): "):
        check_controller(make, tiny)
    assert live_hooks(tiny.model) == 0


def test_what_is_left_on_the_model_is_found() -> None:
    with pytest.raises(SelfTestError, match=r"Hooks breaks the contract of controllers \(detached\)"):
        check_controller(Hooks, tiny_llama())


def test_memory_of_the_wrong_size_is_the_steerings_to_refuse(tiny: Subject) -> None:
    class Wrong(Controller):
        def start(self, n_rows: int) -> Any:
            return {"x": np.zeros(n_rows + 1)}

    with pytest.raises(UsageError, match="whose first axis is the batch"):
        check_controller(Wrong, tiny)


def test_a_model_without_a_cache_cannot_try_it() -> None:
    with pytest.raises(ModelError, match="takes no cache"):
        check_controller(Scale, discover(tiny_causal_lm("openai-gpt")))
