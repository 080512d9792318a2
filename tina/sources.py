"""Where images come from: finding a data set on disk, and listing its images undecoded.

A source names the files that identify its content, which the image cache is keyed on, and lists
its images when they are wanted. Nothing here decodes, resizes or partitions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from filelock import FileLock

from tina.errors import ConfigError, DataError, one_line
from tina.hub_parquet import parquet_source
from tina.jobconfig import DataConfig
from tina.listing import CLUTTER, Item, Listing, Source
from tina.names import normalise_name
from tina.storage import at_hand, named, user_cache

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def root_of(config: DataConfig) -> str:
    """The folder or URI of data sets that is given, if any."""
    return config.root or os.environ.get("TINA_DATA", "")


def find_source(config: DataConfig) -> Source:
    """Find a data set below `config.root`, else the variable TINA_DATA, else the user cache.

    Several are one where "+" joins their names: classes of one name are one class, too. All of
    them have test images, or none.
    cifar100 and caltech101 are downloaded by torchvision into the user cache, and only there.

    Raises:
        ConfigError: there is no data set of that name.
        DataError: it is not there; the message names each place and says how to get it.
    """
    if "+" in config.name:
        return _join(config)
    if config.name not in _FINDERS:
        raise ConfigError(f"unknown data set {config.name!r}; valid: {', '.join(_FINDERS)}")
    given = root_of(config)
    if config.name == "digits" or not given:
        return _FINDERS[config.name](config.name, user_cache() / "data", not given)
    # of the two kinds that may lie in the folder itself, the whole
    last = [""] if config.name in ("parquet", "folder") else []
    torchvisions = TORCHVISION_FOLDERS.get(config.name, config.name).partition("/")[0]
    with named(given):
        root = at_hand(given, config.name, torchvisions, *last)
        return _FINDERS[config.name](config.name, root, False)


def _join(config: DataConfig) -> Source:
    """Several data sets as one, their images in turn."""
    parts = config.name.split("+")
    if twice := [part for part in parts if parts.count(part) > 1]:
        # an image that is there twice could be both in fit and in report
        raise ConfigError(f"data.name {config.name!r} has {twice[0]} twice")
    sources = [find_source(replace(config, name=part)) for part in parts]

    def read() -> Listing:
        listings = [source.read() for source in sources]
        names: list[str] = []
        ids = [_ids(listing.class_names, names) for listing in listings]
        items = (
            replace(item, label=ours[item.label])
            for listing, ours in zip(listings, ids, strict=True)
            for item in listing.items
        )
        count = sum(listing.count for listing in listings)
        return Listing(class_names=names, count=count, items=items)

    return Source(
        kind="+".join(source.kind for source in sources),
        folder=Path(os.path.commonpath([source.folder.absolute() for source in sources])),
        files=[file.absolute() for source in sources for file in source.files],
        read=read,
    )


def _ids(class_names: Sequence[str], names: list[str]) -> list[int]:
    """Class ids of a data set among those of several; `names` grows by those that it lacks."""
    known = {normalise_name(name): i for i, name in enumerate(names)}
    found = []
    for name in class_names:
        # taken out: two of one name within a data set stay two, which decoding refuses
        if (own := known.pop(normalise_name(name), None)) is None:
            own = len(names)
            names.append(name)
        found.append(own)
    return found


# --- digits ---------------------------------------------------------------------------------------


def _find_digits(name: str, root: Path, may_download: bool) -> Source:
    # looked up, not imported: once the images are cached, scikit-learn takes longer than they do
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("digits ships inside scikit-learn, which is not installed")
    folder = Path(spec.origin).parent / "datasets" / "data"
    files = [folder / "digits.csv.gz"]
    return Source(kind="digits", folder=folder, files=files, read=_read_digits)


def _read_digits() -> Listing:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    items = (
        Item(content=image, label=int(label), test=False, where=f"digits row {row}")
        for row, (image, label) in enumerate(zip(images, bunch.target, strict=True))
    )
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return Listing(class_names=names, count=len(images), items=items)


# --- Hugging Face parquet -------------------------------------------------------------------------


def _find_parquet(name: str, root: Path, may_download: bool) -> Source:
    places = [root / name, *([root] if name == "parquet" else [])]
    for folder in places:
        if source := parquet_source(folder):
            return source
    raise DataError(
        f"data set {name!r} not found: no train-*.parquet in {' or '.join(map(str, places))}; "
        "put the parquet files of a Hugging Face image data set there (train-*, test-*), or set "
        "data.root or TINA_DATA to where they are"
    )


# --- folders of image files -----------------------------------------------------------------------


def _find_folder(name: str, root: Path, may_download: bool) -> Source:
    places = (root / name, root)
    for folder in places:
        train, test = image_files(folder / "train"), image_files(folder / "test")
        if train and test:
            if train.keys() != test.keys():
                odd = ", ".join(sorted(train.keys() ^ test.keys()))
                raise DataError(f"{folder}: train and test differ in their classes: {odd}")
            return _folder_source(folder, train, test)
        if both := image_files(folder):
            return _folder_source(folder, both, {})
    raise DataError(
        f"data set {name!r} not found: no class folders with images in "
        f"{' or '.join(map(str, places))}; set data.root or TINA_DATA to a folder with one "
        "sub-folder per class, or with such folders named train and test"
    )


def image_files(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, both sorted; empty where `folder` has no class folders."""
    found = {
        child.name: sorted(f for f in child.glob("[!.]*") if f.suffix.lower() in SUFFIXES)
        for child in sorted(folder.glob("[!.]*"))
        if child.is_dir() and child.name != CLUTTER
    }
    return {name: files for name, files in found.items() if files}


def _folder_source(
    folder: Path, train: Mapping[str, Sequence[Path]], test: Mapping[str, Sequence[Path]]
) -> Source:
    names = list(train)
    files = [
        (file, label, split is test)
        for split in (train, test)
        for label, name in enumerate(names)
        for file in split.get(name, ())
    ]

    def read() -> Listing:
        items = (
            Item(content=file, label=label, test=is_test, where=str(file))
            for file, label, is_test in files
        )
        return Listing(class_names=names, count=len(files), items=items)

    return Source(kind="folder", folder=folder, files=[file for file, _, _ in files], read=read)


# --- torchvision ----------------------------------------------------------------------------------

TORCHVISION_FOLDERS = {
    "cifar100": "cifar-100-python",
    "caltech101": "caltech101/101_ObjectCategories",
}


def _find_torchvision(name: str, root: Path, may_download: bool) -> Source:
    """Parquet files, else what torchvision keeps or can download."""
    if source := parquet_source(root / name):
        return source
    folder = root / TORCHVISION_FOLDERS[name]
    if not folder.is_dir():
        looked = f"no train-*.parquet in {root / name} and no folder {folder}"
        if not may_download:
            raise DataError(
                f"data set {name!r} not found: {looked}; put the hub's parquet files or "
                "torchvision's folder there, or unset data.root and TINA_DATA to download it"
            )
        _download(name, root, looked)
    if name == "caltech101":
        found = image_files(folder)
        train = {key: [f for i, f in enumerate(fs) if i % 5 != 4] for key, fs in found.items()}
        return _folder_source(folder, train, {key: fs[4::5] for key, fs in found.items()})
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    read = partial(_read_cifar100, root)
    return Source(kind="torchvision-cifar100", folder=folder, files=files, read=read)


def _download(name: str, root: Path, looked: str) -> None:
    """Whole or not at all, and once for all processes: what is cut off has fewer images."""
    from torchvision.datasets import CIFAR100, Caltech101

    folder = root / TORCHVISION_FOLDERS[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"), TemporaryDirectory(dir=root) as half:
            if not folder.is_dir():
                {"cifar100": CIFAR100, "caltech101": Caltech101}[name](half, download=True)
                folder.parent.mkdir(exist_ok=True)
                os.replace(Path(half) / TORCHVISION_FOLDERS[name], folder)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"data set {name!r} not found: {looked}, and the download failed: {one_line(error)}"
        ) from error


def _read_cifar100(root: Path) -> Listing:
    from torchvision.datasets import CIFAR100

    try:
        splits = [CIFAR100(root, train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        folder = root / TORCHVISION_FOLDERS["cifar100"]
        raise DataError(f"cifar100 in {folder} is unreadable: {one_line(error)}") from error
    items = (
        Item(content=image, label=label, test=not split.train, where=f"cifar100 row {row}")
        for split in splits
        for row, (image, label) in enumerate(zip(split.data, split.targets, strict=True))
    )
    count = sum(len(split.targets) for split in splits)
    return Listing(class_names=splits[0].classes, count=count, items=items)


_FINDERS: dict[str, Callable[[str, Path, bool], Source]] = {
    "digits": _find_digits,
    "cifar100": _find_torchvision,
    "caltech101": _find_torchvision,
    "mini_imagenet": _find_parquet,
    "parquet": _find_parquet,
    "folder": _find_folder,
}
