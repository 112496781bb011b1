"""Whether states are better kept by reference or copied into a ring: both over the bare forward, interleaved.

python benchmarks/ring.py [--rounds 9] [--model smollm2-135m] [--device auto]
"""

from __future__ import annotations

import argparse

import torch

import dynprobe as dp
from dynprobe.probes import Instrument, Where, sites_to_read
from dynprobe.probes._ring import Ring
from dynprobe.protocols._bench_timing import interleaved, machine


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    subject = dp.load(args.model, device=args.device)
    sites = sites_to_read(subject, Where.parse("layers=all"))
    ring = Ring(sites)
    print(machine())
    print("| batch | arm | ratio to the bare forward (quartiles) |\n|---|---|---|")
    for rows, width in ((8, 64), (1, 16)):
        ids = torch.randint(5, 200, (rows, width), generator=torch.Generator().manual_seed(0)).to(subject.device)

        def forward(ids: torch.Tensor = ids) -> None:
            subject.model(input_ids=ids, use_cache=False).logits.flatten()[-1].item()  # a device is done when it came

        def read(into: Ring | None, ids: torch.Tensor = ids) -> None:
            if into is not None:
                into.begin(*ids.shape)
            with Instrument(subject, sites, row_keys=[str(i) for i in range(len(ids))], ring=into) as instrument:
                forward(ids)
            instrument.tape()
            if into is not None:
                into.end()

        with torch.no_grad():
            found = interleaved(
                forward, {"reference": lambda: read(None), "ring": lambda: read(ring)}, rounds=args.rounds, warmup=1
            )
        for name in ("reference", "ring"):
            median, low, high = found[name]
            print(f"| {rows} × {width} | {name} | {median:.3f} ({low:.3f} – {high:.3f}) |")


if __name__ == "__main__":
    main()
