"""A run as one page that needs nothing else: no server, no network, no installation.

The page is made for two readers. Somebody who was not there sees what was done, to which model, with which result and
how sure that is; somebody who doubts it finds under every picture the numbers it is drawn from, the ids of the metrics,
and at the end what the run checked about itself. Texts in it were written by models and by whoever wrote the prompts:
they are data, never markup, and a policy inside the page forbids any script but its own and any connection at all.

The same run gives the same bytes.
"""

from __future__ import annotations

from dynprobe.runs._report._make import report

__all__ = ["report"]
