"""What an older version stored is read for ever: one small example of every layout, with the numbers it held.

An example is made by the version that first writes its layout, in a folder that says nothing of its machine:

    dynprobe run --model model --prompt "The sky is" --prompt "And so it went" --max-new-tokens 3 \
        --perturb alpha=0.2,scale=coordstd,layers=1      (the run and its calibration; model: save_tiny_model)
    dynprobe panel p.yaml                                (two models, two categories, two strengths)

and ``python tests/runs/test_layouts.py FOLDER`` writes what is in it into FOLDER/expected.json, once and never again.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import dynprobe as dp
from dynprobe.probes import load_calibration
from dynprobe.runs._panel_folder import open_panel
from dynprobe.runs._schema import SCHEMA_VERSION
from dynprobe.testing import save_tiny_model

KEPT = Path(__file__).parent / "data" / "layouts"
RUN_TABLES = ("prompts", "conditions", "samples", "tokens", "depths", "profiles")


def numbers(folder):
    """Rows of every table, and the mean of every column of numbers."""
    if (folder / "manifest.json").exists():
        run = dp.open(folder)
        assert run.status == "complete"
        assert run.verify() > 0
        frames = {name: run.table(name) for name in RUN_TABLES}
    elif (folder / "panel.json").exists():
        panel = open_panel(folder)
        assert panel.status == "complete"
        frames = {path.stem: panel.table(path.stem) for path in sorted((folder / "tables").glob("*.parquet"))}
    else:
        found = load_calibration(folder)
        signals = {name: [found.quantile(name, q) for q in (0.01, 0.5, 0.99)] for name in sorted(found.signals)}
        return {"header": {key: found.header[key] for key in ("n_prompts", "n_tokens", "hash")}, "signals": signals}
    return {
        name: {"rows": len(frame), "columns": sorted(map(str, frame.columns)),
               "means": {str(c): _mean(frame[c]) for c in frame.select_dtypes("number")}}
        for name, frame in frames.items()
    }  # fmt: skip


def _mean(column):
    values = column.to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    return [len(finite), float(finite.mean()) if len(finite) else None]


@pytest.mark.parametrize("folder", sorted(KEPT.glob("*/*")), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_kept_layout_still_reads_as_it_did(folder):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(numbers(folder)))
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        if "means" not in table:
            assert found[name] == pytest.approx(table) if name == "header" else found[name] == table
            continue
        assert found[name]["rows"] == table["rows"]
        assert set(table["columns"]) <= set(found[name]["columns"])
        for column, (count, mean) in table["means"].items():
            assert found[name]["means"][column][0] == count
            assert found[name]["means"][column][1] == (None if mean is None else pytest.approx(mean, rel=1e-12))


#: Fields of a manifest of 1.1 that came before 1.1 was released; a manifest without them is read as well.
_OPTIONAL = {"plugins", "scales"}


def test_what_is_stored_has_not_changed_under_the_same_version(tmp_path):
    """A column, a type or a field that comes or goes needs a new SCHEMA_VERSION, and an example of it kept here."""
    model = save_tiny_model(tmp_path / "model")
    run = dp.run(
        str(model), ["The sky is", "And so it went"], max_new_tokens=3, perturb="alpha=0.2,scale=coordstd,layers=1",
        out=tmp_path,
    )  # fmt: skip
    kept = dp.open(KEPT / "runs" / SCHEMA_VERSION)
    now, then = [_columns_of_no_metric(one) for one in (run, kept)]
    assert now == then
    fields, before = [set(json.loads((one.path / "manifest.json").read_text(encoding="utf-8"))) for one in (run, kept)]
    assert before <= fields
    assert fields - before <= _OPTIONAL


def _columns_of_no_metric(run):
    """Metrics come and go under ids of their own; a run says which it has."""
    facts = run.columns()
    return set(facts.loc[facts["id"] == "", ["table", "column", "dtype"]].itertuples(index=False, name=None))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with (target / "expected.json").open("x", encoding="utf-8") as file:
        json.dump(numbers(target), file, indent=1)
