"""lm-evaluation-harness, held at arm's length: loaded when asked for, quiet, and without traces.

The harness seeds every generator of the process, prints progress of its own, logs much, and would ask the hub about the
model. Here it does none of that: seeds are set as it sets them and put back, and its log is shown where
``LMEVAL_LOG_LEVEL`` asks for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dynprobe.errors import DynprobeError, ModelError, OfflineError, UsageError

__all__ = ["Harness", "quiet", "require", "seeded"]


def require() -> str:
    """Return the version of the harness.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "task evaluation needs lm-evaluation-harness, which is not installed; type: pip install 'dynprobe[eval]' "
            "(or pip install lm-eval)"
        )
    from importlib.metadata import version

    return version("lm_eval")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness and its data sets from printing, unless ``LMEVAL_LOG_LEVEL`` is set."""
    if os.environ.get("LMEVAL_LOG_LEVEL"):
        yield
        return
    import datasets
    import lm_eval.api.task as task_room

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars, progress = datasets.are_progress_bars_disabled(), task_room.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        task_room.tqdm = partial(progress, disable=True)
        yield
    finally:
        task_room.tqdm = progress
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the generators of the process as the harness does, and put them back afterwards."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if device is not None:
            torch.cuda.set_rng_state_all(device)


@dataclass(frozen=True)
class Harness:
    """Tasks of the harness with the settings of one evaluation.

    Attributes:
        manager: Knows the tasks.
        names: Tasks, groups and tags.
        offline: Whether data come from the cache alone.
        num_fewshot: Examples before each item; None leaves it to the task.
        fewshot_seed: Which examples.
        limit: First items of each task; None takes all.
        chat_template: Whether prompts are wrapped by the tokenizer's chat template.
        system_instruction: System turn, or text before the prompt.
        gen_kwargs: Settings of generation that replace the task's.
    """

    manager: Any
    names: Sequence[str]
    offline: bool = False
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    limit: int | None = None
    chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None

    def load(self) -> Any:
        """Return fresh tasks, as ``simple_evaluate`` of the harness prepares them.

        Raises:
            OfflineError: Data could not be fetched.
            UsageError: A task cannot be loaded, for example since its file is wrong.
        """
        with _offline(self.offline):
            try:
                found = self.manager.load(list(self.names))
            except DynprobeError:
                raise
            except Exception as error:  # whatever the code of a task, of datasets or of the hub's client may raise
                raise self._unloaded(error) from error
        for task in found["tasks"].values():
            if self.gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(self.gen_kwargs), update=True)
            own = task.get_config("num_fewshot")
            if self.num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif self.num_fewshot is None and own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.fewshot_seed)
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = "runs code that a model wrote" if getattr(task, "UNSAFE_CODE", False) else "is no text task"
                raise UsageError(f"the task {task.config.task!r} {what}; dynprobe eval does not take it")
        if not found["tasks"]:
            raise UsageError(f"{', '.join(self.names)}: no task stands behind it")
        return found

    def _unloaded(self, error: Exception) -> DynprobeError:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        names = ", ".join(self.names)
        if isinstance(error, ConnectionError) or self.offline:
            return OfflineError(
                f"the data of {names} could not be fetched ({said}); take dynprobe_cloze, which is built in, or a task "
                "of your own with --include-path FOLDER"
            )
        return UsageError(
            f"the tasks {names} could not be loaded ({said}); look at the task's .yaml file (paths in data_files are "
            "relative to the folder the command is typed in)"
        )

    def build(self, tasks: Mapping[str, Any], lm: Any) -> None:
        """Make the requests of all tasks, as ``evaluate`` of the harness does."""
        for name, task in tasks.items():
            try:
                task.build_all_requests(
                    limit=self.limit, rank=0, world_size=1, system_instruction=self.system_instruction,
                    apply_chat_template=self.chat_template, fewshot_as_multiturn=self.chat_template,
                    chat_template=lm.apply_chat_template if self.chat_template else None,
                    tokenizer_name=lm.tokenizer_name if self.chat_template else "",
                )  # fmt: skip
            except DynprobeError:
                raise
            except Exception as error:  # templates and functions of the task
                raise UsageError(
                    f"the items of {name} could not be made ({type(error).__name__}: {error}); look at the task's "
                    ".yaml file, and at --num-fewshot"
                ) from error

    def score(self, lm: Any) -> Mapping[str, Any]:
        """Return what the harness's ``evaluate`` returns, with one record for each document and filter."""
        from lm_eval.evaluator import evaluate

        with seeded():
            # Fresh tasks each time: the few-shot examples of a second pass would be other ones.
            found = evaluate(
                lm=lm, task_dict=self.load(), limit=self.limit, bootstrap_iters=0, log_samples=True,
                system_instruction=self.system_instruction, apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.chat_template,
            )  # fmt: skip
        if found is None:
            raise ModelError("lm-evaluation-harness returned no result; is this process one of several (LOCAL_RANK)?")
        return found


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let ``datasets`` read from its cache alone; without this it retries for half a minute."""
    if not wanted:
        yield
        return
    import datasets
    from huggingface_hub import constants

    kept = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = kept
