"""Tables of sweeps and thresholds for people: the answer first, then its controls, then what it leaves out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from dynprobe.cli._console import console as new_console
from dynprobe.cli._render_head import CRITERION_UNITS, mean_intervals
from dynprobe.runs._plot_axes import spread
from dynprobe.runs._quantity import write_name

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["sweep", "threshold"]

_MOST_LINES, _MOST_CONTROL_LINES, _MOST_TEXT = 40, 12, 44
#: Below so many values a 99 % quantile lies between the two largest.
_FEW_VALUES = 100
#: Controls: arm or variant → heading, and what it is to be compared with the perturbed arm for.
_CONTROLS = {
    "sign-flip": ("every write with −α", "equal where the response is even in α"),
    "energy-matched": ("the same mean size ‖u‖ at another layer", "equal where the place does not matter"),
    "twin": ("the same architecture with random weights", "what the architecture does without training"),
    "scrambled": ("the same tokens in random order", "what the text's meaning adds"),
}
_KEYS = ["scale", "kind", "layer", "alpha"]
_CONTROL_HEADINGS = (
    "scale", "layer", "α", "KL/nats", "KL perturbed", "flips", "flips perturbed", "Δκ", "Δκ perturbed", "prompts",
)  # fmt: skip


def sweep(found: Run) -> None:
    """Print the responses of a sweep: one line per layer and strength, then each control, then the free texts."""
    console = new_console()
    table = pd.DataFrame(found.summary["responses"])
    words = {"variant", "decode_mode", "arm", "scale", "kind", "matched"}
    for name in table.columns.difference(list(words)):  # a number that is missing is null in the summary
        table[name] = pd.to_numeric(table[name])
    table["series"] = table["variant"].where(table["variant"] != "model", table["arm"])
    forced = table[table["decode_mode"] == "forced"]
    perturbed = forced[forced["series"] == "perturbed"]
    _responses(console, perturbed, found.manifest.model_name, mean_intervals(found.summary))
    sham = forced[forced["arm"] == "sham"]["kl_clean_pert"].max()
    if np.isfinite(sham):
        console.print(f"sham rows (α = 0): largest mean KL {sham:.2g} nats")
    for name, (heading, meaning) in _CONTROLS.items():
        rows = forced[(forced["series"] == name) & (forced["arm"] != "sham")]
        if len(rows):
            _control(console, rows, perturbed, f"control {name}: {heading}", meaning)
    if (table["decode_mode"] == "free").any():
        _texts(console, found, table)


def _responses(console: Console, rows: pd.DataFrame, title: str, intervals: str) -> None:
    shown = Table(title=title, caption=f"means; in brackets: {intervals}; α in units of its scale")
    for heading in ("scale", "layer", "α", "KL/nats", "flips", "Δκ (paired)", "ΔNLL/nats", "prompts"):
        shown.add_column(heading, justify="right")
    chosen = _thinned(rows, _MOST_LINES)
    for _, row in chosen.iterrows():
        shown.add_row(
            *_named(row), _ranged(row, "kl_clean_pert"), _share(row["flip_rate"]), _ranged(row, "kappa_phase_d"),
            _ranged(row, "nll_d"), str(int(row["n"])),
        )  # fmt: skip
    console.print(shown)
    _left_out(console, chosen, rows)


def _control(console: Console, rows: pd.DataFrame, perturbed: pd.DataFrame, title: str, meaning: str) -> None:
    """One control beside the write it is compared with: same scale, kind and size of α, and same layer where it can."""
    beside = perturbed.set_index(_KEYS)[["kl_clean_pert", "flip_rate", "kappa_phase_d"]]
    compared = pd.DataFrame([_compared_with(row) for _, row in rows.iterrows()], columns=_KEYS, index=rows.index)
    rows = rows.rename(columns={"layer": "written", "alpha": "strength"}).drop(columns=["scale", "kind"]).join(compared)
    shown = Table(title=title, caption=f"“… perturbed”: the same write without the control; {meaning}")
    for heading in _CONTROL_HEADINGS:
        shown.add_column(heading, justify="right")
    chosen = _thinned(rows.sort_values(_KEYS), _MOST_CONTROL_LINES)
    for _, row in chosen.iterrows():
        key = tuple(row[_KEYS])
        other = beside.loc[key] if key in beside.index else pd.Series(dtype=float)
        elsewhere = row["written"] != row["layer"]
        shown.add_row(
            write_name(row["scale"], row["kind"]), f"{row['written']:g}" + f" for {row['layer']:g}" * elsewhere,
            f"{row['strength']:.4g}", _ranged(row, "kl_clean_pert"), _short(other.get("kl_clean_pert")),
            _share(row["flip_rate"]), _share(other.get("flip_rate")), _short(row["kappa_phase_d"]),
            _short(other.get("kappa_phase_d")), str(int(row["n"])),
        )  # fmt: skip
    console.print(shown)
    _left_out(console, chosen, rows)


def _compared_with(row: pd.Series) -> tuple[str, str, float, float]:
    """Scale, kind, layer and α of the perturbed write that a control's row is compared with."""
    if row["arm"] == "energy-matched":  # its name says whose energy it repeats: relnorm|gaussian|L15
        *write, layer = str(row["matched"]).split("|")
        return write[0] if len(write) > 1 else "", write[-1], float(layer.removeprefix("L")), float(row["alpha"])
    sign = -1.0 if row["arm"] == "sign-flip" else 1.0
    return str(row["scale"]), str(row["kind"]), float(row["layer"]), sign * float(row["alpha"])


def _texts(console: Console, found: Run, table: pd.DataFrame) -> None:
    """What the model wrote under each strength, beside its clean text."""
    samples = found.samples[["prompt_id", "condition_id", "text", "n_new", "status"]].astype({"condition_id": str})
    conditions = found.conditions.astype({"condition_id": str})
    model = conditions[conditions["variant"].astype(str) == "model"]
    clean = samples[samples["condition_id"].isin(model[model["arm"] == "clean"]["condition_id"])]
    free = model[model["decode_mode"] == "free"][["condition_id", *_KEYS]]
    rows = samples[samples["status"].astype(str) != "not-written"].merge(free, on="condition_id")
    rows = rows.merge(clean[["prompt_id", "text"]], on="prompt_id", suffixes=("", "_clean"))
    for key in ("scale", "kind"):
        rows[key] = rows[key].astype(object).where(rows[key].notna(), "")
    first = rows["prompt_id"].iloc[0] if len(rows) else ""
    means = table[(table["decode_mode"] == "free") & (table["series"] == "perturbed")]
    shown = Table(
        title="texts written under the perturbation (free decoding)",
        caption=f"repeats: share of 4-grams that occurred before; as clean: texts equal to the clean one; "
        f"example: prompt {first}",
    )
    for heading in ("scale", "layer", "α", "repeats", "as clean", "new tokens", "example"):
        shown.add_column(heading, justify="left" if heading == "example" else "right", no_wrap=heading == "example")
    chosen = _thinned(means, _MOST_CONTROL_LINES)
    known = rows["text"].notna().any()
    for _, row in chosen.iterrows():
        own = rows[(rows[_KEYS] == row[_KEYS].to_numpy()).all(axis=1)]
        example = own[own["prompt_id"] == first]["text"]
        shown.add_row(
            *_named(row), _ranged(row, "repetition"),
            f"{(own['text'] == own['text_clean']).mean():.0%}" if known and len(own) else "–",
            f"{own['n_new'].mean():.1f}" if len(own) else "–",
            _one_line(example.iloc[0]) if len(example) else "–",
        )  # fmt: skip
    if known and first:
        text = clean[clean["prompt_id"] == first]["text"]
        shown.add_row("clean", "–", "–", "–", "–", "–", _one_line(text.iloc[0]) if len(text) else "–")
    console.print(shown)
    _left_out(console, chosen, means)
    others = sorted(set(table[table["decode_mode"] == "free"]["series"]) - {"perturbed"})
    also = f"; those of {', '.join(others)} too" if others else ""
    console.print(
        f"all texts: dp.open({str(found.path)!r}).samples, conditions that end in |free{also}", soft_wrap=True
    )


def _one_line(text: Any) -> str:
    if not isinstance(text, str):
        return "–"
    line = text.replace("\n", "⏎")
    return line if len(line) <= _MOST_TEXT else line[: _MOST_TEXT - 1] + "…"


def _named(row: Any) -> tuple[str, str, str]:
    return write_name(row["scale"], row["kind"]), f"{row['layer']:g}", f"{row['alpha']:.4g}"


def _thinned(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return at most so many lines: the same strengths and layers of every write, evenly chosen."""
    if len(rows) <= most:
        return rows
    names = [write_name(scale, kind) for scale, kind in zip(rows["scale"], rows["kind"], strict=True)]
    layers, alphas = sorted(set(rows["layer"])), sorted(set(rows["alpha"]))
    strengths = _some(alphas, max(3, most // (len(layers) * len(set(names)))))
    writes = _some(list(dict.fromkeys(names)), max(1, most // len(strengths)))
    places = _some(layers, max(1, most // (len(strengths) * len(writes))))
    kept = rows["alpha"].isin(strengths) & rows["layer"].isin(places) & pd.Series(names, rows.index).isin(writes)
    return rows[kept]


def _some(items: list[Any], most: int) -> list[Any]:
    return [items[len(items) // 2]] if most == 1 else spread(items, most)


def _left_out(console: Console, chosen: pd.DataFrame, rows: pd.DataFrame) -> None:
    if len(chosen) < len(rows):
        console.print(f"{len(chosen)} of {len(rows)} lines; all of them: summary.json (responses), run.samples")


def _short(value: Any) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.3g}"


def _share(value: Any) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _ranged(row: Any, name: str) -> str:
    value, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or not np.isfinite(value):
        return "–"
    known = low is not None and high is not None and np.isfinite(low) and np.isfinite(high)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]" if known else f"{value:.3g}"


#: What the column ``interval`` is, by the method that made it.
_INTERVALS = {
    "order": "interval over prompts (order statistics)",
    "bootstrap": "interval over prompts (bootstrap)",
    "bootstrap-t": "interval over prompts (bootstrap-t)",
    "bracket": "interval: the bracket of the search around this one text, not over prompts",
}


def threshold(found: Run) -> None:
    """Print thresholds: one line per criterion, scale, kind and layer, or per prompt and position."""
    console = new_console()
    fits = found.table("fits")
    headline = fits[fits["headline"]]
    places = "pos" in headline and headline["pos"].ge(0).any()
    used = dict.fromkeys(headline[headline["low"].notna() | headline["high"].notna()]["method"].astype(str))
    shown = Table(
        title=f"{found.manifest.model_name} · thresholds",
        caption="; ".join(
            [
                "α at which the criterion is reached, in units of its scale",
                "spread of the prompts' own: ×/÷ one SD of ln α",
                *(_INTERVALS.get(m, m) for m in used),
            ]
        ),
    )
    where = ("prompt", "layer:position") if places else ("layer",)
    for heading in ("criterion", "scale", "kind", *where, "α50", "interval", "spread", "prompts", "remarks"):
        numbers = heading in ("layer", "layer:position", "α50", "prompts")
        shown.add_column(heading, justify="right" if numbers else "left")
    for _, fit in headline.head(_MOST_LINES).iterrows():
        place = (
            [str(fit["prompt_id"]), f"{int(fit['layer'])}:{int(fit['pos'])}"] if places else [f"{int(fit['layer'])}"]
        )
        shown.add_row(
            f"{fit['criterion']} ≥ {fit['level']:.3g} {CRITERION_UNITS.get(str(fit['criterion']), '')}",
            str(fit["scale"]), str(fit["kind"]), *place, _value(fit), _interval(fit),
            "–" if pd.isna(fit.get("spread", math.nan)) else f"×/÷ {math.exp(fit['spread']):.2f}",
            str(int(fit["n"])), _remarks(fit),
        )  # fmt: skip
    console.print(shown)
    if len(headline) > _MOST_LINES:
        drawn = f", or drawn: dynprobe show {found.path} --figure map.png" if places else ""
        console.print(f"{_MOST_LINES} of {len(headline)} lines; all of them: run.table('fits'){drawn}", soft_wrap=True)
    if "n_uncertain" in headline and headline["n_uncertain"].gt(0).any():
        console.print(
            "uncertain: prompts whose bracket the search could not narrow or certify; the interval counts its ends. "
            "More rows narrow it: --max-evaluations",
            soft_wrap=True,
        )
    rest = fits[~fits["headline"]]
    for _, fit in rest.head(0 if places else _MOST_LINES).iterrows():
        line = f"  {fit['criterion']} {fit['scale']} layer {int(fit['layer'])}: {fit['estimator']} {_value(fit)}"
        interval = _interval(fit)
        console.print(line + (f" {interval}" if interval != "–" else ""))
    if not places and len(rest) > _MOST_LINES:
        console.print(f"  {len(rest) - _MOST_LINES} further estimates: run.table('fits')")
    console.print(_rows(found), soft_wrap=True)
    values = found.summary.get("null_values")
    if values:
        few = "; of so few that is their maximum" if values < _FEW_VALUES else ""
        kind = found.manifest.config.get("null", "numerical")
        console.print(f"level of kappa: 99 % quantile of {values} values of the {kind} null{few}", soft_wrap=True)


def _rows(found: Run) -> str:
    """How many rows the thresholds cost."""
    summary, config = found.summary, found.manifest.config
    trials, sham = found.manifest.rows().get("trials", 0), summary.get("sham_rows")
    per_prompt = summary.get("rows_per_prompt")
    if config.get("placement") == "quest" and not config.get("alphas"):
        said = f"{trials - (sham or 0)} perturbed rows, placed by one posterior over prompts"
    elif per_prompt is None or not math.isfinite(per_prompt):
        said = "no perturbed rows"
    else:
        said = f"{per_prompt:.1f} perturbed rows per prompt and threshold"
    if sham is None:
        return said
    every = config.get("alphas") or config.get("placement") == "quest"
    which = "one per prompt" if every else "a few texts of each batch, for the noise floor"
    return f"{said}; {sham} sham rows (α = 0; {which})"


def _value(fit: Any) -> str:
    """The threshold, or the side of it that is known: a median may be bound inside the range too."""
    if fit["status"] == "resolved":
        return f"{fit['alpha50']:.4g}"
    if fit["status"] == "left-censored":
        return f"< {fit['high']:.4g}" if np.isfinite(fit["high"]) else "below range"
    if fit["status"] == "right-censored":
        return f"> {fit['low']:.4g}" if np.isfinite(fit["low"]) else "above range"
    return str(fit["status"])


def _interval(fit: Any) -> str:
    low, high = fit["low"], fit["high"]
    if pd.isna(low) or pd.isna(high):
        return "–"
    ends = ("< range" if np.isneginf(low) else f"{low:.4g}", "> range" if np.isposinf(high) else f"{high:.4g}")
    return f"[{ends[0]}, {ends[1]}]"


def _remarks(fit: Any) -> str:
    """What the number leaves out."""
    notes = []
    for column, word in (
        ("n_left", "below range"), ("n_right", "above range"), ("n_nonmonotone", "not monotone"),
        ("n_uncertain", "uncertain"), ("n_missing", "missing"),
    ):  # fmt: skip
        if not pd.isna(fit.get(column, math.nan)) and fit[column]:
            notes.append(f"{int(fit[column])} {word}")
    if isinstance(fit.get("reason"), str) and fit["reason"]:
        notes.append(str(fit["reason"]))
    return ", ".join(notes)
