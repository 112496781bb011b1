"""What looks like a chain of states over a text and is none: models that are refused, each with its reason."""

from __future__ import annotations

from torch import nn

from dynprobe.errors import ModelError

__all__ = ["refuse_ambiguous", "refuse_unreadable"]


def refuse_unreadable(model: nn.Module) -> None:
    """Refuse models whose iterations cannot stand on a track of token positions, however they are named.

    Raises:
        ModelError: The model is one of them; the message says what to do instead.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind == "perceiver":
        raise ModelError(
            f"{type(model).__name__} refines latent vectors that belong to no token: there is no position to read or "
            "write them at. Measure them from your own forward, with the latents as state vectors: "
            "dp.trace_callback(dims='batch,state,dim') (see docs/trajectories.md)"
        )
    steps = max((int(getattr(m, "z_steps", 0) or 0) for m in model.modules()), default=0)
    if steps > 1 and str(kind).startswith("deberta"):
        raise ModelError(
            f"{type(model).__name__} has z_steps={steps}: its enhanced mask decoder refines the query of its last "
            "layer against a state that stays, which is no track of states, and transformers 5.23 cannot run it (it "
            "appends to a tuple). With z_steps = 0 its layers are read"
        )


def refuse_ambiguous(model: nn.Module) -> None:
    """Refuse models with several chains of blocks of which the longest is not about tokens, unless one was named.

    Raises:
        ModelError: The model is one of them; the message says which chains can be named.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "blt":
        raise ModelError(
            f"{type(model).__name__} has a chain of blocks over bytes on either side of one over patches, whose "
            "positions are no tokens; name the one to read: layers='model.local_decoder.layers.*'"
        )
