"""Experiments: each protocol turns a typed configuration into a run folder."""

from dynprobe.protocols._attract import attract
from dynprobe.protocols._attract_config import AttractConfig
from dynprobe.protocols._attract_gain import LoopGain, loop_gain
from dynprobe.protocols._bench import Bench, bench
from dynprobe.protocols._calibrate import calibrate
from dynprobe.protocols._config import RunConfig, load_config
from dynprobe.protocols._coupling import CouplingResult, coupling
from dynprobe.protocols._delay import DelayDiagnostics, delay_diagnostics
from dynprobe.protocols._dissociate import dissociate
from dynprobe.protocols._dissociate_config import DissociateConfig
from dynprobe.protocols._doctor import Diagnosis, doctor
from dynprobe.protocols._energy_lens import EnergyLensResult, energy_lens
from dynprobe.protocols._evaluate import evaluate
from dynprobe.protocols._evaluate_config import EvaluateConfig
from dynprobe.protocols._execute import Progress
from dynprobe.protocols._gate import GateResult, linear_response
from dynprobe.protocols._ingest import ingest
from dynprobe.protocols._iterate import IterateConfig, iterate
from dynprobe.protocols._lyapunov import LyapunovResult, lyapunov
from dynprobe.protocols._panel import panel, plan_panel
from dynprobe.protocols._panel_config import PanelConfig, read_panel
from dynprobe.protocols._plan import Estimate
from dynprobe.protocols._plateau import PlateauResult, plateau
from dynprobe.protocols._recover import recover
from dynprobe.protocols._recover_config import RecoverConfig
from dynprobe.protocols._run import plan, run
from dynprobe.protocols._sweep import SweepConfig, sweep
from dynprobe.protocols._threshold import threshold
from dynprobe.protocols._threshold_config import ThresholdConfig
from dynprobe.protocols._watch import Moment, watch

__all__ = [
    "AttractConfig",
    "Bench",
    "CouplingResult",
    "DelayDiagnostics",
    "Diagnosis",
    "DissociateConfig",
    "EnergyLensResult",
    "Estimate",
    "EvaluateConfig",
    "GateResult",
    "IterateConfig",
    "LoopGain",
    "LyapunovResult",
    "Moment",
    "PanelConfig",
    "PlateauResult",
    "Progress",
    "RecoverConfig",
    "RunConfig",
    "SweepConfig",
    "ThresholdConfig",
    "attract",
    "bench",
    "calibrate",
    "coupling",
    "delay_diagnostics",
    "dissociate",
    "doctor",
    "energy_lens",
    "evaluate",
    "ingest",
    "iterate",
    "linear_response",
    "load_config",
    "loop_gain",
    "lyapunov",
    "panel",
    "plan",
    "plan_panel",
    "plateau",
    "read_panel",
    "recover",
    "run",
    "sweep",
    "threshold",
    "watch",
]
