"""Whatever the user has set, numbers are computed alike, and the settings come back."""

import pytest
import torch

from ntkpipe.jacobian.model.device import exact_math, exact_process


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_exact_math_restores_the_settings(precision):
    torch.set_float32_matmul_precision(precision)

    def settings():
        return (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        )

    def stop():
        with exact_math():
            assert settings() == ("ieee", "ieee", "ieee", False, False, True)
            raise KeyError

    before = settings()
    with pytest.raises(KeyError):
        stop()
    assert settings() == before
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_may_leave_exact_math_in_any_order(first_out):
    """As the drivers and the workers' threads of a process do."""

    def settings():
        return torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.ones(1).dtype

    before = settings()
    users = [exact_process(), exact_process(default_dtype=torch.float64)]
    for user in users:
        user.__enter__()
    users.pop(first_out).__exit__(None, None, None)
    assert settings() == (False, False, [torch.float64, torch.float32][first_out])
    users.pop().__exit__(None, None, None)
    assert settings() == before
