"""How often a model is right: top-1 with its interval, by class, and the confusion matrix."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ghostedge.data.sources import Images, match_classes
from ghostedge.errors import GhostEdgeError, needing
from ghostedge.files import atomic_file
from ghostedge.runtime import Classifier

Z = 1.959964
"""Half width of a 95% interval in standard deviations."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Accuracies are shares, 0 to 1.

    labels: of the model. truth, predicted: int64 (N,) into them. skipped: (name, reason) of each
    image that could not be read.
    """

    labels: list[str]
    truth: np.ndarray
    predicted: np.ndarray
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def correct(self) -> np.ndarray:
        """Whether each image's best label is right, bool (N,)."""
        return self.truth == self.predicted

    @property
    def top1(self) -> float:
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of top-1 (Wilson's score interval)."""
        n, p = len(self), self.top1
        middle, scale = p + Z**2 / (2 * n), 1 + Z**2 / n
        half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        # Rounding must not leave p outside, as at p = 1.
        return min(p, max(0.0, (middle - half) / scale)), max(p, min(1.0, (middle + half) / scale))

    @property
    def confusion(self) -> np.ndarray:
        """Image counts, int64 (classes, classes): row = true label, column = best label."""
        n = len(self.labels)
        return np.bincount(self.truth * n + self.predicted, minlength=n * n).reshape(n, n)

    @property
    def per_class(self) -> dict[str, float]:
        """Top-1 of each label that has images."""
        rows = zip(self.labels, self.confusion.diagonal(), self.confusion.sum(1), strict=True)
        return {label: float(right / count) for label, right, count in rows if count}


def evaluate(
    model: str | os.PathLike[str] | Classifier, images: Images, classes: Sequence[str]
) -> Evaluation:
    """Classify labelled images; their labels index `classes`, matched to the model's by name.

    The images must have the model's size. Raises GhostEdgeError for a class that the model does
    not know, and for no images.
    """
    classifier = model if isinstance(model, Classifier) else Classifier(model)
    if not len(images):
        raise GhostEdgeError("There are no images to evaluate on: name a folder that holds some.")
    truth = match_classes(classes, classifier.labels)[images.labels]
    predicted = classifier(images.pixels).argmax(1)
    return Evaluation(classifier.labels, truth, predicted, images.skipped)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows of (N, classes) whose largest value is at the label."""
    return float((probabilities.argmax(1) == labels).mean())


def paired(a_correct: np.ndarray, b_correct: np.ndarray) -> tuple[float, float]:
    """Compare two models on the same images: return (difference, half width of its 95% interval).

    The difference is a's top-1 minus b's in points (percent): what b loses. The inputs are bool
    (N,), image by image. The half width is Wald's for matched pairs with half an image added to
    each of the four outcomes (Agresti & Min 2005), so that it is not zero where the two agree.
    """
    if a_correct.shape != b_correct.shape or not len(a_correct):
        raise GhostEdgeError(
            f"A paired comparison needs the same images twice, not {len(a_correct)} and "
            f"{len(b_correct)}."
        )
    n = len(a_correct)
    only_a = float((a_correct & ~b_correct).sum())
    only_b = float((b_correct & ~a_correct).sum())
    variance = only_a + only_b + 1 - (only_a - only_b) ** 2 / (n + 2)
    return 100 * (only_a - only_b) / n, 100 * Z * math.sqrt(variance) / (n + 2)


def save_confusion(evaluation: Evaluation, path: Path) -> None:
    """Draw the confusion matrix as a PNG: shares of each true class, counts where they fit.

    Raises GhostEdgeError where matplotlib is missing or the file cannot be written.
    """
    with needing("export"):
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure

    counts, labels = evaluation.confusion, evaluation.labels
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = len(labels) > 30
    side = min(40.0, len(labels) * (0.16 if many else 0.55) + 2)
    figure = Figure((max(6, side + 1), max(5, side)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    # The square root of the shares: confusions of a few percent would be white beside the diagonal.
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    # A "$" would start a formula.
    names = [label.replace("$", r"\$") for label in labels]
    font = min(9, 36 * side / len(labels))
    axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=font)
    axes.set_yticks(range(len(labels)), names, fontsize=font)
    if not many:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.3 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    low, high = evaluation.interval
    axes.set_title(
        f"top-1 {evaluation.top1:.2%} of {len(evaluation)} images (95%: {low:.2%} to {high:.2%})",
        fontsize=10,
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class")
    with atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
