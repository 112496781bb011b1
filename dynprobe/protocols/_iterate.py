"""``iterate``: what more iterations of a looped model buy, at fixed weights and on fixed texts.

Every text is read at each number of iterations T. Where the loop feeds the readout directly (a CSM-style model), one
long forward holds all of them: its state after T updates is the last state of a run of T. That is checked once, before
the units and for whoever does them, on a few prompts against a run of its own. Where it does not hold, or where every
layer has a loop of its own (CEM) so that more iterations below change what stands above, there is one forward per T.

Two numbers that are often taken for one stand side by side: ``converged_at`` (from where on Δ stays below a tolerance)
and ``best_iteration`` (where the loss is lowest). A model whose Δ shrinks need not predict better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import nn

from dynprobe import metrics
from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, Perturb, Subject, make_writers, readout, warn_beyond
from dynprobe.protocols._arms import Passage, Text, forced
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._call import Call
from dynprobe.protocols._conditions import resolve_perturbations
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._execute import Begin, Listener, Progress, execute
from dynprobe.protocols._halving import in_parts
from dynprobe.protocols._iterate_split import difficulty, iteration_summary
from dynprobe.protocols._iterations import at_iterations, cut, right_answers, with_best
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._prompts import answer_tokens
from dynprobe.protocols._tables import Labels, passage_tables
from dynprobe.runs import Run, RunWriter

__all__ = ["ITERATIONS", "IterateConfig", "iterate"]

#: Numbers of iterations at which CSM results are published.
ITERATIONS = (3, 5, 10, 15, 20, 25, 30, 40, 45)
#: Those of a model that needs a forward for each.
_NESTED = tuple(range(1, 9))
#: Largest deviation of logits, in their SD, between a long run cut at T and a run of T.
_PREFIX_LIMIT = 1e-3
#: Prompts that are asked for it.
_PREFIX_ROWS = 8


class IterateConfig(RunConfig):
    """Settings of :func:`iterate`."""

    iterations: tuple[int, ...] = Field((), description="Numbers of iterations; default 3,5,10,…,45, or 1…8 in CEM.")
    tol: float = Field(0.03, gt=0, description="Relative Δ below which a text counts as converged.")
    patience: int = Field(2, ge=1, description="Updates in a row that must stay below it.")
    split_by: str | None = Field(None, description="Model whose loss says which tokens are hard; same tokenizer.")
    max_new_tokens: int = Field(0, ge=0, le=0, description="Texts are read, not written.")
    perturb: tuple[str, ...] = Field((), description="Perturbations, added as an arm of their own at every T.")

    @field_validator("iterations", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> tuple[int, ...]:
        items = str(value).replace("+", ",").split(",") if isinstance(value, str | int) else list(value)
        try:
            numbers = tuple(int(item) for item in items if str(item).strip())
        except ValueError as error:
            raise ValueError("whole numbers such as 3,5,10") from error
        if any(number < 1 for number in numbers):
            raise ValueError("numbers of iterations from 1 on; the state before the first has no update to measure")
        return tuple(sorted(set(numbers)))

    def identity(self) -> dict[str, Any]:
        """Return the settings that define the numbers of this study."""
        return {**super().identity(), "protocol": "iterate"}


def iterate(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    iterations: str | int | Sequence[int] = (),
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Read texts at several numbers of iterations.

    Args:
        model: A looped model: hub id, folder, known name, module, or subject.
        prompts: Texts, token ids or prompts, or a path to a file of them; default the 24 built-in ones. Prompts with an
            ``answer`` give accuracy too, and their loss is the answer's.
        iterations: Numbers of iterations; default 3, 5, 10, …, 45 (1 … 8 in a model with a loop per layer).
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any field of :class:`IterateConfig`: ``split_by``, ``tol``, ``perturb``, ``out``, ….

    Returns:
        The run; ``run.samples`` has one row per prompt and T, ``run.summary["iterations"]`` the means with intervals.

    Raises:
        UsageError: If the model has no loop whose length can be chosen, or a setting is wrong.

    Example:
        >>> import tempfile
        >>> from dynprobe.models import CsmConfig, CsmForCausalLM
        >>> model = CsmForCausalLM(CsmConfig.preset("nano"))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     done = iterate(model, [[5, 6, 7, 8], [9, 10, 11]], iterations=[1, 3], out=out)
        ...     [(row["iterations"], row["n"]) for row in done.summary["iterations"]]
        [(1, 2), (3, 2)]
    """
    if listener is not None:
        listener(Progress("load"))
    settings = {"iterations": iterations, **settings}
    return execute(*open_iterate(model, prompts, settings), listener, Call("iterate", model, settings))


def open_iterate(model: Any, prompts: Any, settings: Mapping[str, Any]) -> tuple[Prepared, Begin]:
    """Everything of a study of iterations but its units."""
    ready = prepare(model, prompts, settings, kind=IterateConfig, resolve=_perturbs)
    subject, config = ready.subject, ready.config
    assert isinstance(config, IterateConfig)
    numbers = config.iterations or (ITERATIONS if subject.loop is not None and subject.loop.prefix else _NESTED)
    beyond = warn_beyond(subject, numbers)
    for T in numbers if ready.perturbs else numbers[-1:]:  # what is refused is refused before anything is written
        with at_iterations(subject, T) as other:
            make_writers(other, ready.perturbs)
    return ready, lambda calibration, exact: _Iterate(ready, calibration, exact, numbers, beyond)


def _perturbs(subject: Subject, config: Any, given: Sequence[Perturb | str]) -> list[Perturb]:
    if config.states or config.lens or config.num_samples != 1:
        raise UsageError("dynprobe iterate takes no --states, --lens or --num-samples; dynprobe run stores states")
    found = resolve_perturbations(subject, config, given)
    for perturb in found:
        if perturb.noise_scale.calibrated:
            raise UsageError(
                f"scale={perturb.scale} is calibrated at the iterations that the model makes now, and dynprobe iterate "
                "changes their number; take relnorm, mad or abs"
            )
    return found


@dataclass(eq=False)
class _Iterate:
    """The experiment: one unit is a group of prompts, read at every T."""

    ready: Prepared
    calibration: Calibration | None
    exact: bool
    numbers: tuple[int, ...]
    beyond: str = ""

    def __post_init__(self) -> None:
        self.config: IterateConfig = self.ready.config  # type: ignore[assignment]
        self.subject, loop = self.ready.subject, self.ready.subject.loop
        assert loop is not None
        self.loop = loop
        self.trained = loop.trained(self.subject.model) if loop.trained is not None else None

    def conditions(self) -> pd.DataFrame:
        """Return one condition per T, and one more where something is written."""
        rows = []
        for T in self.numbers:
            rows.append({"condition_id": f"T{T}", "arm": "clean", "alpha": 0.0, "iterations": T})
            for perturb in self.ready.perturbs[:1]:
                rows.append({
                    "condition_id": f"T{T}|perturbed", "arm": "perturbed", "iterations": T,
                    "alpha": perturb.alpha, "scale": perturb.scale, "kind": perturb.kind, "seed": perturb.seed,
                    "where": " & ".join(str(p.where) for p in self.ready.perturbs),
                    "params": [str(p) for p in self.ready.perturbs],
                })  # fmt: skip
        return pd.DataFrame(rows).assign(decode_mode="forced")

    def plan(self) -> list[Any]:
        """Return groups of prompts, each told what was found out before: workers may not come to different answers."""
        n = self.numbers[-1] * max(1, len({t.layer for t in self.subject.turns}))
        groups = plan_batches(
            [len(self._text(i).fed) for i in range(len(self.ready.rows))], max_new_tokens=0, n_layers=n,
            dim=self.subject.width,
            vocab=self.subject.vocab_size or 1, batch_size=self.config.batch_size, exact=self.exact, early=False,
        )  # fmt: skip
        decided = self._decided(groups[0])
        return [{"prompts": group, **decided} for group in groups]

    def _decided(self, group: Sequence[int]) -> dict[str, Any]:
        """Whether one long run holds the shorter ones, and how far a few prompts of a group were off."""
        if not self.loop.prefix or len(self.numbers) == 1:
            return {"one_pass": self.loop.prefix}
        few = group[:_PREFIX_ROWS]
        found = in_parts(self.ready, few, lambda some: self._check_prefix([self._text(i) for i in some]))
        deviation = float(np.max(list(found)))
        return {"one_pass": deviation <= _PREFIX_LIMIT, "prefix_deviation": deviation}

    def _text(self, index: int) -> Text:
        prompt = self.ready.prompts[index]
        row: Sequence[int] = self.ready.rows[index]
        answer = () if prompt.answer is None else answer_tokens(self.subject, prompt, row, self.config.chat_template)
        return Text(prompt.prompt_id, tuple(row), answer)

    @cached_property
    def _span(self) -> str:
        """Tokens of token-axis metrics: answers where any prompt has one, whoever else is in the batch."""
        return "new" if any(self._text(i).new for i in range(len(self.ready.rows))) else "prompt"

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Read a group of prompts at every T."""
        chosen, facts = self.rows_of(unit), self._facts(unit)
        texts = [self._text(i) for i in chosen]
        tables: dict[str, list[pd.DataFrame]] = {}
        for arm in ("", "|perturbed")[: 1 + bool(self.ready.perturbs)]:
            for T, passage, last in self._passages(texts, bool(arm), facts["one_pass"]):
                prompts = [self.ready.prompts[i] for i in chosen]
                labels = Labels(
                    f"T{T}{arm}", [p.prompt_id for p in prompts], [p.category for p in prompts], 0, [None] * len(chosen)
                )
                made = passage_tables(
                    passage, labels, span=self._span, perturbed=bool(arm), calibration=self.calibration
                )
                made["samples"] = made["samples"].assign(iterations=T, **self._at_the_end(passage, T))
                # Clean states of a shorter run are those of the longest, which is stored; a written arm's need not be.
                if not (arm or last) and facts["one_pass"]:
                    del made["depths"], made["profiles"]
                for name, table in made.items():
                    tables.setdefault(name, []).append(table)
        done = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
        done["samples"] = with_best(done["samples"])
        return Produced(done, facts=facts)

    def _facts(self, unit: Any) -> dict[str, Any]:
        """What a unit was told."""
        if not isinstance(unit, Mapping):  # planned by an older version
            return self._decided(unit)
        return {name: value for name, value in unit.items() if name != "prompts"}

    def _passages(self, texts: list[Text], perturbed: bool, one_pass: bool) -> Iterator[tuple[int, Passage, bool]]:
        which = (*metrics.CORE, *self.config.metrics, *self._convergence)
        if one_pass and not perturbed:
            with at_iterations(self.subject, self.numbers[-1]) as longest:
                whole = forced(longest, texts, span=self._span, which=which)
                for T in self.numbers[:-1]:
                    yield T, cut(whole, T, which, self._span), False
                yield self.numbers[-1], whole, True
                return
        for T in self.numbers:
            with at_iterations(self.subject, T) as subject:
                writers = make_writers(subject, self.ready.perturbs, calibration=None) if perturbed else []
                yield T, forced(subject, texts, writers, span=self._span, which=which), self.numbers[-1] == T

    @property
    def _convergence(self) -> tuple[str, ...]:
        """Convergence is a property of one loop; a model with a loop per layer has no track that converges."""
        if len({(t.layer, t.stage) for t in self.subject.turns}) > 1:
            return ()
        return (f"converge.iterations/1{{of=delta_rel_prev,tol={self.config.tol:g},patience={self.config.patience}}}",)

    def _check_prefix(self, texts: list[Text]) -> float:
        """Largest deviation of logits, in their SD, of the longest run cut at the smallest T from a run of that T."""
        T = self.numbers[0]
        with at_iterations(self.subject, self.numbers[-1]) as longest:
            whole = forced(longest, texts, which=())
            with torch.no_grad():
                cut_there = readout(longest, whole.tape.states[T])
        with at_iterations(self.subject, T) as subject:
            own = forced(subject, texts, which=())
        assert own.logits is not None
        real = whole.mask.to(cut_there.device)
        spread = max(float(own.logits[real].double().std()), 1e-12)
        return float((cut_there[real].double() - own.logits[real].double()).abs().max()) / spread

    def _at_the_end(self, passage: Passage, T: int) -> dict[str, Any]:
        """Δ of the last update with its radial and angular part, the energy, and whether the answer is right."""
        depth, keep = passage.measured.depth, passage.measured.keep
        last = {
            "delta_last": depth["delta_rel_prev"][-1], "delta_last_angle": depth["angle"][-1] / np.pi,
            "delta_last_radial": _radial(passage),
        }  # fmt: skip
        if "energy" in passage.tape.energies:
            last["energy_last"] = passage.tape.energies["energy"][-1].numpy()
        out: dict[str, Any] = {}
        for name, grid in last.items():
            ok = keep & np.isfinite(grid)
            with np.errstate(invalid="ignore", divide="ignore"):
                out[name] = np.where(ok, grid, 0.0).sum(1) / np.where(ok.sum(1), ok.sum(1), np.nan)
        out["trained_iterations"] = self.trained if self.trained is not None else math.nan
        if any(t.new for t in passage.texts):
            out["right"] = right_answers(passage)
        return out

    def _all_in_one_pass(self, writer: RunWriter) -> bool:
        """What the units went by, whoever did them; this process may have done none."""
        found = [facts["one_pass"] for facts in writer.manifest.batch_facts.values()]
        return all(all(one) if isinstance(one, list) else one for one in found)

    def rows_of(self, unit: Any) -> Sequence[int]:
        """Return the prompts of a unit."""
        found: Sequence[int] = unit["prompts"] if isinstance(unit, Mapping) else unit
        return found

    def with_rows(self, unit: Any, rows: Sequence[int]) -> Any:
        """Return the unit of some of its prompts."""
        return {**unit, "prompts": list(rows)} if isinstance(unit, Mapping) else list(rows)

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """There is no first table: one unit holds every T."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Means over prompts at each T, and over hard and easy tokens where a split was asked for."""
        notes = [self.beyond] if self.beyond else []
        hard = None
        if self.config.split_by is not None:
            texts = [self._text(i) for i in range(len(self.ready.rows))]
            hard = difficulty(self.config.split_by, self.subject, self.ready.prompts, texts)
        return {
            "protocol": "iterate", "trained_iterations": self.trained, "one_pass": self._all_in_one_pass(writer),
            "notes": notes, **iteration_summary(run, self.numbers, hard, self.config.split_by),
        }  # fmt: skip


def _radial(passage: Passage) -> np.ndarray:
    """|ln of the growth of the norm| of the last update, ``[batch, pos]``; the mean over slots where there are some."""
    before, after = (torch.linalg.vector_norm(passage.tape.states[d].double(), dim=-1) for d in (-2, -1))
    grown = (after / before).log().abs().cpu()
    return np.asarray(grown.mean(-1) if grown.dim() == 3 else grown)
