"""What probes, a controller that watches and an attractor layer cost while a model writes, over its own ``generate``.

Both sides write the same number of tokens greedily, without an end token. Ours records every depth and token, measures
the core set of metrics over the whole text, and has a recovery controller on that watches and never fires. An attractor
layer is attached and detached inside the time, its strength is 1 and its burn-in short, so that it reads, injects and
writes at nearly every token; in a prefill it works in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynprobe import metrics
from dynprobe.controllers import AttractorLayer, Steering
from dynprobe.controllers.recovery import Deadband, Recovery, Slerp
from dynprobe.probes import Calibration, Instrument, Sampling, Subject, Where, generate, make_batch, sites_to_read
from dynprobe.protocols._bench_case import Case, Size, random_ids
from dynprobe.protocols._bench_forward import BARE, bare_forward
from dynprobe.protocols._calibrate import calibrate

__all__ = ["attractor_cases", "generation_case", "plain_generate"]

PLAIN = "plain generate"
#: Tokens of a prompt that is continued.
_PROMPT = 16


def plain_generate(subject: Subject, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """Return the library's own greedy generation of a fixed number of tokens."""
    settings: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True, "num_beams": 1,
        "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    model: Any = subject.model

    @torch.no_grad()
    def plain() -> Tensor:
        found: Tensor = model.generate(ids, **settings)
        return found

    return plain


def _quiet(calibration: Calibration) -> Calibration:
    """The same calibration with levels that no token reaches."""
    signals = {**calibration.signals, "kappa_phase_zmax": calibration.signals["kappa_phase_zmax"] + 1e6}
    return Calibration(calibration.tensors, signals, calibration.header)


def generation_case(subject: Subject, size: Size, wanted: Sequence[str] | None = None) -> Case:
    """Ours in steps, beside the plain call; the tokens of both are compared."""
    calibration, rows, tokens = _quiet(calibrate(subject)), size.batch, size.new_tokens
    width = min(_PROMPT, size.length)
    ids = random_ids(subject, rows, width)
    batch = make_batch(subject, ids.tolist(), side="left", row_keys=[f"row-{i}" for i in range(rows)])
    sampling = Sampling(max_new_tokens=tokens, stop_at_eos=False)
    sites = sites_to_read(subject, Where.parse("layers=all"))
    plain = plain_generate(subject, ids, tokens)
    fired: list[bool] = []

    def ours(read: bool, controlled: bool, measured: bool) -> list[list[int]]:
        steerings = [Steering(Recovery(Deadband(horizon=tokens), Slerp()), subject, calibration)] if controlled else []
        instrument = Instrument(subject, sites if read else (), steerings, **batch.rows)
        new = generate(subject, batch, sampling, instrument)
        fired.extend(bool(s.memory["active"].any()) for s in steerings)
        if measured:
            tape = instrument.tape()
            metrics.measure(list(tape.states), tape.mask, metrics=metrics.CORE)
        return new

    theirs, mine = [row[width:] for row in plain().tolist()], ours(True, True, True)
    facts = {
        "rows": rows, "new_tokens": tokens, "fired": any(fired),
        "texts_that_differ": sum(a != list(b) for a, b in zip(theirs, mine, strict=True)),
    }  # fmt: skip
    arms: dict[str, Callable[[], object]] = {
        PLAIN: plain,
        "our loop alone": lambda: ours(False, False, False),
        "every depth read": lambda: ours(True, False, False),
        "inactive controller": lambda: ours(False, True, False),
        "all of it": lambda: ours(True, True, True),
    }
    return Case("generation", f"{rows} × {tokens}", PLAIN, arms, facts=facts)


def attractor_cases(subject: Subject, size: Size, wanted: Sequence[str] | None = None) -> list[Case]:
    """Generation under a layer at a middle block, and a prefill with chunks of several sizes."""
    held = AttractorLayer().calibrate(subject)
    return [_attractor_generation(subject, held, size), _attractor_prefill(subject, held, size)]


def _acting(held: AttractorLayer, commit_every: int) -> AttractorLayer:
    """A layer that acts at nearly every token, with what was measured for another one."""
    layer = AttractorLayer(strength=1.0, burn_in=4, theta_read=0.0, commit_every=commit_every)
    layer._centres = held._centres
    return layer


def _attractor_generation(subject: Subject, held: AttractorLayer, size: Size) -> Case:
    width = min(_PROMPT, size.length)
    plain = plain_generate(subject, random_ids(subject, size.batch, width), size.new_tokens)

    def under(layer: AttractorLayer) -> Any:
        with layer.attach(subject) as handle:
            plain()
        return handle

    single, chunked = _acting(held, 1), _acting(held, 64)
    ((_, state),) = under(single).states.items()
    facts = {"tokens_seen": state["n"].tolist(), "injected": bool((state["s"] > 0).any())}
    arms: dict[str, Callable[[], object]] = {
        PLAIN: plain, "layer": lambda: under(single), "layer, commit_every=64": lambda: under(chunked)
    }  # fmt: skip
    return Case("attractor", f"generation {size.batch} × {size.new_tokens}", PLAIN, arms, facts=facts)


def _attractor_prefill(subject: Subject, held: AttractorLayer, size: Size) -> Case:
    columns = size.batch * size.length
    columns = min(columns, getattr(getattr(subject.model, "config", None), "max_position_embeddings", None) or columns)
    bare = bare_forward(subject, random_ids(subject, 1, columns, seed=1))

    def under(layer: AttractorLayer) -> Tensor:
        with layer.attach(subject):
            return bare()

    arms: dict[str, Callable[[], object]] = {BARE: bare}
    sizes = list(dict.fromkeys(max(n, 1) for n in (columns, columns // 4, columns // 16, 1)))
    for chunk in sizes:
        layer = _acting(held, chunk)
        arms[f"commit_every={chunk}"] = lambda layer=layer: under(layer)  # type: ignore[misc]
    facts = {"acts": not torch.equal(under(_acting(held, max(columns // 4, 1))), bare()), "chunks": sizes}
    return Case("attractor", f"prefill 1 × {columns}", BARE, arms, facts=facts)
