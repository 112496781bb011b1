"""Tables of an ``attract`` run: the doses first, then every arm against the bare model, then where texts break down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_head import mean_intervals
from dynprobe.runs._stored_number import stored_number

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["attraction", "dose_table"]

#: Measure → heading and digits.
_SHOWN = {
    "repetition": ("repeats", 3), "distinct_2": ("distinct-2", 3), "longest_repeat": ("longest", 1),
    "nll_bare": ("NLL bare", 3), "drift": ("drift", 4), "attention_prompt": ("on prompt", 3),
    "kappa_phase": ("κ phase", 4), "limen_ratio": ("ratio", 2),
}  # fmt: skip
_MOST_LENGTHS = 3
#: Share of hits above which slots no longer tell tokens apart.
_MANY_HITS = 0.1
_NAMES = {"none": "bare", "none~sampled": "bare, sampled"}


def dose_table(doses: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table dose → ε → realised KL of every arm."""
    texts = max((int(d["n_texts"]) for d in doses), default=0)
    tokens = max((int(d["n_tokens"]) for d in doses), default=0)
    table = Table(
        title=f"dose: mean KL(bare ‖ arm) in nats per token past burn-in, {texts} texts, {tokens} tokens that are read",
    )  # fmt: skip
    for heading in ("arm", "settings", "dose", "ε", "KL", "how"):
        table.add_column(heading, justify="left" if heading in ("arm", "settings", "how") else "right")
    for row in doses:
        if row["arm"] == "none":
            continue
        unreached = row["status"] == "unreached"
        how = "solved" if row["status"] == "solved" else "as given" if row["raw"] else "the layer's ε"
        if math.isnan(stored_number(row["dose"])):
            how = "has no ε"
        if unreached:
            how = f"not reached: ε = {_short(row['largest'])} gives {_short(row['kl_largest'])}; not run"
        table.add_row(
            row["arm"], row["cell"] or "–",
            "–" if row["dose"] is None else f"{'ε=' if row['raw'] else ''}{row['dose']:g}",
            _short(row["strength"]), _short(row["kl"]), Text(how, style="bold red" if unreached else ""),
        )  # fmt: skip
    return table


def attraction(found: Run) -> None:
    """Print an ``attract`` run."""
    console, summary = new_console(), found.summary
    console.print(dose_table(summary["doses"]))
    if summary["task"] != "generate":
        for table in _items(summary["items"]):
            console.print(table)
        console.print(
            "accuracy with exact intervals; change from the bare model with Newcombe's interval, lost/gained items and "
            "McNemar's p; leak: change from a clean start of the same arm",
            soft_wrap=True,
        )
        return
    lengths = sorted({row["length"] for row in summary["lengths"]})
    shown = lengths if len(lengths) <= _MOST_LENGTHS else [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
    for length in shown:
        console.print(_at(summary, length))
    for line in _notes(summary, shown, lengths):
        console.print(line, soft_wrap=True)


def _at(summary: Mapping[str, Any], length: int) -> Table:
    rows = [row for row in summary["lengths"] if row["length"] == length]
    table = Table(
        title=f"after {length} new tokens, {rows[0]['n']} prompts",
        caption=f"bare: mean over prompts; others: arm − bare with its {mean_intervals(summary)}",
    )  # fmt: skip
    table.add_column("arm @ dose", no_wrap=True)
    used = [m for m in _SHOWN if any(not math.isnan(stored_number(row.get(m, {}).get("mean"))) for row in rows)]
    for metric in used:
        table.add_column(_SHOWN[metric][0], justify="right", no_wrap=True)
    table.add_column("hits", justify="right")
    table.add_column("broken", justify="right", no_wrap=True)
    broken = {s["condition"]: s for s in summary["breakdown"]["shares"] if s["length"] == length}
    for row in rows:
        bare, share = row["condition"] == "none", broken[row["condition"]]
        table.add_row(
            _NAMES.get(row["condition"], row["condition"]),
            *[_cell(row[m], _SHOWN[m][1], bare) for m in used], _short(row["hit_rate"]["mean"]),
            f"{share['broken']}/{share['n']}", style="dim" if bare else "",
        )  # fmt: skip
    return table


def _cell(entry: Mapping[str, Any], digits: int, bare: bool) -> str:
    if bare:
        mean = stored_number(entry["mean"])
        return "–" if math.isnan(mean) else f"{mean:.{digits}f}"
    change = entry["difference"]
    mean, low, high = (stored_number(change[name]) for name in ("mean", "low", "high"))
    if math.isnan(mean):
        return "–"
    ends = "" if math.isnan(low) else f"\n{low:+.{digits}f}…{high:+.{digits}f}"
    return f"{mean:+.{digits}f}{ends}"


def _notes(summary: Mapping[str, Any], shown: Sequence[int], lengths: Sequence[int]) -> list[str]:
    found = summary["breakdown"]
    last = lengths[-1]
    lines = [f"broken: {found['rule']}; a dose breaks long texts down where that is more than half of them"]
    for verdict in found["verdicts"]:
        if verdict["length"] != last:
            continue
        name = verdict["arm"] + (f" [{verdict['cell']}]" if verdict["cell"] else "")
        what = f"dose {verdict['dose']:g} (ε {_short(verdict['strength'])}, KL {_short(verdict['kl'])})"
        share = f"{verdict['share']:.0%} of {verdict['n']} texts [{verdict['low']:.0%}, {verdict['high']:.0%}]"
        if verdict["breaks"]:
            few = ", of too few bare texts to say so (below)" if found["reason"] == "few-bare-texts" else ""
            lines.append(f"{name}: breaks down at {last} tokens from {what}: {share} broken{few}")
        else:
            lines.append(f"{name}: no breakdown at {last} tokens up to the largest tried, {what}: {share} broken")
    if found["reason"] == "few-bare-texts":
        lines.append(f"warning: the bare quantiles rest on {found['n_bare']} texts; a breakdown needs at least 8")
    if found["full"]:
        at = ", ".join(map(str, found["full"]))
        lines.append(
            f"warning: bare texts repeat themselves almost wholly at {at} tokens, so repetition cannot show a "
            "breakdown there; sample (--temperature 0.8)"
        )
    hits, theta = stored_number(summary.get("hit_rate_bare")), ", ".join(f"{s['theta']:.2f}" for s in summary["sites"])
    if hits > _MANY_HITS:
        lines.append(
            f"note: {hits:.0%} of the bare model's tokens reinforce a slot (θ {theta}); a memory that takes in nearly "
            "everything follows the mean of its text: raise theta (--attractor theta=0.9) to have it choose"
        )
    if summary.get("attention"):
        lines.append(f"attention on the prompt is missing: {summary['attention']}")
    if len(shown) < len(lengths):
        lines.append(f'lengths {", ".join(map(str, lengths))}: .table("lengths")')
    lines.append('slots token by token: .table("slots"); what reinforced them: .table("atlas")')
    return lines


def _items(items: Sequence[Mapping[str, Any]]) -> list[Table]:
    out = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in items):
        rows = [row for row in items if (row["task"], row["metric"]) == (task, metric)]
        said = "exact match of what is written"
        if metric == "chose_right":
            said = f"likeliest of {1 / rows[0]['chance']:.0f} names"
        table = Table(title=f"{task}: {said}, {rows[0]['n']} items")
        leaks = any("leak" in row for row in rows)
        for heading in ("arm @ dose", "right", "accuracy", "change", "lost/gained", "p", *(["leak"] if leaks else [])):
            table.add_column(heading, justify="left" if heading == "arm @ dose" else "right", no_wrap=True)
        for row in rows:
            change, leak = row.get("change"), row.get("leak")
            table.add_row(
                "bare" if row["condition"] == "none" else row["condition"], f"{row['right']}/{row['n']}",
                f"{row['accuracy']:.3f} [{row['low']:.2f}, {row['high']:.2f}]",
                "–" if change is None else _change(change),
                "–" if change is None else f"{change['lost']}/{change['gained']}",
                "–" if change is None else f"{change['p']:.2g}",
                *(["–" if leak is None else _change(leak)] if leaks else []),
            )  # fmt: skip
        out.append(table)
    return out


def _change(entry: Mapping[str, Any]) -> str:
    return f"{entry['difference']:+.3f} [{entry['low']:+.2f}, {entry['high']:+.2f}]"


def _short(value: Any) -> str:
    number = stored_number(value)
    return "–" if not math.isfinite(number) else f"{number:.3g}"
