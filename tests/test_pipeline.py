"""The pipeline: forms of prompts, seeds and batches, pictures, files and graphs."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from test_checkpoint import head_generator

from tina.config import PromptConfig
from tina.encoders import EmbeddingSpace
from tina.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    PromptError,
    UnfamiliarWarning,
)
from tina.examples import learn_from
from tina.files import hash_file
from tina.generator import new_denoiser
from tina.images import resize
from tina.model import GeneratedModel, load_classifier
from tina.pipeline import TinaPipeline
from tina.storage import MANIFEST

TASK = ["zero", "seven", "four"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    # a dozen steps leave outputs near zero: larger ones, and prompts and seeds show
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in pipe.generator.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


@pytest.fixture(scope="module")
def pictures(tiny_run):
    """`fit` pictures of a class, (N, 1, 8, 8) in [0, 1]."""
    data = tiny_run.dataset

    def of(class_id, start=0, count=12):
        index = data.indices("fit", (class_id,))[start : start + count]
        return data.images[index].float() / 255

    return of


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- forms of a prompt ----------------------------------------------------------------------------


def test_a_list_of_names_is_one_task(pipe):
    model = pipe(TASK, seed=3, num_inference_steps=2)
    assert isinstance(model, GeneratedModel)
    assert model.class_names == tuple(TASK)
    assert (model.seed, model.steps) == (3, 2)
    assert model.theta.shape == (model.family.layout(3).size,)
    assert model.classifier(torch.rand(5, 1, 8, 8)).shape == (5, 3)


def test_default_number_of_steps_is_the_checkpoints(pipe):
    assert pipe(TASK).steps == pipe.generator.config.diffusion.sampling_steps
    assert torch.equal(pipe(TASK).theta, pipe(TASK, num_inference_steps=4).theta)
    assert not torch.equal(pipe(TASK).theta, pipe(TASK, num_inference_steps=1).theta)


@pytest.mark.parametrize(
    "sentence",
    ["zero, seven and four", "zero or Seven; FOUR", "zero,seven,and four", " zero\nseven\nfour "],
)
def test_a_sentence_is_split(pipe, sentence):
    model = pipe(sentence)
    assert [name.lower() for name in model.class_names] == TASK
    assert torch.equal(model.theta, pipe(TASK).theta)


def test_a_batch_is_a_list_in_its_order(pipe):
    tasks = [["one", "two"], ["nine", "three", "five", "six"], ["two", "one"]]
    models = pipe(tasks, seed=[5, 6, 7])
    assert isinstance(models, list)
    assert [list(model.class_names) for model in models] == tasks
    assert [model.seed for model in models] == [5, 6, 7]
    assert isinstance(pipe([["one", "two"]]), list)
    assert isinstance(pipe((("one", "two"), ("one", "three"))), list)


def test_a_generator_that_was_never_trained_without_condition_takes_no_guidance(pipe):
    denoiser = copy.deepcopy(pipe.generator.denoiser)
    denoiser.null_cond.data.zero_()
    led = TinaPipeline(replace(pipe.generator, denoiser=denoiser), checkpoint="x")
    assert torch.equal(led(TASK, guidance_scale=1.0).theta, pipe(TASK).theta)
    with pytest.raises(ConfigError, match="guidance must be 1"):
        led(TASK, guidance_scale=2.0)


def test_guidance_of_one_is_none(pipe):
    plain = pipe(TASK).theta
    assert torch.equal(pipe(TASK, guidance_scale=1.0).theta, plain)
    assert not torch.equal(pipe(TASK, guidance_scale=3.0).theta, plain)


def test_the_configurations_guidance_is_the_default(pipe):
    generator = pipe.generator
    diffusion = replace(generator.config.diffusion, guidance=3.0)
    config = replace(generator.config, diffusion=diffusion)
    other = TinaPipeline(replace(generator, config=config), checkpoint="x")
    assert torch.equal(other(TASK).theta, pipe(TASK, guidance_scale=3.0).theta)
    assert torch.equal(other(TASK, guidance_scale=1.0).theta, pipe(TASK).theta)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (None, {}, "a prompt is needed"),
        ("", {}, "at least 2 classes, got 0"),
        ("zero", {}, "at least 2 classes, got 1"),
        ([], {}, "at least 2 classes, got 0"),
        (["zero"], {}, "at least 2 classes, got 1"),
        (["zero", " "], {}, "empty"),
        (["zero", "Zero"], {}, "twice: zero"),
        (["zero", "a" * 1001], {}, "1001 characters"),
        (["a", "b", "c", "d", "e"], {}, "at most 4 classes, got 5"),
        ([["zero", "one"], ["two"]], {}, "at least 2 classes, got 1"),
        ([["zero", "one"], []], {}, "at least 2 classes, got 0"),
        ([["zero", "one"], "two"], {}, "not a mixture"),
        (TASK, {"seed": [1, 2]}, "1 tasks need as many seeds, got 2"),
        ([TASK, TASK], {"seed": [1]}, "2 tasks need as many seeds, got 1"),
        (TASK, {"descriptions": ["round", "slim"]}, "3 classes need as many descriptions, got 2"),
        (TASK, {"descriptions": ["round", "slim", "slim"]}, "each text .* twice: slim"),
        (TASK, {"descriptions": ["round", "slim", ""]}, "empty"),
        ([TASK], {"descriptions": ["a", "b", "c"]}, "not with a batch"),
        ([TASK], {"images": [torch.rand(1, 1, 8, 8)] * 3}, "not with a batch"),
        (None, {"images": []}, "at least 2 classes, got 0"),
        (None, {"images": [torch.rand(1, 1, 8, 8)] * 5}, "at most 4 classes, got 5"),
        (None, {"images": [torch.rand(1, 8, 8)] * 2}, r"tensors \(N, C, H, W\), .* got \(1, 8"),
        (None, {"images": [torch.rand(0, 1, 8, 8)] * 2}, r"got \(0, 1, 8, 8\)"),
        (None, {"images": [torch.rand(1, 3, 8, 8)] * 2}, "C = 1"),
        (None, {"images": [3, 4]}, "must be files, Pillow.s or tensors .* got int"),
        (TASK, {"images": 3}, "images are a list, in the order of the classes"),
        (TASK, {"images": [torch.rand(1, 1, 8, 8)] * 2}, "3 classes .* got 2"),
        (["a", "b"], {"images": [torch.rand(1, 1, 8, 8)] * 3}, "2 classes .* got 3"),
    ],
)
def test_prompts_that_name_no_task(pipe, prompt, options, message):
    with pytest.raises(PromptError, match=message) as refused:
        pipe(prompt, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_steps_out_of_range(pipe, steps):
    with pytest.raises(ConfigError, match=rf"1\.\.100, got {steps}"):
        pipe(TASK, num_inference_steps=steps)


def test_weights_that_are_not_finite_are_not_returned(tiny_checkpoint):
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    pipe.generator.denoiser.row_out.bias.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="nothing is returned"):
        pipe(TASK)


# --- seeds and batches ----------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bits(pipe, tiny_checkpoint):
    assert torch.equal(pipe(TASK, seed=11).theta, pipe(TASK, seed=11).theta)
    assert not torch.equal(pipe(TASK, seed=11).theta, pipe(TASK, seed=12).theta)
    for seed in (np.int64(11), torch.tensor(11)):
        assert torch.equal(pipe(TASK, seed=seed).theta, pipe(TASK, seed=11).theta)
    for seed in (None, 1.5, "11", [0.5]):
        with pytest.raises(PromptError, match="a seed is an integer"):
            pipe(TASK, seed=seed)
    one, other = (TinaPipeline.from_pretrained(tiny_checkpoint)(TASK, seed=11) for _ in range(2))
    assert torch.equal(one.theta, other.theta)
    batches = [[model.theta for model in pipe([TASK] * 8, seed=range(8))] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_seed_means_the_same_in_a_batch_of_64(pipe):
    models = pipe([TASK] * 64, seed=list(range(64)))
    for seed in (0, 1, 31, 63):
        close(models[seed].theta, pipe(TASK, seed=seed).theta)
    assert (models[0].theta - models[1].theta).abs().max() > 1e-3


def test_mixed_numbers_of_classes_do_not_disturb_each_other(pipe):
    tasks = [["one", "two"], ["nine", "three", "five", "six"], TASK]
    for model, task in zip(pipe(tasks, seed=9), tasks, strict=True):
        alone = pipe(task, seed=9)
        assert model.theta.shape == alone.theta.shape
        close(model.theta, alone.theta)
        assert model.familiarity == pytest.approx(alone.familiarity, abs=1e-6)


def test_a_draw_does_not_depend_on_the_number_of_classes():
    """Torch draws the last values of an odd count otherwise than those of a longer draw."""
    generator = head_generator()
    few, more = (
        generator.begin(*generator.vocabulary.of([ids]), seeds=[3]).x for ids in ((0, 1), (0, 1, 2))
    )
    assert few.shape[1:] == (2, 65)
    assert torch.equal(few, more[:, :2])


def test_an_ancestral_sampler_keeps_to_its_seeds(pipe):
    generator = pipe.generator
    diffusion = replace(generator.config.diffusion, sampler="ddpm")
    config = replace(generator.config, diffusion=diffusion)
    other = TinaPipeline(replace(generator, config=config), checkpoint="x")
    models = other([TASK] * 5, seed=[4, 5, 6, 7, 8])
    close(models[2].theta, other(TASK, seed=6).theta)
    assert not torch.equal(models[2].theta, models[3].theta)


def test_a_new_denoiser_is_its_seeds(pipe):
    generator = pipe.generator
    one, again, other = (
        new_denoiser(generator.config, generator.codec, dim=256, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.position, again.position)
    assert not torch.equal(one.position, other.position)


def test_the_prompt_counts(pipe):
    """Other classes, other weights; the same in another order, the same rows in that order."""
    layout = pipe.generator.family.layout(3)
    _, rows = layout.split(pipe(TASK).theta)
    _, others = layout.split(pipe(["zero", "seven", "five"]).theta)
    assert (rows[2] - others[2]).abs().max() > 0.01


# --- names, descriptions, familiarity -------------------------------------------------------------


def test_familiarity_of_known_names_is_one(pipe):
    model = pipe(["Zero", "NINE", "five"])
    assert model.familiarity == pytest.approx((1, 1, 1), abs=1e-6)
    assert model.nearest == ("zero", "nine", "five")


@pytest.mark.filterwarnings("error::tina.errors.UnfamiliarWarning")
def test_what_resembles_nothing_is_said(pipe):
    pipe(["zero", "seven"])
    with pytest.warns(UnfamiliarWarning, match="is not close to anything") as said:
        pipe([["zero", "seven"], ["zero", "quartz", "jump"]])
    assert [str(each.message).split()[0] for each in said] == ["'quartz'", "'jump'"]
    assert said[0].filename == __file__  # where the prompt stands


def test_familiarity_lies_between_0_and_1(pipe):
    names = ["zero", "zerro", "a wholly different thing", "xylophone"]
    found = pipe(names).familiarity
    assert all(0 <= value <= 1 for value in found)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert 0.3 < found[1] < 1
    assert max(found[2:]) < found[1]


def test_known_names_need_no_encoder(tiny_checkpoint, monkeypatch):
    def refuse(config):
        raise AssertionError("an encoder was built")

    monkeypatch.setattr("tina.pipeline.build_encoder", refuse)
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    pipe(["zero", "One", " two "])
    with pytest.raises(AssertionError, match="an encoder was built"):
        pipe(["zero", "something else"])


def test_known_and_new_names_keep_their_places(pipe):
    names = ["otter", "seven", "maple tree", "one"]
    found = pipe.embed_names(names)
    for row, name in zip(found, names, strict=True):
        close(row, pipe.encoder.encode_text([name])[0])
    assert pipe(names).class_names == tuple(names)


def test_a_class_that_is_any_of_several_words(pipe):
    """Its rows inherit of each of them alike, in whatever order they are said."""
    words = [["one", "seven"], ["zero"], ["four", "five", "nine"]]
    found = pipe(["thin", "zero", "others"], descriptions=words)
    turned = pipe(["thin", "zero", "others"], descriptions=[own[::-1] for own in words])
    close(found.theta, turned.theta)
    assert found.familiarity == (1, 1, 1)
    assert [found.nearest[i] in own for i, own in enumerate(words)] == [True] * 3
    generator = pipe.generator
    asked, names = pipe.ask(words), generator.vocabulary.trained_names
    for weights, own in zip(asked.attention, words, strict=True):
        share = dict(zip(names, weights.tolist(), strict=True))
        assert {name for name, w in share.items() if w} == set(own)
        assert all(share[name] == pytest.approx(1 / len(own)) for name in own)
    close(asked.embeddings.norm(dim=1), torch.ones(3))


def test_words_that_mean_the_same_make_a_class_no_broader(pipe):
    vocabulary = pipe.generator.vocabulary
    one, two, three = (vocabulary.lookup(name).unsqueeze(0) for name in ("one", "two", "three"))
    nearly = F.normalize(one + 0.01 * two, dim=-1)  # inherits as "one" does
    words = [torch.cat([one, two, three]), torch.cat([one, nearly]), one, torch.cat([two, three])]
    asked = vocabulary.asked_by_any(words)
    close(asked.breadth, torch.tensor([3.0, 1.0, 1.0, 2.0]).log())
    assert not asked.breadth[2]
    between = F.normalize(one + two, dim=-1)  # of either, and "two" again: in part another
    partly = vocabulary.asked_by_any([torch.cat([between, two]), one]).breadth[0]
    assert 0 < partly < torch.tensor(2.0).log()


def test_a_strange_word_among_several_is_warned_of(pipe):
    with pytest.warns(UnfamiliarWarning, match="'low' is not close"):
        found = pipe(["low", "five"], descriptions=[["one", "two", "a chair"], None])
    assert found.familiarity[0] == pipe(["a chair", "five"]).familiarity[0] < 0.5
    assert found.familiarity[1] == 1


def test_a_sentence_may_say_several_words_for_a_class(pipe):
    found = pipe("low: two, three; five; even: four or eight")
    words = [["two", "three"], None, ["four", "eight"]]
    expected = pipe(["low", "five", "even"], descriptions=words)
    assert found.class_names == ("low", "five", "even")
    assert torch.equal(found.theta, expected.theta)
    with pytest.raises(PromptError, match="describes classes itself"):
        pipe("low: two, three; five", descriptions=["one", None])


def test_one_word_in_a_list_is_that_word(pipe):
    alone = pipe(TASK)
    for given in ([[name] for name in TASK], [TASK[0], (TASK[1],), None]):
        found = pipe(TASK, descriptions=given)
        assert torch.equal(found.theta, alone.theta)
        assert (found.familiarity, found.nearest) == (alone.familiarity, alone.nearest)


def test_descriptions_take_the_place_of_names(pipe):
    described = pipe(["a", "b", "c"], descriptions=TASK)
    assert described.class_names == ("a", "b", "c")
    close(described.theta, pipe(TASK).theta)
    other = pipe(["a", "b", "c"], descriptions=["a round ring", "two slim strokes", "a chair"])
    assert not torch.allclose(other.theta, described.theta, atol=1e-3)


def test_a_class_without_description_goes_by_its_name(pipe):
    some = pipe(["zero", "b", "eight"], descriptions=[None, "one", None])
    close(some.theta, pipe(["zero", "one", "eight"]).theta)
    assert some.class_names == ("zero", "b", "eight")
    with pytest.raises(PromptError, match="each text may stand once in a task; twice: zero"):
        pipe(["zero", "b"], descriptions=[None, "zero"])


def test_descriptions_in_words_that_are_known_need_no_encoder(pipe, monkeypatch):
    monkeypatch.setattr(TinaPipeline, "encoder", None)
    close(pipe(["a", "b"], descriptions=["two", "one"]).theta, pipe(["two", "one"]).theta)


def test_descriptions_win_over_known_names(pipe):
    swapped = pipe(["zero", "one"], descriptions=["one", "zero"])
    close(swapped.theta, pipe(["one", "zero"]).theta)


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_instead_of_names(pipe, pictures):
    shots = [pictures(c) for c in (3, 8)]
    model = pipe(images=shots, seed=4)
    assert model.class_names == ("class 1", "class 2")
    assert model.classifier(torch.rand(2, 1, 8, 8)).shape == (2, 2)
    assert all(0 <= value <= 1 for value in model.familiarity)
    assert torch.equal(pipe(images=shots, seed=4).theta, model.theta)
    assert not torch.equal(pipe(images=shots[::-1], seed=4).theta, model.theta)


def test_names_only_label_pictures(pipe, pictures):
    shots = [pictures(c) for c in (3, 8)]
    named = pipe(["eight", "a thing"], images=shots)
    assert named.class_names == ("eight", "a thing")
    assert torch.equal(named.theta, pipe(images=shots).theta)


def test_pictures_of_any_size_and_number(pipe, pictures):
    shots = [torch.rand(1, 1, 30, 17), pictures(8)]
    assert pipe(images=shots).theta.isfinite().all()


def test_pictures_may_be_files_or_pillows(pipe, pictures, tmp_path):
    pixels = (255 * pictures(3, count=1)[0, 0]).byte().numpy()
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "three.png")
    expected = pipe.embed_images([torch.from_numpy(pixels)[None, None] / 255])
    for shots in (picture, tmp_path / "three.png", [str(tmp_path / "three.png")], [picture]):
        close(pipe.embed_images([shots]), expected)
    picture.load()  # it was not closed
    with pytest.raises(DataError, match=r"cannot read image none\.png"):
        pipe(images=["none.png", picture])


@pytest.mark.parametrize("field", ["images", "examples"])
def test_a_picture_shows_one_class(pipe, pictures, tmp_path, field):
    """As a name stands once in a task; within a class it may come twice."""
    Image.fromarray((255 * pictures(3, count=1)[0, 0]).byte().numpy()).save(tmp_path / "a.png")
    shots = [[tmp_path / "a.png"], pictures(8), [pictures(5), str(tmp_path / "a.png")]]
    with pytest.raises(PromptError, match="may show one class: 'three' and 'five' share one"):
        pipe(["three", "eight", "five"], **{field: shots})
    shots[2] = [pictures(5), pictures(5)]
    assert pipe(["three", "eight", "five"], **{field: shots}).theta.isfinite().all()


def test_a_picture_counts_the_same_beside_one_of_another_size(pipe, pictures):
    few = pictures(3)[:3]
    large = torch.nn.functional.interpolate(few, size=(24, 24))
    beside = pipe.embed_images([[few, large]])
    alone = pipe.embed_images([torch.cat([few, resize(large, 8)])])
    close(beside, alone)


def test_pictures_for_clip_are_cut_square_and_their_mean_has_unit_norm(pipe, monkeypatch):
    seen = []

    class Tower:
        def encode_images(self, images):
            seen.append(images.shape)
            return torch.nn.functional.normalize(images.flatten(1)[:, :256], dim=1)

    config = replace(pipe.generator.config, prompt=PromptConfig(encoder="open_clip"))
    other = TinaPipeline(replace(pipe.generator, config=config), checkpoint="x")
    other.__dict__["encoder"] = Tower()
    found = other.embed_images([torch.rand(3, 1, 20, 30), torch.rand(2, 1, 40, 24)])
    assert seen == [(3, 1, 20, 20), (2, 1, 24, 24)]
    close(found.norm(dim=1), torch.ones(2))


def test_pictures_lie_near_their_names(pipe, pictures):
    """For most classes, nearer to the own name than the names are on average."""
    names = pipe.generator.vocabulary.embeddings
    found = pipe.embed_images([pictures(c) for c in range(10)])
    close(found.norm(dim=1), torch.ones(10))
    similar = found @ names.T
    own = similar.diagonal()
    others = (similar.sum(1) - own) / 9
    assert (own > others).sum() >= 8


def test_pictures_are_the_names_by_their_posterior(pipe, pictures):
    """The geometric mean of Bayes' rule from a uniform prior, for each picture."""
    generator = pipe.generator
    shown = pictures(3)[:4]
    inputs = generator.family.embed(shown)
    likelihoods = generator.logits(generator.generic.body, generator.generic.rows, inputs)
    posterior = likelihoods.softmax(1).log().mean(0).softmax(0)
    mean = sum(p * e for p, e in zip(posterior, generator.vocabulary.embeddings, strict=True))
    close(generator.embed_shots(shown), mean / mean.norm())
    close(generator.embed_shots(shown.repeat(50, 1, 1, 1)), mean / mean.norm())


def test_rows_of_pictures_learn_from_them_as_far_as_they_are_new(pipe, pictures):
    generator, shown = pipe.generator, [pictures(3)[:4], pictures(8)[:2]]
    embeddings = pipe.embed_images(shown)
    asked = generator.vocabulary.asked(embeddings)
    (plain,) = pipe.generate([asked], [("mine", "yours")], seeds=[0])
    found = pipe(["mine", "yours"], images=shown)
    assert found.familiarity == plain.familiarity
    inputs = [generator.family.embed(few) for few in shown]
    close(found.theta, learn_from(generator, plain.theta, asked.familiarity, inputs))
    assert not torch.allclose(found.theta, plain.theta, atol=1e-3)
    logits = found.classifier(torch.cat(shown))
    labels = torch.tensor([0] * 4 + [1] * 2)
    assert F.cross_entropy(logits, labels) < F.cross_entropy(
        plain.classifier(torch.cat(shown)), labels
    )


def test_pictures_are_taken_for_trained_names_alone():
    """The generic model's rows are the trained classes': here all but the fourth."""
    generator = head_generator()
    generator.generic.rows[3, -1] = 1e4
    found = generator.embed_shots(torch.zeros(2, 3, 16, 16))
    close(found, generator.vocabulary.embeddings[4])


# --- files ----------------------------------------------------------------------------------------


def test_a_classifier_that_was_trained_on_is_what_is_written(pipe, tmp_path):
    model, images = pipe(TASK, seed=2), torch.rand(4, 1, 8, 8)
    before = model.classifier(images)
    model.classifier.network.requires_grad_(True)
    F.cross_entropy(model.classifier(images), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD(model.classifier.network.parameters(), lr=0.1).step()
    after = model.classifier(images).detach()
    assert not torch.allclose(after, before)
    model.save(tmp_path / "mine.safetensors")
    assert torch.equal(load_classifier(tmp_path / "mine.safetensors")(images), after)
    model.export_onnx(tmp_path / "mine.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "mine.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    close(torch.from_numpy(logits), after)


def test_models_are_compared_and_shown(pipe):
    model = pipe(TASK)
    assert model != pipe(TASK)  # by identity; theta says whether they are alike
    assert (
        repr(model)
        == f"GeneratedModel(zero, seven, four; cnn5k of {len(model.theta):,} parameters)"
    )


def test_a_file_is_called_what_it_is(pipe, tmp_path):
    model = pipe(TASK)
    with pytest.raises(DataError, match=r"mine\.onnx must end in \.safetensors"):
        model.save(tmp_path / "mine.onnx")
    with pytest.raises(DataError, match=r"mine must end in \.onnx"):
        model.export_onnx(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_it_denoises_on_the_device_that_it_is_told(tiny_checkpoint):
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    with pytest.raises(ConfigError, match="cannot denoise on nonsense"):
        pipe.to("nonsense")
    assert pipe.to("cpu") is pipe
    assert pipe(TASK).theta.device.type == "cpu"
    pipe.to("meta")
    assert pipe.generator.denoiser.position.device.type == "meta"


def test_saved_classifier_gives_the_same_bits(pipe, tiny_checkpoint, tmp_path):
    model = pipe(TASK, seed=2)
    model.save(tmp_path / "mine.safetensors")
    again = load_classifier(tmp_path / "mine.safetensors")
    images = torch.rand(4, 1, 11, 9)
    assert torch.equal(again(images), model.classifier(images))
    assert again.class_names == tuple(TASK)
    assert not again.training

    with safe_open(tmp_path / "mine.safetensors", "pt") as stream:
        metadata = stream.metadata()
    assert metadata == {
        "format": "tina-classifier-1",
        "family": "cnn5k",
        "class_names": json.dumps(TASK),
        "input_shape": "[1, 8, 8]",
        "checkpoint_sha256": hash_file(tiny_checkpoint / MANIFEST),
        "seed": "2",
        "steps": "4",
    }


def test_classifier_is_fit_for_photographs(pipe):
    """Any size; what it does inside is cut, resize, normalise, run the network."""
    model = pipe(TASK)
    family, images = model.family, torch.rand(3, 1, 8, 8)
    want = family.logits(model.theta, images * 2 - 1, num_classes=3)
    close(model.classifier(images), want)
    large = torch.rand(3, 1, 21, 34)
    small = F.interpolate(large[..., 6:27], size=(8, 8), mode="bilinear", antialias=True)
    want = family.logits(model.theta, small * 2 - 1, num_classes=3)
    close(model.classifier(large), want)


def test_class_names_survive_unicode(pipe, tmp_path):
    names = ['a "quoted" name', "Füchse, viele", "狐"]
    pipe(names).save(tmp_path / "m.safetensors")
    assert load_classifier(tmp_path / "m.safetensors").class_names == tuple(names)


def test_checkpoint_round_trip_through_the_pipeline(tiny_checkpoint, tmp_path):
    pipe = TinaPipeline.from_pretrained(str(tiny_checkpoint))
    pipe.save_pretrained(tmp_path / "again")
    again = TinaPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TASK).theta, pipe(TASK).theta)
    assert again.checkpoint == pipe.checkpoint  # the card too is the same


@pytest.mark.parametrize(
    "name", ["missing", "/no/such/folder", "./missing/one", "a/b/c", "not a name!/bad name!"]
)
def test_names_of_no_checkpoint(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(CheckpointError) as refused:
        TinaPipeline.from_pretrained(name)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_embedding_space_is_refused(pipe):
    generator = pipe.generator
    vocabulary = replace(
        generator.vocabulary, space=EmbeddingSpace(model="other", dim=256, template="{}")
    )
    other = TinaPipeline(replace(generator, vocabulary=vocabulary), checkpoint="x")
    other(TASK)  # known names need no encoder
    with pytest.raises(ConfigError, match=r"hash-ngram-v1.*was trained in.*other"):
        other(["zero", "an otter"])


def test_another_encoder_is_refused(pipe):
    config = replace(pipe.generator.config, prompt=PromptConfig(encoder="sentence"))
    other = TinaPipeline(replace(pipe.generator, config=config), checkpoint="x")
    with pytest.raises(ConfigError, match=r"minilm-l6-v2.*was trained in.*hash-ngram-v1"):
        other(["zero", "an otter"])


@pytest.mark.parametrize("size", [(28, 28), (28, 41), (41, 28), (28, 29)])
def test_a_classifier_sees_the_centre_square(pipe, size):
    """As data sets are cut: an oblong picture is not squashed."""
    height, width = size
    photo = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
    top, left = (height - 28) // 2, (width - 28) // 2
    cut = photo[..., top : top + 28, left : left + 28]
    classifier = pipe(TASK, seed=1).classifier
    assert torch.equal(classifier(photo), classifier(cut))
    shots = [photo, photo.flip(0)] if size == (28, 28) else [photo, cut]
    first, second = pipe.embed_images(shots)
    assert torch.allclose(first, second, atol=1e-6)


# --- ONNX -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    model, file = pipe(TASK, seed=1), tmp_path_factory.mktemp("onnx") / "mine.onnx"
    model.export_onnx(file)
    return model, file


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (40, 33)])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_torch(exported, size, batch):
    model, file = exported
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(batch))
    (found,) = session.run(["logits"], {"images": images.numpy()})
    want = model.classifier(images)
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=0, atol=1e-4)
    assert want.std() > 0.05  # or the comparison would say nothing


def test_onnx_says_what_it_is(exported):
    _, file = exported
    graph = onnx.load(str(file))
    onnx.checker.check_model(graph, full_check=True)
    assert {p.key: p.value for p in graph.metadata_props}["class_names"] == json.dumps(TASK)
    (opset,) = [o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")]
    assert opset == 18
    assert [i.name for i in graph.graph.input] == ["images"]
    assert [o.name for o in graph.graph.output] == ["logits"]
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    assert [bool(d.dim_param) for d in dims] == [True, False, True, True]
    assert dims[1].dim_value == 1
    assert [f.name for f in file.parent.iterdir()] == ["mine.onnx"]  # weights are inside
    assert b".py" not in file.read_bytes()  # nor does it say where the exporter's code lies


@pytest.mark.slow
def test_onnx_is_the_same_from_every_process(tiny_checkpoint, tmp_path):
    made = []
    for seed in ("1", "2"):  # of Python's own hashes
        file = tmp_path / f"{seed}.onnx"
        script = (
            "import sys; from tina import TinaPipeline; "
            "TinaPipeline.from_pretrained(sys.argv[1])(['three', 'five']).export_onnx(sys.argv[2])"
        )
        command = [sys.executable, "-c", script, str(tiny_checkpoint), str(file)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        made.append(file.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: (255 * x).to(torch.uint8),
        lambda x: 2 * x,
        lambda x: x - 1,
        lambda x: torch.full_like(x, torch.nan),
    ],
    ids=["uint8", "above 1", "below 0", "nan"],
)
def test_pictures_outside_of_0_to_1(pipe, pictures, spoil):
    with pytest.raises(PromptError, match="floating point"):
        pipe(images=[spoil(pictures(c)) for c in (3, 8)])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([], "has no pictures"),
        ([[0.5]], "got list"),
        (torch.rand(1, 8, 8), r"got \(1, 8, 8\)"),
        ([torch.rand(1, 3, 8, 8)], "C = 1"),
    ],
)
def test_what_is_no_picture(pipe, images, reason):
    with pytest.raises(PromptError, match=reason):
        pipe(images=[images, torch.rand(1, 1, 8, 8)])


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (5, {}),
        ([["one", 5], ["two", "three"]], {}),
        (["one", "two"], {"descriptions": "ab"}),
        (["one", "two"], {"descriptions": {"one": "three", "two": "four"}}),
        (["one", "two"], {"images": {"one": "three.png", "two": "four.png"}}),
        (["one", "two"], {"descriptions": ["three", 4]}),
        (["one", "two"], {"descriptions": [["three", 4], None]}),
        (["one", "two"], {"descriptions": [["three", "four"], ["Four"]]}),
        (["one", "two"], {"descriptions": [["three", "four"], []]}),
        (["one", "two"], {"descriptions": [[f"word {i}" for i in range(17)], None]}),
    ],
)
def test_what_is_no_text(pipe, prompt, options):
    with pytest.raises(PromptError):
        pipe(prompt, **options)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, -(2**64)])
def test_seeds_out_of_range(pipe, seed):
    with pytest.raises(PromptError, match="seed"):
        pipe(["one", "two"], seed=seed)
