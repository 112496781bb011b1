"""Help: the same option has the same words, every option its unit and default, every command examples that parse."""

import os
import re
import shlex
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import typer

from dynprobe.cli import main
from dynprobe.cli._app import app
from dynprobe.cli._help import COMMANDS, PANELS

#: Options that mean another thing in some commands, and what each means there is in its help.
OWN_WORDS = {
    "--alphas": "the task's ladder (dissociate), the grid (sweep), a grid in place of the search (threshold)",
    "--apply-chat-template": "eval hands it to the harness",
    "--attractor": "the layer of a study (attract), a controlled arm (eval)",
    "--batch-size": "eval takes no auto",
    "--budget": "of the longest item (dissociate), of the new tokens (recover)",
    "--category": "of items (dissociate)",
    "--condition": "what is compared, embedded, exported or searched",
    "--device": "claims test: default the claim's",
    "--dims": "embedding dimensions (delay), axes (import)",
    "--dtype": "claims test: default the claim's",
    "--figure": "what is drawn",
    "--force": "replace a file, fetch again, calibrate again",
    "--layers": "names of blocks (doctor), places (attract), a number (bench), the noise (dissociate)",
    "--limit": "series (delay), items (dissociate), items of each task (eval)",
    "--log": "read (claims), written (claims test), printed (claims log)",
    "--max-new-tokens": "of long texts (attract), of forced and free arms (recover)",
    "--metrics": "show prints the list",
    "--mode": "those that change states (dissociate)",
    "--num-fewshot": "run says where it belongs",
    "--operators": "modes str and dom (dissociate)",
    "--out": "a file, or a folder that is no run",
    "--perturb": "what is recovered from, fixed, or tested",
    "--prompt": "ids of prompts (diff)",
    "--prompts": "those of a calibration",
    "--scale": "one scale (dissociate)",
    "--seed": "of resampling (compare), of surrogates (delay)",
    "--span": "of a series (delay)",
    "--strengths": "raw ε (attract), a number (bench)",
    "--table": "the one embedded (delay), those exported",
    "--track": "the stage that ends a file (import)",
}
NUMBERED = re.compile(
    r"tokens?|texts?|rows?|prompts?|nats|share|seed|quantile|megabytes|number|rounds|layers?|items|series|resamples|"
    r"threads|gpus|strength|level|unit|temperature|spread|ratio|standard deviations|difference|iterations|ε|coverage|"
    r"precision",
    re.IGNORECASE,
)


def commands():
    """Every command with its name, sub-commands of groups included."""
    root = typer.main.get_command(app)

    def walk(name, command):
        yield name, command
        for word, below in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {word}".strip(), below)

    return dict(walk("", root))


ALL = commands()
OPTIONS = [
    (name, max(o.opts, key=len), o)
    for name, command in ALL.items()
    for o in command.params
    if o.param_type_name == "option" and not o.hidden
]


def examples(command):
    """The lines of a command's examples."""
    block = (command.epilog or "").partition("Examples:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in block.splitlines() if line.strip()]


EXAMPLES = [(name, line) for name, command in ALL.items() for line in examples(command)]


def test_an_option_has_the_same_words_in_every_command():
    said = defaultdict(lambda: defaultdict(list))
    for name, flag, option in OPTIONS:
        said["--out" if flag == "--output-path" else flag][option.help].append(name)
    different = {flag: dict(words) for flag, words in said.items() if len(words) > 1}
    assert different.keys() <= OWN_WORDS.keys(), {f: w for f, w in different.items() if f not in OWN_WORDS}
    assert OWN_WORDS.keys() - {"--num-fewshot"} <= different.keys()  # an exception that is none is struck out


@pytest.mark.parametrize("name", ALL)
def test_every_option_says_its_unit_and_default(name):
    for where, flag, option in OPTIONS:
        if where != name or flag in ("--install-completion", "--show-completion"):
            continue
        assert option.help, f"{name} {flag} has no help"
        assert option.help.rstrip().endswith((".", ")", "…")), f"{name} {flag}: {option.help}"
        shown = not (option.default is None or option.default in ("", ()))
        if not option.is_flag and not option.required and not shown:
            assert "efault" in option.help, f"{name} {flag} does not say what holds where it is left out: {option.help}"
        if not option.is_flag and isinstance(option.default, int | float):
            assert NUMBERED.search(option.help), f"{name} {flag} does not say what its number counts: {option.help}"
        assert option.rich_help_panel is None or option.rich_help_panel in PANELS


@pytest.mark.parametrize("name", ALL)
def test_help_ends_with_two_to_four_examples_that_parse(name):
    command = ALL[name]
    lines = examples(command)
    assert 2 <= len(lines) <= 4
    for line in lines:
        words = shlex.split(line)
        assert words[: 1 + len(name.split())] == ["dynprobe", *name.split()]
        parsed = ALL[""]
        words = words[1:]
        while words and hasattr(parsed, "resolve_command") and not words[0].startswith("-"):
            _, parsed, words = parsed.resolve_command(typer.Context(parsed), words)
        if "--help" in words:
            continue
        context = parsed.make_context(name, list(words), token_normalize_func=lambda word: word.replace("_", "-"))
        assert context.params is not None


def test_help_of_the_program_lists_every_command_under_a_heading(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for panel in {entry.panel for entry in COMMANDS.values()}:
        assert f"\n{panel}:\n" in text
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary)}$", text, re.MULTILINE), name
        assert name in typer.main.get_group(__import__(f"dynprobe.cli.{entry.module}", fromlist=["app"]).app).commands
    assert max(map(len, text.splitlines())) <= 80  # no summary is folded or cut


def test_help_keeps_the_lines_of_examples_and_groups_options(capsys):
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    for line in examples(ALL["sweep"]):
        assert f"\n  {line}\n" in text
    headings = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert headings == ["Options", *[p for p in PANELS if p in headings], "Examples"]
    assert "\x1b" not in text


# ---- every example, on the zoo --------------------------------------------------------------------------------------

#: A model that is not on the machine, a name that stands for one's own run, or many minutes of two models.
ELSEWHERE = re.compile(
    r"smollm2|my-model|my-org|my_task|\b[A-Z]+_?RUN\b|\bRUN\b|--push|\.pt\b|panel.yaml$|\*panel\*|kappa.depth_helps"
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the runs and files that examples speak of."""
    import numpy as np

    folder = tmp_path_factory.mktemp("workshop")
    before = Path.cwd()
    os.chdir(folder)
    small = ["--limit", "3", "--max-new-tokens", "4", "--perturb", "alpha=0.1", "--quiet"]
    try:
        for model in ("tiny-llama", "tiny-cem", "tiny-csm"):
            assert main(["run", "--model", model, *small]) == 0
        named = {
            "float32": ["run", "--limit", "2", "--max-new-tokens", "0"],
            "bfloat16": ["run", "--limit", "2", "--max-new-tokens", "0", "--dtype", "bfloat16"],
            "with-states": ["run", "--limit", "2", "--max-new-tokens", "2", "--states"],
            "long-texts": ["run", "--limit", "2", "--max-new-tokens", "150"],
            "sweep-a": ["sweep", "--limit", "3", "--alphas", "0.1,0.5,1,2"],
            "sweep-b": ["sweep", "--limit", "3", "--alphas", "0.1,0.5,1,2", "--model", "tiny-cem"],
        }
        for name, words in named.items():
            assert main([*words, "--quiet", "--out", "made"]) == 0
            (made,) = (folder / "made").iterdir()
            shutil.move(made, folder / "runs" / f"2026-01-01T00-00-00_{name}_{made.name[-8:]}")
        np.savez(folder / "states.npz", states=np.random.default_rng(0).normal(size=(5, 2, 9, 8)).astype("float32"),
                 dims=np.array(["iter", "batch", "pos", "dim"]))  # fmt: skip
        (folder / "calibration.txt").write_text("A text that no run uses.\nAnd a second one, to be sure.\n")
        (folder / "panel.yaml").write_text(
            "models: [tiny-llama, tiny-cem]\nprompts_per_category: 1\nmax_new_tokens: 2\n"
        )
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in ALL if name])
def test_every_example_runs_on_the_zoo(command, workshop, tmp_path, monkeypatch, capsys):
    here = shutil.copytree(workshop, tmp_path / "here")  # what one command leaves is not there for the next
    monkeypatch.chdir(here)
    if command == "import":
        (run,) = Path("runs").glob("*tiny-llama*")
        assert main(["export", str(run), "my-dataset", "--quiet"]) == 0
    lines = [line for name, line in EXAMPLES if name == command and not ELSEWHERE.search(line)]
    assert lines, "no example of this command could be run"
    runs = sorted(Path("runs").iterdir())
    for line in lines:
        words = [
            found
            for word in shlex.split(line)[1:]
            for found in ([str(p) for p in runs if p.match(word)] if "*" in word else [word])
        ]
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.err}"
        assert said.out, line
