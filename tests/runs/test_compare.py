"""Comparisons of small written runs: numbers checked by hand and by an independent way through pandas."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp
from dynprobe.errors import MetricError, RunFolderError, UsageError
from dynprobe.metrics.statistics import cluster_mean
from dynprobe.runs import RunWriter, register_converter
from dynprobe.runs._compare_columns import _CONVERTERS
from dynprobe.runs._compare_correlation import _known, _over_prompts, rank_correlation
from dynprobe.runs._compare_depth import along_depth, first_state
from dynprobe.runs._compare_matched import at_equal_kl
from dynprobe.runs._compare_pairs import Settings
from dynprobe.runs._compare_thresholds import mover

TEXTS = {f"p{i}": f"text {i}" for i in range(5)}
KAPPA = {"id": "kappa.phase/1", "unit": "half-turns", "digest": "aa", "span": "all", "aggregation": "mean"}
FACTS = {
    "kappa_phase": KAPPA,
    "kappa_path": KAPPA | {"unit": "rad", "aggregation": "sum"},
    "delta_rel_prev": {"id": "delta.rel_prev/1", "unit": "1", "digest": "bb", "span": "all"},
    "delta_angle": {"id": "delta.angle/1", "unit": "half-turns", "digest": "cc", "span": "all"},
    "norm": {"id": "resid.norm/1", "unit": "state", "digest": "dd", "span": "all"},
    "nll": {"id": "output.nll/1", "unit": "nat", "digest": "ee", "span": "new"},
    "kl_clean_pert": {"id": "output.kl/1", "unit": "nat", "digest": "ff", "span": "all"},
    "limen_ratio": {"id": "limen.ratio/1", "unit": "1", "digest": "gg", "span": "new"},
    "diverge_angle": {"id": "diverge.angle/1", "unit": "half-turns", "digest": "hh", "span": "all"},
}


def write(
    out: Path,
    name: str,
    samples: pd.DataFrame,
    *,
    profiles: pd.DataFrame | None = None,
    depths: pd.DataFrame | None = None,
    texts: dict[str, str | None] | None = None,
    conditions: pd.DataFrame | None = None,
    facts: dict[str, Any] | None = None,
    tables: dict[str, pd.DataFrame] | None = None,
    finish: bool = True,
    **fields: Any,
) -> Path:
    """Write a run of one batch; ``fields`` go into its manifest."""
    texts = TEXTS if texts is None else texts
    manifest = {
        "model": {"model_id": name, "model_type": name, "structure": {"n_layers": 4}},
        "weights": {"hash": f"sha256:{name}"}, "dtypes": {"weights": "float32"}, "versions": {"dynprobe": "0.1.0"},
    } | fields  # fmt: skip
    ident = f"{zlib.crc32(name.encode()) ^ (len(list(out.glob('*'))) if out.exists() else 0):08x}"
    config = manifest.pop("config", {"perturb": ["alpha=0.1"]})
    writer = RunWriter.begin(
        out, ident=ident, model_name=name, config=config, manifest_fields=manifest,
        columns=FACTS if facts is None else facts,
    )  # fmt: skip
    with writer:
        writer.write_table("prompts", pd.DataFrame({"prompt_id": list(texts), "text": list(texts.values())}))
        if conditions is None:
            conditions = pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"], "alpha": [0.0]})
        writer.write_table("conditions", conditions)
        batch = {"samples": samples} if len(samples) else {}
        batch |= {} if profiles is None else {"profiles": profiles}
        batch |= {} if depths is None else {"depths": depths}
        for table, frame in (tables or {}).items():
            if table == "fits":
                writer.write_table(table, frame)
            else:
                batch[table] = frame
        writer.write_batch(0, batch)
        if finish:
            writer.finish({})
        else:
            writer.interrupt("test")
    return writer.folder


def samples(values: dict[str, Any], condition: str = "clean", replicate: int = 0) -> pd.DataFrame:
    frame = pd.DataFrame(values)
    if "prompt_id" not in frame:
        frame.insert(0, "prompt_id", [f"p{i}" for i in range(len(frame))])
    frame.insert(0, "sample_id", [f"{p}|{condition}|{replicate}" for p in frame["prompt_id"]])
    return frame.assign(condition_id=condition, replicate=replicate, status="ok")


def stairs(values: dict[str, list[list[float]]], condition: str = "clean", first: int = 0) -> pd.DataFrame:
    """Profiles: column → one list per prompt, from depth ``first``."""
    rows = []
    columns = list(values)
    for p, lists in enumerate(zip(*values.values(), strict=True)):
        for d, cells in enumerate(zip(*lists, strict=True)):
            rows.append(
                {
                    "sample_id": f"p{p}|{condition}|0",
                    "track": "resid",
                    "depth": first + d,
                    **dict(zip(columns, cells, strict=True)),
                }
            )
    return pd.DataFrame(rows)


NAN = float("nan")


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs on the same five prompts: 3 steps against 6, with profiles that go with their samples."""
    rng = np.random.default_rng(0)
    made = []
    for name, steps, start in (("short", 3, 1), ("long", 6, 0)):
        kappa = rng.uniform(0.05, 0.3, (5, steps))
        delta = rng.uniform(0.1, 0.9, (5, steps))
        norm = rng.uniform(1, 9, (5, steps + 1))
        pad = [[NAN] * (start + 1)] * 5
        profiles = stairs(
            {
                "kappa_phase": [p + list(k) for p, k in zip(pad, kappa, strict=True)],
                "delta_angle": [p + list(k) for p, k in zip(pad, kappa, strict=True)],
                "delta_rel_prev": [p + list(d) for p, d in zip(pad, delta, strict=True)],
                "norm": [[NAN] * start + list(n) for n in norm],
            }
        )
        table = samples(
            {
                "kappa_phase": kappa.mean(1), "kappa_path": math.pi * kappa.sum(1), "delta_rel_prev": delta.mean(1),
                "nll": rng.uniform(1, 4, 5), "n_fed": 20,
            }
        )  # fmt: skip
        made.append(write(tmp_path / "runs", name, table, profiles=profiles))
    return made


def test_means_and_differences_are_those_of_pandas(two):
    found = dp.compare(two)
    tables = [dp.open(path).samples.astype({"prompt_id": str}).set_index("prompt_id") for path in two]
    for metric in ("kappa_phase", "kappa_path", "delta_rel_prev", "nll"):
        a, b = (t[metric].astype(float) for t in tables)
        delta = (a - b).sort_index()
        row = found.pairs.query("metric == @metric").iloc[0]
        assert row["difference"] == pytest.approx(delta.mean(), rel=1e-6)
        assert row["effect_dz"] == pytest.approx(delta.mean() / delta.std(ddof=1), rel=1e-5)
        flips = [np.abs(np.mean(delta * s)) for s in itertools.product([1, -1], repeat=5)]
        assert row["p"] == pytest.approx(np.mean(np.array(flips) >= abs(delta.mean()) * (1 - 1e-9)))
        assert row["low"] <= row["difference"] <= row["high"]
        for label, side in (("short", a), ("long", b)):
            mean = found.means[(found.means["metric"] == metric) & (found.means["run"] == label)].iloc[0]
            assert mean["mean"] == pytest.approx(side.mean(), rel=1e-6)
            assert mean["sd"] == pytest.approx(side.std(ddof=1), rel=1e-5)
            assert mean["n"] == 5
    assert (found.pairs["family"] == 4).all()
    assert (found.pairs["p_holm"] >= found.pairs["p_bh"] - 1e-12).all()
    assert (found.pairs["p_bh"] >= found.pairs["p"] - 1e-12).all()


def test_area_is_the_mean_of_steps_and_the_path_their_sum(two):
    found = dp.compare(two)
    for path, label in zip(two, ("short", "long"), strict=True):
        profiles = dp.open(path).profiles.astype({"sample_id": str})
        kappa = profiles.groupby("sample_id")["kappa_phase"]
        own = found.depth_means[found.depth_means["run"] == label].query("metric == 'kappa_phase'").set_index("measure")
        assert own.loc["area", "mean"] == pytest.approx(kappa.mean().mean(), rel=1e-6)
        assert own.loc["path", "mean"] == pytest.approx(math.pi * kappa.sum().mean(), rel=1e-6)
        assert own.loc["path", "unit"] == "rad"
        sampled = found.means[found.means["run"] == label].set_index("metric")["mean"]
        assert own.loc["area", "mean"] == pytest.approx(sampled["kappa_phase"], rel=1e-6)
        assert own.loc["path", "mean"] == pytest.approx(sampled["kappa_path"], rel=1e-6)
        line = found.profiles[found.profiles["run"] == label].query("metric == 'kappa_phase'")
        assert line["path"].iloc[0] == 0
        assert line["path"].iloc[-1] == pytest.approx(own.loc["path", "mean"], rel=1e-6)
        assert (np.diff(line["path"]) > 0).all()
    assert found.runs["steps"].tolist() == [3, 6]
    assert found.runs["first_depth"].tolist() == [1, 0]


def test_a_flow_sampled_twice_as_finely_keeps_its_path_and_halves_its_kappa(tmp_path):
    made = []
    for name, steps in (("coarse", 4), ("fine", 8)):
        kappa = np.full((5, steps), 0.8 / steps) + np.arange(5)[:, None] * 1e-3 / steps
        profiles = stairs({"kappa_phase": [[NAN, *row] for row in kappa]})
        table = samples({"kappa_phase": kappa.mean(1), "kappa_path": math.pi * kappa.sum(1)})
        made.append(write(tmp_path, name, table, profiles=profiles))
    pairs = dp.compare(made).depth_pairs.set_index("measure")
    assert pairs.loc["path", "difference"] == pytest.approx(0, abs=1e-6)
    assert pairs.loc["area", "difference"] == pytest.approx(0.1, rel=0.01)


def test_kappa_always_comes_with_its_path(two):
    assert set(dp.compare(two, metric="kappa_phase").pairs["metric"]) == {"kappa_phase", "kappa_path"}
    found = dp.compare(two, metric=["kappa_path"])
    assert set(found.pairs["metric"]) == {"kappa_phase", "kappa_path"}
    assert set(found.depth_pairs["metric"]) == {"kappa_phase"}
    assert found.pairs["family"].iloc[0] == 2


def test_normalised_depth_by_hand():
    grid = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    states = along_depth(np.arange(1, 4), np.array([[1.0, 3.0, 2.0]]), 1, "state", grid)
    assert states.reach == 0
    assert states.profile[0].tolist() == [1.0, 2.0, 3.0, 2.5, 2.0]
    assert states.area[0] == pytest.approx((2.0 + 2.5) / 2)
    assert states.cumulative is None
    steps = along_depth(np.arange(1, 4), np.array([[NAN, 0.2, 0.6]]), 1, "half-turns", grid)
    assert steps.nodes.tolist() == [0.25, 0.75]
    assert steps.profile[0] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    assert steps.cumulative[0] == pytest.approx(np.pi * np.array([0.0, 0.1, 0.2, 0.5, 0.8]))
    curvature = along_depth(np.arange(1, 5), np.array([[NAN, NAN, 1.0, 2.0]]), 1, "rad", grid)
    assert curvature.nodes == pytest.approx([1 / 3, 2 / 3])
    assert first_state(np.arange(5), {"norm": np.array([[NAN, 1, 2, 3, 4]])}) == 1
    assert along_depth(np.arange(1), np.ones((1, 1)), 0, "state", grid) is None


def test_a_missing_step_leaves_the_path_unknown_from_there_on():
    grid = np.linspace(0, 1, 5)
    found = along_depth(np.arange(5), np.array([[NAN, 0.1, 0.2, NAN, 0.4]]), 0, "half-turns", grid)
    assert np.isnan(found.path[0])
    assert found.cumulative[0, :3] == pytest.approx(np.pi * np.array([0, 0.1, 0.3]))
    assert np.isnan(found.cumulative[0, 3:]).all()
    assert np.isfinite(found.area[0])
    few = along_depth(np.arange(5), np.array([[NAN, 0.1, NAN, NAN, NAN]]), 0, "half-turns", grid)
    assert np.isnan(few.area[0])
    gaps = along_depth(np.array([0, 2, 4]), np.array([[NAN, 0.1, 0.2]]), 0, "half-turns", grid)
    assert np.isnan(gaps.path).all()


def test_depths_are_averaged_over_tokens_without_the_sink_and_over_samples_next(tmp_path):
    made = []
    for name, extra in (("a", 0.0), ("b", 0.1)):
        table = pd.concat([samples({"nll": [1.0, 2.0]}, replicate=r) for r in (0, 1)])
        rows = [
            {"sample_id": s, "pos": pos, "track": "resid", "depth": d, "angle": NAN if not d else extra + value}
            for s, tokens in (("p0|clean|0", 4), ("p0|clean|1", 2), ("p1|clean|0", 2), ("p1|clean|1", 2))
            for pos in range(tokens)
            for d in range(3)
            for value in [100.0 if pos == 0 else 1.0 if s.endswith("0") else 3.0]
        ]
        facts = FACTS | {"angle": {"id": "delta.angle/1", "unit": "rad", "digest": "cc", "span": "all"}}
        made.append(
            write(tmp_path, name, table, depths=pd.DataFrame(rows), facts=facts, texts=dict(list(TEXTS.items())[:2]))
        )
    found = dp.compare(made)
    means = found.depth_means.query("measure == 'area'").set_index("run")
    # Three tokens of 1 and one of 3 are 2 on average: samples count, not tokens.
    assert means.loc["a", "mean"] == pytest.approx(2.0)
    assert means.loc["b", "mean"] == pytest.approx(2.1, rel=1e-6)
    assert found.depth_means.query("measure == 'path'")["unit"].unique().tolist() == ["rad"]
    assert any("replicates: clean of a has 4 rows of 2 prompts" in w for w in found.warnings)
    assert found.pairs.set_index("metric").loc["nll", "n"] == 2


def test_prompts_are_the_same_when_name_and_text_are(tmp_path):
    table = samples({"nll": [1.0, 2.0, 3.0, 4.0, 5.0]})
    a = write(tmp_path, "a", table)
    other = TEXTS | {"p1": "another text"}
    b = write(tmp_path, "b", table.assign(nll=table["nll"] + 1), texts=other)
    found = dp.compare([a, b])
    assert found.facts["prompts"] == 4
    row = found.pairs.iloc[0]
    assert (row["n"], row["difference"]) == (4, -1)
    assert any("another text in b" in w for w in found.warnings)
    renamed = table.assign(prompt_id=[f"q{i}" for i in range(5)], sample_id=[f"q{i}|clean|0" for i in range(5)])
    c = write(tmp_path, "c", renamed, texts={f"q{i}": t for i, t in enumerate(TEXTS.values())})
    with pytest.raises(UsageError, match=r"5 texts are the same under other names[\s\S]*--prompts"):
        dp.compare([a, c])


def test_prompts_of_one_text_are_one_cluster(tmp_path):
    texts = TEXTS | {"p1": TEXTS["p0"]}
    a = write(tmp_path, "a", samples({"nll": [1.0, 3.0, 5.0, 7.0, 9.0]}), texts=texts)
    b = write(tmp_path, "b", samples({"nll": [0.0] * 5}), texts=texts)
    found = dp.compare([a, b])
    row = found.pairs.iloc[0]
    assert (row["n"], row["difference"]) == (4, (2 + 5 + 7 + 9) / 4)
    assert found.facts["prompts"] == 4
    assert any("one cluster" in w for w in found.warnings)


def test_bad_rows_are_left_out(tmp_path):
    table = samples({"nll": [1.0, 2.0, 3.0, 4.0, 500.0]})
    table.loc[4, "status"] = "nonfinite"
    a = write(tmp_path, "a", table)
    b = write(tmp_path, "b", samples({"nll": [0.0] * 5}))
    row = dp.compare([a, b]).pairs.iloc[0]
    assert (row["n"], row["n_asked"], row["difference"]) == (4, 5, 2.5)


def test_other_ids_are_refused_and_named(tmp_path):
    table = samples({"nll": [1.0, 2.0, 3.0], "limen_ratio": [1.0, 2.0, 3.0], "kappa_phase": [0.1, 0.2, 0.3]})
    a = write(tmp_path, "a", table)
    changed = FACTS | {
        "nll": FACTS["nll"] | {"id": "output.nll/2"},
        "limen_ratio": FACTS["limen_ratio"] | {"span": "prompt"},
    }
    b = write(tmp_path, "b", table, facts=changed)
    found = dp.compare([a, b])
    assert set(found.pairs["metric"]) == {"kappa_phase"}
    reasons = found.refused.set_index("metric")["reason"]
    assert "metric id 'output.nll/1' against 'output.nll/2'" in reasons["nll"]
    assert "span 'new' against 'prompt'" in reasons["limen_ratio"]
    with pytest.raises(UsageError, match=r"nll is not one metric.*'output.nll/1' against 'output.nll/2'.*converter"):
        dp.compare([a, b], metric=["nll"])


def test_a_registered_converter_allows_it(tmp_path):
    a = write(tmp_path, "a", samples({"nll": [1.0, 2.0, 3.0]}))
    bits = FACTS | {"nll": FACTS["nll"] | {"id": "output.bits/1", "unit": "bit"}}
    b = write(tmp_path, "b", samples({"nll": [1.0, 2.0, 3.0]}), facts=bits)
    assert dp.compare([a, b, write(tmp_path, "c", samples({"nll": [1.0, 1.0, 1.0]}))]).refused["metric"].tolist() == [
        "nll",
        "nll",
    ]
    try:
        register_converter("output.bits/1", "output.nll/1", unit="bit", scale=math.log(2))
        row = dp.compare([a, b]).pairs.iloc[0]
        assert row["difference"] == pytest.approx(2 * (1 - math.log(2)))
    finally:
        _CONVERTERS.pop(("output.bits/1", "output.nll/1"))
    with pytest.raises(MetricError, match="two ids"):
        register_converter("x.y/1", "x.y/1", unit="1")


def test_angle_steps_stand_for_kappa_but_an_angle_in_rad_does_not(tmp_path):
    a = write(tmp_path, "a", samples({"kappa_phase": [0.1, 0.2, 0.3]}))
    b = write(tmp_path, "b", samples({"delta_angle": [0.1, 0.2, 0.4]}))
    row = dp.compare([a, b], metric="kappa_phase").pairs.iloc[0]
    assert row["difference"] == pytest.approx(-0.1 / 3, rel=1e-5)
    in_rad = FACTS | {"delta_angle": FACTS["delta_angle"] | {"unit": "rad"}}
    c = write(tmp_path, "c", samples({"delta_angle": [0.1, 0.2, 0.4]}), facts=in_rad)
    with pytest.raises(UsageError, match="only a has a metric column 'kappa_phase'"):
        dp.compare([a, c], metric="kappa_phase")


def sweep(out: Path, name: str, factor: float, **options: Any) -> Path:
    """KL = (factor·α)², κ_d = factor·α: at KL of k nats κ_d = √k, at α = √k/factor, whatever the model."""
    alphas = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    rows, conditions = [samples({"nll": [1.0] * 5})], [{"condition_id": "clean", "arm": "clean", "alpha": 0.0}]
    for seed, alpha in itertools.product((0, 1), alphas):
        own = f"s{seed}|{alpha}"
        conditions.append(
            {
                "condition_id": own, "arm": "perturbed", "alpha": alpha, "scale": "relnorm", "kind": "gaussian",
                "decode_mode": "forced", "seed": seed, "layer": 2, "where": "layers=2,positions=1:",
            }
        )  # fmt: skip
        rows.append(
            samples({"kl_clean_pert": [(factor * alpha) ** 2] * 5, "limen_ratio": [math.log(factor * alpha)] * 5}, own)
        )
    return write(out, name, pd.concat(rows), conditions=pd.DataFrame(conditions), **options)


def test_sweeps_are_matched_at_equal_kl(tmp_path):
    a, b = sweep(tmp_path, "a", 1.0), sweep(tmp_path, "b", 3.0)
    found = dp.compare([a, b], kl=[0.1, 1.0])
    table = found.matched_pairs.set_index(["kl", "metric"])
    for kl in (0.1, 1.0):
        # α at equal KL is three times as large, and what depends on α·factor alone is equal.
        assert table.loc[(kl, "ln_alpha"), "ratio"] == pytest.approx(3.0, rel=1e-5)
        assert table.loc[(kl, "limen_ratio"), "difference"] == pytest.approx(0, abs=1e-6)
    means = found.matched_means.query("metric == 'limen_ratio' and run == 'a'").set_index("kl")["mean"]
    assert means[0.1] == pytest.approx(math.log(math.sqrt(0.1)), rel=1e-5)
    far = dp.compare([a, b], kl=[1e-4])
    assert not len(far.matched_pairs)
    assert any("lies outside the tested strengths of a and b" in w for w in far.warnings)


def test_other_places_are_not_matched(tmp_path):
    a = sweep(tmp_path, "a", 1.0)
    b = sweep(tmp_path, "b", 1.0, model={"model_type": "b", "structure": {"n_layers": 16}})  # layer 2 of 16
    found = dp.compare([a, b])
    assert not len(found.matched_pairs)
    assert any("no write is common" in w for w in found.warnings)


def test_equal_kl_by_hand():
    assert at_equal_kl([0.1, 0.4], [0.01, 1.0], [2.0, 4.0], 0.1) == pytest.approx((0.2, 3.0))
    assert np.isnan(at_equal_kl([0.1, 0.4], [0.01, 1.0], [2.0, 4.0], 2.0)).all()
    assert np.isnan(at_equal_kl([0.1, 0.4], [0.2, 1.0], [2.0, 4.0], 0.1)).all()
    first = at_equal_kl([1, 2, 3, 4], [0.1, 1, 0.1, 1], [0, 1, 2, 3], 0.5)
    assert first[0] < 2  # the first crossing from below


def threshold(out: Path, name: str, factor: float, **options: Any) -> Path:
    """Each prompt crosses 1 nat at α* = factor·(1 + prompt/10), where the response is (α/α*)²."""
    alphas = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
    star = {p: factor * (1 + i / 10) for i, p in enumerate(TEXTS)}
    common = {"criterion": "kl", "scale": "relnorm", "kind": "gaussian", "layer": 2, "write": "relnorm|gaussian|L2"}
    trials = pd.DataFrame(
        [
            {"prompt_id": p, "alpha": a, "response": (a / s) ** 2, "level": 1.0, "floor": 0.0, "seed": 0, **common}
            for p, s in star.items()
            for a in alphas
        ]
    )
    median = float(np.median(list(star.values())))
    own = {"alpha50": median, "low": median / 2, "high": median * 2, "level": 1.0, "floor": 0.0, "n": 5, **common}
    names = {"one": "threshold.prompt/1", "two": "psychometric.logistic/1"}
    fits = pd.DataFrame([{"fit_id": i, "estimator": name, **own} for i, name in names.items()])
    return write(out, name, pd.DataFrame(), tables={"trials": trials, "fits": fits}, **options)


def test_threshold_ratios_are_exponentiated_differences(tmp_path):
    config = {"alphas": [], "criterion": ["kl"]}
    a, b = (threshold(tmp_path, n, f, config=config) for n, f in (("a", 3.0), ("b", 0.4)))
    found = dp.compare([a, b]).thresholds.set_index("estimator")
    own = found.loc["threshold.prompt/1"]
    assert own["ratio"] == pytest.approx(7.5)
    assert (own["ratio_low"], own["ratio_high"]) == pytest.approx((7.5, 7.5))  # pairing takes the prompts' spread out
    assert own["paired"]
    assert own["ratio"] == pytest.approx(own["alpha50_a"] / own["alpha50_b"])
    logistic = found.loc["psychometric.logistic/1"]
    spread = math.exp(math.sqrt(2) * math.log(2))
    assert (logistic["ratio_low"], logistic["ratio_high"]) == pytest.approx((7.5 / spread, 7.5 * spread))
    assert mover((7.5, 7.5, 7.5), (1.0, 0.5, 2.0)) == pytest.approx((7.5, 3.75, 15.0))


def test_rank_correlations_of_delta_and_kappa(tmp_path):
    rising = np.array([0.1, 0.2, 0.3, 0.4])
    kappa = [[NAN, *(rising + p / 100)] for p in range(5)]
    falling = [[NAN, *(rising[::-1] - p / 100)] for p in range(5)]
    norm = [[1.0, 2.0, 4.0, 8.0, 16.0]] * 5
    a = write(
        tmp_path,
        "a",
        samples({"nll": [1.0] * 5}),
        profiles=stairs({"kappa_phase": kappa, "delta_rel_prev": kappa, "norm": norm}),
    )
    b = write(
        tmp_path,
        "b",
        samples({"nll": [1.0] * 5}),
        profiles=stairs({"kappa_phase": falling, "delta_rel_prev": falling, "norm": norm}),
    )
    table = dp.compare([a, b]).correlations.query("delta_of == 'a' and kappa_of == 'b'").set_index(["part", "over"])
    assert table.loc[("whole", "depth"), "rho"] == pytest.approx(-1)
    assert table.loc[("whole", "prompts"), "rho"] == pytest.approx(-1)
    radial = table.loc[("radial", "prompts")]
    assert np.isnan(radial["rho"])  # every norm doubles at every step
    assert radial["reason"] == "zero-denominator"
    assert rank_correlation(np.array([[1.0, 2, 3], [1, 1, 1]]), np.array([[9.0, 5, 1], [1, 2, 3]])).tolist()[0] == -1


def test_warnings_name_what_differs(tmp_path):
    table = samples(
        {"kappa_phase": [0.1, 0.2, 0.3], "limen_ratio": [1.0, 2.0, 3.0], "nll": [1.0, 2.0, 3.0], "n_fed": 20}
    )
    perturbed = pd.DataFrame({"condition_id": ["clean", "x"], "arm": ["clean", "perturbed"], "alpha": [0.0, 0.1]})
    both = pd.concat([table, table.assign(condition_id="x", sample_id=table["sample_id"] + "x")])
    model = {"model_id": "m", "tokenizer": {"class": "A", "size": 10}}
    a = write(tmp_path, "m", both, conditions=perturbed, model=model, calibration_hash="c1")
    b = write(
        tmp_path, "m", both.assign(n_fed=40), conditions=perturbed.assign(alpha=[0.0, 0.2]),
        model=model | {"tokenizer": {"class": "B", "size": 20}}, weights={"hash": "sha256:other"},
        dtypes={"weights": "bfloat16"}, versions={"dynprobe": "0.2.0"},
    )  # fmt: skip
    c = write(tmp_path, "m", both, conditions=perturbed, model=model, calibration_hash="c2")
    said = "\n".join(dp.compare([a, b, c]).warnings)
    for part in (
        "other weights", "bfloat16, whose rounding alone", "other dtype", "unequal T in clean", "limen_ratio",
        "x is not the same in all runs: alpha", "other tokenizers", "two calibrations (c1 and c2)",
        "other version of dynprobe", "no sign-flip p can be below 0.0625",
    ):  # fmt: skip
        assert part in said, part
    assert "too few models" not in said  # one architecture is no comparison of architectures


def test_lengths_of_states_are_each_models_own(tmp_path):
    values = {"kappa_phase": [0.1, 0.2, 0.3], "norm": [10.0, 20.0, 30.0]}
    said = "norm: the unit is the length of a state, which is each model's own"
    facts = {**FACTS, "norm": {"id": "resid.norm/1", "unit": "state", "digest": "nn", "span": "all"}}
    one = write(tmp_path, "a", samples(values), facts=facts)
    other = write(tmp_path, "b", samples(values), facts=facts)
    assert any(w.startswith(said) for w in dp.compare([one, other]).grave)
    same = write(tmp_path, "c", samples(values), facts=facts, weights={"hash": "sha256:a"})
    assert not any(said in w for w in dp.compare([one, same]).warnings)
    assert not any(said in w for w in dp.compare([one, other], metric=["kappa_phase"]).warnings)


def test_too_few_models_and_pseudo_replication(tmp_path):
    many = pd.concat([samples({"nll": [1.0, 2.0, 3.0]}, replicate=r) for r in range(3)])
    a, b = write(tmp_path, "a", many), write(tmp_path, "b", samples({"nll": [1.0, 2.0, 3.0]}))
    said = "\n".join(dp.compare([a, b]).warnings)
    assert "too few models per architecture (1 a, 1 b" in said
    assert "pseudo-replication: clean of a has 9 rows of 3 prompts" in said


def test_conditions_by_id_arm_and_alternatives(tmp_path):
    table = pd.concat([samples({"nll": [x, x, x]}, name) for name, x in (("clean", 1.0), ("u", 2.0), ("v", 3.0))])
    known = pd.DataFrame({"condition_id": ["clean", "u", "v"], "arm": ["clean", "perturbed", "perturbed"]})
    a = write(tmp_path, "a", table, conditions=known)
    b = write(tmp_path, "b", table.assign(nll=table["nll"] * 2), conditions=known)
    assert list(dict.fromkeys(dp.compare([a, b]).pairs["condition"])) == ["clean", "u", "v"]
    assert dp.compare([a, b], condition="v").pairs["difference"].tolist() == [-3.0]
    assert list(dict.fromkeys(dp.compare([a, b], condition="perturbed").pairs["condition"])) == ["u", "v"]
    steps = pd.DataFrame({"condition_id": ["T2", "T4"], "arm": ["clean", "clean"]})
    two = pd.concat([samples({"nll": [x, x, x]}, name) for name, x in (("T2", 5.0), ("T4", 7.0))])
    c = write(tmp_path, "c", two, conditions=steps)
    with pytest.raises(UsageError, match=r"names 2 conditions of c: T2, T4.*--condition 'clean,T4'"):
        dp.compare([a, c])
    assert dp.compare([a, c], condition="clean,T4").pairs["difference"].tolist() == [-6.0]
    with pytest.raises(UsageError, match=r"no run has a condition 'perturbd'. Did you mean 'perturbed'"):
        dp.compare([a, b], condition="perturbd")


def test_several_tracks_need_a_name(tmp_path):
    profiles = stairs({"kappa_phase": [[NAN, 0.1, 0.2]] * 3})
    tracks = pd.concat([profiles.assign(track=t) for t in ("fast", "slow")])
    made = [write(tmp_path, n, samples({"nll": [1.0, 2.0, 3.0]}), profiles=tracks) for n in ("a", "b")]
    with pytest.raises(UsageError, match=r"several tracks.*fast, slow.*--track"):
        dp.compare(made)
    assert dp.compare(made, track="slow").runs["track"].tolist() == ["slow", "slow"]


def test_equivalence_within_a_declared_margin(two):
    found = dp.compare(two, metric=["nll", "kappa_phase"], margin={"nll": 100.0, "kappa_phase.area": 1e-9})
    assert found.pairs.set_index("metric").loc["nll", "equivalent"] is True
    rows = found.depth_pairs.set_index("measure")
    assert rows.loc["area", "equivalent"] is False


def test_refusals_say_what_to_type(tmp_path, two):
    with pytest.raises(UsageError, match="two runs or more"):
        dp.compare(two[:1])
    with pytest.raises(UsageError, match="are one run"):
        dp.compare([two[0], two[0]])
    with pytest.raises(RunFolderError, match="no run folder"):
        dp.compare([two[0], tmp_path / "nowhere"])
    half = write(
        tmp_path,
        "half",
        samples({"nll": [1.0, 2.0, 3.0]}),
        finish=False,
        command=["dynprobe", "run", "--model", "half"],
    )
    with pytest.raises(RunFolderError, match=r"interrupted.*dynprobe run --model half"):
        dp.compare([two[0], half])
    empty = write(tmp_path, "none", samples({"other": [1.0, 2.0, 3.0, 4.0, 5.0]}))
    with pytest.raises(UsageError, match=r"no metric in common[\s\S]*--columns"):
        dp.compare([two[0], empty])
    with pytest.raises(UsageError, match=r"'kapa_phase'. Did you mean 'kappa_phase'"):
        dp.compare(two, metric="kapa_phase")


def test_a_damaged_part_is_named(two):
    part = next((two[0] / "profiles").glob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 3 : len(content) // 2] = b"\0" * (len(content) // 2 - len(content) // 3)
    part.write_bytes(bytes(content))
    with pytest.raises(RunFolderError, match=r"verify\(\)|damaged"):
        dp.compare(two)
    part.write_bytes(bytes(content[:100]))
    with pytest.raises(RunFolderError, match=part.name):
        dp.compare(two)


def test_it_is_the_same_twice_and_in_any_order(two):
    first, second = dp.compare(two), dp.compare(two)
    pd.testing.assert_frame_equal(first.pairs, second.pairs)
    turned = dp.compare(two[::-1]).pairs.set_index("metric")
    for row in first.pairs.itertuples():
        other = turned.loc[row.metric]
        assert other["difference"] == pytest.approx(-row.difference)
        assert other["p"] == row.p


def test_files_hold_every_number(two, tmp_path):
    found = dp.compare([dp.open(path) for path in two])
    content = json.loads(found.save(tmp_path / "c.json").read_text())
    assert content["pairs"][0]["difference"] == pytest.approx(found.pairs["difference"].iloc[0])
    assert content["warnings"] == found.warnings
    table = pd.read_csv(found.save(tmp_path / "c.csv"))
    own = table[table["table"] == "pairs"].reset_index()
    assert own["difference"].tolist() == pytest.approx(found.pairs["difference"].tolist())
    assert set(table["table"]) >= {"runs", "means", "pairs", "profiles", "warnings"}
    text = found.save(tmp_path / "c.md").read_text()
    assert "| kappa_phase |" in text
    with pytest.raises(UsageError, match="the ending says the format"):
        found.save(tmp_path / "c.xlsx")
    with pytest.raises(UsageError, match="there is no folder"):
        found.save(tmp_path / "nowhere" / "c.json")
    assert "5 common prompts" in repr(found)


def test_the_figure_shows_every_run_on_both_axes(two, tmp_path):
    found = dp.compare(two)
    figure = found.figure()
    left, right = figure.axes
    assert [len(panel.lines) for panel in (left, right)] == [2, 2]
    assert len(left.collections) == 2  # bands
    own = found.profiles.query("metric == 'kappa_phase' and run == 'long'")
    assert left.lines[1].get_ydata() == pytest.approx(own["mean"].to_numpy())
    assert right.lines[1].get_ydata() == pytest.approx(own["path"].to_numpy())
    assert "rad" in right.get_ylabel()
    assert found.draw(tmp_path / "f.png").stat().st_size > 5000
    assert len(found.figure("norm").axes) == 1  # a state has no path
    with pytest.raises(UsageError, match=r"'kappa_phas' in this comparison. Did you mean 'kappa_phase'"):
        found.figure("kappa_phas")


def test_of_three_runs_all_pairs_are_compared(tmp_path):
    made = [write(tmp_path, n, samples({"nll": [x, x + 1, x + 2]})) for n, x in (("a", 1.0), ("b", 2.0), ("c", 4.0))]
    rows = dp.compare(made).pairs
    assert list(zip(rows["a"], rows["b"], rows["difference"], strict=True)) == [
        ("a", "b", -1),
        ("a", "c", -3),
        ("b", "c", -2),
    ]


def test_runs_of_one_model_get_labels_of_their_own(tmp_path):
    made = [write(tmp_path, "m", samples({"nll": [x, x, x]})) for x in (1.0, 2.0)]
    labels = dp.compare(made).runs["run"].tolist()
    assert len(set(labels)) == 2
    assert all(label.startswith("m ") for label in labels)


@pytest.mark.parametrize(("n", "rho", "reason"), [(3, None, "prompts<4"), (6, 1.0, "no-spread")])
def test_a_rank_correlation_of_few_or_without_spread(n, rho, reason):
    """Three prompts have no ρ; identical ranks in every replicate have no interval."""
    how = Settings(n_boot=50)
    found = _over_prompts(np.arange(3.0), np.arange(3.0) ** 2, how) if n == 3 else _known(
        cluster_mean(np.full(n, rho), n_boot=50), 4
    )  # fmt: skip
    assert found["reason"] == reason
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])
    assert math.isnan(found["rho"]) if rho is None else found["rho"] == rho
