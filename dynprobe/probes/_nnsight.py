"""The same probes and perturbations through nnsight: every forward of an instrument is one nnsight trace.

Hooks on plain modules are dynprobe's default. nnsight reads and writes by another mechanism: it compiles the body of a
``with model.trace(…)`` block and runs it in step with the forward, parked at ``module.output`` until the model gets
there. Here an :class:`Instrument` is carried by such traces. While it is open the root module's ``forward`` is replaced
by one that opens a trace around the real one, so whatever calls the model (a capture, a forced arm, our decoding loop,
transformers' ``generate``) is traced forward by forward, and sites, positions, recorder and books are the instrument's.

Three rules. *Before the trace*: masks and noise, which are pure functions of seed, row, site and position, are made on
the CPU. *Inside the trace*: torch operations on states, nothing else. *After it*: the books (sizes, counts, listeners).
*When the instrument closes* the modules get their own ``forward`` back, so that no controller of nnsight is left where
resuming, hashing or another library would find it.

Refused: controllers (they decide between forwards by reading what a trace does not hand out), resuming and branching
(blocks below are left out by stubs that stand where nnsight's controllers stand), models whose modules run in a loop.

nnsight is heavy and changes the process it is imported into (it puts ``save`` on every object and patches
``Tensor.backward``), so it is imported when the first traced instrument opens and not before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes._backend import require_nnsight
from dynprobe.probes._draw import GAUSSIAN, UNIFORM, law_of
from dynprobe.probes._noise import Float32, NoiseSource
from dynprobe.probes._outputs import hidden_argument, hidden_of, replace_argument, replace_hidden
from dynprobe.probes._roles import Site, Writer
from dynprobe.probes._writers import PerturbWriter, Update

if TYPE_CHECKING:
    from dynprobe.probes._clock import Step
    from dynprobe.probes._instrument import Instrument

__all__ = ["Traces", "controllers_left", "forwards_of", "restore"]

#: Where in a block's forward the components come.
_ORDER = {"resid_pre": 0, "attn_in": 1, "attn_out": 2, "mlp_out": 3, "resid_post": 4}


@dataclass(frozen=True)
class _Drawn(NoiseSource):
    """Noise of one site that was drawn before the trace began."""

    held: dict[tuple[str, int, int], Float32] = field(default_factory=dict)

    def draw(self, law: str, seed: int, dim: int, wanted: np.ndarray) -> None:
        method = super().uniform if law == UNIFORM else super().gaussian
        self.held[law, seed, dim] = method(seed, dim, wanted)

    def gaussian(self, seed: int, dim: int, wanted: Any = None) -> Float32:
        return self.held[GAUSSIAN, seed, dim]

    def uniform(self, seed: int, dim: int, wanted: Any = None) -> Float32:
        return self.held[UNIFORM, seed, dim]


class _Prepared:
    """A perturbation that is drawn before a trace, written inside it, and entered into its books afterwards."""

    def __init__(self, writer: PerturbWriter, width: int) -> None:
        self._writer, self._width, self.sites = writer, width, writer.sites
        self._sources: dict[Site, _Drawn] = {}
        self._made: list[tuple[Update, Site, Step]] = []

    def prepare(self, step: Step) -> None:
        """Draw what this forward will write."""
        self._made.clear()
        law, seed, wanted = law_of(self._writer.perturb), self._writer.perturb.seed, self._writer.wanted(step)
        for site in self.sites:
            at = self._writer.source(site, step)
            self._sources[site] = _Drawn(at.row_keys, at.site, at.positions)
            if law is not None and wanted.any():
                self._sources[site].draw(law, seed, self._width, wanted)

    def write(self, state: Tensor, site: Site, step: Step) -> Tensor:
        """Return the state to use instead."""
        made = self._writer.update(state, site, step, self._sources[site])
        self._made.append((made, site, step))
        return made.after

    def settle(self) -> None:
        """Enter what was written into the books."""
        for made, site, step in self._made:
            self._writer.note(made, site, step)
        self._made.clear()


@dataclass(eq=False)
class _Visit:
    """Everything that is done at one place of a forward."""

    envoy: Any
    side: str
    write: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    read: list[Callable[[Tensor], None]] = field(default_factory=list)

    def __call__(self) -> None:
        """Wait for the model to get here, write, read; runs inside the trace."""
        value = self.envoy.inputs if self.side == "input" else self.envoy.output
        before = hidden_argument(*value) if self.side == "input" else hidden_of(value)
        after = before
        for write in self.write:
            after = write(after)
        for read in self.read:
            read(after)
        if after is before:
            return
        if self.side == "input":
            args, kwargs = value
            self.envoy.inputs = replace_argument(args, kwargs, after)
        else:
            self.envoy.output = replace_hidden(value, after)


class Traces:
    """Carries an instrument: each forward of its root module is one trace.

    Args:
        instrument: Whose readers and writers are carried.

    Raises:
        UsageError: If the instrument carries what a trace cannot.
    """

    def __init__(self, instrument: Instrument) -> None:
        require_nnsight("backend='nnsight'")
        if instrument.steerers:
            raise UsageError(
                "controllers decide between forwards and need backend=hooks; leave the backend out (or write "
                "backend='hooks')"
            )
        self._instrument, self._root = instrument, instrument.root
        self._forwards: list[tuple[nn.Module, dict[str, Any]]] = []
        self._prepared = [
            _Prepared(writer, instrument.subject.width) if isinstance(writer, PerturbWriter) else None
            for writer in instrument.writers
        ]
        self._visits: list[_Visit] = []
        self._envoy: Any = None
        self.halting = False

    def open(self) -> None:
        """Put nnsight on the root module, and a tracing forward in front of it."""
        from nnsight import NNsight

        self._forwards = forwards_of(self._root)
        if any(isinstance(before.get("forward"), _TracingForward) for _, before in self._forwards):
            self._forwards.clear()
            raise UsageError(
                "one nnsight trace is open on this model; backend=nnsight carries one context at a time. Close it "
                "first, or read and write in one call: dp.capture(model, prompts, perturb=…)"
            )
        original = self._root.forward
        self._envoy = NNsight(self._root)
        self._visits = self._plan(self._envoy)
        object.__setattr__(self._root, "forward", _TracingForward(original, self._forward))

    def close(self) -> None:
        """Give every module its own forward back."""
        restore(self._forwards)
        self._forwards, self._visits, self._envoy = [], [], None

    def _plan(self, root: Any) -> list[_Visit]:
        """The places in the order in which a forward reaches them; all writers of a place come before its readers."""
        subject, visits = self._instrument.subject, dict[tuple[float, int, str], _Visit]()

        def at(site: Site) -> _Visit:
            component, layer = site
            place = subject.module_at(component, layer)
            if component == "resid_pre" and layer:  # touched where the block before hands it out
                component, layer = "resid_post", layer - 1
            envoy = root.interleaver.envoys.get(id(place.module))
            if envoy is None or place.lens is not None:
                raise ModelError(f"{component}.{layer} of {subject.name} is no module of the model that is traced")
            key = (10.0 * layer + _ORDER[component], id(place.module), place.side)
            return visits.setdefault(key, _Visit(envoy, place.side))

        carried: Sequence[Writer] = [
            own if own is not None else writer
            for own, writer in zip(self._prepared, self._instrument.writers, strict=True)
        ]
        for writer in carried:
            for site in writer.sites:
                at(site).write.append(self._instrument._writing(writer, site))
        for site in self._instrument.read:
            at(site).read.append(self._instrument._reading(site))
        return [visits[key] for key in sorted(visits)]

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward of the root as one trace."""
        instrument = self._instrument
        args, kwargs = instrument._begin(self._root, args, kwargs) or (args, kwargs)
        step = instrument.step
        assert step is not None
        for prepared in self._prepared:
            if prepared is not None:
                prepared.prepare(step)
        visits, halting, held = self._visits, self.halting, _Held()
        with self._envoy.trace(*args, fn=held.keeping(original), **kwargs) as tracer:
            for visit in visits:
                visit()
            if halting:
                tracer.stop()
        for prepared in self._prepared:
            if prepared is not None:
                prepared.settle()
        if halting:
            instrument.end_step()
            return None
        after = instrument._end(self._root, args, kwargs, held.output)
        return held.output if after is None else after


class _Held:
    """Keeps what the traced call returned: the trace itself hands out saved values only."""

    output: Any = None

    def keeping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.output = function(*args, **kwargs)
            return self.output

        return call


class _TracingForward:
    """A root module's forward while it is traced; it has the signature of the real one."""

    def __init__(self, original: Callable[..., Any], run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)
        self._original, self._run = original, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._original, args, kwargs)


def forwards_of(root: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return every module with what somebody put on the instance in place of its forward, for :func:`restore`."""
    from nnsight.intervention.source import STATE

    names = ("forward", STATE)
    return [(m, {name: m.__dict__[name] for name in names if name in m.__dict__}) for m in root.modules()]


def restore(forwards: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Take nnsight off modules: each gets back what it had, a user's own wrapper included."""
    if not forwards:
        return
    from nnsight.intervention.source import STATE

    for module, before in forwards:
        for name in ("forward", STATE):
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


def controllers_left(root: nn.Module) -> int:
    """Number of modules under ``root`` whose forward is nnsight's; 0 after every context has closed."""
    return sum(
        type(module.__dict__.get("forward")).__module__.startswith("nnsight")
        or isinstance(module.__dict__.get("forward"), _TracingForward)
        for module in root.modules()
    )
