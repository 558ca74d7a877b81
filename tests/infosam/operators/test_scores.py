"""Relation scores block by block, in every layout and dtype."""

import pytest
import torch
import torch.nn.functional as F
from grids import over
from tensors import LAYOUTS, draw, relative_error

from renyi_kd.infosam.operators import scores
from renyi_kd.infosam.operators.scores import relation_scores


@over("block", [8], slow=[64, 2**18])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
@over("dtype", [torch.bfloat16, torch.float32], slow=[torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_scores_of_any_dtype_block_by_block(block, layout, dtype, tokens, monkeypatch):
    """More blocks than one, a last one that is shorter, samples alone and together."""
    monkeypatch.setattr(scores, "BLOCK", block)
    compute = torch.promote_types(dtype, torch.float32)
    pixels = LAYOUTS[layout](draw(3, 13, 6, dtype=dtype)).requires_grad_()
    query, residual = (draw(3, tokens, 6, seed=s).to(compute).requires_grad_() for s in (1, 2))
    offset = draw(3, tokens, seed=3).to(compute).requires_grad_()
    inputs = pixels, query, residual, offset
    value = relation_scores(*inputs, 1e-5)
    cotangent = draw(*value.shape, seed=4).to(compute)
    gradients = torch.autograd.grad(value, inputs, cotangent)
    assert [x.dtype for x in (value, *gradients)] == [compute, *(x.dtype for x in inputs)]
    if layout != "strided":
        assert gradients[0].stride() == pixels.stride()

    f, w, v, c = exact = [x.detach().double().requires_grad_() for x in inputs]
    normalized = F.layer_norm(f, (6,), eps=1e-5)
    expected = w @ normalized.mT + v @ f.mT + c.unsqueeze(2)
    references = torch.autograd.grad(expected, exact, cotangent.double())
    tolerance = 1e-12 if compute == torch.float64 else 2e-6
    assert relative_error(value, expected) < tolerance
    for gradient, reference in zip(gradients, references, strict=True):
        rounding = torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 0
        assert relative_error(gradient, reference) < tolerance + rounding


def test_moments_off_the_cpu():
    """As far as shapes go: elsewhere than on a CPU a map is one block, however long."""
    pixels = torch.empty(2, 4096, 256, device="meta")
    assert pixels[0].numel() > scores.BLOCK
    mean, variance = (torch.empty(2, 4096, device="meta") for _ in range(2))
    scores._fill_in_moments(pixels, mean, variance)
