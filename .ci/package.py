"""Build wheel and sdist, look into them, install each in a clean environment, and run it there.

python .ci/package.py          the environments borrow the dependencies of this Python, so minutes are saved
python .ci/package.py --full   the wheel's environment installs every dependency itself

MATRIX_TORCH pins torch in the full one (a build without CUDA, say). The files are left in dist/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
#: Bytes of the wheel when this was last changed on purpose, and how far it may be above.
WHEEL_BYTES, ROOM = 15_130_000, 1.10
#: What a stranger does first: import, help, a run of the zoo away from the checkout, and a look at it.
SMOKE = """
import subprocess, sys
from importlib.metadata import requires, version
from pathlib import Path

import dynprobe
from packaging.requirements import Requirement

home = Path(dynprobe.__file__)
assert home.is_relative_to(sys.prefix), f"dynprobe was imported from {home}, not from the installed package"
assert version("dynprobe") == dynprobe.__version__
for line in requires("dynprobe"):
    need = Requirement(line)
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        assert need.specifier.contains(version(need.name), prereleases=True), f"{line}, found {version(need.name)}"


def dynprobe_says(*words):
    program = Path(sys.prefix) / "bin" / "dynprobe"
    return subprocess.run([program, *words], check=True, text=True, stdout=subprocess.PIPE).stdout


assert "Usage: dynprobe" in dynprobe_says("--help")
said = dynprobe_says(
    "run", "--model", "tiny-llama", "--limit", "2", "--max-new-tokens", "4", "--perturb", "alpha=0.1", "--quiet"
)
(run,) = Path("runs").iterdir()
assert "perturbed.forced" in said and "null ok (0)" in said, said
assert {"clean", "perturbed.forced", "perturbed.free"} <= set(dynprobe.open(run).samples["condition_id"])
for model in ("tiny-cem", "tiny-csm", dynprobe.models.panel_models()[0].name):
    assert (dynprobe.models.zoo_folder(model) / "model.safetensors").is_file(), model
print(f"    {home.parent}: version {dynprobe.__version__}, dependencies as declared, a run of tiny-llama")
"""


def main() -> int:
    """Build, look, install, run; say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="install every dependency of the wheel itself")
    full = parser.parse_args().full
    begun = time.monotonic()
    wheel, sdist = build()
    version = wheel.name.split("-")[1]
    members = of_wheel(wheel)
    check_wheel(wheel, members, version)
    check_sdist(sdist, version)
    print(
        f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {weights(members) / 1e6:.2f} MB of it weights of the zoo"
    )
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
    install_and_run(wheel, full=full)
    install_and_run(sdist, full=False)
    print(f"wheel and sdist build, hold what they should, install and run ({time.monotonic() - begun:.0f} s)")
    return 0


def build() -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, with the tools of this Python."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT), quiet=True)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel, sdist


def of_wheel(wheel: Path) -> dict[str, tuple[int, int]]:
    """Every file of a wheel: name → bytes, and bytes as packed."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: (info.file_size, info.compress_size) for info in archive.infolist()}


def weights(members: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of the wheel that are weights."""
    return sum(packed for name, (_, packed) in members.items() if name.endswith(".safetensors"))


def check_wheel(wheel: Path, members: Mapping[str, tuple[int, int]], version: str) -> None:
    """Refuse a wheel that lacks a file of the package, brings another one, or has grown."""
    info = f"dynprobe-{version}.dist-info/"
    found = {name for name in members if not name.startswith(info)}
    wanted = {name for name in tracked() if name.startswith("dynprobe/")}
    differ("the wheel", found, wanted)
    for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"):
        expect(info + name in members, f"the wheel lacks {info}{name}")
    expect("dynprobe/py.typed" in found, "the wheel lacks dynprobe/py.typed, so type checkers would not look into it")
    size = wheel.stat().st_size
    expect(
        size <= WHEEL_BYTES * ROOM,
        f"the wheel has {size:,} bytes, {size / WHEEL_BYTES - 1:+.0%} of {WHEEL_BYTES:,} (at most {ROOM - 1:+.0%}); "
        "take out what need not be there, or set WHEEL_BYTES in .ci/package.py and say why",
    )


def check_sdist(sdist: Path, version: str) -> None:
    """Refuse an sdist that cannot be built, tested and cited from."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    differ("the sdist", names - {"PKG-INFO"}, tracked() & names | set(_OF_SDIST))
    for room in ("dynprobe/", "tests/", "docs/", "examples/", ".ci/", ".github/", "changes/"):
        differ(f"{room} of the sdist", {n for n in names if n.startswith(room)},
               {n for n in tracked() if n.startswith(room)})  # fmt: skip
    expect(sdist.name == f"dynprobe-{version}.tar.gz", f"{sdist.name} is not of version {version}")


_OF_SDIST = ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE")


def differ(what: str, found: set[str], wanted: set[str]) -> None:
    """Refuse two lists of files that are not the same."""
    for word, names in (("lacks", wanted - found), ("holds what git does not track:", found - wanted)):
        expect(not names, f"{what} {word} {', '.join(sorted(names)[:5])} ({len(names)} in all)")


def tracked() -> set[str]:
    """Files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def install_and_run(package: Path, *, full: bool) -> None:
    """Install into an environment that has nothing else, and run what a stranger runs, away from the checkout."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dynprobe-package-") as folder:
        place = Path(folder) / "venv"
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        if full:
            torch = os.environ.get("MATRIX_TORCH")
            pinned = ["-c", str(ROOT / "constraints.txt")] if torch is None else [f"torch=={torch}"]
            pip(python, *pinned, str(package))
        else:
            ours = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
            # A path in a .pth file is searched after the environment's own, and its .pth files are not read: an
            # editable dynprobe beside the dependencies stays unseen.
            theirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
            (ours / "borrowed.pth").write_text("\n".join(theirs) + "\n", encoding="utf-8")
            pip(python, "--no-deps", "--no-build-isolation", str(package))
        installed = time.monotonic() - begun
        (Path(folder) / "away").mkdir()
        said = run(python, "-c", SMOKE, cwd=Path(folder) / "away", cache=Path(folder) / "cache")
    how = "with all its dependencies" if full else "with borrowed dependencies"
    print(f"{package.name}: installed {how} in {installed:.0f} s, run in {time.monotonic() - begun - installed:.0f} s")
    print(said.rstrip())


def pip(python: Path, *words: str) -> None:
    """Install."""
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words, quiet=True)


def run(*words: object, cwd: Path | None = None, cache: Path | None = None, quiet: bool = False) -> str:
    """Run a program without what this process has set for Python; its output is shown where it fails."""
    clean = {name: value for name, value in os.environ.items() if not re.match("PYTHON|DYNPROBE_", name)}
    if cache is not None:
        clean["DYNPROBE_CACHE"] = str(cache)
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=clean, check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if quiet else None,
    )  # fmt: skip
    expect(done.returncode == 0, f"{done.stdout}\n{Path(str(words[0])).name} left with {done.returncode}")
    return done.stdout


def expect(true: bool, otherwise: str) -> None:
    """Leave with a message unless something holds."""
    if not true:
        sys.exit(f".ci/package.py: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
