"""What a recovery study refuses before anything is run, each with what to type instead."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynprobe.errors import CalibrationError, ModelError, UsageError
from dynprobe.probes import Perturb, Subject
from dynprobe.probes._take_back import check_takes_back
from dynprobe.protocols._conditions import resolve_perturbations
from dynprobe.protocols._prepare import Prepared
from dynprobe.protocols._recover_arms import arms_of, takes_back
from dynprobe.protocols._recover_config import RecoverConfig
from dynprobe.protocols._streams import check_streams

__all__ = ["checked", "names_prompts", "no_calibration", "possible"]


def names_prompts(settings: Mapping[str, Any]) -> bool:
    """Whether settings say which prompts to take."""
    return any(settings.get(name) for name in ("prompt", "prompts", "category"))


def checked(subject: Subject, config: Any, given: Sequence[Perturb | str]) -> list[Perturb]:
    """Return the perturbations, and refuse what cannot be studied.

    Raises:
        ModelError: If the model cannot be fed token by token.
        UsageError: If a perturbation needs other texts, or there is nothing to do.
    """
    check_streams(subject)
    assert isinstance(config, RecoverConfig)
    found = resolve_perturbations(subject, config, given)
    if any(p.noise_scale.needs_clean for p in found):
        raise UsageError("dynprobe recover takes scales that need no other text: relnorm, coordstd, mad, cov, abs")
    modes = [mode for mode in config.mode if mode != "none"]
    if modes and not any(arm.mode for arm in arms_of(config, bool(found))):
        raise UsageError(
            f"nothing is left to do for mode {', '.join(modes)}: with --decode {config.decode} and "
            f"{'' if found else 'no '}perturbation there is no arm of it (guard, recync and sampling write texts and "
            "do not read them; sham and passive need something to be perturbed)"
        )
    return found


def possible(ready: Prepared) -> Prepared:
    """Of ``--mode all`` the modes that this model can do: some caches cannot give tokens back."""
    config = ready.config
    assert isinstance(config, RecoverConfig)
    try:
        check_takes_back(ready.subject)
    except ModelError as error:
        restarts = [mode for mode in config.mode if takes_back(mode)]
        warnings.warn(f"--mode all leaves out {', '.join(restarts)}: {error}", stacklevel=3)
        kept = tuple(mode for mode in config.mode if mode not in restarts)
        return replace(ready, config=config.model_copy(update={"mode": kept}))
    return ready


def no_calibration(subject: Subject) -> CalibrationError:
    """What to say where there is nothing to judge a signal by."""
    return CalibrationError(
        f"{subject.name} has no tokenizer to read the calibration texts with; make a calibration of token ids with "
        "dp.calibrate(subject, prompts=token_ids).save(folder) and hand in its folder: --calibration FOLDER"
    )
