"""A claim as data: the sentence, what it is taken to mean, what must be measured, and what would refute it.

A sentence such as "perplexity decreases monotonically with more iterations" has no verdict until somebody says which
number, on which rows, against which margin. A :class:`Claim` says it before any data are seen: one or more *parts*,
each a shape of analysis (:mod:`._parts`) with a prediction. A sentence that cannot be tested with what this package
has is a claim too; it carries the reason in ``untestable_here``.

Nothing here looks at data. A row that names an unknown metric, an unknown role, no refutation, or both an analysis and
an excuse is refused when the file is read.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from dynprobe.claims._parts import Part, Row, known_metric, roles_of
from dynprobe.errors import did_you_mean

__all__ = ["PROTOCOLS", "Claim", "Panel", "Place", "Role", "Source"]


PROTOCOLS = ("run", "sweep", "threshold", "iterate", "recover", "attract", "dissociate", "evaluate")


class Place(Row):
    """Where a sentence stands: a text of ``texts`` and a line of it."""

    text: str
    line: int = Field(ge=1)


class Source(Row):
    """A text that claims are taken from."""

    title: str
    author: str
    kind: str
    reference: str


class Role(Row):
    """A part that a model plays in a test; its protocol and settings win over those of the claim."""

    what: str
    protocol: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class Panel(Row):
    """The models that a test needs.

    Attributes:
        roles: Roles in the order in which models are named; one model each.
        at_least: For claims about populations: this many models or more, all in the one role.
        published: The models that the sentence is about.
        note: What the models must have in common.
    """

    roles: dict[str, Role]
    at_least: int | None = Field(None, ge=2)
    published: tuple[str, ...] = ()
    note: str = ""

    @model_validator(mode="after")
    def _one_role(self) -> Panel:
        if not self.roles:
            raise ValueError("a panel has at least one role")
        if self.at_least is not None and len(self.roles) != 1:
            raise ValueError("a panel of any number of models has one role")
        return self


class Claim(Row):
    """One empirical sentence of a seed text.

    Attributes:
        id: ``topic.name``.
        quote: The sentence, or the part of it that is claimed, word for word.
        source: Where it stands; ``also`` where it stands again.
        reading: What it is taken to mean here, where the sentence leaves that open.
        metrics: Metric ids, or names of :data:`STATISTICS`.
        protocol: What makes the data.
        settings: Its settings; flags win.
        panel: The models it needs.
        parts: The analysis; all parts must survive.
        falsified_by: What would refute it.
        untestable_here: Why it cannot be tested; then there are no parts.
    """

    id: str = Field(pattern=r"^[a-z]+\.[a-z0-9_]+$")
    topic: str
    quote: str = Field(min_length=5)
    source: Place
    also: tuple[Place, ...] = ()
    reading: str = ""
    metrics: tuple[str, ...] = Field(min_length=1)
    protocol: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    panel: Panel | None = None
    parts: tuple[Part, ...] = ()
    falsified_by: str = Field(min_length=10)
    untestable_here: str | None = Field(None, min_length=10)

    @property
    def testable(self) -> bool:
        """Whether it can be tested with what this package has."""
        return self.untestable_here is None

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_metric(name) for name in value)

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        if not self.testable:
            if self.parts:
                raise ValueError(f"{self.id} has an analysis and says why there is none")
            return self
        if not self.parts or self.panel is None or self.protocol is None:
            raise ValueError(f"{self.id} needs protocol, panel and parts, or the reason in untestable_here")
        for name in (self.protocol, *(r.protocol for r in self.panel.roles.values())):
            if name is not None and name not in PROTOCOLS:
                raise ValueError(f"{self.id}: no protocol {name!r}.{did_you_mean(name, PROTOCOLS)}")
        for part in self.parts:
            if part.metric not in self.metrics:
                raise ValueError(f"{self.id}: part metric {part.metric} is not among its metrics")
            unknown = sorted(roles_of(part) - set(self.panel.roles))
            if unknown:
                raise ValueError(f"{self.id}: no role {unknown[0]!r}.{did_you_mean(unknown[0], self.panel.roles)}")
        return self
