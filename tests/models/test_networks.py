from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from ghostedge.errors import GhostEdgeError
from ghostedge.models import ARCHITECTURES, create, parse_name, profile, sizes
from ghostedge.models.layers import channels
from ghostedge.targets import COSTS

# Threads that wait for each other on busy cores take eight times as long.
torch.set_num_threads(1)

PUBLISHED = [
    # name, width, parameters in training form, deployed, MMACs at 32x32
    ("ghostnetv3-small", 0.5, 195_038, 160_850, 2.8),
    ("ghostnetv3-small", 1.0, 483_554, 374_174, 9.0),
    ("ghostnetv3-small", 1.3, 712_198, 536_712, 14.3),
    ("ghostnetv3-small", 1.6, 973_606, 719_316, 20.8),
    ("ghostnetv3-small", 1.9, 1_277_070, 927_000, 29.0),
    ("ghostnetv3-small", 2.2, 1_617_674, 1_159_656, 38.0),
    ("ghostnetv3-small", 2.8, 2_426_850, 1_701_424, 59.5),
    ("ghostnetv3-small", 3.4, 3_380_066, 2_331_712, 86.6),
    ("ghostnetv3", 1.0, 6_860_838, 4_857_526, 16.2),
    # Others' nets: published is the deployed form alone.
    ("resnet8", None, None, 77_706, 12.5),
    ("resnet14", None, None, 174_698, 26.7),
    ("resnet20", None, None, 271_690, 40.8),
    ("resnet32", None, None, 465_674, 69.1),
    ("shufflenetv2-x0.5", None, None, 348_066, 10.9),
]

IMAGENET = {
    # Parameters of the papers' and torchvision's nets, of which only strides differ here.
    "mobilenetv2": 3_504_872,
    "mobilenetv3-small": 2_542_856,
    "shufflenetv2-x0.5": 1_366_792,
    "shufflenetv2-x1.0": 2_278_604,
}


def build(name: str, width: float | None = 0.5, **arguments: Any) -> nn.Module:
    """Build a net, at a width where it has one."""
    if ARCHITECTURES[name].widths:
        arguments["width"] = width
    return create(name, **arguments)


@pytest.mark.parametrize(("name", "width", "training", "deployed", "mmacs"), PUBLISHED)
def test_counts_are_the_published_ones(
    name: str, width: float | None, training: int | None, deployed: int, mmacs: float
) -> None:
    counted = profile(build(name, width, num_classes=10), 32)
    assert training in (None, counted.training_parameters)
    assert counted.deployed_parameters == deployed
    assert round(counted.macs / 1e6, 1) == mmacs


@pytest.mark.parametrize(
    ("name", "family", "width"), [s for s in sizes() if "imagenet" not in s[1]]
)
def test_macs_are_those_of_the_table(name: str, family: str, width: float | None) -> None:
    rows = [row for row in json.loads(COSTS.read_text())["rows"] if row["network"] == name]
    macs = profile(build(family, width), 32).macs
    assert {row["macs"] for row in rows if row["size"] == 32} == {macs}


@pytest.mark.parametrize(("name", "parameters"), IMAGENET.items())
def test_peers_have_the_published_parameters(name: str, parameters: int) -> None:
    net = build(name, 1.0, num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("size", "mmacs"), [(96, 79), (224, 427)])
def test_macs_grow_with_the_image(size: int, mmacs: int) -> None:
    assert round(profile(create("ghostnetv3-small"), size).macs / 1e6) == mmacs


def test_macs_of_attention_are_counted() -> None:
    # 64 tokens of 256 values through eight layers of four projections, attention and a 4x MLP.
    layer = 64 * (4 * 256**2 + 2 * 64 * 256 + 2 * 256 * 1024)
    macs = profile(create("vit-small"), 32).macs
    assert macs == 8 * layer + 64 * 256 * 3 * 4**2 + 256 * 10


def test_single_branch_form_deploys_to_the_same_size() -> None:
    counted = profile(create("ghostnetv3-small", branches=1), 32)
    assert counted.deployed_parameters == 374_174
    assert counted.training_parameters < 483_554


def test_imagenet_form_differs_from_the_small_image_form_in_its_stem_only() -> None:
    small = create("ghostnetv3", num_classes=1000)
    imagenet = create("ghostnetv3-imagenet", num_classes=1000)
    imagenet.load_state_dict(small.state_dict())
    assert profile(small, 224).macs > 3.5 * profile(imagenet, 224).macs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("size", "classes"), [(24, 1), (25, 2), (47, 10), (255, 3), (256, 1000)])
def test_any_image_size_and_number_of_classes(architecture: str, size: int, classes: int) -> None:
    net = build(architecture, num_classes=classes).eval()
    with torch.inference_mode():
        assert net(torch.randn(1, 3, size, size)).shape == (1, classes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_image_scores_the_same_alone_and_in_a_batch(architecture: str) -> None:
    net = build(architecture).double().eval()
    images = torch.randn(3, 3, 33, 29, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(net(images[:1]), net(images)[:1], rtol=1e-9, atol=1e-12)


def test_a_batch_of_one_trains() -> None:
    net = create("ghostnetv3-small", num_classes=4, width=0.5)
    logits = net(torch.randn(1, 3, 24, 24))
    assert logits.shape == (1, 4)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("value", [0.1, 1, 5.9, 6, 8 * 1.3, 54.2, 112 * 0.35, 959.9])
def test_channels_are_a_multiple_of_four_and_never_below_ninety_percent(value: float) -> None:
    assert channels(value) % 4 == 0
    assert 0.9 * value <= channels(value) <= max(4, 1.1 * value + 4)


def test_names() -> None:
    assert parse_name("ghostnetv3-small-1.0x") == ("ghostnetv3-small", 1.0)
    assert parse_name("ghostnetv3-imagenet-0.5x") == ("ghostnetv3-imagenet", 0.5)
    assert parse_name("ghostnetv3") == ("ghostnetv3", 1.0)


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [
        ("ghostnetv3-smal", "ghostnetv3-small"),
        ("ghostnet-v3-small-1.0x", "ghostnetv3-small-1.0x"),
        ("GhostNetV3", "ghostnetv3"),
        ("", "ghostedge list"),
    ],
)
def test_a_wrong_name_suggests_the_near_ones(wrong: str, suggestion: str) -> None:
    for look_up in (parse_name, create):
        with pytest.raises(GhostEdgeError, match=suggestion):
            look_up(wrong)


@pytest.mark.parametrize("width", [0, 0.05, 9, float("nan")])
def test_a_width_out_of_range_is_refused(width: float) -> None:
    with pytest.raises(GhostEdgeError, match=r"outside 0\.1 to 8"):
        create("ghostnetv3-small", width=width)


@pytest.mark.parametrize("wrong", ["resnet20-0.5x", "shufflenetv2-x0.5-2x"])
def test_a_width_of_a_net_of_one_size_is_refused(wrong: str) -> None:
    with pytest.raises(GhostEdgeError, match="one width only"):
        parse_name(wrong)


@pytest.mark.parametrize("wrong", [{"heads": 7}, {"dim": -8}, {"num_classes": -1}])
def test_arguments_that_no_net_can_have_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(GhostEdgeError, match="vit-small cannot be built with"):
        create("vit-small", **wrong)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(GhostEdgeError, match="depth"):
        create("ghostnetv3-small", depth=3)
