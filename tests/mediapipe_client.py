"""What MediaPipe makes of our files: `python mediapipe_client.py IMAGES.npy MODEL...` prints JSON.

Runs in an environment of its own, with mediapipe and without ghostedge. For each model: the labels by
index, each image's scores in that order, and what mediapipe's own schema reads of the metadata; or
the error with which it refuses the model.
"""

import json
import sys

import mediapipe
import numpy as np
from mediapipe.tasks.metadata import metadata_schema_py_generated as metadata
from mediapipe.tasks.metadata import schema_py_generated as schema
from mediapipe.tasks.python import BaseOptions, vision


def classify(path, images):
    options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=path))
    labels, scores = {}, []
    with vision.ImageClassifier.create_from_options(options) as classifier:
        for pixels in images:
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)
            categories = classifier.classify(image).classifications[0].categories
            labels |= {c.index: c.category_name for c in categories}
            scores.append([c.score for c in sorted(categories, key=lambda c: c.index)])
    return {"labels": [labels[index] for index in sorted(labels)], "scores": scores}


def plain(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {k: plain(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else value


def described(path):
    with open(path, "rb") as file:
        model = schema.ModelT.InitFromPackedBuf(file.read())
    (entry,) = (e for e in model.metadata if e.name == b"TFLITE_METADATA")
    return plain(metadata.ModelMetadataT.InitFromPackedBuf(bytes(model.buffers[entry.buffer].data)))


images = np.load(sys.argv[1])
results = {}
for path in sys.argv[2:]:
    try:
        results[path] = {**classify(path, images), "metadata": described(path)}
    except (RuntimeError, ValueError) as error:
        results[path] = {"error": str(error)}
print(json.dumps(results))
