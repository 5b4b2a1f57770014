"""The peers compute what torchvision's nets compute, once those stride where ours do."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf
from torchvision.models.resnet import BasicBlock

from ghostedge.models import create


def mobilenetv2(width: float) -> nn.Module:
    net = torchvision.models.mobilenet_v2(width_mult=width, num_classes=10)
    net.features[0][0].stride = net.features[2].conv[1][0].stride = (1, 1)
    return net


def mobilenetv3(width: float) -> nn.Module:
    conf, last = _mobilenet_v3_conf("mobilenet_v3_small", width_mult=width)
    net = MobileNetV3(conf, last, num_classes=10)
    net.features[0][0].stride = net.features[1].block[0][0].stride = (1, 1)
    net.features[1].use_res_connect = True  # it does not stride any more
    return net


def shufflenetv2(size: str) -> nn.Module:
    net = torchvision.models.get_model(f"shufflenet_v2_{size}", num_classes=10)
    net.conv1[0].stride, net.maxpool = (1, 1), nn.Identity()
    return net


def resnet(blocks: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    cin = 16
    for cout in (16, 32, 64):
        for _ in range(blocks):
            shortcut = None
            if cin != cout:
                conv = nn.Conv2d(cin, cout, 1, 2, bias=False)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(cout))
            layers.append(BasicBlock(cin, cout, 1 if shortcut is None else 2, shortcut))
            cin = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def layers(net: nn.Module, image: Tensor) -> list[nn.Module]:
    """Return what has weights, in the order in which it computes."""
    found: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: found.append(module))
        for module in net.modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    ]
    net(image)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("name", "width", "theirs"),
    [
        ("mobilenetv2", 1.0, mobilenetv2(1.0)),
        ("mobilenetv2", 0.5, mobilenetv2(0.5)),
        ("mobilenetv3-small", 1.0, mobilenetv3(1.0)),
        ("mobilenetv3-small", 0.5, mobilenetv3(0.5)),
        ("shufflenetv2-x0.5", None, shufflenetv2("x0_5")),
        ("shufflenetv2-x1.0", None, shufflenetv2("x1_0")),
        ("resnet8", None, resnet(1)),
        ("resnet20", None, resnet(3)),
    ],
)
@torch.no_grad()
def test_a_peer_is_torchvisions(name: str, width: float | None, theirs: nn.Module) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32).double()
    ours = create(name) if width is None else create(name, width=width)
    nets = [net.double().eval() for net in (ours, theirs)]
    for mine, other in zip(*(layers(net, image) for net in nets), strict=True):
        for tensor in other.parameters():
            tensor.uniform_(0.1, 1) if tensor.ndim == 1 else tensor.normal_(0, 0.3)
        if isinstance(other, nn.BatchNorm2d):
            other.running_mean.normal_(0, 0.1)
            other.running_var.uniform_(0.5, 2)
            mine.eps = other.eps
        mine.load_state_dict(other.state_dict())
    scores, expected = (net(image) for net in nets)
    assert scores.std() > 0
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
