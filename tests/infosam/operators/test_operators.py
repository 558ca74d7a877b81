"""Every operator: its gradient, its registration with PyTorch, and no second derivative."""

import pytest
import torch
from tensors import draw, leaf
from torch import Tensor

from renyi_kd.information.routes.eigenvalues import eigh
from renyi_kd.infosam.operators.batch_gram import batch_gram
from renyi_kd.infosam.operators.folding import fold_query
from renyi_kd.infosam.operators.joint import joint_grams
from renyi_kd.infosam.operators.scores import relation_scores, unit_length


def fold(tokens, *parameters, residual=True):
    pairs = [parameters[i : i + 2] for i in range(0, 8, 2)]
    return fold_query(tokens, *pairs, residual=residual, eps=1e-5)


def raw_grams() -> Tensor:
    samples = draw(4, 3, 5) + draw(4, 1, 5, seed=1)
    return samples @ samples.mT


FOLD_SHAPES = [(2, 2, 3), (3,), (3,), (3, 3), (3,), (3, 3), (3,), (3,), (3,)]
OPERATORS = {
    "scores": (
        lambda *x: relation_scores(*x, 1e-3),
        lambda: (leaf(2, 5, 3), leaf(2, 2, 3, seed=1), leaf(2, 2, 3, seed=2), leaf(2, 2, seed=3)),
    ),
    "scores without residual": (
        lambda f, w, c: relation_scores(f, w, None, c, 1e-3),
        lambda: (leaf(2, 3, 5).mT, leaf(2, 2, 3, seed=1), leaf(2, 2, seed=3)),
    ),
    "unit_length": (unit_length, lambda: (leaf(3, 2, 4),)),
    "fold": (fold, lambda: tuple(leaf(*s, seed=i) for i, s in enumerate(FOLD_SHAPES))),
    "fold without residual": (
        lambda *x: fold(*x, residual=False),
        lambda: tuple(leaf(*s, seed=i) for i, s in enumerate(FOLD_SHAPES)),
    ),
    "sample_gram": (batch_gram, lambda: (leaf(3, 4, 5),)),
    "joint_grams": (
        # Of a symmetric argument: the gradient is that of Gram matrices.
        lambda x: joint_grams(x @ x.mT, True),
        lambda: (leaf(4, 3, 5),),
    ),
    "joint_grams, detached": (
        lambda x: joint_grams(x @ x.mT, False)[:4],
        lambda: (leaf(4, 3, 5),),
    ),
    "eigenvalues": (
        lambda x: eigh(x + x.mT)[0],
        lambda: (leaf(2, 4, 4),),
    ),
}
over_operators = pytest.mark.parametrize(("function", "inputs"), OPERATORS.values(), ids=OPERATORS)


@over_operators
def test_gradcheck(function, inputs):
    assert torch.autograd.gradcheck(function, inputs())


@over_operators
def test_second_derivatives_are_refused(function, inputs):
    arguments = inputs()
    output = function(*arguments)
    output = output[0] if isinstance(output, tuple) else output
    (gradient,) = torch.autograd.grad(output.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), arguments[0])


def test_registration():
    """Schema, shapes without data, and autograd of each operator, as PyTorch checks them."""
    check = torch.library.opcheck
    pixels, query, offset = leaf(2, 5, 3), leaf(2, 2, 3, seed=1), leaf(2, 2, seed=2)
    for residual in (None, leaf(2, 2, 3, seed=3)):
        check(torch.ops.renyi_kd.scores.default, (pixels, query, residual, offset, 1e-5))
    # As of tokens (N, B, D): strides must be foreseen too.
    turned = leaf(2, 3, 4).transpose(0, 1)
    for residual in (None, turned):
        inputs = leaf(3, 5, 4), turned, residual, leaf(3, 2)
        check(torch.ops.renyi_kd.scores.default, (*inputs, 1e-5))
        _, normalized, mean, rstd = torch.ops.renyi_kd.scores(*inputs, 1e-5)
        saved = [x if x is None else x.detach() for x in (*inputs[:3], normalized, mean, rstd)]
        arguments = draw(3, 2, 5), *saved, True, residual is not None
        check(torch.ops.renyi_kd.scores_backward.default, arguments)
    check(torch.ops.renyi_kd.unit_length.default, (leaf(2, 3, 4),))
    check(torch.ops.renyi_kd.unit_length.default, (leaf(2, 3, 4).transpose(0, 1),))
    check(torch.ops.renyi_kd.sample_gram.default, (leaf(2, 3, 4),))
    check(torch.ops.renyi_kd.joint_grams.default, (raw_grams().requires_grad_(), True))
    check(torch.ops.renyi_kd.eigh.default, (raw_grams().requires_grad_(),))
    arguments = [leaf(*shape, seed=i) for i, shape in enumerate(FOLD_SHAPES)]
    check(torch.ops.renyi_kd.fold.default, (*arguments, True, 1e-5))
    arguments[0] = arguments[0].transpose(0, 1)
    check(torch.ops.renyi_kd.fold.default, (*arguments, True, 1e-5))
