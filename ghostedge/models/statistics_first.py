"""Parallel conv+BN branches trained as one convolution: the same function, faster on a CPU.

A branch is linear up to its BatchNorm, and all that the norm needs of the branch's output is its
mean and variance. With those known, the branches fold into one convolution while training, as they
do when deployed, and neither their outputs are normalised nor summed. For a 1x1 conv the statistics
follow from the mean and the covariance of its input, so that the branches are never computed at
all; for a depthwise one they are computed, but read only once. Gradients are exact: they go through
the statistics. In float32 the result differs from the plain one by rounding alone (see the tests), as
long as means are of the size of the deviations, which those of trained nets are: of inputs with mean 10
and deviation 0.1 the variance, a difference of squares, is wrong by a hundredth.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = nn.BatchNorm2d | nn.Identity


class _Moments(torch.autograd.Function):
    """Mean and biased variance by channel, each way one pass over the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = _rows(x)
        mean = rows.mean(0)
        square = rows.square().mean(0)
        ctx.save_for_backward(x, mean)
        return mean, (square - mean.square()).clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        by_mean, by_variance = (gradient / (x.numel() // x.shape[1]) for gradient in gradients)
        shift = (by_mean - 2 * by_variance * mean).view(1, -1, 1, 1)
        return torch.addcmul(shift, x, 2 * by_variance.view(1, -1, 1, 1))


class _Covariance(torch.autograd.Function):
    """Mean of each channel and biased covariance of them; backwards one product, not two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = _rows(x)
        mean = rows.mean(0)
        ctx.save_for_backward(x, mean)
        return mean, rows.T @ rows / len(rows) - mean[:, None] * mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        rows = _rows(x)
        by_mean, by_covariance = (gradient / len(rows) for gradient in gradients)
        both = by_covariance + by_covariance.T
        product = torch.addmm(by_mean - mean @ both, rows, both)
        return product.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """Return a channels_last batch as (pixels, channels), without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _normed(norm: Norm, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return gain and offset of a BatchNorm in training, and track its statistics."""
    if isinstance(norm, nn.Identity):
        return torch.ones_like(mean), torch.zeros_like(mean)
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None and norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.detach(), norm.momentum)
    norm.running_var.lerp_(variance.detach() * (count / (count - 1)), norm.momentum)
    gain = norm.weight * torch.rsqrt(variance + norm.eps)
    return gain, norm.bias - gain * mean


def pointwise(
    x: Tensor, conv: nn.Conv2d, branches: int, norm: nn.BatchNorm2d, skip_norm: Norm | None
) -> Tensor:
    """Interleaved 1x1 branches with a norm each, and a norm of the input itself."""
    mean, covariance = _Covariance.apply(x)
    count = x.numel() // x.shape[1]
    weight = conv.weight[:, :, 0, 0]
    variance = ((weight @ covariance) * weight).sum(1).clamp(min=0)
    gain, offset = _normed(norm, weight @ mean, variance, count)
    weight = (gain[:, None] * weight).unflatten(0, (-1, branches)).sum(1)
    bias = offset.unflatten(0, (-1, branches)).sum(1)
    if skip_norm is not None:
        gain, offset = _normed(skip_norm, mean, covariance.diagonal().clamp(min=0), count)
        weight, bias = weight + gain.diag(), bias + offset
    return F.conv2d(x, weight[:, :, None, None], bias)


def depthwise(
    x: Tensor,
    conv: nn.Conv2d,
    branches: int,
    norm: nn.BatchNorm2d,
    scale_conv: nn.Conv2d | None,
    scale_norm: Norm | None,
    skip_norm: Norm | None,
) -> Tensor:
    """Interleaved depthwise branches with a norm each; a 1x1 branch; a norm of the input itself."""

    def convolved(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)

    # one by one: oneDNN's depthwise kernels, 5 to 9 times as fast, have a channel out for each one in
    each = conv.weight.unflatten(0, (-1, branches)).unbind(1)
    outputs = [convolved(weight) for weight in each]
    count = outputs[0].numel() // conv.in_channels
    moments = zip(*(_Moments.apply(y) for y in outputs), strict=True)
    mean, variance = (torch.stack(of, 1).flatten() for of in moments)
    gain, offset = _normed(norm, mean, variance, count)
    weight = (gain[:, None, None, None] * conv.weight).unflatten(0, (-1, branches)).sum(1)
    bias = offset.unflatten(0, (-1, branches)).sum(1)
    if scale_norm is not None or skip_norm is not None:
        mean, variance = _Moments.apply(x[:, :, :: conv.stride[0], :: conv.stride[1]])
        middle = torch.zeros_like(bias)
        if scale_conv is not None and scale_norm is not None:
            factor = scale_conv.weight[:, 0, 0, 0]
            gain, offset = _normed(scale_norm, factor * mean, factor.square() * variance, count)
            middle, bias = middle + gain * factor, bias + offset
        if skip_norm is not None:
            gain, offset = _normed(skip_norm, mean, variance, count)
            middle, bias = middle + gain, bias + offset
        rows, columns = (length // 2 for length in conv.kernel_size)
        weight = weight + F.pad(middle[:, None, None, None], (columns, columns, rows, rows))
    return convolved(weight, bias)
