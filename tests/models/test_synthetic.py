from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ghostedge.data.drawn import drawn_set
from ghostedge.errors import GhostEdgeError
from ghostedge.models import create, fold, synthetic
from ghostedge.models.synthetic import synthesize
from ghostedge.pixels import PixelContract

SIZE, CLASSES = 24, 3
PIXELS = PixelContract(SIZE, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """An untrained net whose BatchNorms have seen pictures."""
    torch.manual_seed(0)
    net = create("ghostnetv3-small", num_classes=CLASSES, width=0.1, branches=1)
    values = PIXELS.normalize(drawn_set(CLASSES, 10, size=SIZE).pixels).transpose(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(20):
            net(torch.from_numpy(values))
    return net.eval()


def distance(net: nn.Module, images: np.ndarray) -> float:
    """Mean squared difference of the BatchNorms' input means from theirs, in their deviations."""
    apart: list[float] = []

    def compare(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        off = inputs[0].mean((0, 2, 3)) - norm.running_mean
        apart.append(float((off.square() / (norm.running_var + norm.eps)).mean()))

    watched = copy.deepcopy(net)
    for module in watched.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(compare)
    with torch.inference_mode():
        watched(torch.from_numpy(PIXELS.normalize(images).transpose(0, 3, 1, 2).copy()))
    return float(np.mean(apart))


def test_images_have_the_activations_that_the_batchnorms_remember(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "STEPS", 15)
    images = synthesize(net, PIXELS)
    assert (images.dtype, images.shape[1:]) == (np.uint8, (SIZE, SIZE, 3))
    assert images.flags.c_contiguous
    assert len(np.unique(images, axis=0)) == len(images)
    assert images.max() - images.min() > 100
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    grey = np.full_like(images, 128)
    assert 3 * distance(net, images) < min(distance(net, noise), distance(net, grey))


@pytest.mark.parametrize(("size", "count"), [(24, 64), (32, 64), (33, 60), (64, 16), (120, 8)])
def test_larger_images_are_fewer(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, size: int, count: int
) -> None:
    monkeypatch.setattr(synthetic, "STEPS", 1)
    images = synthesize(net, PixelContract(size))
    assert (images.dtype, images.shape) == (np.uint8, (count, size, size, 3))


def test_the_seed_decides_every_byte(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "STEPS", 3)
    first = synthesize(net, PIXELS, seed=1)
    torch.manual_seed(99)
    torch.rand(5)
    assert first.tobytes() == synthesize(net, PIXELS, seed=1).tobytes()
    assert first.tobytes() != synthesize(net, PIXELS, seed=2).tobytes()


def test_the_caller_s_random_numbers_go_on(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "STEPS", 1)
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    synthesize(net, PIXELS)
    assert torch.equal(torch.rand(5), expected)


def snapshot(net: nn.Module) -> list[object]:
    return [
        [(name, tensor.numpy().tobytes()) for name, tensor in net.state_dict().items()],
        [(name, p.requires_grad, p.grad) for name, p in net.named_parameters()],
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()],
    ]


@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_left_as_it_was(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    monkeypatch.setattr(synthetic, "STEPS", 2)
    mine = copy.deepcopy(net).train(training)
    mine.get_parameter("classifier.bias").requires_grad_(False)
    before = snapshot(mine)
    synthesize(mine, PIXELS)
    assert snapshot(mine) == before


def test_a_network_without_batchnorm(net: nn.Module) -> None:
    with pytest.raises(GhostEdgeError, match=r"no BatchNorm .*--data DIR"):
        synthesize(fold(net), PIXELS)
