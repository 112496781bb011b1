"""Measure a model where it lives: one nnsight session, sent to NDIF or run here, from which only small grids come back.

A model of 70 or 400 billion parameters is read on the service that hosts it. What is sent is the source of
:mod:`dynprobe.metrics._sent` with token ids, targets and the vectors to add; what comes back are norms, angles and
read-outs, from which :func:`dynprobe.metrics.measure_terms` makes the metrics of a run. The arms of a batch (clean, the
same with α = 0, perturbed) are one session: one place in the queue.

Where it runs is one word: ``False`` here, through the same block; ``"local"`` here, after nnsight has serialised the
block and read it back with the modules of this machine hidden, a dry run of the remote road; ``True`` on NDIF; a URL on
a server of one's own. Before anything is sent the key, the service, its versions and the model are looked at, and each
has an error that says what to type. The key is nnsight's business: it is never printed, and not stored by dynprobe.

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

from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError, UsageError, did_you_mean
from dynprobe.metrics import _sent
from dynprobe.probes._backend import require_nnsight
from dynprobe.probes._draw import law_of
from dynprobe.probes._inputs import Batch
from dynprobe.probes._noise import gaussian_rows
from dynprobe.probes._perturb import Perturb

__all__ = ["block_path_of", "check_service", "pushes_of", "remote_terms", "traced_model"]

#: Seconds between two looks at a job.
_PATIENCE = 2.0
#: Looks in a row that may fail.
_TRIES = 5


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
        def finalize(self, content: bytes) -> Any:
            if self.compress:
                import zstandard

                content = zstandard.ZstdDecompressor().decompress(content)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    host = remote if isinstance(remote, str) else None
    return Careful(model.to_model_key(), host=host, env=model._remoteable_get_env(), blocking=False)


def _answer(backend: Any) -> dict[str, Any]:
    """Wait for a job that was handed in; a line that fails now and then is asked again."""
    import httpx
    from nnsight.intervention.backends.remote import RemoteError

    failed = 0
    while True:
        found: dict[str, Any] | None = None
        try:
            found = backend()
            failed = 0
        except RemoteError as error:
            raise ModelError(f"the job {backend.job_id} failed on {backend.host}: {str(error)[:500]}") from error
        except httpx.HTTPError as error:
            failed += 1
            if failed == _TRIES:
                raise OfflineError(
                    f"{backend.host} stopped to answer while it had the job {backend.job_id} ({type(error).__name__}); "
                    "what came back is kept, and the same command goes on from there"
                ) from error
        if found is not None:
            return found
        time.sleep(_PATIENCE)


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
        raise ModelError(f"the service did not take the job: {str(error)[:500]}") from error
    finally:
        sys.path[:] = path
        CONFIG.APP.REMOTE_LOGGING = logging


def check_service(model_id: str, revision: str | None, remote: bool | str) -> dict[str, Any]:
    """Look at key, service, versions and model before anything is sent.

    Returns:
        Host and versions of the service, for the manifest.

    Raises:
        UsageError: If there is no key, or the service runs another nnsight.
        OfflineError: If the service does not answer.
        ModelNotFoundError: If it does not run the model now.
    """
    mine = require_nnsight("--remote")
    import httpx
    from nnsight import compare, ndif
    from nnsight.schema.config import CONFIG

    host = remote if isinstance(remote, str) else CONFIG.API.HOST
    if not isinstance(remote, str) and not CONFIG.API.APIKEY:
        raise UsageError(
            f"--remote sends {model_id} to {host}, which wants an API key; none was found in NDIF_API_KEY or in "
            "nnsight's own settings. Get one at https://login.ndif.us, then type: export NDIF_API_KEY=… (or: nnsight "
            "login)"
        )
    before, CONFIG.API.HOST = CONFIG.API.HOST, host
    ndif._REMOTE_ENV = None
    try:
        deployed = ndif._get("/status").get("deployments", {})
        found = compare()
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise OfflineError(
            f"--remote asked {host} for its models, and it did not answer ({type(error).__name__}); try later, or look "
            "at https://nnsight.net/status"
        ) from error
    finally:
        CONFIG.API.HOST = before
        ndif._REMOTE_ENV = None
    theirs = str(found.packages.get("nnsight", {}).get("remote", ""))
    if theirs and theirs.split(".")[:2] != mine.split(".")[:2]:
        raise UsageError(
            f"nnsight {mine} is installed and {host} runs {theirs}, which reads other requests; type: pip install "
            f"'nnsight=={theirs}' (dynprobe wants 0.8.1 or later, below 0.9)"
        )
    running = {
        str(d.get("repo_id")): d.get("revision") or "main"
        for d in deployed.values()
        if d.get("application_state") == "RUNNING"
    }
    if model_id not in running:
        near = did_you_mean(model_id, running)
        raise ModelNotFoundError(
            f"{model_id} was asked for and does not run on {host} now.{near} It runs "
            f"{', '.join(sorted(running)) or 'nothing'}"
        )
    if revision is not None and running[model_id] != revision:
        raise ModelNotFoundError(
            f"{model_id} at revision {revision} was asked for; {host} runs revision {running[model_id]}. Type: "
            f"--revision {running[model_id]}"
        )
    versions = {name: p["remote"] for name, p in found.packages.items() if p["critical"]}
    return {"host": host, "versions": versions, "python": found.remote_python, "revision": running[model_id]}
