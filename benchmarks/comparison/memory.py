"""How much resident memory one method needs, in a process that does nothing else."""

import torch

from comparison.methods import Method, Ours
from comparison.peak import peak_memory, reset_peak
from comparison.work import Work
from ntkpipe.base.resources import num_cores, process_memory
from ntkpipe.build.prepare import exact_single_thread


def measure(work: Work, kind: type[Method]) -> dict[str, int]:
    """Growth of the peak of resident memory over what it was before the first kernel; for ours, more (see below).

    Returns
    -------
    ``samples`` that were computed and the ``peak``; of this engine also the peak of ``settle``, the ``planned`` bound,
    and the ``predicted`` and ``real`` bytes of the Jacobian block of ``block_samples``.
    """
    torch.set_num_threads(num_cores())
    method = kind(work, work.model(), work.inputs(), num_cores())
    size, found = method.peak_size(), {}
    torch.ones(256, 256) @ torch.ones(256, 256)  # libraries start their threads before, not in, the first kernel
    before = process_memory()
    if isinstance(method, Ours):
        settled = method.settled(size)
        found = {"settle": peak_memory() - before, "planned": settled.plan.memory_bytes - before}
    reset_peak()
    kernel = method.kernel(size)
    found |= {"samples": size, "peak": peak_memory() - before}
    del kernel
    if isinstance(method, Ours):
        found |= block_bytes(method, size)
    return found


def block_bytes(method: Ours, size: int) -> dict[str, int]:
    """Bytes of one strip's Jacobians, as the plan predicts them and as they are."""
    settled = method.settled(size)
    plan, prepared = settled.plan, settled.prepared
    count = min(plan.strip, size)
    with exact_single_thread():
        block, _ = settled.engine.block(
            lambda start, stop: prepared.load(range(start, stop)), 0, count, subtile=plan.subtile, batch=plan.batch
        )
    predicted = plan.workload.cost.block_bytes * count
    return {"block_samples": count, "predicted": predicted, "real": block.num_bytes()}
