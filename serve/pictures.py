"""Picture files of strangers: how much Pillow does for one at most, whatever it is made of.

Requests take turns at the decoders, so each file has a bound of its own: on its pixels, and here on
what takes long without many of them.
"""

from __future__ import annotations

import io
import math
import warnings

from PIL import Image

from tina.errors import DataError
from tina.schemas import MAX_PIXELS

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_READS = 50_000  # of a file: some for each segment, chunk or run, which may be of a single byte
MAX_MARKS = 100
# By a file's first bytes: what may take as long as all else in it, however few bytes it has.
MARKS = {
    b"\xff\xd8": {
        b"\xff\xda": "scans",  # of a progressive JPEG; each goes over all pixels
        b"Exif\0\0": "EXIF segments",  # each is a copy of all before it
    },
    b"\x89PNG": {  # a megabyte each, packed a thousandfold
        b"iCCP": "colour profiles",
        b"iTXt": "texts",
        b"zTXt": "packed texts",
    },
}

warnings.filterwarnings("ignore", module="PIL")  # one for each odd tag: longer than all else
# A GIF's first frame is made when it is opened, before anyone can ask for its size; Pillow refuses
# twice as many pixels as this.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class _Pieces(io.BytesIO):
    """A file that is read in so many pieces and no more."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As files have it."""
        self.reads += 1
        if self.reads > MAX_READS:
            raise DataError("it is made of too many small parts")
        return super().read(size)


def _in_runs(file: bytes) -> bool:
    """Whether a BMP is run-length encoded: Pillow fills its rows byte by byte, holding the GIL."""
    has_compression = file[14:15] != b"\x0c"  # the oldest header, of 12 bytes, has no such field
    return file.startswith(b"BM") and has_compression and file[30:34] in (b"\1\0\0\0", b"\2\0\0\0")


def bounded(file: bytes) -> io.BytesIO:
    """A picture file as Pillow may open it; to read it in too many pieces raises the same error.

    Raises:
        DataError: It has too many parts of one kind, or is a BMP of runs.
    """
    if _in_runs(file):
        raise DataError("it is a BMP in run-length encoding, which is not read")
    for start, marks in MARKS.items():
        for mark, name in marks.items():
            if file.startswith(start) and (count := file.count(mark)) > MAX_MARKS:
                raise DataError(f"it has {count} {name}, more than {MAX_MARKS}")
    return _Pieces(file)


def pixels_of(file: bytes) -> int:
    """Pixels of a picture, as its header has them; 0 where that cannot be read."""
    try:
        with Image.open(bounded(file), formats=PICTURES) as image:
            return math.prod(image.size)
    except Exception:  # whatever it is, to decode it says so, and names the picture
        return 0
