"""Calibrate: run the calibration prompts once, clean, and keep what every yardstick needs."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynprobe import metrics, models
from dynprobe.controllers.recovery import GUARD_WINDOW, STR_WINDOW
from dynprobe.errors import CalibrationError, UsageError
from dynprobe.probes import Calibration, Subject, load_calibration
from dynprobe.probes import load as load_subject
from dynprobe.probes._backend import on_backend
from dynprobe.probes._calibration import CALIBRATION_SCHEMA, covariance_root, principal_components, quantiles
from dynprobe.prompts import Prompt, content_hash, load_prompts
from dynprobe.protocols._arms import Passage, Text, forced
from dynprobe.protocols._plan import plan_batches
from dynprobe.protocols._plugins_used import adapter_used
from dynprobe.protocols._prompts import as_prompts, token_rows
from dynprobe.protocols._weights import structure_of, weights_of
from dynprobe.runs import hash_prompts

__all__ = ["calibrate", "calibrated"]

_COMPONENTS = 16
#: A state of more than this many times the median norm of its depth is an attention sink.
_SINK = 10.0
#: Tensors that calibrations of this schema have held last: a cached one without them was made before there was use
#: for them, and is made again.
_LATEST = {"str_sigma", "norm_step_mu", "kappa_token_mu"}
#: What the signals of a calibration need; the rest of the default list would only cost time.
_SIGNALS = ("kappa.phase/1", "delta.angle/1", "resid.norm/1", "limen.ct/1", "limen.ct2/1")


def _cache_root() -> Path:
    """Folder of cached calibrations, beside the fetched models."""
    return models.cache_root() / "calibrations"


def _key(
    subject: Subject, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], cov_depths: Sequence[int]
) -> dict[str, Any]:
    return {
        "weights": subject.facts.get("weights_hash") or weights_of(subject),
        "structure": structure_of(subject),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "prompts": content_hash(list(prompts)),
        "tokens": hash_prompts(rows),
        "cov_depths": sorted(set(cov_depths)),
        "schema": CALIBRATION_SCHEMA,
        **adapter_used(subject),
    }


def calibrate(
    model: str | Subject,
    prompts: Sequence[str] | Sequence[Prompt] | None = None,
    *,
    cov_layers: Sequence[int] = (),
    force: bool = False,
    device: str = "auto",
    dtype: str = "float32",
) -> Calibration:
    """Measure what a model does when left alone, or read it from the cache.

    Per depth: mean, SD, MAD of every coordinate over tokens, top principal components, κ profile; over all tokens the
    quantiles of every streaming signal. Position 0 takes no part, and in the coordinates' statistics no state of more
    than ten times the median norm of its depth (an attention sink elsewhere); ``header["n_sinks"]`` counts them.

    Args:
        model: Name of a model, or a subject.
        prompts: Texts that no run uses; default the built-in calibration prompts.
        cov_layers: Layers whose output's full covariance is kept too, for ``scale=cov``.
        force: Make it again even where the cache has it.
        device: Where to run.
        dtype: Dtype of the weights.

    Returns:
        The calibration; ``.hash`` is its identity.

    Raises:
        UsageError: If there are too few tokens to estimate a standard deviation.
        SiteError: If a layer does not exist.

    Example:
        >>> from dynprobe.prompts import from_texts
        >>> made = calibrate("tiny-llama", from_texts(["In the beginning God created the heaven and the earth."] * 2))
        >>> tuple(made.tensors["std"].shape)
        (5, 128)
    """
    subject = load_subject(model, device=device, dtype=dtype)
    weights_of(subject, just_loaded=isinstance(model, str))
    if cov_layers and subject.n_slots is not None:
        raise UsageError(f"{subject.name} has {subject.n_slots} slots per position; scale=cov needs one vector")
    chosen = _prompts(prompts)
    for layer in cov_layers:
        subject.module_at("resid_post", layer)
    return calibrated(subject, chosen, cov_depths=[layer + 1 for layer in cov_layers], force=force)


def calibrated(
    subject: Subject, prompts: Sequence[Prompt] | None = None, *, cov_depths: Sequence[int] = (), force: bool = False
) -> Calibration:
    """Return the calibration of a subject, with the covariance of some depths, from the cache where it is there."""
    subject = on_backend(subject, "hooks")  # one calibration per model, whoever reads it later
    chosen = _prompts(prompts)
    rows = token_rows(subject, chosen)
    key = _key(subject, chosen, rows, cov_depths)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = _cache_root() / digest
    if not force and (folder / "calibration.json").exists():
        with suppress(CalibrationError):  # a damaged cache entry is made again; nothing is lost
            found = load_calibration(folder)
            found.check(key["weights"], key["dtype"])
            if found.tensors.keys() >= _LATEST:
                return found
    made = _measure(subject, chosen, rows, cov_depths, {**key, "hash": digest})
    try:
        made.save(folder)
    except OSError as error:
        warnings.warn(
            f"the calibration could not be kept in {folder} ({error.strerror or error}) and will be measured again "
            "next time; set DYNPROBE_CACHE to a folder with room",
            stacklevel=2,
        )
    return made


def _prompts(prompts: Sequence[str] | Sequence[Prompt] | None) -> list[Prompt]:
    return load_prompts(source="calibration") if prompts is None else as_prompts(prompts)


def _passages(subject: Subject, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> list[Passage]:
    plan = plan_batches(
        [len(r) for r in rows], max_new_tokens=0, n_layers=subject.n_layers,
        dim=subject.width, vocab=subject.vocab_size or 1,
    )  # fmt: skip
    return [
        forced(subject, [Text(prompts[i].prompt_id, tuple(rows[i])) for i in batch], span="all", which=_SIGNALS)
        for batch in plan
    ]


def _measure(
    subject: Subject,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    cov_depths: Sequence[int],
    header: dict[str, Any],
) -> Calibration:
    states: list[list[torch.Tensor]] = [[] for _ in range(subject.n_layers + 1)]
    signals: dict[str, list[np.ndarray]] = {}
    profiles: list[np.ndarray] = []
    steps: list[np.ndarray] = []
    norms: list[np.ndarray] = []
    growths: list[np.ndarray] = []
    windows: list[torch.Tensor] = []
    for passage in _passages(subject, prompts, rows):
        passage.logits = None
        keep = passage.mask.numpy() & (passage.positions >= 1)
        chosen = torch.from_numpy(keep)
        for depth, state in enumerate(passage.tape.states):
            states[depth].append(state.float().cpu()[chosen].flatten(1))  # a position's slots are one long vector
        for row, chosen_row in zip(passage.tape.states[-1].float().cpu().flatten(2), chosen, strict=True):
            windows += list(_neighbours(row[chosen_row]))
        for name, values in {**passage.measured.token, **passage.outputs}.items():
            signals.setdefault(name, []).append(values[keep])
        angle, norm = passage.measured.depth["angle"], passage.measured.depth["norm"]
        steps.append(angle[:, keep].astype(np.float64) / np.pi)
        profiles.append(np.asarray(passage.measured.profile["kappa_phase"], dtype=np.float64))
        norms.append(norm[:, keep].astype(np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            # From the first depth that metrics use: a step out of the embedding would hide every other.
            grown = np.abs(np.diff(np.log(norm[passage.measured.first :, keep]), axis=0))
        if len(grown):
            signals.setdefault("norm_step", []).append(grown.max(0))
            growths.append(np.concatenate([np.full((passage.measured.first + 1, grown.shape[1]), np.nan), grown]))
        signals.setdefault("nll_mean8", []).extend(
            _window_means(row[chosen_row]) for row, chosen_row in zip(passage.outputs["nll"], keep, strict=True)
        )
    n_tokens = len(torch.cat(states[0]))
    if n_tokens < 2:
        raise UsageError(f"calibration saw {n_tokens} tokens after position 0; give longer or more prompts")
    tensors = _site_tensors(states, cov_depths)
    if subject.n_slots is not None:
        for name in ("mean", "std", "mad"):
            tensors[name] = tensors[name].unflatten(-1, (subject.n_slots, -1))
    per_prompt, per_token = np.concatenate(profiles, axis=1), np.concatenate(steps, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows 0 and 1 have no step and stay NaN
        mu, sigma = np.nanmean(per_prompt, axis=1), np.nanstd(per_prompt, axis=1, ddof=1)
        token_mu, token_sigma = np.nanmean(per_token, axis=1), np.nanstd(per_token, axis=1, ddof=1)
        known = slice(passage.measured.first + 1, None)
        profile = per_token[known], token_mu[known], token_sigma[known]
        signals["kappa_phase_zmax"] = [metrics.step_zmax(*profile)[0]]
        signals["kappa_phase_z"] = [metrics.step_z(*profile)]
        grown = np.concatenate(growths, axis=1) if growths else np.zeros((subject.n_layers + 1, 0))
        grown_mu, grown_sigma = np.nanmean(grown, axis=1), np.nanstd(grown, axis=1, ddof=1)
        signals["norm_step_zmax"] = [metrics.step_zmax(grown[known], grown_mu[known], grown_sigma[known])[0]]
        norm_q99 = np.nanquantile(np.concatenate(norms, axis=1), 0.99, axis=1)
    tensors |= {
        "kappa_mu": torch.from_numpy(mu), "kappa_sigma": torch.from_numpy(sigma),
        "kappa_token_mu": torch.from_numpy(token_mu),
        "kappa_token_sigma": torch.from_numpy(token_sigma),
        "norm_step_mu": torch.from_numpy(grown_mu), "norm_step_sigma": torch.from_numpy(grown_sigma),
        "norm_q99": torch.from_numpy(norm_q99),
        "str_sigma": torch.tensor(metrics.str_sigma(windows), dtype=torch.float64),
    }  # fmt: skip
    header = {
        **header, "model": subject.name, "tensors": models.weights_hash(subject.model),
        "n_prompts": len(prompts), "n_tokens": n_tokens,
        "n_layers": subject.n_layers, "dim": subject.dim,
        "n_sinks": [_without_sinks(torch.cat(pieces))[1] for pieces in states],
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "metrics": {name: metrics.columns()[name].metric_id for name in signals if name in metrics.columns()},
    }  # fmt: skip
    return Calibration(tensors, quantiles(signals), header)


def _neighbours(states: torch.Tensor) -> torch.Tensor:
    """Every four consecutive states of one text, ``[window, 4, dim]``."""
    if len(states) < STR_WINDOW:
        return states.new_zeros(0, STR_WINDOW, states.shape[-1])
    return states.unfold(0, STR_WINDOW, 1).transpose(1, 2)


def _window_means(values: np.ndarray) -> np.ndarray:
    """Means of the NLL over every eight consecutive tokens of one text."""
    known = values[np.isfinite(values)].astype(np.float64)
    return (
        np.lib.stride_tricks.sliding_window_view(known, GUARD_WINDOW).mean(1)
        if len(known) >= GUARD_WINDOW
        else known[:0]
    )


def _without_sinks(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The states that are typical of a depth, and how many sinks were left out.

    Position 0 is not the only attention sink: a token such as the second one of a short word can carry a hundred times
    the norm of all others, in one coordinate. One of them among a thousand tokens multiplies that coordinate's SD, and
    with it every strength in units of it, by ten.
    """
    x = x[torch.isfinite(x).all(-1)]
    norm = torch.linalg.vector_norm(x, dim=-1)
    keep = norm <= _SINK * norm.median() if len(x) else norm.bool()
    return x[keep], int((~keep).sum())


def _site_tensors(states: Sequence[Sequence[torch.Tensor]], cov_depths: Sequence[int]) -> dict[str, torch.Tensor]:
    means: list[torch.Tensor] = []
    stds: list[torch.Tensor] = []
    mads: list[torch.Tensor] = []
    pcs: list[torch.Tensor] = []
    variances: list[torch.Tensor] = []
    extra: dict[str, torch.Tensor] = {}
    for depth, pieces in enumerate(states):
        x = _without_sinks(torch.cat(list(pieces)))[0]
        if len(x) < 2:  # a broken block: there is nothing to estimate here, and a guess would be used as a unit
            for held in (means, stds, mads):
                held.append(torch.full((x.shape[-1],), torch.nan))
            continue
        mean = x.double().mean(0)
        centred = (x.double() - mean).float()
        means.append(mean.float())
        stds.append(x.double().std(0).float())
        columns = x.T.contiguous()  # a median along the last axis is several times faster
        middle = torch.from_numpy(np.median(columns.numpy(), axis=1, keepdims=True))
        mads.append(torch.from_numpy(np.median((columns - middle).abs().numpy(), axis=1)))
        rows, values = principal_components(centred, _COMPONENTS)
        pcs.append(rows)
        variances.append(values)
        if depth in cov_depths:
            extra[f"cov_basis.{depth}"], extra[f"cov_sqrt.{depth}"] = covariance_root(centred)
    same = len({t.shape for t in pcs}) == 1 and len(pcs) == len(states)
    return {
        "mean": torch.stack(means), "std": torch.stack(stds), "mad": torch.stack(mads),
        **({"pcs": torch.stack(pcs), "pc_var": torch.stack(variances)} if same else {}), **extra,
    }  # fmt: skip
