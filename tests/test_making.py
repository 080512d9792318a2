"""Prompts that join and leave a denoising pass get the library's models, whoever is beside them."""

import pytest
import torch

from serve.ids import Recipe
from serve.making import Making
from tina import TinaPipeline
from tina.errors import NonFiniteError, PromptError
from tina.generator import Generator

CLASSES = ("three", "five", "eight", "nine")


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    with torch.random.fork_rng(devices=[]):  # larger outputs: prompts and seeds show
        torch.manual_seed(0)
        for parameter in pipe.generator.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


def new(pipe, made=lambda size, seconds: None):
    return Making(pipe, made=made)


def recipe(classes=3, *, seed=0, steps=4, guidance=1.0, **options):
    names = CLASSES[:classes]
    return Recipe(
        checkpoint="x", classes=names, seed=seed, steps=steps, guidance=guidance, **options
    )


def check(pipe, recipe, model):
    expected = pipe(
        list(recipe.classes),
        seed=recipe.seed,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance,
    )
    assert (model.class_names, model.seed, model.steps) == (
        expected.class_names,
        expected.seed,
        expected.steps,
    )
    assert model.familiarity == expected.familiarity
    assert model.nearest == expected.nearest
    torch.testing.assert_close(model.theta, expected.theta, atol=1e-5, rtol=0)


def run(making, arrivals, leaving=None):
    """A call per step; new recipes by the call before which they come, leavers likewise."""
    asked, found, sizes, call = {}, {}, [], 0
    while asked or any(when >= call for when, _ in arrivals):
        asked |= {i: r for i, (when, r) in enumerate(arrivals) if when == call}
        for ticket in (leaving or {}).get(call, ()):
            del asked[ticket]
        sizes.append(len(asked))
        ended = making(asked)
        found |= ended
        asked = {ticket: r for ticket, r in asked.items() if ticket not in ended}
        call += 1
    return found, sizes


ARRIVALS = [
    (0, recipe(2, seed=1, steps=6)),
    (1, recipe(4, seed=2, steps=3, guidance=2.0)),
    (1, recipe(3, seed=3, steps=7)),
    (4, recipe(2, seed=2**63 - 1, steps=1, guidance=0.0)),
    (5, recipe(3, seed=3, steps=7, guidance=1.5)),
    (15, recipe(2, seed=4)),
]


def test_prompts_that_join_a_running_pass_get_the_librarys_models(pipe):
    found, sizes = run(new(pipe), ARRIVALS)
    assert sorted(found) == list(range(len(ARRIVALS)))
    for ticket, (_, of) in enumerate(ARRIVALS):
        check(pipe, of, found[ticket])
    assert sizes == [1, 3, 3, 3, 3, 3, 2, 2, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]


def test_prompts_that_come_at_once_are_begun_together_where_steps_and_guidance_are_the_same(
    pipe, monkeypatch
):
    asked = [recipe(2, seed=5), recipe(4, seed=2, steps=3, guidance=2.0), recipe(3, seed=3)]
    begun, begin = [], Generator.begin

    def counted(self, embeddings, mask, **options):
        begun.append(len(embeddings))
        return begin(self, embeddings, mask, **options)

    monkeypatch.setattr(Generator, "begin", counted)
    found, _ = run(new(pipe), [(0, of) for of in asked])
    assert begun == [2, 1]
    for ticket, of in enumerate(asked):
        check(pipe, of, found[ticket])


def test_a_prompt_that_is_no_longer_wanted_leaves_and_the_others_stay(pipe):
    made = []
    making = new(pipe, lambda size, seconds: made.append(size))
    found, sizes = run(making, ARRIVALS[:3], leaving={3: [1]})
    assert sorted(found) == [0, 2]
    for ticket, model in found.items():
        check(pipe, ARRIVALS[ticket][1], model)
    assert sizes == [1, 3, 3, 2, 2, 2, 1, 1]
    assert made == [2, 1]


@pytest.mark.parametrize("steps", [2, 3], ids=["they end together", "it ends before the other"])
def test_a_model_that_is_not_finite_is_an_error_of_its_own(pipe, steps):
    arrivals = [(0, recipe(steps=2, guidance=1e38)), (0, recipe(steps=steps))]
    found, _ = run(new(pipe), arrivals)
    assert isinstance(found[0], NonFiniteError)
    check(pipe, arrivals[1][1], found[1])


def test_a_prompt_that_cannot_be_encoded_is_an_error_of_its_own(pipe, monkeypatch):
    error = PromptError("no")

    def refuse(texts):
        raise error

    monkeypatch.setattr(pipe.encoder, "encode_text", refuse)
    arrivals = [(0, recipe(descriptions=("a", "b", "c"))), (0, recipe())]
    found, sizes = run(new(pipe), arrivals)
    assert found[0] is error
    check(pipe, arrivals[1][1], found[1])
    assert sizes == [2, 1, 1, 1]


def test_after_a_failure_the_next_prompts_start_anew(pipe, monkeypatch):
    making = new(pipe)
    making({0: recipe(steps=4), 1: recipe(steps=5)})
    with monkeypatch.context() as patch:
        patch.setattr(pipe.generator.denoiser, "predict", None)
        with pytest.raises(TypeError):
            making({0: recipe(steps=4), 1: recipe(steps=5), 2: recipe(4)})
    *_, found = [making({3: recipe(2, seed=9)}) for _ in range(4)]
    check(pipe, recipe(2, seed=9), found[3])
