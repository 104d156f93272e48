"""The report's page, parsed: it runs nothing, fetches nothing, and every element is closed."""

import re
from html.parser import HTMLParser
from typing import Any

from fedpact_contract.language import Lang
from fedpact_server.report.html import render

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--"
VOID = {"meta", "rect", "circle", "path", "polyline", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every element must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(report: dict[str, Any], lang: Lang = "en", lift: dict[str, Any] | None = None) -> Page:
    """The page, parsed; it runs nothing and fetches nothing."""
    text = render(report, lang, lift)
    found = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base", "a"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "style", "action", "srcset")
        assert "://" not in (value or "") or name == "xmlns"
    assert not re.search(r"@import|url\(", text)
    return found


def with_texts(value: Any, text: str) -> Any:
    """The report with this text in place of every name and word that a party chose."""
    if isinstance(value, dict):
        chosen = {"name", "title", "purpose", "entity_code", "sector", "code", "outcome", "reason", "power", "text"}
        return {k: text if k in chosen and isinstance(v, str) else with_texts(v, text) for k, v in value.items()}
    return [with_texts(item, text) for item in value] if isinstance(value, list) else value
