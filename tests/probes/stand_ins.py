"""Stand-ins for two looped models whose own code needs the hub: small, random, written to what is published of them.

They are no ports. What an adapter touches is as in the authors' code (names of modules and settings, what is called how
often with what, what is fed back, where the state begins and where it goes); everything else is as small as it can be.

- :class:`Huginn` (recurrent depth, arXiv:2502.05171): a prelude makes ``e``; the state begins as noise; an adapter
  takes ``[x ; e]`` into the blocks of ``core_block``, again and again; ``ln_f``, coda, ``ln_f``, head. No attention
  mask, positions are columns; the number of steps is a setting or is given at call time.
- :class:`Ouro` (looped language model, arXiv:2510.25741): all layers and the final norm ``total_ut_steps`` times, the
  normed state fed back, and a gate that says after each step how probable it is to stop there.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH, HEADS, VOCAB = 32, 4, 60


class Attention(nn.Module):
    """Causal attention with rotated queries and keys; ``mask`` marks the real tokens, or is None."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = rotated(q, positions), rotated(k, positions)
        n = x.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if mask is not None:  # a token always sees itself: a row of padding has nothing else
            seen = (seen & mask.bool()[:, None, None, :]) | torch.eye(n, dtype=torch.bool)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(out.transpose(1, 2).flatten(2))


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions ``[batch or 1, pos]`` on ``[batch, head, pos, dim]``."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None] / 100.0 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 48, bias=False), nn.SiLU(), nn.Linear(48, WIDTH, bias=False))


class HuginnConfig(PretrainedConfig):
    model_type = "huginn_raven"

    def __init__(self, mean_recurrence: int = 5, n_layers_in_recurrent_block: int = 2, **kwargs: Any) -> None:
        self.vocab_size, self.n_embd = VOCAB, WIDTH
        self.mean_recurrence, self.n_layers_in_recurrent_block = mean_recurrence, n_layers_in_recurrent_block
        self.init_values = {"std": math.sqrt(2 / (5 * WIDTH)), "embed_scale": math.sqrt(WIDTH)}
        self.test_time_noise = 0.0
        super().__init__(**kwargs)


class Sandwich(nn.Module):
    """A block with a norm on each side of both of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), mlp()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = self.norms[1](self.attn(self.norms[0](x), positions) + x)
        return self.norms[3](self.mlp(self.norms[2](x)) + x)


class Huginn(PreTrainedModel):
    config_class = HuginnConfig

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__(config)
        parts = {"wte": nn.Embedding(VOCAB, WIDTH), "adapter": nn.Linear(2 * WIDTH, WIDTH), "ln_f": nn.RMSNorm(WIDTH)}
        for name, n in (("prelude", 1), ("core_block", config.n_layers_in_recurrent_block), ("coda", 1)):
            parts[name] = nn.ModuleList(Sandwich() for _ in range(n))
        self.transformer = nn.ModuleDict(parts)
        self.emb_scale = config.init_values["embed_scale"]
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def initialize_state(self, embeds: Tensor) -> Tensor:
        std = self.config.init_values["std"]
        x = nn.init.trunc_normal_(torch.empty_like(embeds), std=std, a=-3 * std, b=3 * std)
        return x * self.emb_scale

    def forward(
        self, input_ids: Tensor, input_states: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, num_steps: int | None = None, use_cache: bool = False,
    ) -> CausalLMOutput:  # fmt: skip
        positions = torch.arange(input_ids.shape[1])[None]
        if position_ids is not None:  # as there: one row of positions for the whole batch, and nothing else
            positions = positions.index_select(1, position_ids.squeeze())
        e = self.transformer.wte(input_ids) * self.emb_scale
        for block in self.transformer.prelude:
            e = block(e, positions)
        x = self.initialize_state(e) if input_states is None else input_states.clone()
        for _ in range(self.config.mean_recurrence if num_steps is None else num_steps):
            x = self.transformer.adapter(torch.cat([x, e], dim=-1))
            for block in self.transformer.core_block:
                x = block(x, positions)
        x = self.transformer.ln_f(x)
        for block in self.transformer.coda:
            x = block(x, positions)
        return CausalLMOutput(logits=self.lm_head(self.transformer.ln_f(x)).float())


class OuroConfig(PretrainedConfig):
    model_type = "ouro"

    def __init__(self, total_ut_steps: int = 4, num_hidden_layers: int = 2, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size = VOCAB, WIDTH
        self.total_ut_steps, self.num_hidden_layers = total_ut_steps, num_hidden_layers
        super().__init__(**kwargs)


class OuroLayer(nn.Module):
    """A layer with a norm on each side of both of its parts, and a residual stream beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), mlp()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))

    def forward(self, hidden_states: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        h = hidden_states
        h = h + self.norms[1](self.self_attn(self.norms[0](h), positions, mask))
        return h + self.norms[3](self.mlp(self.norms[2](h)))


class OuroModel(PreTrainedModel):
    config_class = OuroConfig

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.embed_tokens, self.norm = nn.Embedding(VOCAB, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(OuroLayer() for _ in range(config.num_hidden_layers))
        self.early_exit_gate = nn.Linear(WIDTH, 1)
        self.total_ut_steps = config.total_ut_steps
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Any:
        positions = position_ids if position_ids is not None else torch.arange(input_ids.shape[1])[None]
        h, states, gates = self.embed_tokens(input_ids), [], []
        for _ in range(self.total_ut_steps):
            for layer in self.layers:
                h = layer(h, positions, attention_mask)
            h = self.norm(h)
            states.append(h)
            gates.append(self.early_exit_gate(h))
        return h, states, gates


class Ouro(PreTrainedModel):
    config_class = OuroConfig
    base_model_prefix = "model"

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.early_exit_step: int | None = None
        self.early_exit_threshold: float | None = None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        use_cache: bool = False, exit_threshold: float | None = None,
    ) -> CausalLMOutput:  # fmt: skip
        last, states, gates = self.model(input_ids, attention_mask, position_ids)
        exit_threshold = self.early_exit_threshold if exit_threshold is None else exit_threshold
        if self.early_exit_step is not None:
            last = states[self.early_exit_step]
        elif exit_threshold is not None:  # each position leaves where enough probability of stopping has gathered
            left, stop = torch.ones_like(gates[0]), []
            for gate in gates[:-1]:
                stop.append(left * torch.sigmoid(gate))
                left = left - stop[-1]
            gathered = torch.stack([*stop, left]).cumsum(0) >= exit_threshold
            step = gathered.int().argmax(0)
            last = torch.stack(states).gather(0, step.expand(-1, -1, WIDTH)[None])[0]
        return CausalLMOutput(logits=self.lm_head(last))


def build(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> Any:
    """A model with weights large enough that every part moves the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
    return model
