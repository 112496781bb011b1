"""What the seed texts claim, as data; tests that can refute each sentence; and a log that cannot be tidied up.

- :func:`load` returns the claims, one per empirical sentence, as :class:`Claim`; :func:`find` one of them,
  :func:`texts` where they come from, :func:`read_claims` another file of them.
- :func:`test` tests one on models (or on runs that are there) and returns a :class:`Verdict`: ``survived``,
  ``falsified`` or ``inconclusive``; :func:`analyse_runs` is its last step alone, :func:`judge` the rule.
- :class:`ClaimLog` is the falsification log, :func:`history` what was logged before it existed.

A verdict is about the models, prompts and definitions that were tested, which the record names. That a claim survives
here does not make it true, and that it is falsified on a tenth of a megabyte of weights says nothing of a billion.
"""

from __future__ import annotations

from dynprobe.claims._claim import Claim, Panel, Place, Role, Source
from dynprobe.claims._examine import analyse_runs, plan_of
from dynprobe.claims._examine import examine as test
from dynprobe.claims._load import CLAIMS_FILE, find, load, read_claims, texts
from dynprobe.claims._log import PILOT_FILE, ClaimLog, LogError, Problem, history, plan_hash
from dynprobe.claims._parts import STATISTICS, Part, Prediction
from dynprobe.claims._verdict import Estimate, Finding, Verdict, judge

__all__ = [
    "CLAIMS_FILE",
    "PILOT_FILE",
    "STATISTICS",
    "Claim",
    "ClaimLog",
    "Estimate",
    "Finding",
    "LogError",
    "Panel",
    "Part",
    "Place",
    "Prediction",
    "Problem",
    "Role",
    "Source",
    "Verdict",
    "analyse_runs",
    "find",
    "history",
    "judge",
    "load",
    "plan_hash",
    "plan_of",
    "read_claims",
    "test",
    "texts",
]
