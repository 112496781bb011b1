"""Tiny random models of many architectures and modules of a user's own making; built once, without a network."""

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from dynprobe.probes import Subject, discover

VOCAB, LAYERS, DIM = 100, 3, 32
ROWS = [[5, 6, 7, 8, 9, 10, 11], [11, 12, 13], [3, 9, 27, 81, 44]]

_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {"num_hidden_layers": LAYERS, "hidden_size": DIM, "num_attention_heads": 4, "initializer_range": 0.2} | _IDS
_OLD = {"n_layer": LAYERS, "n_embd": DIM, "n_head": 4, "initializer_range": 0.2} | _IDS
_LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2} | _WIDE

#: name → (model class, config class, settings)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _OLD),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": DIM, "init_std": 0.2} | _WIDE),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"intermediate_size": 64} | _WIDE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LLAMA),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"num_hidden_layers": LAYERS, "hidden_size": DIM} | _IDS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8} | _LLAMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8} | _LLAMA),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": DIM} | _OLD),
    "phi": ("PhiForCausalLM", "PhiConfig", {"intermediate_size": 64} | _WIDE),
    "falcon": ("FalconForCausalLM", "FalconConfig", _WIDE),
    "rwkv": (
        "RwkvForCausalLM", "RwkvConfig",
        {"num_hidden_layers": LAYERS, "hidden_size": DIM, "attention_hidden_size": DIM} | _IDS,
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4} | _LLAMA),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {"rotary_dim": 4} | _OLD),
}  # fmt: skip
NAMES = tuple(ARCHITECTURES)
#: A block that ran before padding was seen remembers it: rows must share a length.
IGNORES_MASK = ("rwkv",)
#: attn_out + mlp_out is what a block adds.
TWO_UPDATES = tuple(n for n in NAMES if n not in ("rwkv", "mamba"))
#: The MLP reads the state after attention.
SEQUENTIAL = ("gpt2", "llama", "opt", "qwen2", "mixtral", "gemma2", "gemma3", "bloom", "mistral")


def build(name: str, **changes: Any) -> Any:
    """A new model of an architecture."""
    model_class, config_class, settings = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**settings | changes)
        return getattr(transformers, model_class)(config).eval()


@cache
def subject(name: str) -> Subject:
    """The shared subject of an architecture; tests leave it as they found it."""
    return discover(build(name), name=name)


Pair = namedtuple("Pair", ["aux", "hidden"])

#: How a block may hand out its state; the other tensors in it must not be taken for it.
CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, torch.ones(3), None),
    "list": lambda h: [torch.zeros(2, dtype=torch.long), h],
    "dict": lambda h: {"aux": torch.ones(3), "hidden_states": h},
    "model_output": lambda h: BaseModelOutput(last_hidden_state=h),
    "named_tuple": lambda h: Pair(torch.arange(4), h),
}


def open_container(kind: str, output: Any) -> Tensor:
    """What a user's own model takes out of its block's output."""
    take = {"tensor": None, "tuple": 0, "list": 1, "dict": "hidden_states", "model_output": "last_hidden_state"}
    if kind == "named_tuple":
        return output.hidden
    return output if take[kind] is None else output[take[kind]]


class Mixer(nn.Module):
    """Mean over the positions so far: the simplest thing that carries information forward and never back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.proj(x.cumsum(1) / counts)


class Block(nn.Module):
    """h + attn(h) + mlp(h + attn(h)), handed out in a container, in place if so asked."""

    def __init__(self, dim: int = 16, kind: str = "tensor", in_place: bool = False) -> None:
        super().__init__()
        self.attn, self.mlp = Mixer(dim), nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, dim))
        self.kind, self.in_place = kind, in_place

    def forward(self, x: Tensor) -> Any:
        if self.in_place:
            x += self.attn(x)
            x += self.mlp(x)
        else:
            x = x + self.attn(x)
            x = x + self.mlp(x)
        return CONTAINERS[self.kind](x)


class Net(nn.Module):
    """A user's own language model: an embedding, blocks under a name of his choice, a head."""

    def __init__(self, blocks: int = 3, dim: int = 16, kind: str = "tensor", in_place: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(VOCAB, dim)
        self.stack = nn.ModuleDict({f"stage{i}": Block(dim, kind, in_place) for i in range(blocks)})
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for block in self.stack.values():
            h = open_container(self.kind, block(h))
        return self.head(self.norm(h))


class Looped(nn.Module):
    """One shared block, run several times, as ALBERT does."""

    def __init__(self, loops: int = 4, dim: int = 16) -> None:
        super().__init__()
        self.embed, self.groups, self.loops = nn.Embedding(VOCAB, dim), nn.ModuleList([Block(dim)]), loops

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for _ in range(self.loops):
            h = self.groups[0](h)
        return h


def seeded(make: Callable[[], nn.Module]) -> Any:
    """A module with weights that are the same in every test run, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()
