"""The shapes in annotations are true: functions are held against them while they work."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe.testing import tiny_llama

KINDS = ("Bool", "Float", "Int", "Shaped")
AXES = {kind: getattr(jaxtyping, kind) for kind in KINDS}


def hints(thing: Any) -> dict[str, Any]:
    """The annotations of a function or class that name axes."""
    names = {**vars(sys.modules[thing.__module__]), **AXES}
    said = {name: str(text) for name, text in inspect.get_annotations(thing).items()}
    return {name: eval(text, names) for name, text in said.items() if any(f"{kind}[" in text for kind in KINDS)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the shapes that an annotation says, in every place of a sequence or mapping."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if hint is None:
        return value is None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(one, inner[1]) for one in value.values())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, Sequence) and all(fits(one, inner[0]) for one in value)
    return isinstance(value, hint)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    signature, wanted = inspect.signature(function), hints(function)

    @jaxtyping.jaxtyped(typechecker=None)
    @functools.wraps(function)
    def held(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, hint in wanted.items():
            if name in given and not fits(given[name], hint):
                raise TypeError(f"{function.__qualname__}: {name} is {shape_of(given[name])}, not {hint}")
        found = function(*args, **kwargs)
        if "return" in wanted and not fits(found, wanted["return"]):
            raise TypeError(f"{function.__qualname__} returns {shape_of(found)}, not {wanted['return']}")
        called.add(function.__qualname__)
        return found

    return held


def shape_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: shape_of(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shape_of(v) for v in value]
    return f"{getattr(value, 'dtype', type(value).__name__)}{list(getattr(value, 'shape', ()))}"


called: set[str] = set()
#: Methods that others override; nothing is called by these names.
CONTRACTS = {"Writer.write", "Steerer.observe", "Controller.act", "Controller.choose"}


@pytest.fixture(scope="module")
def functions() -> Iterator[set[str]]:
    """Put every annotated function of the package into its checked form, wherever it was imported to."""
    for room in ("metrics", "probes", "controllers", "models"):
        package = importlib.import_module(f"dynprobe.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"dynprobe.{room}."):
            importlib.import_module(found.name)
    for name in dp.__all__:  # brought in now, so that what is put in their place is taken away again
        getattr(dp, name)
    modules = [m for name, m in sys.modules.items() if name == "dynprobe" or name.startswith("dynprobe.")]
    patch = pytest.MonkeyPatch()
    names: set[str] = set()
    done: dict[int, Any] = {}
    for module in modules:
        for name, thing in list(vars(module).items()):
            if inspect.isfunction(thing) and thing.__module__.startswith("dynprobe") and hints(thing):
                patch.setattr(module, name, done.setdefault(id(thing), checked(thing)))
                names.add(thing.__qualname__)
            elif inspect.isclass(thing) and thing.__module__ == module.__name__:
                for key, method in list(vars(thing).items()):
                    if inspect.isfunction(method) and hints(method):
                        patch.setattr(thing, key, checked(method))
                        names.add(method.__qualname__)
    called.clear()
    yield names
    patch.undo()


TEXTS = ["In the beginning God created", "And the earth"]


def use(name: str, tmp: Any) -> Any:
    """Read, push, resume, run and recover one model of the zoo."""
    subject = dp.load(name)
    where = "alpha=0.2,layers=1" if name != "tiny-csm" else "alpha=0.2,iterations=2"
    tape = dp.capture(subject, TEXTS, logits="all", perturb=where)
    again = dp.resume(tape, at=1, states=tape.states[1])
    dp.readout(subject, tape.states[tape.depths[-1]])
    with dp.record(subject, where="layers=all" if name == "tiny-llama" else "iterations=all") as recorded:
        subject.model(tape.token_ids[:1])
    dp.run(subject, TEXTS, perturb=where, max_new_tokens=3, out=tmp)
    return tape, again, recorded


@pytest.mark.slow
def test_what_is_read_pushed_and_measured_has_the_shapes_it_says(functions: set[str], tmp_path: Any) -> None:
    tapes = [tape for name in ("tiny-llama", "tiny-cem", "tiny-csm") for tape in use(name, tmp_path / name)[:2]]
    llama = dp.load("tiny-llama")
    dp.run(llama, TEXTS, perturb="alpha=0.05,kind=sine,period=3", max_new_tokens=0, out=tmp_path / "sine")
    dp.run(llama, TEXTS, perturb="alpha=0.3,kind=impulse", max_new_tokens=0, lens=True, out=tmp_path / "impulse")
    dp.recover(
        llama,
        TEXTS,
        mode="slerp,sampling,str",
        perturb="alpha=0.9,layers=1",
        max_new_tokens=6,
        temperature=0.8,
        out=tmp_path / "r",
    )
    with dp.AttractorLayer(slots=4, burn_in=2).attach(llama, layers=[1]):
        llama.model.generate(torch.tensor([[65, 66, 67] * 4]), max_new_tokens=3, do_sample=False)
    dp.sweep(llama, TEXTS, alphas=[0.1, 0.3], layers=[1, 2], out=tmp_path / "sweep")
    with dp.perturb(llama, lambda state, site: 0.5 * state):
        llama.model(tapes[0].token_ids)
    dp.AttractorLayer(slots=4)(torch.zeros(2, 5, 8))
    tapes[0].at(layer=0), tapes[0].at(layer=0, pos=-1)
    csm = dp.load("tiny-csm")
    csm.model.readout(dp.capture(csm, TEXTS).states[3])
    logits = torch.randn(5, 7)
    dp.metrics.paired_arms(logits, torch.stack([logits, -logits]))
    dp.metrics.paired_arms(logits, [logits, -logits])
    dp.metrics.delay_embed(np.arange(20.0), 3, 2)
    for tape in tapes:
        for name, hint in hints(dp.Tape).items():
            assert fits(getattr(tape, name), hint), (name, shape_of(getattr(tape, name)), hint)
    made = dp.metrics.measure([torch.randn(2, 5, 8) for _ in range(4)], torch.ones(2, 5, dtype=torch.bool))
    for name, hint in hints(dp.metrics.Measurement).items():
        assert fits(getattr(made, name), hint), (name, shape_of(getattr(made, name)), hint)
    dp.metrics.phase_z(np.random.default_rng(0).random((3, 2)), np.zeros(3), np.ones(3))
    dp.metrics.prediction_depth(np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert len(functions) > 30
    never = functions - called - CONTRACTS
    assert not never, f"annotated with shapes and not tried: {sorted(never)}"


def test_a_false_shape_is_noticed(functions: set[str]) -> None:
    tape = dp.probes.capture(tiny_llama(), torch.tensor([[5, 6, 7]]))
    with pytest.raises(TypeError, match=r"resume: states is .*\[2, 16\]"):
        dp.probes.resume(tape, 1, states=torch.zeros(2, 16))
    assert "resume" in functions
