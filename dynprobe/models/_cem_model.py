"""CEM as a causal language model of transformers: save, load, generate, batch and pad like any other.

Architecture: *Recasting Transformer Layers as Energy Models* (openreview.net/forum?id=Nbbzu9SDzM), revised as arXiv:
2605.07588. The number of iterations is not a property of the weights: ``model.set_steps(attention=4, mlp=4)``, or
``steps_attention=`` and ``steps_mlp=`` in one call of forward or generate, run another recursion than the trained one.
Energies of every iteration come back with ``output_energies=True``, whole trajectories with ``dynamics=CemDynamics()``.

Decisions and known limits. Attention masks are [batch, tokens]; ALiBi distances count the real tokens of the mask and
``position_ids`` serve RoPE only. The cache is a ``DynamicCache``. Gradient checkpointing and compiled static caches
are not offered. Importing this module makes the Auto classes of transformers know ``model_type="dynprobe_cem"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynprobe.errors import UsageError
from dynprobe.models._cem_config import CemConfig
from dynprobe.models._cem_core import CemModel, CemPreTrainedModel
from dynprobe.models._cem_trace import CemDynamics, CemTrace

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CemConfig", "CemDynamics", "CemForCausalLM", "CemModel", "CemOutput"]


@dataclass
class CemOutput(CausalLMOutputWithPast):
    """Logits, and what was asked for of the recursions.

    Attributes:
        energies: With ``output_energies=True``: ``energies["attention"][layer]`` and ``energies["mlp"][layer]``, each
            [T+1, batch, S], ε or ξ at the iterates 0…T; None for an untied sub-layer.
        dynamics: With ``dynamics=CemDynamics(…)``: the trace.
    """

    energies: dict[str, tuple[Tensor | None, ...]] | None = None
    dynamics: CemTrace | None = None


class CemForCausalLM(CemPreTrainedModel, GenerationMixin):
    """A causal language model whose layers descend on energies.

    Args:
        config: Sizes and switches.

    Example:
        >>> import torch
        >>> model = CemForCausalLM(CemConfig.preset("nano")).eval()
        >>> out = model(torch.arange(5)[None], output_energies=True, steps_attention=2)
        >>> tuple(out.logits.shape), tuple(out.energies["attention"][0].shape)
        ((1, 5, 256), (3, 1, 5))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CemConfig) -> None:
        super().__init__(config)
        self.model = CemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch pos dim"] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        steps_attention: int | None = None,
        steps_mlp: int | None = None,
        output_hidden_states: bool | None = None,
        output_energies: bool = False,
        dynamics: CemDynamics | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CemOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: Tokens [batch, S].
            attention_mask: 1 for real tokens, [batch, T], cached tokens included; None where all are real.
            position_ids: Positions for RoPE, [batch, S]; None counts real tokens.
            past_key_values: A ``DynamicCache`` of earlier tokens.
            inputs_embeds: States in place of tokens, [batch, S, D].
            labels: Tokens to predict (shifted inside), −100 to leave one out.
            use_cache: Whether to return a cache.
            logits_to_keep: Only the last so many positions, or these positions; 0 for all.
            steps_attention: T_ε of this call; None for what ``set_steps`` or the configuration says.
            steps_mlp: T_ξ of this call.
            output_hidden_states: Whether to return the states between blocks (the last one normalised).
            output_energies: Whether to return the energies of all iterates.
            dynamics: What else to keep of the recursions.
            return_dict: False for a tuple.
            **kwargs: Passed on to the loss (``num_items_in_batch``).

        Returns:
            Logits [batch, S, vocabulary] and what was asked for.
        """
        if kwargs.pop("output_attentions", None):
            raise UsageError(
                "CEM does not hand out its attention weights, which differ from step to step. Ask for dynamics="
                "CemDynamics(...) or output_energies=True."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            steps_attention=steps_attention,
            steps_mlp=steps_mlp,
            output_hidden_states=output_hidden_states,
            output_energies=output_energies,
            dynamics=dynamics,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CemOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            energies=outputs.energies,
            dynamics=outputs.dynamics,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def decay_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Return two optimizer groups: matrices with weight decay; gains, diagonals, biases and p without.

        Example:
            >>> groups = CemForCausalLM(CemConfig.preset("nano")).decay_groups()
            >>> [group["weight_decay"] for group in groups]
            [0.1, 0.0]
        """
        plain = ("norm.weight", ".p", ".diagonal", ".biases")
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        free = {name for name, _ in named if name.endswith(plain)}
        return [
            {"params": [p for name, p in named if name not in free], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name in free], "weight_decay": 0.0},
        ]


AutoConfig.register("dynprobe_cem", CemConfig, exist_ok=True)
AutoModel.register(CemConfig, CemModel, exist_ok=True)
AutoModelForCausalLM.register(CemConfig, CemForCausalLM, exist_ok=True)
