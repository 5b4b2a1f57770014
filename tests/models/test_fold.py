from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ghostedge import checkpoint
from ghostedge.models import ARCHITECTURES, create, fold
from ghostedge.models.reparam import RepConv

# Threads that wait for each other on busy cores take eight times as long.
torch.set_num_threads(1)

NETS = [
    *(("ghostnetv3-small", width) for width in ARCHITECTURES["ghostnetv3-small"].widths),
    ("ghostnetv3", 1.0),
    ("ghostnetv3-imagenet", 0.5),
    *((name, None) for name, entry in ARCHITECTURES.items() if not entry.widths),
    *(
        (name, 0.5)
        for name, entry in ARCHITECTURES.items()
        if not name.startswith("ghost") and entry.widths
    ),
]


def randomize(net: nn.Module, seed: int) -> None:
    """Give every BatchNorm of a net random statistics, gains and offsets."""
    random = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.weight.uniform_(-1.5, 1.5, generator=random)
                module.bias.normal_(0, 0.5, generator=random)
            module.running_mean.normal_(0, 0.5, generator=random)
            module.running_var.uniform_(0.1, 3, generator=random)


@functools.cache
def training_net(name: str, width: float | None) -> nn.Module:
    torch.manual_seed(0)
    return create(name, **({} if width is None else {"width": width})).double().eval()


def error(net: nn.Module, deployed: nn.Module, images: Tensor) -> float:
    """Return the largest difference of the logits as a part of their range."""
    with torch.inference_mode():
        expected, found = net(images), deployed(images)
    return float((expected - found).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize(("name", "width"), NETS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(24, 40))
def test_fold_is_exact_and_leaves_no_branch(
    name: str, width: float | None, seed: int, size: int
) -> None:
    net = training_net(name, width)
    randomize(net, seed)
    before = copy.deepcopy(net.state_dict())

    deployed = fold(net, torch.float64)

    random = torch.Generator().manual_seed(seed)  # so that what Hypothesis prints fails again
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=random)
    assert error(net, deployed, images) <= 1e-9
    parts = list(deployed.modules())
    assert not [m for m in parts if isinstance(m, RepConv) or "Norm" in type(m).__name__]
    convs = {k for k, m in deployed.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {k.rpartition(".")[0] for k in deployed.state_dict()} == convs
    assert not deployed.training
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("branches", [1, 2, 5])
@pytest.mark.parametrize("size", [24, 97])
def test_fold_of_any_number_of_branches(branches: int, size: int) -> None:
    net = create("ghostnetv3-small", width=0.5, branches=branches).double().eval()
    randomize(net, branches)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert error(net, fold(net, torch.float64), images) <= 1e-9


def test_fold_of_a_net_in_train_mode_is_in_eval_mode() -> None:
    net = create("ghostnetv3-small", width=0.5)
    randomize(net, 0)
    deployed = fold(net)
    assert net.training
    assert not deployed.training
    assert {p.dtype for p in deployed.parameters()} == {torch.float32}


def test_fold_rounds_once_from_double_precision() -> None:
    net = create("ghostnetv3-small", width=0.5)
    randomize(net, 0)
    exact = fold(net, torch.float64).state_dict()
    single = fold(net).state_dict()
    assert all(torch.equal(single[k], exact[k].float()) for k in exact)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fold_of_every_kind_of_conv(data: st.DataObject) -> None:
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 5), (5, 1)]))
    groups = data.draw(st.sampled_from([1, 2, 6]))
    cout = data.draw(st.sampled_from([6, 12]))
    stride = data.draw(st.sampled_from([1, 2]))
    conv = RepConv(
        6,
        cout,
        kernel,
        stride,
        groups,
        branches=data.draw(st.integers(1, 4)),
        scale=data.draw(st.booleans()),
        post_norm=data.draw(st.booleans()),
        skip=cout == 6 and stride == 1 and data.draw(st.booleans()),
    )
    conv = conv.double().eval()
    randomize(conv, data.draw(st.integers(0, 2**31)))
    assert error(conv, conv.folded(), torch.randn(2, 6, 9, 8, dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("groups", [1, 6])
def test_interleaved_branches_train_like_separate_ones(groups: int) -> None:
    torch.manual_seed(0)
    count, cout = 3, 12
    conv = RepConv(6, cout, (3, 3), groups=groups, branches=count).double()
    separate = [
        nn.Sequential(
            nn.Conv2d(6, cout, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(cout)
        ).double()
        for _ in range(count)
    ]
    randomize(conv, 1)
    ours = {"0.weight": conv.conv.weight, "1.weight": conv.bn.weight, "1.bias": conv.bn.bias}
    statistics = {"1.running_mean": conv.bn.running_mean, "1.running_var": conv.bn.running_var}
    for index, branch in enumerate(separate):
        part = {k: v[index::count] for k, v in {**ours, **statistics}.items() if v is not None}
        branch.load_state_dict({**part, "1.num_batches_tracked": torch.tensor(0)})

    images = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    expected = torch.stack([branch(images) for branch in separate]).sum(0)
    found = conv(images)
    torch.testing.assert_close(found, expected)

    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for index, branch in enumerate(separate):
        for name, parameter in branch.named_parameters():
            gradient = ours[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[index::count], parameter.grad)
        for name, buffer in statistics.items():
            assert buffer is not None
            torch.testing.assert_close(buffer[index::count], branch.state_dict()[name])


def test_fold_of_one_norm_after_the_sum() -> None:
    net = create("ghostnetv3-small", width=0.5, post_norm=True).double().eval()
    randomize(net, 0)
    convs = [module for module in net.modules() if isinstance(module, RepConv)]
    assert any(conv.skip_bn is not None for conv in convs)
    branches = [norm for conv in convs for norm in (conv.skip_bn, conv.scale_bn) if norm]
    assert not any(isinstance(norm, nn.BatchNorm2d) for norm in branches)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert error(net, fold(net, torch.float64), images) <= 1e-9


KINDS = {
    "pointwise": {"skip": True},
    "depthwise": {"kernel": (3, 3), "groups": 6, "scale": True, "skip": True},
    "strided": {"kernel": (5, 5), "groups": 6, "scale": True, "stride": 2},
    "pointwise, norm after": {"skip": True, "post_norm": True},
    "depthwise, norm after": {
        "kernel": (3, 3),
        "groups": 6,
        "scale": True,
        "skip": True,
        "post_norm": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_first_trains_like_the_plain_form(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 6, 9, 8, dtype=torch.float64) + 1
    conv = RepConv(6, 6, branches=3, **KINDS[kind]).double()  # type: ignore[arg-type]
    randomize(conv, 1)
    plain = copy.deepcopy(conv)
    results = []
    for module, fast in ((conv, True), (plain, False)):
        if not fast:
            monkeypatch.setattr(RepConv, "_shortcut", lambda *_: False)
        inputs = images.clone().to(memory_format=torch.channels_last).requires_grad_()
        y = module(inputs)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients = [p.grad for p in module.parameters()]
        assert all(gradient is not None for gradient in gradients)
        results.append([y, inputs.grad, *gradients, *module.state_dict().values()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_statistics_first_in_single_precision() -> None:
    torch.manual_seed(0)
    net = create("ghostnetv3-small", width=0.5)
    images = torch.randn(16, 3, 24, 24)
    fast, exact = copy.deepcopy(net)(images), net.double()(images.double())
    assert (fast - exact).abs().max() <= 2e-5 * (exact.max() - exact.min())


def test_fold_of_the_shipped_weights_in_single_precision() -> None:
    shipped = checkpoint.shipped()
    if not shipped:
        pytest.skip("no weights are shipped yet")
    for name in shipped:
        card, tensors = checkpoint.read(name)
        net = checkpoint.network(card, tensors, name)
        size = card.pixels.size
        noise = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
        pixels = tensors.get(checkpoint.CALIBRATION, noise)
        images = torch.from_numpy(card.pixels.normalize(pixels).transpose(0, 3, 1, 2).copy())
        assert error(net, fold(net), images) <= 1e-5
