"""The table of all architectures: every causal type of transformers in a process of its own, and what came of it."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch

from dynprobe.testing._architecture_trial import CHECKS, VERDICTS, ArchitectureVerdict, everywhere, try_architecture
from dynprobe.testing._architectures import causal_types
from dynprobe.testing._resume_trial import LIMIT

__all__ = ["architecture_table", "try_architectures"]

_SIGNS = {"right": "✓", "fallback": "↩", "refused": "⊘", "left out": "–", "wrong": "✗"}
_MEANINGS = {
    "right": "dynprobe's answer is the truth",
    "fallback": "dynprobe finds by itself that its ordinary road would be wrong and takes another, which is right, or "
    "runs say what is to be known",
    "refused": "dynprobe says that it cannot, and why",
    "left out": "the type cannot be built small, or does not read a text by itself",
    "wrong": "anything else: silently wrong numbers, a crash, no answer",
}
_QUESTIONS = {
    "blocks": "the blocks are found, as many as the configuration says",
    "states": "captured states and logits are, bit for bit, what plain hooks see on a copy without dynprobe, and what "
    "the model returns as its own `hidden_states`; a note says where it returns none, or others than the L + 1 states "
    "with the last of them before or behind the final norm",
    "null": "α = 0, written at every block, changes no bit of any state or logit",
    "alone": "a row of a batch padded left or right gives what it gives alone; the number is the largest deviation, of "
    "logits in their standard deviations, of states relative to their norm",
    "resume": "a forward that begins at a depth, identity and pushed, is a whole forward in which a plain hook puts "
    f"the same states in place, to {LIMIT:g} SD of the logits; ✓: the blocks below do not run, ↩: they do",
    "generation": "greedy texts are those of the model's own `generate(do_sample=False)`, rows alone and padded "
    "together; states captured meanwhile are those of plain hooks, and of one whole forward over the finished text; "
    "the number is the largest deviation of a state from that forward, relative to its norm",
    "push": "α = 0.1 at the default site changes that state by a tenth of its norm, no depth and no position before "
    "it, and gives the logits that plain hooks make of the same states",
}


def _work(kind: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    answer.send(try_architecture(kind))
    answer.close()


def _in_a_process(kind: str, timeout: float) -> ArchitectureVerdict:
    """The verdict on one type; one that crashes or hangs takes its own process down and nothing else."""
    context = multiprocessing.get_context("fork")  # what the libraries import when first used is imported once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, there))
    process.start()
    there.close()
    try:
        if here.poll(timeout):
            return here.recv()
        reason = f"no answer within {timeout:g} s"
    except EOFError:
        process.join()
        reason = f"its process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()
    return everywhere(kind, causal_types().get(kind, ""), "wrong", reason)


def try_architectures(
    kinds: Iterable[str] | None = None,
    *,
    jobs: int = 1,
    timeout: float = 180,
    progress: Callable[[ArchitectureVerdict], None] | None = None,
) -> list[ArchitectureVerdict]:
    """Ask all questions of tiny random models of transformers' causal types, each in a process of its own.

    Args:
        kinds: Model types; None takes all that the installed transformers knows.
        jobs: Processes at a time.
        timeout: Seconds after which a type counts as wrong.
        progress: Called with each verdict as it comes.

    Returns:
        The verdicts, in the order of the types.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    chosen = list(causal_types() if kinds is None else kinds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try_architecture("llama")
    try:
        with ThreadPoolExecutor(jobs) as pool:
            found = []
            for verdict in pool.map(lambda kind: _in_a_process(kind, timeout), chosen):
                found.append(verdict)
                if progress is not None:
                    progress(verdict)
            return found
    finally:
        torch.set_num_threads(threads)


def architecture_table(verdicts: Sequence[ArchitectureVerdict], *, of: int | None = None) -> str:
    """Return the verdicts as a Markdown page.

    Args:
        verdicts: What was found.
        of: Number of causal types of the library, where these are not all of them.

    Example:
        >>> found = ArchitectureVerdict("gpt2", "GPT2LMHeadModel", 4, "transformer.h.*")
        >>> "| gpt2 | 4 × transformer.h.* |" in architecture_table([found])
        True
    """
    import transformers

    notes: dict[str, int] = {}
    rows = [_row(verdict, notes) for verdict in verdicts]
    counts = Counter(verdict.verdict for verdict in verdicts)
    slow = sum(verdict.only_resume for verdict in verdicts)
    some = f"{len(verdicts)} of {of} causal language models" if of else "Every causal language model"
    lines = [
        "# Architecture by architecture",
        "",
        f"{some} of transformers {transformers.__version__}, as a tiny random model (torch {torch.__version__}, CPU, "
        "float32, every parameter random).",
        "Three rows of different lengths; what dynprobe says is held against a copy of the model that it never saw.",
        "Written by `python benchmarks/architectures.py`; tests: `tests/probes/test_architectures.py`, all types in "
        "`make test-long`.",
        "",
        f"**{counts['right'] + slow} of {len(verdicts)} types are right in every check ({slow} of them resume through "
        f"all blocks); {counts['fallback'] - slow} with another fallback, {counts['refused']} refused, "
        f"{counts['left out']} left out, {counts['wrong']} wrong.**",
        "",
        "Where padded rows differ, it is by padding on the left, which writing needs and reading does not: "
        "`dp.capture` pads on the right unless it is told otherwise, and runs put rows of one length together there.",
        "",
        "| | worst answer of a type | types | meaning |",
        "|---|---|---|---|",
        *(f"| {_SIGNS[v]} | {v} | {counts[v]} | {_MEANINGS[v]} |" for v in VERDICTS),
        "",
        "| check | " + " | ".join(_SIGNS[v] for v in VERDICTS) + " | what is asked |",
        "|---|" + "---|" * len(VERDICTS) + "---|",
        *(_sums(name, verdicts) for name in CHECKS),
        "",
        "| type | blocks found | " + " | ".join(CHECKS) + " |",
        "|---|---|" + "---|" * len(CHECKS),
        *rows,
    ]
    listed = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([*lines, "", *listed] if listed else lines) + "\n"


def _sums(name: str, verdicts: Sequence[ArchitectureVerdict]) -> str:
    counts = Counter(verdict.answers[name].verdict for verdict in verdicts if name in verdict.answers)
    return f"| {name} | " + " | ".join(str(counts[v]) for v in VERDICTS) + f" | {_QUESTIONS[name]} |"


def _row(verdict: ArchitectureVerdict, notes: dict[str, int]) -> str:
    """One line of the table; reasons become numbered notes, the same one once."""
    cells, said = [], set()
    for name in CHECKS:
        answer = verdict.answers.get(name)
        if answer is None:
            cells.append("")
            continue
        cell = _SIGNS[answer.verdict]
        if name in ("alone", "generation") and not math.isnan(answer.value):
            cell += f" {answer.value:.0e}" if answer.value else " 0"
        if answer.reason and answer.reason not in said:
            said.add(answer.reason)
            cell += f" <sup>{notes.setdefault(answer.reason, len(notes) + 1)}</sup>"
        cells.append(cell)
    blocks = f"{verdict.layers} × {verdict.blocks}" if verdict.layers else ""
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in (verdict.model_type, blocks, *cells))
