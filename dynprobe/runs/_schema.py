"""The tables of a run folder: which columns make a row's label, and what each of them means.

A table is *open*: any metric may add a column. What is closed is its label: the key columns must be there, typed, and
never null, because rows are found by their labels and never by their order. The words for the columns that are no
metrics (labels, texts, settings) stand here, with a unit and one sentence each; those of the metrics come from the
registry and are handed in by whoever writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dynprobe.errors import RunFolderError, did_you_mean

__all__ = [
    "COLUMNS",
    "FACTS",
    "SCHEMA_VERSION",
    "TABLES",
    "Column",
    "Table",
    "facts_of",
    "registry_facts",
    "table_schema",
]

#: Version of the layout. Another major cannot be read by an older library; a minor only adds.
SCHEMA_VERSION = "1.1"

#: What is known of a column, in the order in which it is shown.
FACTS = ("id", "unit", "digest", "span", "aggregation", "description")

Kind = Literal["label", "text", "json", "int32", "int64", "float32", "float64", "bool", "ids"]


@dataclass(frozen=True)
class Column:
    """A column that is no metric.

    Attributes:
        kind: ``label`` is text out of a small set, read as a pandas categorical; ``ids`` a list of int32; ``json`` a
            mapping stored as JSON text.
        description: One sentence.
        unit: Unit of the values, empty for labels and texts.
    """

    kind: Kind
    description: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A table: its label, whether that label is unique, and whether it is written in parts."""

    name: str
    description: str
    keys: tuple[str, ...]
    sharded: bool = True
    unique: bool = False
    columns: tuple[str, ...] = field(default=())


COLUMNS: dict[str, Column] = {
    "prompt_id": Column("label", "Name of the prompt, unique in prompts."),
    "condition_id": Column("label", "Name of the condition (arm), unique in conditions."),
    "sample_id": Column("label", "Name of one prompt under one condition in one replicate, unique in samples."),
    "replicate": Column("int32", "Number of the repetition of a sample under another random draw.", "count"),
    "text": Column("text", "The prompt, or the text that was generated."),
    "token_ids": Column("ids", "Token ids of the prompt, without padding.", "token id"),
    "token_texts": Column(
        "json", "Text of each token by itself; a token that is part of a character has none of its own."
    ),
    "category": Column("label", "Category of the prompt."),
    "source": Column("label", "Where the prompt comes from."),
    "arm": Column("label", "Role of the condition: clean, sham, perturbed, recovered, random-control and so on."),
    "decode_mode": Column("label", "forced: teacher-forced on the clean text; free: its own text."),
    "scale": Column("label", "Noise scale that gives alpha its unit."),
    "alpha": Column("float64", "Strength of the perturbation in units of its noise scale.", "scale"),
    "kind": Column("label", "Kind of the write: noise, direction, dropout and so on."),
    "where": Column("label", "Sites that are written, in the mini-language."),
    "seed": Column("int64", "Seed of the noise.", "seed"),
    "variant": Column(
        "label", "The model itself, or the control it is: twin (random weights), scrambled (shuffled tokens)."
    ),
    "matched_to": Column("label", "Condition whose energy is written at another depth."),
    "controller": Column("label", "Recovery mode or other controller, empty where there is none."),
    "params": Column("json", "Parameters of the condition."),
    "temperature": Column("float64", "Sampling temperature; 0 is greedy.", "1"),
    "top_p": Column("float64", "Nucleus of the sampling distribution.", "probability"),
    "max_new_tokens": Column("int32", "Most tokens that may be generated.", "tokens"),
    "n_prompt": Column("int32", "Real tokens of the prompt.", "tokens"),
    "n_new": Column("int32", "Tokens that were generated.", "tokens"),
    "status": Column("label", "How the row ended: ok, or what went wrong."),
    "pos": Column("int32", "Number of the token among the real tokens, 0-based.", "tokens"),
    "phase": Column("label", "prefill or decode."),
    "token_id": Column("int32", "Token at this position.", "token id"),
    "token_text": Column(
        "label", "The token by itself as text, bytes that are no whole character as \\xNN; missing without tokenizer."
    ),
    "target_id": Column("int32", "Token at the next position, which the row's distribution predicts.", "token id"),
    "track": Column("label", "State that is refined: the residual stream, or one of a model's several states."),
    "depth": Column("int32", "Number of the state on its track, 0 before the first update.", "updates"),
    "stage": Column("label", "Which part of the model the state belongs to."),
    "layer": Column("int32", "0-based block index.", "blocks"),
    "iteration": Column("int32", "Number of updates done in the loop, 0 before the first.", "updates"),
    "component": Column("label", "Place in the block: resid_pre, resid_mid, resid_post, attn_out, mlp_out."),
    "energy": Column("float32", "Energy of the state under the energy of its own update; missing without one.", "1"),
    "energy_prev": Column("float32", "Energy of the state before the update, under the same energy.", "1"),
    "grain": Column("label", "How finely the track is sampled: layer, sublayer or iteration."),
    "slot": Column("int32", "Number of the slot, 0-based.", "slots"),
    "reason": Column("label", "Why a value of the row is missing, empty where none is."),
    "coverage": Column("float32", "Share of the units that entered the values of the row.", "fraction"),
    "step": Column("int32", "Number of the controller's step, 0-based.", "steps"),
    "reasons": Column("json", "Why values of this row are missing, by column."),
    "equal_to": Column("label", "Condition this row equals bit for bit; its tokens and depths stand there."),
    "digest": Column("label", "Hash of the last-depth states of a row that is stored as a digest."),
    "trial": Column("int32", "Number of the trial, 0-based.", "trials"),
    "write": Column("label", "Scale, kind and layer of the write."),
    "response": Column("float64", "Response of the criterion.", "criterion"),
    "level": Column("float64", "Level the response must reach.", "criterion"),
    "floor": Column("float64", "Largest response of a sham row: what the arithmetic alone makes.", "criterion"),
    "trial_round": Column("int32", "Round of the search, −1 for sham rows.", "rounds"),
    "estimator": Column("label", "Id of the estimate."),
    "alpha50": Column("float64", "The threshold, in units of its noise scale.", "scale"),
    "low": Column("float64", "Lower end of the interval; −inf below the tested range.", "scale"),
    "high": Column("float64", "Upper end of the interval; +inf above the tested range.", "scale"),
    "criterion": Column("label", "What counts as destabilised."),
    "remark": Column("label", "Why the bracket of this row is uncertain; empty where it is not."),
    "n_uncertain": Column("int32", "Rows whose bracket is uncertain.", "rows"),
    "fit_id": Column("label", "Name of the fit."),
    "signal": Column("float32", "What the detector watches, at this token.", "signal"),
    "active": Column("bool", "Whether the controller was active at this token."),
    "gain": Column("float32", "Gain in force at this token, 0 where inactive.", "1"),
    "site": Column("label", "Place of the write, component and block; empty where nothing was written."),
    "detected": Column("bool", "Whether the detector was on at this token, whatever acted."),
    "length": Column("int32", "New tokens of a text that the row is about.", "tokens"),
    "task": Column("label", "Name of the task."),
    "doc_id": Column("label", "Name of the item inside its task."),
}

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("prompts", "The prompts.", ("prompt_id",), False, True, ("text", "token_ids", "category", "source")),
        Table(
            "conditions",
            "The conditions.",
            ("condition_id",),
            False,
            True,
            (
                "arm",
                "decode_mode",
                "scale",
                "alpha",
                "kind",
                "where",
                "seed",
                "controller",
                "params",
                "temperature",
                "top_p",
                "max_new_tokens",
            ),
        ),
        Table(
            "samples",
            "One row per prompt, condition and replicate.",
            ("sample_id", "prompt_id", "condition_id"),
            unique=True,
            columns=("replicate", "n_prompt", "n_new", "text", "status"),
        ),
        Table(
            "tokens",
            "One row per token of a sample.",
            ("sample_id", "pos"),
            columns=("phase", "token_id", "token_text", "target_id"),
        ),
        Table(
            "depths",
            "One row per token and depth of a sample.",
            ("sample_id", "pos", "track", "depth"),
            columns=("stage", "layer", "iteration", "component"),
        ),
        Table(
            "profiles",
            "One row per depth of a sample: metrics of the whole set of tokens.",
            ("sample_id", "track", "depth"),
            columns=("coverage", "reason"),
        ),
        Table("trials", "One row per trial of a threshold search.", ("prompt_id", "alpha")),
        Table("fits", "One row per estimate: a fitted threshold, a recovery fraction.", ("fit_id",), False, True),
        Table("slots", "One row per attractor slot.", ("sample_id", "pos", "slot")),
        Table("atlas", "One row per life of an attractor slot: what reinforced it.", ("sample_id", "slot")),
        Table("lengths", "One row per sample and length of its text.", ("sample_id", "length")),
        Table("actions", "One row per step of a controller.", ("sample_id", "pos")),
        Table("items", "One row per task item and condition.", ("task", "doc_id", "condition_id")),
        Table("states", "The hidden states themselves.", ("sample_id", "pos", "track", "depth")),
    )
}


def table_schema(name: str) -> Table:
    """Return the schema of a table.

    Raises:
        RunFolderError: There is no such table; the nearest name is suggested.

    Example:
        >>> table_schema("depths").keys
        ('sample_id', 'pos', 'track', 'depth')
    """
    if name not in TABLES:
        raise RunFolderError(
            f"There is no table {name!r} in a run folder.{did_you_mean(name, TABLES)} Tables: {', '.join(TABLES)}."
        )
    return TABLES[name]


def facts_of(column: str, facts: Mapping[str, Mapping[str, str]], table: str = "") -> dict[str, str]:
    """Return what is known of a column: the caller's facts, else the table above, else empty texts.

    Args:
        column: Name of the column.
        facts: Facts by ``column``, and by ``table.column`` where a column means another thing in another table.
        table: Name of the table.

    Example:
        >>> facts_of("pos", {})["unit"]
        'tokens'
        >>> facts_of("nll", {"nll": {"unit": "nat"}, "samples.nll": {"aggregation": "mean"}}, "samples")["aggregation"]
        'mean'
    """
    own = COLUMNS.get(column)
    known = dict.fromkeys(FACTS, "")
    if own is not None:
        known |= {"unit": own.unit, "description": own.description}
    for name in (column, f"{table}.{column}"):
        known |= {str(key): "" if value is None else str(value) for key, value in facts.get(name, {}).items()}
    return known


def registry_facts(columns: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the facts of metric columns as :meth:`RunWriter.begin` takes them.

    Args:
        columns: ``dynprobe.metrics.columns()``: name → object with ``metric_id``, ``unit``, ``digest`` and ``levels``
            (what the value is aggregated over, for each level of the run folder).

    Example:
        >>> from types import SimpleNamespace
        >>> nll = SimpleNamespace(metric_id="output.nll/1", unit="nat", digest="0165", levels={"sample": "mean"})
        >>> registry_facts({"nll": nll})["samples.nll"]
        {'aggregation': 'mean'}
    """
    facts: dict[str, dict[str, str]] = {}
    for name, column in columns.items():
        facts[name] = {"id": column.metric_id, "unit": column.unit, "digest": column.digest}
        if column.unit == "label":
            facts[name]["dtype"] = "label"
        for level, aggregation in column.levels.items():
            facts[f"{level}s.{name}"] = {"aggregation": aggregation}
    return facts
