"""What an evaluation asks, known before anything is computed: the model, the documents, and their requests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynprobe.errors import ModelError, UsageError
from dynprobe.probes import Subject
from dynprobe.probes import load as load_subject
from dynprobe.probes._evaluating import evaluating
from dynprobe.prompts import Prompt
from dynprobe.protocols._evaluate_config import EvaluateConfig
from dynprobe.protocols._evaluate_rows import category_of, column_of, content_of, prompt_name
from dynprobe.protocols._harness import Harness, seeded

__all__ = ["Asked", "asked_of", "harness_model", "subject_of"]


def subject_of(model: Any, config: EvaluateConfig) -> Subject:
    """Return the subject, or refuse it.

    Raises:
        ModelError: It has no tokenizer, or is no model of transformers.
        UsageError: A chat template is asked for and the tokenizer has none.
    """
    if isinstance(model, str | Path):
        keys = ("revision", "dtype", "device", "device_map", "quantization", "trust_remote_code", "allow_bin")
        subject = load_subject(str(model), **{key: getattr(config, key) for key in keys})
    else:
        subject = load_subject(model)
    if subject.tokenizer is None:
        raise ModelError(f"{subject.name} has no tokenizer, and tasks are texts; load it with tokenizer=…")
    missing = [name for name in ("config", "device", "generate", "tie_weights") if not hasattr(subject.model, name)]
    if missing:
        raise ModelError(
            f"{subject.name} ({type(subject.model).__name__}) has no {missing[0]}; lm-evaluation-harness takes "
            "models of transformers (PreTrainedModel)"
        )
    if config.apply_chat_template and not getattr(subject.tokenizer, "chat_template", None):
        raise UsageError(f"the tokenizer of {subject.name} has no chat template; leave --apply-chat-template out")
    return subject


def harness_model(subject: Subject, **options: Any) -> Any:
    """The harness's model; the tokenizer is a copy, since the harness gives it a padding token."""
    from dynprobe.protocols._harness_model import ProbedLM

    return ProbedLM(subject, copy.deepcopy(subject.tokenizer), **options)


@dataclass(frozen=True, eq=False)
class Asked:
    """What the tasks ask.

    Attributes:
        prompts: One for each document: the context of its first request.
        rows: Their token ids, as the model can read them.
        kinds: Task → what is asked of the model: ``multiple_choice``, ``generate_until``, ….
        metrics: Columns of the tasks' metrics.
        content: Hash of all requests and of the tasks' settings.
    """

    prompts: list[Prompt]
    rows: list[list[int]]
    kinds: dict[str, str]
    metrics: tuple[str, ...]
    content: str

    @property
    def n_prompt(self) -> dict[str, int]:
        """Tokens of each document's context."""
        return {prompt.prompt_id: len(row) for prompt, row in zip(self.prompts, self.rows, strict=True)}


def asked_of(subject: Subject, harness: Harness) -> Asked:
    """Make all requests once, to know what will be asked before anything is written."""
    with evaluating(subject.model), seeded():
        lm = harness_model(subject)
        tasks = harness.load()["tasks"]
        harness.build(tasks, lm)
        prompts, rows = [], []
        for task in tasks.values():
            for request in task.instances:
                if request.idx != 0:
                    continue
                text = request.args[0] if request.request_type != "loglikelihood_rolling" else ""
                row = lm.tok_encode(text) if text else [lm.prefix_token_id]
                name = prompt_name(request.task_name, request.doc_id)
                prompts.append(Prompt(name, text, category_of(request.doc), request.task_name, tuple(row)))
                rows.append(list(row[-lm.max_length :]))
    kinds = {name: str(task.get_config("output_type") or task.OUTPUT_TYPE) for name, task in tasks.items()}
    metrics = dict.fromkeys(column_of(metric) for task in tasks.values() for metric in task.aggregation())
    return Asked(prompts, rows, kinds, tuple(metrics), content_of(tasks))
