"""What a threshold is asked for: the writes it searches, and what it cannot be asked together with."""

from __future__ import annotations

from collections.abc import Sequence

from dynprobe.errors import UsageError
from dynprobe.probes import Perturb, Subject
from dynprobe.protocols._criteria import criterion_named
from dynprobe.protocols._grid import grid_of, in_order
from dynprobe.protocols._null import refuse_without_paraphrases
from dynprobe.protocols._prepare import Prepared
from dynprobe.protocols._prompts import answer_tokens
from dynprobe.protocols._threshold_config import BOTH_SCALES, ThresholdConfig
from dynprobe.protocols._trials import positions_of

__all__ = ["refuse_impossible", "writes_of"]


def writes_of(subject: Subject, config: ThresholdConfig, given: Sequence[Perturb | str]) -> list[Perturb]:
    if given:
        raise UsageError("a threshold takes --layers, --scale, --kind, --seeds and --positions, not --perturb")
    if config.scale == BOTH_SCALES and subject.tokenizer is None:
        raise UsageError(
            f"thresholds are given under relnorm and coordstd, and coordstd needs a calibration; {subject.name} has no "
            "tokenizer to read the calibration prompts with. Name one scale: --scale relnorm"
        )
    found = [perturb for _, _, perturb in grid_of(subject, config, alphas=[1e-3])]
    for perturb in found:
        if perturb.kind in ("sine", "impulse"):
            raise UsageError(f"kind={perturb.kind} is a probe signal; dynprobe run reads its response")
    return in_order(found)


def refuse_impossible(ready: Prepared) -> None:
    config: ThresholdConfig = ready.config  # type: ignore[assignment]
    if config.num_samples != 1 or config.states or config.lens or config.max_new_tokens:
        raise UsageError(
            "a threshold takes no --num-samples, --states, --lens or --max-new-tokens: it is teacher-forced"
        )
    if config.metrics:
        raise UsageError("a threshold reads its criterion and stores no other metric; dynprobe sweep takes --metrics")
    if min(config.alphas, default=1.0) < 0:
        raise UsageError(
            f"a threshold lies on a scale of strengths, and {min(config.alphas):g} is negative; the flipped sign is "
            "another direction: dynprobe sweep --controls sign"
        )
    if config.alphas and len({a for a in config.alphas if a > 0}) < 2:
        raise UsageError(
            "a threshold is read off between strengths; give at least two of them, e.g. --alphas 0.01:10:32"
        )
    if config.estimand == "mean" and not config.alphas:
        raise UsageError("the mean response needs the same strengths for all prompts; add --alphas 0.01:10:32")
    if config.level is not None and len(config.criterion) > 1:
        raise UsageError("--level belongs to one criterion; name one")
    if "kappa" in config.criterion and config.null == "paraphrase" and config.level is None:
        refuse_without_paraphrases(ready.prompts)
    if config.level is not None and config.criterion[0] != "kappa" and config.level <= 0:
        raise UsageError(f"level={config.level:g} is reached where nothing is written; give one above 0")
    if config.each_position and not any(
        positions_of(perturb, len(row)) for perturb in ready.perturbs for row in ready.rows
    ):
        raise UsageError(
            f"{config.positions or '1:'} is no position of any prompt; give longer prompts, or --positions all"
        )
    for name in config.criterion:
        low, high = config.strengths(criterion_named(name))
        if not low < high:
            raise UsageError(f"alpha_min={low:g} is not below alpha_max={high:g}")
    if "task" in config.criterion:
        lacking = [p.prompt_id for p in ready.prompts if p.answer is None]
        if lacking:
            raise UsageError(
                f"criterion task needs an answer for every prompt, and {len(lacking)} have none (first: "
                f"{lacking[0]!r}); "
                'give --prompts items.jsonl with {"text": "The capital of France is", "answer": " Paris"} on each line'
            )
        if not config.alphas:
            raise UsageError("criterion task reads accuracy over prompts at fixed strengths; add --alphas 0.01:10:16")
        for index in range(len(ready.prompts)):
            answer_tokens(ready.subject, ready.prompts[index], ready.rows[index], config.chat_template)
