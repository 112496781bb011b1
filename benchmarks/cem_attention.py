"""B12: CEM attention at T = 1 beside Llama attention of the same width, and training beside a Llama of the same width.

python benchmarks/cem_attention.py [--rounds 40] [--train-rounds 12] [--sizes 86m 162m] [--train-sizes nano tiny 86m]

Attention is one sub-layer of a block (norm, projections, attention, output), forward without gradient, on the same
states; Llama's is that of transformers with PyTorch's fused kernel. CEM's is timed as B12 words it (preconditioner
folded into the output weights, one step), with rotary positions and no diagonal, and with what the presets add: ALiBi
with a self/cross bias, and the diagonal, whose exact update needs explicit attention weights where the fused kernel
gives none. The budget is held against every arm.

Training is forward, backward and a step of AdamW on the same ids; the models have the same width, layers, heads, MLP
width and vocabulary, so that CEM has fewer weights (its pairs are tied). Everything is interleaved in one process; a
ratio is that of times, the median over rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from dynprobe.models import CemConfig, CemForCausalLM
from dynprobe.protocols._bench_timing import interleaved, machine, waiter

BUDGET, TRAIN_BUDGET = 1.1, 1.25
#: What CEM attention is timed with: the arm of B12 first, then what the published layer has besides.
ATTENTION: dict[str, dict[str, Any]] = {
    "folded, RoPE": {"position": "rope", "diagonal": "none", "self_bias": False},
    "folded, ALiBi and self/cross bias": {"diagonal": "none"},
    "folded, ALiBi, diagonal in the logits alone (Algorithm 1 to the letter)": {"diag_in_update": False},
    "folded, ALiBi, diagonal with its exact update (preset)": {},
    "no preconditioner, RoPE": {
        "position": "rope", "diagonal": "none", "self_bias": False, "preconditioner": "none",
    },
}  # fmt: skip
TRAINED: dict[str, dict[str, Any]] = {
    "tied pairs alone, RoPE": ATTENTION["no preconditioner, RoPE"],
    "folded preconditioner, RoPE": ATTENTION["folded, RoPE"],
    "preset": {},
}


def llama_config(config: CemConfig) -> Any:
    """A Llama of the same width, depth, heads, MLP and vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip


def cem_config(size: str, **changes: Any) -> CemConfig:
    """A preset with one step in both recursions."""
    return CemConfig.preset(size, steps_attention=1, steps_mlp=1, **changes)


def llama_attention(config: CemConfig, states: torch.Tensor) -> Callable[[], object]:
    """The update that Llama's attention makes: norm, attention, output."""
    from transformers import LlamaForCausalLM

    settings = llama_config(config)
    settings.num_hidden_layers = 1
    model = LlamaForCausalLM(settings).eval().to(states.device, states.dtype).model
    layer, positions = model.layers[0], torch.arange(states.shape[1], device=states.device)[None]
    angles = model.rotary_emb(states, positions)
    if settings._attn_implementation != "sdpa":
        raise SystemExit(f"Llama runs {settings._attn_implementation} attention; the baseline is the fused kernel")

    def run() -> object:
        with torch.inference_mode():
            return layer.self_attn(layer.input_layernorm(states), position_embeddings=angles, attention_mask=None)[0]

    return run


def cem_attention(config: CemConfig, states: torch.Tensor) -> Callable[[], object]:
    """The update that CEM's attention makes in one step."""
    from dynprobe.models._cem_frame import Frame

    config.num_hidden_layers = 1
    sublayer = CemForCausalLM(config).eval().to(states.device, states.dtype).model.layers[0].self_attn
    n = states.shape[1]
    positions = torch.arange(n, device=states.device)[None]
    frame = Frame(n, n, None, positions, states.dtype, states.device, steps={"attention": 1, "mlp": 1})

    def run() -> object:
        with torch.inference_mode():
            return sublayer(states, frame)

    return run


def training(model: Any, ids: torch.Tensor, decay: list[dict[str, Any]] | None = None) -> Callable[[], object]:
    """One optimizer step on the same ids."""
    model.train()
    optimizer = torch.optim.AdamW(decay or model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-9, foreach=True)

    def run() -> object:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return None

    return run


def verdict(ratio: float, budget: float) -> str:
    """The budget and whether it is met."""
    return f"≤ {budget:g}: {'met' if ratio <= budget else 'MISSED'}"


def attention_table(
    sizes: list[str], batch: int, length: int, rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Print B12."""
    print("| B12: attention, forward | batch | arm | Llama | CEM / Llama (quartiles) | budget |")
    print("|---|---|---|---|---|---|")
    for size in sizes:
        width = cem_config(size).hidden_size
        states = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
        states = states.to(device, dtype)
        arms = {name: cem_attention(cem_config(size, **changes), states) for name, changes in ATTENTION.items()}
        found = interleaved(llama_attention(cem_config(size), states), arms, rounds=rounds, wait=waiter(states.device))
        bare = found.pop("baseline")[0]
        for name, (ratio, low, high) in found.items():
            print(
                f"| D = {width}, {cem_config(size).num_attention_heads} heads | {batch} × {length} | {name} | "
                f"{1000 * bare:.2f} ms | {ratio:.3f} ({low:.3f} – {high:.3f}) | {verdict(ratio, BUDGET)} |",
                flush=True,
            )


def training_table(sizes: list[str], batch: int, length: int, rounds: int) -> None:
    """Print the training throughput."""
    from transformers import LlamaForCausalLM

    print(
        "\n| training, T = 1 | batch | arm | weights: CEM, Llama | Llama, tokens/s | CEM / Llama (quartiles) | budget |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        plain = cem_config(size)
        ids = torch.randint(3, plain.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
        llama = LlamaForCausalLM(llama_config(plain))
        models = {name: CemForCausalLM(cem_config(size, **changes)) for name, changes in TRAINED.items()}
        arms = {name: training(model, ids, model.decay_groups()) for name, model in models.items()}
        found = interleaved(training(llama, ids), arms, rounds=rounds)
        bare = found.pop("baseline")[0]
        for name, (ratio, low, high) in found.items():
            weights = ", ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f}M" for m in (models[name], llama))
            print(
                f"| {size} (D = {plain.hidden_size}, {plain.num_hidden_layers} layers) | {batch} × {length} | {name} | "
                f"{weights} | {batch * length / bare:,.0f} | {ratio:.3f} ({low:.3f} – {high:.3f}) | "
                f"{verdict(ratio, TRAIN_BUDGET)} |",
                flush=True,
            )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--train-rounds", type=int, default=12)
    parser.add_argument("--sizes", nargs="*", default=["86m", "162m"], help="presets of the attention table")
    parser.add_argument("--train-sizes", nargs="*", default=["nano", "tiny", "86m"], help="presets that are trained")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    print(machine())
    if args.sizes:
        attention_table(args.sizes, args.batch, args.length, args.rounds)
    if args.train_sizes:
        training_table(args.train_sizes, args.batch, args.length, args.train_rounds)


if __name__ == "__main__":
    main()
