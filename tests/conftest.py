import os

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two threads on a busy two-core machine are ten times slower than one.
torch.set_num_threads(1)

# The same examples in every run, and with `--hypothesis-profile=exhaustive` more of them.
settings.register_profile("fast", max_examples=40, derandomize=True, deadline=None)
settings.register_profile("exhaustive", max_examples=300, derandomize=True, deadline=None)
settings.load_profile("fast")


class _OfTheCPU(TorchFunctionMode):
    """With a default device: seeded draws are those of the CPU, and NumPy gets what lies there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.numpy, Tensor.__array__):
            return function(args[0].cpu(), *args[1:], **kwargs)
        generator = kwargs.get("generator")
        if (
            generator is None
            or generator.device == torch.get_default_device()
            or "device" in kwargs
        ):
            return function(*args, **kwargs)
        learns = kwargs.pop("requires_grad", False)
        drawn = function(*args, **kwargs, device=generator.device)
        return drawn.to(torch.get_default_device()).requires_grad_(learns)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tensors lie whose device a test does not name")


def pytest_configure(config: pytest.Config) -> None:
    if device := config.getoption("--device"):
        torch.set_default_device(device)
        torch.backends.cudnn.allow_tf32 = False  # of the convolutions of models
        _OfTheCPU().__enter__()
