"""Words to tasks, and what a prompt inherits by its embedding alone."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tina.config import PromptConfig
from tina.encoders import HashEncoder, build_encoder
from tina.errors import PromptError
from tina.names import normalise_name, read_sentence, readings, split_sentence
from tina.prompts import (
    MAX_CHARACTERS,
    SHARPNESS,
    Vocabulary,
    check_distinct,
    check_task,
)
from tina.sparsemax import sparsemax
from tina.superclasses import CIFAR100_SUPERCLASSES

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EXCLUDED = torch.tensor([4, 9])

words = st.text("abcdeor", min_size=1, max_size=6).filter(lambda w: w not in ("or", "and"))
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)
names = st.lists(phrases, min_size=1, max_size=6)


# --- sentences ------------------------------------------------------------------------------------


SEPARATORS = (
    *(", ", ",", " ; ", "\n", " and ", " OR ", ", and "),
    *(" & ", " / ", " vs ", " vs. ", " Versus "),
)


@given(names, st.sampled_from(SEPARATORS))
def test_a_joined_list_is_split_again(parts, separator):
    assert split_sentence(separator.join(parts)) == parts


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("otter, bicycle and maple tree", ["otter", "bicycle", "maple tree"]),
        ("otter, bicycle, and maple tree", ["otter", "bicycle", "maple tree"]),
        ("orchid or sand, pandas\nAND doors", ["orchid", "sand", "pandas", "doors"]),
        ("black-and-tan coonhound, two-or-more", ["black-and-tan coonhound", "two-or-more"]),
        (" ,, otter ;", ["otter"]),
        ("Otter and bicycle.", ["Otter", "bicycle"]),
        ("otter or St. Bernard?! ", ["otter", "St. Bernard"]),
        ("cats and/or dogs", ["cats", "dogs"]),
        ("🦊 and 🐻", ["🦊", "🐻"]),
        ("otter vs. bicycle versus VS code, vs.bus", ["otter", "bicycle", "code", "bus"]),
        ("canvas or vsop, revs. or vs-30", ["canvas", "vsop", "revs.", "vs-30"]),
        ("otter & pen/pencil / AT&T", ["otter", "pen/pencil", "AT&T"]),
        ("tape measure/ ruler &\ntable", ["tape measure/ ruler", "table"]),
        ("bow_and_arrow, dining_&_kitchen", ["bow_and_arrow", "dining_&_kitchen"]),
        ("& / vs.", []),
        ("and or", []),
        ("", []),
    ],
)
def test_sentences(sentence, parts):
    assert split_sentence(sentence) == parts


@given(names, st.sampled_from(SEPARATORS))
def test_a_sentence_without_a_colon_describes_nothing(parts, separator):
    assert read_sentence(separator.join(parts)) == (parts, None)


@pytest.mark.parametrize(
    ("sentence", "names", "words"),
    [
        (
            "vehicle: bus, train and motorcycle; otter",
            ["vehicle", "otter"],
            [("bus", "train", "motorcycle"), None],
        ),
        ("a fish: shark\npet:cat or dog;", ["a fish", "pet"], [("shark",), ("cat", "dog")]),
        (
            "otter, bear; fish: ray, trout.",
            ["otter", "bear", "fish"],
            [None, None, ("ray", "trout")],
        ),
        ("otter, a fish: ray; bear", ["otter", "a fish", "bear"], [None, ("ray",), None]),
        ("fish: ; bear", ["fish", "bear"], None),
        (": bus; bear", ["", "bear"], [("bus",), None]),
        ("scale 1:87; otter", ["scale 1", "otter"], [("87",), None]),
        (":", [""], None),
    ],
)
def test_sentences_with_several_words_for_a_class(sentence, names, words):
    assert read_sentence(sentence) == (names, words)


def test_names_are_compared_without_case_underscores_and_white_space():
    assert normalise_name("  Maple_Tree\t ") == normalise_name("maple  tree") == "maple tree"
    assert normalise_name("Ka\u0308fer") == normalise_name("K\u00e4fer")  # as macOS writes it


@pytest.mark.parametrize(
    ("name", "singular"),
    [
        ("Otters", "otter"),
        ("maple_trees", "maple tree"),
        ("foxes", "fox"),
        ("butterflies", "butterfly"),
        ("magpies", "magpie"),
        ("wolves", "wolf"),
        ("pocket knives", "pocket knife"),
        ("snowmen", "snowman"),
        ("the Lawn-Mowers", "lawn mower"),
        ("an otter", "otter"),
        ("a  three-toed sloth", "three-toed sloth"),
    ],
)
def test_a_name_may_be_read_without_article_hyphens_and_plural(name, singular):
    assert next(iter(readings(name))) == normalise_name(name)  # as it is written comes first
    assert singular in readings(name)


def test_only_an_article_and_a_plural_are_left_out():
    assert set(readings("grass")) == {"grass"}
    assert set(readings("theatre")) == {"theatre"}
    assert set(readings("the")) == {"the"}


# --- tasks ----------------------------------------------------------------------------------------


def test_a_task_keeps_its_names_as_they_were_written():
    assert check_task([" Maple  tree", "maple_leaf\n"], max_classes=2) == (
        "Maple tree",
        "maple_leaf",
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ([], "at least 2 classes, got 0"),
        (["otter"], "at least 2 classes, got 1"),
        (["a", "b", "c", "d"], "at most 3 classes, got 4"),
        (["otter", ""], "a class name is empty"),
        (["otter", " _ "], "a class name is empty"),
        (["otter", "x" * (MAX_CHARACTERS + 1)], "1001 characters, at most 1000"),
        (["Maple_Tree", "otter", " maple  tree"], "twice: maple tree"),
        (["b", "a", "B"], "twice: b$"),
    ],
)
def test_what_is_no_task_is_refused(task, message):
    with pytest.raises(PromptError, match=message):
        check_task(task, max_classes=3)


def test_the_longest_name_is_still_read():
    longest = "x" * MAX_CHARACTERS
    assert check_task([longest, "y"], max_classes=2) == (longest, "y")


# --- sparsemax ------------------------------------------------------------------------------------

scores = st.lists(st.floats(-20, 20), min_size=1, max_size=8)


def project(values):
    """The nearest point of the simplex, max(z - tau, 0), with tau by bisection."""
    z = torch.tensor(values, dtype=torch.float64)
    low, high = float(z.min()) - 1, float(z.max())
    for _ in range(100):
        tau = (low + high) / 2
        if (z - tau).clamp_min(0).sum() > 1:
            low = tau
        else:
            high = tau
    return (z - high).clamp_min(0)


@settings(deadline=None)
@given(scores)
def test_sparsemax_is_the_projection_onto_the_simplex(values):
    found = sparsemax(torch.tensor(values, dtype=torch.float64))
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)
    torch.testing.assert_close(found, project(values), atol=1e-9, rtol=0)


@settings(deadline=None)
@given(scores, st.floats(-5, 5), st.data())
def test_sparsemax_ignores_a_shift_and_follows_a_permutation(values, shift, data):
    order = data.draw(st.permutations(range(len(values))))
    z = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(sparsemax(z + shift), sparsemax(z), atol=1e-9, rtol=0)
    assert torch.equal(sparsemax(z[order]), sparsemax(z)[order])


@pytest.mark.parametrize("scale", [1e5, -1e6])
def test_sparsemax_of_large_scores_is_exact(scale):
    scores = scale + torch.linspace(0, 1, 9)  # float32, whose steps there are 1/128 and 1/16
    expected = sparsemax(scores.double())
    torch.testing.assert_close(sparsemax(scores).double(), expected, atol=1e-6, rtol=0)
    assert expected.sum() == pytest.approx(1)


@settings(deadline=None)
@given(scores, st.floats(1, 5))
def test_a_lead_of_one_takes_all(values, lead):
    z = torch.tensor([*values, max(values) + lead + 1e-9], dtype=torch.float64)
    found = sparsemax(z)
    assert not found[:-1].any()
    assert found[-1] == pytest.approx(1)


def test_a_lead_of_less_than_one_is_shared():
    found = sparsemax(torch.tensor([[3.0, 2.2, 0.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.1, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_sparsemax_is_differentiable():
    z = torch.tensor([0.3, 0.1, -2.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(sparsemax, (z,))


# --- vocabulary -----------------------------------------------------------------------------------


def vocabulary_of(encoder, class_names, excluded):
    trained = torch.ones(len(class_names), dtype=torch.bool)
    trained[excluded] = False
    return Vocabulary(
        space=encoder.space,
        names=tuple(normalise_name(name) for name in class_names),
        embeddings=encoder.encode_text(class_names),
        trained=trained,
    )


@pytest.fixture(scope="module", params=["hash", "clip"])
def vocabulary(request):
    """Ten digits by their spelling, and CIFAR-100 by CLIP, a fifth of it excluded."""
    if request.param == "hash":
        return vocabulary_of(HashEncoder(), DIGITS, EXCLUDED)
    table = request.getfixturevalue("shared_data") / "clip_vitb32_text_vectors.parquet"
    config = PromptConfig(encoder="table", model="cifar100", weights=str(table))
    classes = sorted(itertools.chain.from_iterable(CIFAR100_SUPERCLASSES.values()))
    return vocabulary_of(build_encoder(config), classes, torch.arange(0, 100, 5))


def test_further_words_can_be_said_and_change_nothing_else(vocabulary):
    names = ["Maple_leaf ", vocabulary.names[1].upper(), "otter pup", "maple leaf"]
    vectors = torch.nn.functional.normalize(torch.randn(4, vocabulary.space.dim), dim=1)
    larger = vocabulary.with_words(names, vectors)
    assert larger.names == (*vocabulary.names, "maple leaf", "otter pup")
    assert torch.equal(larger.lookup("maple_leaf"), vectors[3])
    assert torch.equal(larger.lookup(names[1]), vocabulary.embeddings[1])
    assert larger.lookup("maple") is None
    assert larger.trained_names == vocabulary.trained_names
    for of in ("attention", "condition", "familiarity"):
        assert torch.equal(getattr(larger, of)(vectors), getattr(vocabulary, of)(vectors)), of
    assert larger.with_words(names, vectors).names == larger.names


def test_a_trained_name_inherits_its_own_row_exactly(vocabulary):
    trained = vocabulary.trained
    attention = vocabulary.attention(vocabulary.embeddings[trained])
    assert torch.equal(attention, torch.eye(int(trained.sum())))


@pytest.mark.parametrize("angle", [0.3, 0.1, 0.03])
def test_near_names_inherit_their_own_rows_too(angle):
    """As "sunglass" and "sunglasses" are; other names are as far as ever."""
    vectors = torch.eye(6)[:5]
    vectors[1] = math.cos(angle) * vectors[0] + math.sin(angle) * torch.eye(6)[5]
    vocabulary = Vocabulary(
        space=HashEncoder.space,
        names=tuple("abcde"),
        embeddings=vectors,
        trained=torch.ones(5, dtype=torch.bool),
    )
    assert torch.equal(vocabulary.attention(vectors), torch.eye(5))
    between = torch.nn.functional.normalize(vectors[:1] + vectors[1:2], dim=1)
    torch.testing.assert_close(
        vocabulary.attention(between), torch.tensor([[0.5, 0.5, 0, 0, 0]]), atol=0.02, rtol=0
    )


def test_names_that_are_one_to_the_encoder_are_refused():
    vectors = torch.eye(3)[[0, 1, 0]]
    with pytest.raises(PromptError, match="'🦊' and '🐻' are the same to the prompt encoder"):
        check_distinct(["🦊", "otter", "🐻"], vectors)
    check_distinct(["🦊", "otter"], vectors[:2])
    with pytest.raises(PromptError, match="are the same"):  # of half precision's length
        check_distinct(["🦊", "otter", "🐻"], 0.9997 * vectors)


def test_an_excluded_name_inherits_a_mixture_of_trained_rows(vocabulary):
    excluded = vocabulary.embeddings[~vocabulary.trained]
    attention = vocabulary.attention(excluded)
    assert attention.shape == (len(excluded), int(vocabulary.trained.sum()))
    torch.testing.assert_close(attention.sum(1), torch.ones(len(excluded)))
    assert attention.min() >= 0
    assert (attention == 0).any(1).all()  # sparse


def test_what_is_excluded_leaves_no_trace(vocabulary):
    trained = vocabulary.trained
    strangers = vocabulary.embeddings.clone()
    strangers[~trained] = vocabulary.embeddings[~trained].flip(-1)
    blind = dataclasses.replace(vocabulary, embeddings=strangers)
    prompts = vocabulary.embeddings
    assert torch.equal(blind.attention(prompts), vocabulary.attention(prompts))
    assert torch.equal(blind.condition(prompts), vocabulary.condition(prompts))
    assert torch.equal(blind.familiarity(prompts), vocabulary.familiarity(prompts))


def test_attention_is_a_function_of_the_embedding_alone(vocabulary):
    renamed = dataclasses.replace(vocabulary, names=tuple(reversed(vocabulary.names)))
    prompts = torch.nn.functional.normalize(
        vocabulary.embeddings + 0.3 * vocabulary.embeddings.roll(1, 0), dim=1
    )
    mixed = vocabulary.attention(prompts)
    assert torch.equal(renamed.attention(prompts), mixed)
    batch = prompts.view(2, -1, prompts.shape[1])
    torch.testing.assert_close(vocabulary.attention(batch), mixed.view(2, len(prompts) // 2, -1))


def test_attention_is_sharpened_sparsemax_of_centred_cosines(vocabulary):
    trained = vocabulary.embeddings[vocabulary.trained].double()
    centre = trained.mean(0)
    prompts = vocabulary.embeddings[~vocabulary.trained]

    def centred(x):
        return torch.nn.functional.normalize(x.double() - centre, dim=1)

    cosines = centred(prompts) @ centred(trained).T
    expected = torch.stack([project((SHARPNESS * row).tolist()) for row in cosines])
    found = vocabulary.attention(prompts).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_familiarity_is_one_for_trained_names_and_less_for_others(vocabulary):
    familiar = vocabulary.familiarity(vocabulary.embeddings)
    trained = vocabulary.trained
    torch.testing.assert_close(familiar[trained], torch.ones(int(trained.sum())))
    assert familiar[~trained].max() < 0.9
    assert familiar.min() >= 0
    assert familiar.max() <= 1
    first, second = vocabulary.embeddings[trained][:2]
    blend = vocabulary.familiarity(torch.nn.functional.normalize(first + second, dim=0))
    assert familiar[~trained].min() < blend < 0.95


def test_conditions_have_values_of_about_one(vocabulary):
    conditions = vocabulary.condition(vocabulary.embeddings)
    assert conditions.shape == vocabulary.embeddings.shape
    sizes = conditions.square().mean(1)
    torch.testing.assert_close(sizes, torch.ones(len(conditions)))


@pytest.mark.parametrize("shrinkage", [0.3, 0.5, 1.0])
def test_shrinkage_leaves_the_conditions_of_trained_names(vocabulary, shrinkage):
    names = vocabulary.embeddings[vocabulary.trained]
    drawn = vocabulary.condition(names, shrinkage=shrinkage)
    torch.testing.assert_close(drawn, vocabulary.condition(names))


def test_shrinkage_draws_the_condition_of_a_synonym_to_its_name(vocabulary):
    """One half halves the angle, one leaves none, and the length stays."""
    trained = vocabulary.embeddings[vocabulary.trained]
    first = vocabulary.condition(trained[0]).double()
    words = trained[0] + torch.tensor([0.1, 0.2, 0.3])[:, None] * trained[1]
    words = torch.nn.functional.normalize(words, dim=1)
    assert vocabulary.attention(words)[:, 0].tolist() == [1, 1, 1]

    def angles(shrinkage):
        drawn = vocabulary.condition(words, shrinkage=shrinkage).double()
        norms = drawn.norm(dim=1) / first.norm()
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-6, rtol=0)  # of fp32
        return (drawn @ first / first.norm() ** 2).clamp(max=1).arccos()

    assert angles(0).min() > 0.05
    torch.testing.assert_close(angles(0.5), angles(0) / 2, atol=1e-3, rtol=0)
    torch.testing.assert_close(angles(1), torch.zeros(3).double(), atol=1e-3, rtol=0)


def test_shrinkage_keeps_names_apart_that_inherit_the_same(vocabulary):
    first, second = vocabulary.embeddings[vocabulary.trained][:2]
    word = torch.nn.functional.normalize(first + 0.2 * second, dim=0)
    pair = torch.stack([first, word])
    assert torch.equal(*vocabulary.attention(pair))
    one, other = vocabulary.condition(pair, shrinkage=0.5)
    assert (one - other).abs().max() > 0.05


def test_conditions_tell_names_apart_that_their_embeddings_crowd(vocabulary):
    width = vocabulary.embeddings.shape[1]
    crowd = vocabulary.embeddings @ vocabulary.embeddings.T
    conditions = vocabulary.condition(vocabulary.embeddings)
    spread = conditions @ conditions.T / width
    off = ~torch.eye(len(crowd), dtype=torch.bool)
    assert spread[off].mean().abs() < 0.1
    assert spread[off].mean() < crowd[off].mean()


def test_a_known_name_is_looked_up_in_any_spelling():
    vocabulary = vocabulary_of(HashEncoder(), ("maple_tree", "otter"), [])
    for name in (" Maple  Tree", "a maple tree", "maple-tree", "Maple trees", "the maple_trees"):
        assert torch.equal(vocabulary.lookup(name), vocabulary.embeddings[0]), name
    assert vocabulary.lookup("maple") is None


def test_a_name_that_is_known_as_it_is_is_not_read_otherwise():
    known = ("glass", "glasses", "tap", "tape", "bow tie", "bow-tie", "the otter", "otter")
    vocabulary = vocabulary_of(HashEncoder(), known, [])
    for place, name in enumerate(known):
        assert torch.equal(vocabulary.lookup(name), vocabulary.embeddings[place]), name
    for name, meant in (("taps", "tap"), ("tapes", "tape"), ("bow-ties", "bow-tie")):
        assert torch.equal(vocabulary.lookup(name), vocabulary.lookup(meant)), name
