"""A CSM-style language model as a transformers ``PreTrainedModel``: no attention, 16 state vectors, depth by the call.

Tokens are written into leaky memories by a causal gated recurrence; then, at every position on its own, an energy over
16 state vectors is lowered for as many iterations as the caller asks; logits are read from the last state with the tied
embedding. Decoding needs a state of constant size (:class:`CsmCache`) and no key–value cache.

The original Convergent State Machine is not public. This is a reference model *in its style*: what was announced about
the architecture is true of it by construction, and nothing measured on it is a statement about the original.

Three ways to see and push an iteration: ``output_hidden_states=True`` (s⁰ … s^K), ``on_iteration=`` (which may also
replace a state), and forward hooks on ``model.model.refine``, whose call k of a forward maps s^k to s^{k+1};
``model.model.start`` hands out s⁰.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.utils import ModelOutput

from dynprobe.models._csm_cache import CsmCache
from dynprobe.models._csm_config import CsmConfig
from dynprobe.models._csm_core import CsmModel, CsmPreTrainedModel
from dynprobe.models._csm_loop import DeltaHalt, OnIteration

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CsmCache", "CsmCausalLMOutput", "CsmConfig", "CsmForCausalLM", "DeltaHalt"]


@dataclass
class CsmCausalLMOutput(ModelOutput):  # type: ignore[misc, unused-ignore]
    """Output of :class:`CsmForCausalLM`.

    Attributes:
        loss: Next-token cross-entropy in nats, where labels were given.
        logits: ``[batch, pos, vocab]``, or the last ``logits_to_keep`` positions.
        past_key_values: Decoding state after the last token.
        hidden_states: s⁰ … s^K ``[batch, pos, slot, dim]`` where asked for.
        energies: E of each of them ``[iteration, batch, pos]`` where asked for.
        deltas: Δ of each update ``[iteration, batch, pos]`` where asked for; NaN once a position has halted.
        halted_at: Updates made when the position halted, −1 where it did not ``[batch, pos]``.
        final_state: Final state s^K ``[batch, pos, slot, dim]``.
        iterations: K, the number of iterations that were run.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: CsmCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    energies: Tensor | None = None
    deltas: Tensor | None = None
    halted_at: Tensor | None = None
    final_state: Tensor | None = None
    iterations: int | None = None


class CsmForCausalLM(CsmPreTrainedModel, GenerationMixin):  # type: ignore[misc, unused-ignore]
    """CSM-style causal language model.

    Args:
        config: Sizes and switches; ``CsmConfig.preset("nano")`` and so on.

    Example:
        >>> import torch
        >>> model = CsmForCausalLM(CsmConfig.preset("nano")).eval()
        >>> ids = torch.tensor([[72, 101, 108, 108, 111]])
        >>> out = model(ids, num_iterations=3, output_hidden_states=True, output_energies=True)
        >>> torch.stack(out.hidden_states).shape, out.energies.shape, out.logits.shape
        (torch.Size([4, 1, 5, 16, 32]), torch.Size([4, 1, 5]), torch.Size([1, 5, 256]))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own convention

    def __init__(self, config: CsmConfig) -> None:
        super().__init__(config)
        self.model = CsmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # There are no keys and values to store: a call makes its own CsmCache.
        return False

    def readout(self, state: Float[Tensor, "batch pos slot dim"]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of a state, of whichever iteration: the loop feeds the readout directly.

        Args:
            state: ``[batch, pos, slot, dim]``.

        Returns:
            Logits ``[batch, pos, vocab]``.
        """
        logits: Tensor = self.lm_head(self.model.reader(state))
        return logits

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch pos dim"] | None = None,
        past_key_values: CsmCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_iterations: int | None = None,
        halt: DeltaHalt | None = None,
        initial_state: Float[Tensor, "batch pos slot dim"] | None = None,
        grad_iterations: int | None = None,
        on_iteration: OnIteration | None = None,
        output_hidden_states: bool | None = None,
        output_energies: bool = False,
        output_deltas: bool = False,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> CsmCausalLMOutput | tuple[Tensor, ...]:
        """Run the model.

        Args:
            input_ids: Tokens ``[batch, pos]``.
            attention_mask: 1 at real tokens ``[batch, pos]``; padding on either side. With a decoding state it may
                also cover the earlier columns.
            inputs_embeds: Embeddings ``[batch, pos, hidden]`` instead of tokens.
            past_key_values: Decoding state of the earlier tokens; it is moved on in place.
            labels: Targets ``[batch, pos]``, shifted here; −100 is left out.
            use_cache: Return the decoding state; by default the configuration's ``use_cache``, never in training.
            logits_to_keep: Number of last positions to make logits of (0 = all), or their indices.
            num_iterations: Updates T, from 0 on; by default the configuration's.
            halt: Stop each position by its Δ; by default the configuration's. ``DeltaHalt(0)`` never stops.
            initial_state: s⁰ ``[batch, pos, slot, dim]`` instead of the configured start.
            grad_iterations: Differentiate only the last so many iterations (truncated backpropagation).
            on_iteration: ``fn(k, state, stage="core", energy=None)``, called with s⁰ and after every update; a tensor
                it returns replaces the state.
            output_hidden_states: Return s⁰ … s^K.
            output_energies: Return the energy of each of them; costs about one more iteration per iteration.
            output_deltas: Return Δ of each update.
            return_dict: False returns a plain tuple.
            cache_position: Not needed; ``generate`` of transformers 5.0 hands it over.

        Returns:
            The output, or a tuple of its parts that are there.

        Raises:
            UsageError: The arguments do not fit together; the message says which.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values, use_cache=use_cache, num_iterations=num_iterations, halt=halt,
            initial_state=initial_state, grad_iterations=grad_iterations, on_iteration=on_iteration,
            output_hidden_states=output_hidden_states, output_energies=output_energies, output_deltas=output_deltas,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        read = out.last_hidden_state if isinstance(keep, int) else out.last_hidden_state[:, keep]
        logits = self.lm_head(read)
        loss = None
        if labels is not None:
            kept = labels if isinstance(keep, int) else labels[:, keep]
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), kept[:, 1:].flatten(), ignore_index=-100
            )
        answer = CsmCausalLMOutput(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states,
            energies=out.energies, deltas=out.deltas, halted_at=out.halted_at, final_state=out.final_state,
            iterations=out.iterations,
        )  # fmt: skip
        if return_dict is None:
            return_dict = self.config.return_dict
        return answer if return_dict else answer.to_tuple()


AutoConfig.register(CsmConfig.model_type, CsmConfig, exist_ok=True)
AutoModel.register(CsmConfig, CsmModel, exist_ok=True)
AutoModelForCausalLM.register(CsmConfig, CsmForCausalLM, exist_ok=True)
