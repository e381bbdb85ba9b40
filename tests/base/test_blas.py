import time

import numpy as np
import pytest

from ntkpipe.base import blas
from ntkpipe.base.blas import Pool, single_threaded_blas


def test_blas_has_one_thread_until_the_last_pass_is_over():
    controller = blas._controller()

    def num_threads() -> set[int]:
        return {each["num_threads"] for each in controller.info() if each["user_api"] == "blas"}

    with controller.limit(limits=2, user_api="blas"):
        before = num_threads()
        with single_threaded_blas():
            with single_threaded_blas():
                assert num_threads() == {1}
            assert num_threads() == {1}
        assert num_threads() == before


def test_as_a_decorator_it_ends_with_the_call():
    @single_threaded_blas()
    def twice(depth: int) -> set[int]:
        here = {each["num_threads"] for each in blas._controller().info() if each["user_api"] == "blas"}
        return here | twice(depth - 1) if depth else here

    with blas._controller().limit(limits=2, user_api="blas"):
        assert twice(2) == {1}
        assert {each["num_threads"] for each in blas._controller().info() if each["user_api"] == "blas"} == {2}


@pytest.fixture(params=[1, 3])
def pool(request):
    with Pool.open(request.param) as found:
        yield found


def test_products_are_subtracted_in_place(pool):
    rng = np.random.default_rng(0)
    for rows, columns in ((4, 3), (300, 700)):
        left, right = rng.standard_normal((rows, 5)), rng.standard_normal((columns, 5))
        whole = rng.standard_normal((rows + 2, columns + 3))
        exact = whole.copy()
        exact[1 : rows + 1, 2 : columns + 2] -= left @ right.T
        pool.subtract_product(whole[1 : rows + 1, 2 : columns + 2], left, right, np.empty(rows * columns))
        np.testing.assert_allclose(whole, exact, rtol=1e-12, atol=1e-13)


def test_the_error_of_a_part_is_raised_after_all_have_ended(pool):
    done = []

    def work(part):
        if part == 1:
            raise ZeroDivisionError
        time.sleep(0.01)
        done.append(part)

    with pytest.raises(ZeroDivisionError):
        pool.each(work, range(4))
    assert pool.num_threads == 1 or sorted(done) == [0, 2, 3]
