"""Make a release ready, and print what to type to publish it. Nothing is tagged, pushed or uploaded here.

python .ci/release.py --dry-run    every check, the packages in dist/, and no file changed
python .ci/release.py              the same, and CHANGELOG.md, changes/ and .ci/schemas.json as the release has them

In order: the tree is clean; the version is the same everywhere and has no tag; the layouts of what is stored fit the
version and are kept as test data; fragments become lines of CHANGELOG.md; wheel and sdist are built, installed with
every dependency, and run (.ci/package.py --full).
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHANGELOG, SCHEMAS = ROOT / "CHANGELOG.md", ROOT / ".ci" / "schemas.json"
#: What is stored → where its version is written, and under which name.
LAYOUTS = {
    "runs": ("dynprobe/runs/_schema.py", "SCHEMA_VERSION"),
    "panels": ("dynprobe/runs/_panel_folder.py", "PANEL_SCHEMA"),
    "calibrations": ("dynprobe/probes/_calibration.py", "CALIBRATION_SCHEMA"),
}
#: A small example of each released layout lies here, and tests read it for ever.
KEPT = ROOT / "tests" / "runs" / "data" / "layouts"
MARKER = "<!-- fragments -->\n"


def main() -> int:
    """Check, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="leave every file as it is")
    parser.add_argument("--borrow", action="store_true", help="install with the dependencies that are there (quicker)")
    asked = parser.parse_args()
    expect(not git("status", "--porcelain"), "the tree is not clean; commit or stash first (git status)")
    version = literal("dynprobe/__init__.py", "__version__")
    tags = git("tag", "--list").split()
    for wrong in (*versions_wrong(version, tags), *layouts_wrong(version, layouts(), json.loads(SCHEMAS.read_text()))):
        expect(False, wrong)
    try:
        CHANGELOG.write_text(dated(with_fragments(version), version, dt.date.today()), encoding="utf-8")
        remember(version)
        words = [sys.executable, ".ci/package.py", *([] if asked.borrow else ["--full"])]
        expect(subprocess.run(words, cwd=ROOT, check=False).returncode == 0, "the packages are not good")
    except BaseException:
        git("checkout", "--", "CHANGELOG.md", "changes", str(SCHEMAS))
        raise
    if asked.dry_run:
        git("checkout", "--", "CHANGELOG.md", "changes", str(SCHEMAS))
        print(f"\n{version} could be released; nothing was changed but dist/. The release: python .ci/release.py")
    else:
        print(f"\n{version} is ready. Look at it (git diff), then type:\n{next_steps(version)}")
    return 0


def versions_wrong(version: str, tags: Iterable[str]) -> list[str]:
    """Where the version is another one."""
    wrong = [] if re.fullmatch(r"\d+\.\d+\.\d+", version) else [f"__version__ {version!r} is no MAJOR.MINOR.PATCH"]
    if f"v{version}" in tags:
        wrong.append(f"v{version} is tagged already; raise __version__ in dynprobe/__init__.py")
    cited = re.search(r'^version: "?([^"\n]+)"?$', (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != version:
        wrong.append(f"CITATION.cff says version {cited and cited[1]}, and __version__ is {version}")
    heading = re.search(r"^## (.+)$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    if heading is None or heading[1] != f"{version} (unreleased)":
        wrong.append(f"CHANGELOG.md begins with {heading and heading[1]!r}, not with '{version} (unreleased)'")
    if MARKER not in CHANGELOG.read_text(encoding="utf-8"):
        wrong.append(f"CHANGELOG.md lacks the line {MARKER.strip()} below its first heading")
    return wrong


def layouts() -> dict[str, str]:
    """Version of each layout, as the code has it."""
    return {name: literal(file, constant) for name, (file, constant) in LAYOUTS.items()}


def layouts_wrong(version: str, now: Mapping[str, str], book: Mapping[str, Mapping]) -> list[str]:
    """What does not fit between the layouts of the code, those on record, and those that were released."""
    wrong = []
    if now != book["now"]:
        wrong.append(f".ci/schemas.json says {book['now']} is written now, and the code has {dict(now)}")
    released = {v: layout for v, layout in book["released"].items() if v != version}
    for name, ours in now.items():
        known = [layout[name] for layout in released.values() if name in layout]
        newest = max(known, key=ordered, default=ours)
        if ordered(ours) < ordered(newest):
            wrong.append(f"layout {ours} of {name} is older than {newest}, which was released")
        for layout in sorted({ours, *known}, key=ordered):
            if not (KEPT / name / layout).is_dir():
                wrong.append(
                    f"there is no {KEPT.relative_to(ROOT)}/{name}/{layout}: what is released is read for ever, and "
                    "tests/runs/test_layouts.py reads it from there"
                )
    return wrong


def ordered(layout: str) -> tuple[int, ...]:
    """A layout's version as numbers."""
    return tuple(int(part) for part in layout.split("."))


def with_fragments(version: str) -> str:
    """Let towncrier put the fragments into CHANGELOG.md, and return it."""
    if any(path.name not in ("README.md", "template.jinja") for path in (ROOT / "changes").iterdir()):
        words = [sys.executable, "-m", "towncrier", "build", "--yes", "--version", version]
        done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
        expect(done.returncode == 0, f"towncrier: {done.stderr or done.stdout}")
        git("reset", "-q")
    return CHANGELOG.read_text(encoding="utf-8")


def dated(text: str, version: str, today: dt.date) -> str:
    """Close the section of a version; the next one opens with the next version."""
    text = re.sub(f"{re.escape(MARKER)}\n+- ", "- ", text.replace(f"{MARKER}-", f"{MARKER}\n-", 1), count=1)
    return text.replace(f"## {version} (unreleased)", f"## {version} ({today})", 1)


def remember(version: str) -> None:
    """Write into .ci/schemas.json which layouts this version stores."""
    book = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    released = {**book["released"], version: book["now"]}
    lines = ",\n".join(f'    "{name}": {json.dumps(layout)}' for name, layout in released.items())
    now = json.dumps(book["now"])
    SCHEMAS.write_text(f'{{\n  "now": {now},\n  "released": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


def next_steps(version: str) -> str:
    """What a person types now."""
    major, minor, _ = (int(part) for part in version.split("."))
    after = f"{major}.{minor + 1}.0"
    return f"""
  git add -A CHANGELOG.md changes .ci/schemas.json && git commit -m "Release {version}"
  git tag -a v{version} -m "dynprobe {version}" && git push origin HEAD v{version}
  python -m pip install twine && python -m twine upload dist/*

Then open the next version: __version__ = "{after}" in dynprobe/__init__.py, the same in CITATION.cff, and on top of
CHANGELOG.md a heading "## {after} (unreleased)" with an empty line and {MARKER.strip()} below it."""


def literal(file: str, name: str) -> str:
    """A constant of a module, without importing it."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return str(ast.literal_eval(node.value))
    raise LookupError(f"{file} has no {name}")


def git(*words: str) -> str:
    """Ask git."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def expect(true: bool, otherwise: str) -> None:
    """Leave with a message unless something holds."""
    if not true:
        sys.exit(f".ci/release.py: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
