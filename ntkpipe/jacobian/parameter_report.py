"""How each parameter's Jacobian is computed and held, and at what cost; or why it is left to plain ``torch.func``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ntkpipe.base.tables import TableRows
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.representations.interface import Term
from ntkpipe.jacobian.representations.terms import REPRESENTATIONS
from ntkpipe.jacobian.tracing.rules.form import Lookup

FALLBACK, UNUSED = "torch.func", "unused"

# Words for representations; n_in and n_out are the width of inputs and cotangents, T is the number of positions.
LEGEND = {
    **{each.word: each.meaning for each in REPRESENTATIONS},
    "vmap": "the Jacobian itself, without a rule: plain torch.func, the samples of a batch at once",
    "loop": "the Jacobian itself, without a rule: plain autograd, one sample after the other",
    "unused": "nothing: the outputs do not depend on it, its Jacobian is zero",
}


@dataclass(frozen=True)
class ParameterReport:
    """Parameters whose Jacobians are computed together: a weight and its bias, part of one, or several joined."""

    name: str  # as in the manifest's `choices.representations`; a part of a parameter has its number
    parameters: tuple[str, ...]  # their names
    rule: str  # torch functions that use them, such as `linear`; `torch.func` in the fallback, empty where nothing does
    representation: str  # how their Jacobians are held: a word of :data:`LEGEND`
    num_parameters: int  # number of entries in them
    num_positions: int = 0  # positions of a sample at which they are used, T, over all uses; 0 where nothing was traced
    groups: int = 0  # this and the next two are 0 where uses differ or nothing was traced
    n_in: int = 0  # width of inputs in each group, rows of a table that is looked up; 0 for what only adds or scales
    n_out: int = 0  # width of cotangents in each group
    sample_bytes: int = 0  # bytes held for one sample
    sample_flops: float = 0.0  # operations to multiply out one sample's Jacobians, beside forward and backward pass
    pair_flops: float = 0.0  # operations to contract one pair of samples
    share: float = 0.0  # fraction of `pair_flops` in those of all parameters
    reason: str = ""  # why they are in the fallback, else empty

    @property
    def shape(self) -> str:
        """``n_in x n_out``, and the number of groups if there are several."""
        if not self.n_out:
            return ""
        shown = f"{self.n_in} × {self.n_out}" if self.n_in else f"{self.n_out}"
        return shown if self.groups == 1 else f"{shown} (× {self.groups})"

    @property
    def short_name(self) -> str:
        """The name with each module named once: ``head.weight + bias``."""
        shown, last = [], ""
        for name in self.name.split(" + "):
            module = name.rpartition(".")[0]
            shown.append(name[len(module) + 1 :] if module and module == last else name)
            last = module
        return " + ".join(shown)

    def to_json(self) -> dict[str, Any]:
        """All fields, in bytes and operations."""
        return {**asdict(self), "parameters": list(self.parameters)}


def report_of(engine: Engine) -> tuple[ParameterReport, ...]:
    """Reports on every term, parameter of the fallback and unused parameter of an engine, in the model's order."""
    total, parameters = engine.pair_flops() or 1.0, engine.parameters
    reports = [_term_report(term, engine) for term in engine.every_term]
    reports += [ParameterReport(name, (name,), "", UNUSED, parameters[name].numel()) for name in engine.tracing.unused]
    reports.sort(key=lambda report: list(parameters).index(report.parameters[0]))
    return tuple(replace(report, share=report.pair_flops / total) for report in reports)


def _term_report(term: Term, engine: Engine) -> ParameterReport:
    setup, count, reason = engine.setup, engine.setup.num_covectors, engine.tracing.fallback.get(term.name, "")
    widths = {(use.groups, use.n_in, use.n_out) for use in term.uses}
    groups, n_in, n_out = widths.pop() if len(widths) == 1 else (0, 0, 0)
    return ParameterReport(
        name=term.name,
        parameters=term.parameters,
        rule=FALLBACK if reason else term.label.rpartition(":")[0],
        representation=engine.method if reason else term.held_as.word,
        num_parameters=term.width + (term.uses[0].n_out if term.has_bias else 0),
        num_positions=term.num_positions,
        groups=groups,
        n_in=term.uses[0].shape[0] if n_out and term.uses[0].kind == Lookup.kind else n_in,
        n_out=n_out,
        sample_bytes=term.held_as.num_numbers(term, count) * setup.accumulate_dtype.itemsize,
        sample_flops=term.held_as.sample_flops(term, count),
        pair_flops=term.held_as.pair_flops(term, setup),
        reason=reason,
    )


@dataclass(frozen=True)
class ReportTable:
    """Cells of a table in words."""

    columns: tuple[str, ...]  # headers
    rows: tuple[tuple[str, ...], ...]  # as many cells each
    num_texts: int  # how many columns from the left are text; the others are numbers
    title: str = "KiB a sample, share of the contraction"  # what the numbers are


def summarize_reports(reports: Sequence[ParameterReport]) -> ReportTable:
    """One row for each rule and representation, the costly ones first."""
    groups: dict[tuple[str, str], list[ParameterReport]] = {}
    for report in reports:
        groups.setdefault((report.rule, report.representation), []).append(report)
    rows = []
    for (rule, representation), group in sorted(groups.items(), key=lambda item: -_share(item[1])):
        names = {name for report in group for name in report.parameters}
        size = sum(report.num_parameters for report in group)
        rows.append((rule or "–", representation, f"{len(names)}", f"{size:,}", *_costs(group)))
    return ReportTable(("rule", "held as", "parameters", "numbers", "KiB", "share"), tuple(rows), num_texts=2)


def report_rows(reports: Sequence[ParameterReport]) -> TableRows:
    """The rows of :func:`summarize_reports` as (quantity, value) in words."""
    return [
        (f"{rule}, {word}", f"{names} parameters, {numbers} numbers; {size} KiB a sample, {share} of the contraction")
        for rule, word, names, numbers, size, share in summarize_reports(reports).rows
    ]


def list_reports(reports: Sequence[ParameterReport]) -> ReportTable:
    """One row for each report."""
    rows = tuple(
        (r.short_name, r.rule or "–", r.representation, r.shape, f"{r.num_positions or ''}", *_costs([r]))
        for r in reports
    )
    columns = ("parameters", "rule", "held as", "n_in × n_out", "positions", "KiB", "share")
    return ReportTable(columns, rows, num_texts=3)


def _costs(group: Sequence[ParameterReport]) -> tuple[str, str]:
    size = sum(report.sample_bytes for report in group) / 2**10
    return f"{size:,.1f}", f"{_share(group):.1%}"


def _share(group: Sequence[ParameterReport]) -> float:
    return sum(report.share for report in group)


def explain_reports(reports: Sequence[ParameterReport]) -> list[tuple[str, str]]:
    """Words for representations that occur, with their meaning."""
    return [(word, meaning) for word, meaning in LEGEND.items() if any(r.representation == word for r in reports)]


def fallback_reasons(reports: Sequence[ParameterReport]) -> list[tuple[str, str]]:
    """Reasons why parameters are in the fallback, each with their names."""
    names: dict[str, list[str]] = {}
    for report in reports:
        if report.rule == FALLBACK:
            names.setdefault(report.reason, []).append(report.name)
    return [(reason, ", ".join(found)) for reason, found in names.items()]
