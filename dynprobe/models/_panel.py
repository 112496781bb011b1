"""The controlled panel: architectures, depths and widths with everything else held equal.

A claim about depth, width or architecture needs models that differ in that alone. Those of the panel are Llamas, CEMs
and CSM-style models of every depth and width of a grid, in two seeds, trained on the same bytes in the same order for
the same number of steps. The narrowest of them come with the package as ``panel/FAMILY-depthD-widthW-seedS``;
``examples/train_panel.py`` makes the rest. Their random-initialised twins need no weights: ``--controls twin`` draws
them.

They are a tenth to four tenths of a megabyte each. What holds across the panel holds for models of that size.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from dynprobe.errors import ModelError
from dynprobe.models._zoo import zoo_folder

__all__ = ["PanelModel", "panel_models"]


@dataclass(frozen=True)
class PanelModel:
    """One cell of the panel in one seed.

    Attributes:
        name: What ``--model`` and :func:`dynprobe.load` take.
        family: ``llama``, ``cem`` or ``csm``.
        depth: Layers; for ``csm`` the same number stands for four times as many trained iterations.
        width: Width of the residual stream, and twice that of a state vector.
        seed: Seed of the initial weights and of the order of the text.
        parameters: Number of weights.
        test_nll: Nats per byte on held-out text.
    """

    name: str
    family: str
    depth: int
    width: int
    seed: int
    parameters: int
    test_nll: float


@functools.cache
def panel_models() -> tuple[PanelModel, ...]:
    r"""Return the models of the panel that come with the package, by family, depth, width and seed.

    Raises:
        ModelError: Their list is not there or damaged: the package was installed without its data.

    Example:
        >>> from dynprobe.models import panel_models
        >>> first = panel_models()[0]
        >>> first.name, first.family, first.depth, first.width, first.seed
        ('panel/cem-depth1-width32-seed0', 'cem', 1, 32, 0)
    """
    path = zoo_folder("panel") / "panel.json"
    try:
        table = [PanelModel(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"the list of the panel's models, {path}, cannot be read: {error}. The installation is incomplete. Type: "
            "pip install --force-reinstall --no-deps dynprobe, or remake the panel with examples/train_panel.py"
        ) from error
    return tuple(sorted(table, key=lambda cell: (cell.family, cell.depth, cell.width, cell.seed)))
