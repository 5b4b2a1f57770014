"""Labelled images by name: what `open_data` finds, how it is read, split and matched to labels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ghostedge.bundle import is_label
from ghostedge.data.images import SUFFIXES, UnreadableImage, fit, read_image
from ghostedge.errors import GhostEdgeError, nearest, needing, require
from ghostedge.files import printable

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "fashion-mnist": "FashionMNIST",
}
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""The folders of an image folder that are parts of it, not classes; upper or lower case."""

_LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir"))
_NOTES = frozenset(
    (".txt", ".json", ".xml", ".csv", ".tsv", ".md", ".yaml", ".yml", ".html", ".log")
)
"""Endings of what is put beside pictures; any other file is taken for one until it is opened."""
_CHUNK = 64


@dataclasses.dataclass
class Images:
    """Images in memory: what `Source.read` could read of what it was asked for.

    pixels: uint8 (N, size, size, 3) RGB; labels: int64 (N,) into the source's classes;
    indices: int64 (N,) into the source; skipped: (name, reason) of each image left out.
    """

    pixels: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclasses.dataclass(frozen=True)
class Source:
    """A list of labelled images that are read when asked for.

    name: for messages; classes: names, in NFC; names: "class/file" of each image, its stable
    identity; labels: int64 (N,) into `classes`. Subclasses say where the pixels are.
    """

    name: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def _image(self, index: int, size: int) -> np.ndarray:
        """Return one image, uint8 (size, size, 3); raises UnreadableImage."""
        raise NotImplementedError

    def _content(self, index: int) -> bytes:
        """Return what stands for the content of one image in the fingerprint."""
        raise NotImplementedError

    def _digest(self, index: int) -> bytes:
        """Return a hash by which one image is known among those whose `_content` is the same."""
        return hashlib.sha256(self._image(index, 32).tobytes()).digest()

    def copies(
        self, indices: np.ndarray, other: Source, others: np.ndarray
    ) -> list[tuple[int, int]]:
        """Return which images at `indices` are stored in `other`, too, at `others`: pairs of indices.

        The whole content is compared: equal bytes of files, equal pixels of arrays.
        """
        contents = {self._content(int(index)) for index in indices}
        maybe = {int(i): c for i in others if (c := other._content(int(i))) in contents}
        alike = set(maybe.values())
        found = {other._digest(index): index for index in reversed(maybe)}
        pairs = (
            (int(index), found.get(self._digest(int(index))))
            for index in indices
            if self._content(int(index)) in alike
        )
        return [(index, match) for index, match in pairs if match is not None]

    def read(self, size: int, indices: Sequence[int] | np.ndarray | None = None) -> Images:
        """Read the images at `indices` (all by default), `size` pixels square, in that order.

        What cannot be read is left out and listed. Raises GhostEdgeError when nothing could be
        read, or no image of a class although all of them were asked for, or when memory does not
        suffice.
        """
        wanted = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        try:
            pixels = np.empty((len(wanted), size, size, 3), np.uint8)
        except MemoryError:
            raise GhostEdgeError(
                f"{len(wanted)} images of {self.name} at {size} pixels need "
                f"{len(wanted) * size * size * 3 / 1e9:.1f} GB of memory, more than there is: "
                "choose a smaller --imgsz or fewer images."
            ) from None
        reasons: dict[int, str] = {}

        def load(start: int) -> None:
            for row in range(start, min(start + _CHUNK, len(wanted))):
                try:
                    pixels[row] = self._image(int(wanted[row]), size)
                except UnreadableImage as error:
                    reasons[row] = error.reason

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(load, range(0, len(wanted), _CHUNK)))

        kept = np.array([row for row in range(len(wanted)) if row not in reasons], np.int64)
        for new, old in enumerate(kept if reasons else ()):
            pixels[new] = pixels[old]  # in place: a copy by index would need the memory twice
        result = Images(
            pixels[: len(kept)],
            self.labels[wanted[kept]],
            wanted[kept],
            [(self.names[wanted[row]], reasons[row]) for row in sorted(reasons)],
        )
        self._check(wanted, result)
        return result

    def _check(self, wanted: np.ndarray, read: Images) -> None:
        if not read.skipped:
            return
        example = "{}: {}".format(*read.skipped[0])
        if not len(read):
            raise GhostEdgeError(
                f"None of {len(wanted)} images of {self.name} can be read ({example}). "
                "Replace the files."
            )
        asked = np.bincount(self.labels[np.unique(wanted)], minlength=len(self.classes))
        whole = asked == np.bincount(self.labels, minlength=len(self.classes))
        self.require(np.flatnonzero(whole & (asked > 0)), read)

    def require(self, labels: np.ndarray, read: Images) -> None:
        """Raise GhostEdgeError unless an image of each of these classes could be read."""
        for label in np.setdiff1d(labels, read.labels):
            cause = next(s for s in read.skipped if s[0].startswith(f"{self.classes[label]}/"))
            raise GhostEdgeError(
                f"No image of the class '{self.classes[label]}' in {self.name} can be read "
                "({}: {}), or none of the part that is asked for. Replace the files or remove the "
                "class.".format(*cause)
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the sorted names and each image's size (or bytes)."""
        digest = hashlib.sha256()
        for name, index in sorted((name, index) for index, name in enumerate(self.names)):
            digest.update(_encoded(name) + b"\0" + self._content(index) + b"\n")
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """Image files; `files` holds the path of each. The fingerprint is of names and file sizes."""

    files: tuple[str, ...]

    def _image(self, index: int, size: int) -> np.ndarray:
        return read_image(self.files[index], size)

    def _content(self, index: int) -> bytes:
        return str(os.path.getsize(self.files[index])).encode()

    def _digest(self, index: int) -> bytes:
        return hashlib.sha256(Path(self.files[index]).read_bytes()).digest()


@dataclasses.dataclass(frozen=True)
class ArraySource(Source):
    """Images in memory, `array` uint8 (N, H, W, 3). The fingerprint is of names and pixels."""

    array: np.ndarray

    def _image(self, index: int, size: int) -> np.ndarray:
        return fit(Image.fromarray(self.array[index]), size)

    def _content(self, index: int) -> bytes:
        return self.array[index].tobytes()


@dataclasses.dataclass(frozen=True)
class Data:
    """What a data argument names: its parts, None where there is none, over the same classes.

    skipped: (path below the folder, reason) of what was left out without opening it: broken links,
    pictures that lie outside the class folders.
    """

    name: str
    classes: tuple[str, ...]
    train: Source | None
    val: Source | None
    test: Source | None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """The fingerprint of each part, as checkpoints have them; None for one that is not there."""
        parts = {"": self.train, "val_": self.val, "test_": self.test}
        return {
            f"{name}fingerprint": None if part is None else part.fingerprint
            for name, part in parts.items()
        }


def named(spec: str) -> bool:
    """Return whether `spec` is a set by its name, which wins over a folder of that name."""
    return spec in TORCHVISION or spec.partition(":")[0] == "drawn"


def open_data(spec: str | os.PathLike[str], download: bool = False) -> Data:
    """List the images that `spec` names; none is read yet.

    A folder `spec/train/<class>/*` with optional `val/` and `test/`, or `spec/<class>/*` (all of
    it is then `train`), files in folders below a class included, hidden files left out; or one of
    `TORCHVISION` (below ./data or $GHOSTEDGE_DATA; fetched only when `download`); or `drawn`,
    `drawn:CLASSES` (figures drawn here, for tests).

    Classes are in plain string order of their names in NFC for folders, in torchvision's order
    for its sets. Raises GhostEdgeError for anything else.
    """
    spec = os.fspath(spec)
    if spec in TORCHVISION:
        return _torchvision(spec, download)
    kind, colon, classes = spec.partition(":")
    if kind == "drawn":
        from ghostedge.data.drawn import drawn_data  # it builds on this module

        return drawn_data(classes if colon else "4")
    path = Path(spec)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        raise GhostEdgeError(
            f"{path} is a file: name a folder of images, {path.parent}/<class>/*.jpg."
        )
    raise GhostEdgeError(
        f"There is no folder {path}: name a folder of images, {', '.join(TORCHVISION)} or drawn."
        f"{nearest(spec, [*TORCHVISION, 'drawn'])}"
    )


def require_classes(data: Data) -> None:
    """Raise GhostEdgeError unless `data` can train a classifier: a train part of two classes."""
    if data.train is None:
        raise GhostEdgeError(
            f"{data.name} has no images to train on: put them into train/<class>/."
        )
    if len(data.classes) < 2:
        raise GhostEdgeError(
            f"{data.name} holds one class only ('{data.classes[0]}') and training needs at least "
            "two: name the folder whose subfolders are the classes."
        )
    for name in data.classes:
        if not is_label(name):
            raise GhostEdgeError(
                f"{data.name} has a class named {name!r}, and an export's labels.txt holds one name a line: "
                "rename its folder."
            )


def split(source: Source, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `source` into indices to train on and to validate on, each int64 and sorted.

    `fraction` of every class, rounded, is for validation, but at least one image stays on both
    sides where a class has two. An image's side depends on the names in its class and the seed
    alone: within a class, images rank by the SHA-256 of "seed/name".
    """
    if not 0 < fraction < 1:
        raise GhostEdgeError(
            f"A validation fraction of {fraction:g} leaves a side empty: choose it between 0 and 1."
        )
    rank = [hashlib.sha256(_encoded(f"{seed}/{name}")).digest() for name in source.names]
    chosen = np.zeros(len(source), bool)
    for label in range(len(source.classes)):
        members = sorted(np.flatnonzero(source.labels == label), key=rank.__getitem__)
        count = math.floor(fraction * len(members) + 0.5)
        chosen[members[: min(max(count, 1), len(members) - 1)]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def recorded_split(source: Source | None, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return what `split` gave the training of a checkpoint, whose card has `data`.

    Raises GhostEdgeError for other images than it was trained on.
    """
    recorded = data.get("validation")
    if source is None or recorded is None or data.get("fingerprint") != source.fingerprint:
        raise GhostEdgeError(
            f"The checkpoint was not trained on a part of {source.name if source else 'these images'}: "
            "name the data that it was."
        )
    return split(source, recorded["fraction"], recorded["seed"])


def match_classes(source_classes: Sequence[str], model_labels: Sequence[str]) -> np.ndarray:
    """Return int64 (len(source_classes),): for each class, the model's label of the same name.

    Raises GhostEdgeError for a class that the model does not know or knows twice.
    """
    labels = [_nfc(label) for label in model_labels]
    for name in map(_nfc, source_classes):
        if labels.count(name) != 1:
            known = "knows twice" if name in labels else "does not know"
            raise GhostEdgeError(
                f"The data has a class '{name}' that the model {known}: rename its folder, or "
                f"remove it.{nearest(name, set(labels) - {name})}"
            )
    return np.array([labels.index(_nfc(name)) for name in source_classes], np.int64)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # a file's name may be no valid UTF-8


def _folder(root: Path) -> Data:
    name = printable(root.resolve().name)
    skipped: list[tuple[str, str]] = []
    parts = {part: folder for part in SPLITS if (folder := _part(root, part))}
    if "train" not in parts and not all(map(_folders, parts.values())):
        parts = {}  # no part but a class that is called "test"
    roots = parts or {"train": root}
    listed = {part: _classes(folder, skipped) for part, folder in roots.items()}
    classes = sorted(listed["train"] if "train" in listed else set().union(*listed.values()))
    for part, found in listed.items():
        for extra in sorted(set(found) - set(classes)):
            raise GhostEdgeError(
                f"{parts[part] / extra} is a class that {parts['train']} does not have: rename "
                f"the folder, or remove it.{nearest(extra, classes)}"
            )

    def source(part: str) -> Source | None:
        if part not in listed:
            return None
        names: list[str] = []
        labels: list[int] = []
        files: list[str] = []
        for label, folder in enumerate(classes):
            for file, path in sorted(listed[part].get(folder, ())):
                names.append(f"{folder}/{file}")
                labels.append(label)
                files.append(path)
        return FolderSource(
            f"{name}/{part}" if parts else name,
            tuple(classes),
            tuple(names),
            np.array(labels, np.int64),
            tuple(files),
        )

    left_out = tuple((os.path.relpath(path, root), reason) for path, reason in skipped)
    return Data(name, tuple(classes), source("train"), source("val"), source("test"), left_out)


def _part(root: Path, part: str) -> Path | None:
    found = [folder for folder in _folders(root) if folder.name.casefold() in SPLITS[part]]
    if len(found) > 1:
        raise GhostEdgeError(
            f"{root} has both {found[0].name}/ and {found[1].name}/ for one part: keep one of them."
        )
    return found[0] if found else None


def _folders(root: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(root) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; raises GhostEdgeError for a link to nowhere, perhaps a class."""
    with contextlib.suppress(OSError):  # a link to itself
        if entry.is_dir():
            return True
    if entry.is_symlink() and not Path(entry.name).suffix and not os.path.exists(entry.path):
        raise GhostEdgeError(
            f"{entry.path} is a link that leads nowhere, perhaps to a class: mend or remove it."
        )
    return False


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """List a folder by name, without hidden files and what systems leave behind."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e for e in entries if e.name[0] != "." and e.name.casefold() not in _LITTER),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        raise GhostEdgeError(
            f"Cannot list {folder}: {error.strerror}. Make it readable or remove it."
        ) from error


def _classes(root: Path, skipped: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Return for each class its files as (path below the class in NFC, path)."""
    found: dict[str, list[tuple[str, str]]] = {}
    stray = []
    for entry in _entries(root):
        if _is_folder(entry):
            try:
                entry.name.encode()
            except UnicodeEncodeError as error:
                raise GhostEdgeError(
                    f"{root} has a class folder {entry.name!r}, a name that is no UTF-8: rename it."
                ) from error
            found.setdefault(_nfc(entry.name), []).extend(_files(entry.path, skipped))
        elif Path(entry.name).suffix.casefold() in SUFFIXES:
            stray.append((entry.path, "not in a class folder"))
    if not found:
        raise GhostEdgeError(
            f"{root} {'has images but no class folders' if stray else 'holds no images'}: "
            f"put the images of each class into a folder named after it, {root / '<class>'}/ (and a class "
            f"of the name of a part, {', '.join(SPLITS)}, into a part: train/train/)."
        )
    for name, files in found.items():
        if not files:
            raise GhostEdgeError(
                f"The class folder {root / name} holds no images: fill it or remove it."
            )
    skipped.extend(stray)
    return found


def _files(
    folder: str, skipped: list[tuple[str, str]], below: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    above = (*above, os.path.realpath(folder))
    for entry in _entries(folder):
        name = f"{below}{_nfc(entry.name)}"
        try:
            is_file, is_folder = entry.is_file(), entry.is_dir()
        except OSError:  # a link to itself
            is_file = is_folder = False
        if is_file:
            if Path(name).suffix.casefold() not in _NOTES:
                yield name, entry.path
        elif is_folder and os.path.realpath(entry.path) not in above:
            yield from _files(entry.path, skipped, f"{name}/", above)
        else:
            skipped.append((entry.path, "a link that leads nowhere, or no ordinary file"))


def _torchvision(spec: str, download: bool) -> Data:
    with needing("train"):
        from torchvision import datasets
    root = Path(os.environ.get("GHOSTEDGE_DATA", "data"))
    kind = getattr(datasets, TORCHVISION[spec])
    # SVHN names its parts; it says "digit" by a number, and has no list of classes.
    parts = [{"split": p} if spec == "svhn" else {"train": p == "train"} for p in ("train", "test")]
    try:
        # With CIFAR the test images come in the same archive as the training images.
        train, test = (kind(root, **part, download=download) for part in parts)
    # A file that is there and damaged may fail an assertion or a conversion.
    except (AssertionError, RuntimeError, ValueError) as error:
        raise GhostEdgeError(
            f"{spec} is not in {root / getattr(kind, 'base_folder', '')}, or damaged: add --download "
            "to fetch it, after deleting what is damaged, or set GHOSTEDGE_DATA to the folder it is in."
        ) from error
    except OSError as error:
        raise GhostEdgeError(
            f"Cannot fetch {spec} into {root}: {error}. Try again, or unpack "
            f"{getattr(kind, 'filename', 'its files')} there."
        ) from error
    except ImportError as error:
        raise require("SciPy", "train") from error
    classes = tuple(getattr(train, "classes", map(str, range(10))))
    return Data(
        spec,
        classes,
        _array_source(f"{spec}/train", classes, train),
        None,
        _array_source(f"{spec}/test", classes, test),
    )


def _array_source(name: str, classes: tuple[str, ...], found: Any) -> ArraySource:
    pixels = np.asarray(found.data)
    labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
    if pixels.ndim == 3:  # grey
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    elif pixels.shape[1] == 3:  # SVHN's channels come first
        pixels = pixels.transpose(0, 2, 3, 1)
    names = tuple(f"{classes[label]}/{i:05d}" for i, label in enumerate(labels))
    return ArraySource(name, classes, names, labels.astype(np.int64), np.ascontiguousarray(pixels))
