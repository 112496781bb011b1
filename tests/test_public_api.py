"""The public names, and what it costs to ask for them."""

import json
import subprocess
import sys

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
