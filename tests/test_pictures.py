"""Picture files of strangers: what would take long is refused, and photographs are read."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from serve.pictures import MAX_MARKS, MAX_READS, PICTURES, bounded, pixels_of
from tina.errors import DataError
from tina.images import read_image

SIZE = (40, 30)


def encode(format, **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (image.quantize() if format == "GIF" else image).save(buffer, format, **options)
    return buffer.getvalue()


def segment(marker, content=b""):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(kind, content=b""):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def jpeg(*parts):
    """One with parts behind its first two bytes."""
    content = encode("JPEG")
    return content[:2] + b"".join(parts) + content[2:]


def png(*parts):
    """One with parts behind its header."""
    content = encode("PNG")
    return content[:33] + b"".join(parts) + content[33:]


def bmp():
    """One of which each pixel is a run of its own."""
    side = 300
    runs = (b"\1\5" * side + b"\0\0") * side + b"\0\1"
    start = 14 + 40 + 4 * 256
    head = struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return head + info + bytes(4 * 256) + runs


def gif():
    content = encode("GIF")
    start = content.index(b",\0\0\0\0")
    return content[:start] + b"!\xfe" + b"\1a" * MAX_READS + b"\0" + content[start:]


EXIF = segment(0xE1, b"Exif\0\0x")
PACKED = {kind: chunk(kind, b"a\0\0" + zlib.compress(bytes(99))) for kind in (b"iCCP", b"zTXt")}
PACKED[b"iTXt"] = chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(99)))
LONG = {
    "EXIF": jpeg(EXIF * (MAX_MARKS + 1)),
    "comments": jpeg(segment(0xFE) * MAX_READS),
    "profiles": jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1") * MAX_READS),
    "padding": jpeg(b"\xff" * MAX_READS),
    "chunks": png(chunk(b"aaAa") * MAX_READS),
    "parts": png(chunk(b"tEXt", b"a\0b") * MAX_READS),
    "chunks at the end": encode("PNG")[:-12] + chunk(b"aaAa") * MAX_READS + chunk(b"IEND"),
    "blocks": gif(),
    "runs": bmp(),
    **{kind.decode(): png(part * (MAX_MARKS + 1)) for kind, part in PACKED.items()},
}


@pytest.mark.parametrize("kind", LONG)
def test_what_takes_long_for_its_bytes_is_not_read(kind):
    content = LONG[kind]
    with pytest.raises(DataError, match=r"too many small parts|, more than 100|run-length"):
        read_image(bounded(content), channels=3, formats=PICTURES)
    at_the_end = kind == "chunks at the end"  # its header is what it says
    assert bool(pixels_of(content)) is at_the_end


@pytest.mark.parametrize("compression", [1, 2])
def test_one_run_may_stand_for_a_row_of_millions(compression):
    """Pillow fills up the row byte by byte: seconds for these 68 bytes."""
    head = struct.pack("<2sIHHI", b"BM", 68, 0, 0, 62)
    bits = 8 if compression == 1 else 4
    info = struct.pack("<IiiHHIIiiII", 40, 24_000_000, 1, 1, bits, compression, 6, 0, 0, 2, 0)
    with pytest.raises(DataError, match="run-length"):
        bounded(head + info + bytes(8) + b"\1\0\0\0\0\1")


def test_a_bmp_of_the_oldest_kind_has_colours_where_others_say_how_they_are_packed():
    palette = [(0, 0, 0), (0, 1, 0), (0, 0, 0), *[(9, 9, 9)] * 253]
    info = struct.pack("<IHHHH", 12, 4, 1, 1, 8)
    start = 14 + len(info) + 3 * len(palette)
    head = struct.pack("<2sIHHI", b"BM", start + 4, 0, 0, start)
    content = head + info + b"".join(map(bytes, palette)) + bytes(4)
    assert content[30:34] == b"\1\0\0\0"
    assert read_image(bounded(content), channels=3, formats=PICTURES).shape == (1, 3, 1, 4)


def test_a_gif_is_not_made_before_its_size_is_known():
    """Pillow clears the first frame when the file is opened: 169 MiB for these 43 bytes."""
    side = struct.pack("<HH", 13_300, 13_300)
    control, frame = b"!\xf9\4\x08\0\0\0\0", b"," + bytes(4) + side + b"\0"
    content = b"GIF89a" + side + b"\x80\0\0" + bytes(6) + control + frame + b"\2\2\x44\1\0;"
    assert pixels_of(content) == 0
    with pytest.raises(DataError, match="limit"):
        read_image(bounded(content), channels=3, formats=PICTURES)


@pytest.mark.parametrize("format", PICTURES)
def test_pictures_of_every_format_are_read(format):
    content = encode(format)
    file = bounded(content)
    assert read_image(file, channels=3, formats=PICTURES).shape == (1, 3, *SIZE[::-1])
    assert 0 < file.reads < 100
    assert pixels_of(content) == SIZE[0] * SIZE[1]


def test_photographs_with_all_that_cameras_write_are_read():
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 6
    about = {"exif": exif, "xmp": b"x" * 60_000, "icc_profile": bytes(500_000), "dpi": (72, 72)}
    for options in ({}, {"progressive": True, "comment": "a" * 1000}):
        content = encode("JPEG", **about, **options)
        assert content.count(b"ICC_PROFILE") > 5
        image = read_image(bounded(content), channels=3, formats=PICTURES)
        assert image.shape == (1, 3, *SIZE)
    shots, buffer = [Image.new("RGB", SIZE) for _ in range(4)], io.BytesIO()
    shots[0].save(buffer, "MPO", save_all=True, append_images=shots[1:], exif=exif)
    assert buffer.getvalue().count(b"Exif\0\0") > 1
    image = read_image(bounded(buffer.getvalue()), channels=3, formats=PICTURES)
    assert image.shape == (1, 3, *SIZE)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "text"])
def test_a_picture_is_turned_upright_and_its_tags_are_not_written_anew(
    format, orientation, monkeypatch
):
    """That takes Pillow a second for each 65,000 values, of which a file packs any number."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", orientation
    if format == "text":
        content = exif.tobytes()
        lines = f"\nexif\n{len(content):8}\n{content.hex()}\n"
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Raw profile type exif", lines, zip=True)
        content = encode("PNG", pnginfo=texts)
    else:
        content = encode(format, exif=exif, xmp=b"<x/>")
    with Image.open(io.BytesIO(content)) as image:
        lying, upright = (np.array(x) for x in (image, ImageOps.exif_transpose(image)))
    assert np.array_equal(lying, upright) == (orientation not in range(2, 9))
    monkeypatch.setattr(Image.Exif, "tobytes", None)
    found = read_image(bounded(content), channels=3, formats=PICTURES)
    assert np.array_equal((255 * found[0]).round().permute(1, 2, 0), upright)


def test_drawings_with_all_that_programs_write_are_read():
    texts = PngImagePlugin.PngInfo()
    for i in range(20):
        texts.add_text(f"key {i}", "a text", zip=True)
        texts.add_itxt(f"another {i}", "a text")
    content = encode("PNG", pnginfo=texts, icc_profile=bytes(3000))
    image = read_image(bounded(content), channels=3, formats=PICTURES)
    assert image.shape == (1, 3, *SIZE[::-1])


def test_a_large_drawing_in_small_chunks_is_read():
    """Eight megabytes by a kilobyte each."""
    data = np.random.default_rng(0).integers(0, 256, (1500, 5601), dtype=np.uint8)
    data[:, 0] = 0  # no filter
    packed = zlib.compress(data.tobytes(), 0)
    body = [chunk(b"IDAT", packed[i : i + 1024]) for i in range(0, len(packed), 1024)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 5600, 1500, 8, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + b"".join(body) + chunk(b"IEND")
    image = read_image(bounded(content), channels=1, formats=PICTURES)
    assert image.shape == (1, 1, 1500, 5600)


def test_odd_tags_are_not_said_one_by_one(tmp_path):
    """A file may have tens of thousands, and a line for each takes longer than all else."""
    tags = [struct.pack(">HHII", 0x5000 + i, 7, 1000, 0) for i in range(50)]
    exif = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + b"".join(tags) + bytes(4)
    (tmp_path / "a.png").write_bytes(png(chunk(b"eXIf", exif)))
    code = (
        "import sys; from serve.pictures import bounded; from tina.images import read_image\n"
        "read_image(bounded(open(sys.argv[1], 'rb').read()), channels=3)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stderr == ""
