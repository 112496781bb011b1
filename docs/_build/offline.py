"""Say whether a built site would fetch anything when it is read: ``python docs/_build/offline.py site``.

Links in the text may lead anywhere. Scripts, styles, fonts, pictures, preconnections, bases and forms may not, and
neither may what a style names.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

#: Tag → attributes that make a browser fetch or send.
FETCHES = {
    "script": ("src",), "link": ("href",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "embed": ("src",),
    "use": ("href", "xlink:href"), "image": ("href", "xlink:href"),
    # A base turns every relative address into a remote one, and a form sends what was typed.
    "base": ("href",), "form": ("action",), "button": ("formaction",), "input": ("formaction", "src"),
}  # fmt: skip
_REMOTE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
_IN_STYLE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class Fetches(HTMLParser):
    """Collects what a page fetches from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._style = tag == "style"
        if tag == "link" and given.get("rel") == "canonical":
            return
        wanted = [given.get(name) or "" for name in FETCHES.get(tag, ())]
        self.found += [f"<{tag}> {value}" for value in wanted if _REMOTE.match(value)]
        self.found += [f"style {url}" for url in _IN_STYLE.findall(given.get("style") or "")]

    def handle_data(self, data: str) -> None:
        if self._style:
            self.found += [f"<style> {url}" for url in _IN_STYLE.findall(data)]

    def handle_endtag(self, tag: str) -> None:
        self._style = False


def remote(site: Path) -> list[str]:
    """Return everything that pages and styles of a site fetch from elsewhere, with the file that names it."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(site)}: {what}" for what in parser.found]
    for style in sorted(site.rglob("*.css")):
        urls = _IN_STYLE.findall(style.read_text(encoding="utf-8"))
        found += [f"{style.relative_to(site)}: {url}" for url in urls]
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "index.html").is_file():
        sys.exit(f"{folder} holds no site; make docs builds it")
    bad = remote(folder)
    sys.exit("\n".join(["The site would fetch:", *bad]) if bad else 0)
