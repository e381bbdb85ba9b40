"""Reports say of every parameter what the engine does with it, and add up to what the engine costs."""

import json

import numpy as np
import pytest
import torch
from engines import engine_kernel, engine_of, take
from torch import nn

from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.parameter_report import (
    LEGEND,
    explain_reports,
    fallback_reasons,
    list_reports,
    report_of,
    summarize_reports,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
EYE = torch.eye(3, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(0)


class Everything(nn.Module):
    """A table, positions, groups, a norm, a weight that is computed, one without a rule, one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
        self.spread = nn.Parameter(torch.ones(5))
        self.spare = nn.Linear(2, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        z = self.norm(self.conv(self.table(ids.long()).transpose(1, 2)).transpose(1, 2)).tanh()
        z = self.normed(z.mean(dim=1)).tanh()
        return self.head(torch.logaddexp(z, self.spread))


IDS = torch.randint(0, 50, (7, 8), generator=GENERATOR)
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)), torch.randn(7, 4)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(144, 3)),
        torch.randn(7, 2, 8, 8),
    ),
    "everything": (Everything, IDS),
}


def engine(name: str, *, structured: bool = True) -> Engine:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return engine_of(make().eval(), inputs, EYE, structured=structured)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_reported_as_it_is_recorded(name, structured):
    made = engine(name, structured=structured)
    reports = report_of(made)
    assert sorted({p for each in reports for p in each.parameters}) == sorted(made.model.names)
    used = {each.name: f"{each.rule}:{each.representation}" for each in reports if each.representation != "unused"}
    assert used == made.representations
    assert report_of(made.reusing(made.representations)) == reports or not structured
    order = [made.model.names.index(each.parameters[0]) for each in reports]
    assert order == sorted(order)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_costs_add_up_to_those_of_the_engine(name, structured):
    made = engine(name, structured=structured)
    reports = report_of(made)
    cost = made.cost(take(MODELS[name][1], range(4)))
    outputs = 3 * 8
    assert sum(each.sample_bytes for each in reports) + outputs == cost.block_bytes
    assert sum(each.pair_flops for each in reports) == pytest.approx(cost.pair_flops)
    assert sum(each.share for each in reports) == pytest.approx(1)
    numels = [value.numel() for value in made.model.parameters.values()]
    assert sum(each.num_parameters for each in reports) == sum(numels)
    assert sum(each.sample_flops for each in reports) <= cost.jacobian_flops


def test_rules_positions_and_shapes_are_those_of_the_layers():
    made = engine("everything")
    by_name = {name: each for each in report_of(made) for name in each.parameters}
    table, conv, norm, head = (by_name[name] for name in ("table.weight", "conv.weight", "norm.weight", "head.weight"))
    assert (table.rule, table.representation, table.shape, table.num_positions) == ("embedding", "table", "50 × 4", 8)
    assert (conv.rule, conv.shape, conv.num_positions) == ("conv1d", "6 × 3 (× 2)", 6)
    assert (norm.rule, norm.representation, norm.shape) == ("layer_norm", "dense", "6")
    assert (head.rule, head.num_positions) == ("linear", 1)
    joined = by_name["normed.parametrizations.weight.original0"]
    assert joined is by_name["normed.parametrizations.weight.original1"]
    assert joined.representation == "joined"


def test_the_fallback_has_reasons_and_what_is_unused_costs_nothing():
    reports = report_of(engine("everything"))
    by_name = {each.name: each for each in reports}
    spread, spare = by_name["spread"], by_name["spare.weight"]
    assert (spread.rule, spread.representation) == ("torch.func", "vmap")
    assert fallback_reasons(reports) == [(spread.reason, "spread")]
    assert spread.reason
    assert (spare.rule, spare.representation, spare.sample_bytes, spare.pair_flops) == ("", "unused", 0, 0.0)


def test_reasons_are_grouped():
    ((reason, names),) = fallback_reasons(report_of(engine("mlp", structured=False)))
    assert reason == "structure was switched off"
    assert names == "0.weight, 0.bias, 2.weight, 2.bias"


@pytest.mark.parametrize("name", MODELS)
def test_tables_and_json_have_everything(name):
    reports = report_of(engine(name))
    listed, summed = list_reports(reports), summarize_reports(reports)
    assert len(listed.rows) == len(reports)
    assert all(len(row) == len(table.columns) for table in (listed, summed) for row in table.rows)
    assert len(summed.rows) == len({(each.rule, each.representation) for each in reports})
    assert {word for word, _ in explain_reports(reports)} == {each.representation for each in reports}
    assert all(each.representation in LEGEND for each in reports)
    found = json.loads(json.dumps([each.to_json() for each in reports]))
    assert [each["name"] for each in found] == [each.name for each in reports]
    assert found[0]["parameters"] == list(reports[0].parameters)


def test_short_names_leave_out_what_names_have_in_common():
    names = [each.short_name for each in report_of(engine("everything"))]
    assert "normed.parametrizations.weight.original0 + original1" in names


def test_what_is_multiplied_out_late_is_counted_in_the_contraction():
    """A piece of n samples with itself: n multiplications, and products of the Jacobians of n (n + 1) / 2 pairs."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 20, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Flatten(), nn.Linear(320, 1)).eval()
    made = engine_of(model, inputs, EYE[:1, :1])
    made = made.reusing({name: label.replace("dense", "late") for name, label in made.representations.items()})
    late = next(each for each in report_of(made) if each.representation == "late")
    pairs = 64 * 65 / 2
    once, multiplied = 2 * 16 * 16, 2 * 20 * 16 * 16
    assert late.sample_flops == multiplied
    assert late.pair_flops * pairs == pytest.approx(once * pairs + 64 * multiplied, rel=0.02)
    assert np.isfinite(engine_kernel(made, inputs)).all()
