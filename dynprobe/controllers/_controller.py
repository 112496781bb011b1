"""A controller: it looks at a forward, decides at its end, and acts in the next one.

This is the one contract of everything that writes with memory: recovery modes, the attractor layer, their baselines,
and a user's own rule. A controller says where it looks (``reads``) and where it may write (``writes``), and fills in up
to four methods. All that it remembers of a row stands in its *memory*, a mapping of arrays and tensors whose first axis
is the batch; because nothing is kept elsewhere, rows can leave a batch, change places in a beam search, and be taken
back to an earlier token without the author doing anything for it.

The order within one forward: every ``act`` at its site, after the perturbations there and in the order the controllers
were given; then ``decide``; then ``choose``, which alone may change the logits that the sampler sees. Logits that are
measured are those of the model, before any ``choose``. A controller whose ``act`` returns the very state it was given
has done nothing, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Instrument, Site, Subject, Where, as_subject, sites_to_read
from dynprobe.probes._clock import Step
from dynprobe.probes._outputs import logits_of
from dynprobe.probes._restarts import Restart

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Controller", "Memory", "Restart", "Seen", "attached"]

#: What a controller remembers: arrays and tensors whose first axis is the batch.
Memory = dict[str, Any]


@dataclass
class Seen:
    """What can be seen of the running forward.

    Attributes:
        step: Positions, prompt lengths and names of the rows.
        states: States at the observed sites, ``[batch, columns, dim]``; in ``act`` those below it, in ``decide`` all.
        output: What the model returned; None in ``act``.
    """

    step: Step
    states: dict[Site, Tensor] = field(default_factory=dict)
    output: Any = None

    @property
    def logits(self) -> Tensor:
        """Logits of the last column, ``[batch, vocab]``, float32; there are none before ``decide``."""
        return logits_of(self.output)[:, -1].float()

    @property
    def decoding(self) -> bool:
        """Whether this forward carries one new token of every row, and not the prompt or another turn of a talk."""
        return self.step.index > 0 and self.step.positions.shape[1] == 1


class Controller:
    """Base class of controllers; every method has a default that does nothing.

    Attributes:
        id: Name with version, such as ``"recovery.slerp/1"``.
        reads: Where it looks, in the mini-language, or None.
        writes: Where it may write, likewise.
        restarts: Whether it may ask for tokens to be taken back; then rows are decoded one at a time.
        needs_sampling: Whether it does nothing, or nothing new, where the largest logit is always taken.
        min_new_tokens: New tokens below which it can never act.
        by_tokens: Whether what it does to a row follows from the row's tokens alone, at each from those before it,
            however they are fed; then a text may be scored in one forward, and rows of equal tokens may share one.

    Example:
        A controller that halves every state of block 1 once its norm is above 5:

        >>> import torch
        >>> from dynprobe.testing import tiny_llama
        >>> class Halve(Controller):
        ...     reads = writes = "layers=1"
        ...     def start(self, n_rows):
        ...         return {"active": np.zeros(n_rows, bool)}
        ...     def decide(self, seen, memory):
        ...         memory["active"] = seen.states["resid_post", 1][:, -1].norm(dim=-1).numpy() > 5
        ...     def act(self, state, site, seen, memory):
        ...         return torch.where(torch.from_numpy(memory["active"])[:, None, None], 0.5 * state, state)
        >>> model = tiny_llama().model
        >>> with Halve().attach(model) as handle:
        ...     _ = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        >>> list(handle.actions().columns)
        ['row', 'pos', 'signal', 'active', 'gain', 'site', 'energy']
    """

    id: str = ""
    reads: str | None = None
    writes: str | None = None
    restarts: bool = False
    needs_sampling: bool = False
    min_new_tokens: int = 0
    by_tokens: bool = False

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Prepare for a model; called once, before anything else. Refuse here what cannot be done.

        Args:
            subject: The model.
            calibration: What it does when left alone, or None.
        """

    def start(self, n_rows: int) -> Memory:
        """Return the memory of a new sequence of ``n_rows`` rows."""
        return {}

    def idle(self, seen: Seen, memory: Memory) -> bool:
        """Return whether ``act`` would hand every state of this forward back as it is; then it is not asked.

        Asked as a forward begins, before there are states. False is always right; True spares a call at every site.
        """
        return False

    def act(
        self, state: Float[Tensor, "batch pos *slot dim"], site: Site, seen: Seen, memory: Memory
    ) -> Float[Tensor, "batch pos *slot dim"]:
        """Return the state to use at a site, ``[batch, columns, dim]``; the very same object for no change."""
        return state

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Note at the end of a forward what is to be done in the next one."""

    def choose(
        self, logits: Float[Tensor, "batch pos vocab"], seen: Seen, memory: Memory
    ) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits ``[batch, columns, vocab]`` to choose from; the very same object for no change."""
        return logits

    def restart(self, new: list[int], nll: list[float], memory: Memory) -> Restart | None:
        """Return a wish to go back, or None.

        Args:
            new: Tokens written so far, of the one row.
            nll: Their negative log-likelihoods under the model as it runs, perturbed or not, before any ``choose`` and
                at temperature 1, nats.
            memory: Of the one row; what must outlive the restart is written here after :meth:`survives`.
        """
        return None

    def survives(self) -> tuple[str, ...]:
        """Return the entries of the memory that a restart does not take back, such as the number of restarts."""
        return ()

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """Resolve ``reads`` or ``writes`` on a subject.

        Raises:
            SiteError: If a layer or component does not exist.
            UsageError: If the place names tokens or slots: ``act`` gets whole states and decides itself.
        """
        if spec is None:
            return []
        where = Where.parse(spec)
        for key in ("positions", "phase", "slots") if writing else ():
            if getattr(where, key) is not None:
                raise UsageError(
                    f"{key} was given in writes={str(where)!r} of {self.id or type(self).__name__}; name layers and "
                    "component there, and pick tokens in act() by seen.step.positions"
                )
        return subject.sites(where, writing=True) if writing else sites_to_read(subject, where)

    @contextmanager
    def attach(self, model: nn.Module | Subject, calibration: Calibration | None = None) -> Iterator[Any]:
        """Put the controller on whatever the user calls inside the block.

        Args:
            model: The model itself, or a subject.
            calibration: From :func:`dynprobe.calibrate`, for controllers that need one.

        Yields:
            A handle; ``.actions()`` is a table of what was done to the latest sequence.

        Raises:
            CalibrationError: If the calibration is another model's, or one is needed and there is none.
            UsageError: If the controller takes tokens back.
        """
        with attached([self], model, calibration) as (steering,):
            yield steering


@contextmanager
def attached(
    controllers: list[Controller], model: nn.Module | Subject, calibration: Calibration | None = None
) -> Iterator[list[Any]]:
    """Put several controllers on a model at once, in the order given."""
    from dynprobe.controllers._steering import Steering

    for controller in controllers:
        if controller.restarts:
            name = controller.id or type(controller).__name__
            raise UsageError(f"{name} takes tokens back, which only dynprobe's own loop can do; use dp.recover")
    subject = as_subject(model)
    steerings = [Steering(controller, subject, calibration) for controller in controllers]
    with Instrument(subject, (), steerings):
        yield steerings


def taken(memory: Mapping[str, Any], rows: np.ndarray) -> Memory:
    """The memory of some rows, or of the rows in another order."""
    out: Memory = {}
    for name, value in memory.items():
        index = torch.from_numpy(np.asarray(rows)).to(value.device) if isinstance(value, Tensor) else rows
        out[name] = value[index]
    return out


def kept_copy(memory: Memory) -> Memory:
    """A copy of a memory that later changes in place do not reach."""
    return {name: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for name, v in memory.items()}
