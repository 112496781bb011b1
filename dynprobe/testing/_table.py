"""The table of all architectures: every causal type of transformers in a process of its own, and what came of it."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch

from dynprobe.testing._architectures import causal_types
from dynprobe.testing._resume_trial import LIMIT, ResumeVerdict, try_resume

__all__ = ["resume_table", "try_architectures"]

_MEANING = {
    "fast": "the blocks below the depth do not run, and the logits are those of the whole forward",
    "fallback": "dynprobe tries its fast road, sees that it would be wrong, and lets all blocks run; the logits are "
    "those of the whole forward",
    "refused": "dynprobe finds no chain of blocks, or no state of one vector per token, and says so",
    "left out": "the type cannot be built small, or does not read a text by itself",
    "wrong": "anything else",
}


def _work(kind: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    answer.send(try_resume(kind))
    answer.close()


def _in_a_process(kind: str, timeout: float) -> ResumeVerdict:
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
    return ResumeVerdict(kind, causal_types().get(kind, ""), "wrong", reason=reason)


def try_architectures(
    kinds: Iterable[str] | None = None,
    *,
    jobs: int = 1,
    timeout: float = 120,
    progress: Callable[[ResumeVerdict], None] | None = None,
) -> list[ResumeVerdict]:
    """Try ``dp.resume`` on tiny random models of transformers' causal types, each in a process of its own.

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
    try_resume("llama")
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


def resume_table(verdicts: Sequence[ResumeVerdict]) -> str:
    """Return the verdicts as a Markdown page.

    Example:
        >>> verdict = ResumeVerdict("gpt2", "GPT2LMHeadModel", "fast", 4, "transformer.h.*", 0.0)
        >>> print(resume_table([verdict]).splitlines()[-1])
        | gpt2 | GPT2LMHeadModel | fast | 4 × transformer.h.* | 0 | |
    """
    import transformers

    counts = Counter(v.verdict for v in verdicts)
    lines = [
        "# Resuming from a layer, architecture by architecture",
        "",
        f"Every causal language model of transformers {transformers.__version__}, as a tiny random model (torch "
        f"{torch.__version__}, CPU, float32).",
        "Three rows of different lengths, padded left and right; resumed at every depth from the recorded states and "
        "from states pushed by noise,",
        "against a whole forward in which a plain hook puts the same states in place. The number is the largest "
        f"deviation of any logit, in standard deviations of the logits; more than {LIMIT:g} is wrong.",
        "Written by `python benchmarks/architectures.py`.",
        "",
        "| verdict | types | meaning |",
        "|---|---|---|",
        *(f"| {name} | {counts.get(name, 0)} | {meaning} |" for name, meaning in _MEANING.items()),
        "",
        "| type | class | verdict | blocks | deviation | remark |",
        "|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        worst = "" if math.isnan(v.worst) else f"{v.worst:.1g}"
        blocks = f"{v.layers} × {v.blocks}" if v.layers else ""
        cells = (v.model_type, v.model_class, v.verdict, blocks, worst, v.reason.replace("|", "\\|"))
        lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines) + "\n"
