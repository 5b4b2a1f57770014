from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ghostedge import checkpoint
from ghostedge.errors import GhostEdgeError
from ghostedge.models.foreign import CIFAR10, import_checkpoint
from tests.models import reference_forward as reference
from tests.runtime_fixtures import Malicious

torch.set_num_threads(1)

State = dict[str, Tensor]

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def state_of(
    table: reference.Table = reference.SMALL,
    width: float = 0.5,
    classes: int = 10,
    branches: int = 3,
    bn: str = "bn",
) -> State:
    return reference.random_state(reference.shapes(table, width, classes, branches, bn))


def saved(state: object, folder: Path, name: str = "net.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("table", "width", "parameters"),
    [
        (reference.SMALL, 0.5, 195_038),
        (reference.SMALL, 1.0, 483_554),
        (reference.SMALL, 3.4, 3_380_066),
        (reference.FULL, 1.0, 6_860_838),
    ],
)
def test_the_shapes_imported_here_are_the_published_ones(
    table: reference.Table, width: float, parameters: int
) -> None:
    shapes = reference.shapes(table, width, 10)
    counted = [k for k in shapes if not k.endswith(("mean", "var", "tracked"))]
    assert sum(torch.Size(shapes[k]).numel() for k in counted) == parameters


@pytest.mark.parametrize(
    ("table", "width", "classes", "bn", "architecture", "source", "stem_stride"),
    [
        (reference.SMALL, 0.5, 10, "bn", "ghostnetv3-small", "reference", 1),
        (reference.SMALL, 1.0, 10, "bn", "ghostnetv3-small", "reference", 1),
        (reference.SMALL, 1.3, 7, "bn", "ghostnetv3-small", "reference", 1),
        (reference.FULL, 1.0, 10, "bn", "ghostnetv3", "reference", 1),
        (reference.FULL, 1.0, 1000, "bn", "ghostnetv3-imagenet", "official", 2),
        (reference.FULL, 1.3, 1000, "bn1", "ghostnetv3-imagenet", "timm", 2),
        (reference.FULL, 0.5, 37, "bn1", "ghostnetv3-imagenet", "timm", 2),
    ],
)
def test_import(
    table: reference.Table,
    width: float,
    classes: int,
    bn: str,
    architecture: str,
    source: str,
    stem_stride: int,
    tmp_path: Path,
) -> None:
    state = state_of(table, width, classes, bn=bn)
    card, tensors = import_checkpoint(saved(state, tmp_path))

    assert card.architecture == architecture
    assert card.arguments == {"num_classes": classes, "width": width, "branches": 3}
    assert card.source.startswith(f"{source} ghostnetv3")
    assert card.licence is None
    assert card.pixels.size == (32 if source == "reference" else 224)
    mean, std = CIFAR if source == "reference" else IMAGENET
    assert card.pixels.mean == pytest.approx([255 * v for v in mean])
    assert card.pixels.std == pytest.approx([255 * v for v in std])
    numbered = [f"class {i}" for i in range(classes)]
    assert card.labels == (list(CIFAR10) if (source, classes) == ("reference", 10) else numbered)

    checkpoint.save(tmp_path / "ours.safetensors", card, tensors)
    stored, net = checkpoint.build(tmp_path / "ours.safetensors")
    assert stored == card
    assert_same_function(net, state, table, stem_stride, bn)


def assert_same_function(
    net: torch.nn.Module, state: State, table: reference.Table, stem_stride: int, bn: str = "bn"
) -> None:
    net = net.double()
    exact = {k: v.double() for k, v in state.items()}
    random = torch.Generator().manual_seed(1)  # rounding errors of some grow past 1e-9
    for height, width in ((32, 32), (45, 38)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64, generator=random)
        with torch.inference_mode():
            expected = reference.forward(exact, images, table, stem_stride, bn)
            error = (net(images) - expected).abs().max() / (expected.max() - expected.min())
        assert error <= 1e-9
        # Otherwise the nets would agree whatever the blocks before the head compute.
        assert (expected[0] - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize("branches", [2, 4])
def test_number_of_branches(branches: int, tmp_path: Path) -> None:
    state = state_of(branches=branches)
    card, tensors = import_checkpoint(saved(state, tmp_path))
    assert card.arguments["branches"] == branches
    net = checkpoint.network(card, tensors, "the import")
    assert_same_function(net, state, reference.SMALL, 1)


@pytest.mark.parametrize("width", [0.1, 0.35, 0.75, 1.7, 2.25])
def test_width_of_a_small_net(width: float, tmp_path: Path) -> None:
    card, _ = import_checkpoint(saved(state_of(width=width), tmp_path))
    assert card.arguments["width"] == width


def test_width_of_a_full_net_to_three_digits(tmp_path: Path) -> None:
    state = state_of(reference.FULL, 0.333)
    card, _ = import_checkpoint(saved(state, tmp_path))
    same = reference.shapes(reference.FULL, card.arguments["width"], 10)
    assert same == reference.shapes(reference.FULL, 0.333, 10)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "best": 0.9, "state_dict": state},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {
            "model_state_dict": {k: torch.nn.Parameter(v, False) for k, v in state.items()}
        },
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: (
            state | {"total_ops": torch.zeros(1), "blocks.0.0.total_params": torch.zeros(1)}
        ),
    ],
    ids=["wrapped", "parallel", "parameters", "uncounted", "profiled"],
)
def test_forms_that_hold_the_same_tensors(
    wrap: Callable[[State], dict[str, object]], tmp_path: Path
) -> None:
    state = state_of()
    _, plain = import_checkpoint(saved(state, tmp_path))
    _, tensors = import_checkpoint(saved(wrap(state), tmp_path, "other.pt"))
    assert tensors.keys() == plain.keys()
    assert all((tensors[k] == plain[k]).all() for k in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_of_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_of().items()}
    save_file(state, tmp_path / "net.safetensors")
    card, tensors = import_checkpoint(tmp_path / "net.safetensors")
    net = checkpoint.network(card, tensors, "the import")
    rounded = {k: v.float() for k, v in state.items()}
    assert_same_function(net, rounded, reference.SMALL, 1)


def test_what_is_given_wins(tmp_path: Path) -> None:
    file = saved(state_of(reference.FULL, classes=3), tmp_path)
    card, _ = import_checkpoint(
        file,
        source="official",
        mean=[0.5, 0.5, 0.4],
        std=(1, 1, 1),
        labels=["a", "b", "c"],
        size=96,
    )
    assert card.architecture == "ghostnetv3-imagenet"
    assert card.labels == ["a", "b", "c"]
    assert card.pixels.size == 96
    assert card.pixels.mean == (127.5, 127.5, 102)
    assert card.pixels.std == (255, 255, 255)
    card, _ = import_checkpoint(file, source="timm")
    assert card.pixels.mean == pytest.approx([123.675, 116.28, 103.53])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "refrence"}, "Did you mean reference"),
        ({"source": "timm"}, "only the reference code has"),
        ({"labels": ["a", "b"]}, "2 labels were given for a network of 10 classes"),
        ({"size": 20}, "outside 24 to 256"),
        ({"mean": (123, 116, 103)}, "between 0 and 1"),
        ({"mean": (0.5, 0.5)}, "not one or three numbers"),
        ({"std": (0.2, 0.2, 0)}, "between 0 and 1"),
        ({"std": (0.2, 0.2, float("nan"))}, "between 0 and 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match=message):
        import_checkpoint(saved(state_of(), tmp_path), **arguments)  # type: ignore[arg-type]


def refused(state: object, folder: Path) -> str:
    with pytest.raises(GhostEdgeError) as caught:
        import_checkpoint(saved(state, folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = state_of()
    for key in ("blocks.3.0.ghost2.cheap_rpr_conv.1.bn.running_var", "classifier.weight"):
        rest = {k: v for k, v in state.items() if k != key}
        assert f"{key} is missing" in refused(rest, tmp_path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    extra = {"blocks.3.0.attention.weight": torch.zeros(3)}
    assert "blocks.3.0.attention.weight is unknown" in refused(state_of() | extra, tmp_path)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    key = "blocks.1.0.dw_rpr_conv.2.conv.weight"
    message = refused(state_of() | {key: torch.zeros(16, 1, 5, 5)}, tmp_path)
    assert f"{key} is float32 (16, 1, 5, 5) and not float (16, 1, 3, 3)" in message


def test_a_single_score_is_refused(tmp_path: Path) -> None:
    state = {k: v[:1] if k.startswith("classifier.") else v for k, v in state_of().items()}
    assert "gives a single score" in refused(state, tmp_path)


def test_a_tensor_of_integers_is_named(tmp_path: Path) -> None:
    message = refused(state_of() | {"bn1.weight": torch.ones(8, dtype=torch.int8)}, tmp_path)
    assert "bn1.weight is int8 (8,)" in message


def test_the_rest_of_a_long_list_is_counted(tmp_path: Path) -> None:
    extra = {f"extra.{i}": torch.zeros(1) for i in range(14)}
    message = refused(state_of() | extra, tmp_path)
    assert message.count("is unknown") == 10
    assert "and 4 more" in message


def test_widths_that_belong_to_no_network_are_named(tmp_path: Path) -> None:
    state = state_of()
    other = state_of(width=1.0)
    mixed = state | {k: other[k] for k in state if k.startswith("blocks.4.")}
    message = refused(mixed, tmp_path)
    assert "does not fit ghostnetv3-small-0.5x" in message
    assert "blocks.4.0.ghost1.primary_rpr_conv.0.conv.weight" in message


def test_a_foreign_network_is_refused(tmp_path: Path) -> None:
    assert "not a GhostNetV3 state_dict" in refused({"fc.weight": torch.zeros(3, 3)}, tmp_path)
    assert "not a GhostNetV3 state_dict" in refused({}, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    state = state_of()
    state["blocks.2.0.ghost1.short_conv.2.weight"][3] = value
    message = refused(state, tmp_path)
    assert "blocks.2.0.ghost1.short_conv.2.weight" in message
    assert "NaN or infinity" in message


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_never_run(
    zipped: bool, tmp_path: Path
) -> None:
    victim = tmp_path / "created"
    state = {**state_of(), "extra": Malicious(victim)}
    file = tmp_path / "net.pth"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(GhostEdgeError, match=r"would run code \(posix.mkdir\)"):
        import_checkpoint(file)
    assert not victim.exists()
    torch.load(file, weights_only=False)
    assert victim.exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_bare_pickle_is_never_run(protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "created"
    for name in ("net.pth", "net.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(victim), protocol))
        with pytest.raises(GhostEdgeError):
            import_checkpoint(tmp_path / name)
    assert not victim.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    assert "save only the network's state_dict()" in refused(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("content", [b"", b"text" * 100, b"\x80\x02}q", b"PK\x03\x04" + bytes(99)])
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_of_something_else_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GhostEdgeError, match=r"is not a \.pth, \.pt or .safetensors file"):
        import_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, 3, {"state_dict": {"a": "b"}}])
def test_a_file_without_tensors_is_refused(content: object, tmp_path: Path) -> None:
    assert "holds more than tensors" in refused(content, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save(state_of(), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for part in (10, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:part])
        with pytest.raises(GhostEdgeError, match="only a part of one"):
            import_checkpoint(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(GhostEdgeError, match="There is no file"):
            import_checkpoint(path)
