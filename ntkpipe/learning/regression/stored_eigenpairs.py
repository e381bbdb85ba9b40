"""All eigenpairs of a stored kernel, computed once for the steps of one run."""

from weakref import WeakKeyDictionary

from ntkpipe.base.resources import memory_room
from ntkpipe.learning.regression.eigensystem import Eigensystem, Method, find_eigensystem
from ntkpipe.solvers.on_store import Question
from ntkpipe.store.kernel_store import KernelStore

# Pairs are kept while the store is open, if they take at most this part of what the analysis may still allocate.
_SHARE = 0.125

_KEPT: WeakKeyDictionary[KernelStore, tuple[str, Eigensystem]] = WeakKeyDictionary()


def pairs_of(question: Question, method: Method, *, compute: bool = True) -> Eigensystem | None:
    """All eigenpairs of the kernel that is asked about; none if they do not fit, or streaming was asked for.

    They are kept for the next step on the same open store where memory is plenty, of one kernel a store.
    """
    if method == "streamed":
        return None
    identity, (name, kept) = question.operator.identity(), _KEPT.get(question.store, ("", None))
    if kept is not None and name == identity:
        return kept
    if not compute:
        return None
    found, _ = find_eigensystem(question.operator, None, question.memory_limit, method, question.monitor)
    if found is not None and found.eigenvectors.nbytes <= _SHARE * memory_room(question.memory_limit, share=1.0):
        _KEPT[question.store] = identity, found
    return found
