"""From the harness's records to our rows: ``items`` (one per document, filter and arm) and ``samples``.

A record is what the harness logs of one document: the requests, what came back, what its filters made of that, and the
task's metrics. The numbers are kept as they are; beside them stand what they were made of (the log-likelihood of each
choice, the text), so that other scores can be computed later without the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.protocols._harness_books import Books
from dynprobe.protocols._tables import sample_id

__all__ = ["ITEM_FACTS", "category_of", "content_of", "item_facts", "items_table", "prompt_name", "samples_table"]

#: Columns of the items: name → (unit, dtype or "", description).
ITEM_FACTS: dict[str, tuple[str, str, str]] = {
    "filter": ("", "label", "Filter of the harness that read the answer; a task may have several."),
    "metrics": ("", "json", "All metric values of the record, as the harness gives them."),
    "metric": ("", "label", "The metric that correct is taken from: the task's first that says right or wrong."),
    "correct": ("", "", "Whether the item counts as right; missing where no metric of the task says so."),
    "target": ("", "text", "What is right, as the harness prints it."),
    "responses": ("", "json", "What came back: log-likelihood and greediness of each request, or texts."),
    "filtered_response": ("", "json", "What the filter made of it."),
    "chosen": ("", "", "Choice with the highest log-likelihood, 0-based; −1 where there are none."),
    "n_choices": ("choices", "", "Choices of the item; 0 where there are none."),
    "choice_margin": ("nats", "float64", "Log-likelihood of the right choice minus that of the best wrong one."),
    "doc_hash": ("", "label", "Hash of the document, by the harness."),
    "prompt_hash": ("", "label", "Hash of the context, few-shot examples included, by the harness."),
}
#: Metrics that say right or wrong of one document.
_RIGHT = ("acc", "exact_match", "acc_norm", "acc_bytes", "acc_mutual_info", "em")
#: Metrics of whole texts, whose records are pairs of a log-likelihood and a length.
_ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")
#: Of a metric's own column.
_METRIC = "Metric of the task, as the harness computes it for one document."


def prompt_name(task: str, doc_id: int) -> str:
    """Return the name of a document among the prompts, under which its noise is drawn too."""
    return f"{task}:{doc_id}"


def items_table(samples: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str], arm: str) -> pd.DataFrame:
    """Return the items of one arm.

    Args:
        samples: Task → records of the harness.
        kinds: Task → what is asked of the model: ``multiple_choice``, ``generate_until``, ….
        arm: The condition.
    """
    rows = []
    for task, records in samples.items():
        choosing = kinds[task] == "multiple_choice"
        for record in records:
            doc, name = record["doc"], prompt_name(task, record["doc_id"])
            columns, metric = _scalars(record)
            rows.append(
                {
                    "task": task, "doc_id": str(record["doc_id"]), "condition_id": arm, "prompt_id": name,
                    "sample_id": sample_id(name, arm, 0), "category": category_of(doc), "filter": record["filter"],
                    "metric": metric, "correct": _correct(record, metric), **columns,
                    **_choices(record, choosing), "target": _text(record["target"]),
                    "responses": _plain(record["resps"]), "filtered_response": _plain(record["filtered_resps"]),
                    "metrics": _plain({name: record[name] for name in record["metrics"]}),
                    "doc_hash": record["doc_hash"], "prompt_hash": record["prompt_hash"],
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    table["correct"] = table["correct"].astype("boolean")
    return table


def category_of(doc: Any) -> str | None:
    """The document's own category, where it is a text."""
    found = doc.get("category") if isinstance(doc, Mapping) else None
    return found if isinstance(found, str) else None


def _scalars(record: Mapping[str, Any]) -> tuple[dict[str, float], str | None]:
    """The metrics that are one number, by column, and the name of the one that says right or wrong."""
    columns: dict[str, float] = {}
    for name in record["metrics"]:
        value = record[name]
        if isinstance(value, bool | int | float | np.number | np.bool_):
            columns[column_of(name)] = float(value)
        elif name in _ROLLING and isinstance(value, list | tuple):  # (log-likelihood of the document, its length)
            columns["loglik"] = float(value[0])
    return columns, next((name for name in record["metrics"] if name in _RIGHT), None)


def _correct(record: Mapping[str, Any], metric: str | None) -> bool | None:
    value = None if metric is None else float(record[metric])
    return bool(value) if value in (0.0, 1.0) else None


def column_of(metric: str) -> str:
    """Return the column of a metric: its name in snake case, prefixed where it is one of ours.

    Example:
        >>> column_of("acc_norm"), column_of("Exact-Match"), column_of("target")
        ('acc_norm', 'exact_match', 'metric_target')
    """
    name = re.sub(r"\W+", "_", metric).strip("_").lower() or "metric"
    taken = {*ITEM_FACTS, "task", "doc_id", "condition_id", "prompt_id", "sample_id", "category"}
    return f"metric_{name}" if name in taken or name[0].isdigit() else name


def _choices(record: Mapping[str, Any], choosing: bool) -> dict[str, Any]:
    """Which choice was taken, out of how many, and by how much the right one wins."""
    scores = record["filtered_resps"]
    if "acc_mutual_info" in record["metrics"]:  # the second half are the choices without their question
        scores = scores[: len(scores) // 2]
    if not choosing or not all(isinstance(s, list | tuple) and len(s) == 2 for s in scores):
        return {"chosen": -1, "n_choices": 0, "choice_margin": math.nan}
    loglik = np.array([float(s[0]) for s in scores])
    target, margin = record["target"], math.nan
    if isinstance(target, int) and 0 <= target < len(loglik) > 1:
        margin = float(loglik[target] - np.delete(loglik, target).max())
    return {"chosen": int(np.argmax(loglik)), "n_choices": len(loglik), "choice_margin": margin}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value of the harness as JSON holds it; doubles keep every digit."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def samples_table(
    items: pd.DataFrame, arm: str, books: Books, n_prompt: Mapping[str, int], *, written: bool, steered: bool
) -> pd.DataFrame:
    """Return one row per document of an arm: how long it was, what was generated, how much was written into it.

    Args:
        items: The items of the arm.
        arm: The condition.
        books: What was written.
        n_prompt: Tokens of each document's context.
        written: Whether a perturbation acted.
        steered: Whether a controller did.
    """
    rows = []
    for _, item in items.drop_duplicates("prompt_id").iterrows():
        name = str(item["prompt_id"])
        found = books.row(name, written=written, steered=steered)
        asked, alone = found.get("n_asked", 0), found.get("n_left_alone", 0)
        status = "not-written" if written and alone == asked else "partly-written" if alone else "ok"
        first = item["responses"][0][0] if item["responses"] and item["responses"][0] else None
        rows.append(
            {
                "sample_id": item["sample_id"], "prompt_id": name, "condition_id": arm, "replicate": 0,
                "category": item["category"], "task": item["task"], "n_prompt": n_prompt[name],
                "text": first if isinstance(first, str) else None, **found, "status": status,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def content_of(tasks: Mapping[str, Any]) -> str:
    """Return a hash of what is asked: every request of every document, what is right, and the tasks' settings."""
    digest = hashlib.sha256()
    for name, task in tasks.items():
        settings = {k: v for k, v in task.dump_config().items() if k != "metadata"}
        digest.update(json.dumps([name, settings], sort_keys=True, default=_called).encode())
        for request in task.instances:
            asked = [request.doc_id, request.idx, request.request_type, list(request.args)]
            digest.update(json.dumps(asked, sort_keys=True, default=_called).encode())
            if request.idx == 0:
                digest.update(json.dumps(request.doc, sort_keys=True, default=_called).encode())
    return digest.hexdigest()[:16]


def _called(value: Any) -> str:
    """A name for what is no JSON, the same in every process."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def item_facts(items: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Return the facts of the columns of ``items`` and of what is ours in ``samples``; ``items`` are metric columns."""
    facts = {
        f"items.{name}": {"unit": unit, "description": text, **({"dtype": kind} if kind else {})}
        for name, (unit, kind, text) in ITEM_FACTS.items()
    }
    facts |= {f"items.{name}": {"unit": "", "description": _METRIC, "dtype": "float64"} for name in items}
    facts["samples.n_new"] = {"unit": "tokens", "description": "Tokens that were generated, up to the stop sequence."}
    facts["samples.duty_cycle"] = {"unit": "fraction", "description": "Share of tokens at which the controller acted."}
    facts["samples.control_energy"] = {"unit": "‖u‖²/‖h‖²", "description": "Sum over all writes of the controller."}
    return facts
