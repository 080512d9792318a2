"""Files appear whole or not at all."""

import pytest

from tina.files import write_bytes, write_whole


def test_an_error_names_the_file_that_was_asked_for_and_leaves_nothing(tmp_path):
    """However many temporary names are between: here a folder is in the way."""
    taken = tmp_path / "taken"
    taken.mkdir()

    def nested(temporary):
        write_bytes(temporary, b"x")
        write_bytes(temporary / "below", b"x")

    for write in (lambda file: write_bytes(file, b"x"), lambda file: write_whole(file, nested)):
        with pytest.raises(OSError, match=r"/taken'$"):
            write(taken)
        assert list(tmp_path.iterdir()) == [taken]
        assert not list(taken.iterdir())


def test_another_files_error_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        write_whole(tmp_path / "x", lambda temporary: (tmp_path / "missing").read_bytes())
    assert not list(tmp_path.iterdir())
