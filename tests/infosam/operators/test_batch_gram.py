"""Gram matrices over batches of feature maps, of every layout and dtype."""

import pytest
import torch
import torch.nn.functional as F
from grids import over
from tensors import draw, leaf, relative_error

from renyi_kd import infosam_terms
from renyi_kd.infosam.operators.batch_gram import batch_gram, batch_gram_error


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dense", [True, False])
def test_batch_gram(layout, dtype, dense):
    samples = draw(3, 5, 6, 7, dtype=dtype).permute(layout)
    samples = samples if dense else samples[:, ::2, 1:]
    rows = samples.double().flatten(1)
    torch.testing.assert_close(batch_gram(samples), rows @ rows.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
@over("features", [2**18 + 300], slow=[2**18, 700_001])
def test_batch_gram_of_long_maps(dtype, spread, features):
    samples = (draw(1, features) + spread * draw(4, features, seed=1)).to(dtype)
    rows = F.normalize(samples.double())
    gram = batch_gram(samples)
    length = gram.diagonal().sqrt()
    tolerance = 4e-9 if dtype == torch.float32 else 3e-8
    assert (gram / (length[:, None] * length) - rows @ rows.mT).abs().max() < tolerance


def test_long_maps_of_float64_keep_its_digits():
    samples = draw(2, 2**18 + 300)
    torch.testing.assert_close(batch_gram(samples), samples @ samples.mT, rtol=1e-13, atol=1e-9)
    assert batch_gram_error(samples) == torch.finfo(torch.float64).eps
    assert batch_gram_error(samples.float()) == (1e-8 if samples.is_cpu else 1e-7)
    assert batch_gram_error(samples[:, 1000:].float()) == torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    "samples",
    [
        draw(3, 4, 300).mT,
        draw(4, 300, 3).permute(2, 0, 1),
        draw(300, 3, 4).transpose(0, 1),
        draw(3, 4, 1, 6).expand(3, 4, 5, 6),
        draw(3, 1, 5, 6).expand(3, 4, 5, 6),
        draw(1, 4, 5).expand(3, 4, 5),
    ],
    ids=["channels first", "batch last", "batch inside", "repeated", "repeated outside", "one"],
)
def test_batch_gram_passes_a_gradient(samples):
    samples = samples.float().requires_grad_()
    cotangent = draw(3, 3, seed=1)
    (gradient,) = torch.autograd.grad(batch_gram(samples), samples, cotangent)
    expected = (cotangent + cotangent.mT) @ samples.detach().double().flatten(1)
    assert relative_error(gradient.flatten(1), expected) < 1e-6
    if samples.mT.is_contiguous():
        assert gradient.stride() == samples.stride()
    torch.library.opcheck(torch.ops.renyi_kd.sample_gram.default, (samples,))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_rounding_of_long_maps_is_no_information(alpha):
    """Proportional samples, of entropy zero, are no more than that below order 1."""
    maps = draw(1, 2**18 + 256).float() * torch.tensor([[1.0], [0.3], [2.7], [1.9]])
    tokens, relation = torch.ones(4, 3), draw(4, 9, seed=1)
    terms = infosam_terms(relation, relation, maps, tokens, alpha=alpha)
    assert abs(terms.teacher_feature_entropy) < 1e-6


def test_image_embedding_may_train():
    relation, tokens = draw(4, 9), draw(4, 2, seed=2)
    assert torch.autograd.gradcheck(
        lambda embedding: infosam_terms(relation, relation, embedding, tokens).loss,
        leaf(4, 5, 3, seed=1),
    )
