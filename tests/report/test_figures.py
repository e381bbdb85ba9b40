"""Figures: nothing overlaps or is cut, every axis has a name and a unit, colours are told apart by everybody."""

import itertools
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from figures import FIGURES, drawn, texts, tick_labels
from matplotlib.colors import to_rgb

from ntkpipe.report import theme
from ntkpipe.report.theme import LOOKS, Look, render

_WIDTHS = [Look(is_dark=False, is_narrow=narrow) for narrow in (True, False)]
# Simulations of Viénot, Brettel and Mollon (1999), in linear RGB.
_SEEN = {
    "protanope": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranope": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def names_of(look: Look) -> str:
    return "narrow" if look.is_narrow else "wide"


@pytest.mark.parametrize("look", _WIDTHS, ids=names_of)
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_figure(name: str, look: Look) -> None:
    figure = drawn(name, look)
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
    figure = drawn(name, _WIDTHS[1])
    for axes in figure.axes:
        is_bar = axes.get_label() == "<colorbar>"
        labels = [axes.get_ylabel()] if is_bar else [axes.get_xlabel(), axes.get_ylabel()]
        for label, axis in zip(labels, [axes.yaxis] if is_bar else [axes.xaxis, axes.yaxis], strict=True):
            # Axes whose ticks are names need no unit.
            is_named = "class of" in label or (not label and "kernel" in axis.get_majorticklabels()[0].get_text())
            assert is_named or ("[" in label and label.endswith("]")) or "λ = 0" in label, label


def test_the_check_of_overlaps_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlapping(axes, look):
        axes.set_xticks([0, 0.01, 1], ["first", "second", "third"])
        axes.set_xlabel("x [m]")

    monkeypatch.setitem(FIGURES, "bad", (lambda: overlapping, 0.5))
    with pytest.raises(AssertionError, match="overlap"):
        test_no_text_overlaps_another_or_leaves_the_figure("bad", _WIDTHS[1])


def test_figures_are_the_same_bytes_each_time_and_ask_nobody_for_anything() -> None:
    draw = FIGURES["picture by class"][0]()
    first = render(draw)
    assert [image.uri for image in first] == [image.uri for image in render(draw)]
    assert [image.look for image in first] == list(LOOKS)
    assert len({image.uri for image in first}) == len(LOOKS)
    assert all(image.uri.startswith("data:image/svg+xml;base64,") for image in first)


@pytest.mark.parametrize("is_dark", [False, True])
def test_lines_have_contrast_and_differ_for_everybody(is_dark: bool) -> None:
    look = Look(is_dark=is_dark, is_narrow=False)
    palette = theme._DARK if is_dark else theme._LIGHT
    for colour in palette.values():
        assert contrast(colour, look.background) >= 3, colour
    assert contrast(look.ink, look.background) >= 7
    styles = [(line["linestyle"], line["marker"]) for line in map(look.line, theme._STYLES)]
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
    render(FIGURES["time of one part"][0]())
    assert dict(mpl.rcParams) == before
    assert replace(LOOKS[0], is_dark=True) in LOOKS
