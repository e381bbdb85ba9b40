"""Figures: nothing overlaps or is cut, every axis has a name and a unit, colours are told apart by everybody."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from figures import FIGURES, drawn, texts, tick_labels
from matplotlib.colors import to_rgb

from ntkpipe.report import theme
from ntkpipe.report.parts import Plot
from ntkpipe.report.theme import COLOURS, STYLES, line, render

STYLE = (Path(theme.__file__).parent / "templates/style.css").read_text()
# Colours by name, light and dark.
PALETTES = [
    dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
]
# Simulations of Viénot, Brettel and Mollon (1999), in linear RGB.
_SEEN = {
    "protanope": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranope": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_figure(name: str) -> None:
    figure = drawn(name)
    shown = list(texts(figure))
    assert len(shown) >= 4
    for (one, a), (other, b) in itertools.combinations(shown, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert not (across > 0.5 and down > 0.5), f"{one!r} and {other!r} overlap by {across:.1f} × {down:.1f} pixels"
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            assert all(len(list(tick_labels(axis))) >= 2 for axis in (axes.xaxis, axes.yaxis)) or "one part" in name
    frame = figure.bbox
    for text, box in shown:
        assert frame.x0 - 0.5 <= box.x0 <= box.x1 <= frame.x1 + 0.5, text
        assert frame.y0 - 0.5 <= box.y0 <= box.y1 <= frame.y1 + 0.5, text


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_name_and_its_unit(name: str) -> None:
    for axes in drawn(name).axes:
        is_bar = axes.get_label() == "<colorbar>"
        y = axes.get_title(loc="left") or axes.get_ylabel()
        for label, axis in [(axes.get_xlabel(), axes.xaxis)] + [(y, axes.yaxis)] * (not is_bar):
            # Axes whose ticks are names need no unit.
            is_named = "class of" in label or (not label and "kernel" in axis.get_majorticklabels()[0].get_text())
            assert is_named or ("[" in label and label.endswith("]")) or "λ = 0" in label, label


def test_the_check_of_overlaps_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlapping(axes):
        axes.set_xticks([0, 0.01, 1], ["first", "second", "third"])
        axes.set_xlabel("x [m]")

    monkeypatch.setitem(FIGURES, "bad", (lambda: overlapping, 0.5))
    with pytest.raises(AssertionError, match="overlap"):
        test_no_text_overlaps_another_or_leaves_the_figure("bad")


def plot(name: str, anchor: str = "one") -> Plot:
    make, height = FIGURES[name]
    return Plot(anchor, name, make(), f"A figure of <{name}> & \x1b more.", (), height)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_the_colours_of_the_page_and_ids_of_its_own(name: str) -> None:
    shown = render(plot(name))
    assert shown == render(plot(name))
    root = parsed(shown)
    assert root.attrib["role"] == "img"
    assert root.find("title").text == f"A figure of <{name}> & \\x1b more."
    assert "<style" not in shown
    assert set(re.findall(r"var\(--(\w+)\)", shown)) - {"ink"} <= COLOURS.keys()
    assert not any(colour in shown for colour in COLOURS.values())
    # Other colours are those of a map from numbers to colours, and of lines on it.
    if "picture" not in name and "means" not in name:
        assert not re.search(r"#[0-9a-f]{6};", shown)
        assert "<image" not in shown
    identifiers = set(re.findall(r' id="([^"]*)"', shown))
    named = re.findall(r'(?:href="#|url\(#)([^")]*)', shown)
    assert set(named) <= identifiers
    assert len(identifiers) == shown.count(" id=")
    assert not identifiers & set(re.findall(r' id="([^"]*)"', render(plot(name, "two"))))
    assert all(address.startswith(("#", "data:image/png;")) for address in re.findall(r'href="([^"]*)"', shown))


def parsed(shown: str) -> ElementTree.Element:
    """As XML, which has no names without a home."""
    return ElementTree.fromstring(str(shown).replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))


def test_names_of_classes_stay_text() -> None:
    names = ("<script>x", "$x^2$ & \x1b[31m 本", '"><g id="x" onload="y">', "#fe0001")
    make, height = FIGURES["picture by class"]
    draw = make()
    arrangement = draw.keywords["arrangement"]
    draw.keywords["arrangement"] = replace(arrangement, names=names, bounds=(1000, 2000, 3000))
    shown = render(Plot("one", "title", draw, "alt", (), height))
    root = parsed(shown)
    found = [element.text for element in root.iter("text")]
    assert found.count(names[0]) == found.count(names[3]) == 2
    assert found.count("$x^2$ & \\x1b[31m 本") == 2
    tags = {"svg", "title", "defs", "g", "path", "use", "text", "image", "clipPath", "rect"}
    assert {element.tag for element in root.iter()} <= tags
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]


@pytest.mark.parametrize("palette", PALETTES, ids=["light", "dark"])
def test_lines_have_contrast_and_differ_for_everybody(palette: dict[str, str]) -> None:
    assert COLOURS.keys() <= palette.keys()
    for name in ("blue", "red", "green", "purple", "grey"):
        assert contrast(palette[name], palette["paper"]) >= 3, name
    assert contrast(palette["ink"], palette["paper"]) >= 7
    styles = [(style["linestyle"], style["marker"]) for style in map(line, STYLES)]
    assert len(set(styles)) == len(styles)
    used = [palette[colour] for colour in ("blue", "red", "green", "purple")]
    for seen in ("everybody", *_SEEN):
        for one, other in itertools.combinations(used, 2):
            assert distance(one, other, seen) > 9, (one, other, seen)


def linear(colour: str) -> np.ndarray:
    values = np.array(to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""
    lights = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def distance(one: str, other: str, seen: str) -> float:
    """CIE 1976 distance as somebody sees it."""
    turn = np.array(_SEEN.get(seen, np.eye(3)))
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    white = to_xyz @ np.ones(3)

    def lab(colour: str) -> np.ndarray:
        ratio = to_xyz @ np.clip(turn @ linear(colour), 0, 1) / white
        x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return float(np.linalg.norm(lab(one) - lab(other)))


def test_drawing_leaves_the_settings_of_the_session_alone() -> None:
    before = dict(mpl.rcParams)
    render(plot("time of one part"))
    assert dict(mpl.rcParams) == before
