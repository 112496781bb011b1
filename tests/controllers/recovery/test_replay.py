"""``random:<mode>``: the energies of a mode, in directions that mean nothing."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from toys import NEW, PROMPTS, Scale, Shift, calibration_of, fed

from dynprobe.controllers.recovery import Always, Deadband, Recovery, Replay, Shrink, Slerp
from dynprobe.probes import discover, identical
from dynprobe.testing import tiny_gpt2, tiny_llama

KEYS = ["row", "pos", "site"]


def written(table: pd.DataFrame) -> pd.Series:
    return table[table["energy"] > 0].groupby(KEYS)["energy"].sum()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("g", [0.5, 1e-3])
def test_energy_is_the_modes_at_every_token_of_every_row(make: Any, g: float) -> None:
    subject = make(layers=4)
    calibration = calibration_of(subject, signals={"kappa_phase_zmax": (-1e3, -1e2)})
    slerp = Recovery(Deadband(m=1, g_max=g, horizon=20), Slerp())
    for mode in (slerp, Recovery(Always(g), Shrink(), site="layers=1+2")):
        run = fed(subject, PROMPTS, NEW, mode, calibration=calibration, perturb="alpha=0.3,layers=0")
        twin = fed(subject, PROMPTS, NEW, Replay(run.actions, "m"), perturb="alpha=0.3,layers=0")
        mine, theirs = written(run.actions), written(twin.actions)
        assert len(mine) >= 15
        pd.testing.assert_index_equal(mine.index, theirs.index)
        # A write a thousand times smaller than its state has three digits fewer in float32.
        room = 1e-6 if g == 0.5 else 3e-4
        np.testing.assert_allclose(mine, theirs, rtol=room, atol=1e-10)
        assert twin.actions["energy"].sum() == pytest.approx(run.actions["energy"].sum(), rel=room)


def test_the_direction_is_another_one_for_every_token_row_site_and_seed() -> None:
    subject = tiny_llama(dim=64)
    mode = Recovery(Always(), Slerp(), site="layers=0")
    run = fed(subject, PROMPTS, NEW, mode)
    clean = fed(subject, PROMPTS, NEW)
    moves = []
    for seed in (0, 1):
        twin = fed(subject, PROMPTS, NEW, Replay(run.actions, "slerp", seed))
        # What is below block 0 is the token alone, so the difference to clean at the first new token is the write.
        for row, prompt in enumerate(PROMPTS):
            u = twin.state(row, len(prompt), 1) - clean.state(row, len(prompt), 1)
            moves.append(u / u.norm())
            own = run.state(row, len(prompt), 1) - clean.state(row, len(prompt), 1)
            moves.append(own / own.norm())
    cos = torch.stack(moves) @ torch.stack(moves).T
    same = torch.eye(len(moves), dtype=torch.bool)
    for row in range(3):  # slerp's own move is in the list twice
        same[2 * row + 1, 2 * row + 7] = same[2 * row + 7, 2 * row + 1] = True
    assert float(cos[~same].abs().max()) < 0.5
    again = fed(subject, PROMPTS, NEW, Replay(run.actions, "slerp", 1))
    assert all(identical(a, b) for a, b in zip(again.tape.states, twin.tape.states, strict=True))


def test_a_row_has_its_writes_whatever_rows_are_beside_it() -> None:
    subject = tiny_llama()
    run = fed(subject, PROMPTS, NEW, Recovery(Always(), Slerp()))
    whole = fed(subject, PROMPTS, [NEW[0][:3], NEW[1], NEW[2][:6]], Replay(run.actions, "slerp"))
    one = run.actions[run.actions["row"] == 1].assign(row=0)
    alone = fed(subject, PROMPTS[1:2], NEW[1:2], Replay(one, "slerp"))
    for pos in range(len(PROMPTS[1]) + 7):
        torch.testing.assert_close(whole.state(1, pos, 3), alone.state(0, pos, 3), rtol=1e-4, atol=1e-4)


def test_two_controllers_that_write_the_same_state_are_replayed_together() -> None:
    subject = tiny_llama()
    run = fed(subject, PROMPTS, NEW, Scale(1.1), Shift(0.1))
    both = pd.concat([s.actions() for s in run.steerings], ignore_index=True)
    twin = fed(subject, PROMPTS, NEW, Replay(both, "two"))
    np.testing.assert_allclose(written(twin.actions), written(both), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_comes_as_near_as_it_can(dtype: torch.dtype, tolerance: float) -> None:
    subject = discover(tiny_llama().model.to(dtype))
    run = fed(subject, PROMPTS, NEW, Recovery(Always(0.2), Slerp()))
    twin = fed(subject, PROMPTS, NEW, Replay(run.actions, "slerp"))
    np.testing.assert_allclose(written(twin.actions), written(run.actions), rtol=tolerance)


def test_a_mode_that_did_nothing_has_a_twin_that_does_nothing() -> None:
    subject = tiny_llama()
    run = fed(subject, PROMPTS, NEW, Recovery(Always(0.0), Slerp()))
    twin = fed(subject, PROMPTS, NEW, Replay(run.actions, "slerp"))
    assert twin.steerings[0].sites == ()
    assert all(identical(a, b) for a, b in zip(run.tape.states, twin.tape.states, strict=True))
