"""``recover``: does closing a loop around a model undo what noise did to it, and did the loop know when to act?

Three questions are kept apart. Does the detector see the noise (its power on texts that took no part in its
calibration, before any mode acts)? Does a mode undo the damage when it acts (its recovery fraction, by the detector,
always, and exactly when the noise is there)? And is it the direction of its writes that does it (against writes of the
same energy in random directions)? A metric that a controller acts on recovers by construction, so every fraction is
given on metrics that it does not act on as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from dynprobe import metrics
from dynprobe.errors import UsageError
from dynprobe.probes import Calibration, PerturbWriter, Sampling, Subject, generate, make_batch
from dynprobe.prompts import passages
from dynprobe.protocols._arms import Passage, Text, forced
from dynprobe.protocols._batch import Produced
from dynprobe.protocols._conditions import Push
from dynprobe.protocols._execute import Listener, Progress, execute
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._prepare import Prepared, prepare
from dynprobe.protocols._prompts import answer_tokens
from dynprobe.protocols._recover_arms import ArmResult, Arms, arms_of
from dynprobe.protocols._recover_checks import checked, names_prompts, no_calibration, possible
from dynprobe.protocols._recover_config import DEFAULT_PERTURB, Modes, RecoverConfig, listed
from dynprobe.protocols._recover_summary import detector_summary, fraction_table, recovery_summary
from dynprobe.protocols._tables import Labels, passage_tables
from dynprobe.runs import Run, RunWriter, open_run
from dynprobe.runs._find import find_run

__all__ = ["no_calibration", "recover"]

_ONCE = "clean.oneforward"


def recover(
    model: str | nn.Module | Subject,
    prompts: Sequence[Any] | Path | None = None,
    *,
    mode: Modes = "hybrid",
    perturb: Any = DEFAULT_PERTURB,
    listener: Listener | None = None,
    **settings: Any,
) -> Run:
    """Perturb a model, close a loop around it, and measure what the loop brought back.

    RF = (Σ m_pert − Σ m_rec)/(Σ m_pert − Σ m_clean) over prompts: 1 is full recovery, 0 none, below 0 harm.

    Args:
        model: Hub id, folder, known name, module, or subject; it must decode with a cache.
        prompts: Texts or prompts; prompts with a ``continuation`` are read along it, others along the clean model's
            own text. Default: built-in passages with their continuation.
        mode: Recovery modes, ``"all"``, modes of another package, or :class:`dynprobe.Controller` objects of your own.
        perturb: What to recover from; None only watches clean text.
        listener: Called with :class:`dynprobe.protocols.Progress`.
        **settings: Any field of :class:`RecoverConfig`: ``detector``, ``gain``, ``budget``, ``decode``, ….

    Returns:
        The run; ``run.summary["detector"]`` is the detector's power, ``run.summary["arms"]`` one entry per arm,
        ``run.summary["recovery"]`` the recovery fractions with intervals, ``run.table("actions")`` every write.

    Raises:
        CalibrationError: If there is no calibration of this model, or the detector's band is empty.
        ModelError: If the model cannot be fed token by token.
        UsageError: If a setting is wrong.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     done = recover("tiny-llama", mode="slerp", perturb="alpha=0.9", limit=2, max_new_tokens=6, out=out)
        ...     sorted({arm["timing"] for arm in done.summary["arms"] if arm.get("mode") == "slerp"})
        ['always', 'detector', 'oracle', 'replay']
    """
    if listener is not None:
        listener(Progress("load"))
    given = () if perturb is None else perturb
    ready = prepare(
        model, passages() if prompts is None and not names_prompts(settings) else prompts,
        {"mode": mode, "perturb": given, **settings}, kind=RecoverConfig, resolve=checked,
    )  # fmt: skip
    if "all" in listed(mode):
        ready = possible(ready)
    return execute(ready, lambda calibration, exact: _Recover(ready, calibration, exact, listener), listener)


@dataclass(eq=False)
class _Recover:
    """The experiment: first the detector on every batch, then the modes on every batch."""

    ready: Prepared
    calibration: Calibration | None
    exact: bool
    listener: Listener | None

    def __post_init__(self) -> None:
        config = self.ready.config
        assert isinstance(config, RecoverConfig)
        self.config: RecoverConfig = config
        self.subject = self.ready.subject
        if self.calibration is None:
            raise no_calibration(self.subject)
        config.deadband().bind(self.subject, self.calibration)  # what is refused is refused before anything is run
        self.arms = arms_of(config, bool(self.ready.perturbs))
        for arm in self.arms:
            if arm.mode is not None and arm.timing != "replay":
                self._runner().check(arm)
        self._said = False

    def _runner(self) -> Arms:
        known = self.calibration is not None and "limen_ct" in self.calibration.signals
        theta = self.calibration.quantile("limen_ct", 0.9) if known and self.calibration is not None else None
        assert self.calibration is not None
        return Arms(self.subject, self.config, self.calibration, self.ready.perturbs, self._writers, theta)

    def _writers(self) -> list[PerturbWriter]:
        return Push(self.subject, self.ready.perturbs, self.calibration).writers()

    def plan(self) -> list[Any]:
        """Return batches, each twice: for the detector, and for the modes."""
        n = self.config.max_new_tokens
        batches = plan_batches(
            [len(r) for r in self.ready.rows], max_new_tokens=n, n_layers=self.subject.n_layers,
            dim=self.subject.width, vocab=self.subject.vocab_size or 1, batch_size=self.config.batch_size,
            exact=self.exact, early=False,
        )  # fmt: skip
        return [[part, *batch] for part in (0, 1) for batch in batches]

    def conditions(self) -> pd.DataFrame:
        """Return one condition per arm."""
        perturbs = self.ready.perturbs
        one = perturbs[0] if len(perturbs) == 1 else None
        rows = [{"condition_id": _ONCE, "arm": "clean", "decode_mode": "forced", "alpha": 0.0}]
        for arm in self.arms:
            rows.append({
                "condition_id": arm.condition_id, "arm": arm.kind, "decode_mode": arm.decode,
                "controller": None if arm.mode is None else f"{arm.mode} ({arm.timing})",
                "alpha": (one.alpha if one else None) if arm.perturbed else 0.0,
                "scale": one.scale if one and arm.perturbed else None,
                "kind": one.kind if one and arm.perturbed else None,
                "where": str(one.where) if one and arm.perturbed else None,
                "seed": one.seed if one and arm.perturbed else None,
                "params": [str(p) for p in perturbs] if arm.perturbed else None,
                "temperature": self.config.temperature, "top_p": self.config.top_p,
                "max_new_tokens": self.config.max_new_tokens,
            })  # fmt: skip
        table = pd.DataFrame(rows)
        table["seed"] = table["seed"].astype("Int64")
        for name in ("controller", "scale", "kind", "where"):  # empty in every row where nothing acts or is perturbed
            table[name] = table[name].astype(object).where(table[name].notna(), None)
        return table

    def _texts(self, chosen: Sequence[int]) -> list[Text]:
        """The rows with the continuation they are read along."""
        n = self.config.max_new_tokens
        prompts = [self.ready.prompts[i] for i in chosen]
        blank = [Text(p.prompt_id, tuple(self.ready.rows[i])) for p, i in zip(prompts, chosen, strict=True)]
        missing = [k for k, p in enumerate(prompts) if p.continuation is None]
        own: dict[int, tuple[int, ...]] = {}
        if missing:  # its own clean text is what a model without a given continuation is read along
            rows = [blank[k] for k in missing]
            batch = make_batch(self.subject, [t.prompt for t in rows], side="left", row_keys=[t.row_key for t in rows])
            new = generate(self.subject, batch, Sampling(n, stop_at_eos=False))
            own = dict(zip(missing, (tuple(t) for t in new), strict=True))
        texts = []
        for k, (prompt, text) in enumerate(zip(prompts, blank, strict=True)):
            following = own.get(k)
            if following is None:
                assert prompt.continuation is not None
                asked = replace(prompt, answer=prompt.continuation)
                following = answer_tokens(self.subject, asked, list(text.prompt), self.config.chat_template)[:n]
            if len(following) < 2:
                raise UsageError(f"the continuation of prompt {prompt.prompt_id!r} has one token; a loop needs two")
            texts.append(replace(text, new=tuple(following)))
        return texts

    def work(self, unit: Any, early: Callable[[pd.DataFrame], None] | None) -> Produced:
        """Run the detector's arms, or the modes', on one batch."""
        part, *chosen = unit
        runner, texts = self._runner(), self._texts(chosen)
        tables: dict[str, list[pd.DataFrame]] = {}
        forced_clean = next((arm for arm in self.arms if arm.condition_id == "clean.forced"), None)
        base = runner.run(forced_clean, texts) if forced_clean is not None else None
        clean = base.passages[0][0] if base is not None else None
        if part == 0:
            self._watch(tables, runner, texts, chosen, base)
        else:
            self._say_power()
            done: dict[str, ArmResult] = {}
            for arm in (a for a in self.arms if a.mode is not None):
                result = runner.run(arm, texts, done.get(arm.condition_id.replace("random:", "")))
                if arm.timing != "replay":  # a control replays what was written; the states would fill the memory
                    done[arm.condition_id] = replace(result, passages=[])
                self._keep(tables, result, chosen, clean)
        return Produced({name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})

    def _watch(
        self, tables: dict[str, list[pd.DataFrame]], runner: Arms, texts: Sequence[Text], chosen: Sequence[int],
        base: ArmResult | None,
    ) -> None:  # fmt: skip
        """Clean and perturbed, with the detector looking on."""
        clean = base.passages[0][0] if base is not None else None
        if clean is not None:
            once = runner.once(texts)
            same = torch.equal(once.mask, clean.mask)  # texts of several lengths stand in other columns
            self._add(tables, _ONCE, [(once, [])], chosen, clean if same else None)
        for arm in (a for a in self.arms if a.mode is None):
            ready = base is not None and arm.condition_id == "clean.forced"
            result = base if ready and base is not None else runner.run(arm, texts)
            self._keep(tables, result, chosen, clean)

    def _keep(
        self, tables: dict[str, list[pd.DataFrame]], result: ArmResult, chosen: Sequence[int], clean: Passage | None
    ) -> None:
        samples = self._add(
            tables, result.arm.condition_id, result.passages, chosen, clean if result.arm.decode == "forced" else None,
            perturbed=result.arm.perturbed,
        )  # fmt: skip
        tables["samples"][-1] = pd.concat([samples, result.rows.set_axis(samples.index)], axis=1)
        if result.arm.decode == "free":
            tables["samples"][-1]["nll_bare"] = self._nll_bare(result)
        ids = samples["sample_id"].to_numpy()
        actions = result.actions.assign(sample_id=ids[result.actions["row"].to_numpy(int)]).drop(columns="row")
        tables.setdefault("actions", []).append(actions)

    def _add(
        self, tables: dict[str, list[pd.DataFrame]], condition: str,
        measured: Sequence[tuple[Passage, list[PerturbWriter]]], chosen: Sequence[int], clean: Passage | None,
        *, perturbed: bool = False,
    ) -> pd.DataFrame:  # fmt: skip
        """Tabulate the rows of one arm; returns its samples."""
        made: dict[str, list[pd.DataFrame]] = {}
        start = 0
        for passage, writers in measured:
            part = chosen[start : start + len(passage.texts)]
            start += len(part)
            pairing: dict[str, Any] = {}
            if clean is not None and condition != "clean.forced":
                assert clean.logits is not None
                assert passage.logits is not None
                n_prompt = [len(t.prompt) for t in passage.texts]
                length = passage.mask.shape[1]
                first = [w.first_position(n_prompt, length) for w in writers] or [np.asarray(n_prompt)]
                pairing = {
                    "clean": clean, "paired": metrics.paired(clean.measured, passage.measured),
                    "paired_outputs": metrics.paired_output(clean.logits, passage.logits),
                    "divergence": metrics.diverge(list(clean.tape.states), list(passage.tape.states), passage.mask),
                    "affected_from": np.maximum(np.min(first, axis=0), 1),
                }  # fmt: skip
            labels = self._labels(passage, condition, part)
            found = passage_tables(
                passage, labels, span="new", perturbed=perturbed, calibration=self.calibration, **pairing
            )
            for name, table in found.items():
                made.setdefault(name, []).append(table)
        for name, parts in made.items():
            tables.setdefault(name, []).append(pd.concat(parts, ignore_index=True))
        return tables["samples"][-1]

    def _labels(self, passage: Passage, condition: str, chosen: Sequence[int]) -> Labels:
        tokenizer, prompts = self.subject.tokenizer, [self.ready.prompts[i] for i in chosen]
        texts = [tokenizer.decode(list(t.new)) if tokenizer is not None else None for t in passage.texts]
        return Labels(condition, [p.prompt_id for p in prompts], [p.category for p in prompts], 0, texts)

    def _nll_bare(self, result: ArmResult) -> list[float]:
        """NLL of what was written under the model with nothing on it."""
        found: list[float] = []
        for passage, _ in result.passages:
            judged = forced(self.subject, passage.texts, side="left", which=())
            for i, text in enumerate(passage.texts):
                nll = judged.outputs["nll"][i][judged.mask[i].numpy()]
                found.append(float(np.mean(nll[len(text.prompt) - 1 :])))
        return found

    def _say_power(self) -> None:
        """Before the first mode acts, tell what the detector can see, over all prompts."""
        if self._said or self.listener is None:
            return
        self._said = True
        out = Path(self.config.out)
        folder = out if (out / "manifest.json").is_file() else find_run(out, self.ready.ident)
        assert folder is not None  # the run that is being written
        power = detector_summary(open_run(folder), self.config, self.ready.perturbs)
        self.listener(Progress("detector", summary={"detector": power}))

    def rows_of(self, unit: Sequence[int]) -> Sequence[int]:
        """Return the prompts of a unit."""
        return unit[1:]

    def with_rows(self, unit: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Return the unit of some of its prompts."""
        return [unit[0], *rows]

    def first_look(self, samples: pd.DataFrame) -> dict[str, Any]:
        """There is no first table: the detector's power is said when it is known."""
        return {}

    def summarise(self, run: Run, writer: RunWriter) -> dict[str, Any]:
        """Detector, arms, recovery fractions, harm."""
        assert self.calibration is not None
        found = recovery_summary(run, self.arms, self.config, self.calibration, self.ready.perturbs)
        writer.update(detector_band=found["band"])
        if found["recovery"]:
            writer.write_table("fits", fraction_table(found["recovery"]))
        return {"protocol": "recover", **found}
