"""Which dtype keeps the digits of matrix products, as PyTorch is set."""

import pytest
import torch

from renyi_kd._precision import compute_dtype, ieee_dtype


def test_results_are_at_least_float32():
    half, single, double = (
        torch.empty(1, dtype=d) for d in (torch.half, torch.float, torch.double)
    )
    assert compute_dtype(half) == compute_dtype(half, half.bfloat16()) == torch.float32
    assert compute_dtype(half, single) == torch.float32
    assert compute_dtype(half, double) == compute_dtype(single, double) == torch.float64


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reduced_matmul_precision_calls_for_float64(device):
    """Many a CPU ignores the setting, so that no result there would show it."""
    before = torch.get_float32_matmul_precision()
    dtypes = []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            dtypes.append(ieee_dtype(torch.float32, torch.device(device)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtypes == [torch.float32, torch.float64, torch.float64]


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9"
)
def test_each_device_has_a_setting_of_its_own():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for matmul, reduced, other in (
        (torch.backends.cuda.matmul, cuda, cpu),
        (torch.backends.mkldnn.matmul, cpu, cuda),
    ):
        before = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32"
            assert ieee_dtype(torch.float32, reduced) == torch.float64
            assert ieee_dtype(torch.float32, other) == torch.float32
        finally:
            matmul.fp32_precision = before
        assert ieee_dtype(torch.float32, reduced) == torch.float32
