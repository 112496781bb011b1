"""What may be called the same, and what may be called equal: prompts, unknown tokens, empty comparisons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dynprobe.errors import UsageError
from dynprobe.runs import RunWriter, diff
from dynprobe.runs._diff import _growth
from dynprobe.runs._diff_cells import _METRICS, proved
from dynprobe.runs._diff_head import heads_of


def made(out, prompts, *, nll=None, depths=None, states=None, tokens=True, fields=None):
    """A run whose prompts are given as ``name: (text, ids of the prompt, tokens fed and the last target)``."""
    writer = RunWriter.begin(
        out, ident="0123abcd", model_name="made", config={}, manifest_fields={"batch_plan": [0], **(fields or {})}
    )
    with writer:
        table = [{"prompt_id": n, "text": text, "token_ids": list(ids)} for n, (text, ids, _) in prompts.items()]
        writer.write_table("prompts", pd.DataFrame(table))
        writer.write_table("conditions", pd.DataFrame({"condition_id": ["clean"], "arm": ["clean"]}))
        samples = [
            {"sample_id": f"{n}|clean|0", "prompt_id": n, "condition_id": "clean", "replicate": 0, "n_prompt": 3}
            for n in prompts
        ]
        tables = {"samples": pd.DataFrame(samples)}
        if tokens:
            rows = [
                {"sample_id": f"{n}|clean|0", "pos": p, "token_id": fed[p], "target_id": fed[p + 1]}
                for n, (_, _, fed) in prompts.items()
                for p in range(len(fed) - 1)
            ]
            tables["tokens"] = pd.DataFrame(rows)
            if nll is not None:
                tables["tokens"]["nll"] = nll
        if depths is not None:
            rows = [
                {"sample_id": f"{n}|clean|0", "pos": p, "track": "resid", "depth": d, "norm": depths, "angle": np.nan}
                for n, (_, _, fed) in prompts.items()
                for p in range(len(fed) - 1)
                for d in range(3)
            ]
            tables["depths"] = pd.DataFrame(rows)
        if states is not None:
            rows = [
                {"sample_id": f"{n}|clean|0", "pos": p, "track": "resid", "depth": d}
                for n, (_, _, fed) in prompts.items()
                for p in range(len(fed) - 1)
                for d in range(states)
            ]
            frame = pd.DataFrame(rows)
            vectors = np.random.default_rng(0).normal(size=(len(frame), 4)).astype(np.float32)
            vectors = np.repeat(np.arange(1.0, 5.0, dtype=np.float32)[None], len(frame), axis=0)
            writer.write_states(0, frame, vectors, "float32")
        writer.write_batch(0, tables)
        writer.finish({})
    return writer.folder


FED = [3, 4, 5, 6]
UNKNOWN = [-1, -1, -1, -1]


def test_prompts_of_which_nothing_is_known_do_not_pair(tmp_path):
    a = made(tmp_path / "a", {"x": (None, (), UNKNOWN)}, states=2)
    b = made(tmp_path / "b", {"y": (None, (), UNKNOWN), "x": (None, (), UNKNOWN)}, states=2)
    with pytest.raises(UsageError, match=r"share no sample.*neither a text nor token ids"):
        diff(a, b)
    c = made(tmp_path / "c", {"x": (None, (), UNKNOWN), "p": ("t", (3, 4, 5), FED)}, states=2)
    found = diff(c, made(tmp_path / "d", {"q": (None, (), UNKNOWN), "p": ("t", (3, 4, 5), FED)}, states=2))
    assert list(found.samples["prompt_id"]) == ["p"]
    assert "prompt x" in found.only_a
    assert "prompt q" in found.only_b


def test_equal_texts_pair_one_to_one(tmp_path):
    one = ("t", (3, 4, 5), FED)
    a = made(tmp_path / "a", {"u": one, "v": one}, states=2)
    found = diff(a, made(tmp_path / "b", {"w": one}, states=2))
    assert list(found.samples["prompt_id"]) == ["u"]
    assert found.only_a == ["prompt v"]
    # a prompt of the same name goes first, whatever the order
    found = diff(a, made(tmp_path / "c", {"v": one}, states=2))
    assert list(found.samples["prompt_id"]) == ["v"]


def test_a_text_and_an_import_with_ids_pair_by_ids(tmp_path):
    run = made(tmp_path / "a", {"p": ("t", (3, 4, 5), [3, 4, 5, 6, 7]), "r": ("s", (3, 4, 9), [3, 4, 9, 1])}, states=2)
    ids = made(tmp_path / "b", {"q": (None, (3, 4, 5), [3, 4, 5, -1])}, states=2)
    for found in (diff(run, ids), diff(ids, run)):
        assert len(found.samples) == 1
        assert found.samples["differs_at"].isna().all()  # what comes after the prompt is unknown, not different
        assert found.samples["n_cells"].tolist() == [6]
        assert found.verdict == "equal bit for bit"


def test_unknown_tokens_are_no_difference(tmp_path):
    a = made(tmp_path / "a", {"p": ("t", (3, 4, 5), FED)}, states=2)
    b = made(tmp_path / "b", {"p": ("t", (), UNKNOWN)}, states=2)
    found = diff(a, b)
    assert found.samples["differs_at"].isna().all()
    assert found.samples["n_tokens"].tolist() == [3]
    assert not found.parts


def test_equality_needs_a_comparison(tmp_path):
    prompts = {"p": ("t", (3, 4, 5), FED)}
    bare = made(tmp_path / "a", prompts)
    found = diff(bare, made(tmp_path / "b", prompts))
    assert found.verdict.startswith("nothing to compare")
    assert not found.compared
    assert "--states" in found.verdict
    assert found.samples["verdict"].tolist() == found.conditions["verdict"].tolist() == ["nothing to compare"]
    assert not found.parts
    one_sided = diff(made(tmp_path / "c", prompts, nll=1.0), made(tmp_path / "d", prompts, tokens=False, states=2))
    assert one_sided.verdict.startswith("nothing to compare")
    unknown = diff(*(made(tmp_path / n, prompts, nll=np.nan, depths=np.nan) for n in ("e", "f")))
    assert unknown.verdict.startswith("nothing to compare")
    assert diff(*(made(tmp_path / n, prompts, nll=1.0) for n in ("g", "h"))).verdict.startswith("equal bit for bit")


def test_cells_in_one_run_only_are_counted(tmp_path):
    prompts = {"p": ("t", (3, 4, 5), FED)}
    found = diff(*(made(tmp_path / n, prompts, states=s) for n, s in (("a", 3), ("b", 2))))
    assert any("3 cells are in A only" in text for text in found.warnings)
    found = diff(*(made(tmp_path / n, prompts, states=s) for n, s in (("c", 2), ("d", 2))))
    assert not any("only" in text for text in found.warnings)


@pytest.mark.parametrize("column", list(_METRICS))
def test_a_number_that_is_not_finite_is_a_difference(column):
    x = np.array([np.inf, np.nan, np.inf, np.nan, 1.0, 2.0])
    y = np.array([1.0, 1.0, np.inf, np.nan, np.inf, 2.0])
    found = proved(column, x, y)
    assert found[[2, 3, 5]].tolist() == [0.0, 0.0, 0.0]
    assert found[1] == np.inf
    assert (found[[0, 4]] >= 1.0).all()
    if column != "angle":
        assert (found[[0, 4]] == np.inf).all()


def test_growth_says_its_track():
    frames = [
        pd.DataFrame({"track": name, "depth": range(6), "rel": 1e-6 * factor ** np.arange(6.0)})
        for name, factor in (("z_H", 1.5), ("z_L", 3.0))
    ]
    growth, track = _growth(pd.concat(frames))
    assert growth == pytest.approx(3.0)
    assert track == "z_L"
    assert _growth(frames[0].head(2)) == (pytest.approx(np.nan, nan_ok=True), None)


def test_heads_that_were_not_compared_are_not_equal():
    class Fake:
        def __init__(self, sample):
            self.frame = pd.DataFrame({"sample_id": sample, "pos": range(3), "nll": 1.0})
            self.manifest = type("M", (), {"rows": staticmethod(lambda: {"tokens": 3})})()

        def columns(self):
            return pd.DataFrame({"table": "tokens", "column": ["sample_id", "pos", "nll"]})

        def table(self, name, columns):
            return self.frame[columns]

    pairs = pd.DataFrame({"a": ["s"], "b": ["s"], "n_same": [4.0]})
    assert heads_of(Fake("s"), Fake("s"), pairs, 0.1)["n_head"].tolist() == [3]
    other = heads_of(Fake("s"), Fake("else"), pairs, 0.1)
    assert other["n_head"].tolist() == [0]
