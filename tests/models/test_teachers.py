from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ghostedge import checkpoint
from ghostedge.checkpoint import Checkpoint
from ghostedge.convert import Bundle
from ghostedge.data.sources import open_data
from ghostedge.errors import GhostEdgeError
from ghostedge.models import TEACHERS, create, parse_name, teachers
from ghostedge.models.reparam import RepConv
from ghostedge.models.teachers import OnPixels, Teacher, _probable
from ghostedge.pixels import IMAGENET, PixelContract
from ghostedge.runtime import Classifier
from ghostedge.training import start
from tests.runtime_fixtures import LABELS, SIZE, Net, pictures, write_onnx

CPU = torch.device("cpu")

PARAMETERS = {
    # With 10 classes. The paper names 23.5 M for ResNet-50 and 20.1 M for EfficientNetV2.
    "airbench": 1_973_186,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "vgg13-bn": 28_334_410,
    "densenet161": 26_482_570,
    "inception-v3": 21_638_954,
    "efficientnetv2-s": 20_190_298,
    "vit-small": 6_333_706,
}


@functools.cache
def on_meta(name: str) -> nn.Module:
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        return create(name, num_classes=10).eval()


@pytest.mark.parametrize("name", TEACHERS)
def test_parameters(name: str) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("size", [24, 32, 47])
def test_small_images_fit(name: str, size: int) -> None:
    with torch.device("meta"):
        assert on_meta(name)(torch.zeros(2, 3, size, size)).shape == (2, 10)


def largest_maps(name: str) -> int:
    """Return the side of the largest feature map of a 32-pixel image."""
    sides = []
    handles = [
        module.register_forward_hook(lambda _m, _i, y: sides.append(y.shape[-1]))
        for module in on_meta(name).modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.device("meta"):
        on_meta(name)(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return sides[0]


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "vit-small"])
def test_stems_keep_the_resolution(name: str) -> None:
    assert largest_maps(name) == 32


def test_a_transformer_tells_places_apart_and_resizes_odd_images() -> None:
    torch.manual_seed(0)
    net = create("vit-small", num_classes=3).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        moved = images.roll(16, 3)  # by whole patches: without positions the same
        assert (net(images) - net(moved)).abs().max() > 1e-4
        assert net(torch.randn(1, 3, 30, 30)).shape == (1, 3)


def test_names() -> None:
    assert parse_name("airbench-1.0x") == ("airbench", 1.0)
    assert parse_name("resnet18") == ("resnet18", 1.0)
    with pytest.raises(GhostEdgeError, match="one width only"):
        parse_name("resnet18-2.0x")
    with pytest.raises(GhostEdgeError, match="Did you mean resnet50"):
        parse_name("resnet52")


def save(path: Path, net: nn.Module, architecture: str, **arguments: object) -> Path:
    labels = list("abcd")[: arguments["num_classes"]]  # type: ignore[misc]
    card = Checkpoint(architecture, arguments, labels, PixelContract.of_unit(SIZE, *IMAGENET))
    checkpoint.save(path, card, {k: v.numpy() for k, v in net.state_dict().items()})
    return path


def small_teacher(path: Path, seed: int = 0, classes: int = 4) -> tuple[Path, nn.Module]:
    torch.manual_seed(seed)
    arguments = {"num_classes": classes, "width": 0.1}
    net = create("airbench", **arguments).eval()
    return save(path, net, "airbench", **arguments), net


def views(count: int = 5, size: int = SIZE) -> torch.Tensor:
    return torch.from_numpy(pictures(count, size=size)).permute(0, 3, 1, 2)


def test_a_teacher_reads_views_by_its_own_pixel_contract(tmp_path: Path) -> None:
    file, net = small_teacher(tmp_path / "net.safetensors")
    values = PixelContract.of_unit(SIZE, *IMAGENET).normalize(pictures(5)).transpose(0, 3, 1, 2)
    expected = net(torch.from_numpy(values)).detach()
    teacher = Teacher(file, list("abcd"), CPU)
    torch.testing.assert_close(teacher(views()), expected, rtol=1e-4, atol=1e-5)
    # Classes go by name, and only those of the student are asked for.
    swapped = Teacher(file, ["c", "a"], CPU)(views())
    torch.testing.assert_close(swapped, expected[:, [2, 0]], rtol=1e-4, atol=1e-5)
    with pytest.raises(GhostEdgeError, match="the model does not know"):
        Teacher(file, ["a", "zebra"], CPU)


def test_our_networks_teach_folded() -> None:
    card, net = checkpoint.build("densestride-0.5x")
    size = card.pixels.size
    values = card.pixels.normalize(pictures(5, size=size)).transpose(0, 3, 1, 2)
    expected = net.eval()(torch.from_numpy(values)).detach()
    teacher = Teacher("densestride-0.5x", card.labels, CPU)
    torch.testing.assert_close(teacher(views(size=size)), expected, rtol=1e-4, atol=1e-4)
    assert teacher.net is not None
    assert not any(isinstance(module, RepConv) for module in teacher.net.modules())


def test_a_teacher_of_another_size_sees_the_same_view_resized(tmp_path: Path) -> None:
    teacher = Teacher(small_teacher(tmp_path / "net.safetensors")[0], list("abcd"), CPU)
    large = views(size=2 * SIZE)
    half = torch.nn.functional.interpolate(
        large.float(), (SIZE, SIZE), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(teacher(large), teacher(half.round().byte()))


@pytest.mark.parametrize("softmax", [True, False])
def test_an_onnx_teacher_is_the_torch_teacher(tmp_path: Path, softmax: bool) -> None:
    file = write_onnx(tmp_path / "net.onnx", softmax=softmax, labels=LABELS)
    with torch.inference_mode():
        logits = Net(softmax=False)(views().float())
    found = Teacher(file, LABELS, CPU)(views())
    # Probabilities lose what all logits have in common, which no softmax sees.
    torch.testing.assert_close(found.log_softmax(1), logits.log_softmax(1), rtol=1e-4, atol=1e-4)


def test_probabilities_in_whole_steps_are_told_from_logits() -> None:
    random = np.random.default_rng(0)
    raw = random.normal(size=(16, 100)) * 3
    exact = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    assert _probable(exact) and _probable(np.round(256 * exact) / 256)
    assert not _probable(raw) and not _probable(np.abs(raw)) and not _probable(exact[:, :50])


def test_an_int8_export_is_a_teacher(bundle: Bundle) -> None:
    source = open_data("drawn").test
    assert source is not None
    images = source.read(32).pixels
    file, labels = bundle.path / "model_int8.onnx", bundle.manifest["labels"]
    found = Teacher(file, labels[::-1], CPU)(torch.from_numpy(images).permute(0, 3, 1, 2))
    wanted = Classifier(file)(images)[:, ::-1]
    np.testing.assert_allclose(found.softmax(1), wanted, atol=1e-5)


def test_an_onnx_teacher_without_labels_has_the_students(tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "net.onnx")
    assert Teacher(file, list("wxyz"), CPU)(views()).shape == (5, 4)
    with pytest.raises(GhostEdgeError, match="does not know"):
        Teacher(file, list("wxy"), CPU)


def test_on_pixels_is_the_net_after_its_contract() -> None:
    pixels = PixelContract(SIZE, (10.0, 20.0, 30.0), (2.0, 3.0, 4.0))
    found = OnPixels(nn.Identity(), pixels)(views()).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, pixels.normalize(pictures(5)), rtol=1e-6)
    assert not OnPixels(nn.Identity(), pixels).state_dict()


@pytest.mark.parametrize(
    ("name", "anew"),
    [
        ("resnet18", {"conv1"}),
        ("vgg13-bn", {"classifier.0"}),
        ("densenet161", {"features.conv0"}),
        ("inception-v3", {"Conv2d_1a_3x3.conv", "Conv2d_1a_3x3.bn"}),
        ("efficientnetv2-s", set()),
    ],
)
def test_imagenet_weights_are_torchvisions_but_for_the_stem(
    name: str, anew: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision").models

    def fetched(weights: Any, **_: object) -> dict[str, torch.Tensor]:
        made = str(weights).partition("_Weights")[0].lower()
        fast = {"init_weights": False} if made == "inception_v3" else {}
        state = models.get_model(made, weights=None, **fast).state_dict()
        if made == "densenet161":  # its file is older than the net's names, and counts no batches
            inner = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d)")
            kept = {key: value for key, value in state.items() if "num_batches" not in key}
            state = {inner.sub(r"\1.\2", key): value for key, value in kept.items()}
        return state

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", fetched)
    net = create(name, num_classes=4)
    left = start.adopt(net, teachers.imagenet_weights(name), with_head=False)
    assert {key.rpartition(".")[0] for key in left} == anew


def test_imagenet_weights_that_are_not_there() -> None:
    pytest.importorskip("torchvision")
    for name in ("vit-small", "ghostnetv3-small"):
        with pytest.raises(GhostEdgeError, match="no ImageNet weights"):
            teachers.imagenet_weights(name)
