"""The page as HTML: what stores say stays text, and nothing is asked of a network."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ntkpipe.report.compose import render_page
from ntkpipe.report.parts import Gallery, Page, PageTable, Plot, Section, Thumbnail

EVIL = "<script>alert(1)</script>\" onload='x' {{ 7*7 }} {% raw %} &amp; \x1b[31m\x00\u202e ${x} \\"
SEEN = EVIL.replace("\x1b", "\\x1b").replace("\x00", "\\x00").replace("\u202e", "\\u202e")


class Reader(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta", "link", "img", "source", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def hostile_page() -> Page:
    thumbnail = Thumbnail("data:image/png;base64,AAAA", EVIL, (EVIL,))
    parts = (
        PageTable(EVIL, (EVIL, EVIL, EVIL), ((EVIL, EVIL, EVIL),)),
        PageTable(EVIL, (), ((EVIL, EVIL),), is_folded=True),
        Plot("plot", EVIL, lambda axes: axes.plot([0, 1], "--"), EVIL, (EVIL,)),
        Gallery(EVIL, (EVIL,), ((thumbnail, (thumbnail, Thumbnail(None, EVIL, (EVIL,)))),)),
        EVIL,
    )
    section = Section("section", EVIL, (EVIL,), parts, EVIL)
    return Page(EVIL, EVIL, None, EVIL, EVIL, ((EVIL, EVIL),), (section,), EVIL)


def test_what_stores_say_is_text_and_nothing_else() -> None:
    html = render_page(hostile_page())
    found = read(html)
    assert "script" not in found.tags
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert [text for text in found.texts if "alert" in text] == [SEEN] * sum("alert" in text for text in found.texts)
    assert sum("alert" in text for text in found.texts) > 20
    assert {value for _, name, value in found.attributes if name in {"alt", "aria-label"} and "alert" in value} == {
        SEEN
    }
    assert not re.search(r"[^\x20-\uffff\n\t]", html)
    assert "49 " not in " ".join(found.texts)


def test_nothing_leads_out_of_the_page() -> None:
    html = render_page(hostile_page())
    found = read(html)
    addresses = [value for _, name, value in found.attributes if name in {"src", "srcset", "href", "xlink:href"}]
    assert addresses
    assert all(value.startswith(("data:", "#")) for value in addresses)
    assert html.count("url(") == html.count("url(#") > 0
    assert "@import" not in html
    policy = next(value for tag, _, value in found.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; img-src data:")


@pytest.mark.parametrize("is_good", [True, False, None])
def test_the_structure_is_one_that_screen_readers_follow(is_good: bool | None) -> None:
    page = hostile_page()
    html = render_page(replace(page, is_good=is_good))
    found = read(html)
    assert found.tags.count("h1") == found.tags.count("main") == found.tags.count("nav") == 1
    assert [tag for tag in found.tags if tag in {"h1", "h2", "h3"}] == ["h1", "h2", "h3", "h3"]
    assert html.startswith("<!DOCTYPE html>")
    assert ("html", "lang", "en") in found.attributes
    images = found.tags.count("img")
    assert sum(tag == "img" and name == "alt" and bool(value) for tag, name, value in found.attributes) == images
    assert found.tags.count("caption") == found.tags.count("table") == 2
    identifiers = {value for _, name, value in found.attributes if name == "id"}
    targets = {value[1:] for tag, name, value in found.attributes if tag == "a" and name == "href"}
    assert targets <= identifiers
    assert {value for _, name, value in found.attributes if name == "aria-labelledby"} <= identifiers


def test_a_figure_is_there_once_with_a_title_and_no_id_twice() -> None:
    page = hostile_page()
    (section,) = page.sections
    twice = replace(section, parts=(*section.parts, replace(section.parts[2], name="other")))
    html = render_page(replace(page, sections=(twice,)))
    found = read(html)
    assert found.tags.count("svg") == found.tags.count("figure") == 2
    assert ("svg", "role", "img") in found.attributes
    identifiers = [value for _, name, value in found.attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers) > 8
