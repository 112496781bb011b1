"""What is compared in the study of CEM's published orderings: arms, comparisons, and the order of the work.

An arm is a language model that differs from the others in nothing but switches of ``CemConfig``; a comparison is a sum
of held-out losses of arms with a coefficient each (one minus another, or a gain minus another gain). The published
claims are those of *Recasting Transformer Layers as Energy Models* (openreview.net/forum?id=Nbbzu9SDzM), sections 4.1
to 4.4 and appendix D. Where nothing was published, the comparison says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ARMS", "BASE_RATE", "CLAIMS", "RATES", "TIERS", "Best", "Claim", "full_name", "split_point"]

#: Peak rates of the sweep; the middle one is that of every other comparison.
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
BASE_RATE = RATES[2]

_PLAIN: dict[str, Any] = {"steps_attention": 1, "steps_mlp": 1, "preconditioner": "none"}
_T2_PLAIN = {**_PLAIN, "steps_attention": 2, "steps_mlp": 2}
_T1 = {"steps_attention": 1, "steps_mlp": 1}
_ATTENTION, _MLP = {"mlp": "llama"}, {"attention": "llama"}
_GP = {"gp-" + str(t): {"steps_attention": t, "steps_mlp": t} for t in (1, 2, 3)}

#: Switches of every arm; what is not named is the published layer (T = 2, diagonal-plus-low-rank, shared diagonal).
ARMS: dict[str, dict[str, Any]] = {
    "llama": {"attention": "llama", "mlp": "llama"},
    "cem": {},
    "cem-T1": _T1,
    "cem-T3": {"steps_attention": 3, "steps_mlp": 3},
    "cem-T4": {"steps_attention": 4, "steps_mlp": 4},
    "attn-T1-none": _ATTENTION | _PLAIN,
    "attn-T1-lowrank": _ATTENTION | _T1,
    "attn-T2-none": _ATTENTION | _T2_PLAIN,
    "attn-T2-diag": {**_ATTENTION, "preconditioner": "diag"},
    "attn-T2-lowrank": _ATTENTION,
    "mlp-T1-none": _MLP | _PLAIN,
    "mlp-T1-lowrank": _MLP | _T1,
    "mlp-T2-none": _MLP | _T2_PLAIN,
    "mlp-T2-diag": {**_MLP, "preconditioner": "diag"},
    "mlp-T2-lowrank": _MLP,
    "mlp-T1-none-wide": _MLP | _PLAIN | {"intermediate_size": 240},  # 2 D (3/2 M) = 3 D M: the weights of Llama's MLP
    "mlp-T2-lowrank-even": _MLP | {"intermediate_size": 192},  # 5 D (6/5 M) = 6 D M: the products of two Llama MLPs
    "reuse-attn": {"attention": "reuse", "mlp": "llama"},
    "reuse-mlp": {"attention": "llama", "mlp": "reuse"},
    **{
        f"attn-T1-diag-d-{kind}": {**_ATTENTION, **_T1, "preconditioner": "diag", "diagonal": kind}
        for kind in ("none", "shared", "per_head")
    },
    **{f"{name}-none": {**config, "preconditioner": "none"} for name, config in _GP.items()},
    **{f"{name}-lowrank": config for name, config in _GP.items()},
    "gp-llama": {"attention": "llama", "mlp": "llama"},
}


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Attributes:
        topic: Heading it belongs to.
        terms: Arms (``name`` or ``name@rate``) with their coefficients; the first two are what is compared.
        expect: A kind of the module's table, or empty where nothing is claimed.
        published: The claim in short.
    """

    topic: str
    terms: tuple[tuple[str, float], ...]
    expect: str
    published: str


@dataclass(frozen=True)
class Best:
    """The sweep: the loss, or log₂ of the rate, at each one's own minimum."""

    topic: str
    left: str
    right: str
    what: str
    expect: str
    published: str

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """All runs of the sweep."""
        return tuple(
            (f"{name}@{rate:g}", sign) for name, sign in ((self.left, 1.0), (self.right, -1.0)) for rate in RATES
        )


def _minus(topic: str, left: str, right: str, expect: str, published: str) -> Claim:
    return Claim(topic, ((left, 1.0), (right, -1.0)), expect, published)


def _gains(topic: str, arms: Sequence[str], expect: str, published: str) -> Claim:
    return Claim(topic, tuple(zip(arms, (1.0, -1.0, -1.0, 1.0), strict=True)), expect, published)


_T, _R, _P, _D = "T = 2 against T = 1", "recursion against plain reuse", "preconditioner", "diagonal term"
_A, _M, _U, _F, _G = "CEM attention alone", "CEM MLP alone", "T ≥ 3", "full CEM", "Gaussian process (ours)"
_TOP = f"@{RATES[-1]:g}"

CLAIMS: tuple[Claim | Best, ...] = (
    _minus(_T, "attn-T2-lowrank", "attn-T1-lowrank", "below", "T = 2 is better"),
    _minus(_T, "mlp-T2-lowrank", "mlp-T1-lowrank", "below", "T = 2 is better"),
    _minus(_T, "attn-T2-none", "attn-T1-none", "below", "T = 2 is better"),
    _minus(_T, "mlp-T2-none", "mlp-T1-none", "below", "T = 2 is better"),
    _minus(_T, "cem", "cem-T1", "below", "T = 2 is better"),
    _minus(_U, "cem-T3", "cem", "unstable", "unstable"),
    _minus(_U, "cem-T4", "cem", "unstable", "unstable"),
    _minus(_U, "cem-T3" + _TOP, "cem" + _TOP, "unstable", "unstable (highest rate)"),
    _minus(_U, "cem-T4" + _TOP, "cem" + _TOP, "unstable", "unstable (highest rate)"),
    _minus(_R, "reuse-attn", "llama", "above", "re-applying Llama's attention hurts"),
    _minus(_R, "reuse-mlp", "llama", "equal", "re-applying Llama's MLP gives little"),
    _gains(_R, ("attn-T2-lowrank", "attn-T1-lowrank", "reuse-attn", "llama"), "below", "recursion gains more"),
    _gains(_R, ("mlp-T2-lowrank", "mlp-T1-lowrank", "reuse-mlp", "llama"), "below", "recursion gains more"),
    _minus(_R, "attn-T2-lowrank", "reuse-attn", "below", "follows: CEM's beats Llama's, reuse hurts it"),
    _minus(_R, "attn-T2-none", "reuse-attn", "", "no claim (nearest in compute)"),
    _minus(_R, "mlp-T2-lowrank-even", "reuse-mlp", "", "no claim (equal compute)"),
    _minus(_P, "attn-T1-lowrank", "attn-T1-none", "equal", "matters little at T = 1"),
    _minus(_P, "mlp-T1-lowrank", "mlp-T1-none", "equal", "matters little at T = 1"),
    _minus(_P, "attn-T2-lowrank", "attn-T2-none", "below", "clearly better at T = 2"),
    _minus(_P, "mlp-T2-lowrank", "mlp-T2-none", "below", "clearly better at T = 2"),
    _minus(_P, "attn-T2-lowrank", "attn-T2-diag", "at_most", "diagonal-plus-low-rank ≥ diagonal"),
    _minus(_P, "mlp-T2-lowrank", "mlp-T2-diag", "at_most", "diagonal-plus-low-rank ≥ diagonal"),
    _minus(_D, "attn-T1-diag-d-shared", "attn-T1-diag-d-none", "below", "the diagonal is essential"),
    _minus(_D, "attn-T1-diag-d-per_head", "attn-T1-diag-d-shared", "equal", "one per head is close to a shared one"),
    _minus(_A, "attn-T1-none", "llama", "equal", "about Llama's, with half its attention weights"),
    _minus(_A, "attn-T2-lowrank", "llama", "below", "beats Llama's attention"),
    _minus(_M, "mlp-T1-none", "llama", "above", "worse, with two thirds of the MLP's weights"),
    _minus(_M, "mlp-T1-none-wide", "mlp-T1-none", "below", "a modest gain when widened to Llama's weights"),
    _minus(_M, "mlp-T1-none-wide", "llama", "", "no claim (equal weights)"),
    _minus(_M, "mlp-T2-lowrank", "llama", "above", "still loses to Llama's MLP"),
    _minus(_M, "mlp-T2-lowrank", "mlp-T1-none", "below", "with a smaller gap"),
    Best(_F, "cem", "llama", "loss", "below", "slightly better, each at its best rate"),
    Best(_F, "cem", "llama", "log2 rate", "above", "prefers a higher rate"),
    _minus(_G, "gp-2-none", "gp-1-none", "below", "none; expected as in text"),
    _minus(_G, "gp-2-lowrank", "gp-1-lowrank", "below", "none; expected as in text"),
    _minus(_G, "gp-3-none", "gp-2-none", "unstable", "none; expected as in text"),
    _minus(_G, "gp-3-lowrank", "gp-2-lowrank", "unstable", "none; expected as in text"),
    _minus(_G, "gp-2-lowrank", "gp-2-none", "below", "none; expected as in text"),
    _minus(_G, "gp-2-lowrank", "gp-llama", "", "no claim"),
)

_SWEEP = [f"{name}@{rate:g}" for rate in RATES if rate != BASE_RATE for name in ("llama", "cem")]
#: The order of work: a tier is finished for every seed before the next begins.
TIERS: tuple[tuple[str, ...], ...] = (
    (
        "llama", "cem", "cem-T1", "attn-T1-none", "attn-T1-lowrank", "attn-T2-lowrank", "mlp-T1-none", "mlp-T1-lowrank",
        "mlp-T2-lowrank", "mlp-T1-none-wide",
    ),
    ("reuse-attn", "reuse-mlp", "attn-T2-none", "mlp-T2-none", "attn-T1-diag-d-none", "attn-T1-diag-d-shared"),
    tuple(_SWEEP),
    ("attn-T1-diag-d-per_head", "mlp-T2-lowrank-even", "cem-T3", "cem-T4", "attn-T2-diag", "mlp-T2-diag"),
    ("gp-llama", *(f"gp-{t}-{kind}" for t in (1, 2, 3) for kind in ("none", "lowrank"))),
    ("cem-T3" + _TOP, "cem-T4" + _TOP),
)  # fmt: skip


def split_point(point: str) -> tuple[str, float]:
    """Return the arm and the peak rate of ``name`` or ``name@rate``."""
    name, _, rate = point.partition("@")
    return name, float(rate) if rate else BASE_RATE


def full_name(point: str) -> str:
    """Return the run's name with its rate written out."""
    name, rate = split_point(point)
    return f"{name}@{rate:g}"
