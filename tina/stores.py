"""Object stores that pyarrow reaches by a URI: names, listings, transfers."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from tina.errors import ConfigError
from tina.files import write_whole

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

AT_ONCE = 16  # files on their way
WHOLE = {"s3", "gcs", "abfs"}
"""Kinds of stores in which what is being written is not there before its end."""


def is_uri(location: str) -> bool:
    """Whether a location is a URI as pyarrow takes it (`s3://bucket/runs`), and no path."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", location))


def below(location: str, *names: str) -> str:
    """The location of something in a folder; a URI keeps its options (`?region=...`)."""
    if not is_uri(location):
        return str(Path(location, *names))
    folder, mark, options = location.partition("?")
    return "/".join([folder.rstrip("/"), *map(quote, names)]) + mark + options


def split(location: str) -> tuple[str, str]:
    """Inverse of `below` with one name."""
    if not is_uri(location):
        folder = Path(location).resolve()
        return str(folder.parent), folder.name
    path, mark, options = location.partition("?")
    storage, _, name = path.rstrip("/").rpartition("/")
    return storage + mark + options, unquote(name)


@dataclass(frozen=True)
class Store:
    """A folder, or a single file, of a file system.

    Args:
        root: Its path there.
    """

    files: FileSystem
    root: str

    @classmethod
    def open(cls, uri: str) -> Store:
        """What a URI names.

        Raises:
            ConfigError: pyarrow knows no such store.
        """
        from pyarrow import ArrowInvalid
        from pyarrow.fs import FileSystem

        try:
            files, path = FileSystem.from_uri(uri)
        except (ArrowInvalid, ImportError, ValueError) as error:
            raise ConfigError(f"{uri} is no storage: {error}") from error
        return cls(files, path.rstrip("/"))

    def path(self, *names: str) -> str:
        """The path of something in it."""
        return "/".join([self.root, *names]).rstrip("/")

    def listing(self, name: str = "") -> dict[str, FileInfo]:
        """Files of that name, or in the folder of that name, by their names from the root on."""
        from pyarrow.fs import FileSelector, FileType

        path = self.path(name)
        alone = self.files.get_file_info(path)
        inside = FileSelector(path, recursive=True, allow_not_found=True)
        found = [alone] if alone.type == FileType.File else self.files.get_file_info(inside)
        return {
            info.path.removeprefix(self.root).lstrip("/"): info
            for info in found
            if info.type == FileType.File and not info.base_name.endswith(".tmp")
        }

    def bring(self, listing: dict[str, FileInfo], folder: Path) -> None:
        """Copy listed files into a folder, each whole or not at all, but for those that are there.

        Raises:
            OSError: One cannot be read; others may have come.
        """

        def bring(name: str) -> None:
            there, here = listing[name], folder / name
            stamp = there.size, there.mtime_ns or 0
            # as rsync's quick check: a copy is as old as what it is a copy of
            if here.is_file() and (here.stat().st_size, here.stat().st_mtime_ns) == stamp:
                return

            def write(temporary: Path) -> None:
                self._copy_here(there.path, temporary)
                os.utime(temporary, ns=(stamp[1], stamp[1]))

            write_whole(here, write)

        at_once(bring, listing)

    def _copy_here(self, path: str, file: Path) -> None:
        from pyarrow.fs import LocalFileSystem, copy_files

        here = LocalFileSystem()
        copy_files(path, str(file), source_filesystem=self.files, destination_filesystem=here)

    def send(self, file: Path, name: str) -> None:
        """Copy a file to that name, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        path = self.path(name)
        folder, _, last = path.rpartition("/")
        whole = self.files.type_name in WHOLE
        first = path if whole else f"{folder}/.{last}.{secrets.token_hex(8)}.tmp"
        self.files.create_dir(folder)
        here = LocalFileSystem()
        copy_files(str(file), first, source_filesystem=here, destination_filesystem=self.files)
        if not whole:
            self.files.move(first, path)


def at_once(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Do some work for several files together; the first error is raised."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(work, names))
