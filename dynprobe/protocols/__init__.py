"""Experiments: each protocol turns a typed configuration into a run folder."""

from dynprobe.protocols._calibrate import calibrate
from dynprobe.protocols._config import RunConfig, load_config
from dynprobe.protocols._doctor import Diagnosis, doctor
from dynprobe.protocols._plan import Estimate
from dynprobe.protocols._run import Progress, plan, run

__all__ = ["Diagnosis", "Estimate", "Progress", "RunConfig", "calibrate", "doctor", "load_config", "plan", "run"]
