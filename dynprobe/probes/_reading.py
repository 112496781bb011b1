"""Which places a reading spec names: those that a recorder keeps whole rows of."""

from __future__ import annotations

from dynprobe.errors import UsageError
from dynprobe.probes._roles import Site
from dynprobe.probes._subject import Subject
from dynprobe.probes._where import Where

__all__ = ["sites_to_read"]


def sites_to_read(subject: Subject, where: Where) -> list[Site]:
    """Resolve a reading spec to sites; ``layers=all`` of the residual stream includes depth 0.

    Raises:
        SiteError: If a layer or component does not exist.
        UsageError: If the spec names a part of a row: a tape holds whole rows.
    """
    for key in ("positions", "phase", "slots") if subject.turns else ("positions", "phase", "iterations", "slots"):
        if getattr(where, key) is not None:
            raise UsageError(
                f"{key} was given in where={str(where)!r}; reading keeps whole rows of a model with layers. Name "
                "layers and component there, and pick from the tape: tape.at(layer=6, pos=-1)"
            )
    if subject.turns:
        return subject.sites(where)
    layers = where.resolve_layers(subject.n_layers)
    sites: list[Site] = []
    for component in where.components():
        if component == "resid_mid" and subject.sequential:
            sites += [(c, layer) for layer in layers for c in ("resid_pre", "attn_out")]
            continue
        if component == "resid_post" and len(layers) == subject.n_layers:
            sites.append(("resid_pre", 0))
        sites += [(component, layer) for layer in layers]
    for component, layer in sites:
        subject.module_at(component, layer)
    return list(dict.fromkeys(sites))
