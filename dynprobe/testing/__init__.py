"""Small random models for tests, examples and plug-in authors: no network, milliseconds to build.

:func:`check_controller` tries whether a controller keeps the contract of :mod:`dynprobe.controllers`. Also every causal
architecture of transformers in a tiny version, and the trial that resuming is right on each of them.
"""

from dynprobe.testing._architectures import causal_types, tiny_causal_lm
from dynprobe.testing._controller_contract import CONTROLLER_CHECKS, check_controller
from dynprobe.testing._resume_trial import ResumeVerdict, try_resume
from dynprobe.testing._table import resume_table, try_architectures
from dynprobe.testing._tiny import byte_tokenizer, save_tiny_model, tiny_gpt2, tiny_llama

__all__ = [
    "CONTROLLER_CHECKS",
    "ResumeVerdict",
    "byte_tokenizer",
    "causal_types",
    "check_controller",
    "resume_table",
    "save_tiny_model",
    "tiny_causal_lm",
    "tiny_gpt2",
    "tiny_llama",
    "try_architectures",
    "try_resume",
]
