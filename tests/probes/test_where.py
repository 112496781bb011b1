"""The grammar and its places: round trips, the exact character of every error, resolution against real lengths."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynprobe._types import COMPONENTS
from dynprobe.errors import SiteError, SpecError, UsageError
from dynprobe.probes._perturb import Perturb
from dynprobe.probes._where import Where

percents = st.builds(lambda n, d: f"{n / 10**d:.{d}f}%", st.integers(0, 100), st.integers(0, 2))
bounds = st.one_of(st.integers(-40, 40).map(str), percents, st.just(""))
slices = st.builds(
    lambda a, b, c: ":".join([a, b] if c is None else [a, b, str(c)]), bounds, bounds, st.none() | st.integers(1, 5)
)
indices = st.one_of(st.integers(-99, 99).map(str), percents, slices, st.sampled_from(["all", "mid", "first", "last"]))


def values(item: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(item, min_size=1, max_size=3).map("+".join)


places = st.fixed_dictionaries(
    {},
    optional={
        "layers": values(indices),
        "iterations": values(indices),
        "positions": values(indices),
        "phase": values(st.sampled_from(["prefill", "decode", "all"])),
        "component": values(st.sampled_from([*COMPONENTS, "all", "resid-post", "hook_mlp_out"])),
        "slots": values(indices),
    },
)


def parsed(text: str) -> Where | None:
    """Parse, or None where the only complaint is a slice that selects nothing."""
    try:
        return Where.parse(text)
    except SpecError as error:
        if "selects nothing" not in str(error):
            raise
        return None


@given(places, st.sampled_from(["", " ", "  "]))
def test_text_and_object_are_the_same_thing(place: dict[str, str], gap: str) -> None:
    text = f"{gap},{gap}".join(f"{key}{gap}={gap}{value.replace('+', gap + '+' + gap)}" for key, value in place.items())
    where = parsed(text)
    if where is not None:
        assert Where.parse(str(where)) == where
        assert str(Where.parse(str(where))) == str(where)
        assert Where(**place) == where
        assert hash(where) == hash(Where.parse(str(where)))
        assert Where(**{key: getattr(where, key) for key in place}) == where


@given(st.integers(-40, 40) | st.none(), st.integers(-40, 40) | st.none(), st.integers(1, 4), st.integers(1, 40))
def test_a_slice_is_pythons_slice(start: int | None, stop: int | None, step: int, n: int) -> None:
    expected = tuple(range(n))[start:stop:step]
    try:
        found = Where(layers=slice(start, stop, step)).resolve_layers(n)
    except UsageError:  # selects nothing, known without a model (SpecError) or with it (SiteError)
        found = ()
    assert found == expected


@given(st.integers(1, 200), st.integers(0, 10000))
def test_a_percent_is_an_exact_floor(n: int, hundredths: int) -> None:
    text = f"{hundredths // 100}.{hundredths % 100:02d}%"
    assert Where(layers=text).resolve_layers(n) == (min(n * hundredths // 10000, n - 1),)


def test_percents_where_binary_fractions_are_wrong() -> None:
    assert int(0.29 * 100) == 28
    assert Where.parse("layers=29%").resolve_layers(100) == (29,)
    assert Where.parse("layers=50%").resolve_layers(25) == Where.parse("layers=mid").resolve_layers(25) == (12,)
    assert Where.parse("layers=25%:75%").resolve_layers(8) == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("text", "position", "part"),
    [
        ("layer=6", 0, "Did you mean 'layers'?"),
        ("layers=6,postions=last", 9, "Did you mean 'positions'?"),
        ("layers=6, postions=last", 10, "unknown key"),
        ("=6", 0, "before '='"),
        ("layers", 6, "expected '='"),
        ("layers=6,7", 10, "joined by '+'"),
        ("layers=", 7, "missing"),
        ("layers=6+", 9, "missing"),
        ("layers=6++7", 9, "missing"),
        ("layers=6,", 9, "pair is missing"),
        ("layers=6,,phase=all", 9, "pair is missing"),
        (",", 0, "pair is missing"),
        ("layers=x", 7, "no value"),
        ("layers=lsat", 7, "Did you mean 'last'?"),
        ("layers=6.5", 8, "no value"),
        ("layers=6a9", 8, "no value"),
        ("layers=6=7", 8, "no value"),
        ("layers=6:x", 9, "no value"),
        ("layers= 6 : 9q", 13, "no value"),
        ("layers=6:9+1:2:3:4", 16, "at most start:stop:step"),
        ("layers=1:9:0", 11, "step"),
        ("layers=9:1:-1", 11, "step"),
        ("layers=1:9:50%", 11, "step"),
        ("layers=9:6", 7, "selects nothing"),
        ("layers=-1:-3", 7, "selects nothing"),
        ("layers=3:0", 7, "selects nothing"),
        ("layers=75%:25%", 7, "selects nothing"),
        ("layers=101%", 7, "more than 100"),
        ("layers=-5%", 9, "no value"),
        ("layers=6,layers=7", 9, "given twice"),
        ("phase=prefil", 6, "Did you mean 'prefill'?"),
        ("component=resid_post+resid_pots", 21, "Did you mean 'resid_post'?"),
        ("blocks.6.hook_resid_pots", 0, "Did you mean 'hook_resid_post'?"),
        ("component=blocks.6.attn.hook_z", 10, "no place dynprobe reads"),
        ("layers=6,blocks.7.hook_resid_post", 9, "given twice"),
        ("layers=6,alpha=0.1", 9, "belongs to a perturbation"),
        ("layers=6,seed=1", 9, "belongs to a perturbation"),
        ("layers=" + "9" * 30, 25, "no value"),
    ],
)
def test_errors_point_at_the_character(text: str, position: int, part: str) -> None:
    with pytest.raises(SpecError) as caught:
        Where.parse(text)
    assert caught.value.position == position
    assert caught.value.text == text
    assert part in str(caught.value)
    assert str(caught.value).endswith(f"  {text}\n  {' ' * position}^")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6, "6"),
        (-1, "-1"),
        (np.int64(6), "6"),
        (torch.tensor(6), "6"),
        ([3, 1, 3], "3+1"),
        ((1, "6:9", "50%"), "1+6:9+50%"),
        (np.array([1, 2]), "1+2"),
        (slice(6, 9), "6:9"),
        (slice(None, None, 2), "::2"),
        (range(6, 9), "6:9"),
        (range(3, -1, -1), "3+2+1+0"),
        ("12.50%", "12.5%"),
        ("mid", "50%"),
        ("0:4:1", "0:4"),
    ],
)
def test_keywords_take_what_python_has(value: object, text: str) -> None:
    assert str(Where(layers=value)) == f"layers={text}"  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, 6.5, {1: 2}, b"6", []])
def test_keywords_refuse_what_is_no_place(value: object) -> None:
    with pytest.raises(UsageError, match="layers"):
        Where(layers=value)  # type: ignore[arg-type]


def test_nothing_given() -> None:
    assert Where.parse("") == Where.parse("  ") == Where.parse(None) == Where()
    assert str(Where()) == ""
    assert Where().resolve_layers(3) == (0, 1, 2)
    assert Where().resolve_layers(4, default="50%") == (2,)
    assert Where().components() == ("resid_post",)
    assert Where().phases() == ("prefill", "decode")


def test_layers_are_sorted_unique_and_in_range() -> None:
    assert Where.parse("layers=-1+3+0:2+last").resolve_layers(6) == (0, 1, 3, 5)
    assert Where.parse("layers=3:99").resolve_layers(5) == (3, 4)
    for text in ("layers=30", "layers=-31", "layers=40:50"):
        with pytest.raises(SiteError, match=r"layers 0…29"):
            Where.parse(text).resolve_layers(30)
    with pytest.raises(SiteError, match=r"slots=16 is out of range: .* slots 0…15"):
        Where.parse("slots=16").resolve_slots(16)
    assert Where.parse("iterations=0+last").resolve_iterations(11) == (0, 10)


def test_components_and_phases_are_ordered_subsets() -> None:
    assert Where.parse("component=mlp_out+resid_pre").components() == ("resid_pre", "mlp_out")
    assert Where.parse("component=all").components() == COMPONENTS
    assert Where.parse("phase=decode").phases() == ("decode",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("blocks.6.hook_resid_post", "layers=6,component=resid_post"),
        ("blocks.0.hook_resid_pre", "layers=0,component=resid_pre"),
        ("blocks.11.hook_attn_out", "layers=11,component=attn_out"),
        ("blocks.6.hook_out", "layers=6,component=resid_post"),
        ("blocks.6.mlp.hook_out", "layers=6,component=mlp_out"),
        ("hook_mlp_out", "component=mlp_out"),
    ],
)
def test_transformerlens_names(name: str, text: str) -> None:
    assert str(Where.from_hook_name(name)) == text
    assert Where.parse(name) == Where.parse(text)
    assert Where(component=name) == Where.parse(text)
    assert Where.parse(f"component={name},positions=last") == Where.parse(f"{text},positions=last")


def test_hook_name_and_layers_must_agree() -> None:
    assert Where(layers=6, component="blocks.6.hook_resid_post").layers == (6,)
    with pytest.raises(UsageError, match="names layer 6"):
        Where(layers=7, component="blocks.6.hook_resid_post")
    with pytest.raises(SpecError, match="no place"):
        Where.from_hook_name("hook_embed")


def test_replace() -> None:
    where = Where.parse("layers=6,phase=decode")
    assert str(where.replace(layers="50%", phase=None)) == "layers=50%"
    with pytest.raises(UsageError, match="Did you mean 'layers'"):
        where.replace(layer=6)


# Two rows: a prompt of 3 with 3 new tokens; a left-padded prompt of 5 with 1 new token.
POS = np.array([[0, 1, 2, 3, 4, 5], [-1, 0, 1, 2, 4, 5]])
N_PROMPT = np.array([3, 5])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5]]),
        ("1:", [[1, 2, 3, 4, 5], [1, 2, 4, 5]]),
        ("first", [[0], [0]]),
        ("last", [[2], [4]]),
        ("-1", [[2], [4]]),
        ("-1:", [[2, 3, 4, 5], [4, 5]]),
        (":-1", [[0, 1], [0, 1, 2]]),
        ("-4:", [[0, 1, 2, 3, 4, 5], [1, 2, 4, 5]]),
        ("-4::2", [[0, 2, 4], [1, 5]]),
        ("1::2", [[1, 3, 5], [1, 5]]),
        ("50%", [[1], [2]]),
        ("100%", [[2], [4]]),
        ("50%:100%", [[1, 2], [2, 4]]),
        ("4", [[4], [4]]),
        ("-4", [[], [1]]),
        ("0+last+5", [[0, 2, 5], [0, 4, 5]]),
        ("1:-1", [[1], [1, 2]]),
    ],
)
@pytest.mark.parametrize("library", [np.asarray, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_positions(positions: str, expected: list[list[int]], library) -> None:  # type: ignore[no-untyped-def]
    mask = Where(positions=positions).position_mask(library(POS), library(N_PROMPT))
    assert mask.shape == POS.shape
    assert str(mask.dtype).endswith("bool")
    assert [POS[row][np.asarray(mask)[row]].tolist() for row in range(2)] == expected


def test_padding_is_never_selected() -> None:
    for spec in ("all", "-1:", "0:", ":3", "first", "-7"):
        assert not Where(positions=spec).mask(POS, N_PROMPT)[1, 0]


def test_phases_split_at_the_prompt() -> None:
    prefill = Where(phase="prefill").mask(POS, N_PROMPT)
    decode = Where(phase="decode").mask(POS, N_PROMPT)
    assert POS[0][prefill[0]].tolist() == [0, 1, 2]
    assert POS[1][decode[1]].tolist() == [5]
    assert ((prefill | decode) == (POS >= 0)).all()
    assert not (prefill & decode).any()


def test_defaults_of_reading_and_writing() -> None:
    assert Where().position_mask(POS, 3).sum() == 11
    written = Where().mask(POS, N_PROMPT, positions="1:")
    assert not (written & (POS < 1)).any()
    assert (written == (POS >= 1)).all()


def test_one_decode_step_selects_like_the_whole() -> None:
    where = Where.parse("positions=-1:4+5")
    whole = where.mask(POS, N_PROMPT)
    steps = np.concatenate([where.mask(POS[:, t : t + 1], N_PROMPT) for t in range(6)], axis=1)
    assert (whole == steps).all()


@given(places, st.floats(-10, 10))
def test_perturbations_extend_the_language(place: dict[str, str], alpha: float) -> None:
    text = ",".join(f"{key}={value}" for key, value in place.items())
    if parsed(text) is not None:
        perturb = Perturb.parse(",".join(filter(None, [text, f"alpha={alpha}"])))
        assert perturb.where == Where.parse(text)
        assert Perturb.parse(str(perturb)) == perturb
