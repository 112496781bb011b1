"""A run on axes with names: hidden states, or columns of the depths table, as xarray.

Rows of a run carry labels and may be missing; an array has every place. The axes are the labels that were found, in
the order of the run for samples and in rising order for numbers; a place without a row is NaN. A track is chosen, never
an axis, because depths of two tracks are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dynprobe.errors import RunFolderError, UsageError

if TYPE_CHECKING:
    from dynprobe.runs._run import Run

__all__ = ["on_axes"]

_AXES = ("sample_id", "pos", "depth")


def on_axes(run: Run, value: str | Sequence[str], labels: Mapping[str, Any]) -> Any:
    """Return states or columns of a run as ``xarray``.

    Args:
        run: The run.
        value: ``state``, or a column of the depths table, or several.
        labels: Label → value or values.

    Returns:
        A ``DataArray``, or a ``Dataset`` of several columns; its attributes hold what is known of the column.

    Raises:
        RunFolderError: xarray is missing, or nothing has these labels.
        UsageError: Rows belong to several tracks or stand twice.
    """
    try:
        import xarray
    except ImportError as error:
        raise RunFolderError(
            "to_xarray needs xarray, which is not installed. Type: pip install 'dynprobe[xarray]'"
        ) from error
    several = [value] if isinstance(value, str) else list(value)
    if several == ["state"]:
        keys, states = run.states(**labels)
        grid, coords = _laid(keys, states)
        inner = ("dim",) if states.ndim == 2 else ("slot", "dim")
        return xarray.DataArray(grid, dims=(*_AXES, *inner), coords=coords, name="state", attrs=_attributes(run, keys))
    if "state" in several:
        raise UsageError("to_xarray gives states by themselves; ask for 'state' and for columns in two calls")
    frame = run.table("depths", list(dict.fromkeys((*_AXES, "track", *labels, *several))))
    for name, wanted in labels.items():
        frame = frame[frame[name].isin(wanted if isinstance(wanted, list | tuple | set | range) else [wanted])]
    if frame.empty:
        raise RunFolderError(f"no row of the depths table has {dict(labels)}")
    facts = run.columns().query("table == 'depths'").set_index("column")
    arrays = {}
    for name in several:
        grid, coords = _laid(frame, frame[name].to_numpy(np.float64, na_value=np.nan))
        known = {key: text for key, text in facts.loc[name].drop("table").items() if text}
        arrays[name] = xarray.DataArray(grid, dims=_AXES, coords=coords, name=name, attrs=known)
    return arrays[several[0]] if isinstance(value, str) else xarray.Dataset(arrays)


def _laid(keys: pd.DataFrame, values: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows on a grid of their labels; missing places are NaN."""
    tracks = keys["track"].astype(str).unique()
    if len(tracks) > 1:
        raise UsageError(f"rows belong to the tracks {', '.join(tracks)}; name one: track={tracks[0]!r}")
    places, coords = [], {}
    for axis in _AXES:
        column = keys[axis].astype(object) if axis == "sample_id" else keys[axis]
        codes, found = pd.factorize(column, sort=axis != "sample_id")
        places.append(codes)
        coords[axis] = (axis, np.asarray(found, dtype=str if axis == "sample_id" else np.int64))
    shape = tuple(len(of) for _, of in coords.values())
    flat = np.ravel_multi_index(places, shape)
    if len(np.unique(flat)) < len(flat):
        raise UsageError("several rows have one sample, position and depth; narrow them with component=… or layer=…")
    grid = np.full((int(np.prod(shape)), *values.shape[1:]), np.nan, np.result_type(values.dtype, np.float16))
    grid[flat] = values
    if "layer" in keys:
        layers = keys.drop_duplicates("depth").sort_values("depth")["layer"].to_numpy()
        coords["layer"] = ("depth", layers)
    return grid.reshape(*shape, *values.shape[1:]), coords


def _attributes(run: Run, keys: pd.DataFrame) -> dict[str, Any]:
    return {"run": run.manifest.id8, "model": run.manifest.model_name, "track": str(keys["track"].iloc[0])}
