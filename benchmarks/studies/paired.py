"""What one model gains on another, image by image, with its 95% interval (over images, not seeds).

    python benchmarks/studies/paired.py MODEL BASE DATA

Both are what `ghostedge eval` takes; the test images of DATA are read.
"""

from __future__ import annotations

import sys

from ghostedge.data.sources import open_data
from ghostedge.evaluate import evaluate, paired
from ghostedge.runtime import Classifier


def main(model: str, base: str, data: str) -> None:
    sets = open_data(data)
    if sets.test is None:
        sys.exit(f"{data} has no test images.")
    correct = []
    for name in (model, base):
        classifier = Classifier(name)
        images = sets.test.read(classifier.size)
        correct.append(evaluate(classifier, images, sets.classes).correct)
    gain, half = paired(*correct)
    print(f"{model}: {gain:+.2f} ± {half:.2f} on {base}, {len(correct[0]):,} test images")


if __name__ == "__main__":
    main(*sys.argv[1:])
