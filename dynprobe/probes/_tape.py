"""A tape: the trajectory of every row of one batch, as ordinary tensors.

Depth d is the state entering block d; depth L leaves the last block and is still before the final norm. Prefill and
decode steps are joined along the position axis; ``mask`` says which columns hold real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.errors import SiteError
from dynprobe.probes._where import Where

if TYPE_CHECKING:
    import xarray
    from jaxtyping import Bool, Float, Int

    from dynprobe.probes._subject import Subject

__all__ = ["States", "Tape"]


class States:
    """States by depth: ``states[d]`` is ``[batch, pos, dim]``, ``states[:]`` stacks them where widths agree.

    Numbers are depths, not indices: a tape of depths 6 and 7 has no ``states[0]``, and ``states[-1]`` is depth L. A
    slice of depths takes those that were captured.
    """

    def __init__(self, by_depth: Mapping[int, Tensor], last: int) -> None:
        self._by_depth = dict(sorted(by_depth.items()))
        self.last = last

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths that were captured, in order."""
        return tuple(self._by_depth)

    def __len__(self) -> int:
        return len(self._by_depth)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._by_depth.values())

    def __getitem__(self, depth: int | slice) -> Tensor:
        if isinstance(depth, slice):
            chosen = [self._by_depth[d] for d in range(self.last + 1)[depth] if d in self._by_depth]
            if not chosen:
                raise SiteError(f"no depth of {depth} is on the tape; it holds {_ranges(self.depths) or 'none'}")
            return torch.stack(chosen)
        absolute = depth + self.last + 1 if depth < 0 else depth
        if absolute not in self._by_depth:
            raise SiteError(f"depth {depth} was asked for; the tape holds depths {_ranges(self.depths) or 'none'}")
        return self._by_depth[absolute]

    def __repr__(self) -> str:
        shape = tuple(next(iter(self)).shape) if len(self) else ()
        return f"States(depths {_ranges(self.depths)}, each {shape})"


def _ranges(numbers: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` → ``'0–2, 5'``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


@dataclass(eq=False)
class Tape:
    """What one capture holds.

    Attributes:
        states: States by depth, each ``[batch, pos, dim]``; the model's own tensors where it does not overwrite them.
        updates: Attention and MLP outputs that were asked for, by ``(component, layer)``.
        mask: ``[batch, pos]`` bool, True where a real token stands.
        positions: ``[batch, pos]`` absolute 0-based positions among real tokens, −1 at padding.
        token_ids: ``[batch, pos]``, or None when embeddings were fed.
        n_prompt: ``[batch]`` real tokens of each prompt; later positions were generated.
        logits: ``[batch, vocab]`` (``logits="last"``), ``[batch, pos, vocab]`` (``"all"``), or None.
        row_keys: The name each row's noise is drawn under.
        subject: Where it was taken.
        passport: Size of the perturbation in every unit, one entry per row and unit; empty without one.
        energies: Of an energy model, ``energy`` of every state and ``energy_prev`` of the one before under the same
            energy, ``[depth, batch, pos]``; else empty.

    Example:
        >>> import torch
        >>> from dynprobe.probes import capture
        >>> from dynprobe.testing import tiny_llama
        >>> tape = capture(tiny_llama(), torch.tensor([[5, 6, 7, 8]]))
        >>> tape.depths, tuple(tape.states[3].shape), tuple(tape.at(layer=-1, pos=-1).shape)
        ((0, 1, 2, 3), (1, 4, 32), (1, 32))
    """

    states: States
    mask: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    token_ids: Int[Tensor, "batch pos"] | None
    n_prompt: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch *pos vocab"] | None = None
    updates: Mapping[tuple[str, int], Float[Tensor, "batch pos *slot dim"]] = field(default_factory=dict)
    row_keys: tuple[str, ...] = ()
    subject: Subject | None = None
    passport: Mapping[str, np.ndarray] = field(default_factory=dict)
    energies: Mapping[str, Float[Tensor, "depth batch pos"]] = field(default_factory=dict)

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths that were captured."""
        return self.states.depths

    def at(
        self, layer: int | None = None, pos: int | None = None, *, iteration: int | None = None
    ) -> Float[Tensor, "batch *place dim"]:
        """Return the state that block ``layer`` hands on (depth ``layer + 1``), or that an iteration ends in.

        Args:
            layer: 0-based block index; negative counts from the last. None in a loop without layers.
            pos: Absolute position among real tokens, negative from each row's last; None for all columns.
            iteration: Updates done in the last loop of the layer (0 = before the first); None takes the last.

        Returns:
            ``[batch, pos, dim]``, or ``[batch, dim]`` with ``pos``; with slots ``[batch, pos, slot, dim]``.

        Raises:
            SiteError: If the layer or iteration was not captured or a row has no such position.
        """
        state = self.states[self._depth(layer, iteration)]
        return state if pos is None else self._pick(state, pos)

    def _depth(self, layer: int | None, iteration: int | None) -> int:
        """Depth of a layer's or an iteration's state."""
        subject = self.subject
        if subject is None or not subject.turns:
            if layer is None or iteration is not None:
                raise SiteError("this model has layers and no iterations; write tape.at(layer=6)")
            return self._layer(layer) + 1
        place = Where(layers=layer, iterations="last" if iteration is None else iteration, component="resid_post")
        component, number = subject.sites(place)[0]
        return number + (component == "resid_post")

    def _layer(self, layer: int) -> int:
        n_layers = self.states.last
        absolute = layer + n_layers if layer < 0 else layer
        if not 0 <= absolute < n_layers:
            raise SiteError(f"layer {layer} was asked for; there are layers 0…{n_layers - 1}")
        return absolute

    def _pick(self, state: Tensor, pos: int) -> Tensor:
        lengths = self.mask.sum(1)
        wanted = lengths + pos if pos < 0 else torch.full_like(lengths, pos)
        hit = (self.positions == wanted[:, None]) & self.mask
        if not bool(hit.any(1).all()):
            row = int((~hit.any(1)).nonzero()[0, 0])
            raise SiteError(f"position {pos} was asked for; row {row} has {int(lengths[row])} tokens")
        columns = hit.float().argmax(1).to(state.device)
        return state[torch.arange(len(state), device=state.device), columns]

    def __getitem__(self, key: tuple[str, int] | str) -> Tensor:
        """Return a component of a layer: ``tape["mlp_out", 6]``, ``tape["blocks.6.hook_mlp_out"]``.

        TransformerLens's names of components work too (``tape["hook_mlp_out", 6]``). Where layers hold loops, it is the
        state in which the loop has ended.

        Raises:
            SiteError: If the layer or component is not on the tape.
        """
        name, number = (key, None) if isinstance(key, str) else key
        where = Where(component=name)
        layers = where.layers if number is None else (number,)
        if layers is None or where.component is None or len(where.component) != 1 or where.component == ("all",):
            raise SiteError(f"{key!r} names no one place; write tape['mlp_out', 6] or tape['blocks.6.hook_mlp_out']")
        if self.subject is not None and self.subject.turns:  # a layer is several depths there
            site, number = self.subject.sites(where.replace(layers=layers), writing=True)[0]
            return self.states[number + (site == "resid_post")]
        component, layer = str(where.component[0]), self._layer(int(layers[0]))  # type: ignore[arg-type]
        if component in ("resid_pre", "resid_post"):
            return self.states[layer + (component == "resid_post")]
        if (component, layer) in self.updates:
            return self.updates[component, layer]
        parallel = self.subject is not None and not self.subject.sequential
        if component == "resid_mid" and ("attn_out", layer) in self.updates and not parallel:
            return self.states[layer] + self.updates["attn_out", layer]
        held = sorted({c for c, _ in self.updates} | {"resid_pre", "resid_post"})
        raise SiteError(
            f"{component!r} of layer {layer} is not on this tape; it holds {', '.join(held)}. "
            f"Capture it with where='component={component}'"
        )

    def to_xarray(self) -> xarray.DataArray:
        """Return the states as an ``xarray.DataArray`` with dimensions depth, batch, pos, dim."""
        try:
            import xarray
        except ImportError as error:
            raise ImportError("to_xarray() needs xarray: pip install 'dynprobe[xarray]'") from error
        wide = torch.stack([s.detach().cpu() for s in self.states])
        values = (wide if wide.dtype == torch.float64 else wide.float()).numpy()  # NumPy has no bfloat16
        coords: dict[str, Any] = {
            "depth": list(self.depths),
            "row_key": ("batch", list(self.row_keys)),
            "position": (("batch", "pos"), self.positions.numpy()),
        }
        axes = ("depth", "batch", "pos", "dim") if values.ndim == 4 else ("depth", "batch", "pos", "slot", "dim")
        return xarray.DataArray(values, dims=axes, coords=coords, name="state")

    def __repr__(self) -> str:
        rows, columns = self.mask.shape
        what = f", updates {sorted({c for c, _ in self.updates})}" if self.updates else ""
        return f"Tape({rows} rows × {columns} columns, depths {_ranges(self.depths)}{what})"
