"""``watch``: one perturbed text with a mode on it, token by token, as it is written.

What a person sees live is what the same controllers do in a study: the same detector, the same calibration, the same
order of writes. A look is for understanding and for demonstrations; one text is no evidence, so nothing is stored.

Readiness is the share of the calibrated band of κ_phase that is left: 1 at its clean median or better, 0 at its 99 %
quantile or beyond. It is a monotone function of κ by construction, and never evidence beside it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dynprobe.controllers import Controller, Memory, Seen, Steering, generate_with
from dynprobe.controllers.recovery import Recovery, Signal, make_mode
from dynprobe.errors import UsageError
from dynprobe.metrics import readiness
from dynprobe.probes import Calibration, Instrument, Sampling, Subject, make_batch
from dynprobe.prompts import passages
from dynprobe.protocols._conditions import Push
from dynprobe.protocols._execute import calibration_of
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._recover_arms import Arm, Arms
from dynprobe.protocols._recover_checks import checked, names_prompts, no_calibration
from dynprobe.protocols._recover_config import DEFAULT_PERTURB, Modes, RecoverConfig

__all__ = ["Moment", "watch"]


@dataclass(frozen=True)
class Moment:
    """What stands when one token has gone through the model.

    Attributes:
        pos: Its position.
        token: Its text; the whole prompt at the first moment.
        text: What has been written after the prompt, this token included.
        signal: What the detector watches.
        q_lo: Lower level of the detector.
        q_hi: Upper level.
        kappa: Mean step angle κ_phase of this token, half-turns.
        readiness: Share of the calibrated band of κ_phase that is left; NaN where the band is degenerate.
        detected: Whether the detector was on at this token.
        active: Whether a controller was active at it.
        gain: Largest gain in force.
        sites: Where something was written, such as ``("resid_post.6",)``.
        energy: ‖u‖²/‖h‖² of what was written at this token, summed over sites.
        restarts: Times so far that tokens were taken back.
    """

    pos: int
    token: str
    text: str
    signal: float
    q_lo: float
    q_hi: float
    kappa: float
    readiness: float
    detected: bool
    active: bool
    gain: float
    sites: tuple[str, ...]
    energy: float
    restarts: int


def watch(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    mode: Modes = "hybrid",
    perturb: Any = DEFAULT_PERTURB,
    **settings: Any,
) -> Iterator[Moment]:
    """Perturb a model while it writes, let a recovery mode act, and look on token by token.

    Args:
        model: Hub id, folder, known name, module, or subject; it must decode with a cache.
        prompts: The first one is taken; default the first built-in passage.
        mode: One recovery mode, or a :class:`dynprobe.Controller` of your own.
        perturb: What to recover from, or None.
        **settings: As in :func:`dynprobe.recover`; nothing is written to ``out``.

    Yields:
        One :class:`Moment` per token that goes through the model, the prompt's last first. Tokens that a mode takes
        back are followed by a moment at an earlier position.

    Raises:
        CalibrationError: If there is no calibration of this model, or the detector's band is empty.
        ModelError: If the model cannot be fed token by token.
        UsageError: If a setting is wrong, or several modes are named.

    Example:
        >>> seen = list(watch("tiny-llama", ["In the beginning God created"], mode="slerp", max_new_tokens=4))
        >>> [m.pos for m in seen], seen[-1].text == "".join(m.token for m in seen[1:])
        ([27, 28, 29, 30], True)
    """
    ready = prepare(
        model, passages() if prompts is None and not names_prompts(settings) else prompts,
        {"mode": mode, "perturb": () if perturb is None else perturb, **settings, "decode": "free", "limit": 1},
        kind=RecoverConfig, resolve=checked,
    )  # fmt: skip
    config = ready.config
    assert isinstance(config, RecoverConfig)
    if len(config.mode) != 1:
        raise UsageError(
            f"one mode can be watched at a time, and {len(config.mode)} were named: {', '.join(config.mode)}"
        )
    calibration = calibration_of(ready)
    if calibration is None:
        raise no_calibration(ready.subject)
    look = _Look(ready, config, calibration)
    return look.moments()


class _Stopped(BaseException):
    """Nobody looks on any more."""


class _Kappa(Controller):
    """Looks at κ_phase and does nothing."""

    id = "kappa"
    reads = "layers=all"

    def __init__(self) -> None:
        self._signal = Signal("kappa_phase")

    def bind(self, subject: Subject, calibration: Calibration | None) -> None:
        """Learn which depths take part."""
        self._signal.bind(subject, calibration)

    def start(self, n_rows: int) -> Memory:
        """Return the memory of new rows."""
        return {"signal": np.full(n_rows, np.nan)}

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Measure this token."""
        memory["signal"] = self._signal.measure(seen, memory)[0][:, -1]


class _Eye(Controller):
    """Comes last in every forward and tells what stands then."""

    id = "eye"

    def __init__(self, tell: Any) -> None:
        self._tell = tell

    def decide(self, seen: Seen, memory: Memory) -> None:
        """Tell."""
        self._tell(seen)


class _Look:
    """One text, written in a thread of its own so that it can be looked at while it comes."""

    def __init__(self, ready: Prepared, config: RecoverConfig, calibration: Calibration) -> None:
        self._ready, self._config = ready, config
        subject = self.subject = ready.subject
        arm = Arm(f"perturbed+{config.mode[0]}", "free", bool(ready.perturbs), config.mode[0])
        push = Push(subject, ready.perturbs, calibration) if ready.perturbs else None
        arms = Arms(subject, config, calibration, ready.perturbs, push.writers if push is not None else list)
        arms.check(arm)
        made = make_mode(config.mode[0], config.deadband, site=config.site, operators=config.operators)
        self._band = config.deadband()
        remember = any(c.restarts for c in made)
        bound = partial(Steering, subject=subject, calibration=calibration, remember=remember)
        self._acting = [bound(controller) for controller in made]
        self._watcher = bound(Recovery(self._band, None, name="passive"))
        self._kappa = bound(_Kappa())
        self._eye = bound(_Eye(self._note))
        self._writers = push.writers() if push is not None else []
        self._usual = (calibration.quantile("kappa_phase", 0.5), calibration.quantile("kappa_phase", 0.99))
        self._queue: queue.Queue[Moment | BaseException | None] = queue.Queue()
        self._gone = threading.Event()
        self._tokens: list[int] = []
        self._restarts = 0

    def moments(self) -> Iterator[Moment]:
        """Yield what stands after each token."""
        thread = threading.Thread(target=self._write, name="dynprobe-watch", daemon=True)
        thread.start()
        try:
            while (found := self._queue.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            self._gone.set()
            thread.join()

    def _write(self) -> None:
        config, steerings = self._config, [*self._acting, self._watcher, self._kappa, self._eye]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed, 0, config.stop_at_eos)
        row = list(self._ready.rows[0])
        batch = make_batch(self.subject, [row], side="left", row_keys=[self._ready.prompts[0].prompt_id])
        instrument = Instrument(self.subject, (), [*self._writers, *steerings], **batch.rows)
        try:
            generate_with(self.subject, batch, sampling, instrument, steerings)
            self._queue.put(None)
        except _Stopped:
            self._queue.put(None)
        except BaseException as error:  # whatever it is belongs to whoever looks on
            self._queue.put(error)

    def _note(self, seen: Seen) -> None:
        if self._gone.is_set():
            raise _Stopped
        step = seen.step
        pos, n_prompt = int(step.positions[0, -1]), len(self._ready.rows[0])
        if not seen.decoding:
            self._tokens, token = [], self._ready.prompts[0].text
        else:
            assert step.token_ids is not None
            self._restarts += pos - n_prompt < len(self._tokens)
            self._tokens = [*self._tokens[: pos - n_prompt], int(step.token_ids[0, -1])]
            token = self._decoded()[len(self._decoded(self._tokens[:-1])) :]
        done = [table[table["pos"] == pos] for table in (s.actions() for s in self._acting)]
        watched = self._watcher.actions().iloc[-1]
        kappa = float(self._kappa.memory["signal"][0])
        gains = [float(t["gain"].max()) for t in done if len(t) and t["gain"].notna().any()]
        self._queue.put(Moment(
            pos, token, self._decoded(), float(watched["signal"]), self._band.q_lo, self._band.q_hi, kappa,
            float(readiness([kappa], *self._usual)[0]), bool(watched["active"]),
            any(bool((t["active"] | (t["energy"] > 0)).any()) for t in done), max(gains, default=0.0),
            tuple(dict.fromkeys(site for t in done for site in t["site"] if site)),
            float(sum(t["energy"].sum() for t in done)), self._restarts,
        ))  # fmt: skip

    def _decoded(self, tokens: Sequence[int] | None = None) -> str:
        tokens = self._tokens if tokens is None else tokens
        if self.subject.tokenizer is None:
            return " ".join(str(token) for token in tokens)
        return str(self.subject.tokenizer.decode(list(tokens)))
