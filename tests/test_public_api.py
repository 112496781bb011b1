"""What users may rely on: the names, and that importing them costs nothing."""

import subprocess
import sys

import pytest

import dynprobe as dp

PUBLIC = {
    "DynprobeError", "Perturb", "Subject", "Tape", "Where", "__version__", "calibrate", "capture", "discover", "doctor",
    "fetch", "load", "open", "perturb", "plan", "readout", "record", "resume", "run",
    "cli", "errors", "metrics", "models", "probes", "prompts", "protocols", "runs", "testing",
}  # fmt: skip


def test_the_public_names_are_these():
    assert set(dp.__all__) == PUBLIC
    assert set(dir(dp)) == PUBLIC
    for name in PUBLIC:
        assert getattr(dp, name) is not None
    with pytest.raises(AttributeError, match="capure"):
        _ = dp.capure


def loaded_by(code: str) -> set[str]:
    """Top-level modules outside the standard library that a fresh interpreter has after ``code``."""
    report = "; import sys; print('\\n'.join({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return {m for m in found.stderr.split() if m not in sys.stdlib_module_names and not m.startswith("_")}


def test_import_loads_the_standard_library_only():
    bare = loaded_by("pass")  # an editable install brings its own finder
    assert loaded_by("import dynprobe") - bare == {"dynprobe"}


def test_help_loads_nothing_heavy():
    heavy = {"torch", "numpy", "pandas", "pyarrow", "transformers", "pydantic", "scipy", "matplotlib", "huggingface_hub"}
    assert not heavy & loaded_by("from dynprobe.cli import main; main(['--help'])")


def test_every_public_function_has_a_documented_example_or_source():
    for name in sorted(PUBLIC - {"__version__", "cli", "errors", "testing"}):
        assert (getattr(dp, name).__doc__ or "").strip(), name
