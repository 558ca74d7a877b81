"""`torch.compile` and `torch.export` of the functionals, for any number of samples."""

import math

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import renyi_kd
from renyi_kd import SampleGram

SIZES = [5, 9, 17, 33, 12, 40, 7, 21, 64, 100]  # more than PyTorch compiles anew
LARGE = 600  # eagerly, matrices of this size are gone through by tiles, and so are samples


def rbf(n):
    torch.manual_seed(n)
    return renyi_kd.rbf_kernel(torch.randn(n, 3), bandwidth=1.0)


def points(n):
    torch.manual_seed(n)
    return torch.randn(n, 3)


def information(x):
    variables = rbf_of(x), SampleGram(x, renyi_kd.polynomial_kernel, degree=2)
    return renyi_kd.renyi_mutual_information(*variables, alpha=3)


def rbf_of(x):
    return SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0)


FUNCTIONS = {
    **{
        f"entropy, {alpha}": (lambda k, a=alpha: renyi_kd.renyi_entropy(k, a), rbf)
        for alpha in (2, 3, 1, 1.5, 0.5, math.inf)
    },
    "dual": (lambda x: renyi_kd.renyi_entropy(SampleGram(x), 1.5), points),
    "samples": (lambda x: renyi_kd.renyi_entropy(rbf_of(x)), points),
    "two variables": (information, points),
    "median": (renyi_kd.rbf_kernel, points),
    "median of L1": (renyi_kd.laplacian_kernel, points),
    "normalised": (renyi_kd.normalize_gram, rbf),
}
over_functions = pytest.mark.parametrize("name", FUNCTIONS)


@over_functions
def test_two_graphs_serve_any_number_of_samples(name):
    function, make = FUNCTIONS[name]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for n in [*SIZES, LARGE]:
        torch.testing.assert_close(compiled(make(n)), function(make(n)), rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 2


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@over_functions
def test_export_with_any_number_of_samples(name):
    function, make = FUNCTIONS[name]
    n = Dim("n", min=4)
    sizes = {0: n, 1: n} if make is rbf else {0: n}
    program = export(Module(function), (make(9),), dynamic_shapes=(sizes,)).module()
    for size in (4, 30, LARGE):
        torch.testing.assert_close(program(make(size)), function(make(size)), rtol=1e-5, atol=1e-6)
