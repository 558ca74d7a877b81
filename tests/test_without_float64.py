"""Devices without float64: what has n x n entries goes to the CPU, the rest stays there."""

import math

import pytest
import torch
from grids import over
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import renyi_kd
from renyi_kd import SampleGram, _precision


@pytest.fixture(autouse=True)
def without_float64(monkeypatch):
    """Meta stands for the device: PyTorch does not run autograd on fakes of the real one, MPS."""
    monkeypatch.setattr(_precision, "WITHOUT_FLOAT64", ("meta",))


class RefuseFloat64(TorchDispatchMode):
    """Raises where an operator would make a float64 tensor on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            on_device = isinstance(leaf, torch.Tensor) and leaf.device.type == "meta"
            if on_device and leaf.dtype == torch.float64:
                raise TypeError(f"{function} makes float64 on the device")
        return result


def entropy_of(kernel, **options):
    return lambda x, alpha: renyi_kd.renyi_entropy(kernel(x, **options), alpha)


FUNCTIONALS = {
    "linear": entropy_of(renyi_kd.linear_kernel),
    "polynomial": entropy_of(renyi_kd.polynomial_kernel, degree=2),
    "rbf": entropy_of(renyi_kd.rbf_kernel, bandwidth=2.0),
    "laplacian": entropy_of(renyi_kd.laplacian_kernel, bandwidth=2.0),
    "median": entropy_of(renyi_kd.rbf_kernel),
    "normalised": lambda x, alpha: renyi_kd.renyi_entropy(
        renyi_kd.normalize_gram(renyi_kd.linear_kernel(x)), alpha
    ),
    "samples": lambda x, alpha: renyi_kd.renyi_mutual_information(
        SampleGram(x), SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0), alpha
    ),
    "normalised samples": lambda x, alpha: renyi_kd.renyi_entropy(
        SampleGram(x, normalize=True), alpha
    ),
}


@over("alpha", [2, 3, 1.01], slow=[math.inf])
@over("n", [8, 600], slow=[130])
@pytest.mark.parametrize("name", FUNCTIONALS)
def test_information(name, n, alpha):
    with FakeTensorMode(), RefuseFloat64():
        x = torch.randn(n, 3, device="meta", requires_grad=True)
        value = FUNCTIONALS[name](x, alpha)
        assert (value.device, value.dtype) == (x.device, torch.float32)
        (gradient,) = torch.autograd.grad(value, x)
        assert (gradient.device, gradient.dtype) == (x.device, torch.float32)


def test_the_loss_and_its_terms():
    with FakeTensorMode(), RefuseFloat64():
        with torch.device("meta"):
            distiller = renyi_kd.InfoSAMDistiller(256)
            maps = torch.randn(2, 4, 256, 32, 32)
            tokens = torch.randn(2, 4, 5, 256)
        student = maps[1].requires_grad_(), tokens[1].requires_grad_()
        terms = distiller.terms((maps[0], tokens[0]), student)
        assert {term.device.type for term in terms} == {"meta"}
        loss = distiller((maps[0], tokens[0]), student)
        assert loss.device.type == "meta"
        loss.backward()
        assert student[0].grad.device.type == "meta"


def test_the_mode_refuses():
    with FakeTensorMode(), RefuseFloat64(), pytest.raises(TypeError, match="float64 on the device"):
        torch.ones(3, device="meta").double()
