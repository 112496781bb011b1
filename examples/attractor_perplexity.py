"""What an attractor layer costs on texts that are given: perplexity bare, under the layer, under the historical layer.

python examples/attractor_perplexity.py [--model smollm2-135m] [--limit 16] [--strengths 0.05 0.5 1 3 6.18 14.8]

Each text is a passage that comes with the package, read in one forward from an empty memory; the loss counts from the
end of burn-in on. Printed is the change of perplexity in per cent with its interval over texts, for the layer at
several strengths (0.05 is the default) and the historical layer with and without its cache defect. In one forward
nothing is cached that a later forward could meet, so there the two are one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

import dynprobe as dp
from dynprobe.controllers.attractor import duality_phase2
from dynprobe.metrics.statistics import paired_difference
from dynprobe.probes import Subject, logits_of
from dynprobe.prompts import passages


def losses(
    subject: Subject, texts: list[torch.Tensor], under: Callable[[], AbstractContextManager], skip: int
) -> list[float]:
    """Mean NLL of each text after its first ``skip`` tokens, nats; what is on the model is put on anew for each."""
    out = []
    for ids in texts:
        with under(), torch.no_grad():
            scores = logits_of(subject.model(ids[None], use_cache=False))[0, :-1].float().log_softmax(-1)
            nll = -scores.gather(1, ids[1:, None])[:, 0]
            out.append(float(nll[skip:].mean()))
    return out


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.05, 0.5, 1.0, 3.0, 6.18, 14.8])
    args = parser.parse_args()
    subject = dp.load(args.model)
    texts = [
        torch.tensor(subject.tokenizer(prompt.text + (prompt.continuation or ""))["input_ids"])
        for prompt in passages(limit=args.limit)
    ]
    layers, skip = [subject.n_layers // 2], dp.AttractorLayer().settings.burn_in
    bare = losses(subject, texts, nullcontext, skip)
    mean = sum(bare) / len(bare)
    print(f"{subject.name}, {len(texts)} texts, block {layers[0]}; bare perplexity {torch.tensor(mean).exp():.3f}")
    print("| under | perplexity, change in % | interval |\n|---|---|---|")

    def line(name: str, under: Callable[[], AbstractContextManager]) -> None:
        change = paired_difference(losses(subject, texts, under, skip), bare)
        value, low, high = (100 * (torch.tensor(x).exp() - 1) for x in (change.value, change.low, change.high))
        print(f"| {name} | {value:+.2f} | {low:+.2f} … {high:+.2f} |", flush=True)

    for strength in args.strengths:
        layer = dp.AttractorLayer(strength=strength)
        line(f"layer, ε = {strength:g}", partial(layer.attach, subject, layers=layers))
    for leak in (False, True):
        line("historical" + (", cache defect" if leak else ""), partial(duality_phase2, subject, leak=leak))


if __name__ == "__main__":
    main()
