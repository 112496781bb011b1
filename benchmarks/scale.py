"""What 10⁶ prompts on a model of 70 billion weights would cost on N GPUs: a plan, by what ``dynprobe plan`` counts.

    python benchmarks/scale.py [--prompt-tokens 128] [--new-tokens 32] [--rows 32] [--gpus 4 16 64]

Nothing here is measured on a GPU. Counts of rows, tokens and bytes come from the plan itself; speeds are assumptions,
each named below with its source, and the tables' bytes per row are the plan's, which ``benchmarks/cost.py`` fitted.
"""

from __future__ import annotations

import argparse

from dynprobe.protocols._plan import BYTES_PER_DEPTH_ROW, estimate, plan_batches

LAYERS, DIM, VOCAB, WEIGHTS = 80, 8192, 128256, 70e9
PROMPTS, SAMPLE = 10**6, 1024
#: Reference C.3: sustained arithmetic in prefill, and bandwidth of the GPU's memory.
FLOPS, BANDWIDTH = 400e12, 3.35e12
#: bf16 weights on GPUs of 80 GB, with room for states, keys and values.
GPUS_PER_MODEL, ITEMSIZE = 4, 2
#: One core writes states at this speed (measured: benchmarks/states.py), and a GPU has this many cores beside it.
STATES_PER_CORE, CORES_PER_GPU = 375e6, 8


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--overhead", type=float, default=1.2, help="metrics over the bare forward")
    parser.add_argument("--bytes-per-depth-row", type=float, default=BYTES_PER_DEPTH_ROW)
    parser.add_argument("--gpus", type=int, nargs="*", default=[4, 16, 64])
    args = parser.parse_args()
    lengths = [args.prompt_tokens] * SAMPLE
    shape = {"max_new_tokens": args.new_tokens, "n_layers": LAYERS, "dim": DIM, "vocab": VOCAB}
    auto = plan_batches(lengths, **shape)
    batches = plan_batches(lengths, **shape, batch_size=args.rows)
    cost = estimate(
        lengths, batches, **shape, num_samples=1, forced_arms=3, free_arms=2, state_sites=LAYERS + 1, itemsize=ITEMSIZE
    )
    times = PROMPTS / SAMPLE
    decoded = args.new_tokens * 2 * PROMPTS
    forward = cost.forward_tokens * times - decoded
    steps = decoded / args.rows
    reading = ITEMSIZE * WEIGHTS / BANDWIDTH  # seconds of one GPU's bandwidth
    prefill_h = args.overhead * forward * 2 * WEIGHTS / FLOPS / 3600
    decode_h = args.overhead * steps * reading / 3600
    tables = cost.depth_rows * times * args.bytes_per_depth_row
    states = cost.state_bytes * times
    print(f"rows of a batch: {len(auto[-1])} by --batch-size auto, {args.rows} here")
    print(f"a batch of {args.rows}: {cost.memory_bytes / 2**30:.1f} GiB of states and logits (float32, twice)")
    print(f"forward tokens {forward:.3g}, decode steps {steps:.3g}; depth rows {cost.depth_rows * times:.3g}")
    print(f"GPU hours: forced arms and prefill {prefill_h:.0f}, decoding {decode_h:.0f}")
    print(f"tables {tables / 1e12:.2f} TB; states {states / 1e12:.0f} TB")
    print("| GPUs | copies of the model | days, metrics only | tables, MB/s | days, states too | states, GB/s needed |")
    print("|---|---|---|---|---|---|")
    for n in args.gpus:
        days = (prefill_h + decode_h) / n / 24
        disk = states / (n * CORES_PER_GPU * STATES_PER_CORE) / 86400
        print(
            f"| {n} | {n // GPUS_PER_MODEL} | {days:.2f} | {tables / days / 86400 / 1e6:.0f} | {max(days, disk):.2f}"
            f"{' (disk-bound)' if disk > days else ''} | {states / days / 86400 / 1e9:.1f} |"
        )


if __name__ == "__main__":
    main()
