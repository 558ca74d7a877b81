"""Every route to the entropy of one Gram matrix, against eigenvalues as Eq. 1 writes them."""

import pytest
import torch

from measure import DEVICE, synchronize
from renyi_kd import rbf_kernel, renyi_entropy
from textbook import entropy_by_eigenvalues

ROUTES = {
    "textbook": lambda gram: entropy_by_eigenvalues(gram / gram.trace(), 1.01),
    "1.01": lambda gram: renyi_entropy(gram, 1.01),
    "2": lambda gram: renyi_entropy(gram, 2),
    "3": lambda gram: renyi_entropy(gram, 3),
    "5": lambda gram: renyi_entropy(gram, 5),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("n", [4, 16, 64, 256, 1024, 4096])
def test_entropy(benchmark, n, backward, route):
    torch.manual_seed(0)
    gram = rbf_kernel(torch.randn(n, 16, device=DEVICE)).requires_grad_(backward)
    repeats = max(1, 256 // n) if DEVICE.type == "cpu" else 20

    def run() -> None:
        for _ in range(repeats):
            bits = ROUTES[route](gram)
            if backward:
                torch.autograd.grad(bits, gram)
        synchronize()

    benchmark.extra_info.update(
        bench="entropy", n=n, backward=backward, route=route, repeats=repeats
    )
    benchmark.pedantic(run, rounds=2 if n > 2000 else 10, warmup_rounds=0 if n > 2000 else 2)
