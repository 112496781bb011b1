"""Other libraries capturing the same states, each the way its own documentation shows.

A peer keeps the output of every block of one forward over all positions, with logits at all of them, and hands them
back in the order of the blocks. Nothing is made slower than its users would, and nothing is taken on trust: what a peer
captured is compared with what we captured, at run time, and the largest difference stands beside its time. A peer that
is not installed, or does not run with this model, is reported with its reason and is no error.
"""

from __future__ import annotations

import abc
import copy
import functools
import importlib.util
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from dynprobe.errors import ModelError, UsageError, did_you_mean
from dynprobe.probes import Subject

__all__ = [
    "KNOWN", "PEERS", "Peer", "bridge_of", "chosen", "descend", "hushed", "largest_difference", "lasting", "made",
    "paths_of", "state_of", "twin",
]  # fmt: skip

#: Keyword of each peer on the command line → its name in the tables.
KNOWN = {
    "hooks": "raw hooks", "nnsight": "nnsight", "transformer_lens": "TransformerLens", "pyvene": "pyvene",
    "torchlens": "torchlens",
}  # fmt: skip


def twin(subject: Subject) -> Any:
    """Return modules of a peer's own on the same weights: a library may leave its wrappers on what it touched."""
    return copy.deepcopy(subject.model, {id(p): p for p in subject.model.parameters()})


def paths_of(subject: Subject) -> list[str]:
    """Return the paths of the blocks, in order."""
    names = {id(module): name for name, module in subject.model.named_modules()}
    return [names[id(block)] for block in subject.blocks]


def descend(root: Any, path: str) -> Any:
    """Return what stands at a path below a module or a library's wrapper of one."""
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


def state_of(output: Any) -> Tensor:
    """Return the state in what a block returned."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def bridge_of(subject: Subject) -> Any:
    """Return TransformerLens's own copy of a model, which it loads itself."""
    folder = subject.facts.get("folder")
    if folder is None:
        raise ModelError("it loads the model itself, and this one did not come from a folder")
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, dtype=subject.dtype, device=str(subject.device))


class Peer(abc.ABC):
    """What is common to peers.

    Args:
        subject: The model; its weights are shared.

    Attributes:
        name: Name in the tables.
        package: What must be installed.
        own_forward: Whether it runs a model of its own, so that its baseline is its own bare forward.
    """

    name: ClassVar[str] = ""
    package: ClassVar[str] = "torch"
    own_forward: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abc.abstractmethod
    def capture(self, ids: Tensor) -> list[Tensor]:
        """Return the output of every block, ``[batch, pos, dim]`` each."""

    def forward(self, ids: Tensor) -> Any:
        """Run its own bare forward."""
        raise NotImplementedError(f"{self.name} runs the model that it was given")


class RawHooks(Peer):
    """Forward hooks of PyTorch."""

    name = "raw hooks"

    @torch.no_grad()
    def capture(self, ids: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        handles = [b.register_forward_hook(lambda m, a, o: kept.append(state_of(o))) for b in self.subject.blocks]
        self.subject.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return kept


class NNsight(Peer):
    """One trace that saves every block's output."""

    name, package = "nnsight", "nnsight"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        from nnsight import TransformersModel

        self.traced = TransformersModel(twin(subject), tokenizer=subject.tokenizer)
        self.layers = [descend(self.traced, path) for path in paths_of(subject)]

    @torch.no_grad()
    def capture(self, ids: Tensor) -> list[Tensor]:
        layers, kept = self.layers, []
        with self.traced.trace(ids, use_cache=False):
            for layer in layers:
                kept.append(layer.output.save())
        return [state_of(output) for output in kept]


class TransformerLens(Peer):
    """``run_with_cache`` of a TransformerBridge, over the blocks' outputs alone."""

    name, package, own_forward = "TransformerLens", "transformer_lens", True

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.bridge = bridge_of(subject)

    @torch.no_grad()
    def capture(self, ids: Tensor) -> list[Tensor]:
        _, cache = self.bridge.run_with_cache(
            ids, names_filter=lambda name: name.endswith("hook_out") and name.count(".") == 2
        )
        return [cache[f"blocks.{layer}.hook_out"] for layer in range(self.subject.n_layers)]

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Any:
        return self.bridge(ids)


class Pyvene(Peer):
    """An intervenable model whose interventions keep the base (its own collecting one takes a slice of the state)."""

    name, package = "pyvene", "pyvene"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        import pyvene

        self.kept: list[Tensor] = []

        def keep(base: Tensor, source: Any) -> Tensor:
            self.kept.append(base)
            return base

        self.wrapped = pyvene.IntervenableModel(
            [{"layer": i, "component": "block_output", "intervention": keep} for i in range(subject.n_layers)],
            model=twin(subject),
        )

    @torch.no_grad()
    def capture(self, ids: Tensor) -> list[Tensor]:
        self.kept.clear()
        self.wrapped({"input_ids": ids}, use_cache=False)
        return list(self.kept)


class TorchLens(Peer):
    """``record`` with a selector of the blocks."""

    name, package = "torchlens", "torchlens"
    #: What stays behind after the measurement; another part of the same program may stumble over it.
    lasting = "puts wrappers around torch's own functions, which stay for as long as the process lives"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        import torchlens

        self.model, self.paths = twin(subject), paths_of(subject)
        self.record = torchlens.record
        self.wanted = functools.reduce(operator.or_, (torchlens.module(path) for path in self.paths))

    @torch.no_grad()
    def capture(self, ids: Tensor) -> list[Tensor]:
        found = self.record(self.model, ids, {"use_cache": False}, save=self.wanted)
        assert len(found.records) == len(self.paths), len(found.records)
        return [record.ram_payload for record in found.records]


PEERS: tuple[type[Peer], ...] = (RawHooks, NNsight, TransformerLens, Pyvene, TorchLens)


def lasting(wanted: Sequence[str] | None) -> list[str]:
    """Return those of the wanted peers that are here and leave something behind: they are measured last, apart."""
    kinds = [kind for kind in PEERS if getattr(kind, "lasting", None) and kind.name in (wanted or ())]
    return [kind.name for kind in kinds if importlib.util.find_spec(kind.package) is not None]


class _Kind(Protocol):
    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, subject: Subject) -> None: ...


K = TypeVar("K", bound=_Kind)


def chosen(peers: str | Sequence[str]) -> list[str] | None:
    """Return the names of the peers that are wanted; None for all.

    Raises:
        UsageError: If one is unknown.

    Example:
        >>> chosen("auto"), chosen("none"), chosen("nnsight,hooks")
        (None, [], ['nnsight', 'raw hooks'])
    """
    words = [w.strip() for w in (peers.split(",") if isinstance(peers, str) else peers) if w.strip()]
    if words in (["auto"], ["none"]):
        return None if words == ["auto"] else []
    found = []
    for word in words:
        key = word.lower().replace("-", "_").replace(" ", "_").replace("raw_hooks", "hooks")
        key = {"transformerlens": "transformer_lens"}.get(key, key)
        if key not in KNOWN:
            raise UsageError(f"peers={word!r}; known: auto, none, or of {', '.join(KNOWN)}.{did_you_mean(key, KNOWN)}")
        found.append(KNOWN[key])
    return found


def made(
    kinds: Iterable[type[K]], wanted: Sequence[str] | None, subject: Subject, trial: Callable[[K], object]
) -> tuple[dict[str, K], dict[str, str]]:
    """Make the wanted peers (None for all), try each once; return those that run, and why the others do not."""
    found: dict[str, K] = {}
    absent: dict[str, str] = {}
    for kind in kinds:
        if wanted is not None and kind.name not in wanted:
            continue
        if importlib.util.find_spec(kind.package) is None:
            absent[kind.name] = f"not installed: pip install {kind.package.replace('_', '-')}"
            continue
        if wanted is None and getattr(kind, "lasting", None):
            absent[kind.name] = f"measured only when it is named in --peers: it {kind.lasting}"  # type: ignore[attr-defined]
            continue
        if subject.turns:
            absent[kind.name] = f"reads modules that run once; those of {subject.name} run in a loop"
            continue
        try:
            with hushed():
                peer = kind(subject)
                trial(peer)
        except Exception as error:  # what another library says of this model is its answer, not our failure
            first = (str(error).strip().splitlines() or [""])[0]
            absent[kind.name] = f"does not run here: {type(error).__name__}: {first[:200]}"
        else:
            found[kind.name] = peer
    return found, absent


@contextmanager
def hushed() -> Iterator[None]:
    """Keep what other libraries log, warn of and draw while they load out of the table."""
    from transformers.utils import logging as drawn

    before, bar = logging.root.manager.disable, drawn.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    drawn.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if bar:
            drawn.enable_progress_bar()


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of two captures, block by block; NaN where their shapes differ."""
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("nan")
    return max(float((a.float() - b.to(a.device).float()).abs().max()) for a, b in zip(ours, theirs, strict=True))
