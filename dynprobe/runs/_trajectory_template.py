"""The exporter without us: plain NumPy that the author of a model pastes beside the loop."""

from __future__ import annotations

__all__ = ["TEMPLATE"]

#: Runs as it stands, on a toy loop; the lines marked *yours* are replaced. A test runs exactly this text.
TEMPLATE = """\
# Paste beside your loop; plain NumPy, no dynprobe. Then: dynprobe validate states.npz; dynprobe import states.npz
import json
import numpy as np

state = np.random.default_rng(0).standard_normal((2, 3, 16, 32)).astype(np.float32)  # yours: before the first update
trace = [state.copy()]
for k in range(1, 11):
    state = 0.5 * state  # yours: one update; a torch tensor is kept with state.detach().float().cpu().numpy()
    trace.append(state.copy())
np.savez(
    "states.npz",
    states=np.stack(trace),
    dims=["iter", "batch", "pos", "state", "dim"],  # the axes of states, in their order; leave out what yours lacks
    iter=np.arange(len(trace)),  # updates done; 0 = before the first
    ids=["prompt-0", "prompt-1"],  # a name for each sample; the same names pair it with other runs
    valid=np.ones((2, 3), dtype=bool),  # batch, pos: False where a position is padding
    meta=json.dumps({"model": "my-model", "trained_iterations": 10, "seed": 0}),  # depths it was trained with
)
"""
