"""Settings of a test, checked before the prediction is registered.

A setting that no protocol would take must not leave a registration in the log that can never have an outcome.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynprobe.claims._claim import Claim
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["SHARED", "check_settings"]

#: Settings that mean the same in every protocol.
SHARED = ("limit", "prompts", "prompt", "category", "device", "dtype", "batch_size", "seed")
#: Settings that a test does not choose.
_FIXED = ("model", "out", "quiet")


def check_settings(claim: Claim, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the protocol of a claim would refuse.

    Args:
        claim: A claim that can be tested.
        settings: What is to win over the settings of the claim.

    Raises:
        UsageError: Naming the setting, what it may be, and what was meant perhaps.
    """
    from dynprobe import protocols
    from dynprobe.protocols._prepare import configured

    assert claim.panel is not None
    for role in claim.panel.roles.values():
        name = str(role.protocol or claim.protocol)
        kind = getattr(protocols, f"{name.capitalize()}Config")
        more = set(inspect.signature(getattr(protocols, name)).parameters) - {"settings", "listener"}
        given = {k: v for k, v in settings.items() if not role.protocol or k in SHARED}
        known = sorted({*kind.model_fields, *more} - set(_FIXED))
        for key in given:
            if key not in known:
                near = did_you_mean(key, known)
                raise UsageError(
                    f"{claim.id} is tested with the protocol {name}, which has no setting {key!r}.{near} Settings: "
                    f"{', '.join(known)}"
                )
        base = role.settings if role.protocol else {**claim.settings, **role.settings}
        asked = {k: v for k, v in {**base, **given}.items() if k in kind.model_fields}
        if not isinstance(asked.get("prompts", ""), str | Path):  # prompts themselves: read when they are used
            del asked["prompts"]
        configured(None, asked, kind)
