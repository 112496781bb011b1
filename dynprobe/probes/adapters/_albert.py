"""ALBERT: shared layers."""

from __future__ import annotations

from typing import Any

from dynprobe.probes._turns import Loop

__all__ = ["albert"]


def albert(model: Any) -> Loop:
    """ALBERT: each group of layers runs ``num_hidden_layers / num_hidden_groups`` times."""
    paths = [n for n, m in model.named_modules() if type(m).__name__ == "AlbertLayerGroup"]

    def choose(one: Any, T: int) -> None:
        one.config.num_hidden_layers = T * len(paths)

    return Loop(
        tuple((path, "core", i if len(paths) > 1 else -1) for i, path in enumerate(paths)), track="resid",
        iterations=lambda m: m.config.num_hidden_layers // len(paths), set_iterations=choose,
    )  # fmt: skip
