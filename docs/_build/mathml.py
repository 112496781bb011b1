"""Formulas as MathML at build time: pages need no script and no network to show them.

``$…$`` and ``$$…$$`` in a page become MathML by pandoc's reader of LaTeX. A formula that cannot be converted stops the
build, because the reader would see its source.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from typing import Any

import pypandoc
from mkdocs.exceptions import PluginError

MATHML = "http://www.w3.org/1998/Math/MathML"
_PAGE = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_MATH = re.compile(r"<math .*?</math>", re.DOTALL)
_APPLY = "\u2061"
_THIN = "0.167em"
ET.register_namespace("", MATHML)


def mathml(formulas: list[tuple[str, bool]]) -> list[str]:
    """Convert LaTeX formulas, each with whether it stands on a line of its own.

    Raises:
        ValueError: A formula is not understood; it is named.
    """
    if not formulas:
        return []
    source = "\n\n".join(f"$${tex.strip()}$$" if block else f"${tex.strip()}$" for tex, block in formulas)
    page = pypandoc.convert_text(source, "html", format="markdown", extra_args=["--mathml", "--wrap=none"])
    found = _MATH.findall(page)
    if len(found) != len(formulas):
        lost = re.findall(r'class="math[^>]*>(.*?)</', page, re.DOTALL)
        raise ValueError(f"{len(formulas) - len(found)} formulas are no LaTeX that pandoc knows: {lost}")
    return [_tidy(one) for one in found]


def _tidy(text: str) -> str:
    """Drop the LaTeX source beside the formula, and put the thin space after operator names that TeX would put."""
    root = ET.fromstring(text)
    semantics = root[0]
    root.append(semantics[0])
    root.remove(semantics)
    for row in [*root.iter(f"{{{MATHML}}}mrow"), *root.iter(f"{{{MATHML}}}mtd")]:
        for child in list(row):
            if _is_operator(child):
                _space_around(row, child)
    return ET.tostring(root, encoding="unicode")


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _is_operator(element: ET.Element) -> bool:
    """Whether an element is an upright name that acts on what follows: ln, max under a t, mean."""
    if _tag(element) in ("msub", "msup", "msubsup", "munder", "munderover"):
        base = element[0]
        upright = base.get("mathvariant") == "normal" and len(base.text or "") > 1
        return _is_operator(base) or (_tag(element).startswith("munder") and upright)
    return _tag(element) == "mrow" and len(element) == 2 and element[1].text == _APPLY


def _space_around(row: ET.Element, operator: ET.Element) -> None:
    at = list(row).index(operator)
    after = row[at + 1] if at + 1 < len(row) else None
    opens = after is not None and _tag(after) == "mo" and after.get("form") == "prefix" and after.text not in "|‖"
    if after is not None and not opens and _tag(after) != "mspace":
        row.insert(at + 1, ET.Element(f"{{{MATHML}}}mspace", width=_THIN))
    if at and _tag(row[at - 1]) not in ("mo", "mspace") and not _is_operator(row[at - 1]):
        row.insert(at, ET.Element(f"{{{MATHML}}}mspace", width=_THIN))


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace every formula of a page."""
    formulas = [(html.unescape(m[3]), m[2] == "[") for m in _PAGE.finditer(content)]
    try:
        done = iter(mathml(formulas))
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
    return _PAGE.sub(lambda m: f'<div class="formula">{next(done)}</div>' if m[2] == "[" else next(done), content)
