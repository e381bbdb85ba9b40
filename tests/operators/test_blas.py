from ntkpipe.operators import blas
from ntkpipe.operators.blas import single_threaded_blas


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
