"""Perturbations as data: a strength under a named scale, a kind of write, a seed, and a place.

A bare α has no unit. The same "0.1" is a tenth of a state's norm, a tenth of a coordinate's spread, or 0.1 nats of
effect; between two models the choice changes the answer tenfold. So a perturbation always carries its scale, its text
always prints it, and ``Perturb.parse(str(p)) == p``.

Two axes. The **scale** says what α multiplies (``relnorm coordstd mad cov abs interp neftune isokl``; formulas in
``_scales``). The **kind** says what is written: ``gaussian`` noise or a given ``direction`` take any scale that draws
noise; ``scale``, ``rotate`` and ``dropout`` bring their own unit (a factor, radians, a probability) and therefore
refuse a noise scale; ``interp`` and ``neftune`` define their own write and therefore refuse a kind.

Two kinds are the signals of a function generator, for systems that are to be identified and not only shaken. An
``impulse`` is one write at one site and one position, so everything that moves afterwards is its response. A ``sine``
swings along the tokens, u_pos = α·unit·sin(2π·pos/period)·v̂, in one direction v̂ that all positions and rows share, so
its response can be read at one frequency and everything else is noise.

A direction is a vector, not text: it is handed over as ``direction=``, compared by its digest, and checked when used,
because only a model knows how long it must be. Lists of strengths are refused: several strengths are a sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynprobe._yaml import read_yaml
from dynprobe.errors import SpecError, UsageError
from dynprobe.probes._grammar import PLACE_KEYS, WRITE_KEYS, Items, listed, near, read_pairs
from dynprobe.probes._perturb_values import (
    KINDS,
    READERS,
    InvalidError,
    fault,
    number_text,
    place_fault,
    vector,
)
from dynprobe.probes._scales import SCALES, NoiseScale
from dynprobe.probes._where import IMPULSE_POSITION, WRITE_POSITIONS, Where

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["KINDS", "Perturb", "parse_many"]

_ORDER: Final = ("alpha", "scale", *PLACE_KEYS, "kind", "seed", "period")


@dataclass(frozen=True, init=False)
class Perturb:
    """A write of strength α under a named scale at some sites.

    Args:
        alpha: Strength in the unit of the scale; negative flips the sign. Under ``isokl`` the target KL in nats (≥ 0);
            for ``dropout`` a probability in [0, 1).
        where: The place, as a ``Where`` or its text; or give ``layers`` … ``slots`` as keywords.
        scale: What α multiplies; default ``relnorm`` (α = realised ‖u‖/‖h‖).
        kind: What is written; default ``gaussian``. ``impulse`` takes one site and one position, and every scale that
            draws noise. ``sine`` takes one site, and ``relnorm``, ``coordstd``, ``mad`` or ``abs``; α is its amplitude
            in that unit, the size at the crest. The unit is each state's own, so under ``relnorm`` (and ``mad``) the
            amplitude of the drive follows ‖h‖ from token to token: read-outs refer to the drive that was really
            written, not to α.
        seed: Of the noise, 0 ≤ seed < 2⁶⁴; under ``sine`` of the direction, where none is given.
        period: Tokens per cycle of ``kind=sine``, more than 2; refused with the other kinds.
        direction: A vector [dim]: needed by ``kind=direction``, taken by ``impulse`` in place of noise and by ``sine``
            in place of a drawn direction. Its length is ignored, its sign is not. Not part of the text.

    Raises:
        UsageError: A value is outside its range or two of them exclude each other.

    Example:
        >>> p = Perturb(alpha=0.1, layers="50%")
        >>> str(p)
        'alpha=0.1,scale=relnorm,layers=50%,kind=gaussian,seed=0'
        >>> Perturb.parse(str(p)) == p
        True
        >>> str(Perturb.parse("alpha=0.1").defaults_filled().where)
        'layers=50%,positions=1:,phase=all,component=resid_post'
        >>> str(Perturb(alpha=0.1, kind="sine", period=8))
        'alpha=0.1,scale=relnorm,kind=sine,seed=0,period=8'
    """

    alpha: float
    where: Where
    scale: str
    kind: str
    seed: int
    period: float | None
    direction: NDArray[np.float64] | None = field(compare=False, repr=False)
    direction_digest: str | None

    def __init__(
        self,
        alpha: float | str,
        *,
        where: Where | str | None = None,
        scale: str = "relnorm",
        kind: str = "gaussian",
        seed: int | str = 0,
        period: float | str | None = None,
        direction: Any = None,
        layers: Items = None,
        iterations: Items = None,
        positions: Items = None,
        phase: Items = None,
        component: Items = None,
        slots: Items = None,
    ) -> None:
        values: dict[str, Any] = {"alpha": alpha, "scale": scale, "kind": kind, "seed": seed, "period": period}
        for key, value in values.items():
            values[key] = READERS[key](value)
        wrong = fault(values)
        place = {"layers": layers, "iterations": iterations, "positions": positions}
        place |= {"phase": phase, "component": component, "slots": slots}
        place = {key: value for key, value in place.items() if value is not None}
        values["where"] = Where.parse(where).replace(**place) if where is not None else Where(**place)
        wrong = wrong or place_fault(values["kind"], values["where"])
        if wrong is not None:
            raise InvalidError(*wrong)
        values["direction"], values["direction_digest"] = vector(direction)
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def parse(cls, text: str | Perturb, *, direction: Any = None) -> Perturb:
        """Read one perturbation; ``@spec.yaml`` reads it from a file.

        Args:
            text: The spec, such as ``"alpha=0.1,scale=coordstd,layers=6:9,positions=last"``.
            direction: The vector of a kind that takes one.

        Raises:
            SpecError: The text is not of the language; the message points at the character.

        Example:
            >>> Perturb.parse("alpha=0.1,layers=6,scale=relnrom")
            Traceback (most recent call last):
            dynprobe.errors.SpecError: unknown scale 'relnrom'; known: ... Did you mean 'relnorm'?
              alpha=0.1,layers=6,scale=relnrom
                                       ^
        """
        if isinstance(text, Perturb):
            return text if direction is None else text.replace(direction=direction)
        if isinstance(text, str) and text.strip().startswith("@"):
            found = cls.from_yaml(text.strip()[1:])
            if len(found) != 1:
                raise UsageError(f"{text.strip()} holds {len(found)} perturbations where one is wanted.")
            return cls.parse(found[0], direction=direction)
        pairs = read_pairs(text, (*PLACE_KEYS, *WRITE_KEYS))
        at = {p.key: p.value_at + len(p.value) - len(p.value.lstrip()) for p in pairs}
        if "alpha" not in at:
            raise SpecError("alpha, the strength, is missing: write alpha=0.1", text, len(text))
        values: dict[str, Any] = {p.key: p.value.strip() for p in pairs if p.key in WRITE_KEYS}
        try:
            return cls(**values, where=Where.from_pairs(pairs, text), direction=direction)
        except InvalidError as error:
            raise SpecError(error.message, text, at[error.key]) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> tuple[Perturb, ...]:
        """Read a YAML file that holds one mapping, or a list of mappings, with the keys of the mini-language.

        Every scalar is read as text by the one parser, because YAML 1.1 would turn ``layers: 6:9`` into the
        sexagesimal number 369. ``direction`` may be a list of numbers.

        Raises:
            UsageError: The file cannot be read, a key is unknown or repeated, a value is not of the language.
        """
        content, _ = read_yaml(
            Path(path).expanduser(), "spec file", as_text=True,
            hint="\n(values that end in a colon need quotes, positions: '1:')",
        )  # fmt: skip
        entries = content if isinstance(content, list) else [content]
        if not entries:
            raise UsageError(f"{path} holds no perturbation; write for example 'alpha: 0.1'.")
        return tuple(cls._from_mapping(entry, f"{path}, entry {i + 1}") for i, entry in enumerate(entries))

    @classmethod
    def _from_mapping(cls, entry: Any, source: str) -> Perturb:
        if not isinstance(entry, Mapping):
            raise UsageError(f"{source}: expected a mapping such as 'alpha: 0.1', found {entry!r}.")
        keys = (*PLACE_KEYS, *WRITE_KEYS, "direction")
        values = {str(key).replace("-", "_"): value for key, value in entry.items()}
        for key in values:
            if key not in keys:
                raise UsageError(f"{source}: unknown key {key!r}; keys: {listed(keys)}.{near(key, keys)}")
        if "alpha" not in values:
            raise UsageError(f"{source}: alpha, the strength, is missing.")
        try:
            return cls(**values)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error

    def replace(self, **changes: Any) -> Perturb:
        """Return a copy with some values changed; keys of the place may be given directly.

        Example:
            >>> str(Perturb(alpha=0.1, layers=6).replace(alpha=0.2, layers="50%"))
            'alpha=0.2,scale=relnorm,layers=50%,kind=gaussian,seed=0'
        """
        place = {key: changes.pop(key) for key in PLACE_KEYS if key in changes}
        known = ("alpha", "scale", "kind", "seed", "period", "direction", "where")
        for key in changes:
            if key not in known:
                raise UsageError(f"unknown key {key!r}; keys: {listed((*known, *PLACE_KEYS))}.{near(key, known)}")
        values = {key: getattr(self, key) for key in known} | changes
        values["where"] = Where.parse(values["where"]).replace(**place)
        return Perturb(**values)

    @property
    def noise_scale(self) -> NoiseScale:
        """What α multiplies; of kinds with a unit of their own it says nothing."""
        return SCALES[self.scale]

    def defaults_filled(self) -> Perturb:
        """Return the perturbation with every default of writing made explicit.

        Not given means: block 50 %, positions ``1:``, both phases, component ``resid_post``. ``neftune`` without
        layers means the embedding (``component=resid_pre, layers=0``). Where iterations were given, layers stay open.
        ``impulse`` means position 1 in prefill, the first that default writes may touch, so that all later tokens can
        respond; an impulse at a position that was named is written in whatever phase that position falls.
        """
        w = self.where
        embedding = self.noise_scale.at_embedding and w.layers is None and w.component in (None, ("resid_pre",))
        filled: dict[str, Items] = {
            "positions": IMPULSE_POSITION if self.kind == "impulse" else WRITE_POSITIONS,
            "phase": "prefill" if self.kind == "impulse" and w.positions is None else "all",
            "component": "resid_pre" if embedding else "resid_post",
        }
        if w.iterations is None:
            filled["layers"] = 0 if embedding else "50%"
        return self.replace(**{key: value for key, value in filled.items() if getattr(w, key) is None})

    def __str__(self) -> str:
        values = {key: getattr(self.where, key) for key in PLACE_KEYS}
        texts = {key: "+".join(map(str, items)) for key, items in values.items() if items is not None}
        texts |= {"alpha": number_text(self.alpha), "scale": self.scale, "kind": self.kind, "seed": str(self.seed)}
        if self.period is not None:
            texts["period"] = number_text(self.period)
        return ",".join(f"{key}={texts[key]}" for key in _ORDER if key in texts)

    def __repr__(self) -> str:
        tail = "" if self.direction is None else f", direction=<{len(self.direction)} numbers>"
        return f"Perturb.parse({str(self)!r}{tail})"


def parse_many(specs: str | Perturb | Mapping[str, Any] | Iterable[Any] | None) -> tuple[Perturb, ...]:
    """Read what ``--perturb`` may be when repeated: texts, ``@file.yaml``, objects, mappings, or a list of those.

    Example:
        >>> [p.alpha for p in parse_many(["alpha=0.1", Perturb(alpha=0.2)])]
        [0.1, 0.2]
    """
    if specs is None:
        return ()
    if isinstance(specs, Perturb):
        return (specs,)
    if isinstance(specs, str):
        return Perturb.from_yaml(specs.strip()[1:]) if specs.strip().startswith("@") else (Perturb.parse(specs),)
    if isinstance(specs, Mapping):
        return (Perturb._from_mapping(specs, "perturb"),)
    if isinstance(specs, Iterable):
        return tuple(p for spec in specs for p in parse_many(spec))
    raise UsageError(f"{specs!r} is no perturbation: write a text such as 'alpha=0.1,layers=50%'.")
