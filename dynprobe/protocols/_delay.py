"""Delay diagnostics: false neighbours and delay PCA that never come without what they must be read against.

The follow-up of the attractor layer reported that routing of mixture-of-experts models moves in "two dimensions" with
"universal fixed axes", from false nearest neighbours and principal components of delay windows of short scalar series.
Both results are what noise gives: the axes of a standardised two-column delay matrix are (1, ±1)/√2 for every series,
and a random walk of a hundred steps has few false neighbours in two or three dimensions. So here each number is one row
of a table that also holds the length of the series, the lag and the Theiler window with the rules that chose them, the
lag-1 autocorrelation, and the same number on surrogates: its 95 % band and the rank of the data among them.

A number that the series is too short for is NaN with a reason. There is no way to ask for fewer than 19 surrogates
(below that no rank reaches p = 0.1 from both sides) or for none.

What a small p says: the series is not of the surrogates' kind. That may be determinism, and as well a trend, a change
of variance, or a jump between the ends (``end_mismatch``, ``ft`` and ``iaaft`` only). Reading rows of many dimensions,
statistics and series is a family of tests; nothing here corrects for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from dynprobe.errors import UsageError, did_you_mean
from dynprobe.metrics._delay import DelayPca, check_embedding
from dynprobe.metrics._delay_choice import Choice, choose_lag, choose_theiler
from dynprobe.metrics._inputs import as_array
from dynprobe.metrics._result import Array
from dynprobe.metrics._surrogates import SURROGATES, SurrogateKind, end_mismatch, spectrum_error
from dynprobe.metrics._surrogates import surrogates as make_surrogates
from dynprobe.protocols._delay_statistics import Key, Settings, numbers, place, remark_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DelayDiagnostics", "delay_diagnostics"]

_FEWEST: Final = 19
_LEVEL: Final = 0.05


@dataclass(frozen=True, eq=False, repr=False)
class DelayDiagnostics:
    """What :func:`delay_diagnostics` found.

    Attributes:
        table: One row per series, number and kind of surrogate. ``statistic, dim, component`` say which number;
            ``value, reason, remark, n_points``; ``n, n_trimmed, lag, lag_rule, theiler, theiler_rule, r1,
            end_mismatch`` of the series; ``surrogate, n_surrogates, low, median, high, p, p_less, p_greater,
            p_reason, spectrum_error`` of the surrogates.
        axes: Principal axes of the data: ``series, dim, component, coordinate, value``.
        settings: What was asked.
    """

    table: pd.DataFrame
    axes: pd.DataFrame
    settings: Mapping[str, Any]

    def frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """Return one row per number and kind of surrogate over all series.

        Medians over the series where the number is defined, how many these are, and on how many p ≤ 0.05 (by chance
        one in twenty, if the surrogates are right).
        """
        rows = self.table.assign(outside=self.table["p"] <= _LEVEL, known=self.table["p"].notna())
        keys = ["statistic", "dim", "component", "surrogate"]
        return rows.groupby(keys, sort=False).agg(
            n_series=("series", "size"), n_defined=("value", "count"), value=("value", "median"),
            low=("low", "median"), high=("high", "median"), n_tested=("known", "sum"), n_outside=("outside", "sum"),
            remark=("remark", "first"),
        ).reset_index()  # fmt: skip

    def figure(self, series: str | None = None) -> Figure:
        """Return the picture of one series: false neighbours, first share, and the axes beside cosines.

        Args:
            series: Its name; default the first.
        """
        from dynprobe.runs._plot_delay import draw_delay

        return draw_delay(self.table, self.axes, series, accept=self.settings["accept"])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists and mappings; a number that is not known is None."""
        return {
            "settings": dict(self.settings),
            "table": _records(self.table),
            "axes": _records(self.axes),
        }

    def save(self, target: str | Path) -> Path:
        """Write everything to ``.json``, or the table to ``.csv``.

        Raises:
            UsageError: The ending is another, or the folder is not there.
        """
        from dynprobe.runs._atomic import write_bytes
        from dynprobe.runs._csv import as_csv
        from dynprobe.runs._json import dumps

        target = Path(target)
        if target.suffix not in (".json", ".csv"):
            raise UsageError(f"--out {target}: the ending says the format, one of .json, .csv")
        if not target.parent.is_dir():
            raise UsageError(f"--out {target}: there is no folder {target.parent}")
        text = dumps(self.to_dict(), indent=1) + "\n" if target.suffix == ".json" else as_csv(self.table)
        write_bytes(target, text.encode("utf-8"))
        return target

    def __repr__(self) -> str:
        n = self.table["series"].nunique()
        made = f"{self.settings['n_surrogates']} of each of {', '.join(self.settings['surrogates'])}"
        return f"<DelayDiagnostics of {n} series, {len(self.table)} rows; surrogates: {made}>"


def delay_diagnostics(
    series: Any,
    dims: Sequence[int] = (1, 2, 3, 4, 5, 6),
    lag: int | str = "auto",
    theiler: int | str = "auto",
    *,
    surrogates: Iterable[SurrogateKind] = ("ft", "iaaft", "ar1"),
    n_surrogates: int = 39,
    seed: int = 0,
    rtol: float = 15.0,
    atol: float = 2.0,
    accept: float = 0.05,
) -> DelayDiagnostics:
    """Diagnose scalar series by delay embedding, each number beside its surrogates.

    Statistics: ``r1`` lag-1 autocorrelation; ``fnn`` share of false nearest neighbours, and ``fnn_distance``,
    ``fnn_size`` by either criterion alone; ``fnn_dimension`` the first dimension with fewer than ``accept``; of the
    first three principal axes of the standardised delay matrix ``pc_share`` their share of the variance,
    ``pc_cosine``, ``pc_sine``, ``pc_legendre`` their likeness to the nearest axis that noise or a smooth series gives,
    and ``pc_mirror`` how nearly they are even or odd.

    Args:
        series: One series [step], several of equal length [step, channel], or a mapping name → series. Missing values
            at the ends are cut off; one in between makes every number NaN (``nonfinite``).
        dims: Embedding dimensions.
        lag: Steps between coordinates, or ``auto``: first minimum of the mutual information.
        theiler: Only pairs |i − j| ≥ theiler may be neighbours; ``auto``: first lag with autocorrelation below 1/e.
        surrogates: Kinds: ``ft``, ``aaft``, ``iaaft``, ``ar1``.
        n_surrogates: How many of each, at least 19; 39 reach p = 0.05 from both sides.
        seed: Seed of the surrogates. They also depend on the name of the series and not on what else is diagnosed.
        rtol: First criterion of false neighbours, the ratio of distances.
        atol: Second criterion, in standard deviations of the series.
        accept: Share of false neighbours that ``fnn_dimension`` accepts.

    Returns:
        The table, one row per series, number and kind of surrogate.

    Raises:
        UsageError: A setting has no meaning.
        MetricError: A series has another shape.

    Source: Kennel, Brown & Abarbanel 1992; Broomhead & King 1986; Theiler et al. 1992.

    Example:
        >>> noise = np.random.default_rng(0).standard_normal(120)
        >>> found = delay_diagnostics(noise, dims=(2,), lag=1, surrogates=["ar1"])
        >>> rows = found.table.set_index("statistic")
        >>> f"{rows.loc['pc_cosine', 'value'].iloc[0]:.6f}", rows.loc["pc_cosine", "remark"].iloc[0]
        ('1.000000', 'identity: 1 for every series')
        >>> delay_diagnostics(noise[:15], dims=(2,)).table.query("statistic == 'fnn'")["reason"].iloc[0]
        'points<20'
    """
    kinds, chosen = _kinds(surrogates), _dims(dims)
    if n_surrogates < _FEWEST or seed < 0:
        raise UsageError(f"n_surrogates={n_surrogates}, seed={seed}; at least {_FEWEST} surrogates and seed 0")
    if not accept > 0 or not rtol > 0 or not atol > 0:
        raise UsageError(f"rtol={rtol}, atol={atol}, accept={accept}; each is above 0")
    rows: list[dict[str, Any]] = []
    axes: list[pd.DataFrame] = []
    for name, raw in _named(series).items():
        x, trimmed = _trimmed(raw)
        step, window = _choice("lag", lag, choose_lag, x), _choice("theiler", theiler, choose_theiler, x)
        s = Settings(chosen, step.value, window.value, rtol, atol, accept)
        found, pcas = numbers(x, s)
        head = {
            "series": name, "n": len(x), "n_trimmed": trimmed, "lag": step.value, "lag_rule": step.rule,
            "theiler": window.value, "theiler_rule": window.rule, "r1": found[Key("r1", 0, 0)].value,
            "end_mismatch": end_mismatch(x),
        }  # fmt: skip
        axes += [_axes_frame(name, dim, pca) for dim, pca in pcas.items() if pca.reason is None]
        # Nothing to compare, nothing to make: too short, constant, or with holes.
        some = any(number.reason is None for key, number in found.items() if key.statistic != "r1")
        for kind in kinds:
            made = make_surrogates(x, kind, n_surrogates, seed=seed, key=name) if some else None
            drawn = [numbers(other, s)[0] for other in made] if made is not None else []
            error = float(spectrum_error(x, made).max()) if made is not None and kind != "ar1" else float("nan")
            for key, number in found.items():
                among = np.array([other[key].value for other in drawn], dtype=np.float64)
                rows.append({
                    **head, **key._asdict(), **number._asdict(), "remark": remark_of(key), "surrogate": kind,
                    **_placed(place(key, number.value, among, _FEWEST)), "spectrum_error": error,
                })  # fmt: skip
    settings = {
        "dims": list(chosen), "lag": lag, "theiler": theiler, "surrogates": list(kinds), "n_surrogates": n_surrogates,
        "seed": seed, "rtol": rtol, "atol": atol, "accept": accept,
    }  # fmt: skip
    columns = ["series", "dim", "component", "coordinate", "value"]
    drawn_axes = pd.concat(axes, ignore_index=True) if axes else pd.DataFrame(columns=columns)
    return DelayDiagnostics(pd.DataFrame(rows)[_COLUMNS], drawn_axes, settings)


_COLUMNS = [
    "series", "statistic", "dim", "component", "value", "reason", "remark", "match", "n_points", "n", "n_trimmed",
    "lag", "lag_rule", "theiler", "theiler_rule", "r1", "end_mismatch", "surrogate", "n_surrogates", "low", "median",
    "high", "p", "p_less", "p_greater", "p_reason", "spectrum_error",
]  # fmt: skip


def _placed(found: Any) -> dict[str, Any]:
    """The place under the names of its columns; ``n`` and ``reason`` are those of the series already."""
    names = {"n": "n_surrogates", "reason": "p_reason"}
    return {names.get(key, key): value for key, value in found._asdict().items()}


def _kinds(asked: Iterable[SurrogateKind]) -> tuple[SurrogateKind, ...]:
    kinds: tuple[Any, ...] = tuple(dict.fromkeys((asked,) if isinstance(asked, str) else asked))
    for kind in kinds:
        if kind not in SURROGATES:
            near = did_you_mean(str(kind), SURROGATES)
            raise UsageError(f"there is no surrogate {kind!r}.{near} There are: {', '.join(SURROGATES)}")
    if not kinds:
        raise UsageError(f"no surrogates were asked for; a number without them is not given: {', '.join(SURROGATES)}")
    return kinds


def _dims(asked: Sequence[int]) -> tuple[int, ...]:
    dims = tuple(sorted(set(asked)))
    if not dims:
        raise UsageError("dims is empty; name embedding dimensions such as 1,2,3")
    for dim in dims:
        check_embedding(dim, 1)
    return tuple(int(dim) for dim in dims)


def _choice(name: str, asked: int | str, rule: Any, x: Array) -> Choice:
    if asked == "auto":
        chosen: Choice = rule(x)
        return chosen
    if isinstance(asked, str):
        raise UsageError(f"{name}={asked!r}; it is auto or a whole number of at least 1")
    check_embedding(1, **{"lag": 1, name: asked})
    return Choice(int(asked), "given")


def _named(series: Any) -> dict[str, Array]:
    if isinstance(series, Mapping):
        named = {str(name): as_array(x, "delay_diagnostics")[0] for name, x in series.items()}
    else:
        values, _ = as_array(series, "delay_diagnostics")
        if values.ndim == 2:
            named = {str(channel): values[:, channel] for channel in range(values.shape[1])}
        else:
            named = {"series": values}
    for name, x in named.items():
        if x.ndim != 1:
            raise UsageError(f"series {name!r} has shape {list(x.shape)}; one is [step], several are [step, channel]")
    if not named:
        raise UsageError("there is no series to diagnose")
    return named


def _trimmed(x: Array) -> tuple[Array, int]:
    """The series without missing values at its ends; whole where nothing is finite."""
    there = np.flatnonzero(np.isfinite(x))
    if not len(there):
        return x, 0
    cut = x[there[0] : there[-1] + 1]
    return cut, len(x) - len(cut)


def _axes_frame(name: str, dim: int, pca: DelayPca) -> pd.DataFrame:
    component, coordinate = np.divmod(np.arange(dim * dim), dim)
    return pd.DataFrame(
        {"series": name, "dim": dim, "component": component + 1, "coordinate": coordinate, "value": pca.axes.ravel()}
    )


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    plain = frame.astype(object).where(frame.notna(), None).replace({np.inf: "inf", -np.inf: "-inf"})
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]
