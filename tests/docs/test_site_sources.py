"""The sources of the site: formulas that convert, pages of every metric, a check of the built pages that can fail."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dynprobe.metrics import ids, spec

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.skipif(not (DOCS / "_build").is_dir(), reason="the documentation is not beside the tests")


def module(name: str) -> ModuleType:
    """Import a file of docs/_build under its own name."""
    found = importlib.util.spec_from_file_location(f"docs_build_{name}", DOCS / "_build" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where pages that a script generates go in place of the site."""

    def write(path: str, mode: str = "r") -> Any:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        return (tmp_path / path).open(mode, encoding=None if "b" in mode else "utf-8")

    monkeypatch.setitem(sys.modules, "mkdocs_gen_files", SimpleNamespace(open=write))
    return tmp_path


@pytest.mark.parametrize("metric_id", ids())
def test_every_metric_has_a_formula_with_balanced_groups(metric_id):
    latex = spec(metric_id).latex
    assert latex.strip()
    assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
    assert latex.count(r"\begin{") == latex.count(r"\end{")
    assert "%" not in latex.replace(r"\%", "")  # a comment in LaTeX: the rest of the formula would be lost


@pytest.mark.parametrize("metric_id", ids())
def test_a_formula_shows_the_means_that_its_text_names(metric_id):
    said = spec(metric_id).formula
    named = "value = mean" in said or "; mean over" in said or "mean over non-overlapping windows" in said
    shown = spec(metric_id).latex.count(r"\operatorname*{mean}")
    assert shown >= named + (
        "profile = mean over" in said and "value = mean over" in said and "of the last" not in said
    )


@pytest.mark.parametrize(
    ("metric_id", "parts"),
    {
        "delta.rel_prev/1": [r"x_{k,n}\rVert} & \text{agg=mean}", r"S_{k}\rVert_F} & \text{agg=fro}"],
        "delta.rel_next/1": [r"x_{k+1,n}\rVert} & \text{agg=mean}", r"S_{k+1}\rVert_F} & \text{agg=fro}"],
        "delta.angle/1": [r"\operatorname*{mean}_{k}\kappa_k"],
        "energy.interaction/1": [r"\frac{1}{\tau} = \mathrm{scale}"],
        "str.kernel/1": [r"t-K+1", r"\operatorname*{mean}_{t}"],
        "delay.fnn/1": [r"j(i) = \operatorname*{argmin}"],
        "influence.angular/1": [r"s = \mathrm{n}", r"\text{tokens=all}"],
        "cka.linear/1": [r"\operatorname*{mean}_{\text{windows of }W}"],
    }.items(),
)  # fmt: skip
def test_a_formula_shows_the_cases_and_letters_of_its_text(metric_id, parts):
    assert [part for part in parts if part not in spec(metric_id).latex] == []


def test_every_formula_becomes_mathml():
    pytest.importorskip("pypandoc")
    pytest.importorskip("mkdocs")
    mathml = module("mathml").mathml
    made = mathml([(spec(i).latex, True) for i in ids()])
    assert len(made) == len(ids())
    assert all(m.startswith("<math ") and "annotation" not in m and "\\" not in m for m in made)
    with pytest.raises(ValueError, match=r"1 formulas are no LaTeX"):
        mathml([(r"\frac{1}{2}", True), (r"\frac{1", True)])


def test_an_operator_is_set_apart_from_what_it_acts_on():
    pytest.importorskip("pypandoc")
    pytest.importorskip("mkdocs")
    (spaced,), (tight,) = (module("mathml").mathml([(tex, False)]) for tex in (r"p \ln q", r"\ln(q)"))
    assert spaced.count("<mspace") == 2
    assert "<mspace" not in tight


def test_every_metric_has_a_page_with_its_definition(pages):
    module("metric_pages")
    overview = (pages / "metrics/index.md").read_text(encoding="utf-8")
    for metric_id in ids():
        name = f"{metric_id.replace('/', '-')}.md"
        page = (pages / "metrics" / name).read_text(encoding="utf-8")
        assert f"# {metric_id}\n" in page
        assert spec(metric_id).digest in page
        assert page.count("| ") >= len(spec(metric_id).vectors)
        assert f"({name})" in overview


def test_every_command_and_table_is_listed(pages):
    from dynprobe.runs._schema import TABLES

    module("cli_page")
    commands = (pages / "reference/cli.md").read_text(encoding="utf-8")
    for name in ("run", "sweep", "threshold", "recover", "attract", "compare", "export", "claims test"):
        assert f" dynprobe {name}\n" in commands
    assert "| `--max-new-tokens <int>` | `32` |" in commands
    module("schema_page")
    schema = (pages / "reference/run_folder.md").read_text(encoding="utf-8")
    assert all(f"\n## {name}\n" in schema for name in TABLES)


@pytest.mark.parametrize(
    ("tag", "fetched"),
    [
        ('<a href="https://example.org">text</a>', 0),
        ('<script src="assets/app.js"></script>', 0),
        ('<link rel="canonical" href="https://example.org/">', 0),
        ('<script src="https://example.org/x.js"></script>', 1),
        ('<link rel="preconnect" href="//example.org">', 1),
        ('<img src="http://example.org/x.png">', 1),
        ('<base href="https://example.org/">', 1),
        ('<form action="https://example.org/"><button formaction="//example.org/y"></button></form>', 2),
        ('<form action="search.html"><input type="text"></form>', 0),
        ("<style>@import 'https://example.org/x.css'; a {background: url(//example.org/y)}</style>", 2),
    ],
)
def test_what_a_page_would_fetch_is_found(tmp_path, tag, fetched):
    (tmp_path / "index.html").write_text(f"<html><body>{tag}</body></html>", encoding="utf-8")
    assert len(module("offline").remote(tmp_path)) == fetched


def test_a_page_forbids_what_it_would_fetch_or_send():
    page = (DOCS / "_build" / "theme" / "main.html").read_text(encoding="utf-8")
    for rule in ("default-src 'self'", "base-uri 'self'", "form-action 'none'"):
        assert rule in page


def test_no_page_stands_twice_in_the_navigation():
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"^ +- (?:[^#\n]*: )?([\w/]+\.md)$", text, re.MULTILINE)
    assert len(pages) > 30
    assert len(set(pages)) == len(pages)


def test_tutorials_are_scripts_with_text(tmp_path):
    scripts = [*DOCS.glob("tutorials/*.py"), *DOCS.glob("concepts/*.py")]
    assert len(scripts) >= 10
    for script in scripts:
        source = script.read_text(encoding="utf-8")
        assert source.startswith("# %% [markdown]\n# # ")
        compile(source, script.name, "exec")
