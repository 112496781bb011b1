"""Branches of parsers and readers that the tests take: ``python tests/reliability/branches.py`` (a few minutes).

Parsers and readers are the modules that get what users and other programs wrote. Their tests are the fuzz targets on
the kept corpus and on some thousand drawn inputs, the hostile files, and the tests that mirror them. Needs
``pip install coverage``. The table goes to standard output; exit code 1 where the union is below :data:`LEAST`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Percent of branches over all modules together.
LEAST = 95.0

#: What is read → modules that read it; of modules that do more, the functions that read.
READERS = {
    "the mini-language": ("probes/_grammar", "probes/_where", "probes/_perturb", "probes/_perturb_values",
                          "protocols/_grid:parse_strengths", "protocols/_grid:_check_ends"),
    "settings, designs, YAML": ("_yaml", "protocols/_config", "protocols/_spread_config", "protocols/_panel_config"),
    "prompts and items": ("prompts/_read", "prompts/_prompt", "prompts/_items"),
    "trajectories": ("runs/_trajectory_file", "runs/_trajectory_raw", "runs/_trajectory_checks",
                     "runs/_trajectory_layers", "runs/_trajectory_arrays", "runs/_trajectory_dumps",
                     "runs/_trajectory_table"),
    "directions, array files": ("runs/_array_file", "protocols/_strength:read_direction"),
    "manifests, parts, damage": ("runs/_json", "runs/_manifest", "runs/_tables", "runs/_damage", "runs/_damage_files",
                                 "runs/_damage_manifest"),
    "exports": ("runs/_export_sidecar", "runs/_export_import", "runs/_export_format", "runs/formats/_csv"),
    "model folders, GGUF": ("models/_source", "models/_folder", "models/_gguf"),
    "attractor layers, calibrations": ("controllers/attractor/_stored", "controllers/attractor/_settings",
                                       "probes/_calibration:load_calibration"),
    "the command line": ("cli/_main", "cli/_commands:settings_of"),
}  # fmt: skip
TESTS = (
    "tests/reliability/test_fuzz.py", "tests/reliability/test_hostile.py", "tests/reliability/test_command_line.py",
    "tests/reliability/test_readers.py", "tests/reliability/test_faults.py",
    "tests/probes/test_where.py", "tests/probes/test_perturb.py",
    "tests/probes/test_calibration.py", "tests/test_yaml.py", "tests/prompts", "tests/runs/test_trajectory_file.py",
    "tests/runs/test_array_file.py", "tests/runs/test_export.py", "tests/runs/test_damage.py",
    "tests/runs/test_runs_manifest.py", "tests/runs/test_runs_reader.py", "tests/runs/test_runs_writer.py",
    "tests/runs/test_runs_kill.py", "tests/models/test_gguf.py", "tests/models/test_source.py",
    "tests/models/test_load.py", "tests/controllers/attractor/test_stored.py",
    "tests/controllers/attractor/test_spec.py", "tests/protocols/test_ingest.py",
    "tests/protocols/test_ingest_layers.py", "tests/protocols/test_panel.py", "tests/cli/test_cli_errors.py",
    "tests/cli/test_cli_other.py", "tests/cli/test_cli_run.py", "tests/cli/test_cli_outside.py",
)  # fmt: skip


def measure(tests: list[str]) -> dict[str, dict[str, Any]]:
    """Run the tests under coverage.py; reader → its branches, those that were taken, and those that were not."""
    readers = [name for names in READERS.values() for name in names]
    modules = list(dict.fromkeys(f"dynprobe/{name.partition(':')[0]}.py" for name in readers))
    with tempfile.TemporaryDirectory() as folder:
        data = f"--data-file={folder}/coverage"
        command = [
            sys.executable, "-m", "coverage", "run", data, "--branch", f"--include={','.join(modules)}",
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not long", *tests, *modules,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            raise SystemExit("a test failed; the figures would say nothing")
        report = Path(folder) / "report.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", data, "-o", str(report)], cwd=ROOT, check=True)
        files = json.loads(report.read_text())["files"]
    found = {}
    for name in readers:
        module, _, function = name.partition(":")
        facts = files[f"dynprobe/{module}.py"]
        found[name] = facts["functions"][function] if function else facts
    return found


def main() -> int:
    """Print a line for each kind of reader, and what is missing."""
    found = measure(sys.argv[1:] or list(TESTS))
    taken = total = 0
    missing = []
    print("| readers of | modules | branches | taken | |\n|---|---|---|---|---|")
    for kind, names in READERS.items():
        n = sum(found[m]["summary"]["num_branches"] for m in names)
        of = sum(found[m]["summary"]["covered_branches"] for m in names)
        print(f"| {kind} | {len(names)} | {n} | {of} | {100 * of / n:.1f} % |")
        taken, total = taken + of, total + n
        missing += [(m, found[m]["missing_branches"]) for m in names if found[m]["missing_branches"]]
    share = 100 * taken / total
    print(f"| all | {sum(map(len, READERS.values()))} | {total} | {taken} | {share:.1f} % |")
    for name, branches in missing:
        print(f"{name}: " + ", ".join(f"{a}→{'exit' if b < 0 else b}" for a, b in branches), file=sys.stderr)
    return int(share < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
