"""Rendering: the template, the data as one block of JSON, and a policy that lets nothing else run.

Three things keep a text from becoming markup. The template escapes everything. The data block has no ``<`` in it, so no
text can close it. And the page's own policy names the hashes of its two scripts: any other script, and any connection,
is refused by the browser, whatever a text says.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from dynprobe.errors import UsageError
from dynprobe.runs._json import dumps
from dynprobe.runs._report._encoded import encoded
from dynprobe.runs._report._parts import Figure, Frame, Report, Table

__all__ = ["in_script", "rendered"]


def rendered(page: Report) -> bytes:
    """Return the page as UTF-8.

    Raises:
        UsageError: Plotly or jinja2 is missing.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError("reports need plotly and jinja2: pip install 'dynprobe[report]'") from error
    folder = files("dynprobe.runs._report") / "templates"
    texts = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("report.html.jinja", "report.css", "report.js")
    }
    scripts = {"plotly": get_plotlyjs(), "own": texts["report.js"]}
    data = in_script(_data(page))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(texts["report.html.jinja"])
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts.values())
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'none'; "
        "form-action 'none'; base-uri 'none'"
    )
    text = template.render(page=page, css=texts["report.css"], scripts=scripts, data=data, policy=policy)
    # A lone surrogate, which UTF-8 cannot hold, becomes a mark that says so.
    return text.encode("utf-8", "replace")


def in_script(value: Any) -> str:
    r"""Return JSON that may stand inside a ``<script>`` element.

    Example:
        >>> in_script({"text": "</script><b>"})
        '{"text":"\\u003c/script\\u003e\\u003cb\\u003e"}'
    """
    text = json.dumps(json.loads(dumps(value)), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _data(page: Report) -> dict[str, Any]:
    frames: dict[str, Any] = {}
    figures, tables = [], []
    for frame in _frames(page):
        if frame.key in frames:
            raise AssertionError(f"two frames of a page are called {frame.key!r}")
        frames[frame.key] = encoded(frame)
    for section in page.sections:
        for figure in section.figures:
            figures.append(
                {"key": figure.key, "frame": figure.frames[0].key, "choose": list(figure.choose),
                 "charts": [
                     {"traces": list(c.traces), "layout": c.layout, "height": c.height, "title": c.title}
                     for c in figure.charts
                 ]}
            )  # fmt: skip
        tables += [{"frame": t.frame.key, "filters": list(t.filters)} for t in (*section.tables, *section.closing)]
    return {"frames": frames, "figures": figures, "tables": tables}


def _frames(page: Report) -> Iterator[Frame]:
    items: list[Figure | Table] = []
    for section in page.sections:
        items += [*section.figures, *section.tables, *section.closing]
    for item in items:
        yield from item.frames if isinstance(item, Figure) else (item.frame,)
