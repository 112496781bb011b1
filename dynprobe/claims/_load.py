"""The seeds' claims, read and checked.

``claims.yaml`` comes with the package: ``texts`` names the seed texts, ``claims`` has one row per empirical sentence.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynprobe.claims._claim import Claim, Source
from dynprobe.errors import UsageError, did_you_mean

__all__ = ["CLAIMS_FILE", "find", "load", "read_claims", "texts"]

#: The file that comes with the package.
CLAIMS_FILE = Path(__file__).with_name("claims.yaml")


def load() -> tuple[Claim, ...]:
    """Return the claims that come with the package.

    Example:
        >>> from dynprobe import claims
        >>> [c.quote for c in claims.load() if c.id == "csm.perplexity_monotone"]
        ['Perplexity decreases monotonically with more iterations']
    """
    return _shipped()[1]


def texts() -> dict[str, Source]:
    """Return the texts that the claims are taken from, by the name that ``source`` uses."""
    return dict(_shipped()[0])


def find(claim_id: str) -> Claim:
    """Return a claim by id.

    Raises:
        UsageError: There is none; the nearest is suggested.

    Example:
        >>> find("kappa.rises").protocol
        'run'
    """
    known = {claim.id: claim for claim in load()}
    if claim_id not in known:
        raise UsageError(f"no claim {claim_id!r}.{did_you_mean(claim_id, known)} `dynprobe claims` lists all of them.")
    return known[claim_id]


def read_claims(path: Path) -> tuple[dict[str, Source], tuple[Claim, ...]]:
    """Read a file of claims.

    Raises:
        UsageError: A row is wrong: an unknown metric, role or column of the schema, no refutation, two rows of one id,
            a text that is not listed.
    """
    import yaml

    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) != {"texts", "claims"}:
        raise UsageError(f"{path} has two keys, texts and claims")
    sources = {name: _checked(Source, row, f"{path}: text {name}") for name, row in content["texts"].items()}
    found: dict[str, Claim] = {}
    for number, row in enumerate(content["claims"]):
        claim = _checked(Claim, row, f"{path}: claim {row.get('id', number) if isinstance(row, dict) else number}")
        if claim.id in found:
            raise UsageError(f"{path}: two claims have the id {claim.id}")
        for place in (claim.source, *claim.also):
            if place.text not in sources:
                raise UsageError(f"{path}: {claim.id}: no text {place.text!r}.{did_you_mean(place.text, sources)}")
        found[claim.id] = claim
    return sources, tuple(found.values())


def _checked(kind: Any, row: Any, where: str) -> Any:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(x) for x in first["loc"])
        raise UsageError(f"{where}: {place + ': ' if place else ''}{first['msg']}") from error


@functools.cache
def _shipped() -> tuple[dict[str, Source], tuple[Claim, ...]]:
    return read_claims(CLAIMS_FILE)
