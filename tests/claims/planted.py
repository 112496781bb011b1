"""Runs in which a claim is true, false or left open, written through the real writer.

What is planted is computed from the sentence's own prediction: a number on the claimed side of the margin, on the other
side, or on the margin with noise. The rows it is planted in are those of real protocols: conditions with their labels,
samples, lengths, tokens, items, trials and fits under the columns that those write.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynprobe.claims import Claim
from dynprobe.claims._sides import Side
from dynprobe.runs import Run, RunWriter, open_run

N = 40
NUMBER = itertools.count()
#: Columns that stand with the condition; every other label stands in the row.
OF_CONDITION = ("arm", "iterations", "decode_mode", "controller", "temperature", "scale", "alpha", "condition_id")
FACTS = {  # role → layers, parameters; a ratio of thresholds is planted on top of theirs
    "deeper": (24, 500e6), "shallower": (12, 124e6), "larger": (12, 331e6), "smaller": (12, 66e6),
}  # fmt: skip


def target(part: Any, truth: str) -> float:
    """A number on the claimed side, on the other one, or on the margin."""
    low, high = part.prediction.bounds
    step = 0.25 * max(abs(low), abs(high), 0.2) if low == high else 2 * (high - low)
    if truth == "open":
        return high
    right = {
        "above": (low + step, low - step), "below": (high - step, high + step),
        "within": ((low + high) / 2, high + step), "outside": (high + step, (low + high) / 2),
    }  # fmt: skip
    return right[part.prediction.expect][truth == "false"]


class Planted:
    """One run in the making: cells (conditions and row labels) with a value per prompt and column."""

    def __init__(self, role: str, n: int = N) -> None:
        self.role, self.prompts = role, [f"p{i:03d}" for i in range(n)]
        self.categories = [f"c{i % 6}" for i in range(n)]
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        self.extra: dict[str, pd.DataFrame] = {}

    def put(self, table: str, where: Mapping[str, Any], **columns: Sequence[Any]) -> None:
        cell = self.cells.setdefault((table, json.dumps(where, sort_keys=True)), {})
        cell.update(columns)

    def write(self, out: Path) -> Run:
        n_layers, n_parameters = FACTS.get(self.role, (12, 1e8))
        name = f"{self.role}-{next(NUMBER)}"
        writer = RunWriter.begin(
            out, model_name=name, config={"planted": self.role}, ident=f"{zlib.crc32(name.encode()):08x}",
            manifest_fields={"model": {
                "model_id": name, "display_name": name, "n_parameters": int(n_parameters),
                "structure": {"n_layers": n_layers},
            }},
        )  # fmt: skip
        with writer:
            writer.write_table("prompts", pd.DataFrame({"prompt_id": self.prompts, "text": self.prompts}))
            batch, conditions = self._tables()
            writer.write_table("conditions", conditions)
            for table, frame in (batch | self.extra).items():
                if table == "fits":
                    writer.write_table(table, frame)
            writer.write_batch(0, {t: f for t, f in (batch | self.extra).items() if t != "fits"})
            writer.finish({})
        return open_run(writer.folder)

    def _tables(self) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
        conditions: dict[str, dict[str, Any]] = {}
        frames: dict[str, list[pd.DataFrame]] = {}
        samples: dict[str, pd.DataFrame] = {}
        for (table, text), columns in self.cells.items():
            where = json.loads(text)
            words = {k: v for k, v in where.items() if k in OF_CONDITION}
            params = {k.removeprefix("params."): v for k, v in where.items() if k.startswith("params.")}
            labels = {k: v for k, v in where.items() if k not in words and not k.startswith("params.")}
            split = labels if table == "samples" else {}  # in a sample every label makes another condition
            name = where.get("condition_id") or json.dumps({**words, **params, **split}, sort_keys=True)
            conditions[name] = {
                "condition_id": name, "arm": "clean", "decode_mode": "forced", "temperature": 0.0, **words,
                "params": json.dumps(params),
            }  # fmt: skip
            keys = pd.DataFrame({"sample_id": [f"{p}|{name}" for p in self.prompts], "prompt_id": self.prompts})
            keys["condition_id"] = name
            base = samples.setdefault(name, keys.assign(category=self.categories, replicate=0))
            if table == "samples":
                samples[name] = base.assign(**labels, **columns)
                continue
            rows = keys.assign(**labels, **columns)
            if table == "items":
                rows = rows.assign(doc_id=[f"{p}:{labels.get('task')}" for p in self.prompts], cluster=self.prompts)
            if table == "slots":
                rows = rows.drop(columns=["prompt_id", "condition_id"]).assign(pos=5, slot=len(frames.get(table, [])))
            if table == "lengths":
                rows = rows.assign(length=labels.get("length", 100))
            frames.setdefault(table, []).append(rows)
        made = {t: pd.concat(f, ignore_index=True) for t, f in frames.items()}
        return {"samples": pd.concat(samples.values(), ignore_index=True), **made}, pd.DataFrame(conditions.values())


def resolved(claim: Claim, where: Mapping[str, Any]) -> dict[str, Any]:
    """``first`` and ``last`` as the numbers that the claim's own settings give."""
    out = {}
    for key, value in where.items():
        name = {"params.slots": "slots", "params.half_life": "half_life", "params.burn_in": "burn_in",
                "length": "lengths"}.get(key, key)  # fmt: skip
        if value in ("first", "last") and isinstance(value, str):
            levels = sorted(claim.settings.get(name, (1, 10)))
            value = levels[0 if value == "first" else -1]
        out[key] = 3 if value == "above 0" else value
    return out


def runs_of(claim: Claim, truths: Sequence[str], out: Path, seed: int = 0) -> list[Run]:
    """Write the runs of a claim: ``truths`` has true, false or open for every part."""
    assert claim.panel is not None
    rng = np.random.default_rng(seed)
    if claim.panel.at_least is not None:
        raise AssertionError("populations are planted as sides")
    made = {role: Planted(role) for role in claim.panel.roles}
    for part, truth in zip(claim.parts, truths, strict=True):
        _PLANT[part.shape](claim, part, truth, made, rng)
    return [made[role].write(out) for role in claim.panel.roles]


def _noise(rng: np.random.Generator, truth: str, scale: float, n: int = N) -> np.ndarray:
    draws = rng.normal(size=n)
    draws = (draws - draws.mean()) / draws.std()  # so that a number planted on the margin lies on it
    return draws * scale * (3.0 if truth == "open" else 0.05)


def _contrast(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    q, shared = target(part, truth), 3.0 + rng.normal(size=N)  # what makes a prompt unusual is shared by all sides
    width = max(abs(q), 0.1)
    if part.terms[0].keep is not None:
        _tokens(claim, part, q, made, rng)
        return
    first, *others = part.terms
    for term in others:
        columns = {part.value: shared} | ({part.acted: np.full(N, 0.0)} if part.acted else {})
        made[term.role].put(part.table, resolved(claim, term.where), **columns)
    rest = sum(t.weight for t in others)
    value = (q + _noise(rng, truth, width) - rest * shared) / first.weight
    columns = {part.value: value} | ({part.acted: np.full(N, 0.5)} if part.acted else {})
    made[first.role].put(part.table, resolved(claim, first.where), **columns)


def _tokens(claim: Claim, part: Any, q: float, made: dict[str, Planted], rng: np.random.Generator) -> None:
    """Nine tokens a text; the judge finds three hard, three easy. The planted change is in the judged third alone."""
    judge, third = part.terms[0].keep
    hard = np.tile([5.0, 1.0, 0.1], 3)
    wanted = hard == (5.0 if third == "highest" else 0.1)
    for role, level, change in (("subject", "last", q), ("subject", "first", 0.0), (judge, None, None)):
        planted = made[role]
        where = {"arm": "clean"} | ({"iterations": level} if level else {})
        planted.put("samples", resolved(claim, where), nll=np.full(N, 2.0))
        name = next(k for k in [json.dumps({**resolved(claim, where)}, sort_keys=True)])
        rows = pd.DataFrame(
            [(f"{p}|{name}", pos) for p in planted.prompts for pos in range(9)], columns=["sample_id", "pos"]
        )
        nll = np.tile(hard, N) if change is None else 2.0 + np.where(np.tile(wanted, N), change, -change)
        rows["nll"] = nll + 0.01 * rng.normal(size=len(rows))
        planted.extra["tokens"] = pd.concat([planted.extra.get("tokens", rows.head(0)), rows], ignore_index=True)


def _steps(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    levels, q = sorted(claim.settings[part.over]), target(part, truth)
    value = 3.0 + rng.normal(size=N)
    for number, level in enumerate(levels):
        right = target(part, "true")
        move = q if (number == len(levels) // 2 and truth != "true") else right
        value = value + (move if number else 0.0) + _noise(rng, truth, max(abs(q), 0.1))
        made[part.role].put(part.table, {**resolved(claim, part.where), part.over: level}, **{part.value: value})


def _trials(planted: Planted, stars: np.ndarray, part: Any) -> None:
    alphas = np.geomspace(1e-3, 100, 41)
    write = f"{part.scale}|gaussian|L2"
    rows = [
        (p, a, f"{write}|s0", "gaussian", 0, (a / star) ** 2, part.criterion, part.scale, write)
        for p, star in zip(planted.prompts, stars, strict=True)
        for a in alphas
    ]
    names = ["prompt_id", "alpha", "condition_id", "kind", "seed", "response", "criterion", "scale", "write"]
    trials = pd.DataFrame(rows, columns=names).assign(level=1.0, floor=0.0, layer=2)
    fits = pd.DataFrame([{
        "fit_id": f"{part.criterion}|{write}|threshold.prompt/1", "criterion": part.criterion, "scale": part.scale,
        "kind": "gaussian", "layer": 2, "write": write, "level": 1.0, "floor": 0.0, "estimator": "threshold.prompt/1",
        "alpha50": float(np.exp(np.median(np.log(stars)))),
    }])  # fmt: skip
    for table, frame in (("trials", trials), ("fits", fits)):
        planted.extra[table] = pd.concat([planted.extra.get(table, frame.head(0)), frame], ignore_index=True)
    planted.put("samples", {"arm": "clean"}, nll=np.full(N, 2.0))


def _ratio(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    index = {"n_layers": 0, "n_parameters": 1}.get(part.relative_to)
    by = 1.0 if index is None else FACTS[part.of][index] / FACTS[part.to][index]
    q, spread = target(part, truth) * by, 0.8 if truth == "open" else 0.02
    shared = rng.normal(size=N) * 0.3
    _trials(made[part.to], np.exp(shared + np.log(0.1)), part)
    own = rng.normal(size=N)
    _trials(made[part.of], np.exp(shared + np.log(0.1 * q) + spread * (own - np.median(own))), part)


def _threshold(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    own = rng.normal(size=N)
    spread = 0.8 if truth == "open" else 0.05
    _trials(made[part.role], target(part, truth) * np.exp(spread * (own - np.median(own))), part)


def _nonlinear(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    alphas = np.geomspace(0.03, 3, 12)
    level = rng.normal(size=N) * 0.3
    for a in alphas:
        x = np.log(a / 0.3)
        curve = {"true": x + 3 * max(x, 0), "false": x - 0.9 * max(x, 0), "open": 2 * x + 0.35 * max(x, 0)}[truth]
        y = np.exp(level + curve + 0.05 * rng.normal(size=N) * (8 if truth == "open" else 1))
        made[part.role].put("samples", {**resolved(claim, part.where), "alpha": float(a)}, **{part.value: y})


def _share(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    share = {"true": 1.0, "false": 0.0, "open": part.prediction.bounds[0]}[truth]
    holds = np.arange(N) < round(share * N)
    column, how, value = part.holds
    where, base = resolved(claim, part.where), np.zeros(N)
    if part.against is not None:
        base = rng.normal(size=N)
        made[part.against.role].put(part.table, resolved(claim, part.against.where), **{column: base})
    if how == "in":
        made[part.role].put(part.table, where, **{column: np.where(holds, value[0], "GAP_UA")})
    elif part.agrees is None:
        made[part.role].put(part.table, where, **{column: base + np.where(holds, value + 0.5, value - 0.5)})
    else:
        said = np.arange(N) % 2 == 0
        columns = {column: said.astype(float), part.agrees[0]: np.where(said == holds, 0.9, 0.1)}
        made[part.role].put(part.table, where, **columns)


def _correlation(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    x, own = rng.normal(size=N), rng.normal(size=N)
    y = {"true": x + 0.1 * own, "false": -x + 0.1 * own, "open": 0.45 * x + own}[truth]
    made[part.role].put(part.table, resolved(claim, part.where), **{part.x: x, part.y: y})


def _dissociation(claim: Claim, part: Any, truth: str, made: dict[str, Planted], rng: np.random.Generator) -> None:
    shares = {"dynamic": (0.9, 0.0, 0.5), "semantic": (0.0, 1.0, 0.12)}[part.of]
    fraction = shares[("true", "false", "open").index(truth)]
    planted = made[part.role]
    arms = (
        {"condition_id": "clean", "arm": "clean"}, {"arm": "perturbed", "alpha": 1.0, "condition_id": "perturbed@1"},
        {"arm": "recovered", "alpha": 1.0, "controller": "slerp (detector)", "condition_id": "perturbed+slerp"},
    )  # fmt: skip
    low, high = (0.2, 0.6) if part.of == "dynamic" else (1.0, 0.2)
    values = (low, high, high + fraction * (low - high))
    for where, value in zip(arms, values, strict=True):
        if part.of == "semantic":
            numbers = (np.arange(N) < round(value * N)).astype(float)
            planted.put("samples", where, **{part.semantic: numbers}, duty=np.full(N, 0.4))
            planted.put("items", {**where, "task": "cloze"}, n_choices=np.full(N, 4))
        else:
            planted.put("samples", where, **{part.dynamic: value + _noise(rng, truth, 0.1)})


def sides_of(claim: Claim, truths: Sequence[str], seed: int = 0) -> list[Side]:
    """Return the models of a population: enough of them that a number can be told."""
    rng = np.random.default_rng(seed)
    shape, truth = claim.parts[0].shape, truths
    return _POPULATIONS[shape](claim, list(truth), rng)


def _side(number: int, frame: pd.DataFrame, **facts: float) -> Side:
    conditions = pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"]})
    samples = frame.assign(condition_id="clean", sample_id=frame["prompt_id"])
    return Side("model", f"m{number}", {"samples": samples, "conditions": conditions}, facts)


def _skeleton(claim: Claim, truths: list[str], rng: np.random.Generator) -> list[Side]:
    part, truth = claim.parts[0], truths[0]
    n = 8 if truth == "open" else 100
    middle = {"above": 0.5, "below": 0.1}.get(part.prediction.expect, target(part, "true"))
    wrong = {"above": 0.0, "below": 0.9}.get(part.prediction.expect, min(target(part, "false"), 0.95))
    q = {"true": middle, "false": wrong}.get(truth, 0.4)
    x = np.stack([rng.normal(size=n), rng.normal(size=n)], axis=1)
    one = np.column_stack([np.ones(n), x])
    signal = one @ np.linalg.lstsq(one, x.sum(1), rcond=None)[0]
    rest = rng.normal(size=n)
    rest = rest - one @ np.linalg.lstsq(one, rest, rcond=None)[0]  # so that R² is what was asked for
    y = np.sqrt(q) * (signal - signal.mean()) / signal.std() + np.sqrt(1 - q) * rest / rest.std()
    return [
        _side(i, pd.DataFrame({"prompt_id": ["a", "b"], "category": "c", part.value: [y[i] - 1, y[i] + 1]}),
              n_parameters=10.0 ** x[i, 0], n_layers=x[i, 1])
        for i in range(n)
    ]  # fmt: skip


def _variance(claim: Claim, truths: list[str], rng: np.random.Generator) -> list[Side]:
    n_models, n_categories = 6, 6
    per = 2 if "open" in truths else 60
    n_prompts = n_categories * per
    shares = {"model": 0.07, "category": 0.17}
    wrong = [p.factor for p, t in zip(claim.parts, truths, strict=True) if t == "false"]
    if wrong:
        shares = {"model": (0.55, 0.17), "category": (0.07, 0.6), "rest": (0.001, 0.02)}[wrong[0]]
        shares = dict(zip(("model", "category"), shares, strict=True))
    m, c = np.linspace(-1, 1, n_models), np.linspace(-1, 1, n_categories)
    category = np.repeat(np.arange(n_categories), per)
    rest = rng.normal(size=(n_models, n_prompts))
    rest -= rest.mean(1, keepdims=True)
    for k in range(n_categories):
        rest[:, category == k] -= rest[:, category == k].mean()
    y = np.sqrt(shares["model"]) * m[:, None] / m.std() + np.sqrt(shares["category"]) * c[category] / c.std()
    y = y + np.sqrt(1 - sum(shares.values())) * rest / rest.std()
    value = claim.parts[0].value
    names = [f"p{i}" for i in range(n_prompts)]
    return [
        _side(i, pd.DataFrame({"prompt_id": names, "category": [f"c{k}" for k in category], value: y[i]}))
        for i in range(n_models)
    ]


def _by_model(claim: Claim, truths: list[str], rng: np.random.Generator) -> list[Side]:
    part = claim.parts[0]
    n = 30
    x, own = rng.normal(size=n), rng.normal(size=n)
    y = {"true": x + 0.1 * own, "false": -x + 0.1 * own, "open": 0.8 * x + own}[truths[0]]
    noise = np.array([-0.01, 0.0, 0.01])
    return [
        _side(i, pd.DataFrame({"prompt_id": list("abc"), "category": "c", part.x: x[i] + noise, part.y: y[i] - noise}))
        for i in range(n)
    ]


_PLANT = {
    "contrast": _contrast, "steps": _steps, "ratio": _ratio, "threshold": _threshold, "nonlinear": _nonlinear,
    "share": _share, "correlation": _correlation, "dissociation": _dissociation,
}  # fmt: skip
_POPULATIONS = {"skeleton": _skeleton, "variance": _variance, "correlation": _by_model}
