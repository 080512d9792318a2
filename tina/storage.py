"""Where runs are kept: a folder that all nodes see, or a place in an object store.

Readers and writers of this package know files. Of an object store a process has a copy of its own:
`fetch` brings what it needs when it first needs it, `keep` sends what it has made. Files appear
whole in the store too, and of a folder with a manifest that is the last. What is only read (data,
checkpoints to generate with) is copied into the user cache, for all processes of a machine.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from tina.errors import TinaError, one_line
from tina.files import hash_bytes, write_whole
from tina.stores import Store, at_once, below, is_uri, split

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
T = TypeVar("T")


def user_cache() -> Path:
    """Tina's folder in the user cache; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tina"


def cached(
    file: Path,
    *,
    read: Callable[[Path], T],
    make: Callable[[], T],
    write: Callable[[Path, T], object],
) -> T:
    """What a file of the user cache holds; else what is made now, and kept there for the next time.

    A warning says where that cannot be read or written.

    Args:
        read: May raise anything of a file that is not whole.
    """
    from safetensors import SafetensorError

    if file.is_file():
        try:
            return read(file)
        except Exception as error:  # whatever is wrong with it, it can be made again
            log.warning("cache file %s is corrupt, rebuilding it: %s", file, one_line(error))
    made = make()
    try:
        write_whole(file, lambda temporary: write(temporary, made))
    except (OSError, SafetensorError) as error:  # the latter of a full disk
        log.warning("cannot keep %s: %s", file, one_line(error))
    return made


def at_hand(location: str, *names: str) -> Path:
    """A folder or file to read, on this machine: of a URI a copy in the user cache, as it is now.

    Args:
        names: Folders in it, the first of which that holds files is all that is needed; "" stands
            for the whole. Default: the whole.

    Raises:
        ConfigError: pyarrow knows no such store.
        OSError: It cannot be read.
    """
    if not is_uri(location):
        return Path(location).expanduser()
    store, copy = Store.open(location), _copy_of(location)
    folder, part, files = copy.parent, "", dict[str, Any]()
    folder.mkdir(parents=True, exist_ok=True)
    names = names or ("",)
    with FileLock(folder.with_suffix(".lock")):
        for part in names:
            if files := store.listing(part):
                break
        if set(files) == {""}:  # the location is that of a file
            store.bring({copy.name: files[""]}, folder)
            return copy
        store.bring(files, copy)
        for gone in names[: names.index(part) + 1]:  # the others were not looked at
            _forget(copy / gone, {copy / name for name in files})
    return copy


def _copy_of(uri: str) -> Path:
    """Where `at_hand` has a copy."""
    return user_cache() / "copies" / hash_bytes(uri.encode())[:16] / split(uri)[1]


@contextmanager
def named(location: str, copy: Path | None = None) -> Iterator[None]:
    """Errors speak of a place, not of a copy of it that nobody knows of.

    Args:
        copy: Of a URI; default: that of `at_hand`.

    Raises:
        TinaError: Of the kind that was raised within.
    """
    try:
        yield
    except TinaError as error:
        if not is_uri(location):
            raise
        cause = getattr(error, "cause", error)  # a Ray worker's error holds its own
        message = str(cause).replace(str(copy or _copy_of(location)), location)
        raise type(cause)(message) from error


def _forget(here: Path, known: set[Path]) -> None:
    """Remove from a copy what has left its store."""
    if here.is_file() and here not in known:
        here.unlink()
    for path in sorted(here.rglob("*"), reverse=True):  # a folder after what is in it
        if path.is_file() and path not in known:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _own_copy(owner: object) -> Path:
    """A new folder that goes with its owner, or, if its process is killed, when the next is made.

    A lock tells the dead from the living: the kernel takes it back whatever a process dies of.
    """
    home = Path(tempfile.gettempdir())
    for file in home.glob("tina-*.lock"):
        # it lives, or is another user's
        with suppress(Timeout, OSError), FileLock(file, timeout=0):
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink(missing_ok=True)
    folder = home / f"tina-{secrets.token_hex(8)}"
    lock = FileLock(folder.with_suffix(".lock"), thread_local=False)
    lock.acquire()
    folder.mkdir(mode=0o700)

    def drop() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

    weakref.finalize(owner, drop)
    return folder


class Place:
    """A folder of the storage.

    Attributes:
        location: Its absolute path or URI.
        remote: Whether that is a URI.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.remote = is_uri(self.location)
        self._fetched: set[str] = set()

    def __eq__(self, other: object) -> bool:
        """Whether it is the same folder."""
        return isinstance(other, Place) and other.location == self.location

    def __hash__(self) -> int:
        """Of the location."""
        return hash(self.location)

    def __reduce__(self) -> tuple[type[Place], tuple[str]]:
        """Another process gets a copy of its own."""
        return Place, (self.location,)

    @cached_property
    def folder(self) -> Path:
        """Where its files are read and written: itself, or this process's copy of it."""
        return _own_copy(self) if self.remote else Path(self.location)

    @cached_property
    def _store(self) -> Store:
        return Store.open(self.location)

    def fetch(self, name: str, *, whole: bool = False, again: bool = False) -> Path:
        """A file or folder of that name, there or not; from a store it comes at the first call.

        Args:
            whole: A folder without its manifest was cut off on its way, and is not there.
            again: Another process may have written to it since.

        Raises:
            ConfigError: pyarrow knows no such store.
            OSError: It cannot be read.
        """
        here = self.folder / name
        if self.remote and (again or name not in self._fetched):
            files = self._store.listing(name)
            if not whole or f"{name}/{MANIFEST}" in files:
                try:
                    self._store.bring(files, self.folder)
                except BaseException:
                    shutil.rmtree(here, ignore_errors=True)  # half of it is not it
                    raise
            self._fetched.add(name)
        return here

    def keep(self, *names: str) -> None:
        """Send files and folders that this process has written, where there is a store.

        Raises:
            FileExistsError: A folder with a manifest is there already.
            OSError: The store cannot be written.
        """
        for name in names if self.remote else ():
            inside = [file for file in (self.folder / name).rglob("*") if file.is_file()]
            files = [str(file.relative_to(self.folder)) for file in inside] or [name]
            last = f"{name}/{MANIFEST}"
            if last in files and self._store.listing(last):
                there = below(self.location, name)
                raise FileExistsError(f"{there} exists already; nothing was overwritten")
            at_once(self._send, [file for file in files if file != last])
            if last in files:
                self._send(last)
            self._fetched.add(name)

    def _send(self, name: str) -> None:
        self._store.send(self.folder / name, name)

    def names(self) -> set[str]:
        """What lies directly in the folder, as all processes see it."""
        if self.remote:
            from pyarrow.fs import FileSelector

            inside = FileSelector(self._store.path(), allow_not_found=True)
            return {info.base_name for info in self._store.files.get_file_info(inside)}
        return {file.name for file in self.folder.iterdir()} if self.folder.is_dir() else set()

    def holds(self, name: str) -> bool:
        """Whether a folder with a manifest is there, as all processes see it."""
        last = f"{name}/{MANIFEST}"
        return bool(self._store.listing(last)) if self.remote else (self.folder / last).is_file()

    def modified(self, name: str) -> int:
        """When a file was last written, as all processes see it, in nanoseconds.

        Raises:
            FileNotFoundError: There is none of that name.
        """
        if self.remote:
            if not (found := self._store.listing(name)):
                raise FileNotFoundError(f"{below(self.location, name)} does not exist")
            return found[name].mtime_ns or 0
        return (self.folder / name).stat().st_mtime_ns

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink(missing_ok=True)
        if self.remote:
            self._store.files.delete_file(self._store.path(name))

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
        if self.remote:
            self._store.files.delete_dir(self._store.path())

    def below(self, *names: str) -> Place:
        """A folder inside it."""
        return Place(below(self.location, *names))

    def for_ray(self, *names: str) -> dict[str, Any]:
        """What Ray Train and Tune take: `storage_path` and `storage_filesystem`."""
        if self.remote:
            store = self._store
            return {"storage_path": store.path(*names), "storage_filesystem": store.files}
        return {"storage_path": str(self.folder.joinpath(*names)), "storage_filesystem": None}

    def named(self) -> AbstractContextManager[None]:
        """Errors speak of the place; see `tina.storage.named`."""
        return named(self.location, self.folder)
