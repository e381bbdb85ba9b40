"""One door for arrays: whatever holds real numbers is taken with every digit, and what does not is named."""

import numpy as np
import pytest
from holders import HOLDERS, REFUSED
from scipy.sparse.linalg import aslinearoperator

from ntkpipe.base.errors import ConfigError, NonFiniteError, NtkpipeError, TileError
from ntkpipe.base.given import as_array, as_real, read_slices, require_mirror, require_square, require_symmetric

VECTOR = np.random.default_rng(0).standard_normal(13)
MATRIX = np.random.default_rng(1).standard_normal((13, 7))


@pytest.mark.parametrize("values", [VECTOR, MATRIX], ids=["vector", "matrix"])
@pytest.mark.parametrize("name", HOLDERS)
def test_numbers_are_the_same_in_every_hand(name, values):
    held = HOLDERS[name](values)
    found = as_real("them", held)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, values)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_matrix_of_numpy_has_two_axes():
    found = as_real("it", np.asmatrix(MATRIX))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, MATRIX)


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [("bool", "f8"), ("i1", "f8"), ("u1", "f8"), ("i8", "f8"), ("f2", "f2"), ("f4", "f4"), ("f8", "f8"), ("g", "f8")],
)
def test_dtypes_of_real_numbers(dtype, taken):
    """Products of small integers would overflow in their own dtype."""
    values = (100 * MATRIX).astype(dtype)
    found = as_real("them", values)
    assert found.dtype == np.dtype(taken)
    np.testing.assert_array_equal(found, values.astype(taken))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_of_real_numbers_is_named(name):
    make, words = REFUSED[name]
    with pytest.raises(NtkpipeError, match=words) as caught:
        as_real("these", make(MATRIX))
    assert str(caught.value).startswith("these")
    assert isinstance(caught.value, ConfigError | TileError)
    assert (".real" in str(caught.value)) == name.startswith("complex")


def test_a_mask_is_refused_in_slices_too():
    class Automasked:  # as a variable of netCDF4
        shape, dtype, chunks = MATRIX.shape, MATRIX.dtype, "contiguous"

        def __getitem__(self, key):
            return np.ma.array(MATRIX, mask=MATRIX < -1)[key]

    count = int((MATRIX < -1).sum())
    assert count
    with pytest.raises(ConfigError, match=f"it: {count} entries are masked"):
        as_array("it", Automasked())


def test_an_array_that_cannot_be_read_is_named():
    class Broken:
        shape, dtype, chunks = MATRIX.shape, MATRIX.dtype, (4, 4)

        def __getitem__(self, key):
            raise RuntimeError("codec failed")

    with pytest.raises(TileError, match="it: rows 3 to 5 of a Broken cannot be read: codec failed"):
        read_slices("it", Broken(), slice(3, 6), slice(0, 7))


def test_columns_of_a_frame_may_have_any_name():
    pandas = pytest.importorskip("pandas")
    names = ["compute", "cpu", "detach", "toarray", "keys", "chunk", "shape_"]
    np.testing.assert_array_equal(as_real("it", pandas.DataFrame(MATRIX, columns=names)), MATRIX)
    with pytest.raises(NtkpipeError):
        as_real("it", pandas.DataFrame(MATRIX).astype("Float64").mask(pandas.DataFrame(MATRIX > 1)))


def test_what_float64_does_not_hold():
    too_large = [[10**400, 1], [1, 2]]
    with pytest.raises(ConfigError, match="them: a list that NumPy does not take"):
        as_real("them", too_large)
    with pytest.raises(NonFiniteError, match="K holds NaN or infinity"):
        require_symmetric("K", as_real("K", np.full((2, 2), np.longdouble("1e4000"))))
    np.testing.assert_array_equal(as_real("them", np.array([[2**70, 0.5]], object)), [[2.0**70, 0.5]])


def test_labels_stay_what_they_are():
    for labels in (["b", "a"], [True, False], [3, 1, 2]):
        np.testing.assert_array_equal(as_array("labels", labels), np.array(labels))
    assert as_array("labels", np.array([1, 2], object)).dtype.kind == "i"
    assert as_array("labels", np.array(["a", None], object)).dtype.kind == "O"


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (0, 0), (1, 3, 3), (2, 3, 2, 3), (2, 2, 3, 3)])
def test_shapes_of_no_kernel(shape):
    with pytest.raises(ConfigError, match=r"K of shape .*needed \(n, n\)") as caught:
        require_square("K", shape)
    assert ("reshape" in str(caught.value)) == (len(shape) == 4)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_mirror_may_be_off_by_rounding_alone(dtype):
    rounding = float(np.finfo(dtype).eps)
    require_mirror("K", 2 * rounding, 1.0, np.dtype(dtype))
    with pytest.raises(ConfigError, match="K is not symmetric"):
        require_mirror("K", 200 * rounding, 1.0, np.dtype(dtype))
    with pytest.raises(ConfigError, match="K is not symmetric"):
        require_mirror("K", 0.01, 1.0, np.dtype(dtype))


@pytest.mark.parametrize("place", [(0, 299), (299, 0), (150, 3), (3, 150), (7, 7)])
def test_every_entry_of_a_symmetric_matrix_is_looked_at(place):
    base = np.random.default_rng(2).standard_normal((300, 300))
    base = base + base.T
    assert require_symmetric("K", base) == np.abs(base).max()
    for bad in (np.nan, np.inf, -np.inf):
        wrong = base.copy()
        wrong[place] = bad
        with pytest.raises(NonFiniteError, match="K holds NaN or infinity"):
            require_symmetric("K", wrong)
    if place[0] != place[1]:
        wrong = base.copy()
        wrong[place] += 1e-9
        with pytest.raises(ConfigError, match="differ by 1e-09"):
            require_symmetric("K", wrong)


class OnePart:
    """As a dataset of HDF5 whose entries are one part of a file, which is made when something is written."""

    shape, dtype, chunks, fillvalue = MATRIX.shape, MATRIX.dtype, None, 0.0

    def __init__(self, values, is_written):
        self.values, self.id = values, self
        self.get_num_chunks, self.get_storage_size = None, lambda: values.nbytes * is_written

    def __getitem__(self, key):
        return self.values[key]


def test_a_part_of_a_file_that_was_never_written():
    with pytest.raises(TileError, match=r"it: chunks \(0, 0\).*never written"):
        as_real("it", OnePart(np.zeros(MATRIX.shape), False))
    for values, is_written in ((np.zeros(MATRIX.shape), True), (MATRIX, True)):
        np.testing.assert_array_equal(as_real("it", OnePart(values, is_written)), values)


def test_what_has_products_alone_says_how_it_becomes_an_array():
    given = aslinearoperator(MATRIX)
    with pytest.raises(ConfigError, match=r"it: a MatrixLinearOperator; needed an array.*numpy.eye\((\d+)\)") as caught:
        as_real("it", given)
    size = int(str(caught.value).split("numpy.eye(")[1].split(")")[0])
    np.testing.assert_array_equal(as_real("it", given @ np.eye(size)), MATRIX)


def test_numbers_that_float64_takes_for_zero():
    with pytest.raises(ConfigError, match=r"it of dtype .* zero in float64"):
        as_real("it", np.full((2, 2), np.longdouble("1e-4000")))
    assert not as_real("it", np.zeros((2, 2), np.longdouble)).any()
