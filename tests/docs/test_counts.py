"""What the pages count and list is what there is."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from dynprobe import claims
from dynprobe.metrics import ids, spec
from dynprobe.metrics._registry import PLUGINS
from dynprobe.probes._scales import SCALES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = ("six", "seven", "eight", "nine", "ten", "eleven", "twelve")


OURS = [i for i in ids() if PLUGINS.plugin(i.partition("/")[0]) is None]


def test_every_metric_stands_in_the_readme():
    section = README.partition("## What it measures")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z0-9_.*]+/\d+)`", section)
    lacking = [i for i in OURS if not any(fnmatchcase(i, n) or fnmatchcase(i, n.replace("/", ".*/")) for n in named)]
    assert lacking == []
    assert [n for n in named if not any(fnmatchcase(i, n) for i in OURS)] == []


def test_the_readme_counts_claims_and_scales():
    known = claims.load()
    assert f"{sum(c.testable for c in known)} of {len(known)} with a test that can refute it" in README
    assert f"{WORDS[len(SCALES.builtin) - 6]} named noise scales" in README


def test_the_invariances_that_are_tried_are_counted():
    said = re.search(r"all (\d+) declared invariances", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert said is not None
    assert int(said[1]) == sum(len(spec(i).invariances) for i in OURS)
