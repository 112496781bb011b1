"""Places: which layers, iterations, positions, phases, components and slots are read or written.

A place is one line, short enough for a command and exact enough for a paper (``layers=6:9,positions=last``). Three
ideas. *Text and object are the same thing*: ``Where.parse(str(x)) == x``. *A place knows no model*: ``50%`` and ``-1``
stay what they are until ``resolve_layers(n)`` or ``position_mask(pos, n_prompt)`` meets one, so one text serves many
models. *Not given is not everything*: a key left out is ``None``, and the reader or writer says what that stands for.

Positions count real tokens from 0; negatives count from the end of the **prompt** (−1 = ``last`` = its last token),
because the end of a text that is still being generated is not a place. An open slice such as ``1:`` therefore reaches
into the generated tokens and ``-1`` never does.

Refused: numbers the model does not have. A slice is clipped as Python clips it, but never silently to nothing.
Nothing here imports torch or NumPy: masks are built with operators that tensors and arrays share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from dynprobe._types import COMPONENTS, PHASES
from dynprobe.errors import SiteError, UsageError
from dynprobe.probes._grammar import (
    PLACE_KEYS,
    Item,
    Items,
    Pair,
    Percent,
    Span,
    listed,
    near,
    parse_items,
    read_hook_name,
    read_items,
    read_pairs,
)

__all__ = ["IMPULSE_POSITION", "WRITE_POSITIONS", "Item", "Items", "Percent", "Span", "Where"]

WRITE_POSITIONS: Final = "1:"  # position 0 is the attention sink; moving it is another experiment
IMPULSE_POSITION: Final = "1"  # the first of those, so that all later tokens can respond


@dataclass(frozen=True, init=False)
class Where:
    """Which sites: layers, iterations, positions, phase, component and slots, each a tuple of items or ``None``.

    ``None`` means *not given*; what that stands for is decided by who reads (everything) or writes (half depth,
    positions ``1:``), through the ``default`` arguments below.

    Args:
        layers: 0-based block indices.
        iterations: Numbers of updates done (0 = before the first).
        positions: 0-based among real tokens; negatives from the end of the prompt.
        phase: ``prefill``, ``decode`` or ``all``.
        component: ``resid_pre resid_mid resid_post attn_out mlp_out`` or a TransformerLens name for one of them.
        slots: 0-based indices of a model's slots (one of a CSM's 16 vectors).

    Each takes the text of the mini-language, an int, a ``slice``, a ``range``, or a list of those.

    Raises:
        SpecError: An item is not of the language; the message points at the character.

    Example:
        >>> w = Where(layers="6:9", positions="last")
        >>> str(w), w == Where.parse("positions = last, layers = 6 : 9")
        ('layers=6:9,positions=last', True)
        >>> w.resolve_layers(30)
        (6, 7, 8)
        >>> Where.parse("layers=50%").resolve_layers(30)
        (15,)
    """

    layers: tuple[Item, ...] | None
    iterations: tuple[Item, ...] | None
    positions: tuple[Item, ...] | None
    phase: tuple[Item, ...] | None
    component: tuple[Item, ...] | None
    slots: tuple[Item, ...] | None

    def __init__(
        self,
        layers: Items = None,
        iterations: Items = None,
        positions: Items = None,
        phase: Items = None,
        component: Items = None,
        slots: Items = None,
    ) -> None:
        given = {"layers": layers, "iterations": iterations, "positions": positions}
        given |= {"phase": phase, "component": component, "slots": slots}
        if isinstance(component, str) and component.strip().startswith("blocks."):
            layer, given["component"] = read_hook_name(component.strip(), component, 0)
            if layers is not None and read_items("layers", layers) != read_items("layers", layer):
                raise UsageError(f"component={component} names layer {layer}, but layers={layers!r} was given as well.")
            given["layers"] = layer
        for key, value in given.items():
            object.__setattr__(self, key, read_items(key, value))

    @classmethod
    def parse(cls, text: str | Where | None) -> Where:
        """Read a spec; a ``Where`` and ``None`` (nothing given) pass through.

        Raises:
            SpecError: The text is not of the language; the message points at the character.

        Example:
            >>> Where.parse("layers=6:9+20,component=mlp-out").component
            ('mlp_out',)
            >>> Where.parse("blocks.6.hook_resid_post")
            Where.parse('layers=6,component=resid_post')
        """
        if isinstance(text, Where):
            return text
        return cls.from_pairs(read_pairs(text or "", PLACE_KEYS), text or "")

    @classmethod
    def from_hook_name(cls, name: str) -> Where:
        """Translate TransformerLens's name of a site, such as ``blocks.6.hook_resid_post``.

        Raises:
            SpecError: The name is none of the five components dynprobe reads.

        Example:
            >>> str(Where.from_hook_name("blocks.6.hook_mlp_out"))
            'layers=6,component=mlp_out'
        """
        layer, component = read_hook_name(name.strip(), name, len(name) - len(name.lstrip()))
        return cls(layers=layer, component=component)

    @classmethod
    def from_pairs(cls, pairs: Iterable[Pair], text: str) -> Where:
        """Build from pairs that were read already (``Perturb`` reads a longer language); other keys are skipped."""
        return cls(**{p.key: parse_items(p.key, p.value, text, p.value_at) for p in pairs if p.key in PLACE_KEYS})

    def replace(self, **changes: Items) -> Where:
        """Return a copy with some keys changed; ``None`` takes a key away."""
        unknown = next((key for key in changes if key not in PLACE_KEYS), None)
        if unknown is not None:
            raise UsageError(f"unknown key {unknown!r}; a place has {listed(PLACE_KEYS)}.{near(unknown, PLACE_KEYS)}")
        return Where(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def __str__(self) -> str:
        given = ((key, getattr(self, key)) for key in PLACE_KEYS)
        return ",".join(f"{key}={'+'.join(map(str, items))}" for key, items in given if items is not None)

    def __repr__(self) -> str:
        return f"Where.parse({str(self)!r})"

    def resolve_layers(self, n_layers: int, default: Items = "all") -> tuple[int, ...]:
        """Return the layers of a model with ``n_layers`` blocks, sorted and unique.

        Raises:
            SiteError: A layer is out of range, or a slice selects nothing; the valid range is told.
        """
        return self._resolve("layers", n_layers, default)

    def resolve_iterations(self, n_states: int, default: Items = "all") -> tuple[int, ...]:
        """Return the iterations among ``n_states`` = K + 1 states (0 is the state before the first update)."""
        return self._resolve("iterations", n_states, default)

    def resolve_slots(self, n_slots: int, default: Items = "all") -> tuple[int, ...]:
        """Return the slots of a model whose units have ``n_slots`` vectors each."""
        return self._resolve("slots", n_slots, default)

    def components(self, default: Items = "resid_post") -> tuple[str, ...]:
        """Return the components asked for, in the order in which a block computes them."""
        return self._closed("component", COMPONENTS, default)

    def phases(self, default: Items = "all") -> tuple[str, ...]:
        """Return the phases asked for: a subset of ``("prefill", "decode")``."""
        return self._closed("phase", PHASES, default)

    def position_mask(self, pos: Any, n_prompt: Any, default: Items = "all") -> Any:
        """Return which entries of ``pos`` are selected by ``positions`` (``phase`` is not looked at).

        Args:
            pos: Integer tensor or array [batch, new] of absolute 0-based positions among real tokens, −1 = padding.
            n_prompt: Prompt lengths in real tokens, [batch] or one int.
            default: What stands for positions that were not given: ``"all"`` reading, ``"1:"`` writing.

        Returns:
            A boolean mask of the shape and library of ``pos``; padding is never selected.
        """
        n = n_prompt[:, None] if getattr(n_prompt, "ndim", 0) == 1 else n_prompt
        real = pos >= 0
        selected = real & False
        for item in self._items("positions", default):
            selected = selected | _hits(item, pos, n)
        return selected & real

    def phase_mask(self, pos: Any, n_prompt: Any, default: Items = "all") -> Any:
        """Return which entries of ``pos`` lie in the phases: prefill is pos < n_prompt, decode pos ≥ n_prompt."""
        n = n_prompt[:, None] if getattr(n_prompt, "ndim", 0) == 1 else n_prompt
        chosen = self.phases(default)
        if len(chosen) == 2:
            return pos >= 0
        return (pos >= 0) & (pos < n) if chosen == ("prefill",) else (pos >= 0) & (pos >= n)

    def mask(self, pos: Any, n_prompt: Any, positions: Items = "all", phase: Items = "all") -> Any:
        """Return ``position_mask & phase_mask``; ``positions`` and ``phase`` are the defaults of what was not given.

        Example:
            >>> import numpy as np
            >>> pos = np.array([[0, 1, 2, 3, 4], [-1, 0, 1, 2, 3]])
            >>> Where.parse("positions=-1:,phase=decode").mask(pos, np.array([3, 2])).astype(int)
            array([[0, 0, 0, 1, 1],
                   [0, 0, 0, 1, 1]])
        """
        return self.position_mask(pos, n_prompt, positions) & self.phase_mask(pos, n_prompt, phase)

    def _items(self, key: str, default: Items) -> tuple[Item, ...]:
        items = getattr(self, key)
        return items if items is not None else read_items(key, default) or ()

    def _closed(self, key: str, words: tuple[str, ...], default: Items) -> tuple[str, ...]:
        items = self._items(key, default)
        return words if "all" in items else tuple(word for word in words if word in items)

    def _resolve(self, key: str, n: int, default: Items) -> tuple[int, ...]:
        chosen: set[int] = set()
        for item in self._items(key, default):
            found = _indices(item, n)
            if not found or not 0 <= min(found) <= max(found) < n:
                problem = "is out of range" if isinstance(item, int) else "selects nothing"
                valid = f"{key} 0…{n - 1} (or -{n}…-1 from the end)"
                raise SiteError(f"{key}={item} {problem}: this model has {n}, {valid}.")
            chosen.update(found)
        return tuple(sorted(chosen))


def _indices(item: Item, n: int) -> Sequence[int]:
    if isinstance(item, Span):
        return item.resolve(n)
    if isinstance(item, Percent):  # 100 % is the end of the axis, which an index reads as its last entry
        return (min(item.of(n), n - 1),)
    if isinstance(item, int):
        return (item + n if item < 0 else item,)
    return {"all": range(n), "first": (0,), "last": (n - 1,)}[item]


def _hits(item: Item, pos: Any, n: Any) -> Any:
    if item == "all":
        return pos >= 0
    if isinstance(item, Span):
        step = item.step or 1
        start, stop = _bound(item.start, n), _bound(item.stop, n)
        start = 0 if start is None else start * (start > 0)
        inside = (pos >= start) if stop is None else (pos >= start) & (pos < stop)
        return inside & ((pos - start) % step == 0) if step > 1 else inside
    if isinstance(item, Percent):
        index = item.of(n)
        return pos == index - 1 * (index >= n)
    return pos == _bound({"first": 0, "last": -1}[item] if isinstance(item, str) else item, n)


def _bound(bound: int | Percent | None, n: Any) -> Any:
    if isinstance(bound, Percent):
        return bound.of(n)
    return bound if bound is None or bound >= 0 else n + bound
