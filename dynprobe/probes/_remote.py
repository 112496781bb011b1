"""Measure a model where it lives: one nnsight session, sent to NDIF or run here, from which only small grids come back.

A model of 70 or 400 billion parameters is read on the service that hosts it. What is sent is the source of
:mod:`dynprobe.metrics._sent` with token ids, targets and the vectors to add; what comes back are norms, angles and
read-outs, from which :func:`dynprobe.metrics.measure_terms` makes the metrics of a run. The arms of a batch (clean, the
same with α = 0, perturbed) are one session: one place in the queue.

Where it runs is one word: ``False`` here, through the same block; ``"local"`` here, after nnsight has serialised the
block and read it back with the modules of this machine hidden, a dry run of the remote road; ``True`` on NDIF; a URL on
a server of one's own. What is looked at before anything is sent stands in :mod:`dynprobe.probes._server`.

The service's answer is read with ``weights_only=True``: it holds tensors, numbers and words, so nothing that is
unpickled here can run.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError, UsageError
from dynprobe.metrics import _sent
from dynprobe.probes._backend import require_nnsight
from dynprobe.probes._draw import law_of
from dynprobe.probes._inputs import Batch
from dynprobe.probes._noise import gaussian_rows
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._server import hidden, with_login

__all__ = ["block_path_of", "pushes_of", "remote_terms", "traced_model"]

#: Seconds between two looks at a job.
_PATIENCE = 2.0
#: Looks in a row that may fail.
_TRIES = 5
#: Seconds for which a service may not know a job that it took. (A job that waits or runs may take its time.)
_LOST_SECONDS = 180.0


def traced_model(model: str | nn.Module, revision: str | None = None) -> Any:
    """Return nnsight's wrapper of a model: of a module as it is, of a hub id without its weights.

    Raises:
        UsageError: If nnsight is not installed.
        ModelNotFoundError: If the hub has no such model, or cannot be asked.
    """
    require_nnsight("--remote")
    from nnsight import TransformersModel
    from nnsight.modeling.mixins.remotable import Remotable

    if isinstance(model, nn.Module):
        return Remotable(model)
    try:
        return TransformersModel(model, revision=revision)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{model!r} was asked for; its config and tokenizer are read from the hub, and that failed: {first[:200]}"
        ) from error


def block_path_of(model: nn.Module) -> str:
    """Return where the list of blocks of a decoder is, from its modules alone: a model without weights cannot be tried.

    Raises:
        ModelError: If there is no list of blocks, or two of them could be it.

    Example:
        >>> from dynprobe.testing import tiny_llama
        >>> block_path_of(tiny_llama().model)
        'model.layers'
    """
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    outer = {name: n for name, n in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    longest = max(outer.values(), default=0)
    found = [name for name, n in outer.items() if 2 * n >= longest]
    if len(found) != 1:
        what = "no list of blocks" if not found else f"several lists of blocks ({', '.join(found)})"
        raise ModelError(f"{type(model).__name__} has {what}; --remote reads plain decoders")
    return found[0]


def pushes_of(
    perturbs: Sequence[Perturb], batch: Batch, n_layers: int, dim: int, *, alpha: float | None = None
) -> dict[int, list[dict[str, Any]]]:
    """Return what is added to the output of each block, with the noise that hooks would write, made on the CPU.

    Args:
        perturbs: Perturbations with their defaults filled in.
        batch: The rows.
        n_layers: Blocks of the model.
        dim: Width of its states.
        alpha: Strength instead of the perturbations' own.

    Raises:
        UsageError: If a perturbation is none of those that a sent trace carries.
    """
    mask = batch.mask.cpu().numpy()
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    out: dict[int, list[dict[str, Any]]] = {}
    for perturb in perturbs:
        where = perturb.where
        plain = perturb.kind in ("gaussian", "direction", "impulse") and perturb.scale in ("relnorm", "abs")
        placed = where.components() == ("resid_post",) and where.iterations is None and where.slots is None
        if not plain or not placed:
            raise UsageError(
                f"{perturb} was asked for; --remote writes noise or a direction (kind=gaussian, direction, impulse) "
                "under scale=relnorm or abs at the output of blocks (component=resid_post)"
            )
        wanted = where.mask(positions, np.asarray(batch.n_prompt), positions="1:")
        for layer in where.resolve_layers(n_layers):
            if law_of(perturb) is None:
                w = np.broadcast_to(_directed(perturb, dim), (*mask.shape, dim))
            else:
                site = f"resid_post.{layer}"
                w = gaussian_rows(perturb.seed, batch.row_keys, site, np.where(wanted, positions, -1), dim)
            vectors = torch.from_numpy(np.where(wanted[..., None], w, 0.0).astype(np.float32))
            relative = perturb.scale == "relnorm"
            if relative:
                size = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
                vectors = torch.where(size > 0, vectors / size, 0.0)
            strength = perturb.alpha if alpha is None else alpha
            out.setdefault(layer, []).append({"w": vectors, "alpha": strength, "relative": relative})
    return out


def _directed(perturb: Perturb, dim: int) -> np.ndarray:
    """√d·v̂, which stands in for noise, as in :class:`dynprobe.probes._draw.Draw`."""
    vector = perturb.direction
    if vector is None or vector.shape != (dim,):
        found = "none" if vector is None else f"{vector.size} numbers"
        raise UsageError(f"{perturb} needs a direction of {dim} numbers, and has {found}; give --direction FILE")
    scaled: np.ndarray = vector / np.linalg.norm(vector) * dim**0.5
    return scaled


def remote_terms(
    model: Any, path: str, batch: Batch, targets: Tensor, arms: Sequence[Mapping[int, Any]], remote: bool | str = True
) -> list[dict[str, Any]]:
    """Run the arms of a batch as one session and return the terms of each; see :func:`dynprobe.metrics._sent`.

    Args:
        model: From :func:`traced_model`.
        path: Where its blocks are.
        batch: The rows, padded on the right.
        targets: The token that follows each position, −1 for none, ``[batch, pos]``.
        arms: Of each arm what is added at which block.
        remote: False, ``"local"``, True or a URL; see above.

    Returns:
        One dict of small tensors per arm; the second and later ones are compared with the first.

    Raises:
        ModelError: If the job failed on the service.
    """
    from nnsight import register, save

    register(_sent)  # its source goes along: the far side has no dynprobe
    inputs = {"input_ids": batch.input_ids.cpu(), "attention_mask": batch.mask.long().cpu()}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    traced_terms, pushes, goals = _sent.traced_terms, [dict(arm) for arm in arms], targets.cpu()
    backend = _backend(model, remote)
    with _undisturbed(), torch.no_grad(), model.session(backend=backend, remote=backend is None and remote):
        found, clean = save([]), [None]
        for push in pushes:
            with model.trace(**inputs, use_cache=False):
                terms, logits = traced_terms(model, path, goals, push, clean[0])
                found.append(terms)
                clean[0] = logits if clean[0] is None else clean[0]
    return list(_answer(backend)["found"] if backend is not None else found)


def _backend(model: Any, remote: bool | str) -> Any:
    """The road to a server, which reads the answer without running anything; None where it stays here."""
    if remote is False or remote == "local":
        return None
    from nnsight.intervention.backends.remote import RemoteBackend

    class Careful(RemoteBackend):
        heard = float("inf")  # when the service last said anything of the job

        def submit(self, tracer: Any) -> None:
            super().submit(tracer)
            self.heard = time.monotonic()

        def handle(self, response: Any) -> Any:
            self.heard = time.monotonic()
            return super().handle(response)

        def finalize(self, content: bytes) -> Any:
            if self.compress:
                import zstandard

                content = zstandard.ZstdDecompressor().decompress(content)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    host = with_login(remote) if isinstance(remote, str) else None
    return Careful(model.to_model_key(), host=host, env=model._remoteable_get_env(), blocking=False)


def _answer(backend: Any) -> dict[str, Any]:
    """Wait for a job that was handed in; a line that fails now and then is asked again.

    Raises:
        ModelError: If the job failed.
        OfflineError: If the service stops to answer, or no longer knows the job.
    """
    import httpx
    from nnsight.intervention.backends.remote import RemoteError

    failed = 0
    while True:
        found: dict[str, Any] | None = None
        try:
            found = backend()
            failed = 0
        except RemoteError as error:
            raise ModelError(
                f"the job {backend.job_id} failed on {hidden(backend.host)}: {hidden(str(error)[:500])}"
            ) from _bare(error)
        except httpx.HTTPError as error:
            failed += 1
            if failed == _TRIES:
                raise OfflineError(
                    f"{hidden(backend.host)} stopped to answer while it had the job {backend.job_id} "
                    f"({type(error).__name__}); what came back is kept, and the same command goes on from there"
                ) from _bare(error)
        if found is not None:
            return found
        silent = time.monotonic() - backend.heard
        if not failed and silent > _LOST_SECONDS:
            raise OfflineError(
                f"{hidden(backend.host)} took the job {backend.job_id} and has not known it for {silent:.0f} s (404): "
                "it was dropped, or the service was started again. What came back is kept; the same command sends the "
                "job again and goes on from there"
            )
        time.sleep(_PATIENCE)


def _bare(error: Exception) -> Exception | None:
    """An error as a cause; none where its words, or those of its own causes, hold a login that a trace would print."""
    at: BaseException | None = error
    while at is not None:
        if hidden(str(at)) != str(at):
            return None
        at = at.__cause__ or at.__context__
    return error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the search path, which nnsight's dry run reorders, and its progress lines out of the output.

    Raises:
        ModelError: If the service did not take the job.
    """
    from nnsight.intervention.backends.remote import RemoteError
    from nnsight.schema.config import CONFIG

    path, logging = list(sys.path), CONFIG.APP.REMOTE_LOGGING
    CONFIG.APP.REMOTE_LOGGING = False
    try:
        yield
    except RemoteError as error:
        raise ModelError(f"the service did not take the job: {hidden(str(error)[:500])}") from _bare(error)
    finally:
        sys.path[:] = path
        CONFIG.APP.REMOTE_LOGGING = logging
