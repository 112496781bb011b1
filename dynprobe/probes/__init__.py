"""Subjects, sites, hooks, perturbations, calibration: everything that touches a model."""

from dynprobe.probes._calibration import Calibration, load_calibration
from dynprobe.probes._capture import Recording, as_subject, capture, perturb, record
from dynprobe.probes._discover import discover
from dynprobe.probes._dispatch import live_hooks
from dynprobe.probes._fork import Fork, Roads, lowest_block
from dynprobe.probes._generate import Sampling, generate, ignored_defaults
from dynprobe.probes._inputs import Batch, make_batch, tokenize
from dynprobe.probes._instrument import Instrument
from dynprobe.probes._load import load
from dynprobe.probes._outputs import identical
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._reading import sites_to_read
from dynprobe.probes._resume import logits_of, readout, resume
from dynprobe.probes._roles import Site, Steerer, Writer
from dynprobe.probes._rows import RowsWriter
from dynprobe.probes._scales import NoiseScale, ScaleStats
from dynprobe.probes._selftest import (
    SELF_TESTS,
    Check,
    check_alone,
    check_fired,
    check_null,
    check_readout,
    check_resume,
)
from dynprobe.probes._subject import Subject
from dynprobe.probes._tape import States, Tape
from dynprobe.probes._trained import warn_beyond
from dynprobe.probes._turns import Loop, Start, Turn
from dynprobe.probes._where import Where
from dynprobe.probes._writers import CallableWriter, PerturbWriter, make_writers

__all__ = [
    "SELF_TESTS",
    "Batch",
    "Calibration",
    "CallableWriter",
    "Check",
    "Fork",
    "Instrument",
    "Loop",
    "NoiseScale",
    "Perturb",
    "PerturbWriter",
    "Recording",
    "Roads",
    "RowsWriter",
    "Sampling",
    "ScaleStats",
    "Site",
    "Start",
    "States",
    "Steerer",
    "Subject",
    "Tape",
    "Turn",
    "Where",
    "Writer",
    "as_subject",
    "capture",
    "check_alone",
    "check_fired",
    "check_null",
    "check_readout",
    "check_resume",
    "discover",
    "generate",
    "identical",
    "ignored_defaults",
    "live_hooks",
    "load",
    "load_calibration",
    "logits_of",
    "lowest_block",
    "make_batch",
    "make_writers",
    "perturb",
    "readout",
    "record",
    "resume",
    "sites_to_read",
    "tokenize",
    "warn_beyond",
]
