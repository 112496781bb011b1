"""The body of a CEM language model: embedding, blocks, final norm, and the recursion that a forward runs.

What a forward's layers share (mask, positions, cache, number of steps, recorder) is made here once, as a
:class:`dynprobe.models._cem_frame.Frame`, and handed to every block.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dynprobe.errors import UsageError
from dynprobe.models._cem_attention import InteractionStep
from dynprobe.models._cem_block import CemBlock
from dynprobe.models._cem_config import CemConfig
from dynprobe.models._cem_frame import Frame
from dynprobe.models._cem_norm import CemRMSNorm
from dynprobe.models._cem_preconditioner import Preconditioner
from dynprobe.models._cem_trace import CemDynamics, CemTrace, Recorder

__all__ = ["CemModel", "CemModelOutput", "CemPreTrainedModel"]


@dataclass
class CemModelOutput(BaseModelOutputWithPast):
    """Last states, and what was asked for of the recursions."""

    energies: dict[str, tuple[Tensor | None, ...]] | None = None
    dynamics: CemTrace | None = None


class CemPreTrainedModel(PreTrainedModel):
    """Initialisation and loading of all CEM models."""

    config_class = CemConfig
    base_model_prefix = "model"
    _no_split_modules = ("CemBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        if isinstance(module, Preconditioner):
            init.constant_(module.p, module.p_start)
            if module.U is not None:
                init.normal_(module.U, mean=0.0, std=0.02)
                init.zeros_(module.V)
        elif isinstance(module, InteractionStep):
            for parameter in (module.diagonal, module.biases):
                if parameter is not None:
                    init.zeros_(parameter)
        else:
            super()._init_weights(module)

    def set_steps(self, attention: int | None = None, mlp: int | None = None) -> None:
        """Choose the recursion of all later forwards; None goes back to the trained one.

        Warns above the trained number of steps, where nothing was learned about what happens.
        """
        core = self.base_model
        core.steps_attention = _steps("steps_attention", attention, self.config.steps_attention)
        core.steps_mlp = _steps("steps_mlp", mlp, self.config.steps_mlp)


class CemModel(CemPreTrainedModel):
    """Embedding, blocks and final norm.

    Args:
        config: Sizes and switches.
    """

    def __init__(self, config: CemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([CemBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = CemRMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_gain)
        self.steps_attention, self.steps_mlp = config.steps_attention, config.steps_mlp
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        steps_attention: int | None = None,
        steps_mlp: int | None = None,
        output_hidden_states: bool | None = None,
        output_energies: bool = False,
        dynamics: CemDynamics | None = None,
        **kwargs: Any,
    ) -> CemModelOutput:
        """Return the normalised last states; see :meth:`CemForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("CEM takes either input_ids or inputs_embeds.")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        recorder = Recorder(dynamics, output_energies) if output_energies or dynamics is not None else None
        frame = self._frame(h, attention_mask, position_ids, past_key_values)
        frame.recorder = recorder
        frame.steps = {
            "attention": _steps("steps_attention", steps_attention, self.config.steps_attention, self.steps_attention),
            "mlp": _steps("steps_mlp", steps_mlp, self.config.steps_mlp, self.steps_mlp),
        }
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [h]
        for block in self.layers:
            h = block(h, frame)
            if wanted:
                states.append(h)
        h = self.norm(h)
        return CemModelOutput(
            last_hidden_state=h,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], h) if wanted else None,
            energies=self._energies(recorder) if output_energies else None,
            dynamics=recorder.trace if recorder is not None and dynamics is not None else None,
        )

    def _frame(self, h: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Frame:
        n_query = h.shape[1]
        n_key = n_query
        if mask is not None:
            if mask.dim() != 2 or mask.shape[1] < n_query:
                raise UsageError(
                    f"CEM takes an attention mask [batch, tokens] over all tokens, cached ones included; found shape "
                    f"{tuple(mask.shape)} for {n_query} new tokens."
                )
            # A cache may be empty at the blocks that a resumed forward leaves out; the mask always knows.
            n_key = mask.shape[1]
            mask = mask.to(h.device).bool()
            mask = None if bool(mask.all()) else mask
        elif cache is not None:
            n_key += int(cache.get_seq_length())
        if positions is None:
            counted = torch.arange(n_key, device=h.device)[None] if mask is None else mask.long().cumsum(-1) - 1
            positions = counted[:, -n_query:].clamp_min(0)
        eager = getattr(self.config, "_attn_implementation", None) == "eager"
        return Frame(n_query, n_key, mask, positions, h.dtype, h.device, cache, eager=eager)

    def _energies(self, recorder: Recorder | None) -> dict[str, tuple[Tensor | None, ...]]:
        assert recorder is not None
        layers = range(len(self.layers))
        return {kind: tuple(by_layer.get(i) for i in layers) for kind, by_layer in recorder.energies.items()}


def _steps(name: str, asked: int | None, trained: int, otherwise: int | None = None) -> int:
    """The recursion to run: what this call asks for, else what was set, else the trained one."""
    if asked is None:
        return trained if otherwise is None else otherwise
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise UsageError(f"{name} is a whole number of at least 0, not {asked!r}.")
    if asked > trained:
        warnings.warn(f"{name}={asked} is above the trained {trained}", stacklevel=3)
    return asked
