"""Settings of an attractor layer, checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from dynprobe.errors import UsageError, did_you_mean

__all__ = ["PRESETS", "Settings"]

_CHOICES = {
    "site": ("attn_out", "query_mean", "mlp_out", "residual"),
    "read": ("match", "field", "hopfield"),
    "burn": ("tokens", "strength"),
    "inject": ("relative", "absolute"),
    "evict": ("weakest", "oldest", "none"),
    "observe": ("pre", "post"),
    "centre": ("auto", "calibration", "running", "none"),
}


@dataclass(frozen=True)
class Settings:
    """What an attractor layer does; the symbols are those of the update rule.

    Attributes:
        slots: M, number of slots.
        gate: Factor of the whole injection; 0 leaves the model as it is, bit for bit.
        strength: ε, size of the injection: relative to ‖y‖, or absolute.
        half_life: H, tokens after which an unused strength is halved.
        burn_in: Tokens, or total strength, before anything is injected.
        site: Where y is read and written.
        read: How slots are read: by ``match`` with y, as one ``field``, or as a ``hopfield`` memory.
        theta: θ, cosine above which a token reinforces a slot; None takes the quantile 1 − 0.1/M of pair cosines
            of the calibration where the layer is centred on one, else 0.8.
        theta_read: θ_r, cosine above which a slot is read.
        rate: α, how far a slot moves towards a token that reinforces it.
        beta: β, inverse temperature of the Hopfield read.
        s_new: s₀, strength of a new slot.
        s_max: Largest strength.
        s_min: Strength below which a slot is dead.
        s_ref: Strength at which the injection is tanh(1) of its largest.
        burn: Whether ``burn_in`` counts tokens or strength.
        inject: ``relative``: δ = g·ε·‖y‖·f; ``absolute``: δ = g·ε·f.
        evict: Which slot gives way to a new one when none is dead.
        observe: Whether y is stored as it came (``pre``) or with its injection (``post``).
        centre: What is subtracted before directions are compared; ``auto`` is ``calibration`` for match and hopfield
            and ``none`` for field.
        commit_every: Tokens whose writes are applied together; reads between use the slots as they were.
        clocks: Whether three traces of hits (half-lives 10, 100, 1000) gate each slot.
        z_ref: z₀ of the clock gate z/(z + z₀).
    """

    slots: int = 16
    gate: float = 1.0
    strength: float = 0.05
    half_life: float = 46.0
    burn_in: float = 32
    site: Literal["attn_out", "query_mean", "mlp_out", "residual"] = "attn_out"
    read: Literal["match", "field", "hopfield"] = "match"
    theta: float | None = None
    theta_read: float = 0.5
    rate: float = 0.05
    beta: float = 8.0
    s_new: float = 0.5
    s_max: float = 64.0
    s_min: float = 1e-3
    s_ref: float = 4.0
    burn: Literal["tokens", "strength"] = "tokens"
    inject: Literal["relative", "absolute"] = "relative"
    evict: Literal["weakest", "oldest", "none"] = "weakest"
    observe: Literal["pre", "post"] = "pre"
    centre: Literal["auto", "calibration", "running", "none"] = "auto"
    commit_every: int = 1
    clocks: bool = False
    z_ref: float = 0.01

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, int | float):  # NumPy's, which no JSON would take
                value = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, value)
            if (
                "float" in kind
                and (isinstance(value, bool) or not isinstance(value, int | float))
                and (value is not None or "None" not in kind)
            ):
                raise UsageError(f"{name}={value!r}; it is a number")
        if not isinstance(self.clocks, bool):
            raise UsageError(f"clocks={self.clocks!r}; it is True or False")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                near = did_you_mean(str(value), known)
                raise UsageError(f"{name}={value!r}; it is one of {', '.join(known)}.{near}")
        for name in ("slots", "commit_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "commit_every"):
                raise UsageError(f"{name}={value!r}; it is a whole number ≥ {int(name == 'commit_every')}")
        for name in ("gate", "strength", "burn_in", "beta", "s_new", "s_min", "z_ref", "s_ref", "half_life", "s_max"):
            value = getattr(self, name)
            positive = name in ("half_life", "s_ref", "s_max", "z_ref", "s_min")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise UsageError(f"{name}={value!r}; it is a finite number {'above' if positive else 'from'} 0")
        if not 0 <= self.rate <= 1:
            raise UsageError(f"rate={self.rate!r}; it lies in [0, 1]")
        for name in ("theta", "theta_read"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise UsageError(f"{name}={value!r}; a cosine lies in [-1, 1]")
        if not self.s_min < self.s_new <= self.s_max:
            raise UsageError(f"s_min={self.s_min:g} < s_new={self.s_new:g} ≤ s_max={self.s_max:g} must hold")

    @property
    def centring(self) -> str:
        """What is subtracted, with ``auto`` resolved."""
        return self.centre if self.centre != "auto" else "none" if self.read == "field" else "calibration"

    @property
    def idle(self) -> bool:
        """Whether nothing can ever be injected."""
        return self.gate == 0 or self.strength == 0 or self.slots == 0

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed."""
        return replace(self, **self.known(changes))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    @classmethod
    def known(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return values whose names are settings.

        Raises:
            UsageError: If one is not.
        """
        names = [f.name for f in fields(cls)]
        for name in values:
            if name not in names:
                raise UsageError(f"unknown setting {name!r} of an attractor layer.{did_you_mean(name, names)}")
        return values


#: Published variants with their known defects removed; what was removed stands in the documentation.
PRESETS: dict[str, Settings] = {
    "duality_v1": Settings(
        read="field", inject="absolute", strength=0.15, theta=0.8, slots=16, burn="strength", burn_in=50.0,
        s_ref=1.0, site="query_mean", centre="none",
    ),
}  # fmt: skip
