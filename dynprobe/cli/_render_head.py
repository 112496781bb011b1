"""The first lines of a printed run: model, unit, site and prompts, whatever the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynprobe.runs._protocol import counted, layers_of, protocol_of

if TYPE_CHECKING:
    from dynprobe.runs import Run

__all__ = ["CRITERION_UNITS", "head", "mean_intervals"]

#: What α means in runs that do not say it themselves; a test keeps it equal to what the scales say.
_UNITS = {
    "relnorm": "α is the size of the write as a share of each state's norm (‖u‖/‖h‖ = α)",
    "coordstd": "α is in standard deviations of each coordinate over the calibration prompts",
    "mad": "α is in robust deviations (1.4826·MAD) of each state's own coordinates",
    "cov": "α scales noise with the calibration covariance of the site",
    "abs": "α is the standard deviation of the noise in the model's own units",
    "interp": "α is the share of the way to the state of the next prompt",
    "neftune": "α is NEFTune's: α/√(L·d) times uniform noise",
    "isokl": "α is the mean KL in nats that each row's strength was solved for",
}
_KIND_UNITS = {"scale": "h' = (1 + α)h", "rotate": "α is an angle in radians", "dropout": "α is a probability"}
#: Unit of a criterion's response and level.
CRITERION_UNITS = {"kl": "nats", "flip": "share of flips", "kappa": "half-turns", "task": "accuracy loss"}
_MOST = 8


def head(found: Run) -> list[str]:
    """Return the lines that name model, unit, site and prompts."""
    manifest, config = found.manifest, found.manifest.config
    if protocol_of(config) == "import":
        from dynprobe.cli._render_ingest import imported

        return imported(found)
    model = manifest.model if isinstance(manifest.model, dict) else {}
    dtype = manifest.dtypes.get("weights") if isinstance(manifest.dtypes, dict) else None
    weights = manifest.weights.get("hash") if isinstance(manifest.weights, dict) else None
    name = model.get("model_id") or manifest.model_name
    lines = [f"model   {name}, {dtype}, weights {str(weights)[:28]}", *_writes(found)]
    if not manifest.rows().get("prompts"):
        return lines
    sources = found.prompts["source"].astype(str)
    words = {"builtin": "built-in", "given": "given in the call", "token ids": "given as token ids"}
    source = " and ".join(words.get(s, f"from {s}") for s in dict.fromkeys(sources))
    if config.get("category"):
        source += ", " + "+".join(config["category"])
    if protocol_of(config) == "dissociate":
        after = "the first token" if config["prefill"] == 1 else f"the first {config['prefill']} tokens"
        return [*lines, f"items   {len(sources)} {source}, fed token by token after {after}"]
    if protocol_of(config) == "eval":
        given = config["num_fewshot"]
        shots = "few-shot examples as the task says" if given is None else f"{given}-shot"
        template = "applied" if config["apply_chat_template"] else "none"
        return [*lines, f"items   {len(sources)} {source}, {shots}, chat template {template}"]
    new = config.get("max_new_tokens")
    mode = (
        "greedy" if not config.get("temperature") else f"temperature {config['temperature']}, top-p {config['top_p']}"
    )
    lines.append(
        f"prompts {len(sources)} {source}, chat template {config.get('chat_template')}, "
        + (f"prefill + {new} new tokens, {mode}" if new else "prefill only")
    )
    return lines


def mean_intervals(summary: Mapping[str, Any], over: str = "prompts") -> str:
    """Return the name of the intervals of means in a summary; finished runs from before it was recorded have none."""
    from dynprobe.metrics.statistics import interval_words

    if "mean_intervals" not in summary and "seconds" in summary:
        return f"95 % bootstrap interval over {over} (of an older version, which did not record its kind)"
    return str(summary.get("mean_intervals", interval_words())).replace("over prompts", f"over {over}")


def _writes(found: Run) -> list[str]:
    """What was written, and what its strength means."""
    config = found.manifest.config
    protocol = protocol_of(config)
    if protocol in ("run", "iterate", "eval", "recover"):
        specs = config.get("perturb") or ()
        return [
            *_loop(config),
            *(line for spec in specs for line in (f"perturb {spec}", f"        {_unit(found, spec)}")),
        ]
    if protocol == "attract":
        return [_of_attract(config)]
    if protocol == "dissociate":
        return [*_loop(config), *_of_dissociate(found)]
    first = _of_sweep(found) if protocol == "sweep" else _of_threshold(found)
    kinds, scales = list(config.get("kind") or ()), list(config.get("scale") or ())
    units = {kind: _KIND_UNITS[kind] for kind in kinds if kind in _KIND_UNITS}
    if set(kinds) - set(_KIND_UNITS) or not kinds:  # a kind with a unit of its own has no scale
        crest = ", at the crest of the sine" if "sine" in kinds else ""
        units = {scale: _meaning(found, scale) + crest for scale in scales} | units
    return [*first, *(f"        {name}: {text}" for name, text in units.items())]


def _loop(config: Mapping[str, Any]) -> list[str]:
    """What acts in a recovery study, and when."""
    if protocol_of(config) not in ("recover", "dissociate"):
        return []
    modes, timings = ", ".join(config.get("mode") or ()), ", ".join(config.get("timings") or ())
    site = config.get("site") or "where the signal points"
    return [f"recover {modes}; timed by {timings}; gain ≤ {config['gain']:g} at {site}, budget {config['budget']:.0%}"]


def _of_attract(config: Mapping[str, Any]) -> str:
    """The layer and what the study goes over."""
    grids = [
        f"{name} {', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in config[name])}"
        for name in ("slots", "half_life", "burn_in", "layers") if config.get(name)
    ]  # fmt: skip
    ladder = f"ε {_listing(config['strengths'])}" if config.get("strengths") else f"{_listing(config['doses'])} nats"
    layer = ", ".join([f"layer {config['attractor']}", *grids])
    return f"attract {config['task']}; {layer}; doses {ladder}, matched by {config['match']}"


def _listing(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _of_dissociate(found: Run) -> list[str]:
    """The noise, at the strengths of the ladder or at the one that was given."""
    config = found.manifest.config
    spec = str(config["perturb"][0])
    said = spec if config.get("fixed") else "α=…" + spec[spec.index(",") :]
    ladder = ", ".join(f"{alpha:g}" for alpha in config["alphas"])
    return [f"perturb {said}; dose–response at α {ladder}", f"        {_unit(found, spec)}"]


def _place(found: Run) -> str:
    """Where a grid writes, and with which noise."""
    config, layers = found.manifest.config, layers_of(found.manifest)
    where = counted(layers, "layer", _MOST) if layers else f"layers {config.get('layers')}"
    kinds, seeds = list(config.get("kind") or ["gaussian"]), list(config.get("seeds") or [0])
    period = f" of period {config['period']:g}" if "sine" in kinds and config.get("period") else ""
    seed = counted(seeds, "seed", _MOST)
    positions = config.get("positions") or "1:"
    phase = f", phase {config['phase']}" if config.get("phase") else ""
    return (
        f"{where}, {config.get('component') or 'resid_post'}, positions {positions}{phase}; "
        f"{', '.join(kinds)}{period}, {seed}"
    )


def _of_sweep(found: Run) -> list[str]:
    config = found.manifest.config
    controls = ", ".join(config.get("controls") or ()) or "none"
    return [f"sweep   {counted(config['alphas'], 'α', _MOST)} × {_place(found)}; controls {controls}"]


def _of_threshold(found: Run) -> list[str]:
    from dynprobe.protocols._criteria import CRITERIA
    from dynprobe.protocols._threshold_config import ThresholdConfig

    config = found.manifest.config
    asked = ThresholdConfig.model_construct(alpha_min=config.get("alpha_min"), alpha_max=config.get("alpha_max"))
    kinds = list(config.get("kind") or ["gaussian"])
    lines = []
    for name in config["criterion"]:
        criterion: Any = CRITERIA.get(name)
        level = config.get("level") if config.get("level") is not None else criterion and criterion.level
        if level is None:
            null = "paraphrases" if config.get("null") == "paraphrase" else "writes of relative norm 1e-6"
            said = f"{name} ≥ the 99 % quantile of its null ({null})"
        else:
            said = f"{name} ≥ {level:.3g} {CRITERION_UNITS.get(name, '')}"
        if config.get("alphas"):
            said += f", on the grid {counted(config['alphas'], 'α', _MOST)}"
        elif criterion is not None:
            low, high = asked.strengths(criterion, kinds[0] if len(kinds) == 1 else "")
            said += f", {config.get('placement') or 'search'} over α {low:g} … {high:g}"
        lines.append(f"asked   {said}")
    each = ", each alone" if config.get("each_position") else ""
    return [*lines, f"writes  {_place(found).replace('; ', each + '; ', 1)}"]


def _unit(found: Run, spec: str) -> str:
    # Not parsed as a perturbation: the package that brought its scale need not be installed where a run is read.
    values = dict(pair.partition("=")[::2] for pair in spec.split(","))
    crest = ", at the crest of the sine" if values.get("kind") == "sine" else ""
    return _KIND_UNITS.get(values.get("kind", "")) or _meaning(found, values.get("scale", "relnorm")) + crest


def _meaning(found: Run, scale: str) -> str:
    """What α means under a scale: as the run says it, which knows the scales of other packages."""
    said = (found.manifest.scales or {}).get(scale, {})
    return str(said.get("meaning") or _UNITS.get(scale, ""))
