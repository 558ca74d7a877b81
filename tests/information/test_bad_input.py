"""Every row of the table of bad input that concerns kernels and functionals."""

import math

import pytest
import torch

import renyi_kd
from renyi_kd import SampleGram


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: renyi_kd.renyi_entropy(g, alpha=0), ValueError, "`alpha`"),
        (lambda g: renyi_kd.renyi_entropy(g, alpha=-math.inf), ValueError, "`alpha`"),
        (lambda g: renyi_kd.renyi_entropy(g, alpha=True), TypeError, "`alpha`"),
        (
            lambda g: renyi_kd.renyi_entropy(g, method="svd"),
            ValueError,
            "one of 'frobenius', 'power', 'eigvalsh', got 'svd'",
        ),
        (
            lambda g: renyi_kd.renyi_entropy(g, 3, method="lanczos"),
            ValueError,
            "got 'lanczos'. For an estimate .* call renyi_entropy_estimate",
        ),
        (lambda g: renyi_kd.renyi_entropy(g, 3, method="frobenius"), ValueError, "alpha = 2"),
        (lambda g: renyi_kd.renyi_entropy(g, 1.5, method="power"), ValueError, "integer alpha"),
        (lambda g: renyi_kd.renyi_entropy(g, 33, method="power"), ValueError, "from 2 to 32"),
        (lambda g: renyi_kd.renyi_entropy(g[0]), ValueError, r"\(..., n, n\), got \(3,\)"),
        (lambda g: renyi_kd.renyi_entropy(g[:2]), ValueError, "linear_kernel"),
        (lambda g: renyi_kd.renyi_entropy(g.int()), TypeError, "floating-point"),
        (lambda g: renyi_kd.renyi_entropy(g.to(torch.complex64)), TypeError, "floating-point"),
        (lambda g: renyi_kd.renyi_entropy(g.tolist()), TypeError, "torch.Tensor, got list"),
        (lambda g: renyi_kd.renyi_joint_entropy(), ValueError, "at least one Gram matrix"),
        (lambda g: renyi_kd.renyi_joint_entropy(g, torch.eye(4)), ValueError, "same n samples"),
        (lambda g: renyi_kd.renyi_mutual_information(g, []), ValueError, "`gram_y`.*at least one"),
        (lambda g: renyi_kd.renyi_total_correlation(g, g.to("meta")), ValueError, "one device"),
        (lambda g: renyi_kd.renyi_mutual_information(g, None), TypeError, "`gram_y`.*NoneType"),
        (
            lambda g: renyi_kd.renyi_joint_entropy(g.expand(2, 3, 3), g.expand(5, 3, 3)),
            ValueError,
            r"must broadcast, got shapes \[\(2, 3, 3\), \(5, 3, 3\)\]",
        ),
        (
            lambda g: renyi_kd.linear_kernel(g.expand(2, 3, 3), g.expand(4, 5, 3, 3)),
            ValueError,
            "must broadcast",
        ),
        (lambda g: renyi_kd.linear_kernel(g, g.to("meta")), ValueError, "one device"),
        (lambda g: renyi_kd.linear_kernel(g[:, :0]), ValueError, "one sample a row"),
        (lambda g: renyi_kd.normalize_gram(g[:2]), ValueError, "`gram`"),
        (lambda g: renyi_kd.linear_kernel(g[0]), ValueError, "one sample a row"),
        (lambda g: renyi_kd.linear_kernel(g, g[:, :2]), ValueError, "dimension of `x`, 3"),
        (lambda g: renyi_kd.linear_kernel(g.long()), TypeError, "`x`"),
        (lambda g: renyi_kd.renyi_entropy(g.to_sparse()), TypeError, "dense.*sparse_coo.*to_dense"),
        (lambda g: renyi_kd.linear_kernel(g.to_sparse()), TypeError, "`x`.*sparse_coo"),
        (lambda g: renyi_kd.renyi_entropy(g.to(torch.float8_e5m2)), TypeError, "16, 32 or 64 bits"),
        (
            lambda g: renyi_kd.renyi_entropy(
                torch.nested.nested_tensor([g, g], layout=torch.jagged)
            ),
            TypeError,
            "nested.*to_padded_tensor",
        ),
        (lambda g: renyi_kd.linear_kernel(g.long()), TypeError, r"one_hot\(labels\)\.float\(\)"),
        (
            lambda g: renyi_kd.renyi_joint_entropy(g, g, 2),
            TypeError,
            r"`grams\[2\]`.*got 2. Options are given by name, as alpha=2",
        ),
        (lambda g: renyi_kd.renyi_total_correlation(g, 1.5), TypeError, r"`grams\[1\]`.*alpha=1.5"),
        (lambda g: renyi_kd.renyi_joint_entropy(g, g[:2]), ValueError, r"`grams\[1\]` must have"),
        (lambda g: renyi_kd.renyi_entropy(g[:2]), ValueError, "`gram` must have"),
        (lambda g: renyi_kd.rbf_kernel(g, bandwidth=g[0]), ValueError, r"\(\.\.\., 1, 1\).*\(3,\)"),
        (
            lambda g: renyi_kd.renyi_joint_entropy([g, g]),
            TypeError,
            r"`grams` must be a Gram matrix, got a list. Give several .*\(\*grams\)",
        ),
        (lambda g: renyi_kd.renyi_entropy((SampleGram(g), g)), TypeError, "`gram`.*got a tuple"),
        (lambda g: renyi_kd.renyi_joint_entropy([]), TypeError, "torch.Tensor, got list"),
        (
            lambda g: renyi_kd.rbf_kernel(g, bandwidth=torch.tensor(1)),
            TypeError,
            r"`bandwidth` .*int64. Convert it by `\.float\(\)`",
        ),
        (
            lambda g: renyi_kd.rbf_kernel(g.expand(2, 3, 3), bandwidth=torch.ones(3, 1, 1)),
            ValueError,
            r"must broadcast, got shapes \[\(2, 3, 3\), \(3, 1, 1\)\]",
        ),
        (
            lambda g: SampleGram(g, renyi_kd.rbf_kernel, bandwidth=torch.ones(()).requires_grad_()),
            ValueError,
            "`bandwidth`.*no gradient",
        ),
        (lambda g: SampleGram(g, normalize="no"), TypeError, "`normalize` .* got 'no'"),
        (lambda g: renyi_kd.rbf_kernel(g, bandwidth=0), ValueError, "`bandwidth`"),
        (lambda g: renyi_kd.laplacian_kernel(g, bandwidth=-1.0), ValueError, "`bandwidth`"),
        (lambda g: renyi_kd.polynomial_kernel(g, degree=0), ValueError, "`degree`"),
        (lambda g: renyi_kd.polynomial_kernel(g, degree=1.5), TypeError, "`degree`"),
        (lambda g: renyi_kd.polynomial_kernel(g, degree=2, offset=-1), ValueError, "`offset`"),
    ],
)
def test_functionals(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.eye(3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_masked_tensors_are_refused():
    gram = torch.eye(3)
    with pytest.raises(TypeError, match=r"`gram` must not be a masked tensor.*Select samples"):
        renyi_kd.renyi_entropy(torch.masked.masked_tensor(gram, gram > 0))
