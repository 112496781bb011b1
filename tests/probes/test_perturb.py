"""Perturbations as data: round trips, defaults, combinations that have no meaning, spec files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.errors import SpecError, UsageError
from dynprobe.probes._perturb import KINDS, Perturb, parse_many
from dynprobe.probes._scales import SCALES
from dynprobe.probes._where import Where

NOISE_SCALES = ("relnorm", "coordstd", "mad", "cov", "abs", "isokl")
SINE_SCALES = ("relnorm", "coordstd", "mad", "abs")


@st.composite
def perturbations(draw: st.DrawFn) -> Perturb:
    kind = draw(st.sampled_from(KINDS))
    scales = {"gaussian": SCALES.builtin, "direction": NOISE_SCALES, "impulse": NOISE_SCALES, "sine": SINE_SCALES}
    scale = draw(st.sampled_from(scales.get(kind, ("relnorm",))))
    several = st.nothing() if kind in ("impulse", "sine") else st.lists(st.integers(0, 40), min_size=1)
    places = [None, "last", "50%", 3] if kind == "impulse" else [None, "1:", "last", "-3:", "50%"]
    low, high = (0, 0.999) if kind == "dropout" else (0, 1e9) if scale == "isokl" else (-1e300, 1e300)
    return Perturb(
        alpha=draw(st.floats(low, high)),
        scale=scale,
        kind=kind,
        seed=draw(st.integers(0, 2**64 - 1)),
        period=draw(st.floats(2, 1e300, exclude_min=True)) if kind == "sine" else None,
        layers=draw(st.none() | st.integers(-40, 40) | several),
        positions=draw(st.sampled_from(places)),
        phase=draw(st.sampled_from([None, "prefill", "decode+prefill"])),
        slots=draw(st.sampled_from([None, "all", "0:4"])),
    )


@given(perturbations())
def test_text_and_object_are_the_same_thing(p: Perturb) -> None:
    assert Perturb.parse(str(p)) == p
    assert str(Perturb.parse(str(p))) == str(p)
    assert p.replace() == p
    assert hash(Perturb.parse(str(p))) == hash(p)
    full = p.defaults_filled()
    assert full.defaults_filled() == full
    assert Perturb.parse(str(full)) == full


def test_the_specified_text_is_canonical() -> None:
    text = "alpha=0.1,scale=relnorm,layers=6:9,positions=last,phase=prefill,kind=gaussian,seed=0"
    assert str(Perturb.parse(text)) == text
    shuffled = "seed=0, positions=last, layers = 6:9 ,kind=gaussian,phase=prefill,alpha= 1e-1"
    assert str(Perturb.parse(shuffled)) == text
    assert repr(Perturb.parse(text)) == f"Perturb.parse({text!r})"


def test_keywords_equal_text() -> None:
    assert Perturb(alpha=0.1, layers="50%") == Perturb.parse("alpha=0.1,layers=50%")
    assert Perturb(0.1, where="layers=6", positions="last") == Perturb.parse("alpha=0.1,layers=6,positions=last")
    assert Perturb(np.float32(0.5), where=Where(layers=6)) == Perturb.parse("alpha=0.5,layers=6")
    assert Perturb(torch.tensor(2)) == Perturb.parse("alpha=2") == Perturb("2")
    assert Perturb(-0.0) == Perturb(0.0)
    assert str(Perturb(-0.0)).startswith("alpha=0,")
    assert Perturb(0.1, seed=2**64 - 1).seed == 2**64 - 1


def test_replace() -> None:
    p = Perturb.parse("alpha=0.1,layers=6,phase=decode")
    assert p.replace(alpha=0.2).alpha == 0.2
    assert p.replace(alpha=0.2).where == p.where
    assert str(p.replace(layers="50%", phase=None).where) == "layers=50%"
    assert p.replace(where="slots=1").where == Where(slots=1)
    with pytest.raises(UsageError, match="Did you mean 'alpha'"):
        p.replace(alhpa=1)


def test_defaults_of_a_bare_alpha() -> None:
    full = Perturb.parse("alpha=0.1").defaults_filled()
    text = "alpha=0.1,scale=relnorm,layers=50%,positions=1:,phase=all,component=resid_post,kind=gaussian,seed=0"
    assert str(full) == text
    kept = Perturb.parse("alpha=0.1,layers=3,positions=all,phase=decode,component=mlp_out")
    assert kept.defaults_filled() == kept
    assert Perturb.parse("alpha=0.1,iterations=3").defaults_filled().where.layers is None


def test_neftune_means_the_embedding() -> None:
    place = Perturb.parse("alpha=5,scale=neftune").defaults_filled().where
    assert (place.layers, place.component) == ((0,), ("resid_pre",))
    assert Perturb.parse("alpha=5,scale=neftune,component=resid_pre").defaults_filled().where == place
    elsewhere = Perturb.parse("alpha=5,scale=neftune,layers=6").defaults_filled().where
    assert (elsewhere.layers, elsewhere.component) == ((6,), ("resid_post",))


@pytest.mark.parametrize(
    ("text", "position", "part"),
    [
        ("layers=6", 8, "alpha, the strength, is missing"),
        ("", 0, "alpha, the strength, is missing"),
        ("alpha=", 6, "one number"),
        ("alpha=x", 6, "one number"),
        ("alpha=0_1", 6, "one number"),
        ("alpha=10%", 6, "written as a number, alpha=0.1"),
        ("alpha=nan", 6, "finite"),
        ("alpha= inf", 7, "finite"),
        ("alpha=0.1+0.2", 6, "dynprobe sweep"),
        ("alpha=[0.1;0.2]", 6, "dynprobe sweep"),
        ("alpha=0.1,0.2", 10, "dynprobe sweep"),
        ("alpha=0.1,scale=relnrom", 16, "Did you mean 'relnorm'?"),
        ("alpha=0.1,kind=gausian", 15, "Did you mean 'gaussian'?"),
        ("alpha=0.1,kind=impuls", 15, "Did you mean 'impulse'?"),
        ("alpha=0.1,kind=impulse,positions=1:", 33, "one position"),
        ("alpha=0.1,kind=impulse,positions=1+5", 33, "not positions=1+5; write positions=last"),
        ("alpha=0.1,layers=3+6,kind=impulse", 17, "one site"),
        ("alpha=0.1,layers=all,kind=sine,period=8", 17, "the lock-in has one reference"),
        ("alpha=0.1,kind=impulse,scale=interp", 15, "defines its own write"),
        ("alpha=0.1,kind=impulse,period=8", 30, "no meaning for kind=impulse"),
        ("alpha=0.1,kind=sine", 15, "add period=8"),
        ("alpha=0.1,kind=sine,period=2", 27, "more than 2 tokens"),
        ("alpha=0.1,kind=sine,period=-8", 27, "more than 2 tokens"),
        ("alpha=0.1,kind=sine,period=8,scale=cov", 35, "one unit per state"),
        ("alpha=0.1,kind=sine,period=8+9", 27, "one number"),
        ("alpha=0.1,period=8", 17, "no meaning for kind=gaussian"),
        ("alpha=0.1,seed=-1", 15, "0 ≤ seed < 2^64"),
        ("alpha=0.1,seed=1.5", 15, "whole number"),
        ("alpha=0.1,seed=18446744073709551616", 15, "0 ≤ seed < 2^64"),
        ("alpha=0.1,seed=0+1", 15, "one whole number"),
        ("alpha=1,kind=dropout", 6, "0 ≤ alpha < 1"),
        ("kind=dropout,alpha=-0.1", 19, "0 ≤ alpha < 1"),
        ("alpha=-1,scale=isokl", 6, "target KL"),
        ("alpha=0.1,scale=abs,kind=rotate", 16, "an angle in radians"),
        ("alpha=0.1,kind=scale,scale=mad", 27, "a factor"),
        ("alpha=0.1,scale=interp,kind=direction", 28, "defines its own write"),
        ("alpha=0.1,scale=neftune,kind=direction", 29, "defines its own write"),
        ("alpha=0.1,layer=6", 10, "Did you mean 'layers'?"),
        ("alpha=0.1,layers=6:x", 19, "no value"),
        ("alpha=0.1,alpha=0.2", 10, "given twice"),
    ],
)
def test_errors_point_at_the_character(text: str, position: int, part: str) -> None:
    with pytest.raises(SpecError) as caught:
        Perturb.parse(text)
    assert part in str(caught.value)
    assert (caught.value.position, caught.value.text) == (position, text)


def test_keywords_are_checked_alike() -> None:
    for wrong in ([0.1, 0.2], np.array([0.1, 0.2]), torch.tensor([0.1, 0.2])):
        with pytest.raises(UsageError, match="dynprobe sweep"):
            Perturb(wrong)  # type: ignore[arg-type]
    for wrong in (True, None, {}):
        with pytest.raises(UsageError):
            Perturb(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="period"):
        Perturb(0.1, period=8)
    with pytest.raises(UsageError, match="seed"):
        Perturb(0.1, seed=True)
    assert Perturb(0.1, kind="rotate", scale="relnorm").kind == "rotate"


def test_a_direction_is_compared_but_not_printed() -> None:
    v = np.array([1.0, 2.0])
    p = Perturb(0.1, kind="direction", direction=v)
    assert p == Perturb(0.1, kind="direction", direction=torch.tensor(v))
    assert p != Perturb(0.1, kind="direction", direction=[1.0, 2.5])
    assert p != Perturb(0.1, kind="direction")
    assert p.replace(alpha=0.2).direction is not None
    assert Perturb.parse(str(p), direction=v) == p
    assert hash(Perturb.parse(str(p), direction=v)) == hash(p)
    v[0] = 9.0
    assert p.direction is not None
    assert p.direction.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        p.direction[0] = 1.0
    for wrong in ("v.npy", [[1.0, 2.0]], []):
        with pytest.raises(UsageError, match="vector"):
            Perturb(0.1, kind="direction", direction=wrong)


def write(folder: Path, text: str) -> str:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_speaks_the_same_language(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        - alpha: 1e-3
          layers: 6:9            # the number 369 to a YAML 1.1 loader
          positions: "1:"
        - {alpha: 0.1, layers: [6, 9, 50%], phase: decode, seed: 3}
        - {alpha: 2, kind: direction, direction: [1, 0, 0.5]}
        """,
    )
    first, second, third = Perturb.from_yaml(path)
    assert first == Perturb.parse("alpha=0.001,layers=6:9,positions=1:")
    assert second == Perturb.parse("alpha=0.1,layers=6+9+50%,phase=decode,seed=3")
    assert third == Perturb(2, kind="direction", direction=[1, 0, 0.5])
    assert parse_many("@" + path) == (first, second, third)
    with pytest.raises(UsageError, match="holds 3 perturbations"):
        Perturb.parse("@" + path)


def test_yaml_of_one(tmp_path: Path) -> None:
    path = write(tmp_path, "alpha: 0.1\nlayers: 6\n")
    assert Perturb.parse("@" + path) == Perturb(0.1, layers=6)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("alpha: 0.1\nlayer: 6", "Did you mean 'layers'"),
        ("layers: 6", "alpha, the strength, is missing"),
        ("- alpha: 0.1\n- alpha: 0.2\n  seed: -1", "entry 2: seed"),
        ("alpha: 0.1\nalpha: 0.2", "line 2: alpha stands there twice"),
        ("alpha: [0.1, 0.2]", "dynprobe sweep"),
        ("alpha: 0.1\npositions: 1:", "need quotes"),
        ("just text", "expected a mapping"),
        ("[]", "holds no perturbation"),
        ("alpha: !!python/object/apply:os.system [ls]", "entry 1"),
    ],
)
def test_yaml_errors(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        Perturb.from_yaml(write(tmp_path, text))
    assert part in str(caught.value)
    assert "spec.yaml" in str(caught.value)


def test_yaml_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse_many(f"@{tmp_path / 'no.yaml'}")


def test_parse_many(tmp_path: Path) -> None:
    path = write(tmp_path, "alpha: 0.3")
    many = parse_many(["alpha=0.1", Perturb(0.2), "@" + path, {"alpha": 0.4, "layers": 6}])
    assert [p.alpha for p in many] == [0.1, 0.2, 0.3, 0.4]
    assert parse_many(None) == ()
    assert parse_many(Perturb(0.1)) == parse_many("alpha=0.1") == (Perturb(0.1),)
    with pytest.raises(UsageError):
        parse_many(0.1)  # type: ignore[arg-type]
