"""The cells of a panel: which runs there are, under which names, with which settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynprobe.prompts import Prompt
from dynprobe.protocols._config import RunConfig
from dynprobe.protocols._panel_config import PanelConfig
from dynprobe.protocols._prompts import choose_prompts

__all__ = ["Cell", "cells_of", "prompts_of"]


@dataclass(frozen=True)
class Cell:
    """One run of a panel.

    Attributes:
        model: Name of the model in tables.
        seed: Seed.
        temperature: Temperature.
        max_new_tokens: Token budget.
        alpha: Strength.
    """

    model: str
    seed: int
    temperature: float
    max_new_tokens: int
    alpha: float

    @property
    def key(self) -> str:
        """Its name.

        Example:
            >>> Cell("tiny-llama", 0, 0.0, 32, 0.1).key
            'tiny-llama|seed=0|temperature=0|max_new_tokens=32|alpha=0.1'
        """
        return (
            f"{self.model}|seed={self.seed}|temperature={_short(self.temperature)}"
            f"|max_new_tokens={self.max_new_tokens}|alpha={_short(self.alpha)}"
        )

    def settings(self, config: PanelConfig) -> dict[str, Any]:
        """Return the settings of its run."""
        found: dict[str, Any] = {**config.settings, "seed": self.seed, "metrics": config.metrics}
        if self.alpha:
            found["perturb"] = f"alpha={self.alpha!r},{config.perturb}"
        if config.protocol == "iterate":
            return {**found, "iterations": config.iterations}
        return {**found, "temperature": self.temperature, "max_new_tokens": self.max_new_tokens}


def cells_of(config: PanelConfig) -> tuple[list[Cell], int]:
    """Return the cells, all of one model together, and how many seeds were left out as copies.

    Where nothing is drawn (no perturbation, greedy text, or no text at all) a second seed is the first run again; it is
    left out.
    """
    cells, copies = [], 0
    for entry in config.models:
        for tokens in config.max_new_tokens:
            for temperature in config.temperatures:
                for alpha in config.alphas:
                    drawn = alpha > 0 or (temperature > 0 and tokens > 0 and config.protocol == "run")
                    seeds = config.seeds if drawn else config.seeds[:1]
                    copies += len(config.seeds) - len(seeds)
                    cells += [Cell(entry.name, seed, temperature, tokens, alpha) for seed in seeds]
    return cells, copies


def prompts_of(config: PanelConfig) -> list[Prompt]:
    """Return the prompts that every cell reads.

    Raises:
        PromptError: None is left, or a category is not there.
    """
    chosen: Sequence[Prompt] = choose_prompts(RunConfig.build(prompts=config.prompts, category=config.categories))
    if config.prompts_per_category is None:
        return list(chosen)
    seen: Counter[str | None] = Counter()
    kept = []
    for prompt in chosen:
        seen[prompt.category] += 1
        if seen[prompt.category] <= config.prompts_per_category:
            kept.append(prompt)
    return kept


def _short(number: float) -> str:
    """A number without loss, and without a point where it is whole."""
    return str(int(number)) if number == int(number) else repr(number)
