"""From a model to the Jacobians that the engine finds, by parameter; the only place that touches the engine's inside.

Nothing is self-checked unless a test asks for it, so that a wrong rule cannot hide behind the fallback.
"""

import numpy as np
import reference
import torch

import ntkpipe
from ntkpipe.jacobian import self_check as check
from ntkpipe.jacobian.model.device import exact_math
from ntkpipe.jacobian.model.functional import prepare_model
from ntkpipe.jacobian.probe import _PROBES as PROBES
from ntkpipe.jacobian.probe import make_engine, probe, record_passes
from ntkpipe.jacobian.representations.interface import Rates, Setup
from ntkpipe.jacobian.representations.pieces import contract
from ntkpipe.jacobian.representations.sums import Workspace
from ntkpipe.jacobian.tracing.recorder import Recorder
from ntkpipe.jacobian.tracing.trace import trace

# |dK_p,ij| <= RELATIVE * sqrt(K_p,ii K_p,jj) + FLOOR * sqrt(K_ii K_jj); the floor is for what is zero but for rounding.
RELATIVE, FLOOR = 1e-10, 1e-14
# |dJ_p| <= ORDER |J|, by row: elements of a Jacobian are in the parameter's order, which no Gram can see.
ORDER = 1e-9
NUM_RANDOM = 3
# What the public function may be off by, on the scale sqrt(K_ii K_jj).
WHOLE = 1e-12
# In which terms can be held beside the one that the cost model chooses.
WAYS = ("pairwise", "late", "dense")


def take(inputs, samples):
    """Some samples, real inputs in float64."""

    def pick(values):
        chosen = torch.as_tensor(values)[list(samples)]
        return chosen.double() if chosen.is_floating_point() else chosen

    return {name: pick(v) for name, v in inputs.items()} if isinstance(inputs, dict) else pick(inputs)


def check_model(model, inputs, *, forward=None, kinds=("ntk", "pntk"), ways=WAYS):
    """Assert that a model's kernels are exact, whole through the public function and parameter by parameter."""
    exact = reference.jacobians(model, inputs, forward=forward or reference.call)
    check_every_parameter(model, inputs, forward=forward, exact=exact, ways=ways)
    for kind in kinds:
        found = ntkpipe.kernel_matrix(model, inputs, kind=kind, forward=forward, compute_dtype="float64", workers=1)
        one = exact if kind == "ntk" else reference.pseudo(exact, reference.size_of(inputs))
        error = reference.error(found, sum(reference.grams(one).values()))
        assert error <= WHOLE, f"the {kind} is off by {error:.1e}"
        assert found.any()


def engine_of(model, inputs, covectors, *, forward=None, structured=True):
    """The engine of a model in float64."""
    functional = prepare_model(model, forward=forward, dtype=torch.float64, device=torch.device("cpu"))
    with exact_math():
        size = reference.size_of(inputs)
        probed = probe(functional, lambda samples: take(inputs, samples), size, structured=structured)
        return make_engine(probed, setup_of(covectors, num_samples=size))


def functional(function, **members):
    """A forward pass over members, modules and parameters, drawn anew, as the package has it, in float64."""
    model = reference.redraw(reference.Custom(function, **members))
    return prepare_model(model, dtype=torch.float64, device=torch.device("cpu"))


def record(model, inputs, **options):
    """What a recorder sees of a forward pass, and its outputs."""
    with Recorder(model.parameters, model.constants(), **options) as recorder:
        return recorder, model(inputs)


def traced(function, inputs, **members):
    """What tracing finds in a forward pass."""
    return tracing_of(functional(function, **members), inputs)


def tracing_of(model, inputs):
    """What tracing finds in a model, whose outputs need not make sense."""
    parameters = model.parameters
    passes, expansions = record_passes(model, [take(inputs, order) for order in PROBES])
    reached = set().union(*(each.reached(parameters) for each in passes[:2]))
    return trace(parameters, passes, reached, expansions)


def setup_of(covectors, *, pairs="all", dtype=torch.float64, num_samples=2048):
    """What an engine is asked for, on a device whose elementwise passes cost as much as 32 operations of a product."""
    rates = Rates(product=32e9, elementwise=1e9)
    return Setup(covectors, pairs, dtype, rates, num_samples=num_samples, memory_bytes=2**30, piece_rows=2560)


def forced(engine, ways=WAYS):
    """The engine with every term held in each way that is possible for it: name of the way → engine."""
    found = {"chosen": engine}
    for way in ways:
        labels = {}
        for term in engine.terms:
            function, _, chosen = term.label.partition(":")
            first = term.uses[0]
            can = first.kind == "outer" and chosen != "joined" and (way != "pairwise" or first.groups == 1)
            labels[term.name] = f"{function}:{way if can else chosen}"
        if labels != engine.representations:
            found[way] = engine.reusing({**engine.representations, **labels})
    return found


def engine_jacobians(engine, batch, places):
    """Name → Jacobian (S, n, P), elements in the parameter's order, of the samples at ``places`` of a batch."""
    with exact_math():
        found = engine.by_parameter(batch, list(places))
    return {name: value.detach().double() for name, value in found.items()}


def engine_kernel(engine, inputs):
    """The kernel of all samples, sample-major, as the engine contracts its blocks: pieces of four, batches of three.

    Seven samples make two pieces of unlike sizes and batches of three and of one. The block is one that was kept.
    """
    size = reference.size_of(inputs)
    with exact_math():
        block, _ = engine.block(
            lambda start, stop: take(inputs, range(start, stop)), 0, size, subtile=min(4, size), batch=3
        )
        return block_kernel(copied(engine, block, min(4, size)))


def copied(engine, block, subtile):
    """The block whose memory has the same bytes as that of another one."""
    blank = engine.blank(len(block.outputs), subtile)
    for to, source in zip(blank.memory(engine.covectors), block.memory(engine.covectors), strict=True):
        assert to.shape == source.shape
        to.copy_(source)
    return blank


def block_kernel(block):
    """The kernel of a block's samples, sample-major, from each pair of its pieces."""
    rows = [torch.cat([contract(left, right, Workspace()) for right in block.pieces], dim=1) for left in block.pieces]
    return torch.cat(rows).double().numpy()


def fallback_of(engine):
    """Parameters that are left to plain ``torch.func``, with the reasons."""
    return dict(engine.tracing.fallback)


def excess(found, exact):
    """The worst parameter, and its error over what is allowed: by Gram, and by Jacobian.

    Parameters
    ----------
    found, exact
        Name → Jacobian (S, n, P).
    """
    assert set(found) == set(exact)
    rows = {}
    for name in exact:
        assert found[name].shape == exact[name].shape, name
        rows[name] = [value.transpose(0, 1).flatten(0, 1).numpy() for value in (found[name], exact[name])]
    grams = {name: (mine @ mine.T, right @ right.T) for name, (mine, right) in rows.items()}
    total = reference.scale(sum(right for _, right in grams.values()))
    length = np.sqrt(np.diagonal(total))
    errors = {}
    for name, (mine, right) in grams.items():
        by_gram = np.abs(mine - right) / (RELATIVE * reference.scale(right) + FLOOR * total)
        by_row = np.linalg.norm(rows[name][0] - rows[name][1], axis=1) / (ORDER * length)
        errors[name] = max(float(by_gram.max()), float(by_row.max()))
        if not np.isfinite(mine).all():
            errors[name] = np.inf
    worst = max(errors, key=errors.get)
    return worst, errors[worst]


def settled(engine, inputs):
    """The engine that the self-check lets through, as a run has it."""
    with exact_math():
        return check.self_check(
            engine,
            lambda samples: take(inputs, samples),
            reference.size_of(inputs),
            batch=64,
            memory_bytes=2**30,
        )[0]


def check_every_parameter(model, inputs, *, forward=None, exact=None, structured=True, self_checked=False, ways=WAYS):
    """Assert that every parameter's kernel is exact, for unit and for random covectors, and their sum as contracted.

    Return the engine.

    Parameters
    ----------
    model, inputs
        At least five samples, better more, since probes are small batches.
    forward
        The forward hook, a function of (model, inputs).
    exact
        The reference's Jacobians of all samples, if they are there already.
    structured
        As of :func:`ntkpipe.jacobian.probe.probe`.
    self_checked
        Whether the self-check comes first: where torch itself is wrong under vmap, it has to find out.
    ways
        In which terms are held beside the chosen one.
    """
    size = reference.size_of(inputs)
    if exact is None:
        exact = reference.jacobians(model, inputs, forward=forward or reference.call)
    outputs = len(next(iter(exact.values()))) // size
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_RANDOM, outputs, generator=generator, dtype=torch.float64)
    batch_order = torch.randperm(size, generator=generator).tolist()
    places = sorted(torch.randperm(size, generator=generator)[: max(1, size - 2)].tolist())
    chosen = [batch_order[place] for place in places]
    unit = {name: torch.from_numpy(rows).view(size, outputs, -1)[chosen] for name, rows in exact.items()}
    engine = engine_of(model, inputs, torch.eye(outputs, dtype=torch.float64), forward=forward, structured=structured)
    if self_checked:
        engine = settled(engine, inputs)
    kernel = sum(reference.grams(exact).values())
    for way, held in forced(engine, ways).items():
        whole = reference.error(engine_kernel(held, inputs), kernel)
        assert whole <= WHOLE, f"the kernel is off by {whole:.1e}, Jacobians held {way}"
    for covectors in (torch.eye(outputs, dtype=torch.float64), drawn):
        wanted = {name: torch.einsum("co,nop->cnp", covectors, value) for name, value in unit.items()}
        found = engine_jacobians(engine.with_covectors(covectors, "all"), take(inputs, batch_order), places)
        worst, error = excess(found, wanted)
        assert error <= 1, f"{worst} is off by {error:.1e} times what is allowed"
    return engine
