"""A recovery mode in words: read, written back, and refused where it cannot act."""

import pytest

from dynprobe.controllers.recovery import Always, Deadband, RecoveryWords, parse_recovery
from dynprobe.errors import UsageError


def test_words_make_the_controllers_they_name() -> None:
    (made,) = parse_recovery(
        "slerp, detector=norm-step-zmax, m=1, m-off=2, q-lo=0.5, q_hi=0.9, gain=0.25"
    ).controllers()
    assert made.id == "recovery.slerp/1"
    assert made.timing == Deadband("norm_step_zmax", 1, 2, 0.5, 0.9, 0.25, 1.0, 2**31)  # type: ignore[attr-defined]
    (always,) = parse_recovery("mode=shrink,timing=always,site=layers=1").controllers()
    assert isinstance(always.timing, Always)  # type: ignore[attr-defined]
    assert always.timing.g_max == 0.5  # type: ignore[attr-defined]
    assert str(always.site) == "layers=1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["slerp", "clamp,gain=1.0", "subspace,timing=always,site=layers=60%", "str,m=2"])
def test_they_are_written_back(text: str) -> None:
    assert str(parse_recovery(text)) == text
    assert parse_recovery(text) == RecoveryWords(**vars(parse_recovery(text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slarp", "Did you mean 'slerp'"), ("", "no key=value pair"), ("gain=0.5", "names no mode"),
        ("slerp,gian=0.5", "Did you mean 'gain'"), ("slerp,gain", "no key=value pair"), ("slerp,m=x", "a whole number"),
        ("slerp,gain=0.1,gain=0.2", "given twice"), ("slerp,gain=2", "a gain lies"), ("slerp,q_lo=0.99", "quantiles"),
        ("slerp,detector=entrpy", "Did you mean 'entropy'"), ("slerp,timing=oracle", "detector or always"),
        ("guard", "takes tokens back"), ("HYBRID_RECOVERY", "takes tokens back"), ("sampling", "no likelihood changes"),
        ("none", "does nothing"), ("dom", "operators from a file"), ("random:slerp", r"dp\.recover makes it"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_said(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recovery(text)
