"""Experiments: each protocol turns a typed configuration into a run folder."""

from dynprobe.protocols._calibrate import calibrate
from dynprobe.protocols._config import RunConfig, load_config
from dynprobe.protocols._coupling import CouplingResult, coupling
from dynprobe.protocols._doctor import Diagnosis, doctor
from dynprobe.protocols._energy_lens import EnergyLensResult, energy_lens
from dynprobe.protocols._execute import Progress
from dynprobe.protocols._gate import GateResult, linear_response
from dynprobe.protocols._ingest import ingest
from dynprobe.protocols._iterate import IterateConfig, iterate
from dynprobe.protocols._lyapunov import LyapunovResult, lyapunov
from dynprobe.protocols._plan import Estimate
from dynprobe.protocols._plateau import PlateauResult, plateau
from dynprobe.protocols._run import plan, run
from dynprobe.protocols._sweep import SweepConfig, sweep
from dynprobe.protocols._threshold import threshold
from dynprobe.protocols._threshold_config import ThresholdConfig

__all__ = [
    "CouplingResult",
    "Diagnosis",
    "EnergyLensResult",
    "Estimate",
    "GateResult",
    "IterateConfig",
    "LyapunovResult",
    "PlateauResult",
    "Progress",
    "RunConfig",
    "SweepConfig",
    "ThresholdConfig",
    "calibrate",
    "coupling",
    "doctor",
    "energy_lens",
    "ingest",
    "iterate",
    "linear_response",
    "load_config",
    "lyapunov",
    "plan",
    "plateau",
    "run",
    "sweep",
    "threshold",
]
