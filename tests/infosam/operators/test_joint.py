"""The joint Gram matrices of the loss."""

import pytest
import torch
import torch.nn.functional as F
from tensors import draw

from renyi_kd.infosam.operators.joint import joint_grams


@pytest.mark.parametrize("trains_relation", [True, False])
def test_joint_grams(trains_relation):
    """With a zero sample in one variable and two in another."""
    samples = draw(4, 5, 6)
    samples[0, 1] = 0
    samples[2, :2] = 0
    grams = samples @ samples.mT
    cosines = F.normalize(samples, dim=2) @ F.normalize(samples, dim=2).mT
    cosines[0, 1, 1] = 1
    cosines[2, :2, :2] = 1
    t, s, i, m = cosines
    expected = torch.stack([t, s, i * m, i * m * t, t * s]) / 5
    torch.testing.assert_close(joint_grams(grams, trains_relation), expected)
    assert joint_grams(grams, trains_relation).diagonal(dim1=1, dim2=2).sum(1) == pytest.approx(1)
