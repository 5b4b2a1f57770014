from __future__ import annotations

from pathlib import Path

import numpy as np

from ghostedge.convert.ranges import Histogram, observe, visit
from ghostedge.convert.rewrites.flat import OPS
from ghostedge.convert.to_int8_tflite import quantize
from ghostedge.runtime import Classifier
from tests.convert.flat_fixtures import Net


def images(count: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_every_computed_tensor_is_seen_on_every_image() -> None:
    net = Net(8, batch=2)
    centred = net.normalized()
    model = net.bytes(net.head(net.conv(centred, 4)))
    seen: dict[str, list[np.ndarray]] = {}
    given = images(5, 8)
    visit(model, given, lambda name, values: seen.setdefault(name, []).append(values.copy()))
    assert set(seen) == {net.name(t) for op in net.graph.operators for t in op.outputs} | {"image"}
    found = np.concatenate(seen[net.name(centred)])
    assert np.array_equal(found[:5], given.astype(np.float32) - 128)
    assert np.array_equal(found[5], found[0])  # the last batch is filled up


def hostile() -> tuple[Net, bytes, list[str]]:
    """Of a chain of convolutions, one tensor has channels a thousand times apart in scale."""
    net = Net(24)
    scale = np.logspace(-1.5, 1.5, 12)
    first = net.conv(net.normalized(), 8, 3, relu=True)
    spread = net.weighted(
        first,
        net.random.normal(0, 0.3, (12, 1, 1, 8)) * scale.reshape(12, 1, 1, 1),
        net.random.normal(0, 0.3, 12) * scale,
        relu=True,
    )
    reader = net.weighted(
        spread, net.random.normal(0, 0.4, (8, 1, 1, 12)) / scale, net.random.normal(0, 0.1, 8)
    )
    last = net.op(OPS.RELU, [net.conv(reader, 8)], [1, 24, 24, 8])
    model = net.bytes(net.head(last))
    return net, model, [net.name(spread), net.name(reader)]


def test_ops_in_float_repair_a_net(tmp_path: Path) -> None:
    _, model, culprits = hostile()
    given = images(40)
    ranges = observe(model, given)

    def error(*in_float: str) -> float:
        file = tmp_path / "model.tflite"
        file.write_bytes(model)
        expected = Classifier(file)(given)
        file.write_bytes(quantize(model, ranges, "uint8", in_float))
        return float(np.abs(Classifier(file)(given) - expected).mean())

    assert error(*culprits) < error() / 3


def test_a_range_leaves_out_the_outermost_values() -> None:
    """One value in a hundred thousand is left out, one in a thousand is not, and zero is always in."""
    values = np.linspace(1, 2, 100_000, dtype=np.float32)
    for outliers, highest in ((1, 2.0), (100, 50.0)):
        histogram = Histogram()
        values[:outliers] = 50
        histogram.widen(values)
        histogram.count(values[:60_000])
        histogram.count(values[60_000:])
        low, high = histogram.within(0.9999)
        assert low <= 1.05 and abs(high - highest) < 0.1
        assert histogram.low == 0
