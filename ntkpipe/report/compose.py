"""What was gathered becomes a page, and that HTML. What stores say is escaped text, control characters spelled out."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ntkpipe.base.tables import printable
from ntkpipe.base.version import VERSION
from ntkpipe.learning.regression.ridge_path import Best
from ntkpipe.report.gather import CRITERIA, Chapter, Gathered, choose
from ntkpipe.report.images import StoredImages
from ntkpipe.report.parts import Headline, Page, PageTable, Section
from ntkpipe.report.provenance import Json, computed_section, runs_table, verification_section
from ntkpipe.report.sections.alignment import ALIGNMENT
from ntkpipe.report.sections.gaussian import GAUSSIAN
from ntkpipe.report.sections.generalisation import GENERALISATION
from ntkpipe.report.sections.influence import INFLUENCE
from ntkpipe.report.sections.kernel import kernel_section
from ntkpipe.report.sections.regression import REGRESSION
from ntkpipe.report.sections.spectrum import SPECTRUM
from ntkpipe.report.sections.timings import timings_section
from ntkpipe.report.sections.words import number, share, taken_as, warnings
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


def compose(gathered: Gathered) -> Page:
    """The page of what was gathered."""
    store, runs = gathered.store, gathered.store.store.read_results("runs")
    name, manifest = store.path.name if isinstance(store.path, Path) else store.path, store.manifest
    sections = (
        _reading_section(),
        computed_section(store, gathered.kernel.name),
        verification_section(store.store),
        kernel_section(gathered.means, gathered.arrangement, manifest.train.num_samples),
        *(_section(chapter, gathered) for chapter in _CHAPTERS),
        *(_saved_section(name, found) for name, found in gathered.others.items()),
        timings_section(runs_table(runs), (*_kernel_seconds(runs), *gathered.seconds)),
    )
    return Page(
        title=f"Kernel report: {name}",
        subtitle=(
            f"{manifest.kind} of {manifest.model.name} ({manifest.model.num_parameters:,} parameters) on "
            f"{manifest.train.num_samples:,} samples, in {gathered.kernel.dtype}"
        ),
        verdict=verdict(gathered),
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


def _reading_section() -> Section:
    return Section(
        "notation",
        "Notation",
        (
            "Beside each figure are words on how to read it; on narrow screens and on paper they are below it. In "
            "figures of regression, filled circles are what was measured on the test set, squares on the training set, "
            "triangles are leave-one-out, and diamonds generalised cross-validation and KARE.",
        ),
        (PageTable("Symbols", (), _SYMBOLS),),
    )


def _section(chapter: Chapter, gathered: Gathered) -> Section:
    """That of a result, or of what it takes to have one."""
    name = chapter.step.replace("_", "-")
    if (why := gathered.missing.get(chapter.step)) is not None:
        return Section(name, chapter.title, chapter.intro, (), why)
    found = gathered.results[chapter.step]
    parts, missing = chapter.show(found, gathered)
    intro = chapter.intro + taken_as(getattr(found, "targets", ""))
    return Section(name, chapter.title, intro, (*parts, *warnings(found)), missing)


def _saved_section(name: str, found: Result) -> Section:
    """What a result prints that has no section of its own."""
    summary = REGISTRY[name].summary
    title, intro = f"Result of {name}", (f"{summary[:1].upper()}{summary[1:]}.",)
    return Section(
        f"saved-{name.replace('_', '-')}", title, intro, (PageTable("As a step has saved it", (), tuple(found.rows())),)
    )


def verdict(gathered: Gathered) -> Headline:
    """Whether the kernel is right, and what it is good for, in one line."""
    verification, certificate = map(gathered.store.store.read_result, ("verification", "certificate"))
    is_good = None if verification is None else bool(verification["is_good"])
    lead = {True: "Verified: yes", False: "Verified: no, something is wrong", None: "Not verified yet"}[is_good]
    said = []
    if certificate is not None:
        worst = max(certificate["kernels"], key=lambda kernel: kernel["error"] / kernel["tolerance"])
        said.append(f"certificate {worst['error']:.1e} (tolerance {worst['tolerance']:.0e})")
    elif is_good is not None:
        said.append("no certificate against the model")
    # How ridge regression does on the test set, at the ridge that training data choose
    test, (best, accuracy, loss) = gathered.store.manifest.test, _regression(gathered)
    if best is not None and test is not None and math.isfinite(accuracy):
        noun = "images" if StoredImages(gathered.store).shape else "samples"
        right = f"ridge regression {share(accuracy)} of {test.num_samples:,} test {noun} right"
        said.append(f"{right} (λ = {best.ridge:.3g}, chosen by {CRITERIA[best.criterion]})")
    elif math.isfinite(loss):
        said.append(f"ridge regression has test loss {number(loss)}")
    return Headline(is_good, lead, "".join(f"; {words}" for words in said) + ".")


def _regression(gathered: Gathered) -> tuple[Best | None, float, float]:
    """The ridge that training data choose, and the accuracy and the loss on the test set there, if they are known."""
    path = gathered.results.get("regression")
    if path is None:
        return None, math.nan, math.nan
    best = choose(path)
    return best, float(path.test_accuracy[best.index]), float(path.test_loss[best.index])


def _numbers(gathered: Gathered) -> tuple[tuple[str, str], ...]:
    (best, accuracy, loss), (rows, columns) = _regression(gathered), gathered.kernel.shape
    is_right = math.isfinite(accuracy)
    numbers = []
    if is_right or math.isfinite(loss):
        numbers.append(("test accuracy", share(accuracy)) if is_right else ("test loss", number(loss)))
    if best is not None:
        numbers.append(("best ridge λ", number(best.ridge, 3)))
    numbers.append(("kernel", f"{rows:,} × {columns:,}"))
    if (spectrum := gathered.results.get("spectrum")) is not None:
        numbers += [
            ("largest eigenvalue", number(spectrum.largest)),
            ("condition number", number(spectrum.condition_low, 3)),
            ("effective rank", number(spectrum.effective_rank, 3)),
        ]
    return tuple(numbers)


def _kernel_seconds(runs: Sequence[Json]) -> tuple[tuple[str, float], ...]:
    names = {"kernel, all runs": "seconds", "self-checks before": "self_check_seconds"}
    return tuple((name, sum(float(run[key]) for run in runs)) for name, key in names.items() if runs)
