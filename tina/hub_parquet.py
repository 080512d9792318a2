"""Image data sets as the Hugging Face hub keeps them, in Parquet files with its own metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tina.errors import DataError, one_line
from tina.listing import CLUTTER, Item, Listing, Source

ROWS_AT_ONCE = 512


def parquet_source(folder: Path) -> Source | None:
    """The hub keeps shards at the top of a repository or in its folder data."""
    for place in (folder, folder / "data"):
        if train := sorted(place.glob("train-*.parquet")):
            test = sorted(place.glob("test-*.parquet"))
            test = test or sorted(place.glob("validation-*.parquet"))
            read = partial(_read_parquet, train, test)
            return Source(kind="parquet", folder=place, files=train + test, read=read)
    return None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file, closed behind: there may be more than a process can hold open."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the system's own, which says nothing of its content
            raise
        raise DataError(f"corrupt parquet file {path}: {one_line(error)}") from error


def _read_parquet(train: Sequence[Path], test: Sequence[Path]) -> Listing:
    count, columns = 0, []
    for path in (*train, *test):
        with _opened(path) as file:
            columns.append(_columns(path, file.schema_arrow))
            count += file.metadata.num_rows
        if columns[-1] != columns[0]:
            raise DataError(f"{path} has other columns or class names than {train[0]}")
    names = columns[0].class_names
    kept = [class_id for class_id, name in enumerate(names) if name != CLUTTER]
    new_id = {class_id: position for position, class_id in enumerate(kept)}

    def items() -> Iterator[Item]:
        for path in (*train, *test):
            for row, (content, label) in enumerate(_rows(path, columns[0])):
                where = f"{path} row {row}"
                if not content:
                    raise DataError(f"no image bytes in {where}")
                if label is None or not 0 <= label < len(names):
                    raise DataError(f"label {label} is none of {len(names)} classes in {where}")
                if label in new_id:
                    yield Item(content=content, label=new_id[label], test=path in test, where=where)

    return Listing(class_names=[names[old] for old in kept], count=count, items=items())


@dataclass(frozen=True, kw_only=True)
class _Columns:
    image: str
    label: str
    class_names: list[str]


def _columns(path: Path, schema: Any) -> _Columns:
    """Image column, label column and class names of a Hugging Face parquet schema."""
    from pyarrow import types

    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict(metadata.get("info", {}).get("features", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has metadata that are not the hub's: {one_line(error)}") from error
    kinds = {key: value.get("_type") for key, value in features.items() if isinstance(value, dict)}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    # fine_label: what the hub's CIFAR-100 has beside a coarse one.
    usual = [key for key in ("label", "fine_label") if key in labels][:1] or labels
    if len(images) != 1 or len(usual) != 1 or not {*images, *usual} <= set(schema.names):
        raise DataError(f"{path} needs one Image and one ClassLabel feature, has {kinds}")
    kind = schema.field(images[0]).type
    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{path} has images without their bytes: column {images[0]!r} is {kind}")
    if not isinstance(names := features[usual[0]].get("names"), list):
        raise DataError(f"{path} has no names for the classes of {usual[0]}")
    return _Columns(image=images[0], label=usual[0], class_names=names)


def _rows(path: Path, columns: _Columns) -> Iterator[tuple[bytes | None, int | None]]:
    """Image bytes and label of each row."""
    wanted = [f"{columns.image}.bytes", columns.label]
    with _opened(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
            images, labels = batch[columns.image].to_pylist(), batch[columns.label].to_pylist()
            for image, label in zip(images, labels, strict=True):
                yield image and image["bytes"], label
