from __future__ import annotations

import collections

import pytest

from dynprobe.errors import PromptError
from dynprobe.prompts import CATEGORIES, content_hash, load_prompts


def test_default_run_has_four_of_each_category() -> None:
    prompts = load_prompts()
    assert collections.Counter(p.category for p in prompts) == dict.fromkeys(CATEGORIES, 4)
    assert [p.prompt_id for p in load_prompts("code")] == ["code-01", "code-02", "code-03", "code-04"]


@pytest.mark.parametrize(("source", "count"), [("all", 10), ("calibration", 6)])
def test_sizes_and_unique_ids(source: str, count: int) -> None:
    prompts = load_prompts(source=source)  # type: ignore[arg-type]
    assert collections.Counter(p.category for p in prompts) == dict.fromkeys(CATEGORIES, count)
    assert len({p.prompt_id for p in prompts}) == len({p.text for p in prompts}) == len(prompts)
    assert all(p.prompt_id.startswith("cal-") == (source == "calibration") for p in prompts)


def test_every_prompt_is_unfinished_and_of_the_declared_length() -> None:
    for prompt in [*load_prompts(source="all"), *load_prompts(source="calibration")]:
        if prompt.category != "code":
            assert 13 <= len(prompt.text.split()) <= 30, prompt
            assert not prompt.text.endswith((".", "!", "?", '."')) or prompt.text.endswith("3."), prompt
        assert prompt.text.isascii()


def test_default_is_a_subset_of_all_and_calibration_is_disjoint() -> None:
    every = {p.prompt_id: p for p in load_prompts(source="all")}
    assert all(every[p.prompt_id] == p for p in load_prompts())
    words = {p.text.split("\n")[0][:25] for p in every.values()}
    assert not words & {p.text.split("\n")[0][:25] for p in load_prompts(source="calibration")}


def test_limit_covers_the_categories_and_keeps_the_order() -> None:
    assert [p.prompt_id for p in load_prompts(limit=7)] == [
        "factual-01",
        "factual-02",
        "narrative-01",
        "reasoning-01",
        "dialogue-01",
        "instruction-01",
        "code-01",
    ]
    assert load_prompts(limit=1000) == load_prompts()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"category": "narative"}, "Did you mean 'narrative'?"),
        ({"source": "calibraton"}, "Did you mean 'calibration'?"),
        ({"limit": 0}, "--limit 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, wanted: str) -> None:
    with pytest.raises(PromptError, match=wanted.replace("?", r"\?")):
        load_prompts(**arguments)


def test_content_hash_sees_order_text_and_number() -> None:
    prompts = load_prompts()
    hashes = {content_hash(prompts), content_hash(prompts[::-1]), content_hash(prompts[1:]), content_hash([])}
    assert len(hashes) == 4
    assert content_hash(prompts) == content_hash(load_prompts())
