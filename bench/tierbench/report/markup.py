"""HTML and SVG that cannot be broken by what is in a record: text becomes markup here and nowhere else.

`tag("td", label)` escapes `label`; only what `tag` itself has made passes as it is. Attribute names are
written by us, values are escaped like text. Control characters, which HTML forbids, and direction
overrides, which can make a line read as another, are shown as U+FFFD.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

VOID = frozenset({"meta", "br", "hr", "img", "col", "wbr"})
TEXT_SHOWN_MAX = 600  # characters of one text in an element; what is longer comes out of a record


class Markup(str):
    """Text that is HTML already."""


Child = str | int | Markup | None


def escape(text: object) -> Markup:
    if isinstance(text, Markup):
        return text
    shown = str(text)
    cleaned = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else c
        for c in shown
    )
    return Markup(html.escape(cleaned, quote=True))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element; `class_` and `for_` lose their underscore, others turn it into a dash, None leaves out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{join(*(_shortened(child) for child in children))}</{name}>")


def _shortened(child: Child) -> Child:
    if isinstance(child, Markup) or not isinstance(child, str) or len(child) <= TEXT_SHOWN_MAX:
        return child
    return child[:TEXT_SHOWN_MAX] + "…"


def join(*children: Child) -> Markup:
    return Markup("".join(escape(child) for child in children if child is not None))


def join_with(between: str, children: Iterable[Child]) -> list[Markup]:
    """The children with `between` between them."""
    found = [escape(child) for child in children]
    return [part for child in found for part in (escape(between), child)][1:]


def prose(text: str) -> Markup:
    """Our own sentences, in which `code` is set as code; never used on what a record says."""
    parts = text.split("`")
    return join(*(tag("code", part) if i % 2 else Markup(html.escape(part)) for i, part in enumerate(parts)))
