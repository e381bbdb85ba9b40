"""What was gathered becomes a page, and that HTML. What stores say is escaped text, control characters spelled out."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ntkpipe.base.tables import printable
from ntkpipe.base.version import VERSION
from ntkpipe.report.gather import CRITERIA, Chapter, Gathered
from ntkpipe.report.parts import Page, PageTable, Section, number, share
from ntkpipe.report.provenance import computed_section, timings_section, verification_section
from ntkpipe.report.sections.gaussian import GAUSSIAN
from ntkpipe.report.sections.influence import INFLUENCE, StoredImages
from ntkpipe.report.sections.kernel import kernel_section
from ntkpipe.report.sections.regression import GENERALISATION, REGRESSION
from ntkpipe.report.sections.spectrum import ALIGNMENT, SPECTRUM
from ntkpipe.report.theme import render
from ntkpipe.solvers.result import Result
from ntkpipe.steps.registry import REGISTRY

_CHAPTERS = (SPECTRUM, ALIGNMENT, REGRESSION, GENERALISATION, GAUSSIAN, INFLUENCE)
_TEMPLATES = Path(__file__).parent / "templates"
_SYMBOLS = (
    ("N, M, O", "training samples, test samples, outputs of the model"),
    ("n", "rows of the kernel: N, or N·O of a full NTK"),
    ("K", "the training kernel; K(x, x′) = ⟨∂f(x)/∂θ, ∂f(x′)/∂θ⟩ by the convention below"),
    ("λₖ", "its eigenvalues, the largest first"),
    ("λ", "the ridge, as it is added to the diagonal: f(x) = K(x, X) (K + λI)⁻¹ Y"),
    ("kernel units", "(units of output / units of parameter)²"),
    ("target units", "units of the targets; one-hot columns of classes have none"),
)
_NOTATION = Section(
    "notation",
    "Notation",
    (
        "Beside each figure are words on how to read it; on narrow screens and on paper they are below it. In figures "
        "of regression, filled circles are what was measured on the test set, squares on the training set, triangles "
        "are leave-one-out, and diamonds generalised cross-validation and KARE.",
    ),
    (PageTable("Symbols", (), _SYMBOLS),),
)


def compose(gathered: Gathered) -> Page:
    """The page of what was gathered."""
    store, manifest = gathered.store, gathered.store.manifest
    is_good, verdict, worth = _verdict(gathered)
    sections = (
        _NOTATION,
        computed_section(store, gathered.kernel.name),
        verification_section(store.store),
        kernel_section(gathered.means, gathered.arrangement),
        *(_section(chapter, gathered) for chapter in _CHAPTERS),
        *(_saved_section(name, found) for name, found in gathered.others.items()),
        timings_section(store.store.read_results("runs"), gathered.seconds),
    )
    return Page(
        title=f"Kernel report: {getattr(store.path, 'name', store.path)}",
        subtitle=(
            f"{manifest.kind} of {manifest.maker}, on "
            f"{manifest.train.num_samples:,} samples, in {gathered.kernel.dtype}"
        ),
        is_good=is_good,
        verdict=verdict,
        worth=worth,
        numbers=_numbers(gathered),
        sections=sections,
        footer=(
            f"Written by ntkpipe {VERSION} on {datetime.now(UTC).isoformat(timespec='seconds')} from "
            f"{printable(str(store.path))}, manifest {manifest.digest()[:12]}. This page needs no network and runs "
            "no script."
        ),
    )


def render_page(page: Page) -> str:
    """The page as one HTML document that needs nothing else; draws every figure."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page=page, draw=render).lstrip()


def _as_text(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _section(chapter: Chapter, gathered: Gathered) -> Section:
    """That of a result, or of what it takes to have one."""
    name = chapter.step.replace("_", "-")
    if (why := gathered.missing.get(chapter.step)) is not None:
        return Section(name, chapter.title, chapter.intro, (), why)
    found = gathered.results[chapter.step]
    parts, missing = chapter.show(found, gathered)
    intro, notes = list(chapter.intro), []
    if targets := getattr(found, "targets", ""):  # which results of older versions do not say
        intro.append(f"Targets were taken as {targets}.")
        if found.choice:
            intro[-1] += (
                " Their values alone said so; if they are something else, give the steps task=, or `ntkpipe report` "
                "--task: regression, classification or binary."
            )
    if not found.is_converged:
        notes.append(f"This is not as exact as was asked for ({found.status}): {found.message}.")
    return Section(name, chapter.title, tuple(intro), (*parts, *notes), missing)


def _saved_section(name: str, found: Result) -> Section:
    """What a result prints that has no section of its own."""
    summary, rows = REGISTRY[name].summary, PageTable("As a step has saved it", (), tuple(found.rows()))
    intro = (f"{summary[:1].upper()}{summary[1:]}.",)
    return Section(f"saved-{name.replace('_', '-')}", f"Result of {name}", intro, (rows,))


def _verdict(gathered: Gathered) -> tuple[bool | None, str, str]:
    """Whether the kernel is right, none if that is not known; the same in words; and what it is good for."""
    verification, certificate = map(gathered.store.store.read_result, ("verification", "certificate"))
    is_good = None if verification is None else bool(verification["is_good"])
    lead = {True: "Verified: yes", False: "Verified: no, something is wrong", None: "Not verified yet"}[is_good]
    said = []
    if certificate is not None:
        worst = max(certificate["kernels"], key=lambda kernel: kernel["error"] / kernel["tolerance"])
        said.append(f"certificate {worst['error']:.1e} (tolerance {worst['tolerance']:.0e})")
    elif is_good is not None:
        said.append("no certificate against the model")
    test, best, (accuracy, loss) = gathered.store.manifest.test, gathered.best, gathered.measured
    if best is not None and test is not None and math.isfinite(accuracy):
        noun = "images" if StoredImages(gathered.store).shape else "samples"
        right = f"ridge regression {share(accuracy)} of {test.num_samples:,} test {noun} right"
        said.append(f"{right} (λ = {best.ridge:.3g}, chosen by {CRITERIA[best.criterion]})")
    elif math.isfinite(loss):
        said.append(f"ridge regression has test loss {number(loss)}")
    return is_good, lead, "".join(f"; {words}" for words in said) + "."


def _numbers(gathered: Gathered) -> tuple[tuple[str, str], ...]:
    (accuracy, loss), (rows, columns) = gathered.measured, gathered.kernel.shape
    numbers = []
    if math.isfinite(accuracy):
        numbers.append(("test accuracy", share(accuracy)))
    elif math.isfinite(loss):
        numbers.append(("test loss", number(loss)))
    if gathered.best is not None:
        numbers.append(("best ridge λ", number(gathered.best.ridge, 3)))
    numbers.append(("kernel", f"{rows:,} × {columns:,}"))
    if (spectrum := gathered.results.get("spectrum")) is not None:
        numbers += [
            ("largest eigenvalue", number(spectrum.largest)),
            ("condition number", number(spectrum.condition_low, 3)),
            ("effective rank", number(spectrum.effective_rank, 3)),
        ]
    return tuple(numbers)
