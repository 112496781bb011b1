"""The matched question: rank correlations, what is common to both held fixed, and the columns they are taken of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dynprobe as dp

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def question() -> Iterator[Any]:
    """The script."""
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are not beside the tests")
    sys.path.insert(0, str(EXAMPLES))
    import matched_question

    yield matched_question
    sys.path.remove(str(EXAMPLES))


def test_what_two_columns_share_is_taken_out(question: Any) -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=4000)
    x, y = common + rng.normal(size=4000), common + rng.normal(size=4000)
    assert question.spearman(x, y) == pytest.approx(0.48, abs=0.04)  # 6/π arcsin(ρ/2) at ρ = 1/2
    assert question.partial(x, y, common) == pytest.approx(0, abs=0.05)
    # The formula of the first-order partial correlation is that of the residuals of ranks.
    ranks = pd.DataFrame({"x": x, "y": y, "z": common}).rank().to_numpy()
    design = np.column_stack([np.ones(len(ranks)), ranks[:, 2]])
    rest = ranks[:, :2] - design @ np.linalg.lstsq(design, ranks[:, :2], rcond=None)[0]
    assert question.partial(x, y, common) == pytest.approx(np.corrcoef(rest.T)[0, 1], abs=1e-9)
    found = question.interval(question.spearman, x[:200], y[:200])
    assert found["low"] < found["rho"] < found["high"]


def test_passages_share_no_character(question: Any) -> None:
    texts = question.passages()
    assert len(texts) == len(set(texts)) > 80
    assert {len(t) for t in texts[60:]} == {question.LENGTH}


def test_columns_are_means_over_what_a_run_stores(question: Any, tmp_path: Path) -> None:
    texts = question.passages()[:3]
    table = question.measured("tiny-csm", texts, tmp_path)
    run = dp.run("tiny-csm", texts, max_new_tokens=0, out=tmp_path, quiet=True)
    one = run.samples.iloc[0]
    rows = run.depths[(run.depths["sample_id"] == one["sample_id"]) & (run.depths["pos"] >= 1)]
    wide = rows.pivot_table(index="pos", columns="depth", values="norm")
    radial = np.abs(np.diff(np.log(wide.to_numpy()), axis=1))
    mine = table.loc[one["prompt_id"]]
    assert mine["radial"] == pytest.approx(radial.mean(), rel=1e-5)
    assert mine["radial_last"] == pytest.approx(radial[:, -1].mean(), rel=1e-5)
    assert mine["angular"] == pytest.approx(rows["angle"].mean() / np.pi, rel=1e-5)
    assert mine["delta_last"] == pytest.approx(
        rows[rows["depth"] == rows["depth"].max()]["delta_rel_prev"].mean(), rel=1e-5
    )
