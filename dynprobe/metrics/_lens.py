"""Lens trajectories beyond the logit lens: prediction depth, and affine translators read from a file.

The logit lens reads a state through the model's own tail as if it were the last one. A tuned lens first moves it,
``h + A_l·h + b_l``, with one translator per depth that was trained elsewhere; the identity translator is the logit
lens. Translators come from a safetensors file with ``{depth}.weight`` [dim, dim] and ``{depth}.bias`` [dim], the names
that public tuned lenses use; depth l is the state entering block l. The last depth has none: there the lens is the
model. A depth in the middle without a translator is refused, because half a tuned lens compares unlike things.

The prediction depth of a position is the first depth from which the lens's top token stays the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynprobe.errors import MetricError
from dynprobe.metrics._inputs import as_logits, as_trajectory
from dynprobe.metrics._output import paired_output
from dynprobe.metrics._output_metrics import close_positions
from dynprobe.metrics._registry import MetricSpec, register
from dynprobe.metrics._result import Array, Result

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Translators", "prediction_depth", "read_translators"]

_KEY = re.compile(r"^(?:(?:module|layer_translators|translators)\.)*(\d+)\.(weight|bias)$")


@dataclass(frozen=True)
class Translators:
    """One affine map per depth; none at all is the identity everywhere, the logit lens.

    Args:
        weight: Depth → A [dim, dim].
        bias: Depth → b [dim]; zero where missing.

    Example:
        >>> import torch
        >>> shift = Translators({0: torch.zeros(2, 2)}, {0: torch.tensor([1.0, 0.0])})
        >>> shift(0, torch.ones(1, 2)).tolist(), Translators()(0, torch.ones(1, 2)).tolist()
        ([[2.0, 1.0]], [[1.0, 1.0]])
    """

    weight: dict[int, torch.Tensor] = field(default_factory=dict)
    bias: dict[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of depths that are translated."""
        return len(self.weight)

    def __call__(self, depth: int, state: torch.Tensor) -> torch.Tensor:
        """Return ``h + A·h + b`` for states ``[…, dim]`` of a depth; a depth without translator is left as it is."""
        if depth not in self.weight:
            return state
        a = self.weight[depth].to(state.device, state.dtype)
        if a.shape[0] != state.shape[-1]:
            raise MetricError(f"the translator of depth {depth} has dim {a.shape[0]}, the states {state.shape[-1]}.")
        moved = state + state @ a.mT
        return moved + self.bias[depth].to(state.device, state.dtype) if depth in self.bias else moved

    def check(self, n_depths: int) -> None:
        """Refuse translators that do not fit a trajectory of so many depths, the last one being the model's output.

        Raises:
            MetricError: Some depths have a translator and others lack one, or there are more than depths.
        """
        wanted, found = set(range(n_depths - 1)), set(self.weight)
        if found and found != wanted:
            missing = sorted(wanted - found)
            wrong = ", ".join(map(str, (missing or sorted(found - wanted))[:8]))
            raise MetricError(
                f"a lens of {len(found)} translators does not fit {n_depths} depths: it needs one for each of 0 … "
                f"{n_depths - 2} and {'lacks' if missing else 'has others for'} {wrong}. Was it trained on another "
                "model?"
            )


def read_translators(path: str | Path) -> Translators:
    """Read affine translators from a safetensors file.

    Args:
        path: File with ``{depth}.weight`` [dim, dim] and ``{depth}.bias`` [dim]; a prefix ``layer_translators.`` or
            ``translators.`` is fine. Other tensors are refused.

    Returns:
        The translators.

    Raises:
        MetricError: The file cannot be read, has tensors of other names, or shapes that are no affine map.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise MetricError(f"translators {path} cannot be read as safetensors: {error}") from error
    out = Translators()
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None:
            raise MetricError(f"translators {path}: tensor {name!r} is not named DEPTH.weight or DEPTH.bias.")
        depth, kind = int(match[1]), match[2]
        if (kind == "weight" and (tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1])) or (
            kind == "bias" and tensor.ndim != 1
        ):
            raise MetricError(f"translators {path}: {name} has shape {list(tensor.shape)}; weight is [dim, dim], "
                              "bias [dim].")  # fmt: skip
        (out.weight if kind == "weight" else out.bias)[depth] = tensor
    dims = {int(t.shape[-1]) for t in tensors.values()}
    if not out.weight or set(out.bias) - set(out.weight) or len(dims) > 1:
        raise MetricError(
            f"translators {path}: every depth needs a weight and all one dim; found weights of depths "
            f"{sorted(out.weight)}, biases of {sorted(out.bias)}, dims {sorted(dims)}."
        )
    return out


def prediction_depth(differs: Float[np.ndarray, "depth ..."]) -> Float[np.ndarray, "*rows"]:
    """First depth from which the lens's top token stays the model's own.

    Args:
        differs: [depth, …], 1 where the top token at that depth differs from the model's, 0 where it agrees, NaN where
            unknown (``flip`` of :func:`~dynprobe.metrics.paired_output`).

    Returns:
        Depths […]; the number of depths where the last one still differs; NaN where any entry is.

    Example:
        >>> import numpy as np
        >>> prediction_depth(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])).tolist()
        [1.0, 3.0]
    """
    n = len(differs)
    if not n:
        return np.full(differs.shape[1:], np.nan)
    last = n - 1 - (differs[::-1] == 1).argmax(0)
    depth = np.where((differs == 1).any(0), last + 1.0, 0.0)
    return np.asarray(np.where(np.isnan(differs).any(0), np.nan, depth))


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _against_model(model: torch.Tensor, lens: torch.Tensor) -> dict[str, Array]:
    return paired_output(model.double().expand(lens.shape[0], *model.shape), lens.double())


def _compute_depth(inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str) -> Result:
    model, lens = as_logits(inputs[0], metric_id), as_logits(inputs[1], metric_id, axes=3)
    return close_positions(prediction_depth(_against_model(model, lens)["flip"]), metric_id, _dtype(lens), mask)


def _compute_kl(
    inputs: tuple[Any, ...], mask: Any, params: dict[str, Any], metric_id: str, translators: Any = None,
    readout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Result:  # fmt: skip
    model = as_logits(inputs[0], metric_id)
    states = as_trajectory(inputs[1], None, metric_id).states
    if readout is None:
        raise MetricError(
            f"{metric_id} needs readout=, a function from last-depth states [batch, pos, dim] to logits "
            "(dynprobe.readout of the subject, or the unembedding)."
        )
    lens = translators if isinstance(translators, Translators) else (
        Translators() if translators is None else read_translators(translators)
    )  # fmt: skip
    lens.check(len(states))
    logits = _read(states, lens, readout, model, metric_id)
    return close_positions(_against_model(model, logits)["kl_clean_pert"], metric_id, _dtype(model), mask)


def _read(
    states: Sequence[torch.Tensor], lens: Translators, readout: Callable[[torch.Tensor], torch.Tensor],
    model: torch.Tensor, metric_id: str,
) -> torch.Tensor:  # fmt: skip
    with torch.no_grad():
        rows = [readout(lens(depth, state)).detach().cpu().reshape(-1, model.shape[-1])
                for depth, state in enumerate(states)]  # fmt: skip
    if any(r.shape != model.shape for r in rows):
        raise MetricError(f"{metric_id}: the readout gave logits {list(rows[0].shape)}, the model's are "
                          f"{list(model.shape)}.")  # fmt: skip
    return torch.stack(rows)


register(
    MetricSpec(
        id="lens.prediction_depth/1",
        sentence="First depth from which the lens's most probable token stays the model's own.",
        formula=(
            "min{l: argmax lens_{l'} = argmax model for all l' ≥ l}, l 0-based on the given depths, D if the last one "
            "differs; ties to the lower id; value = mean over positions"
        ),
        latex=(
            r"\operatorname*{mean}_{\mathrm{pos}}\ "
            r"\min\bigl\{\,l : \arg\max\mathrm{lens}_{l'} = \arg\max\mathrm{model}\ \ \forall\, l'\ge l\,\bigr\}"
        ),
        input="logits[pos,vocab], logits[depth,pos,vocab]",
        value_range="[0, D]",
        unit="depths",
        invariances=frozenset({"shift"}),
        source="Baldock et al. 2021; tuned lens (arXiv 2303.08112)",
        column="prediction_depth",
        levels={"token": "per position"},
        vectors=("lens = model at every depth → 0", "top tokens b,a,b,a,a of a model's a → 3", "b at the last → D"),
        groups=frozenset({"optional"}),
    ),
    _compute_depth,
    arity=2,
)
register(
    MetricSpec(
        id="lens.tuned_kl/1",
        sentence="KL divergence of the tuned-lens distribution at each depth from the model's own.",
        formula=(
            "lens_l = readout(h_l + A_l·h_l + b_l), A, b given; the last depth untranslated; KL(model ‖ lens) per "
            "depth and position; profile = mean over positions, value = mean over depths; A = b = 0 is lens.kl/1"
        ),
        latex=(
            r"\mathrm{lens}_l = \operatorname{readout}(h_l+A_l h_l+b_l), \qquad "
            r"\operatorname*{mean}_{l}\ \operatorname*{mean}_{\mathrm{pos}}\ "
            r"\mathrm{KL}(\mathrm{model}\,\Vert\,\mathrm{lens}_l)"
        ),
        input="logits[pos,vocab], trajectory[depth,pos,dim]; translators=, readout=",
        value_range="[0, ∞)",
        unit="nat",
        invariances=frozenset(),
        source="Belrose et al. 2023 (arXiv 2303.08112)",
        column="lens_tuned_kl",
        vectors=("A = b = 0 → lens.kl/1", "A = −I, b = h_L → 0"),
        groups=frozenset({"optional"}),
    ),
    _compute_kl,
    arity=2,
)
