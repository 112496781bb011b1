"""The sizes and switches of the CSM-style reference model.

A Convergent State Machine has been announced with sizes, 16 state vectors, no attention and an energy that is
minimised for as many iterations as the caller asks; its energy, update rule, tokenizer and weights are not public. The
model in this package is therefore *CSM-style*: the simplest one for which everything that was said about the
architecture is true by construction. Numbers measured on it are not numbers of the announced models, and the presets
named after their sizes share nothing with them but the count of parameters.

A configuration says how wide things are and which of the few variants is meant. How many iterations to run is *not*
part of the architecture: ``num_iterations`` is only what a call uses when it does not say.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dynprobe.errors import UsageError, did_you_mean

__all__ = ["CsmConfig"]

_BYTES = 256
_GPT2_BPE = 50257
_PRESETS: dict[str, dict[str, int]] = {
    "66m": {"vocab_size": _GPT2_BPE, "hidden_size": 640, "state_size": 512, "memory_size": 1408},
    "150m": {"vocab_size": _GPT2_BPE, "hidden_size": 896, "state_size": 640, "memory_size": 4192},
    "331m": {"vocab_size": _GPT2_BPE, "hidden_size": 1152, "state_size": 1024, "memory_size": 7136},
    "tiny": {"vocab_size": _BYTES, "hidden_size": 128, "state_size": 64, "memory_size": 256},
    "nano": {"vocab_size": _BYTES, "hidden_size": 96, "state_size": 32, "memory_size": 96},
}
_CHOICES = {
    "memory": ("per_state", "shared"),
    "init": ("memory", "noise", "learned"),
    "carry": ("memory", "refined"),
}


class CsmConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of :class:`CsmForCausalLM`.

    Args:
        vocab_size: Number of tokens V.
        hidden_size: Width D of the embedding.
        num_states: Number N of state vectors (slots) per position.
        state_size: Width d of a state vector.
        memory_size: Memory slots Ma per state vector: rows of V_r in the energy.
        conv_width: Tokens seen by the causal depthwise convolution in front of the writer.
        num_iterations: Updates T that a call makes when it does not say.
        trained_iterations: Largest depth the weights were trained to, or None if never trained or not known.
        memory: ``per_state`` (one V_r, G_r for each state vector) or ``shared`` (one for all).
        init: Where s⁰ comes from: the ``memory`` m, seeded ``noise``, or a ``learned`` constant.
        carry: ``memory``: only m crosses positions, all positions refine in parallel. ``refined``: s⁰ of a position is
            the refined state of the position before it; positions then run one after another, for experiments only.
        step_size: α at initialisation; α = sigmoid of a learned scalar.
        half_life_min: Shortest half-life of the leaky memories at initialisation, in tokens.
        half_life_max: Longest one; the N half-lives are spaced evenly in logarithm between the two.
        norm_eps: Added to the mean square in the norms with a gain (embedding, convolution, readout).
        state_eps: The same in the weightless norm of the states; small, since Ê must not depend on their scale.
        init_seed: Seed of ``init="noise"``.
        halt_tol: Stop a position when its Δ stays below this; None never stops early.
        halt_patience: Consecutive updates that must stay below ``halt_tol``.
        use_cache: Whether a call returns the decoding state.
        tie_word_embeddings: Logits are read with the embedding matrix.
        bos_token_id: Id that begins a text, if any.
        eos_token_id: Id that ends a text, if any.
        pad_token_id: Id used for padding, if any.
        **kwargs: Passed on to ``PretrainedConfig``.

    Raises:
        UsageError: A size is not positive or a switch has no such setting.

    Example:
        >>> CsmConfig(hidden_size=96, state_size=32).num_states
        16
        >>> CsmConfig(init="zeros")
        Traceback (most recent call last):
        ...
        dynprobe.errors.UsageError: CsmConfig: init is one of memory, noise, learned, found 'zeros'.
    """

    model_type = "dynprobe_csm"

    def __init__(
        self,
        vocab_size: int = _GPT2_BPE,
        hidden_size: int = 640,
        num_states: int = 16,
        state_size: int = 512,
        memory_size: int = 1408,
        conv_width: int = 4,
        num_iterations: int = 12,
        trained_iterations: int | None = None,
        memory: str = "per_state",
        init: str = "memory",
        carry: str = "memory",
        step_size: float = 0.38,
        half_life_min: float = 1.0,
        half_life_max: float = 512.0,
        norm_eps: float = 1e-6,
        state_eps: float = 1e-12,
        init_seed: int = 0,
        halt_tol: float | None = None,
        halt_patience: int = 2,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_states = num_states
        self.state_size = state_size
        self.memory_size = memory_size
        self.conv_width = conv_width
        self.num_iterations = num_iterations
        self.trained_iterations = trained_iterations
        self.memory = memory
        self.init = init
        self.carry = carry
        self.step_size = step_size
        self.half_life_min = half_life_min
        self.half_life_max = half_life_max
        self.norm_eps = norm_eps
        self.state_eps = state_eps
        self.init_seed = init_seed
        self.halt_tol = halt_tol
        self.halt_patience = halt_patience
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self._check()

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_states", "state_size", "memory_size", "conv_width"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UsageError(f"CsmConfig: {name} is a whole number from 1 on, found {value!r}.")
        if self.num_iterations < 0 or self.halt_patience < 1:
            raise UsageError(
                f"CsmConfig: num_iterations ≥ 0 and halt_patience ≥ 1, found {self.num_iterations} and "
                f"{self.halt_patience}."
            )
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                near = did_you_mean(str(value), choices)
                raise UsageError(f"CsmConfig: {name} is one of {', '.join(choices)}, found {value!r}.{near}")
        if not 0.0 < self.step_size < 1.0:
            raise UsageError(f"CsmConfig: step_size lies between 0 and 1, found {self.step_size}.")
        if not 0.0 < self.half_life_min <= self.half_life_max:
            raise UsageError(
                f"CsmConfig: 0 < half_life_min ≤ half_life_max, found {self.half_life_min} and {self.half_life_max}."
            )
        if self.halt_tol is not None and self.halt_tol < 0:
            raise UsageError(f"CsmConfig: halt_tol ≥ 0 or None, found {self.halt_tol}.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> CsmConfig:
        """Return a configuration by name.

        Args:
            name: ``66m``, ``150m``, ``331m`` (GPT-2 vocabulary), ``tiny`` or ``nano`` (bytes).
            **overrides: Any argument of the configuration.

        Returns:
            The configuration.

        Raises:
            UsageError: There is no such preset.

        Example:
            >>> CsmConfig.preset("nano", num_iterations=20).num_iterations
            20
            >>> CsmConfig.preset("66")
            Traceback (most recent call last):
            ...
            dynprobe.errors.UsageError: CsmConfig has no preset '66'. Did you mean '66m'? Known: 66m, 150m, ...
        """
        key = str(name).lower().removeprefix("csm-")
        if key not in _PRESETS:
            raise UsageError(
                f"CsmConfig has no preset {name!r}.{did_you_mean(key, _PRESETS)} Known: {', '.join(_PRESETS)}."
            )
        return cls(**{**_PRESETS[key], **overrides})
