"""The configuration of a CEM language model: sizes, and one switch for every choice its authors left open.

Causal Energy Minimization reads a Transformer layer as gradient descent on two energies, one of attention and one of
the gated MLP; the descent ties the weights in pairs. The published text leaves eighteen points open (the sign of the
update, where the norm stands, the temperature, what the diagonal term does to the output, …). Each is a field here,
with the reading under which "update = minus the gradient of the energy" holds exactly as its default, and the literal
text as an alternative. The sign is no switch: only one sign descends.

Nothing is guessed: a value that is not listed, a combination without a meaning (a solver that works on the sphere of
the norm while the norm is outside the loop), or a width that the heads do not divide is refused when the configuration
is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.models._cem_presets import PRESETS

__all__ = ["CemConfig"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "diagonal": ("none", "shared", "per_head"),
    "preconditioner": ("none", "diag", "diag_low_rank"),
    "psd": ("free", "clamp"),
    "prec_init": ("paper", "identity"),
    "position": ("alibi", "rope", "none"),
    "llama_position": ("alibi", "rope", "none"),
    "alibi_slopes": ("paper", "press"),
    "norm_mode": ("prenorm", "inplace"),
    "update": ("gradient", "chain", "line_search", "cccp"),
    "mlp_energy": ("gated", "convex_sign"),
}
_STYLES = ("cem", "llama", "reuse")
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rank_attention",
    "rank_mlp", "steps_attention", "steps_mlp", "max_position_embeddings",
)  # fmt: skip


class CemConfig(PretrainedConfig):
    """Sizes and switches of a :class:`CemForCausalLM`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width D of the residual stream.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads K; the head rank is D / K.
        intermediate_size: Width M of the MLP.
        max_position_embeddings: Context the model is trained for; ALiBi goes beyond it without an error.
        attention: ``cem``, ``llama`` (untied attention, one step) or ``reuse`` (the untied residual sub-block applied
            ``steps_attention`` times); one word, or one per layer.
        mlp: The same for the MLP.
        steps_attention: Trained recursion T_ε of the attention energy.
        steps_mlp: Trained recursion T_ξ of the element-wise energy.
        step_size_attention: η_ε.
        step_size_mlp: η_ξ.
        diagonal: The diagonal of A_k = diag(d) + W_Qᵀ W_K: ``none``, ``shared`` by the heads or ``per_head``; starts 0.
        diag_in_update: Whether the update holds d ∘ Σ_j α_ij n_j too (the exact gradient); False is Algorithm 1.
        preconditioner: ``none``, ``diag`` or ``diag_low_rank``: P = diag(softplus(√D p)) + U Vᵀ + V Uᵀ.
        rank_attention: R of the attention preconditioners (one per head).
        rank_mlp: R of the MLP preconditioner.
        psd: ``free`` (P may be indefinite, as published) or ``clamp`` (the low-rank part is scaled down until P ≻ 0).
        prec_init: ``paper`` (P starts at softplus(1) I = 1.3133 I) or ``identity``.
        fold_preconditioner: Multiply P into the output weights once per forward (the same result, less memory).
        position: ``alibi``, ``rope`` (the output is rotated back, so that it stays a gradient) or ``none``.
        llama_position: The same for ``llama`` and ``reuse`` attention.
        alibi_slopes: ``paper`` (2^−k) or ``press`` (2^(−8k/K)).
        self_bias: Learned scalars per head added to the logit of the own and of all other positions.
        rope_base: Base of the rotary frequencies.
        tau: Temperature: ``model`` (√D, as published), ``head`` (√(D/K)), or a number.
        norm_mode: ``prenorm`` (the residual stream is not normalised) or ``inplace`` (h ← RMSNorm(h), literal text).
        norm_in_recursion: Whether the energy is taken at RMSNorm(x) or at x.
        share_norm: Whether the input and the iterate pass one and the same norm.
        norm_gain: Whether norms have a gain.
        rms_norm_eps: ε of the norms.
        update: ``gradient`` (x + ηPs), ``chain`` (the gradient of the energy through the norm), ``line_search`` (η
            halved per token until the energy does not rise; diagnostic) or ``cccp`` (the minimiser of a linear upper
            bound on the sphere of the norm; the energy never rises).
        mlp_energy: ``gated`` or ``convex_sign`` (appendix B; sign with a straight-through gradient).
        initializer_range: Standard deviation of all weight matrices at initialisation.
        tie_word_embeddings: Whether head and embedding share their weight (the published sizes: no).
        use_cache: Whether forwards return a cache by default.
        pad_token_id: Padding token.
        bos_token_id: First token.
        eos_token_id: Last token.
        **kwargs: Passed on to ``PretrainedConfig``.

    Raises:
        UsageError: A value or combination has no meaning.

    Example:
        >>> CemConfig.preset("nano", steps_mlp=3).steps_mlp
        3
    """

    model_type = "dynprobe_cem"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 672,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        intermediate_size: int = 1792,
        max_position_embeddings: int = 2048,
        attention: str | Sequence[str] = "cem",
        mlp: str | Sequence[str] = "cem",
        steps_attention: int = 2,
        steps_mlp: int = 2,
        step_size_attention: float = 1.0,
        step_size_mlp: float = 1.0,
        diagonal: str = "shared",
        diag_in_update: bool = True,
        preconditioner: str = "diag_low_rank",
        rank_attention: int = 4,
        rank_mlp: int = 16,
        psd: str = "free",
        prec_init: str = "paper",
        fold_preconditioner: bool = True,
        position: str = "alibi",
        llama_position: str = "rope",
        alibi_slopes: str = "paper",
        self_bias: bool = True,
        rope_base: float = 10_000.0,
        tau: str | float = "model",
        norm_mode: str = "prenorm",
        norm_in_recursion: bool = True,
        share_norm: bool = True,
        norm_gain: bool = True,
        rms_norm_eps: float = 1e-6,
        update: str = "gradient",
        mlp_energy: str = "gated",
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        fields = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        for name, value in fields.items():
            setattr(self, name, value)
        self.attention = _per_layer("attention", attention, num_hidden_layers)
        self.mlp = _per_layer("mlp", mlp, num_hidden_layers)
        self._check()
        special = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
        super().__init__(**{name: fields[name] for name in special}, **kwargs)
        for name in special:  # a base class that does not know one of them leaves it alone
            setattr(self, name, fields[name])

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> CemConfig:
        """Return a named configuration with some fields replaced.

        Args:
            name: ``86m``, ``108m``, ``134m``, ``162m``, ``tiny``, ``nano``, ``paper`` or ``energy_exact``.
            **overrides: Fields of this class.

        Raises:
            UsageError: There is no such preset or field.

        Example:
            >>> CemConfig.preset("86m", preconditioner="none", diagonal="none").hidden_size
            672
        """
        if name not in PRESETS:
            raise UsageError(
                f"CEM preset {name!r} was asked for; there are {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
            )
        known = cls.field_names()
        for field in overrides:
            if field not in known:
                raise UsageError(f"CemConfig has no field {field!r}.{did_you_mean(field, known)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of all fields that are CEM's own."""
        code = cls.__init__.__code__
        return code.co_varnames[1 : code.co_argcount]

    @property
    def head_dim(self) -> int:
        """Head rank dh = D / K."""
        return int(self.hidden_size // self.num_attention_heads)

    @property
    def tau_value(self) -> float:
        """τ as a number."""
        if self.tau == "model":
            return math.sqrt(self.hidden_size)
        return math.sqrt(self.head_dim) if self.tau == "head" else float(self.tau)

    def style(self, part: str, layer: int) -> str:
        """Return ``cem``, ``llama`` or ``reuse`` for the attention or MLP of one layer."""
        styles = getattr(self, part)
        return str(styles if isinstance(styles, str) else styles[layer])

    def _check(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UsageError(
                    f"CemConfig takes {name}={'|'.join(known)}, not {value!r}.{did_you_mean(str(value), known)}"
                )
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"CemConfig takes a whole number of at least 1 as {name}, not {value!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.tau not in ("model", "head") and not (isinstance(self.tau, int | float) and self.tau > 0):
            raise UsageError(f"CemConfig takes tau=model|head or a number above 0, not {self.tau!r}.")
        styles = {self.attention} if isinstance(self.attention, str) else set(self.attention)
        rotary = {self.position if style == "cem" else self.llama_position for style in styles}
        if "rope" in rotary and self.head_dim % 2:
            raise UsageError(f"rope needs an even head rank; hidden_size / num_attention_heads is {self.head_dim}.")
        if self.update in ("chain", "cccp") and not self.norm_in_recursion:
            raise UsageError(
                f"update={self.update!r} works on the sphere of the norm and norm_in_recursion is False. "
                "Type update='gradient' or update='line_search', or norm_in_recursion=True."
            )


def _per_layer(name: str, value: str | Sequence[str], layers: int) -> str | list[str]:
    styles = [value] if isinstance(value, str) else list(value)
    for style in styles:
        if style not in _STYLES:
            raise UsageError(
                f"CemConfig takes {name}={'|'.join(_STYLES)}, not {style!r}.{did_you_mean(str(style), _STYLES)}"
            )
    if isinstance(value, str):
        return value
    if len(styles) != layers:
        raise UsageError(f"{name} names {len(styles)} layers and num_hidden_layers is {layers}.")
    return styles
