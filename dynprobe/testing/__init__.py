"""Small random models for tests, examples and plug-in authors: no network, milliseconds to build.

The suites that authors of plug-ins run on theirs: :func:`check_metric`, :func:`check_scale`, :func:`check_controller`,
:func:`check_adapter`, :func:`check_exporter`, :func:`check_engine`; see ``docs/extending.md``. Also every causal
architecture of transformers in a tiny version, and the trial that what dynprobe says of each of them is right.
"""

from dynprobe.testing._adapter_contract import ADAPTER_CHECKS, check_adapter
from dynprobe.testing._architecture_trial import CHECKS, ArchitectureVerdict, try_architecture
from dynprobe.testing._architectures import causal_types, tiny_causal_lm
from dynprobe.testing._controller_contract import CONTROLLER_CHECKS, check_controller
from dynprobe.testing._engine_contract import ENGINE_CHECKS, check_engine
from dynprobe.testing._exporter_contract import EXPORTER_CHECKS, check_exporter
from dynprobe.testing._metric_contract import METRIC_CHECKS, Vector, check_metric
from dynprobe.testing._resume_trial import ResumeVerdict, try_resume
from dynprobe.testing._scale_contract import SCALE_CHECKS, check_scale
from dynprobe.testing._table import architecture_table, try_architectures
from dynprobe.testing._tiny import byte_tokenizer, save_tiny_model, tiny_gpt2, tiny_llama
from dynprobe.testing._writing_trial import Answer

__all__ = [
    "ADAPTER_CHECKS",
    "CHECKS",
    "CONTROLLER_CHECKS",
    "ENGINE_CHECKS",
    "EXPORTER_CHECKS",
    "METRIC_CHECKS",
    "SCALE_CHECKS",
    "Answer",
    "ArchitectureVerdict",
    "ResumeVerdict",
    "Vector",
    "architecture_table",
    "byte_tokenizer",
    "causal_types",
    "check_adapter",
    "check_controller",
    "check_engine",
    "check_exporter",
    "check_metric",
    "check_scale",
    "save_tiny_model",
    "tiny_causal_lm",
    "tiny_gpt2",
    "tiny_llama",
    "try_architecture",
    "try_architectures",
    "try_resume",
]
