"""``AttractorLayer``: a few vectors that strengthen when activated, fade when not, and nudge the next step.

One line attaches it to a frozen model; nothing is trained and no weight is touched. Every sequence has a memory of its
own, which starts empty, or where a session left it. Nothing is ever added to keys or values: later layers cache keys of
states that were changed, so decoding with the cache equals decoding without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynprobe.controllers._controller import Controller, Memory, Seen
from dynprobe.controllers._steering import Steering
from dynprobe.controllers.attractor._centre import measure_centre
from dynprobe.controllers.attractor._rule import Passed, empty_state, pass_tokens
from dynprobe.controllers.attractor._settings import PRESETS, Settings
from dynprobe.controllers.attractor._stored import Stored, read_layer, write_layer
from dynprobe.errors import CalibrationError, UsageError, did_you_mean
from dynprobe.probes import Instrument, Site, Subject, as_subject

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["AttractorHandle", "AttractorLayer", "AttractorSite"]

_COMPONENT = {"attn_out": "attn_out", "query_mean": "attn_out", "mlp_out": "mlp_out", "residual": "resid_post"}
_DEFAULT_THETA = 0.8


class AttractorSite(Controller):
    """The layer's rule at one site of a model: a controller whose memory is the slots.

    Args:
        settings: The rule's.
        site: Where.
        mean: What is subtracted before directions are compared ``[dim]``, or None.
        theta: Cosine of a hit.
        base: State that new sequences start from, or None for empty slots.
    """

    id = "attractor/1"
    by_tokens = True

    def __init__(
        self, settings: Settings, site: Site, *, mean: Tensor | None = None, theta: float = _DEFAULT_THETA,
        base: Memory | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.site, self.mean, self.theta, self.base = settings, site, mean, theta, base
        self.passed: Passed | None = None

    def sites_of(self, subject: Subject, spec: str | None, *, writing: bool) -> list[Site]:
        """The one site; nothing else is observed."""
        return [self.site] if writing else []

    def act(self, state: Tensor, site: Site, seen: Seen, memory: Memory) -> Tensor:
        """Let the tokens of this forward pass the slots."""
        if "A" not in memory:
            memory.update(self._fresh(state))
        real = torch.from_numpy(seen.step.positions >= 0).to(state.device)
        with torch.autocast(device_type=state.device.type, enabled=False):
            self.passed = pass_tokens(memory, state, real, self.settings, self.mean, self.theta)
        return self.passed.out

    def _fresh(self, state: Tensor) -> Memory:
        rows, dim = len(state), state.shape[-1]
        if self.base is None:
            return empty_state(rows, dim, self.settings, state.device)
        held = len(self.base["n"])
        if held not in (1, rows) or self.base["A"].shape[-1] != dim:
            raise UsageError(
                f"the session holds {held} rows of width {self.base['A'].shape[-1]}; the model was called on {rows} "
                f"rows of width {dim}. Call layer.reset(), or keep one batch per session"
            )
        return {
            name: value.to(state.device).expand(rows, *value.shape[1:]).clone() for name, value in self.base.items()
        }


class AttractorHandle:
    """An attached layer; also a context manager. ``detach()`` takes it off the model."""

    def __init__(self, layer: AttractorLayer, subject: Subject, steerings: Sequence[Steering]) -> None:
        self.layer, self.subject, self.steerings = layer, subject, tuple(steerings)
        self._instrument: Instrument | None = Instrument(subject, (), self.steerings)
        self._instrument.__enter__()

    def __enter__(self) -> AttractorHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def states(self) -> dict[str, Memory]:
        """Slots at each site after the latest forward: ``{"attn_out.12": {"A": …, "s": …, "n": …}}``."""
        return {f"{s.sites[0][0]}.{s.sites[0][1]}": {k: v.clone() for k, v in s.memory.items()} for s in self.steerings}

    def detach(self) -> None:
        """Take the layer off; a second call does nothing. In a session the state is kept for the next sequence."""
        if self._instrument is not None:
            self._instrument.__exit__(None, None, None)
            self._instrument = None
            self.layer._leave(self)


class AttractorLayer(nn.Module):
    """A gated, decaying memory of a few directions, for a frozen model.

    The rule stands in :mod:`dynprobe.controllers.attractor._rule`; settings are those of :class:`Settings`.

    Args:
        preset: ``"duality_v1"``, or None.
        **settings: Any field of :class:`Settings`, such as ``slots=16, gate=1.0, strength=0.05, half_life=46``.

    Raises:
        UsageError: If a setting has no meaning.

    Source:
        The rule of ``github.com/HalcyonAIR/Duality`` (V1) with its defects removed; see ``docs/attractor.md``.

    Example:
        >>> import torch
        >>> from dynprobe.testing import tiny_llama
        >>> model, ids = tiny_llama().model, torch.tensor([[5, 6, 7, 8]])
        >>> layer = AttractorLayer(centre="none", strength=0.5, burn_in=0, theta=0.2, theta_read=0.0)
        >>> with layer.attach(model, layers=[1]) as handle:
        ...     _ = model(ids)
        >>> handle.states["attn_out.1"]["n"].tolist()
        [4]
    """

    def __init__(self, preset: str | None = None, **settings: Any) -> None:
        super().__init__()
        if preset is not None and preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}.{did_you_mean(preset, PRESETS)}")
        start = PRESETS[preset] if preset is not None else Settings()
        self.settings = start.replace(**settings)
        self._centres: dict[str, tuple[Tensor, float]] = {}
        self._base: dict[str, Memory] = {}
        self._in_session = False
        self._made_for: dict[str, Any] = {}

    @property
    def fresh(self) -> bool:
        """Whether its settings tell all of it: nothing was measured or remembered yet."""
        return not self._base and not self._centres

    def extra_repr(self) -> str:
        """Settings that are not the default."""
        default = Settings().as_dict()
        return ", ".join(f"{k}={v!r}" for k, v in self.settings.as_dict().items() if v != default[k])

    def attach(self, model: nn.Module | Subject, layers: int | Sequence[int] | str | None = None) -> AttractorHandle:
        """Put the layer on a model.

        Args:
            model: A decoder, or a subject.
            layers: Blocks, negative ones from the last, or a spec such as ``"50%"``; default the middle one.

        Returns:
            The handle; ``with`` or ``detach()`` takes it off.

        Raises:
            CalibrationError: If the layer is centred on a calibration and none can be made.
            SiteError: If the model has no such site.
        """
        subject = as_subject(model)
        steerings = [Steering(controller, subject) for controller in self.controllers(subject, layers)]
        self._made_for = {"model": subject.name, "dim": subject.dim}
        return AttractorHandle(self, subject, steerings)

    def controllers(self, subject: Subject, layers: int | Sequence[int] | str | None = None) -> list[AttractorSite]:
        """Return a controller for each site, centred as the settings say: what attaching puts to work.

        Args:
            subject: The model.
            layers: As in :meth:`attach`.
        """
        from dynprobe.controllers.attractor._queries import QuerySite

        kind = QuerySite if self.settings.site == "query_mean" else AttractorSite
        found: list[AttractorSite] = []
        for site in self.sites(subject, layers):
            mean, theta = self._centre_of(subject, site)
            base = self._base.get(f"{site[0]}.{site[1]}")
            found.append(kind(self.settings, site, mean=mean, theta=theta, base=base))
        return found

    def sites(self, subject: Subject, layers: int | Sequence[int] | str | None = None) -> list[Site]:
        """Return the sites that attaching would write at."""
        from dynprobe.probes import Where

        if self.settings.site == "query_mean" and self.settings.centring == "calibration":
            raise UsageError("site='query_mean' has no calibrated centre; take centre='running' or centre='none'")
        component = _COMPONENT[self.settings.site]
        spec = "50%" if layers is None else layers if isinstance(layers, str | int) else "+".join(map(str, layers))
        found = subject.sites(Where(layers=spec, component=component), writing=True)
        for site in found:
            subject.module_at(*site)
        return found

    def calibrate(
        self, subject: Subject, layers: int | Sequence[int] | str | None = None, prompts: Any = None
    ) -> AttractorLayer:
        """Measure the centre of each site, and the cosine above which tokens count as alike.

        The centre is the mean of y over the tokens of texts that no study uses, θ the quantile 1 − 0.1/M of the
        cosines of pairs of tokens after it is subtracted: at most one unrelated token in ten hits any of M slots.

        Args:
            subject: The model.
            layers: As in :meth:`attach`.
            prompts: Texts or lists of token ids; default the built-in calibration prompts.

        Returns:
            The layer itself.
        """
        for site in self.sites(subject, layers):
            self._centres[self._key(subject, site)] = measure_centre(subject, site, prompts, slots=self.settings.slots)
        return self

    def _key(self, subject: Subject, site: Site) -> str:
        return f"{subject.facts.get('weights_hash', id(subject.model))}/{site[0]}.{site[1]}"

    def _centre_of(self, subject: Subject, site: Site) -> tuple[Tensor | None, float]:
        s = self.settings
        if s.centring != "calibration":
            return None, _DEFAULT_THETA if s.theta is None else s.theta
        key = self._key(subject, site)
        if key not in self._centres:
            if subject.tokenizer is None:
                raise CalibrationError(
                    f"the layer is centred on a calibration, and {subject.name} has no tokenizer to read its texts "
                    "with. Call layer.calibrate(subject, layers, prompts=token_ids) first, attach to a subject of "
                    "dp.load, or take centre='running' or centre='none'"
                )
            self._centres[key] = measure_centre(subject, site, slots=s.slots)
        mean, theta = self._centres[key]
        return mean.to(subject.device), theta if s.theta is None else s.theta

    def reset(self) -> None:
        """Forget everything: new sequences start with empty slots."""
        self._base.clear()

    def snapshot(self) -> dict[str, Memory]:
        """Return what new sequences start from, by site; empty after a reset."""
        return {site: {k: v.clone() for k, v in state.items()} for site, state in self._base.items()}

    def restore(self, states: Mapping[str, Memory]) -> None:
        """Let new sequences start from these states: a snapshot, or ``handle.states``.

        Raises:
            UsageError: If the number of slots is another.
        """
        for site, state in states.items():
            if state["A"].shape[1] != self.settings.slots:
                raise UsageError(
                    f"the state of {site} has {state['A'].shape[1]} slots; this layer has {self.settings.slots}"
                )
        self._base = {site: {k: v.detach().clone() for k, v in state.items()} for site, state in states.items()}

    @contextmanager
    def session(self) -> Iterator[AttractorLayer]:
        """Keep the memory from one attached sequence to the next inside the block; it is forgotten at the end."""
        before, self._in_session = self.snapshot(), True
        try:
            yield self
        finally:
            self._in_session, self._base = False, before

    def _leave(self, handle: AttractorHandle) -> None:
        if self._in_session:
            self.restore({site: state for site, state in handle.states.items() if "A" in state})

    def save(self, path: str | Path) -> Path:
        """Write settings, centres and the session's state to a safetensors file."""
        return write_layer(Stored(self.settings, self._centres, self._base, self._made_for), path)

    @classmethod
    def load(cls, path: str | Path) -> AttractorLayer:
        """Read a layer from a file.

        Raises:
            UsageError: If the file holds none, or one whose parts do not fit together.
        """
        stored = read_layer(path)
        layer = cls(**stored.settings.as_dict())
        layer._centres, layer._base = dict(stored.centres), dict(stored.base)
        layer._made_for = dict(stored.made_for)
        return layer

    def forward(
        self, y: Float[Tensor, "batch pos dim"], mask: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos dim"]:
        """Pass states ``[batch, pos, dim]`` of new sequences, for use without a model; nothing is kept."""
        real = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device) if mask is None else mask.bool()
        state = empty_state(len(y), y.shape[-1], self.settings, y.device)
        theta = _DEFAULT_THETA if self.settings.theta is None else self.settings.theta
        return pass_tokens(state, y, real, self.settings, None, theta).out
