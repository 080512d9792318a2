"""Checkpoints that are spoilt behind a true manifest, for what lies beyond the hashes."""

import json

from tina.files import hash_file


def rehash(directory):
    """A manifest that agrees with whatever the files now hold."""
    files = sorted(f for f in directory.iterdir() if f.name != "manifest.json")
    hashes = {file.name: hash_file(file) for file in files}
    (directory / "manifest.json").write_text(json.dumps(hashes))


def edit_header(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    rehash(directory)
