"""Names shared by all rooms: array aliases and the words of the mini-language that are closed sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    FloatArray: TypeAlias = NDArray[np.floating[Any]]
    BoolArray: TypeAlias = NDArray[np.bool_]
    ArrayLike: TypeAlias = "np.ndarray[Any, Any]" | torch.Tensor

Component = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
Phase = Literal["prefill", "decode"]
DecodeMode = Literal["forced", "free"]

COMPONENTS: tuple[str, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
PHASES: tuple[str, ...] = ("prefill", "decode")
