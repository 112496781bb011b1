"""Named CEM configurations: the four published sizes, two toy sizes, and two settings of the switches.

The sizes are those of Table 1 of *Recasting Transformer Layers as Energy Models* (openreview.net/forum?id=Nbbzu9SDzM,
arXiv:2605.07588): vocabulary 32,000, context 2,048, untied embeddings. Every preset is the full published layer
(T = 2, diagonal-plus-low-rank preconditioner, shared diagonal, ALiBi with a self/cross bias); overrides take parts of
it away. ``energy_exact`` is the setting under which the interaction energy provably falls at every step.

============ ==== ====== ===== ==== ============= ====================
preset       D    layers heads M    plain params  with all extras
============ ==== ====== ===== ==== ============= ====================
86m          672  8      8     1792 69.51M        70.08M
108m         672  12     12    1792 82.76M        83.91M
134m         768  12     12    2048 101.08M       102.38M
162m         864  12     12    2304 121.01M       122.48M
tiny         128  4      4     256  bytes (256 tokens), context 512
nano         64   2      4     128  bytes (256 tokens), context 512
paper        as 86m, every published choice written out
energy_exact as nano, no gain, no preconditioner, norm eps 1e-12
============ ======================================================
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]


def _size(dim: int, layers: int, heads: int, width: int, vocab: int = 32_000, context: int = 2048) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": width,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


_PAPER: dict[str, Any] = {
    "steps_attention": 2,
    "steps_mlp": 2,
    "preconditioner": "diag_low_rank",
    "rank_attention": 4,
    "rank_mlp": 16,
    "prec_init": "paper",
    "psd": "free",
    "diagonal": "shared",
    "diag_in_update": True,
    "norm_gain": True,
    "position": "alibi",
    "alibi_slopes": "paper",
    "self_bias": True,
    "tau": "model",
}
_ENERGY_EXACT: dict[str, Any] = {
    "norm_gain": False,
    "rms_norm_eps": 1e-12,
    "diag_in_update": True,
    "preconditioner": "none",
    "tau": "model",
}
_86M = _size(672, 8, 8, 1792)
_NANO = _size(64, 2, 4, 128, vocab=256, context=512)

PRESETS: dict[str, dict[str, Any]] = {
    "86m": _86M,
    "108m": _size(672, 12, 12, 1792),
    "134m": _size(768, 12, 12, 2048),
    "162m": _size(864, 12, 12, 2304),
    "tiny": _size(128, 4, 4, 256, vocab=256, context=512),
    "nano": _NANO,
    "paper": {**_86M, **_PAPER},
    "energy_exact": {**_NANO, **_ENERGY_EXACT},
}
