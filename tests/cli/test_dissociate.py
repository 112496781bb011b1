"""``dynprobe dissociate``: its words in the terminal, its JSON, and what it says when something is missing."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynprobe.cli import main
from dynprobe.models._zoo import zoo_folder

QUICK = ("--alphas", "0,4", "--timings", "always", "--quiet")


#: Words that no verse goes on with.
WRONG = (" zeal", " cup", " jar", " axe", " wool", " fig", " oak", " brick", " pot")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of verses with four words that could follow, one of which does."""
    text = (zoo_folder("tiny-llama").parent / "held_out.txt").read_text(encoding="utf-8").replace("\n", " ")
    rng = random.Random(0)
    common = re.finditer(r" (?:the|and|unto|shall|thou|her)(?=[ ,.:;])", text)
    places = [(m.start(), m.group()) for m in common if m.start() > 60]
    file = tmp_path_factory.mktemp("items") / "verses.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number, (i, word) in enumerate(rng.sample(places, 16)):
            choices = rng.sample(WRONG, 3)
            answer = rng.randrange(4)
            choices.insert(answer, word)
            row = {"question": text[i - 25 : i], "choices": choices, "answer": answer, "category": f"c{number % 2}"}
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def study(items: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    words = ["dissociate", "--model", "tiny-llama", "--items", items, "--alphas", "0,1,4", "--out", out, "--quiet"]
    assert main([str(w) for w in words]) == 0
    (run,) = out.iterdir()
    return run


def test_a_study_prints_dose_detector_arms_and_one_line_of_verdict_per_mode(
    cli: Callable[..., Any], study: Path
) -> None:
    code, out, _ = cli("show", study)
    assert code == 0
    for said in (
        "what a dose costs: 16 items, chance 0.250", "detector kappa_phase_zmax, before any mode acts",
        "arms at the dose", "accuracy has fallen by 0.2 at α", "harm to clean items, slerp", "Spearman ρ over items",
        "dose–response at α 0, 1, 4", "it recovers by construction",
        "verses.jsonl, fed token by token after the first token",
    ):  # fmt: skip
        assert said in " ".join(out.split()), said
    verdicts = [line for line in out.splitlines() if line.startswith("verdict ")]
    assert len(verdicts) == 2  # by the detector, and always, which here is where the noise is
    for line in verdicts:
        assert re.match(r"verdict slerp(\.always)?: (COUPLED|DISSOCIATED|INDETERMINATE|DETECTOR_BLIND)", line)
        assert "RF_dyn" in line
        assert "RF_sem" in line


def test_the_same_command_again_finds_the_study_done(cli: Callable[..., Any], study: Path, items: Path) -> None:
    code, out, _ = cli(
        "dissociate", "--model", "tiny-llama", "--items", items, "--alphas", "0,1,4", "--out", study.parent, "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert told["run"] == str(study)
    assert told["summary"]["protocol"] == "dissociate"
    assert {v["semantic"] for v in told["summary"]["verdicts"]} == {"right", "nll_right", "choice_margin"}
    assert list(study.parent.iterdir()) == [study]


def test_a_study_is_listed_and_drawn(cli: Callable[..., Any], study: Path, here: Path) -> None:
    code, out, _ = cli("ls", study.parent)
    assert code == 0
    assert "dissociate" in out
    assert cli("show", study, "--figure", here / "d.png", "--plot", "dissociation").code == 0
    assert (here / "d.png").stat().st_size > 10_000
    assert (
        "RF_dyn" in (study / "figures" / "dissociation.svg").read_text()
        or (study / "figures" / "dissociation.svg").exists()
    )


def test_a_dose_that_costs_nothing_says_which_would(cli: Callable[..., Any], items: Path, here: Path) -> None:
    code, out, _ = cli(
        "dissociate", "--model", "tiny-llama", "--items", items, "--perturb", "alpha=0.01,layers=50%,phase=decode",
        *QUICK, "--out", here / "runs",
    )  # fmt: skip
    assert code == 0
    said = " ".join(out.split())
    assert "RF_sem is refused (clean-perturbed<0.2)" in said
    assert "The dose that would do is α =" in said
    assert "INDETERMINATE (clean-perturbed<0.2)" in said


def test_items_nobody_knows_are_refused_in_words(cli: Callable[..., Any], items: Path, here: Path) -> None:
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    (here / "wrong.jsonl").write_text("".join(json.dumps({**r, "answer": (r["answer"] + 1) % 4}) + "\n" for r in rows))
    code, out, _ = cli(
        "dissociate", "--model", "tiny-llama", "--items", here / "wrong.jsonl", *QUICK, "--out", here / "r"
    )
    assert code == 0
    said = " ".join(out.split())
    assert "less than 0.3 above chance" in said
    assert "Take easier items" in said
    assert "no verdict" in said


def test_settings_can_stand_in_a_file(cli: Callable[..., Any], items: Path, here: Path) -> None:
    (here / "study.yaml").write_text(
        f"model: tiny-llama\nitems: {items}\nalphas: [0, 4]\nmode: shrink\ntimings: [always]\ncategory: [c1]\n"
    )
    code, out, _ = cli("dissociate", "--config", here / "study.yaml", "--limit", "6", "--out", here / "r", "--json")
    assert code == 0
    summary = json.loads(out)["summary"]
    assert summary["task"]["n"] == 6
    assert {row["alpha"] for row in summary["dose_response"]} == {0, 4}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--items", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        (("--items", "clozes"), 2, "cloze"),
        (("--dynamic", "kappa_phase"), 2, "recovers by arithmetic"),
        (("--semantic", "accuracy"), 2, "right"),
        (("--mode", "slrp"), 2, "slerp"),
        (("--alphas", "0"), 2, "at least one above"),
        (("--perturb", "alpha=1", "--layers", "25%"), 2, "--layers"),
        (("--category", "animal"), 2, "animals"),
        (("--calibration", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_cannot_be_done_is_said(
    cli: Callable[..., Any], here: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    found = cli("dissociate", "--model", "tiny-llama", "--limit", "4", *words, "--out", here / "runs", "--quiet")
    assert found.code == code
    assert said in found.err
    assert "Traceback" not in found.err
    assert not (here / "runs").exists()


def test_a_line_without_choices_is_named(cli: Callable[..., Any], here: Path) -> None:
    (here / "bad.jsonl").write_text('{"question": "Two and two make", "answer": 0}\n')
    found = cli("dissociate", "--model", "tiny-llama", "--items", here / "bad.jsonl")
    assert found.code == 2
    assert "line 1" in found.err
    assert "choices" in found.err
