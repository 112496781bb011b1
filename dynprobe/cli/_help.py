"""How help is laid out, and which commands there are.

Options stand under headings, the command's own first; the program's own help has the commands by what they are for. It
is plain text at the width of the terminal, the same in a pipe. No command's module is imported before that command is
asked for: building the options of all of them would take longer than everything else that ``dynprobe --help`` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMANDS", "PANELS", "Command", "Group", "Program", "new_app"]

#: Headings of options, in their order, after the command's own and before ``--help``.
MODEL, PROMPTS, WRITE = "Model", "Prompts", "Perturbation"
TEXT, LOOP, MEASURE, STATISTICS = "Generation", "Detector and modes", "Measurement", "Statistics"
WORK, OUTPUT = "How the work is done", "Input and output"
PANELS = (MODEL, PROMPTS, WRITE, TEXT, LOOP, MEASURE, STATISTICS, WORK, OUTPUT)


class Entry(NamedTuple):
    """A command: the module that defines it, the heading it stands under, and what it does in a few words."""

    module: str
    panel: str
    summary: str


_RUN, _STUDY, _LOOK = "One model", "Studies", "Look at runs"
_SHARE, _MODELS, _SELF = "Bring and share", "Models", "Settings and tools"
COMMANDS: dict[str, Entry] = {
    "run": Entry("_run_app", _RUN, "Run prompts clean and perturbed; store what happened."),
    "plan": Entry("_run_app", _RUN, "Say what a run would cost, without running it."),
    "sweep": Entry("_grid_app", _RUN, "Strengths × layers × scales × kinds × seeds."),
    "threshold": Entry("_grid_app", _RUN, "The strength at which a model is destabilised."),
    "iterate": Entry("_iterate_app", _RUN, "A looped model at several numbers of iterations."),
    "recover": Entry("_recover_app", _RUN, "Perturb, close a loop, compare what comes back."),
    "attract": Entry("_attract_app", _RUN, "The attractor layer against all it may be taken for."),
    "dissociate": Entry("_dissociate_app", _RUN, "Do dynamics and meaning come back together?"),
    "eval": Entry("_eval_app", _RUN, "Tasks of lm-evaluation-harness, clean and perturbed."),
    "panel": Entry("_panel_app", _STUDY, "One design over many models."),
    "claims": Entry("_claims_app", _STUDY, "What was claimed; test a sentence; keep the log."),
    "ls": Entry("_look_app", _LOOK, "List the runs in a folder."),
    "show": Entry("_look_app", _LOOK, "Print a run, its columns, or draw it."),
    "report": Entry("_report_app", _LOOK, "One HTML page about a run, or about several."),
    "compare": Entry("_compare_app", _LOOK, "Runs side by side on the prompts they share."),
    "diff": Entry("_diff_app", _LOOK, "Where two runs on the same tokens part."),
    "delay": Entry("_delay_app", _LOOK, "Delay embedding of a column, beside surrogates."),
    "export": Entry("_export_app", _SHARE, "Write a run for others: dataset, arrays, CSV."),
    "import": Entry("_ingest_app", _SHARE, "Make a run of states that others saved."),
    "validate": Entry("_ingest_app", _SHARE, "Check a file of states before importing it."),
    "doctor": Entry("_models_app", _MODELS, "Self-tests of a model; damage of a run."),
    "calibrate": Entry("_models_app", _MODELS, "Measure what a model does when left alone."),
    "fetch": Entry("_models_app", _MODELS, "Bring a known model into the cache."),
    "metrics": Entry("_look_app", _SELF, "Every metric: formula, range, unit, source."),
    "plugins": Entry("_plugins_app", _SELF, "What other packages add, and whether it loads."),
    "init": Entry("_init_app", _SELF, "Write a commented configuration file."),
    "bench": Entry("_bench_app", _SELF, "What everything costs on this machine."),
}

#: ``--max_new_tokens`` and ``--max-new-tokens`` are one flag, as everywhere in the field.
SETTINGS: dict[str, Any] = {
    "token_normalize_func": lambda word: word.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}


class Command(TyperCommand):
    """A command whose options stand under headings, and whose examples keep their lines."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, the command's own options, then those that it shares, by heading."""
        _options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are: a command that was folded could not be copied."""
        _examples(self.epilog, formatter)


class Group(TyperGroup):
    """A command with commands of its own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options and commands."""
        _options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are."""
        _examples(self.epilog, formatter)


class Program(Group):
    """The program: its commands are known by name, and made when they are asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of help."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with its few words, by what it is for."""
        width = max(map(len, COMMANDS))
        for panel in dict.fromkeys(entry.panel for entry in COMMANDS.values()):
            rows = [(name.ljust(width), entry.summary) for name, entry in COMMANDS.items() if entry.panel == panel]
            with formatter.section(panel):
                formatter.write_dl(rows)


class _Commands(MutableMapping[str, Any]):
    """Name → command; a module is imported when one of its commands is looked up."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module = importlib.import_module(f"dynprobe.cli.{COMMANDS[name].module}")
            self._made |= typer.main.get_group(module.app).commands
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]


def new_app(**settings: Any) -> typer.Typer:
    """Return what the commands of a module are registered with."""
    usual: dict[str, Any] = {"cls": Group, "add_completion": False}
    return typer.Typer(
        context_settings=SETTINGS, rich_markup_mode=None, pretty_exceptions_enable=False, **(usual | settings)
    )


def _options(command: Any, context: Any, formatter: Any) -> None:
    arguments: list[Any] = []
    panels: dict[str, list[Any]] = {heading: [] for heading in ("Options", *PANELS)}
    parameters = command.get_params(context)
    for_help = OUTPUT if any(getattr(p, "rich_help_panel", None) == OUTPUT for p in parameters) else "Options"
    for parameter in parameters:
        record = parameter.get_help_record(context)
        if record is None:
            continue
        if parameter.param_type_name == "argument":
            arguments.append(record)
        else:
            own = for_help if parameter.name == "help" else "Options"
            panels[getattr(parameter, "rich_help_panel", None) or own].append(record)
    for heading, records in {"Arguments": arguments, **panels}.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def _examples(epilog: str | None, formatter: Any) -> None:
    if epilog:
        formatter.write("\n" + epilog.strip() + "\n")
