"""``evaluate``: the harness's numbers where nothing is written, and noise that belongs to a document alone."""

import ast
import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import dynprobe as dp
from dynprobe.cli import main
from dynprobe.controllers import AttractorLayer, Controller
from dynprobe.controllers.attractor import parse_attractor
from dynprobe.controllers.recovery import Always, Recovery, Slerp
from dynprobe.errors import InterruptedRunError, ModelError, OfflineError, UsageError
from dynprobe.models._zoo import zoo_folder
from dynprobe.probes import Instrument, Subject, live_hooks, make_writers
from dynprobe.prompts import load_stories
from dynprobe.protocols import _harness, _harness_model, _harness_tasks
from dynprobe.protocols._evaluate_summary import paired_difference
from dynprobe.testing import tiny_llama

pytest.importorskip("lm_eval")

TEXT = (zoo_folder("tiny-llama").parent / "held_out.txt").read_text(encoding="utf-8").replace("\n", " ")
PUSH = "alpha=0.8,layers=50%"


def _folder(path: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """A folder with one task that reads rows from a file."""
    path.mkdir(parents=True, exist_ok=True)
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", **settings,
    }  # fmt: skip
    (path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer",
    "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


def _pieces(n: int, length: int = 5) -> list[dict[str, Any]]:
    """Beginnings of a text the model knows the style of, cut inside a word; three of four continuations are others'."""
    rng = random.Random(0)
    inside = [
        i for i in range(80, len(TEXT) - 20) if TEXT[i - 3 : i + length].isalpha() or TEXT[i - 2 : i + 2].isalpha()
    ]
    places = sorted(rng.sample(inside, n))
    ends = [TEXT[i : i + length] for i in places]
    rows = []
    for number, i in enumerate(places):
        wrong = rng.sample(sorted(set(ends) - {ends[number]}), 3)
        answer = rng.randrange(4)
        wrong.insert(answer, ends[number])
        # Contexts of many lengths, so that there is padding.
        rows.append({"context": TEXT[i - 20 - 3 * (number % 15) : i], "choices": wrong, "answer": answer})
    return rows


@pytest.fixture(scope="module")
def subject() -> Subject:
    return dp.load("tiny-llama")


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("easy"), "easy", _pieces(40), **CHOICE)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def _logliks(run: Any, arm: str) -> dict[str, list[float]]:
    """Document → log-likelihoods, every digit."""
    items = run.table("items")
    items = items[items["condition_id"] == arm]
    return {str(row["doc_id"]): [r[0][0] for r in json.loads(row["responses"])] for _, row in items.iterrows()}


def _harness_alone(subject: Subject, folder: Path | None, tasks: list[str], batch_size: int, **options: Any) -> Any:
    """What the harness gives by itself, around the same model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = Path(str(_harness_tasks.__file__)).parent.parent / "prompts" / "data" / "tasks"
    with _harness.quiet(), _harness.seeded(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # calls pip and lscpu for seconds
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=subject.model, tokenizer=copy.deepcopy(subject.tokenizer), batch_size=batch_size),
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False, include_path=[own, *([folder] if folder else [])]),
            **options,
        )


@pytest.mark.parametrize("batch_size", [1, 8])
def test_without_a_write_and_at_zero_strength_the_numbers_are_the_harness_s_to_the_last_digit(
    subject: Subject, easy: Path, out: Path, batch_size: int
) -> None:
    run = dp.evaluate(
        subject, "easy", perturb="alpha=0,layers=all", include_path=easy, limit=6, batch_size=batch_size,
        num_fewshot=1 if batch_size == 8 else None, out=out / f"zero{batch_size}",
    )  # fmt: skip
    alone = _harness_alone(subject, easy, ["easy"], batch_size, limit=6, num_fewshot=1 if batch_size == 8 else None)
    theirs = {
        str(s["doc_id"]): [r[0][0] for r in s["resps"]] for s in alone["samples"]["easy"] if s["filter"] == "none"
    }
    for arm in ("clean", "perturbed"):
        assert _logliks(run, arm) == theirs
        ours = run.summary["harness"][arm]["results"]["easy"]
        assert all(ours[key] == alone["results"]["easy"][key] for key in ("acc,none", "acc_norm,none"))
    assert [row["change"]["difference"] for row in run.summary["tasks"] if row["arm"] == "perturbed"] == [0.0, 0.0]


def test_a_strong_write_drives_an_easy_task_to_chance(subject: Subject, easy: Path, out: Path) -> None:
    run = dp.evaluate(subject, "easy", perturb="alpha=3,layers=all", include_path=easy, batch_size=8, out=out)
    rows = {row["arm"]: row for row in run.summary["tasks"] if row["metric"] == "acc"}
    clean, pushed = rows["clean"], rows["perturbed"]
    assert clean["mean"] >= 0.8
    assert clean["low"] > 0.5
    assert pushed["low"] < pushed["chance"] == 0.25 < pushed["high"] < 0.5
    assert pushed["change"]["high"] < -0.2
    assert pushed["change"]["lost"] - pushed["change"]["gained"] == clean["right"] - pushed["right"]
    assert pushed["change"]["p"] < 1e-3
    written = run.samples[run.samples["condition_id"] == "perturbed"]
    np.testing.assert_allclose(written["alpha_relnorm"], 3, rtol=1e-3)
    assert (written["status"] == "ok").all()
    items = run.table("items")
    assert items["correct"].sum() == clean["right"] + pushed["right"]
    taken = items["chosen"].astype(int) == items["target"].astype(int)
    assert (taken == items["correct"]).all()
    assert ((items["choice_margin"] > 0) == items["correct"]).all()


def test_noise_depends_on_no_batch_and_on_no_other_document(subject: Subject, easy: Path, out: Path) -> None:
    one = dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=9, out=out / "one")
    many = dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=9, batch_size=8, out=out / "many")
    few = dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=4, batch_size=3, out=out / "few")
    a, b, c = (_logliks(run, "perturbed") for run in (one, many, few))
    np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], atol=2e-4)
    np.testing.assert_allclose([a[k] for k in c], [c[k] for k in c], atol=2e-4)
    clean = _logliks(one, "clean")
    assert min(abs(np.subtract(a[k], clean[k])).max() for k in a) > 0.05
    key = ["prompt_id", "condition_id"]
    columns = ["alpha_relnorm", "alpha_abs", "n_asked", "n_left_alone", "n_prompt"]
    same = [run.samples.set_index(key).sort_index()[columns].astype(float) for run in (one, many)]
    pd.testing.assert_frame_equal(*same, rtol=1e-4)
    assert one.manifest.id8 == many.manifest.id8


def _by_hand(subject: Subject, context: str, choice: str, perturb: str, name: str) -> float:
    """Log-likelihood of a continuation, alone, under the noise of a name."""
    ids, start = subject.tokenizer(context + choice).input_ids, len(subject.tokenizer(context).input_ids)
    writers = make_writers(subject, perturb)
    with torch.no_grad(), Instrument(subject, (), writers, row_keys=[name], n_prompt=[start]):
        scores = subject.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return float(sum(scores[i - 1, ids[i]] for i in range(start, len(ids))))


@pytest.mark.parametrize("perturb", [PUSH, PUSH + ",positions=last,phase=prefill", PUSH + ",phase=decode"])
def test_all_choices_of_a_question_have_the_noise_of_its_name(
    subject: Subject, easy: Path, out: Path, perturb: str
) -> None:
    run = dp.evaluate(subject, "easy", perturb=perturb, include_path=easy, limit=5, batch_size=7, out=out)
    found = _logliks(run, "perturbed")
    for number, row in enumerate(_pieces(40)[:5]):
        expected = [_by_hand(subject, row["context"], choice, perturb, f"easy:{number}") for choice in row["choices"]]
        np.testing.assert_allclose(found[str(number)], expected, atol=2e-4)


def test_documents_that_begin_alike_have_noise_of_their_own(subject: Subject, easy: Path, out: Path) -> None:
    run = dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=2, num_fewshot=2, out=out)
    prompts = run.prompts.set_index("prompt_id")["text"]
    row = _pieces(40)[1]
    mine = [_by_hand(subject, prompts["easy:1"], c, PUSH, "easy:1") for c in row["choices"]]
    other = [_by_hand(subject, prompts["easy:1"], c, PUSH, "easy:0") for c in row["choices"]]
    np.testing.assert_allclose(_logliks(run, "perturbed")["1"], mine, atol=2e-4)
    assert abs(np.subtract(mine, other)).max() > 0.01


def test_documents_that_would_share_a_forward_keep_their_own_names(subject: Subject, tmp_path: Path, out: Path) -> None:
    """The harness scores choices of one token from one forward of their context, whosever it is."""
    context = TEXT[100:140]
    rows = [{"context": context, "choices": list("aeio"), "answer": i} for i in (0, 1)]
    rows.append({"context": TEXT[300:340], "choices": list("aeio"), "answer": 2})
    folder = _folder(tmp_path, "twins", rows, **CHOICE)
    run = dp.evaluate(subject, "twins", perturb=PUSH, include_path=folder, batch_size=4, out=out)
    found = _logliks(run, "perturbed")
    for number, row in enumerate(rows):
        expected = [_by_hand(subject, row["context"], c, PUSH, f"twins:{number}") for c in "aeio"]
        np.testing.assert_allclose(found[str(number)], expected, atol=2e-4)
    assert found["0"] != found["1"]
    assert _logliks(run, "clean")["0"] == _logliks(run, "clean")["1"]
    facts = {fact["arm"]: fact["scored_without_sharing"] for fact in run.manifest.batch_facts.values()}
    assert facts == {"clean": 0, "perturbed": 8}
    zero = dp.evaluate(subject, "twins", perturb="alpha=0", include_path=folder, batch_size=4, out=out)
    assert {fact["scored_without_sharing"] for fact in zero.manifest.batch_facts.values()} == {0}
    assert _logliks(zero, "perturbed") == _logliks(run, "clean")


def test_nothing_is_written_behind_a_context_without_continuation(subject: Subject, tmp_path: Path, out: Path) -> None:
    rows = [
        {"context": f"{TEXT[100 + 30 * i : 120 + 33 * i]}x", "choices": list("aeio"), "answer": 0} for i in range(3)
    ]
    folder = _folder(tmp_path, "single", rows, **CHOICE)
    run = dp.evaluate(subject, "single", perturb="alpha=2,phase=decode", include_path=folder, batch_size=3, out=out)
    assert _logliks(run, "perturbed") == _logliks(run, "clean")
    written = run.samples[run.samples["condition_id"] == "perturbed"]
    assert (written["n_asked"] == 0).all()
    assert written["alpha_relnorm"].isna().all()
    assert (written["status"] == "not-written").all()


def test_whole_texts_are_scored_window_by_window(subject: Subject, tmp_path: Path, out: Path) -> None:
    rows = [{"text": TEXT[:700]}, {"text": TEXT[700:760]}]
    folder = _folder(
        tmp_path, "whole", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    run = dp.evaluate(subject, "whole", perturb="alpha=0.5", include_path=folder, batch_size=2, out=out)
    alone = _harness_alone(subject, folder, ["whole"], 2)
    assert (
        run.summary["harness"]["clean"]["results"]["whole"]["byte_perplexity,none"]
        == (alone["results"]["whole"]["byte_perplexity,none"])
    )
    rows_of = {row["arm"]: row for row in run.summary["tasks"]}
    assert rows_of["clean"]["metric"] == "loglik"
    assert rows_of["perturbed"]["change"]["difference"] < -5
    window = subject.model.config.max_position_embeddings
    asked = run.samples[run.samples["condition_id"] == "perturbed"].set_index("prompt_id")["n_asked"]
    assert window < 700 < 2 * window
    assert asked["whole:0"] == 2 * (window - 1)  # every token but the first of each window, which overlap
    assert asked["whole:1"] == 59


WRITE = {
    "output_type": "generate_until", "doc_to_text": "context", "doc_to_target": "target",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match"}], "num_fewshot": 0,
}  # fmt: skip


def test_generated_texts_are_the_harness_s_and_their_noise_is_the_document_s(
    subject: Subject, tmp_path: Path, out: Path
) -> None:
    rows = [{"context": TEXT[90 * i : 90 * i + 30 + 7 * i], "target": "x"} for i in range(4)]
    folder = _folder(tmp_path, "write", rows, **WRITE)
    one, many = (
        dp.evaluate(subject, "write", perturb="alpha=0.6", include_path=folder, batch_size=size, out=out / str(size))
        for size in (1, 3)
    )
    alone = _harness_alone(subject, folder, ["write"], 1)
    theirs = [s["resps"][0][0] for s in sorted(alone["samples"]["write"], key=lambda s: s["doc_id"])]
    texts = {
        arm: run.samples[run.samples["condition_id"] == arm].set_index("prompt_id").sort_index()
        for arm, run in (("clean", one), ("perturbed", one), ("batched", many))
        if arm != "batched"
    }
    batched = many.samples[many.samples["condition_id"] == "perturbed"].set_index("prompt_id").sort_index()
    assert texts["clean"]["text"].tolist() == theirs
    assert texts["perturbed"]["text"].tolist() == batched["text"].tolist() != theirs
    for column in ("n_new", "n_asked", "n_prompt"):
        assert texts["perturbed"][column].tolist() == batched[column].tolist()
    pushed = texts["perturbed"]
    # Every token that is fed but the first: the prompt, and what was written except its last token.
    assert (pushed["n_asked"] == pushed["n_prompt"] - 1 + pushed["n_new"] - 1).all()
    zero = dp.evaluate(subject, "write", perturb="alpha=0", include_path=folder, out=out)
    assert zero.samples.groupby("condition_id", observed=True)["text"].apply(list).to_dict() == {
        "clean": theirs, "perturbed": theirs
    }  # fmt: skip


def test_built_in_tasks_ask_the_built_in_items(subject: Subject, out: Path) -> None:
    run = dp.evaluate(
        subject, ["dynprobe_cloze", "dynprobe_stories_short"], limit=2, gen_kwargs="max_gen_toks=2", out=out
    )
    items, prompts = run.table("items"), run.prompts.set_index("prompt_id")
    assert items.groupby("task", observed=True).size().to_dict() == {"dynprobe_cloze": 2, "dynprobe_stories_short": 2}
    story = load_stories("short")[0]
    assert prompts["text"]["dynprobe_stories_short:0"] == story.prompts[0]
    assert prompts["category"]["dynprobe_stories_short:0"] == story.category
    assert prompts["category"]["dynprobe_cloze:0"] != prompts["category"]["dynprobe_cloze:1"]
    cloze = items[items["task"] == "dynprobe_cloze"]
    assert set(cloze["n_choices"]) == {4}
    alone = _harness_alone(subject, None, ["dynprobe_cloze"], 1, limit=2)
    assert (
        run.summary["harness"]["clean"]["results"]["dynprobe_cloze"]["acc,none"]
        == (alone["results"]["dynprobe_cloze"]["acc,none"])
    )


def test_an_answer_counts_as_right_by_the_rule_of_the_rest_of_the_package() -> None:
    from lm_eval.tasks import TaskManager

    with _harness.quiet():
        own = Path(str(_harness_tasks.__file__)).parent.parent / "prompts" / "data" / "tasks"
        tasks = TaskManager(include_defaults=False, include_path=own).load(list(_harness_tasks.BUILT_IN))["tasks"]
    short, long = (tasks[f"dynprobe_stories_{length}"] for length in ("short", "long"))
    stories = load_stories("short")
    assert len(short.eval_docs) == len(long.eval_docs) == sum(len(s.questions) for s in stories)
    doc = short.eval_docs[0]
    for text, right in ((f" The {doc['answers'][0].upper()}!", 1.0), (" nothing of the sort", 0.0)):
        assert short.process_results(doc, [text]) == {"exact_match": right}
    cloze = tasks["dynprobe_cloze"]
    assert all(len(d["choices"]) == 4 and all(c[0] == " " for c in d["choices"]) for d in cloze.eval_docs)


def test_the_caller_s_generators_tokenizer_and_model_are_left_alone(subject: Subject, easy: Path, out: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = vars(subject.tokenizer).copy(), subject.model.training
    dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=1, out=out)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert (vars(subject.tokenizer), subject.model.training) == before
    assert live_hooks(subject.model) == 0


class _Grow(Controller):
    """Doubles states after the prompt; remembers nothing."""

    id = "test.grow/1"
    reads = writes = "layers=1"

    def start(self, n_rows: int) -> dict[str, Any]:
        return {"active": np.ones(n_rows, bool)}

    def act(self, state: torch.Tensor, site: Any, seen: Any, memory: Any) -> torch.Tensor:
        return 2 * state if seen.decoding else state


class _Still(Controller):
    """Looks and does nothing."""

    id = "test.still/1"
    reads = writes = "layers=1"


class _Shrink:
    """A writer without memory."""

    sites = (("resid_post", 1),)

    def write(self, state: torch.Tensor, site: Any, step: Any) -> torch.Tensor:
        return 0.1 * state


def test_controllers_have_arms_of_their_own(subject: Subject, easy: Path, out: Path) -> None:
    run = dp.evaluate(
        subject, "easy", perturb=PUSH, controllers=[_Grow()], include_path=easy, limit=3, batch_size=2, out=out
    )
    assert [row["arm"] for row in run.summary["tasks"] if row["metric"] == "acc"] == [
        "clean", "perturbed", "controlled", "recovered"
    ]  # fmt: skip
    found = {arm: _logliks(run, arm) for arm in ("clean", "perturbed", "controlled", "recovered")}
    assert all(found["controlled"][k] != found["clean"][k] for k in found["clean"])
    samples = run.samples[run.samples["condition_id"] == "recovered"]
    assert (samples["duty_cycle"] > 0).all()
    assert (samples["control_energy"] > 0).all()
    assert (samples["alpha_relnorm"] > 0.7).all()


def test_a_controller_that_does_nothing_changes_nothing(subject: Subject, easy: Path, out: Path) -> None:
    """Token by token with a cache, as controllers need it, is the same text under the same noise."""
    run = dp.evaluate(
        subject, "easy", perturb=PUSH, controllers=[_Still()], include_path=easy, limit=3, batch_size=5, out=out
    )
    for still, plain in (("controlled", "clean"), ("recovered", "perturbed")):
        a, b = _logliks(run, still), _logliks(run, plain)
        np.testing.assert_allclose([a[k] for k in b], [b[k] for k in b], atol=2e-4)
    energy = run.samples.set_index(["condition_id", "prompt_id"])["control_energy"]
    assert (energy[["controlled", "recovered"]] == 0).all()


def test_writers_and_contexts_control_too(subject: Subject, easy: Path, out: Path) -> None:
    def halved(of: Subject) -> Any:
        return dp.perturb(of, "alpha=-0.5,kind=scale,layers=1")

    for controller in (_Shrink(), halved):
        run = dp.evaluate(subject, "easy", controllers=[controller], include_path=easy, limit=2, out=out)
        assert _logliks(run, "controlled") != _logliks(run, "clean")
    assert live_hooks(subject.model) == 0
    with pytest.raises(UsageError, match="cannot control"):
        dp.evaluate(subject, "easy", controllers=[3], include_path=easy, limit=2, out=out / "none")
    rewinding = _Still()
    rewinding.restarts = True
    with pytest.raises(UsageError, match="takes tokens back"):
        dp.evaluate(subject, "easy", controllers=[rewinding], include_path=easy, limit=2, out=out / "none")
    assert not (out / "none").exists()


ATTRACTOR = "slots=4,strength=1.5,burn_in=4,theta_read=0,s_ref=0.5,layers=50%"


def test_an_attractor_of_strength_zero_is_the_harness_to_the_last_digit(
    subject: Subject, easy: Path, out: Path
) -> None:
    run = dp.evaluate(
        subject, ("easy", "dynprobe_stories_short"), attractor=ATTRACTOR.replace("1.5", "0"), include_path=easy,
        limit=6, batch_size=5, gen_kwargs="max_gen_toks=6", out=out,
    )  # fmt: skip
    items = run.table("items")
    clean, controlled = (items[items["condition_id"] == arm] for arm in ("clean", "controlled"))
    assert len(clean) == 12
    assert clean["responses"].tolist() == controlled["responses"].tolist()
    assert (run.samples.set_index("condition_id").loc["controlled", "control_energy"] == 0).all()
    alone = _harness_alone(subject, easy, ["easy"], 5, limit=6)["results"]["easy"]
    assert run.summary["harness"]["controlled"]["results"]["easy"]["acc,none"] == alone["acc,none"]


def test_an_attractor_acts_on_every_request_alone(subject: Subject, easy: Path, out: Path) -> None:
    run = dp.evaluate(subject, "easy", attractor=ATTRACTOR, include_path=easy, limit=5, batch_size=7, out=out)
    found, clean = _logliks(run, "controlled"), _logliks(run, "clean")
    assert all(found[k] != clean[k] for k in found)
    samples = run.samples[run.samples["condition_id"] == "controlled"]
    assert ((samples["duty_cycle"] > 0) & (samples["duty_cycle"] < 1)).all()
    assert (samples["control_energy"] > 0).all()
    alone = dp.evaluate(
        subject, "easy", perturb="alpha=0", attractor=ATTRACTOR, include_path=easy, limit=2, batch_size=1, out=out
    )
    few = _logliks(alone, "controlled")
    assert set(few) < set(found)
    for key, values in few.items():
        np.testing.assert_allclose(values, found[key], atol=2e-4)
        np.testing.assert_allclose(_logliks(alone, "recovered")[key], values, atol=2e-4)
    layer, layers = parse_attractor(ATTRACTOR)
    for number, row in enumerate(_pieces(40)[:5]):  # by hand, one row at a time, the layer attached as a user does
        for choice, said in zip(row["choices"], found[str(number)], strict=True):
            context, whole = (
                subject.tokenizer(text)["input_ids"] for text in (row["context"], row["context"] + choice)
            )
            with torch.no_grad(), layer.attach(subject, layers):
                logp = subject.model(torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
            mine = logp[range(len(whole) - 1), whole[1:]][len(context) - 1 :].sum()
            assert said == pytest.approx(float(mine), abs=2e-4)
    assert live_hooks(subject.model) == 0


def test_a_recovery_mode_in_words_is_the_controller_it_names(subject: Subject, easy: Path, out: Path) -> None:
    given = {"include_path": easy, "limit": 3, "perturb": PUSH, "out": out}
    run = dp.evaluate(subject, "easy", recover="slerp,timing=always,site=layers=3", **given)
    made = Recovery(Always(0.5), Slerp(), site="layers=3")
    by_hand = dp.evaluate(subject, "easy", controllers=[made], **given)
    assert run.summary["controllers"] == ["recover:slerp,timing=always,site=layers=3"]
    for arm in ("controlled", "recovered"):
        assert _logliks(run, arm) == _logliks(by_hand, arm)
        assert _logliks(run, arm) != _logliks(run, {"controlled": "clean", "recovered": "perturbed"}[arm])
    samples = run.samples[run.samples["condition_id"] == "recovered"]
    assert (samples["duty_cycle"] > 0).all()
    assert (samples["control_energy"] > 0).all()
    waits = dp.evaluate(subject, "easy", recover="slerp,q_hi=1.0,m=9", **given)  # never fires in five tokens
    assert (waits.samples.set_index("condition_id").loc["controlled", "control_energy"] == 0).all()
    for words, said in (("guard", "takes tokens back"), ("slarp", "slerp"), ("slerp,gian=1", "gain")):
        with pytest.raises(UsageError, match=said):
            dp.evaluate(subject, "easy", recover=words, **given)
    assert live_hooks(subject.model) == 0


def test_the_same_controller_in_words_or_as_an_object_is_the_same_run(
    subject: Subject, easy: Path, tmp_path: Path
) -> None:
    runs = [
        dp.evaluate(subject, "easy", include_path=easy, limit=2, out=tmp_path, **given)
        for given in (
            {"attractor": "slots=4,strength=1.5"}, {"controllers": ["attractor:strength=1.5,slots=4"]},
            {"attractor": AttractorLayer(slots=4, strength=1.5)},
        )
    ]  # fmt: skip
    assert len({run.path for run in runs}) == 1
    assert runs[0].summary["controllers"] == ["attractor:slots=4,strength=1.5"]
    used = AttractorLayer(slots=4, strength=1.5).calibrate(subject)
    assert dp.evaluate(subject, "easy", attractor=used, include_path=easy, limit=2, out=tmp_path).path != runs[0].path
    for given, said in (
        ({"attractor": "slotz=4"}, "slots"), ({"controllers": ["atractor:slots=4"]}, "attractor"),
        ({"controllers": ["slots=4"]}, "attractor:key=value"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            dp.evaluate(subject, "easy", include_path=easy, limit=2, out=tmp_path / "none", **given)
    assert not (tmp_path / "none").exists()


def test_a_finished_evaluation_is_found_and_an_interrupted_one_continued(
    subject: Subject, easy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(**more: Any) -> Any:
        return dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=2, **({"out": tmp_path} | more))

    whole = again(out=tmp_path / "other")
    score, calls = _harness.Harness.score, []

    def stopped(self: Any, lm: Any) -> Any:
        calls.append(bool(lm.writers))
        if lm.writers and len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, lm)

    monkeypatch.setattr(_harness.Harness, "score", stopped)
    with pytest.raises(InterruptedRunError):
        again()
    done = again()
    assert calls == [False, True, True]  # the clean arm was not scored again
    assert _logliks(done, "perturbed") == _logliks(whole, "perturbed")
    assert again().path == done.path
    assert len(calls) == 3
    assert again(num_fewshot=1).path != done.path


def test_another_text_of_the_items_is_another_run(subject: Subject, tmp_path: Path) -> None:
    rows = _pieces(6)[:3]
    first = dp.evaluate(subject, "small", include_path=_folder(tmp_path / "t", "small", rows, **CHOICE), out=tmp_path)
    rows[2]["choices"][0] = "zzzzz"
    second = dp.evaluate(subject, "small", include_path=_folder(tmp_path / "t", "small", rows, **CHOICE), out=tmp_path)
    assert first.path != second.path


def test_the_tables_explain_their_columns(subject: Subject, easy: Path, out: Path) -> None:
    run = dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=9, out=out / "one")
    columns = run.columns()
    items = columns[columns["table"] == "items"].set_index("column")
    assert (items["description"] != "").all()
    assert items.loc["acc", "dtype"] == items.loc["choice_margin", "dtype"] == "float64"
    assert run.conditions.set_index("condition_id").loc["perturbed", "alpha"] == 0.8


def test_a_model_without_a_tokenizer_or_of_another_library_is_refused(easy: Path, out: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        dp.evaluate(tiny_llama(), "easy", include_path=easy, out=out)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": "eazy"}, "Did you mean 'easy'"),
        ({"tasks": "helaswag"}, "hellaswag"),
        ({"tasks": ""}, "--tasks dynprobe_cloze"),
        ({"include_path": "nowhere"}, "does not exist"),
        ({"batch_size": "auto"}, "name a number"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": 0}, "limit"),
        ({"states": True}, "does not belong"),
        ({"prompts": "x.txt"}, "does not belong"),
        ({"taskz": "x"}, "unknown setting"),
        ({"perturb": "alpha=0.1,scale=isokl"}, "relnorm"),
        ({"perturb": "alpha=0.1,scale=interp"}, "relnorm"),
        ({"perturb": "alpha=0.1,layers=99"}, "99"),
        ({"perturb": lambda state, site: state}, "controller"),
        ({"apply_chat_template": True}, "chat template"),
        ({"num_fewshot": 400}, "few"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    subject: Subject, easy: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    settings = {"tasks": "easy", "include_path": easy, "limit": 2, "out": tmp_path / "runs"} | settings
    with pytest.raises(UsageError, match=said):
        dp.evaluate(subject, settings.pop("tasks"), **settings)
    assert not (tmp_path / "runs").exists()


def test_a_task_whose_file_is_wrong_is_named(subject: Subject, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "bad", "bad", _pieces(6), **{**CHOICE, "doc_to_text": "{{ nothing( }}"})
    with pytest.raises(UsageError, match="bad"):
        dp.evaluate(subject, "bad", include_path=folder, out=tmp_path / "runs")
    folder = _folder(tmp_path / "gone", "gone", _pieces(6), **CHOICE)
    (folder / "gone.jsonl").unlink()
    with pytest.raises(UsageError, match=r"gone.*\.yaml"):
        dp.evaluate(subject, "gone", include_path=folder, out=tmp_path / "runs")


def test_a_task_of_the_hub_is_refused_offline_without_loading_anything(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", never)
    monkeypatch.setattr("dynprobe.models._hub.probe", lambda address: "no route to host")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OfflineError, match=r"hellaswag(.|\n)*no route(.|\n)*dynprobe_cloze"):
        dp.evaluate(subject, "hellaswag", out=tmp_path)
    monkeypatch.setattr("dynprobe.models._hub.probe", never)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(OfflineError, match="HF_DATASETS_OFFLINE is set"):
        dp.evaluate(subject, "hellaswag", out=tmp_path)


def test_without_the_harness_one_is_told_what_to_type(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'dynprobe\[eval\]'"):
        dp.evaluate(subject, "dynprobe_cloze")


def test_a_harness_that_calls_in_another_order_is_refused(
    subject: Subject, easy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _harness_model.Collator

    class Reversed(plain):
        def get_batched(self, *args: Any, **kwargs: Any) -> Any:
            return iter(list(super().get_batched(*args, **kwargs))[::-1])

    monkeypatch.setattr(_harness_model, "Collator", Reversed)
    with pytest.raises(ModelError, match="order"):
        dp.evaluate(subject, "easy", perturb=PUSH, include_path=easy, limit=3, out=tmp_path)


def test_the_paired_interval_covers_and_is_never_of_no_width() -> None:
    rng = np.random.default_rng(0)
    for before, keep, gain, n in ((0.9, 0.7, 0.2, 40), (0.5, 0.5, 0.5, 30), (0.95, 0.98, 0.1, 60)):
        truth = before * keep + (1 - before) * gain - before
        hits = 0
        for _ in range(400):
            x = rng.random(n) < before
            y = np.where(x, rng.random(n) < keep, rng.random(n) < gain)
            found = paired_difference(x, y)
            hits += found["low"] <= truth <= found["high"]
        assert hits / 400 > 0.93
    same = paired_difference([True] * 50, [True] * 50)
    assert (same["difference"], same["p"]) == (0.0, 1.0)
    assert -0.12 < same["low"] < 0 < same["high"] < 0.12
    a, b = rng.random(30) < 0.7, rng.random(30) < 0.4
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there["low"] == pytest.approx(-back["high"])
    assert np.isnan(paired_difference([], [])["low"])


@pytest.mark.slow
def test_on_real_weights_zero_is_the_harness_and_three_is_chance(tmp_path: Path, users_cache: None) -> None:
    from dynprobe.errors import ModelNotFoundError
    from dynprobe.models import fetch

    try:
        fetch("smollm2-135m")
    except (ModelNotFoundError, OfflineError) as error:
        pytest.skip(f"the weights are not in the cache and cannot be had: {error}")
    real = dp.load("smollm2-135m")
    more: dict[str, Any] = {"limit": 48, "batch_size": 8, "out": tmp_path}
    zero = dp.evaluate(real, "dynprobe_cloze", perturb="alpha=0,layers=all", **more)
    alone = _harness_alone(real, None, ["dynprobe_cloze"], 8, limit=48)
    theirs = {str(s["doc_id"]): [r[0][0] for r in s["resps"]] for s in alone["samples"]["dynprobe_cloze"]}
    assert _logliks(zero, "clean") == _logliks(zero, "perturbed") == theirs
    strong = dp.evaluate(real, "dynprobe_cloze", perturb="alpha=3,layers=all", **more)
    clean, pushed = strong.summary["tasks"]
    assert clean["mean"] > 0.85
    assert pushed["low"] < 0.25 < pushed["high"] < 0.45


def test_the_command_line_scores_and_prints(easy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--tasks", "easy", "--include_path", str(easy), "--limit", "3", "--output_path", str(tmp_path)]
    words += ["--num_fewshot", "0", "--model", "tiny-llama", "--perturb", "alpha=1,layers=all", "--batch_size", "4"]
    assert main(words) == 0
    printed = capfd.readouterr()
    assert "easy" in printed.out
    assert "perturbed" in printed.out
    assert printed.err == ""
    assert main([*words, "--attractor", "slots=4,strength=1"]) == 0
    printed = capfd.readouterr()
    assert "controlled" in printed.out
    assert "recovered" in printed.out
    assert main([*words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["summary"]["protocol"] == "eval"
    assert main(["show", found["run"]]) == 0
    assert "change from clean" in capfd.readouterr().out
    assert main(["ls", str(tmp_path)]) == 0
    assert "eval" in capfd.readouterr().out
    assert main(["eval", "--tasks", "eazy", "--include-path", str(easy), "--model", "tiny-llama"]) == 2
    assert "Did you mean 'easy'" in capfd.readouterr().err


def test_no_other_command_pays_for_the_harness() -> None:
    code = "import sys; from dynprobe.cli import main; main(['eval', '--help']); assert 'lm_eval' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    package = Path(str(dp.__file__)).parent
    at_top = {
        file.stem
        for file in package.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
        if name.split(".")[0] in ("lm_eval", "datasets") or name.endswith("_harness_model")
    }  # fmt: skip
    assert at_top == {"_harness_model"}  # and it is imported inside a function
