"""Results stay as they are: read-only, also where they were pickled."""

import copy
import pickle

import numpy as np

import ntkpipe


def test_arrays_stay_read_only() -> None:
    found = ntkpipe.solve(np.eye(4), np.ones(4), ridge=1.0)
    for each in (found, pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert not each.coefficients.flags.writeable
        np.testing.assert_array_equal(each.coefficients, found.coefficients)
        assert each.to_json() == found.to_json()
