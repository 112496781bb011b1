"""Indexing a tape: depths, layers, positions, components."""

import numpy as np
import pytest
import torch
from models import ROWS, subject

from dynprobe.errors import SiteError, SpecError
from dynprobe.probes import States, Tape, capture
from dynprobe.probes._tape import _ranges

EVERYTHING = "layers=all,component=resid_pre+resid_mid+resid_post+attn_out+mlp_out"


@pytest.fixture(scope="module")
def tape() -> Tape:
    return capture(subject("llama"), ROWS, where=EVERYTHING, padding="left")


def test_numbers_are_depths(tape: Tape) -> None:
    part = capture(subject("llama"), ROWS, where="layers=1:", padding="left")
    assert part.depths == (2, 3)
    assert len(part.states) == 2
    assert torch.equal(part.states[2], tape.states[2])
    assert part.states[-1] is part.states[3]
    assert part.states[-2] is part.states[2]
    for missing in (0, 1, 4, -3, -5):
        with pytest.raises(SiteError, match=f"depth {missing} was asked for; the tape holds depths 2–3"):
            part.states[missing]
    assert [s.data_ptr() for s in part.states] == [part.states[2].data_ptr(), part.states[3].data_ptr()]


def test_slices_stack_what_was_captured(tape: Tape) -> None:
    assert tape.states[:].shape == (4, 3, 7, 32)
    assert torch.equal(tape.states[1:3], torch.stack([tape.states[1], tape.states[2]]))
    assert torch.equal(tape.states[-2:], torch.stack([tape.states[2], tape.states[3]]))
    assert torch.equal(tape.states[::2], torch.stack([tape.states[0], tape.states[2]]))
    part = capture(subject("llama"), ROWS, where="layers=1:", padding="left")
    assert torch.equal(part.states[:], tape.states[2:])
    with pytest.raises(SiteError, match="no depth"):
        part.states[:2]


def test_layers_hand_on_the_next_depth(tape: Tape) -> None:
    assert tape.at(layer=0) is tape.states[1]
    assert tape.at(layer=-1) is tape.states[3]
    for layer in (3, -4):
        with pytest.raises(SiteError, match=f"layer {layer} was asked for; there are layers 0…2"):
            tape.at(layer=layer)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_count_real_tokens(padding: str) -> None:
    tape = capture(subject("llama"), ROWS, padding=padding)
    state = tape.states[3]
    shift = [7 - len(r) if padding == "left" else 0 for r in ROWS]
    for pos in (0, 1, 2):
        expected = torch.stack([state[i, shift[i] + pos] for i in range(3)])
        assert torch.equal(tape.at(layer=-1, pos=pos), expected)
    for pos in (-1, -3):
        expected = torch.stack([state[i, shift[i] + len(r) + pos] for i, r in enumerate(ROWS)])
        assert torch.equal(tape.at(layer=-1, pos=pos), expected)
    for pos in (3, -4):
        with pytest.raises(SiteError, match=f"position {pos} was asked for; row 1 has 3 tokens"):
            tape.at(layer=0, pos=pos)


def test_components_by_their_names(tape: Tape) -> None:
    assert tape["resid_pre", 1] is tape.states[1]
    assert tape["resid_post", 1] is tape.states[2]
    assert tape["mlp_out", -1] is tape.updates["mlp_out", 2]
    assert tape["hook_mlp_out", 2] is tape.updates["mlp_out", 2]
    assert tape["blocks.2.hook_mlp_out"] is tape.updates["mlp_out", 2]
    assert tape["blocks.0.hook_resid_post"] is tape.states[1]
    assert torch.equal(tape["resid_mid", 1], tape.states[1] + tape["attn_out", 1])


def test_components_that_are_not_there(tape: Tape) -> None:
    plain = capture(subject("llama"), ROWS)
    with pytest.raises(SiteError, match="'attn_out' of layer 1 is not on this tape; it holds resid_post, resid_pre"):
        plain["attn_out", 1]
    for layer in (3, -4, -6):  # a wrapped negative would hand out another layer's state
        with pytest.raises(SiteError, match=f"layer {layer} was asked for"):
            tape["resid_post", layer]
    with pytest.raises(SpecError, match="mlp_uot"):
        tape["mlp_uot", 1]
    with pytest.raises(SiteError, match="names no one place"):
        tape["mlp_out"]
    parallel = capture(subject("phi"), ROWS, where="layers=all,component=resid_post+attn_out")
    with pytest.raises(SiteError, match="'resid_mid' of layer 0 is not on this tape"):
        parallel["resid_mid", 0]


def test_xarray(tape: Tape) -> None:
    pytest.importorskip("xarray")
    array = tape.to_xarray()
    assert array.dims == ("depth", "batch", "pos", "dim")
    assert np.array_equal(array.sel(depth=2).values, tape.states[2].numpy())
    assert list(array.coords["row_key"].values) == list(tape.row_keys)
    assert np.array_equal(array.coords["position"].values, tape.positions.numpy())
    for dtype, expected in ((torch.float64, np.float64), (torch.bfloat16, np.float32)):
        states = {d: s.to(dtype) for d, s in zip(range(4), tape.states, strict=True)}
        other = Tape(
            States(states, 3), tape.mask, tape.positions, tape.token_ids, tape.n_prompt, row_keys=tape.row_keys
        )
        assert other.to_xarray().dtype == expected


def test_texts(tape: Tape) -> None:
    assert _ranges((0, 1, 2, 5, 7, 8)) == "0–2, 5, 7–8"
    assert _ranges(()) == ""
    assert repr(tape) == "Tape(3 rows × 7 columns, depths 0–3, updates ['attn_out', 'mlp_out'])"
    assert "depths 0–3" in repr(tape.states)
