"""Write ``docs/dependencies.md``: what the core and each extra bring along, by the metadata of what is installed.

python .ci/licences.py            writes the page
python .ci/licences.py --check    exit code 1 where a dependency of the core has a licence that is not permissive
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

#: Licences that ask for no more than their notice; MPL-2.0 asks for the source of its own files alone.
PERMISSIVE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software|Unlicense|MPL|Mozilla|HPND|CNRI|Zlib|0BSD", re.I)
COPYLEFT = re.compile(r"(?<!L)GPL|AGPL|SSPL|proprietary", re.I)
PAGE = Path(__file__).parents[1] / "docs" / "dependencies.md"


def licence(name: str) -> str:
    """Licence of an installed package: its expression, else its classifiers, else the first line of its field."""
    facts = distribution(name).metadata
    if expression := facts.get("License-Expression"):
        return str(expression)
    classes = [c.rsplit(" :: ", 1)[1] for c in facts.get_all("Classifier") or () if c.startswith("License :: ")]
    classes = [c for c in classes if c != "OSI Approved"]
    return ", ".join(classes) or str(facts.get("License") or "unknown").strip().splitlines()[0][:60]


def closure(requirements: list[str]) -> dict[str, str]:
    """Everything that a list of requirements brings along: name → version (empty where it is not installed)."""
    found: dict[str, str] = {}
    todo = [(text, "") for text in requirements]
    while todo:
        text, asked = todo.pop()
        need = Requirement(text)
        if need.marker is not None and not any(need.marker.evaluate({"extra": e}) for e in {asked, ""}):
            continue
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:
            found[name] = ""
            continue
        todo += [(r, e) for e in (*need.extras, "") for r in distribution(name).requires or ()]
    return found


def main() -> int:
    """Write the page, or check the core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = closure(project["dependencies"])
    bad = [
        f"{name}: {licence(name)}" for name, version in core.items()
        if version and (COPYLEFT.search(licence(name)) or not PERMISSIVE.search(licence(name)))
    ]  # fmt: skip
    if args.check:
        print(*bad, sep="\n")
        return int(bool(bad))
    direct = {re.sub(r"[-_.]+", "-", Requirement(r).name).lower() for r in project["dependencies"]}
    lines = [
        "# Dependencies and their licences",
        "",
        "Written by `python .ci/licences.py` from the metadata of what is installed. The core needs the first",
        "table; every extra is imported where it is used and not before.",
        "",
        "| package | version | licence | |",
        "|---|---|---|---|",
    ]
    for name in sorted(core):
        mark = "direct" if name in direct else ""
        lines.append(f"| {name} | {core[name] or 'not installed'} | {licence(name) if core[name] else ''} | {mark} |")
    lines += ["", "| extra | brings along, beside the core |", "|---|---|"]
    for extra, asked in sorted(project["optional-dependencies"].items()):
        if extra in ("test", "dev", "demo"):
            continue
        more = closure(asked)
        told = [f"{n} ({licence(n) if v else 'not installed'})" for n, v in sorted(more.items()) if n not in core]
        lines.append(f"| `{extra}` | {', '.join(told) or 'nothing'} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {PAGE}; of the core {len(core)} packages, {len(bad)} to be looked at", *bad, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
