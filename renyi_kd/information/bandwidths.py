"""Rules that make a bandwidth of samples, for `rbf_kernel` and `laplacian_kernel`.

Bandwidths are constants of the gradient, one for each matrix of a batch.
"""

import math

from torch import Tensor

from renyi_kd._checks import check_integer
from renyi_kd._precision import exact_dtype
from renyi_kd.information.distances import distances, median_distance
from renyi_kd.information.kernels import check_samples


def median_bandwidth(x: Tensor) -> Tensor:
    """Median Euclidean distance over the pairs of different samples, the default of `rbf_kernel`.

    Args:
        x: samples, one a row, shape `(..., n, d)`.

    Returns:
        Bandwidth, shape `(..., 1, 1)`, in the dtype of `x`, at least float32; 1 where the median is
        zero.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: the shape of `x` does not fit.

    Example:
        >>> import torch
        >>> from renyi_kd import median_bandwidth
        >>> median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([[2.]])
    """
    dtype = check_samples(x)
    median = median_distance(x, order=2.0).to(dtype)
    return median.expand(*x.shape[:-2], 1, 1)


def neighbor_bandwidth(x: Tensor, neighbors: int = 10) -> Tensor:
    """Mean Euclidean distance from each sample to its nearest others, over all samples.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        neighbors: number of others, from 1 to n - 1.

    Returns:
        Bandwidth, shape `(..., 1, 1)`, in the dtype of `x`, at least float32. It is zero, and no
        bandwidth, where each sample has so many equal ones.

    Raises:
        TypeError: `x` is not a floating-point tensor, or `neighbors` not an integer.
        ValueError: the shape of `x` does not fit, or there are not so many other samples.

    Example:
        >>> import torch
        >>> from renyi_kd import neighbor_bandwidth
        >>> neighbor_bandwidth(torch.tensor([[0.0], [1.0], [3.0]]), neighbors=1)
        tensor([[1.3333]])
    """
    dtype = check_samples(x)
    neighbors = check_integer("neighbors", neighbors, minimum=1)
    if neighbors >= x.shape[-2]:
        raise ValueError(
            f"`neighbors` must be below the number of samples, {x.shape[-2]}, got {neighbors}."
        )
    exact = x.detach().to(exact_dtype(x.device))
    nearest = distances(exact, exact, 2.0).topk(neighbors + 1, largest=False).values
    return nearest[..., 1:].mean(dim=(-2, -1), keepdim=True).to(dtype)


def scott_bandwidth(x: Tensor) -> Tensor:
    r"""Scott's rule for density estimates, :math:`s \, n^{-1 / (d + 4)}`.

    Here :math:`s^2` is the mean of the variances of the d dimensions.

    Args:
        x: samples, one a row, shape `(..., n, d)`, n at least 2.

    Returns:
        Bandwidth, shape `(..., 1, 1)`, in the dtype of `x`, at least float32.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: the shape of `x` does not fit, or there is a single sample.

    References:
        D. W. Scott, Multivariate Density Estimation, 1992.

    Example:
        >>> import torch
        >>> from renyi_kd import scott_bandwidth
        >>> scott_bandwidth(torch.arange(32.0).unsqueeze(1))
        tensor([[4.6904]])
    """
    deviation = _deviation(x)
    n, d = x.shape[-2:]
    factor: float = n ** (-1 / (d + 4))
    return deviation * factor


def silverman_bandwidth(x: Tensor) -> Tensor:
    r"""Silverman's rule for density estimates, :math:`s \, (4 / (n (d + 2)))^{1 / (d + 4)}`.

    Here :math:`s^2` is the mean of the variances of the d dimensions.

    Args:
        x: samples, one a row, shape `(..., n, d)`, n at least 2.

    Returns:
        Bandwidth, shape `(..., 1, 1)`, in the dtype of `x`, at least float32.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: the shape of `x` does not fit, or there is a single sample.

    References:
        B. W. Silverman, Density Estimation for Statistics and Data Analysis, 1986.

    Example:
        >>> import torch
        >>> from renyi_kd import silverman_bandwidth
        >>> silverman_bandwidth(torch.arange(32.0).unsqueeze(1))
        tensor([[4.9682]])
    """
    deviation = _deviation(x)
    n, d = x.shape[-2:]
    factor: float = (4 / (n * (d + 2))) ** (1 / (d + 4))
    return deviation * factor


def dimension_bandwidth(x: Tensor) -> float:
    r"""The number :math:`\sqrt{d / 2}`.

    It makes the RBF kernel :math:`\exp(-\lVert x - y \rVert^2 / d)`, which suits samples whose
    dimensions have variance one.

    Args:
        x: samples, one a row, shape `(..., n, d)`.

    Returns:
        Bandwidth.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: the shape of `x` does not fit.

    Example:
        >>> import torch
        >>> from renyi_kd import dimension_bandwidth
        >>> dimension_bandwidth(torch.zeros(5, 8))
        2.0
    """
    check_samples(x)
    return math.sqrt(x.shape[-1] / 2)


def _deviation(x: Tensor) -> Tensor:
    dtype = check_samples(x)
    if x.shape[-2] < 2:
        raise ValueError(f"`x` must hold at least two samples, got shape {tuple(x.shape)}.")
    variances = x.detach().to(exact_dtype(x.device)).var(dim=-2, keepdim=True)
    return variances.mean(dim=-1, keepdim=True).sqrt().to(dtype)
