"""Errors reach the driver from a worker as they were raised there."""

import inspect
import pickle

import pytest
import tblib.pickling_support
from distributed.protocol.pickle import dumps, loads

from ntkpipe.base import errors
from ntkpipe.store.media.medium import OversizeError

WITH_MORE = (errors.StoreMismatchError, errors.IndefiniteError)
OURS = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.NtkpipeError)]
FAMILY = [each for each in OURS if each not in WITH_MORE]


@pytest.mark.parametrize("way", [(pickle.dumps, pickle.loads), (dumps, loads)], ids=["a pool", "Dask"])
@pytest.mark.parametrize(
    "error",
    [
        *(each("what was found") for each in FAMILY),
        errors.StoreMismatchError("another kernel", (("kind", "ntk", "pntk"),)),
        errors.IndefiniteError("no positive pivot", row=3, pivot=-1.0, floor=1e-6, ridge=1e-6),
        OversizeError("a.zarr/zarr.json", 3, 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_survives_the_way_from_a_worker(error, way):
    send, receive = way
    if send is dumps:
        tblib.pickling_support.install(type(error))  # as Dask does for all that are known when it is imported
    found = receive(send(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
