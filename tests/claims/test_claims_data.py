"""The rows of claims.yaml, and what the reader refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynprobe import claims, protocols
from dynprobe.errors import UsageError
from dynprobe.protocols import (
    AttractConfig,
    DissociateConfig,
    IterateConfig,
    RecoverConfig,
    RunConfig,
    SweepConfig,
    ThresholdConfig,
)
from dynprobe.runs import TABLES

CONFIGS = {
    "run": RunConfig, "sweep": SweepConfig, "threshold": ThresholdConfig, "iterate": IterateConfig,
    "recover": RecoverConfig, "attract": AttractConfig, "dissociate": DissociateConfig,
}  # fmt: skip


def test_every_sentence_has_a_row_a_refutation_and_a_reason_where_it_needs_one() -> None:
    found = claims.load()
    assert len({c.id for c in found}) == len(found) >= 60
    assert {c.source.text for c in found} == set(claims.texts())
    assert all(c.falsified_by for c in found)
    assert all(bool(c.parts) == c.testable for c in found)
    topics = Counter(c.topic for c in found)
    assert set(topics) == {"csm", "kappa", "variance", "limen", "recovery", "delta", "cem", "attractor"}
    assert sum(c.testable for c in found) >= 55


@pytest.mark.parametrize("claim", [c for c in claims.load() if c.testable], ids=lambda c: c.id)
def test_its_protocol_takes_its_settings(claim: claims.Claim) -> None:
    assert claim.panel is not None
    for role in claim.panel.roles.values():
        name = role.protocol or claim.protocol
        settings = role.settings if role.protocol else {**claim.settings, **role.settings}
        assert callable(getattr(protocols, str(name)))
        known = set(CONFIGS[str(name)].model_fields)
        assert set(settings) <= known, (name, set(settings) - known)
    for part in claim.parts:
        assert getattr(part, "table", "samples") in TABLES


GOOD: dict[str, Any] = {
    "id": "kappa.one", "topic": "kappa", "quote": "κ rises with noise", "source": {"text": "t", "line": 1},
    "metrics": ["kappa.phase/1"], "protocol": "run", "panel": {"roles": {"subject": {"what": "any"}}},
    "parts": [{
        "shape": "contrast", "metric": "kappa.phase/1", "value": "kappa_phase", "terms": [{"where": {"arm": "clean"}}],
        "prediction": {"expect": "above", "margin": 0.0},
    }],
    "falsified_by": "It does not rise.",
}  # fmt: skip


def read(tmp_path: Path, row: dict[str, Any], *more: dict[str, Any]) -> Any:
    text = {"title": "T", "author": "A", "kind": "post", "reference": "R"}
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"texts": {"t": text}, "claims": [row, *more]}))
    return claims.read_claims(path)[1]


def test_a_good_row_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD)[0].id == "kappa.one"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": ["kappa.fase/1"]}, "Unknown metric 'kappa.fase/1'. Did you mean 'kappa.phase/1'"),
        ({"falsified_by": ""}, "falsified_by"),
        ({"metrics": ["output.nll/1"]}, "is not among its metrics"),
        ({"protocol": "runn"}, "no protocol 'runn'. Did you mean 'run'"),
        ({"protocol": None}, "needs protocol, panel and parts"),
        ({"parts": []}, "needs protocol, panel and parts"),
        ({"untestable_here": "There is no such model."}, "says why there is none"),
        ({"source": {"text": "tt", "line": 1}}, "no text 'tt'"),
        ({"source": {"text": "t", "line": 0}}, "line"),
        ({"id": "Kappa"}, "id"),
        ({"notes": "x"}, "notes"),
        ({"panel": {"roles": {}}}, "at least one role"),
        ({"panel": {"roles": {"a": {"what": "x"}, "b": {"what": "y"}}, "at_least": 3}}, "one role"),
    ],
)
def test_a_bad_row_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, {**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prediction": {"expect": "within", "margin": 0.1}}, "two margins"),
        ({"prediction": {"expect": "above", "margin": [0.1, 0.2]}}, "one margin"),
        ({"prediction": {"expect": "within", "margin": [0.2, 0.1]}}, "lower, upper"),
        ({"terms": [{"role": "subjekt"}]}, "no role 'subjekt'. Did you mean 'subject'"),
        ({"terms": []}, "terms"),
        ({"shape": "median"}, "median"),
    ],
)
def test_a_bad_part_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, {**GOOD, "parts": [{**GOOD["parts"][0], **change}]})


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two claims have the id"):
        read(tmp_path, GOOD, GOOD)


def test_an_unknown_claim_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no claim 'kappa.rise'. Did you mean 'kappa.rises'"):
        claims.find("kappa.rise")


def test_the_page_counts_the_rows() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "claims.md").read_text(encoding="utf-8")
    found = claims.load()
    assert f"There are {len(found)} rows, {sum(c.testable for c in found)} of them testable" in page
