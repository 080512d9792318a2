"""Model ids: exact inverses, forgery, expiry, the shared key."""

import os
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.ids import Ids, Recipe, load_key
from serve.problems import Problem
from tina.schemas import MAX_ID_CHARACTERS

names = st.lists(st.text(min_size=1, max_size=40), min_size=2, max_size=6).map(tuple)
recipes = st.builds(
    Recipe,
    checkpoint=st.text("0123456789abcdef", min_size=64, max_size=64),
    classes=names,
    descriptions=st.one_of(st.just(()), names),
    shift=st.one_of(st.just(""), st.binary(max_size=40).map(lambda data: b64encode(data).decode())),
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 1000),
    guidance=st.floats(0, 20),
)
RECIPE = Recipe(checkpoint="c" * 64, classes=("a", "b"), seed=1, steps=4, guidance=1.0)
LARGE = Recipe(
    checkpoint="c" * 64,
    classes=("a", "b"),
    embeddings=os.urandom(2000).hex(),
    seed=1,
    steps=4,
    guidance=1.0,
)


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return Ids(b"k" * 32, storage=tmp_path_factory.mktemp("ids"), keep_s=1000)


def test_a_recipe_without_examples_says_nothing_of_them():
    """Its id is that of before there were any."""
    assert b"shift" not in RECIPE.pack()
    assert b"shift" in replace(RECIPE, shift="AA==").pack()
    assert Recipe.unpack(RECIPE.pack()) == RECIPE


@given(recipe=recipes)
def test_an_id_carries_its_recipe(ids, recipe):
    name = ids.issue(recipe)
    assert len(name) <= MAX_ID_CHARACTERS
    assert ids.read(name) == recipe
    assert ids.issue(recipe) == name


@given(recipe=recipes)
def test_a_short_id_is_the_id(ids, recipe):
    assert ids.short(recipe) in (None, ids.issue(recipe))


def test_what_is_short_and_what_is_not(ids):
    assert ids.short(RECIPE) == ids.issue(RECIPE)
    assert ids.short(LARGE) is None


def test_a_large_recipe_is_stored_and_found_by_another_replica(tmp_path):
    here, there = (Ids(b"k", storage=tmp_path, keep_s=1000) for _ in range(2))
    name = here.issue(LARGE)
    assert len(name) < 200
    assert there.read(name) == LARGE


@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_changed_letter_is_refused(ids, at):
    name = ids.issue(RECIPE)
    letters = list(name)
    for letter in set("ABab01-_") - {letters[at]}:
        letters[at] = letter
        with pytest.raises(Problem) as error:
            ids.read("".join(letters))
        assert error.value.status == 404


@pytest.mark.parametrize("cut", ["", "A", "AAAA", "é" * 8, "a" * 5000, "\x00", "====", "!!"])
def test_what_is_no_id_is_refused(ids, cut):
    with pytest.raises(Problem) as error:
        ids.read(cut)
    assert error.value.kind == "unknown-model"


def test_a_truncated_id_and_one_under_another_key_are_refused(ids, tmp_path):
    name = ids.issue(RECIPE)
    other = Ids(b"another", storage=tmp_path, keep_s=1)
    for wrong in (name[:-4], name[4:], name + "AAAA", other.issue(RECIPE)):
        with pytest.raises(Problem) as error:
            ids.read(wrong)
        assert error.value.kind == "unknown-model"


def test_one_recipe_may_be_stored_by_many_at_once(tmp_path):
    """A client that asks again after its time-out, or two replicas: each gets a whole recipe."""
    for turn in range(20):
        ids = Ids(b"key", storage=tmp_path / str(turn), keep_s=100)
        recipe = replace(LARGE, seed=turn)
        with ThreadPoolExecutor(8) as pool:
            names = list(pool.map(ids.issue, [recipe] * 8))
            assert all(found == recipe for found in pool.map(ids.read, names))
        assert len(list((tmp_path / str(turn)).rglob("*.tmp"))) == 0


def stored(tmp_path, age):
    """Ids that keep a recipe for 1,000 s, the id of one stored so many seconds ago, its file."""
    ids = Ids(b"k", storage=tmp_path, keep_s=1000)
    name = ids.issue(LARGE)
    (file,) = (tmp_path / "prompts").iterdir()
    old = time.time() - age
    os.utime(file, (old, old))
    return ids, name, file


def test_a_stored_recipe_expires_and_is_removed(tmp_path):
    ids, name, _ = stored(tmp_path, 2000)
    with pytest.raises(Problem) as error:
        ids.read(name)
    assert error.value.kind == "prompt-gone"
    Ids(b"k", storage=tmp_path, keep_s=1000)._sweep()
    assert not list((tmp_path / "prompts").iterdir())
    assert ids.issue(LARGE) == name
    assert ids.read(name) == LARGE


def test_of_too_much_what_was_named_last_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.ids.MAX_STORED_BYTES", most := 60_000)
    ids, names, before = Ids(b"k", storage=tmp_path, keep_s=10_000), [], set()
    now, folder = time.time(), tmp_path / "prompts"
    for seed in range(40):
        names.append(ids.issue(replace(LARGE, seed=seed)))
        (newest,) = set(folder.iterdir()) - before
        os.utime(newest, (now - 100 + seed,) * 2)
        before.add(newest)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert most / 2 < sum(sizes) <= 1.1 * most + max(sizes)
    left = len(sizes)
    assert 0 < left < 40
    for seed, name in enumerate(names):
        if seed >= 40 - left:
            assert ids.read(name).seed == seed
        else:
            with pytest.raises(Problem, match="prompt-gone"):
                ids.read(name)


@pytest.mark.parametrize("left", [0, 100])
def test_a_stored_recipe_that_was_cut_short_is_written_anew(tmp_path, left):
    ids, name, file = stored(tmp_path, 0)
    os.truncate(file, left)
    with pytest.raises(Problem) as error:
        ids.read(name)
    assert error.value.kind == "prompt-gone"
    assert ids.issue(LARGE) == name
    assert ids.read(name) == LARGE


def test_a_stored_recipe_that_is_asked_for_is_kept(tmp_path):
    ids, name, file = stored(tmp_path, 900)
    assert ids.read(name) == LARGE
    assert file.stat().st_mtime > time.time() - 100


def test_replicas_that_start_together_share_one_key(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_key(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    assert [file.name for file in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
