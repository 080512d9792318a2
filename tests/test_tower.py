"""The image tower: pictures become names, by a network that is not the generic one."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests.checkpoints import rehash
from tests.conftest import tiny_config
from tina.checkpoint import load_generator, save_generator
from tina.config import PromptConfig, RecipeConfig
from tina.configio import config_from_dict, config_to_dict
from tina.errors import CheckpointError, ConfigError, DataError
from tina.files import hash_file
from tina.generic import GenericModel, save_generic
from tina.pipeline import TinaPipeline
from tina.precision import settle
from tina.run import Run
from tina.tower import Tower, tower_family, tower_of

RECIPE = RecipeConfig(steps=40, batch_size=16, lr=3e-3)


def random_tower(generator, seed=0):
    """Untrained, but for running statistics that are no defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = tower_family(generator.family)
        trunk = family.new_trunk()
        for name, buffer in trunk.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
        family.attach_trunk(trunk)
        ids = generator.generic.class_ids
        rows = torch.randn(len(ids), 65)
    generic = GenericModel(class_ids=ids, body=torch.zeros(0), rows=rows)
    return Tower(family=family, generic=generic)


@pytest.fixture
def with_tower(tiny_generator):
    return replace(tiny_generator.with_prompt(tower=RECIPE), tower=random_tower(tiny_generator))


def images(count=3, seed=1):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_posterior_is_what_pictures_say_in_the_geometric_mean(with_tower):
    tower = with_tower.tower
    seen = tower.see(images())
    weight, bias = tower.generic.rows.split([64, 1], 1)
    alone = (seen @ weight.T + bias.T).softmax(1)
    torch.testing.assert_close(tower.posterior(seen[:1]), alone[0])  # Bayes' rule
    posterior = alone.log().mean(0).exp()
    posterior /= posterior.sum()
    torch.testing.assert_close(tower.posterior(seen), posterior)
    torch.testing.assert_close(tower.posterior(seen.flip(0)), posterior)
    torch.testing.assert_close(tower.posterior(seen.repeat(4, 1)), posterior)  # it is no surer
    pixels = (255 * images()).round().byte()
    torch.testing.assert_close(tower.see(pixels), tower.see(pixels / 255))


@pytest.mark.parametrize("lent", [1, 5, 8])
def test_lent_classes_are_together_as_probable_as_own_ones(with_tower, lent):
    own, seen = 10 - lent, with_tower.tower.see(images())
    plain = with_tower.tower.posterior(seen)
    found = replace(with_tower.tower, lent=lent).posterior(seen)
    # within either kind nothing changes
    for part in (slice(own), slice(own, 10)):
        torch.testing.assert_close(found[part] / found[part].sum(), plain[part] / plain[part].sum())
    # by Bayes' rule, of which it is the prior
    odds = (found[own:].sum() / found[:own].sum()) / (plain[own:].sum() / plain[:own].sum())
    assert odds.item() == pytest.approx(own / lent, rel=1e-4)


def test_pictures_are_named_by_the_tower_and_without_one_by_the_generic_model(
    with_tower, tiny_generator
):
    tower = with_tower.tower
    mean = tower.posterior(tower.see(images())) @ with_tower.vocabulary.embeddings
    torch.testing.assert_close(with_tower.embed_shots(images()), mean / mean.norm())
    (by_pipeline,) = TinaPipeline(with_tower, checkpoint="x").embed_images([images()])
    torch.testing.assert_close(by_pipeline, mean / mean.norm())
    itself = Tower(family=tiny_generator.family, generic=tiny_generator.generic)
    again = replace(with_tower, tower=itself).embed_shots(images())
    assert torch.equal(again, tiny_generator.embed_shots(images()))
    assert not torch.allclose(again, mean / mean.norm(), atol=1e-3)
    # and so it does of what it has seen before
    for generator in (with_tower, tiny_generator):
        seen = generator.judge.see(images())
        assert torch.equal(generator.embed_seen(seen), generator.embed_shots(images()))


@pytest.mark.parametrize("small", [False, True])
def test_a_checkpoint_keeps_its_tower(with_tower, tmp_path, small):
    save_generator(with_tower, tmp_path / "x", card="card", small=small)
    again = load_generator(tmp_path / "x")
    assert again.config == with_tower.config
    for name, value in with_tower.tower.tensors().items():
        wanted = value.half().to(value.dtype) if small and value.is_floating_point() else value
        assert torch.equal(again.tower.tensors()[name], wanted), name
    tolerance = 0.05 if small else 0
    expected, found = (g.tower.posterior(g.tower.see(images())) for g in (with_tower, again))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    # read and written, it is the same file
    save_generator(again, tmp_path / "y", card="card", small=small)
    assert hash_file(tmp_path / "x" / "manifest.json") == hash_file(tmp_path / "y/manifest.json")


def test_a_tower_that_the_configuration_promises_is_missing(with_tower, tmp_path):
    save_generator(with_tower, tmp_path / "x", card="card")
    (tmp_path / "x" / "tower.safetensors").unlink()
    rehash(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"does not fit .*tower\.safetensors"):
        load_generator(tmp_path / "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"class_ids": torch.arange(1, 11)},
        {"class_ids": torch.arange(9), "rows": torch.zeros(9, 65)},
        {"rows": torch.zeros(9, 65)},
        {"rows": torch.zeros(10, 33)},
    ],
)
def test_a_tower_of_other_classes_is_refused(with_tower, changes):
    tensors = with_tower.tower.tensors()
    assert tower_of(tensors, with_tower.generic, with_tower.family)
    with pytest.raises(CheckpointError, match="trained on other classes"):
        tower_of(tensors | changes, with_tower.generic, with_tower.family)


def test_clip_has_a_tower_already():
    with pytest.raises(ConfigError, match="open_clip has an image tower"):
        PromptConfig(encoder="open_clip", tower=RECIPE)


def test_its_recipe_is_read_and_settled_like_the_generic_models(monkeypatch):
    config = PromptConfig(tower=replace(RECIPE, precision="auto"))
    values = config_to_dict(config)
    assert config_from_dict(PromptConfig, values) == config
    assert config_from_dict(PromptConfig, {"tower": None}) == PromptConfig()
    monkeypatch.setattr("tina.precision.has_bf16", lambda *, cpu=False: not cpu)
    assert settle(values, {})["tower"]["precision"] == "fp32"  # on the job's own CPU


def test_a_run_trains_its_tower_once(tmp_path, monkeypatch):
    from ray_jobs.build_zoo import ensure_generic

    config = tiny_config(tmp_path, prompt=PromptConfig(tower=RECIPE))
    config = replace(config, classifier=replace(config.classifier, generic=RECIPE))
    ensure_generic(Run(config))
    run = Run(config)
    assert run.tower is not None
    assert run.tower.generic.class_ids == run.generic.class_ids
    generator = run.new_generator()
    assert generator.tower is run.tower
    assert generator.config.prompt.tower == RECIPE
    before = run.tower_file.read_bytes()
    monkeypatch.setattr("ray_jobs.build_zoo.train_generic", None)
    ensure_generic(Run(config))  # both are there
    assert run.tower_file.read_bytes() == before


def test_a_trained_run_may_be_given_a_tower(tiny_run, tiny_generator, tmp_path):
    plain = Run(replace(tiny_run.config, storage=str(tmp_path)))
    plain.claim()
    shutil.copy(tiny_run.generic_file, plain.generic_file)
    save_generator(tiny_generator, plain.trained, card="Trained for a moment.\n")
    assert plain.trained_generator().tower is None
    prompt = replace(plain.config.prompt, tower=RECIPE, shrinkage=0.5)
    run = Run(replace(plain.config, prompt=prompt))
    run.claim()
    with pytest.raises(DataError, match=r"has no image tower: run ray_jobs\.build_zoo"):
        run.trained_generator()
    tower = random_tower(tiny_generator)
    save_generic(run.tower_file, tower.generic, tower.family, run.dataset)
    found = run.trained_generator()
    assert found.config.prompt == prompt
    seen = tower.see(images())
    torch.testing.assert_close(found.tower.posterior(seen), tower.posterior(seen))
