"""Every command and snippet of README.md and of the pages in docs/ does what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from snippets import Reader, Snippet, SnippetError, agrees, snippets

ROOT = Path(__file__).parent.parent.parent
REAL = "smollm2"  # what needs weights that do not come with the package
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))


def page(name: str) -> list[Snippet]:
    return snippets((ROOT / name).read_text(encoding="utf-8"), tables=name == "README.md")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Someone with a wide terminal without colours, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return Reader(tmp_path, ROOT)


def read(reader: Reader, found: list[Snippet], name: str) -> None:
    for snippet in found:
        try:
            reader.read(snippet)
        except BaseException as error:
            error.add_note(f"{name}, line {snippet.line}")
            raise


def test_what_the_readme_does_on_the_models_that_come_with_the_package(reader: Reader) -> None:
    found = [snippet for snippet in page("README.md") if REAL not in snippet.text]
    assert {snippet.kind for snippet in found} >= {"bash", "python"}
    read(reader, found, "README.md")


@pytest.mark.slow
def test_what_the_readme_prints_on_real_weights(reader: Reader) -> None:
    found = [snippet for snippet in page("README.md") if REAL in snippet.text]
    assert len(found) == 2
    read(reader, found, "README.md")


#: Pages whose commands are studies of minutes; `make test-long` types them.
MINUTES = ("attractor", "bench", "claims", "dissociation", "evaluation", "extending", "how_to", "index", "models",
           "recovery", "tour", "glossary")  # fmt: skip


def pages() -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.long if Path(n).stem in MINUTES else pytest.mark.slow) for n in PAGES]


@pytest.mark.parametrize("name", pages())
def test_a_page_of_the_documentation(reader: Reader, name: str) -> None:
    read(reader, page(name), name)


def test_nothing_is_skipped_without_a_reason() -> None:
    skipped = [(name, s.skip) for name in ["README.md", *PAGES] for s in page(name) if s.skip]
    assert all(len(reason.split()) >= 2 for _, reason in skipped), skipped
    assert not [name for name, _ in skipped if name == "README.md"]


def test_a_page_is_taken_apart() -> None:
    text = (
        "<!-- test: replace big-model => small -->\n```bash\ndynprobe run --model big-model\n```\n"
        "<!-- test: setup\nRUN = 1\n-->\n<!-- test: append --limit 2 -->\n```python\nx = RUN\n```\n"
        "| what | how |\n| it runs | `dynprobe ls`, `dynprobe doctor` |\n"
    )
    first, second, third = snippets(text, tables=True)
    assert (first.kind, first.text, first.line) == ("bash", "dynprobe run --model small\n", 2)
    assert (second.setup, second.append, second.text) == ("RUN = 1", "--limit 2", "x = RUN\n")
    assert third.text == "dynprobe ls\ndynprobe doctor"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bash", "dynprobe run --limitt 3"),
        ("bash", "rm -rf everything"),
        ("bash", "make coffee"),
        ("bash", "pip install 'dynprobe[nothing]'"),
        ("", "$ dynprobe --version\ndynprobe 99.9\n"),
        ("python", "import dynprobe as dp\ndp.nothing\n"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(reader: Reader, kind: str, text: str) -> None:
    with pytest.raises((SnippetError, AttributeError)):
        reader.read(Snippet(kind, text, 1))


def test_a_table_agrees_within_two_parts_in_a_hundred() -> None:
    agrees("│ clean │ 0.0969 │ …\n", "│ clean │ 0.0970 │ 12 │\n")
    with pytest.raises(SnippetError, match="clean"):
        agrees("│ clean │ 0.0969 │\n", "│ clean │ 0.1000 │\n")
    with pytest.raises(SnippetError):
        agrees("│ clean │ 0.0969 │\n", "│ sham │ 0.0969 │\n")
