"""Small random models for tests, examples and plug-in authors: no network, milliseconds to build.

:func:`check_controller` tries whether a controller keeps the contract of :mod:`dynprobe.controllers`. Also every causal
architecture of transformers in a tiny version, and the trial that what dynprobe says of each of them is right.
"""

from dynprobe.testing._architecture_trial import CHECKS, ArchitectureVerdict, try_architecture
from dynprobe.testing._architectures import causal_types, tiny_causal_lm
from dynprobe.testing._controller_contract import CONTROLLER_CHECKS, check_controller
from dynprobe.testing._metric_contract import METRIC_CHECKS, Vector, check_metric
from dynprobe.testing._resume_trial import ResumeVerdict, try_resume
from dynprobe.testing._table import architecture_table, try_architectures
from dynprobe.testing._tiny import byte_tokenizer, save_tiny_model, tiny_gpt2, tiny_llama
from dynprobe.testing._writing_trial import Answer

__all__ = [
    "CHECKS",
    "CONTROLLER_CHECKS",
    "METRIC_CHECKS",
    "Answer",
    "ArchitectureVerdict",
    "ResumeVerdict",
    "Vector",
    "architecture_table",
    "byte_tokenizer",
    "causal_types",
    "check_controller",
    "check_metric",
    "save_tiny_model",
    "tiny_causal_lm",
    "tiny_gpt2",
    "tiny_llama",
    "try_architecture",
    "try_architectures",
    "try_resume",
]
