"""The body of the CSM-style model: embedding, writer, landscape, refinement, readout, and their initial weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from dynprobe.errors import UsageError
from dynprobe.models._csm_cache import CsmCache
from dynprobe.models._csm_config import CsmConfig
from dynprobe.models._csm_ends import CsmReader, CsmStart
from dynprobe.models._csm_energy import CsmLandscape, CsmRefinement
from dynprobe.models._csm_loop import DeltaHalt, OnIteration, Refined, refine
from dynprobe.models._csm_writer import CsmWriter

__all__ = ["CsmModel", "CsmOutput", "CsmPreTrainedModel"]


class CsmPreTrainedModel(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """What all CSM-style models share: configuration class, weight initialisation, a stateful decoder."""

    config_class = CsmConfig
    base_model_prefix = "model"
    _is_stateful = True
    _no_split_modules = ("CsmWriter", "CsmLandscape", "CsmRefinement")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        c: CsmConfig = self.config
        D, d = c.hidden_size, c.state_size
        if isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, std=D**-0.5)
        elif isinstance(module, CsmWriter):
            init.ones_(module.norm_convolution)
            taps = torch.randn(D, c.conv_width) * 0.2
            taps[:, -1] += 1.0
            init.copy_(module.convolution, taps)
            init.normal_(module.write, std=D**-0.5)
            init.normal_(module.context, std=D**-0.5)
            init.normal_(module.decay, std=0.1 * D**-0.5)
            init.copy_(module.decay_bias, module.half_life_bias())
        elif isinstance(module, CsmLandscape):
            init.ones_(module.drive_gain)
            init.zeros_(module.drive_bias)
            init.normal_(module.gates, std=d**-0.5)
            init.zeros_(module.gate_bias)
        elif isinstance(module, CsmRefinement):
            init.normal_(module.memory, std=d**-0.5)
            init.normal_(module.coupling, std=0.1)
            init.ones_(module.coupling_gain)
            init.constant_(module.step, math.log(c.step_size / (1.0 - c.step_size)))
        elif isinstance(module, CsmStart):
            if c.init == "learned":
                init.normal_(module.state, std=1.0)
        elif isinstance(module, CsmReader):
            init.normal_(module.read, std=(c.num_states * d) ** -0.5)
            init.ones_(module.norm)
            init.zeros_(module.log_temperature)


@dataclass
class CsmOutput(ModelOutput):  # type: ignore[misc, unused-ignore]
    """Output of :class:`CsmModel`.

    Attributes:
        last_hidden_state: What the embedding matrix turns into logits ``[batch, pos, hidden]``.
        final_state: Final state s^K ``[batch, pos, slot, dim]``.
        past_key_values: Decoding state after the last token.
        hidden_states: s⁰ … s^K where asked for.
        energies: E of each of them ``[iteration, batch, pos]`` where asked for.
        deltas: Δ of each update ``[iteration, batch, pos]`` where asked for; NaN once a position has halted.
        halted_at: Updates made when the position halted, −1 where it did not ``[batch, pos]``.
        iterations: K, the number of iterations that were run.
    """

    last_hidden_state: Tensor | None = None
    final_state: Tensor | None = None
    past_key_values: CsmCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    energies: Tensor | None = None
    deltas: Tensor | None = None
    halted_at: Tensor | None = None
    iterations: int | None = None


class CsmModel(CsmPreTrainedModel):
    """The model without a head; see :class:`CsmForCausalLM` for the arguments of a call.

    Args:
        config: Sizes and switches.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.writer = CsmWriter(config)
        self.start = CsmStart(config)
        self.landscape = CsmLandscape(config)
        self.refine = CsmRefinement(config)
        self.reader = CsmReader(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: CsmCache | None = None,
        use_cache: bool | None = None,
        num_iterations: int | None = None,
        halt: DeltaHalt | None = None,
        initial_state: Tensor | None = None,
        grad_iterations: int | None = None,
        on_iteration: OnIteration | None = None,
        output_hidden_states: bool | None = None,
        output_energies: bool = False,
        output_deltas: bool = False,
    ) -> CsmOutput:
        """Run the model; the arguments are those of :class:`CsmForCausalLM`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids [batch, pos] or inputs_embeds [batch, pos, hidden], not both.")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        real = _real(attention_mask, embedded)
        keep = use_cache if use_cache is not None else (self.config.use_cache and not self.training)
        cache = past_key_values if past_key_values is not None else (CsmCache() if keep else None)
        if cache is not None and not isinstance(cache, CsmCache):
            raise UsageError(f"past_key_values of a CSM-style model is a CsmCache, found {type(cache).__name__}.")
        wanted: dict[str, Any] = {
            "iterations": self._depth(num_iterations),
            "halt": self._halt(halt),
            "grad_iterations": grad_iterations,
            "states": self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            "energies": output_energies,
            "deltas": output_deltas,
            "on_iteration": on_iteration,
        }
        memory, context = self.writer(embedded, real, cache)
        start = self.start(memory, _positions(embedded, real, cache)) if initial_state is None else initial_state
        if start.shape != memory.shape:
            raise UsageError(f"initial_state has shape {list(start.shape)}, the states are {list(memory.shape)}.")
        drive, gates = self.landscape(memory, context)
        if self.config.carry == "refined":
            found = self._one_by_one(start, drive, gates, real, cache, wanted)
        else:
            found = refine(self.refine, start, drive, gates, real=real, **wanted)
        if cache is not None:
            shape = embedded.shape[:2]
            cache.advance(
                shape[1], torch.ones(shape, dtype=torch.bool, device=embedded.device) if real is None else real
            )
        return CsmOutput(
            last_hidden_state=self.reader(found.state),
            final_state=found.state,
            past_key_values=cache if keep else None,
            hidden_states=tuple(found.states) or None,
            energies=torch.stack(found.energies) if found.energies else None,
            deltas=torch.stack(found.deltas) if found.deltas else None,
            halted_at=found.halted_at,
            iterations=found.iterations,
        )

    def _depth(self, asked: int | None) -> int:
        depth = self.config.num_iterations if asked is None else asked
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise UsageError(f"num_iterations is a whole number from 0 on, found {depth!r}.")
        return depth

    def _halt(self, asked: DeltaHalt | None) -> DeltaHalt | None:
        if asked is None and self.config.halt_tol is not None:
            return DeltaHalt(self.config.halt_tol, self.config.halt_patience)
        return asked

    def _one_by_one(
        self, start: Tensor, drive: Tensor, gates: Tensor, real: Tensor | None, cache: CsmCache | None,
        wanted: dict[str, Any],
    ) -> Refined:  # fmt: skip
        """Refine position by position, each from the refined state of the one before."""
        if wanted["on_iteration"] is not None and start.shape[1] > 1:
            raise UsageError(
                "on_iteration with carry='refined' would be called for every position apart; give one token at a time "
                "with past_key_values, or hook model.model.refine."
            )
        before = None if cache is None else cache.refined
        begun = torch.zeros(start.shape[0], dtype=torch.bool, device=start.device)
        if before is None:
            before = torch.zeros_like(start[:, 0])
        elif cache is not None and cache.seen is not None:
            begun = cache.seen > 0
        pieces = []
        for t in range(start.shape[1]):
            here = slice(t, t + 1)
            state = torch.where(begun[:, None, None], before, start[:, t])[:, None]
            told = None if real is None else real[:, here]
            one = refine(self.refine, state, drive[:, here], gates[:, here], real=told, **wanted)
            counts = torch.ones_like(begun) if real is None else real[:, t]
            before = torch.where(counts[:, None, None], one.state[:, 0], before)
            begun = begun | counts
            pieces.append(one)
        if cache is not None:
            cache.refined = before
        return _side_by_side(pieces)


def _side_by_side(pieces: list[Refined]) -> Refined:
    """Join runs of single positions; one that halted early stays at its last state."""
    depth = max(p.iterations for p in pieces)

    def join(name: str, length: int, still: float | None = None) -> list[Tensor]:
        rows = [list(getattr(p, name)) for p in pieces]
        if not any(rows):
            return []
        for row in rows:
            last = row[-1] if row else None
            if last is not None:
                row += [last if still is None else torch.full_like(last, still)] * (length - len(row))
        return [torch.cat([row[k] for row in rows], dim=1) for k in range(length)]

    halted = [p.halted_at for p in pieces if p.halted_at is not None]
    return Refined(
        torch.cat([p.state for p in pieces], dim=1),
        depth,
        join("states", depth + 1),
        join("energies", depth + 1),
        join("deltas", depth, float("nan")),
        torch.cat(halted, dim=1) if halted else None,
    )


def _real(attention_mask: Tensor | None, embedded: Tensor) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < embedded.shape[1]:
        raise UsageError(
            f"attention_mask is [batch, pos] with 1 at real tokens, found {list(attention_mask.shape)} for tokens "
            f"{list(embedded.shape[:2])}; with past_key_values it may also cover the earlier columns."
        )
    return attention_mask[:, attention_mask.shape[1] - embedded.shape[1] :].bool()


def _positions(embedded: Tensor, real: Tensor | None, cache: CsmCache | None) -> Tensor:
    batch, length = embedded.shape[:2]
    here = torch.ones(batch, length, dtype=torch.long, device=embedded.device) if real is None else real.long()
    counted = here.cumsum(1) - here
    return counted if cache is None else counted + cache.seen_before(batch, embedded.device)[:, None]
