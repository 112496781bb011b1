"""What each column of a run means: exact metric id, unit, span, aggregation. Stored beside every column."""

from __future__ import annotations

from collections.abc import Sequence

from dynprobe import metrics
from dynprobe.metrics._registry import loaded
from dynprobe.protocols._config import RunConfig
from dynprobe.runs import registry_facts

__all__ = ["PASSPORT", "WRITTEN", "column_facts"]

_AFFECTED = "real positions ≥ max(1, first perturbed position)"

#: Columns of the samples that are no metrics of the registry, or that aggregate one in their own way:
#: (metric id, unit, span, aggregation, description).
_OWN: dict[str, tuple[str, str, str, str, str]] = {
    "nll": ("output.nll/1", "nats", "span", "mean over tokens with a target", "NLL of the tokens of the span."),
    "ppl": ("output.nll/1", "1", "span", "exp of mean nll", "Perplexity over the span."),
    "nll_prompt": ("output.nll/1", "nats", "prompt", "mean over tokens", "NLL of the prompt's own tokens."),
    "flip_rate": ("output.flip/1", "fraction", _AFFECTED, "mean over tokens", "Share of tokens whose top-1 changed."),
    "repetition": (
        "",
        "fraction",
        "new",
        "over 4-grams",
        "Share of 4-grams that occurred before in the generated text.",
    ),
    "n_fed": ("", "tokens", "all", "count", "Tokens that went through the model."),
    "n_nonfinite": ("", "states", "all", "count", "States with a NaN or infinite component; excluded, never averaged."),
    "alpha_relnorm": (
        "alpha.relnorm/1",
        "‖u‖/‖h‖",
        "written",
        "mean over written states of all perturbations",
        "Realised relative norm.",
    ),
    "alpha_coordstd": ("alpha.coordstd/1", "calibration SD", "written", "mean of RMS(u/s)", "Size in coordinate SDs."),
    "alpha_mad": (
        "alpha.mad/1",
        "1.4826·MAD",
        "written",
        "mean over written states of all perturbations",
        "Size in robust coordinate scales.",
    ),
    "alpha_abs": ("alpha.abs/1", "model units", "written", "mean of ‖u‖/√d", "RMS of the written displacement."),
    "alpha_cos": ("", "cosine", "written", "mean cos(h, h+u)", "Direction kept by the write."),
    "n_asked": ("", "states", "written", "count", "States the perturbation was asked to change, over all its writes."),
    "n_left_alone": (
        "",
        "states",
        "written",
        "count",
        "Of those, states without a unit or not finite, left as they were.",
    ),
    "kappa_phase_d_inj": ("kappa.phase.paired/1", "half-turns", "all", "step into the injection", "Δκ of that step."),
    "kappa_phase_d_down": ("kappa.phase.paired/1", "half-turns", "all", "mean over later steps", "Δκ downstream."),
    "diverge_angle": ("diverge.angle/1", "half-turns", _AFFECTED, "last depth, mean over tokens", "Angle to clean."),
    "response_rel": ("response.rel/1", "‖h′−h‖/‖h‖", _AFFECTED, "last depth, mean over tokens", "Distance to clean."),
    "nll_bare": ("output.nll/1", "nats", "new", "mean over tokens", "NLL of the own text under the bare model."),
    "kl_clean_pert": ("output.kl/1", "nats", _AFFECTED, "mean over tokens", "KL(clean ‖ arm) under teacher forcing."),
}
_FLOOR = ("criterion", "Noise floor: largest response of a sham row and, for kl, of a write of α = 1e-6.")
_WRITTEN_SIZE = "size of the write at alpha50, from the median size written per unit of α nearby; no threshold there"
#: Columns of a threshold run's trials and fits: table → column → (unit, description).
_GRID: dict[str, dict[str, tuple[str, str]]] = {
    "trials": {
        "condition_id": ("", "Write, layer and seed; the strength stands in alpha."),
        "alpha": ("scale", "Strength that was tried, in units of the row's scale; 0 in a sham row."),
        "kind": ("", "Kind of the write: gaussian, direction, scale, rotate or dropout."),
        "pos": ("tokens", "The one position that is written; −1 where all that the run names are written together."),
        "seed": ("seed", "Seed of the noise of this row."),
        "floor": _FLOOR,
        "response": ("criterion", "Response of this row under the criterion, in the criterion's unit."),
        "kl_clean_pert": ("nats", "KL(clean ‖ perturbed), mean over the affected tokens, teacher-forced."),
        "flip_rate": ("fraction", "Share of the affected tokens whose top-1 changed."),
        "remark": ("", "Why the search could not make sure of this row's bracket; empty where it could."),
    },
    "fits": {
        "kind": ("", "Kind of the write: gaussian, direction, scale, rotate or dropout."),
        "prompt_id": ("", "Prompt of this threshold, where each position has its own."),
        "pos": ("tokens", "Position that is written, where each position has a threshold of its own."),
        "floor": _FLOOR,
        "headline": ("", "True for the estimate that is quoted, false for those beside it."),
        "status": ("", "resolved, left-censored (below range), right-censored (above it), not-resolved or missing."),
        "reason": ("", "Why there is no value or no interval, or a remark beside it."),
        "n": ("prompts", "Prompts that took part."),
        "n_left": ("prompts", "Prompts whose threshold lies below the tested range."),
        "n_right": ("prompts", "Prompts whose threshold lies above the tested range."),
        "n_nonmonotone": ("prompts", "Prompts whose response falls somewhere as the strength rises."),
        "n_recrossing": ("prompts", "Prompts whose response passes the level more than once."),
        "n_missing": ("prompts", "Prompts left out: nothing finite was measured, or the level lies in the noise."),
        "n_uncertain": ("rows", "Prompts and seeds whose bracket the search could not make sure of (see remark)."),
        "spread": ("ln α", "Standard deviation over prompts of the logarithm of their thresholds."),
        "method": ("", "How low and high were found: order statistics, a bootstrap, a bracket, a posterior."),
        "boot_low": ("scale", "Lower end of the bootstrap interval over prompts."),
        "boot_high": ("scale", "Upper end of the bootstrap interval over prompts."),
        "confidence": ("probability", "Nominal coverage of the interval."),
        "n_boot": ("resamples", "Bootstrap resamples; 0 where none were drawn."),
        "slope": ("1", "β of the logistic curve in β·ln(α/alpha50); of the posterior its median."),
        "width": ("ln α", "ln α95 − ln α5 of the logistic curve."),
        "gamma": ("probability", "Base rate: share that reach the level where nothing is written."),
        "lapse": ("probability", "Share that do not reach the level however strong the write."),
        "deviance": ("1", "Deviance of the logistic curve."),
        "nonlinear": ("", "Whether a broken stick predicts held-out prompts better than a power law."),
        "error_stick": ("", "Mean squared error of the broken stick on prompts left out of its fit."),
        "error_power": ("", "Mean squared error of the power law on prompts left out of its fit."),
        "exponent": ("1", "Exponent of the power law through the responses."),
        "monotone_p": ("probability", "Bootstrap p of a response that never falls; small means that it does."),
        "written_relnorm": ("‖u‖/‖h‖", f"Relative norm: {_WRITTEN_SIZE}."),
        "written_coordstd": ("calibration SD", f"Coordinate SDs: {_WRITTEN_SIZE}."),
        "written_mad": ("1.4826·MAD", f"Robust coordinate scales: {_WRITTEN_SIZE}."),
        "written_abs": ("model units", f"RMS of the displacement: {_WRITTEN_SIZE}."),
    },
}  # fmt: skip
_NEW = "new tokens that are fed"
#: Columns of a recovery study's samples: (unit, span, aggregation, description).
_LOOP: dict[str, tuple[str, str, str, str]] = {
    "duty": ("fraction", _NEW, "share", "Tokens at which a controller was active, wrote, or wrote anew."),
    "n_active": ("tokens", _NEW, "count", "Tokens at which a controller was active, wrote, or wrote anew."),
    "energy_written": ("‖u‖²/‖h‖²", _NEW, "sum", "Energy E = Σ ‖u‖²/‖h‖² of all that controllers wrote."),
    "n_watched": ("tokens", _NEW, "count", "Tokens that the detector saw after the prompt."),
    "signal_score": ("signal", _NEW, "largest level of m tokens in a row", "The detector fires exactly if this exceeds "
                     "its upper level."),
    "signal_mean": ("signal", _NEW, "mean", "Mean of the signal that the detector watches."),
    "n_fires": ("fires", _NEW, "count", "Times that the detector came on."),
    "detector_duty": ("fraction", _NEW, "share", "Tokens at which the detector was on, whatever acted."),
    "acted_after": ("tokens", _NEW, "first", "New tokens before the first action; missing where none was taken."),
    "recovered_after": ("tokens", _NEW, "first", "Tokens from the first action until the signal is below the lower "
                        "level, less those the signal looks back on; missing where it never is."),
    "n_restarts": ("restarts", _NEW, "count", "Times that tokens were taken back."),
    "n_taken_back": ("tokens", _NEW, "count", "Tokens that were taken back."),
}  # fmt: skip
#: Columns of a recovery study's fits.
_FRACTIONS = {
    "mode": ("", "Recovery mode; random:<mode> is the same energy in random directions."),
    "timing": ("", "When it acts: by the detector, always, where the noise is (oracle), or replay of another arm."),
    "decode_mode": ("", "forced: on a given text; free: on the text it writes."),
    "metric": ("", "Column of the samples that the fraction is of."),
    "rf": ("1", "Recovery fraction (Σ perturbed − Σ recovered)/(Σ perturbed − Σ clean): 1 full, 0 none, below 0 harm."),
    "low": (
        "1",
        "Lower end of the 95 % interval, expanded percentile bootstrap over prompts; −inf where some replicates have "
        "no effect.",
    ),
    "high": (
        "1",
        "Upper end of the 95 % interval, expanded percentile bootstrap over prompts; +inf where some replicates have "
        "no effect.",
    ),
    "reason": ("", "Why there is no fraction: no-effect, DETECTOR_BLIND, coverage or empty."),
    "clean": ("metric", "Mean of the metric over the clean texts."),
    "perturbed": ("metric", "Mean over the perturbed texts."),
    "recovered": ("metric", "Mean over the perturbed texts with the mode."),
    "acted_on": ("", "Whether the controller acts on this metric, so that it recovers by construction."),
    "n": ("prompts", "Prompts that took part."),
    "delta_min": ("metric", "Smallest effect of the perturbation that counts as one."),
}
#: Columns of a recovery study's actions that mean another thing elsewhere.
_ACTIONS = {
    "energy": ("‖u‖²/‖h‖²", "Relative energy of the write u at the state h; 0 where nothing was written."),
    "controller": ("", "Which controller of the mode; empty where none acts and the detector only looks on."),
}
#: Columns of the samples that say how much was written, in every unit.
PASSPORT = ("alpha_relnorm", "alpha_coordstd", "alpha_mad", "alpha_abs", "alpha_cos")
#: Columns of the samples that count written states.
WRITTEN = ("n_asked", "n_left_alone")


def _with_parameters(measured: Sequence[str]) -> dict[str, metrics.Column]:
    """The columns of metrics that a run computes with other parameters than their defaults."""
    out = {}
    for full in (i for i in measured if metrics.parse_id(i).params):
        spec, name = metrics.spec(metrics.parse_id(full).id), metrics.column_name(full)
        out[name] = metrics.Column(name, full, spec.unit, spec.levels, spec.digest)
    return out


def column_facts(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return the facts of every metric column a run may write; ``table.column`` where tables differ."""
    span: str = config.measured_span
    columns = metrics.columns() | _with_parameters(config.measured_metrics)
    facts = registry_facts(columns)
    for name, column in columns.items():
        definition = metrics.spec(column.metric_id)
        runs_over = span if definition.span else "all"
        if column.metric_id.startswith("lockin."):
            runs_over = "whole periods of the drive"
        facts[name] |= {"span": runs_over, "description": definition.sentence}
        facts[f"{name}_d"] = {
            **facts[name], "aggregation": "arm − clean, same tokens",
            "description": f"Paired difference of {name} under teacher forcing.",
        }  # fmt: skip
        for table in ("tokens", "depths"):  # one row per token: nothing is aggregated over a span
            facts[f"{table}.{name}"] = {**facts.get(f"{table}.{name}", {}), "span": "all"}
    for name, (metric_id, unit, runs_over, how, text) in _OWN.items():
        digest = metrics.spec(metric_id).digest if metric_id in loaded() else ""
        facts[f"samples.{name}"] = {
            "id": metric_id, "unit": unit, "digest": digest, "span": span if runs_over == "span" else runs_over,
            "aggregation": how, "description": text,
        }  # fmt: skip
    for name, (unit, runs_over, how, text) in _LOOP.items():
        facts[f"samples.{name}"] = {"unit": unit, "span": runs_over, "aggregation": how, "description": text}
    for name, (unit, text) in _ACTIONS.items():
        facts[f"actions.{name}"] = {"unit": unit, "description": text}
    of_loop = hasattr(config, "timings")
    for table, described in ({"fits": _FRACTIONS} if of_loop else _GRID).items():
        for name, (unit, text) in described.items():
            facts[f"{table}.{name}"] = {**facts.get(f"{table}.{name}", {}), "unit": unit, "description": text}
    # A trial is a sample that is measured in few words.
    for name in () if of_loop else (*PASSPORT, "kl_clean_pert", "flip_rate"):
        facts[f"trials.{name}"] = {**facts[f"samples.{name}"], **facts.get(f"trials.{name}", {})}
    facts["kappa_phase_d"] |= {"id": "kappa.phase.paired/1", "digest": metrics.spec("kappa.phase.paired/1").digest}
    return facts
