"""``dissociate``: items answered under noise, planted controllers whose verdict is known, and what is refused."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dynprobe as dp
from dynprobe.controllers.recovery import MODES, Always, Mode, Recovery
from dynprobe.controllers.recovery._modes import _ADOPTED
from dynprobe.errors import InterruptedRunError, PromptError, RunFolderError, UsageError
from dynprobe.metrics.statistics import dissociation_verdict
from dynprobe.models._zoo import zoo_folder
from dynprobe.probes import Perturb, Subject
from dynprobe.prompts import Item
from dynprobe.protocols import DissociateConfig
from dynprobe.protocols._dissociate_config import by_construction
from dynprobe.protocols._dissociate_summary import dissociation_summary
from dynprobe.protocols._item_dose import dose_of
from dynprobe.protocols._item_rows import Question, laid_out
from dynprobe.protocols._recover_arms import Arm
from dynprobe.testing import tiny_llama

TEXT = (zoo_folder("tiny-llama").parent / "held_out.txt").read_text(encoding="utf-8").replace("\n", " ")
STRONG = "alpha=4,layers=50%,phase=decode"
#: One arm is enough where the arm is not what is tested.
QUICK = {"alphas": "4", "perturb": STRONG, "timings": "always"}


def _items(n: int = 24, seed: int = 0) -> list[Item]:
    """Beginnings of a text the model knows the style of, cut inside a word; the wrong choices are others' endings."""
    rng = random.Random(seed)
    inside = [i for i in range(80, len(TEXT) - 20) if TEXT[i - 3 : i + 2].isalpha() or TEXT[i - 2 : i + 2].isalpha()]
    places = sorted(rng.sample(inside, n))
    lengths = [1 + number % 4 for number in range(n)]
    ends = [TEXT[i : i + 4] for i in places]
    items = []
    for number, (i, length) in enumerate(zip(places, lengths, strict=True)):
        own = TEXT[i : i + length]
        others = sorted({e[: 1 + rng.randrange(4)] for e in ends} - {own} - {own[:k] for k in range(5)})
        choices = rng.sample([c for c in others if not c.startswith(own)], 3)
        answer = rng.randrange(4)
        choices.insert(answer, own)
        question = TEXT[i - 14 - 2 * (number % 7) : i]
        items.append(Item(f"i{number:02d}", question, tuple(choices), answer, f"c{number % 3}"))
    return items


@pytest.fixture(scope="module")
def subject() -> Subject:
    return dp.load("tiny-llama")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return _items()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(subject: Subject, items: list[Item], out: Path) -> Any:
    """A whole study; its dose is chosen."""
    return dp.dissociate(subject, items, alphas="0,0.5,1,2,4", mode="slerp,shrink", out=out)


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype({c: "object" for c in frame if isinstance(frame[c].dtype, pd.CategoricalDtype)})


def _arm(run: Any, condition: str, table: str = "samples") -> pd.DataFrame:
    frame = _plain(run.table(table))
    return frame[frame["condition_id"] == condition].set_index("prompt_id").sort_index()


def _logliks(run: Any, condition: str) -> dict[str, list[float]]:
    import json

    found = _arm(run, condition, "items")["responses"]
    return {name: [float(x) for x in (json.loads(v) if isinstance(v, str) else v)] for name, v in found.items()}


def _ids(subject: Subject, text: str) -> list[int]:
    assert subject.tokenizer is not None
    return list(subject.tokenizer(text)["input_ids"])


# Rows


def test_every_choice_is_read_from_a_row_that_holds_it_and_no_row_is_fed_twice(items: list[Item]) -> None:
    rng = random.Random(3)
    for _ in range(200):
        choices = tuple(tuple(rng.choices([7, 8], k=rng.randint(1, 4))) for _ in range(4))
        q = Question(items[0], (1, 2, 3), choices)
        rows, of_choice = q.fed()
        for choice, row in zip(choices, of_choice, strict=True):
            feed = (*q.question, *choice[:-1])
            assert rows[row][: len(feed)] == feed
        assert not any(a != b and b[: len(a)] == a for a in rows for b in rows)
        assert len(set(rows)) == len(rows)


def test_choices_of_one_token_cost_one_row(items: list[Item]) -> None:
    one = Question(items[0], (1, 2, 3), ((4,), (5,), (6,), (7,)))
    two = Question(items[1], (1, 2), ((4, 9), (5,), (4, 8), (6, 9)))
    batch = laid_out([one, two], 1)
    assert [t.prompt + t.new[:-1] for t in batch.texts] == [(1, 2, 3), (1, 2, 4), (1, 2, 6)]
    assert batch.first == (0, 1)
    assert batch.rows == ((0, 0, 0, 0), (1, 1, 1, 2))
    assert [t.row_key for t in batch.texts] == ["i00", "i01", "i01"]


# Numbers


def test_scores_are_those_of_plain_forwards(subject: Subject, run: Any, items: list[Item]) -> None:
    scores = _logliks(run, "clean")
    limit = max(20 * run.summary["floor"]["nll_right"], 1e-4)
    for item in items:
        for choice, found in zip(item.choices, scores[item.item_id], strict=True):
            ids, start = _ids(subject, item.question + choice), len(_ids(subject, item.question))
            with torch.no_grad():
                logp = subject.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            want = sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))
            assert found == pytest.approx(want, abs=limit)


def test_what_an_item_says_follows_from_its_scores(run: Any, items: list[Item]) -> None:
    for condition in ("clean", "perturbed@2", "perturbed+slerp.always"):
        samples, scores = _arm(run, condition), _logliks(run, condition)
        table = _arm(run, condition, "items")
        for item in items:
            s, row = scores[item.item_id], samples.loc[item.item_id]
            assert row["chosen"] == int(np.argmax(s))
            assert row["right"] == float(np.argmax(s) == item.answer)
            assert bool(table.loc[item.item_id, "correct"]) == bool(row["right"])
            assert row["nll_right"] == pytest.approx(-s[item.answer], rel=1e-5)
            best = max(x for i, x in enumerate(s) if i != item.answer)
            assert row["choice_margin"] == pytest.approx(s[item.answer] - best, abs=1e-4)
            assert row["n_prompt"] == len(item.question.encode())


def test_the_model_knows_the_items_and_the_dose_is_the_first_that_costs_a_fifth(run: Any) -> None:
    summary = run.summary
    clean = summary["task"]["clean"]["value"]
    assert clean >= 0.25 + 0.3
    fallen = [row["alpha"] for row in summary["dose_response"] if clean - row["right"]["value"] >= 0.2]
    assert summary["dose"] == {
        "alpha": fallen[0], "how": "chosen", "scale": "relnorm", "where": summary["dose"]["where"]
    }  # fmt: skip
    assert summary["refusal"] is None
    crossing = summary["crossing"]
    assert crossing["status"] == "resolved"
    below = max((r["alpha"] for r in summary["dose_response"] if r["alpha"] < fallen[0]), default=0)
    assert below <= crossing["alpha50"] <= fallen[0]


def test_no_strength_is_no_change_bit_for_bit(run: Any) -> None:
    clean, sham = _arm(run, "clean"), _arm(run, "perturbed@0")
    for name in set(clean) - {
        "sample_id",
        "condition_id",
        "kl_clean_pert",
        "reasons",
        "alpha_relnorm",
        "alpha_coordstd",
    }:
        pd.testing.assert_series_equal(clean[name], sham[name], check_exact=True)
    assert _logliks(run, "clean") == _logliks(run, "perturbed@0")
    assert (sham["kl_clean_pert"] == 0).all()


def test_batches_change_nothing_but_rounding(subject: Subject, items: list[Item], tmp_path: Path) -> None:
    settings: dict[str, Any] = {**QUICK, "timings": "detector,always"}
    many = dp.dissociate(subject, items[:6], **settings, out=tmp_path / "a")
    few = dp.dissociate(subject, list(reversed(items[:6])), **settings, batch_size=7, out=tmp_path / "b")
    assert len(few.manifest.batch_plan) > len(many.manifest.batch_plan) == 2
    for condition in many.conditions["condition_id"].astype(str):
        one, other = _arm(many, condition), _arm(few, condition)
        for name in ("nll_right", "choice_margin", "kappa_geom", "kappa_phase", "duty", "energy_written"):
            if name in one:
                np.testing.assert_allclose(
                    one[name].astype(float),
                    other[name].astype(float),
                    rtol=2e-3,
                    atol=2e-3,
                    err_msg=f"{condition} {name}",
                )
    for a, b in zip(many.summary["verdicts"], few.summary["verdicts"], strict=True):
        assert a["verdict"] == b["verdict"]


def test_the_order_of_choices_does_not_move_the_noise(subject: Subject, items: list[Item], tmp_path: Path) -> None:
    turned = [replace(i, choices=i.choices[::-1], answer=3 - i.answer) for i in items[:6]]
    a = dp.dissociate(subject, items[:6], **QUICK, out=tmp_path)
    b = dp.dissociate(subject, turned, **QUICK, out=tmp_path)
    assert a.path != b.path
    for condition in ("perturbed@4", "perturbed+slerp.always"):
        one, other = _logliks(a, condition), _logliks(b, condition)
        for name, scores in one.items():
            np.testing.assert_allclose(scores, other[name][::-1], atol=2e-3)


def test_dynamics_are_those_of_the_question_alone(subject: Subject, run: Any, items: list[Item]) -> None:
    found = _arm(run, "clean")
    for item in items[::5]:
        tape = dp.capture(subject, torch.tensor([_ids(subject, item.question)]))
        states = torch.stack([s[0] for s in tape.states[:]])[1:]  # the embedding takes no part
        want = float(dp.metrics.compute("kappa.geom/1", states[:, 1:]))
        assert found.loc[item.item_id, "kappa_geom"] == pytest.approx(want, rel=1e-3, abs=1e-5)


def test_random_controls_write_the_same_energy_at_the_same_tokens(run: Any) -> None:
    for arm in ("slerp", "slerp.always", "shrink.always"):
        own, control = _arm(run, f"perturbed+{arm}"), _arm(run, f"perturbed+random:{arm}")
        np.testing.assert_allclose(own["energy_written"], control["energy_written"], rtol=1e-4, atol=1e-9)
        np.testing.assert_array_equal(own["n_active"], control["n_active"])
    always = _arm(run, "perturbed+slerp.always")
    assert (always["duty"] == 1).all()
    assert (always["n_watched"] == always["n_prompt"] - 1).all()


def test_the_detector_is_judged_at_every_strength_before_any_mode(run: Any) -> None:
    by_alpha = {row["alpha"]: row["detector"] for row in run.summary["dose_response"]}
    assert by_alpha[0]["auc"]["value"] == 0.5
    assert by_alpha[0]["blind"] == "DETECTOR_BLIND"
    assert by_alpha[4]["auc"]["value"] > by_alpha[0.5]["auc"]["value"] - 1e-9
    assert run.summary["detector"] == by_alpha[run.summary["dose"]["alpha"]]
    duty = _arm(run, "perturbed@4")["detector_duty"].mean()
    assert by_alpha[4]["duty_perturbed"] == pytest.approx(duty)


def test_where_the_noise_is_everywhere_the_oracle_is_always(
    run: Any, subject: Subject, items: list[Item], tmp_path: Path
):
    assert any("oracle" in note for note in run.summary["notes"])
    assert not any("oracle" in name for name in run.conditions["condition_id"].astype(str))
    some = dp.dissociate(
        subject, items[:6], perturb="alpha=4,layers=50%,positions=5:,phase=decode", alphas="4",
        timings="always,oracle", out=tmp_path,
    )  # fmt: skip
    assert some.summary["notes"] == []
    oracle, always = _arm(some, "perturbed+slerp.oracle"), _arm(some, "perturbed+slerp.always")
    assert (oracle["n_active"] == oracle["n_prompt"] - 5).all()
    assert (always["n_active"] == always["n_prompt"] - 1).all()


def test_verdicts_follow_from_their_numbers(run: Any) -> None:
    verdicts = run.summary["verdicts"]
    assert {v["semantic"] for v in verdicts} == {"right", "nll_right", "choice_margin"}
    assert {v["condition"] for v in verdicts} >= {
        "perturbed+slerp",
        "perturbed+random:slerp",
        "perturbed+shrink.always",
    }
    for v in verdicts:
        if v["reason"] is not None:
            assert v["verdict"] in ("DETECTOR_BLIND", "INDETERMINATE")
            continue
        (low, high), tost = ((float(v["rf_sem"][k]) for k in ("low", "high")), [float(x) for x in v["tost"]])
        dynamic = (float(v["rf_dyn"]["low"]), float(v["rf_dyn"]["high"]))
        assert v["verdict"] == dissociation_verdict(dynamic, (low, high), (tost[0], tost[1]))
    fits = _plain(run.table("fits")).set_index("fit_id")
    first = verdicts[0]
    assert fits.loc[f"{first['condition']}|{first['semantic']}", "verdict"] == first["verdict"]


def test_recovery_fractions_are_ratios_of_means(run: Any) -> None:
    dose = run.summary["dose"]["alpha"]
    clean, pert = _arm(run, "clean"), _arm(run, f"perturbed@{dose:g}")
    for row in run.summary["recovery"]:
        if row["reason"] is not None:
            continue
        mine, name = _arm(run, row["condition"]), row["metric"]
        base = clean[name] * 0 if name == "kl_clean_pert" else clean[name]
        if name == "kl_clean_pert":
            base = pd.Series(0.0, clean.index)
        known = base.notna() & pert[name].notna() & mine[name].notna()
        b, p, m = (x[known].astype(float).sum() for x in (base, pert[name], mine[name]))
        assert row["rf"] == pytest.approx((p - m) / (p - b), rel=1e-6)
        assert row["acted_on"] == by_construction(name, "kappa_phase_zmax")


def test_conditions_name_the_dose_that_was_chosen(run: Any) -> None:
    table = _plain(run.conditions).set_index("condition_id")
    dose = run.summary["dose"]["alpha"]
    assert table.loc["perturbed+slerp", "alpha"] == dose
    assert table.loc["perturbed+random:slerp", "arm"] == "random-control"
    assert table.loc["clean+slerp", "alpha"] == 0
    assert [table.loc[f"perturbed@{a:g}", "alpha"] for a in (0, 0.5, 4)] == [0, 0.5, 4]


def test_every_column_says_what_it_is_and_the_picture_is_drawn(run: Any) -> None:
    columns = run.columns()
    silent = columns[(columns["description"] == "") & columns["table"].isin(["samples", "items", "fits", "conditions"])]
    assert silent[["table", "column"]].to_numpy().tolist() == []
    assert run.manifest.rows()["items"] == 24 * (len(run.conditions) - 1)
    assert (run.path / "figures" / "dissociation.png").stat().st_size > 10_000
    assert list(run.plot.own()) == ["dissociation"]


# Planted controllers


class _Table(Recovery):
    """Writes states from a table of (row, position, block), at every block from one on."""

    table: dict[tuple[str, int, int], torch.Tensor]
    from_block = 0

    def __init__(self, timing: Any, table: dict[Any, torch.Tensor]) -> None:
        super().__init__(timing, MODES["shrink"](lambda: Always()).actuator, name="planted/1")
        self.table = table

    def act(self, state: torch.Tensor, site: Any, seen: Any, memory: Any) -> torch.Tensor:
        after = state
        for row in np.flatnonzero(memory["active"]):
            key = (seen.step.row_keys[row], int(seen.step.positions[row, -1]), site[1])
            if seen.decoding and key in self.table:
                after = after.clone() if after is state else after
                after[row, -1] = self.table[key]
        return after


def _clean_states(subject: Subject, items: list[Item], donors: list[Item]) -> dict[tuple[str, int, int], torch.Tensor]:
    """What each item's states would be without noise, or those of another item at the same place."""
    table = {}
    for item, donor in zip(items, donors, strict=True):
        tape = dp.capture(subject, torch.tensor([_ids(subject, donor.question)]))
        n, m = len(_ids(subject, item.question)), len(_ids(subject, donor.question))
        for block in range(subject.n_layers):
            for pos in range(n):
                table[item.item_id, pos, block] = tape.at(layer=block)[0, min(pos, m - 1)].clone()
    return table


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def plant(name: str, table: dict[Any, torch.Tensor]) -> None:
        monkeypatch.setitem(_ADOPTED, name, Mode(lambda timing, site=None, **_: _Table(timing(), table)))

    return plant


def test_a_controller_that_restores_the_states_recovers_both(subject: Subject, planted: Any, tmp_path: Path) -> None:
    singles = [replace(i, choices=tuple(c[:1] for c in i.choices)) for i in _items(60, seed=1)]
    singles = [i for i in singles if len(set(i.choices)) == 4]
    assert len(singles) > 30
    planted("mend", _clean_states(subject, singles, singles))
    run = dp.dissociate(subject, singles, mode="mend", **QUICK, out=tmp_path)
    (v,) = [v for v in run.summary["verdicts"] if v["condition"] == "perturbed+mend.always" and v["primary"]]
    assert v["verdict"] == "COUPLED"
    assert v["rf_dyn"]["value"] == pytest.approx(1, abs=1e-3)
    assert v["rf_sem"]["value"] == pytest.approx(1, abs=1e-9)
    mended, clean = _arm(run, "perturbed+mend.always"), _arm(run, "clean")
    np.testing.assert_allclose(mended["nll_right"], clean["nll_right"], atol=1e-3)


def test_a_controller_that_brings_other_states_recovers_the_dynamics_alone(
    subject: Subject, items: list[Item], planted: Any, tmp_path: Path
) -> None:
    donors = [*items[7:], *items[:7]]  # of the same length
    planted("mask", _clean_states(subject, items, donors))
    run = dp.dissociate(subject, items, mode="mask", **QUICK, out=tmp_path)
    (v,) = [v for v in run.summary["verdicts"] if v["condition"] == "perturbed+mask.always" and v["primary"]]
    assert v["rf_dyn"]["low"] > 0.5
    assert v["rf_sem"]["value"] < 0.5
    assert v["verdict"] in ("DISSOCIATED", "INDETERMINATE")
    low, high = float(v["rf_sem"]["low"]), float(v["rf_sem"]["high"])
    assert (v["verdict"] == "DISSOCIATED") == (max(abs(float(x)) for x in v["tost"]) < 0.1)
    assert low <= v["rf_sem"]["value"] <= high


def test_harm_to_clean_items_is_counted(
    subject: Subject, items: list[Item], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harm = Mode(lambda timing, site=None, **_: MODES["shrink"](lambda: Always(1.0), site))
    monkeypatch.setitem(_ADOPTED, "harm", harm)
    run = dp.dissociate(subject, items[:10], mode="harm", **QUICK, out=tmp_path)
    (found,) = run.summary["iatrogenic"]
    clean, mine = _arm(run, "clean"), _arm(run, "clean+harm")
    worse = (mine["nll_right"] - clean["nll_right"]).astype(float) > 3 * run.summary["floor"]["nll_right"]
    other = clean["chosen"] != mine["chosen"]
    assert found["value"] == pytest.approx((worse | other).mean())
    assert found["answers_changed"] == int(other.sum()) > 0
    assert found["low"] < found["value"] <= found["high"]
    assert found["duty"] == 1


# A study made of numbers


def _made(rf_dyn: float, rf_sem: float, n: int = 200, noise: float = 0.01) -> Any:
    """A run that never was: items whose fractions are known."""
    rng = np.random.default_rng(0)
    right = {"clean": np.ones(n), "perturbed@2": (np.arange(n) % 2).astype(float)}
    back = round(rf_sem * n / 2)
    right["perturbed+slerp.always"] = right["perturbed@2"].copy()
    right["perturbed+slerp.always"][np.flatnonzero(right["perturbed@2"] == 0)[:back]] = 1.0
    kappa = {"clean": 0.1, "perturbed@2": 0.5, "perturbed+slerp.always": 0.5 - 0.4 * rf_dyn}
    frames = []
    for condition in (*right, "clean.oneforward"):
        name = "clean" if condition == "clean.oneforward" else condition
        frame = pd.DataFrame({
            "prompt_id": [f"i{i:03d}" for i in range(n)], "condition_id": condition, "category": "c",
            "right": right[name], "nll_right": 2 - right[name], "choice_margin": right[name] - 0.5,
            "kl_clean_pert": 0.0, "chosen": right[name].astype(int), "kappa_geom": kappa[name],
            "kappa_phase": 0.1, "delta_rel_prev": 0.1, "limen_ct": 0.1, "duty": 1.0, "energy_written": 0.1,
            "detector_duty": 0.0, "signal_score": 0.0, "n_watched": 5, "n_prompt": 6,
        })  # fmt: skip
        frame["sample_id"] = frame["prompt_id"] + "|" + condition
        if condition != "clean.oneforward":
            frame["kappa_geom"] += noise * rng.normal(size=n)
        frames.append(frame)
    samples = pd.concat(frames, ignore_index=True)
    actions = samples[["sample_id"]].assign(pos=1, detected=False)
    items = samples[["condition_id"]].assign(n_choices=4)
    return SimpleNamespace(samples=samples, table=lambda name: {"actions": actions, "items": items}[name])


@pytest.mark.parametrize(
    ("rf_dyn", "rf_sem", "verdict"),
    [(0.8, 0.0, "DISSOCIATED"), (0.8, 0.6, "COUPLED"), (0.3, 0.0, "INDETERMINATE"), (0.8, 0.12, "INDETERMINATE")],
)
def test_verdicts_of_known_fractions(rf_dyn: float, rf_sem: float, verdict: str) -> None:
    study = _made(rf_dyn, rf_sem)
    config = DissociateConfig.build(alphas="2", perturb=("alpha=2",))
    perturb = Perturb.parse("alpha=2,phase=decode")
    assert dose_of(study, (2.0,), None) == 2
    arms = [Arm("perturbed+slerp.always", "forced", True, "slerp", "always")]
    summary, fits = dissociation_summary(study, config, perturb, (2.0,), arms, 2.0)
    (found,) = [v for v in summary["verdicts"] if v["primary"]]
    assert found["verdict"] == verdict
    assert found["rf_dyn"]["value"] == pytest.approx(rf_dyn, abs=0.02)
    assert found["rf_sem"]["value"] == pytest.approx(rf_sem, abs=0.02)
    assert (fits["estimator"] == "dissoc.rf2/1").sum() == 3


# Refusals


def test_a_dose_that_costs_nothing_is_refused_with_the_one_that_would_do(
    subject: Subject, items: list[Item], tmp_path: Path
) -> None:
    run = dp.dissociate(
        subject, items[:16], perturb="alpha=0.01,layers=50%,phase=decode", alphas="4", timings="always", out=tmp_path
    )
    refusal = run.summary["refusal"]
    assert refusal["reason"] == "clean-perturbed<0.2"
    assert 0.01 < refusal["dose"] <= 4
    assert f"{refusal['dose']:.3g}" in refusal["text"]
    assert run.summary["dose"]["how"] == "given"
    (v,) = [v for v in run.summary["verdicts"] if v["primary"] and v["arm"] == "recovered"]
    assert (v["verdict"], v["reason"]) == ("INDETERMINATE", "clean-perturbed<0.2")
    assert v["rf_sem"]["value"] is None


def test_a_ladder_without_a_dose_ends_before_the_modes(subject: Subject, items: list[Item], tmp_path: Path) -> None:
    run = dp.dissociate(subject, items[:8], alphas="0,0.01,0.02", out=tmp_path)
    assert run.status == "complete"
    assert run.summary["dose"]["alpha"] is None
    assert run.summary["verdicts"] == run.summary["arms"] == []
    assert "stronger ones" in run.summary["refusal"]["text"]
    assert set(_plain(run.samples)["condition_id"]) == {
        "clean",
        "clean.oneforward",
        *(f"perturbed@{a}" for a in ("0", "0.01", "0.02")),
    }
    assert run.plot.dissociation() is not None


def test_items_the_model_does_not_know_are_refused(subject: Subject, items: list[Item], tmp_path: Path) -> None:
    guessed = [replace(i, answer=(i.answer + 1) % 4) for i in items[:10]]
    run = dp.dissociate(subject, guessed, alphas="1,4", out=tmp_path)
    assert run.summary["refusal"]["reason"] == "clean-chance<0.3"
    assert "easier items" in run.summary["refusal"]["text"]
    assert run.summary["dose"]["alpha"] is None


def test_a_detector_that_never_fires_is_blind_and_the_always_arm_is_not(
    subject: Subject, items: list[Item], tmp_path: Path
) -> None:
    run = dp.dissociate(subject, items[:12], perturb=STRONG, alphas="4", m=60, timings="detector,always", out=tmp_path)
    verdicts = {v["condition"]: v for v in run.summary["verdicts"] if v["primary"]}
    assert verdicts["perturbed+slerp"]["verdict"] == "DETECTOR_BLIND"
    assert verdicts["perturbed+slerp"]["rf_dyn"]["value"] is None
    assert verdicts["perturbed+slerp.always"]["verdict"] != "DETECTOR_BLIND"
    assert verdicts["perturbed+slerp.always"]["rf_dyn"]["value"] is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dynamic": "kappa_phase"}, "recovers by arithmetic"),
        ({"dynamic": "delta_angle"}, "recovers by arithmetic"),
        ({"dynamic": "limen_ct", "mode": "slerp,str"}, "recovers by arithmetic"),
        ({"dynamic": "kapa_geom"}, "kappa_geom"),
        ({"dynamic": "nll"}, "a metric of the states"),
        ({"perturb": "alpha=0,layers=50%"}, "no dose"),
        ({"perturb": ["alpha=1", "alpha=1,seed=2"]}, "one perturbation"),
        ({"perturb": "alpha=1,scale=isokl"}, "need no other text"),
        ({"perturb": "alpha=1", "layers": "25%"}, "--layers"),
        ({"alphas": "0"}, "at least one above"),
        ({"alphas": "a,b"}, "numbers such as"),
        ({"alphas": "-1,2"}, "from 0 on"),
        ({"mode": "sampling"}, "changes no state"),
        ({"decode": "free"}, "items are read"),
        ({"prompts": "x.txt"}, "see --items"),
        ({"temperature": 0.5}, "see --items"),
        ({"prefill": 99}, "prefill"),
        ({"semantic": "accuracy"}, "right"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    subject: Subject, items: list[Item], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        dp.dissociate(subject, items[:4], **{"out": tmp_path, **settings})
    assert not list(tmp_path.iterdir())


def test_items_that_are_none_are_refused(subject: Subject, items: list[Item], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "Two and two make", "answer": 0}\n')
    with pytest.raises(PromptError, match="choices"):
        dp.dissociate(subject, tmp_path / "bad.jsonl", out=tmp_path)
    with pytest.raises(UsageError, match="no items"):
        dp.dissociate(subject, [], out=tmp_path)
    with pytest.raises(UsageError, match="Item objects"):
        dp.dissociate(subject, ["a question"], out=tmp_path)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="has 1 token"):
        dp.dissociate(subject, [replace(items[0], question="A"), items[1]], out=tmp_path)
    with pytest.raises(PromptError, match="tokenizer"):
        dp.dissociate(tiny_llama(), items, out=tmp_path)


# Going on


def test_a_stopped_study_goes_on_where_it_was(subject: Subject, items: list[Item], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"alphas": "0,4", "timings": "always", "batch_size": 20}
    whole = dp.dissociate(subject, items[:16], **settings, out=tmp_path / "whole")
    assert whole.summary["dose"]["alpha"] == 4

    def stop(progress: Any) -> None:
        if progress.stage == "dose":
            assert progress.summary["dose"]["alpha"] == whole.summary["dose"]["alpha"]
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        dp.dissociate(subject, items[:16], listener=stop, **settings, out=tmp_path / "parts")
    (folder,) = (tmp_path / "parts").iterdir()
    assert dp.open(folder).status == "interrupted"
    with pytest.raises(RunFolderError, match="dissociation"):
        dp.open(folder).plot.dissociation()
    done = dp.dissociate(subject, items[:16], **settings, out=tmp_path / "parts")
    assert done.path == folder
    one, other = (_plain(r.samples).sort_values("sample_id").set_index("sample_id") for r in (whole, done))
    pd.testing.assert_frame_equal(one, other)
    assert {**whole.summary, "seconds": 0} == {**done.summary, "seconds": 0}


def test_the_same_items_under_another_name_are_the_same_study(
    subject: Subject, items: list[Item], tmp_path: Path
) -> None:
    import json

    rows = [
        {"id": i.item_id, "question": i.question, "choices": [" " + c for c in i.choices], "answer": i.answer}
        for i in items[:5]
    ]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    a = dp.dissociate(subject, tmp_path / "a.jsonl", **QUICK, out=tmp_path / "runs")
    b = dp.dissociate(subject, str(tmp_path / "b.jsonl"), **QUICK, out=tmp_path / "runs")
    assert a.path == b.path
    c = dp.dissociate(subject, tmp_path / "a.jsonl", limit=3, **QUICK, out=tmp_path / "runs")
    assert c.path != a.path
    assert c.summary["task"]["n"] == 3
