"""The re-parameterizable convolution, and the fold that turns a training net into a deployed one.

RepVGG (arXiv 2101.03697) and MobileOne (2206.04040), as GhostNetV3 (2404.11202) uses them: while
training, a convolution is a sum of several conv+BN branches; all are linear, so that one convolution
with a bias computes the same.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ghostedge.models.statistics_first import Norm, depthwise, pointwise


class RepConv(nn.Module):
    """A sum of conv+BN branches that folds into one convolution.

    The `branches` equal branches are held as one convolution with `branches` times the channels
    and one BatchNorm, their channels interleaved (channel 0 of every branch, then channel 1, ...):
    exactly the same sum, computed in two large operations instead of many small ones.

    Args:
        cin, cout: channels in and out.
        kernel: odd kernel height and width; padding keeps the size at stride 1.
        branches: number of parallel conv+BN branches.
        scale: add a 1x1 conv+BN branch (meant for kernels larger than 1x1).
        skip: add a BatchNorm of the input itself; needs cin == cout and stride 1.
        post_norm: as QARepVGG (2212.01593), no BatchNorm on the scale and skip branches but one
            after the sum: folded weights then stay in a range that int8 holds.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        groups: int = 1,
        branches: int = 1,
        scale: bool = False,
        skip: bool = False,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.branches = branches
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(
            cin, cout * branches, kernel, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(cout * branches)
        self.scale_conv = (
            nn.Conv2d(cin, cout, 1, stride, groups=groups, bias=False) if scale else None
        )
        inner, outer = (nn.Identity, nn.BatchNorm2d) if post_norm else (nn.BatchNorm2d, nn.Identity)
        self.scale_bn: Norm | None = inner(cout) if scale else None
        self.skip_bn: Norm | None = inner(cout) if skip else None
        self.post_bn: Norm = outer(cout)

    def forward(self, x: Tensor) -> Tensor:
        if self._shortcut(x):
            form = x, self.conv, self.branches, self.bn
            if self.conv.groups == 1:
                y = pointwise(*form, self.skip_bn)
            else:
                y = depthwise(*form, self.scale_conv, self.scale_bn, self.skip_bn)
        else:
            y = self.bn(self.conv(x))
            if self.branches > 1:
                y = y.unflatten(1, (-1, self.branches)).sum(2)
            if self.scale_conv is not None and self.scale_bn is not None:
                y = y + self.scale_bn(self.scale_conv(x))
            if self.skip_bn is not None:
                y = y + self.skip_bn(x)
        return self.post_bn(y)

    def _shortcut(self, x: Tensor) -> bool:
        """Whether `statistics_first` computes the same faster: branches that train on a CPU.

        On a GPU torch.compile fuses the plain form; autocast would round the covariances.
        """
        conv = self.conv
        pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
        depthwise = conv.groups == conv.in_channels == conv.out_channels // self.branches
        return (
            self.branches > 1
            and self.bn.training
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and ((pointwise and self.scale_conv is None) or depthwise)
        )

    def folded(self) -> nn.Conv2d:
        """Return the one convolution with bias that computes the same in eval mode, in float64."""
        conv = self.conv
        cout = conv.out_channels // self.branches
        gain, offset = _affine(self.bn, conv.out_channels)
        weight = _scaled(conv.weight, gain).unflatten(0, (cout, self.branches)).sum(1)
        bias = offset.unflatten(0, (cout, self.branches)).sum(1)
        middle = (slice(None), slice(None), conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        if self.scale_conv is not None and self.scale_bn is not None:
            gain, offset = _affine(self.scale_bn, cout)
            weight[middle] += _scaled(self.scale_conv.weight, gain)[:, :, 0, 0]
            bias += offset
        if self.skip_bn is not None:
            gain, offset = _affine(self.skip_bn, cout)
            channel = torch.arange(cout)
            weight[middle][channel, channel % weight.shape[1]] += gain
            bias += offset
        gain, offset = _affine(self.post_bn, cout)
        weight, bias = _scaled(weight, gain), bias * gain + offset
        result = nn.Conv2d(
            conv.in_channels,
            cout,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            groups=conv.groups,
            device="meta",
        )
        result.weight, result.bias = nn.Parameter(weight), nn.Parameter(bias)
        return result


def _affine(bn: Norm, channels: int) -> tuple[Tensor, Tensor]:
    """Return gain and offset, float64, of a BatchNorm with its running statistics, or of none."""
    if isinstance(bn, nn.Identity):
        return torch.ones(channels).double(), torch.zeros(channels).double()
    assert bn.running_mean is not None and bn.running_var is not None
    gain = bn.weight.detach().double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return gain, bn.bias.detach().double() - bn.running_mean.double() * gain


def _scaled(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.detach().double() * gain[:, None, None, None]


def fold(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the deployed form of a training net: the same function, no branch, no BatchNorm.

    `net` is not changed. Every `RepConv` becomes one `nn.Conv2d`, computed in float64 and rounded
    once to `dtype`. The result is in eval mode.
    """
    deployed = copy.deepcopy(net)
    for name, module in list(deployed.named_modules()):
        if isinstance(module, RepConv):
            deployed.set_submodule(name, module.folded())
    return deployed.to(dtype).eval()
