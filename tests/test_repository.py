"""What stands beside the package: versions that agree, hooks that are what CI does, layouts that stay readable."""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import dynprobe

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_everywhere():
    release = script("release")
    assert release.literal("dynprobe/__init__.py", "__version__") == dynprobe.__version__
    assert release.versions_wrong(dynprobe.__version__, tags=["v0.0.1"]) == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "dynprobe/__init__.py"


def test_a_version_that_is_tagged_or_that_others_do_not_have_is_refused():
    release = script("release")
    (said,) = release.versions_wrong(dynprobe.__version__, tags=[f"v{dynprobe.__version__}"])
    assert "is tagged already" in said
    cited, headed = release.versions_wrong("9.9.9", tags=[])
    assert "CITATION.cff" in cited
    assert "CHANGELOG.md" in headed
    assert "MAJOR.MINOR.PATCH" in release.versions_wrong("1.0rc1", tags=[])[0]


def test_stored_layouts_are_on_record_and_kept():
    release = script("release")
    book = json.loads((ROOT / ".ci" / "schemas.json").read_text(encoding="utf-8"))
    assert release.layouts_wrong(dynprobe.__version__, release.layouts(), book) == []
    newer = {**release.layouts(), "runs": "1.999"}
    unsaid, unkept = release.layouts_wrong("9.9.9", newer, book)
    assert "is written now, and the code has" in unsaid
    assert "layouts/runs/1.999" in unkept
    older = {"now": release.layouts(), "released": {"0.0.1": {**release.layouts(), "runs": "99.0"}}}
    assert any("is older than 99.0" in said for said in release.layouts_wrong("9.9.9", release.layouts(), older))


@pytest.mark.parametrize("fragments", ["\n- cli: new\n", ""])
def test_the_changelog_of_a_release_is_dated_and_has_no_marker(fragments):
    text = f"# Changelog\n\n## 1.2.0 (unreleased)\n\n<!-- fragments -->\n{fragments}- runs: old\n"
    made = script("release").dated(text, "1.2.0", dt.date(2027, 1, 2))
    new = "- cli: new\n" if fragments else ""
    assert made == f"# Changelog\n\n## 1.2.0 (2027-01-02)\n\n{new}- runs: old\n"


def test_hooks_are_the_steps_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}  # nothing is cloned
    theirs = {h["entry"].removeprefix(".venv/bin/").split(" --")[0] for repo in hooks for h in repo["hooks"]}
    lines = re.search(r"^check: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    ours = {re.sub(r"^\$\(VENV\)/bin/| --check| \$\(SOURCES\)", "", line.strip()) for line in lines.splitlines()}
    assert ours == theirs


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_sdist_holds_what_these_tests_read():
    packed = {"pyproject.toml", *project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    read = set(re.findall(r'ROOT / "([\w.-]+)"', Path(__file__).read_text(encoding="utf-8")))
    assert read > {".ci", "changes", ".github"}
    assert read - packed == set()


def test_make_check_looks_at_every_folder_with_code():
    looked = re.search(r"^SOURCES = (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    for name in project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        if (ROOT / name).is_dir() and any((ROOT / name).rglob("*.py")):
            assert any(source == name or source.startswith(f"{name}/") for source in looked), name


def test_every_area_of_a_fragment_is_explained():
    areas = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]["type"]
    told = (ROOT / "changes" / "README.md").read_text(encoding="utf-8")
    assert [a["directory"] for a in areas] == [a["name"] for a in areas]
    assert all(f"`{a['name']}`" in told for a in areas)
    for path in (ROOT / "changes").iterdir():
        if path.name not in ("README.md", "template.jinja"):
            assert re.fullmatch(r"(\d+|\+[\w-]+)\.(\w+)\.md", path.name), path.name
            assert path.name.split(".")[-2] in {a["name"] for a in areas}, path.name


def test_issue_forms_ask_for_something():
    forms = [p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]
    assert len(forms) == 4
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "labels", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert any(field.get("validations", {}).get("required") for field in form["body"])
        assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in form["body"])
