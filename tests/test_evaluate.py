from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostedge.data.sources import Images
from ghostedge.errors import GhostEdgeError
from ghostedge.evaluate import Evaluation, accuracy, evaluate, paired, save_confusion
from ghostedge.runtime import Classifier
from tests.runtime_fixtures import LABELS, expected, pictures, write_onnx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("evaluate") / "model.onnx", labels=LABELS)


def images_of(truth: np.ndarray, count: int = 40) -> Images:
    return Images(pictures(count), truth, np.arange(count), [("cat/x.png", "the file is empty")])


def test_classes_are_matched_by_name(model: Path) -> None:
    best = expected(pictures(40)).argmax(1)
    classes = ["dog", "bee", "ant", "cat"]
    truth = np.array([classes.index(LABELS[label]) for label in best])
    right = evaluate(model, images_of(truth), classes)
    assert right.top1 == 1
    assert right.per_class == {LABELS[label]: 1.0 for label in sorted(set(best.tolist()))}
    assert len(right) == 40
    assert right.skipped == [("cat/x.png", "the file is empty")]

    truth[:10] = (truth[:10] + 1) % 4
    result = evaluate(Classifier(model), images_of(truth), classes)
    assert result.top1 == 0.75
    assert result.correct.sum() == 30
    assert result.confusion.sum() == 40
    assert np.trace(result.confusion) == 30
    for name, share in result.per_class.items():
        of_class = np.array(classes)[truth] == name
        assert share == (of_class & result.correct).sum() / of_class.sum()
        np.testing.assert_array_equal(result.confusion[LABELS.index(name)].sum(), of_class.sum())


def test_a_subset_of_the_classes_will_do(model: Path) -> None:
    result = evaluate(model, images_of(np.zeros(40, np.int64)), ["cat"])
    assert set(result.per_class) == {"cat"}
    assert result.confusion.shape == (4, 4)


def test_what_cannot_be_evaluated(model: Path) -> None:
    with pytest.raises(GhostEdgeError, match=r"'catt' that the model does not know.*cat"):
        evaluate(model, images_of(np.zeros(40, np.int64)), ["catt"])
    with pytest.raises(GhostEdgeError, match="no images"):
        evaluate(model, images_of(np.zeros(0, np.int64), 0), ["cat"])


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (81, 263), (4900, 5000)])
def test_interval(right: int, count: int) -> None:
    truth = np.zeros(count, np.int64)
    predicted = (np.arange(count) >= right).astype(np.int64)
    low, high = Evaluation(["a", "b"], truth, predicted, []).interval
    share = right / count
    assert 0 <= low <= share <= high <= 1
    # The definition: the shares for which what was seen lies 1.96 of their deviations away.
    for bound in {low, high} - {share}:
        assert abs(share - bound) == pytest.approx(
            1.96 * (bound * (1 - bound) / count) ** 0.5, 1e-4
        )


def test_accuracy() -> None:
    assert accuracy(np.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]), np.array([1, 0, 1])) == 2 / 3


def test_paired_interval_covers_the_truth() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        a = random.random(500) < 0.85
        b = np.where(random.random(500) < 0.03, random.random(500) < 0.5, a)
        difference, half = paired(a, b)
        assert difference == pytest.approx(100 * (a.mean() - b.mean()))
        covered += abs(difference - 100 * 0.03 * (0.85 - 0.5)) <= half
    assert 0.92 <= covered / 400 <= 1
    assert 0 < paired(a, a)[1] < 1
    with pytest.raises(GhostEdgeError, match="the same images twice, not 500 and 499"):
        paired(a, b[:-1])


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_picture(tmp_path: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, classes, 2000)
    predicted = np.where(random.random(2000) < 0.7, truth, random.integers(0, classes, 2000))
    labels = [f"class_{i} $x" for i in range(classes)]
    path = tmp_path / "picture"
    save_confusion(Evaluation(labels, truth, predicted, []), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 400 < min(picture.size) <= max(picture.size) < 3000


def test_confusion_picture_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Evaluation(["a", "b"], np.array([0, 1]), np.array([0, 0]), [])
    (tmp_path / "file").touch()
    with pytest.raises(GhostEdgeError, match="Cannot write"):
        save_confusion(result, tmp_path / "file" / "picture.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GhostEdgeError, match="matplotlib"):
        save_confusion(result, tmp_path / "picture.png")
