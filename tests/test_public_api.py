"""The public names, and what it costs to ask for them."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynprobe as dp

NAMES = [
    "AttractorLayer", "Controller", "DynprobeError", "Perturb", "Subject", "Tape", "Where", "__version__", "attract",
    "bench", "calibrate", "capture", "claims", "cli", "compare", "controllers", "delay_diagnostics", "diff", "discover",
    "dissociate", "doctor", "engines", "errors", "evaluate", "fetch", "ingest", "iterate", "load", "metrics", "models",
    "open", "panel", "perturb", "plan", "probes", "prompts", "protocols", "readout", "record", "recover", "report",
    "resume", "run", "runs", "sweep", "testing", "threshold", "trace_callback",
]  # fmt: skip
#: What `import dynprobe` and `dynprobe --help` must not bring in.
HEAVY = ("torch", "numpy", "pandas", "pyarrow", "pydantic", "transformers", "scipy", "safetensors", "yaml")


def test_the_public_names_are_these():
    assert sorted(dp.__all__) == NAMES
    for name in NAMES:
        assert getattr(dp, name) is not None
    assert dir(dp) == NAMES
    assert dp.open is dp.runs.open_run
    with pytest.raises(AttributeError, match="no attribute 'relod'"):
        dp.relod  # noqa: B018


def test_every_room_keeps_its_table_of_contents():
    for room in (
        "claims", "controllers", "metrics", "models", "probes", "prompts", "protocols", "runs", "testing", "cli",
        "errors",
    ):  # fmt: skip
        module = getattr(dp, room)
        assert module.__all__
        assert all(hasattr(module, name) for name in module.__all__)


def test_every_error_is_one_of_ours_and_has_an_exit_code():
    classes = [getattr(dp.errors, name) for name in dp.errors.__all__ if name not in ("did_you_mean", "near_path")]
    assert all(issubclass(c, dp.DynprobeError) for c in classes)
    codes = {c.__name__: c.exit_code for c in classes}
    assert codes["UsageError"] == codes["PromptError"] == codes["SiteError"] == codes["SpecError"] == 2
    assert codes["SelfTestError"] == 3
    assert codes["InterruptedRunError"] == 130
    assert codes["ModelError"] == codes["RunFolderError"] == codes["CalibrationError"] == 1


ROOMS = (
    "", "claims", "controllers", "controllers.recovery", "engines", "errors", "metrics", "metrics.statistics", "models",
    "probes", "prompts", "protocols", "runs", "testing",
)  # fmt: skip
LISTED = Path(__file__).parent / "data" / "public_api.txt"


def _signature(thing: object) -> str:
    try:
        # A function that is a default is shown by its name, not by where it lies in memory.
        return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(thing)))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def _written(name: str, thing: object) -> list[str]:
    """A public name with what it takes, and of a class of ours also its public methods."""
    if inspect.ismodule(thing):
        return []
    if not inspect.isclass(thing):
        return [name + (_signature(thing) if callable(thing) else "")]
    lines = [f"class {name}"]
    if not thing.__module__.startswith("dynprobe") or issubclass(thing, BaseException):
        return lines
    for key, member in vars(thing).items():
        if key.startswith("_") and key != "__init__":
            continue
        if isinstance(member, property):
            lines.append(f"    {name}.{key}")
        elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            lines.append(f"    {name}.{key}{_signature(inspect.unwrap(getattr(member, '__func__', member)))}")
    return [lines[0], *sorted(lines[1:])]


def test_the_public_api_changes_on_purpose_only():
    """What others build on is listed in one file; who changes it writes it again, and the difference is reviewed."""
    lines = []
    for room in ROOMS:
        module = importlib.import_module(f"dynprobe.{room}" if room else "dynprobe")
        for name in sorted(module.__all__):
            lines += _written(f"dynprobe.{room}.{name}" if room else f"dynprobe.{name}", getattr(module, name))
    found = "\n".join(line for line in lines if not line.startswith("dynprobe.__version__")) + "\n"
    if os.environ.get("DYNPROBE_WRITE_API"):
        LISTED.write_text(found, encoding="utf-8")
    assert found == LISTED.read_text(encoding="utf-8"), (
        "the public API is not the listed one; if that is meant, type DYNPROBE_WRITE_API=1 python -m pytest "
        "tests/test_public_api.py, and say so in the changelog. A name that goes is renamed first: dynprobe/_renamed.py"
    )


def test_an_old_name_works_and_warns(monkeypatch):
    monkeypatch.setitem(dp._RENAMED, "seize", ("capture", "0.3"))
    with pytest.warns(FutureWarning, match=r"dynprobe\.seize is now dynprobe\.capture; the old name goes with version"):
        assert dp.seize is dp.capture
    assert "seize" not in dir(dp)


def _loaded(code: str) -> set[str]:
    """Top-level modules in memory after a piece of code in a fresh interpreter."""
    text = f"import json, sys\n{code}\nprint('\\n' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(out.stdout.strip().splitlines()[-1]))


def test_import_loads_the_standard_library_only():
    bare, ours = _loaded(""), _loaded("import dynprobe")
    foreign = {m for m in ours - bare - {"dynprobe"} if m not in sys.stdlib_module_names}
    assert foreign == set()


def test_help_loads_nothing_heavy():
    code = "from dynprobe.cli import main\nassert main(['--help']) == 0"
    assert not _loaded(code) & set(HEAVY)
    of_run = _loaded(code.replace("['--help']", "['run', '--help']"))
    assert not of_run & (set(HEAVY) - {"pydantic"})  # which typer itself reads its parameters with


def test_everything_public_is_documented():
    for name in sorted(set(NAMES) - {"__version__"}):
        assert (getattr(dp, name).__doc__ or "").strip(), name
