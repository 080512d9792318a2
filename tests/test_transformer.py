"""The denoiser: starts at classifier selection, and knows classes by their conditions alone."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tina.asked import together
from tina.config import DenoiserConfig, DiffusionConfig
from tina.diffusion import as_x0, begin, sample
from tina.transformer import Denoiser, timestep_embedding

S, P, R, E = 3, 10, 7, 6  # body tokens, values per token, values of a row, embedding width


def new_denoiser(*, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(
            DenoiserConfig(width=16, depth=2, heads=2),
            body_tokens=S,
            token_width=P,
            row_width=R,
            embedding_width=E,
        )


def randomise(denoiser):
    """Every weight drawn anew, the zeros too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return denoiser.requires_grad_(False)


@pytest.fixture(scope="module")
def denoiser():
    return randomise(new_denoiser())


def draw(batch, classes, *, seed=0):
    """Noisy tokens x, timesteps t, conditions and a mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, S + classes, P, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    cond = torch.randn(batch, classes, E, generator=generator)
    return x, t, cond, torch.ones(batch, classes, dtype=torch.bool)


def assert_close(found, expected, *, tolerance):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --- step 0 ---------------------------------------------------------------------------------------


def test_an_untrained_denoiser_predicts_zero():
    x, t, cond, mask = draw(4, 5)
    assert not new_denoiser()(x, t, cond, mask).any()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 1.0), (4, 3.0)])
def test_an_untrained_generator_is_classifier_selection(tiny_run, sampler, steps, guidance):
    generator = tiny_run.new_generator()
    config = generator.config
    diffusion = dataclasses.replace(config.diffusion, sampler=sampler)
    generator = dataclasses.replace(
        generator, config=dataclasses.replace(config, diffusion=diffusion)
    )
    tasks = tiny_run.space.held_out["unseen_combination"]
    assert len({task.num_classes for task in tasks}) > 1
    embeddings, mask = generator.vocabulary.of([task.class_ids for task in tasks])
    seeds = range(len(tasks))
    body, rows = generator.generate(embeddings, mask, seeds=seeds, steps=steps, guidance=guidance)
    for i, task in enumerate(tasks):
        k = task.num_classes
        assert torch.equal(body[i], generator.generic.body)
        assert torch.equal(rows[i, :k], generator.generic.select(task.class_ids))
        assert not rows[i, k:].any()

    randomise(generator.denoiser)
    body, rows = generator.generate(embeddings, mask, seeds=seeds, steps=steps, guidance=guidance)
    assert not torch.allclose(body[0], generator.generic.body)
    assert not torch.allclose(rows[0, :2], generator.generic.select(tasks[0].class_ids[:2]))


# --- classes --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)), st.integers(1, 5))
def test_permuting_the_classes_permutes_the_rows(order, present):
    denoiser = randomise(new_denoiser())
    x, t, cond, mask = draw(2, 5)
    mask[1, present:] = False
    out = denoiser(x, t, cond, mask)
    body, rows = x[:, :S], x[:, S:]
    permuted = denoiser(torch.cat([body, rows[:, order]], 1), t, cond[:, order], mask[:, order])
    assert out[:, S:, :R].std() > 0.1
    assert_close(permuted[:, :S], out[:, :S], tolerance=1e-5)
    assert_close(permuted[:, S:], out[:, S:][:, order], tolerance=1e-5)


def test_a_row_depends_on_its_own_condition_and_on_its_neighbours(denoiser):
    x, t, cond, mask = draw(1, 4)
    out = denoiser(x, t, cond, mask)
    other = cond.clone()
    other[:, 2] += 1
    change = (denoiser(x, t, other, mask) - out).abs().amax(-1)[0]
    assert change.min() > 1e-3  # the body and every row
    swapped = denoiser(x, t, cond.flip(1), mask)  # conditions alone, the rows' tokens stay
    assert (swapped[:, S:] - out[:, S:]).abs().max() > 1e-2


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(-100, 100, width=32))
def test_padding_changes_nothing(classes, padding, value):
    denoiser = randomise(new_denoiser())
    x, t, cond, mask = draw(2, classes)
    out = denoiser(x, t, cond, mask)
    padded = denoiser(
        torch.cat([x, torch.full((2, padding, P), value)], 1),
        t,
        torch.cat([cond, torch.full((2, padding, E), -value)], 1),
        torch.cat([mask, mask.new_zeros(2, padding)], 1),
    )
    assert_close(padded[:, : S + classes], out, tolerance=3e-6)
    assert not padded[:, S + classes :].any()


def test_what_no_row_holds_is_zero(denoiser):
    x, t, cond, mask = draw(3, 4)
    mask[0, 1] = mask[2, 3] = False
    out = denoiser(x, t, cond, mask)
    assert not out[:, S:][~mask].any()
    assert not out[:, S:, R:].any()
    assert out[:, S:, :R][mask].ne(0).all()
    x[:, S:, R:] += 1
    assert torch.equal(denoiser(x, t, cond, mask), out)


def test_samples_do_not_see_one_another(denoiser):
    batch = draw(4, 5)
    out = denoiser(*batch)
    for i in range(4):
        alone = denoiser(*(part[i : i + 1] for part in batch))
        assert_close(alone, out[i : i + 1], tolerance=3e-6)


def test_classes_are_told_as_a_set_at_unit_scale(denoiser):
    _, _, cond, mask = draw(2, 4)
    mask[1, 2:] = False
    of_set = denoiser.prepare(cond, mask).chunk(3, -1)[2]
    for i, present in enumerate((4, 2)):
        want = denoiser.set_cond(cond[i, :present].sum(0) / present**0.5)
        assert_close(of_set[i], want.expand(4, -1), tolerance=1e-5)


# --- condition dropout ----------------------------------------------------------------------------


def test_a_dropped_condition_is_not_seen(denoiser):
    x, t, cond, mask = draw(4, 3)
    drop = torch.tensor([True, False, True, False])
    out = denoiser(x, t, cond, mask, drop)
    other = denoiser(x, t, cond + 1, mask, drop)
    assert torch.equal(other[drop], out[drop])
    assert (other - out)[~drop].abs().amax((1, 2)).min() > 1e-2
    assert_close(out[~drop], denoiser(x, t, cond, mask)[~drop], tolerance=3e-6)
    null = denoiser.null_cond.expand(4, 3, E)
    assert_close(out[drop], denoiser(x, t, null, mask)[drop], tolerance=3e-6)


def test_to_drop_none_is_to_drop_no_one(denoiser):
    x, t, cond, mask = draw(4, 3)
    nobody = torch.zeros(4, dtype=torch.bool)
    assert torch.equal(denoiser(x, t, cond, mask, nobody), denoiser(x, t, cond, mask))


# --- timesteps ------------------------------------------------------------------------------------


def test_timesteps_lie_on_circles_and_keep_their_distance():
    t = torch.arange(0, 1000, 37)
    codes = timestep_embedding(t, 32).double()
    assert codes.shape == (len(t), 32)
    products = codes @ codes.T
    assert_close(products.diagonal(), torch.full((len(t),), 16.0).double(), tolerance=1e-5)
    for lag in (1, 5):  # cos(a - b): a product depends on the difference alone
        along = products.diagonal(lag)
        assert_close(along, along[:1].expand_as(along), tolerance=1e-2)
        assert along[0] < 15


def test_timesteps_turn_at_the_rates_of_the_formula():
    found = timestep_embedding(torch.tensor([700.0]), 8)[0]
    angles = torch.tensor([700 / 10_000 ** (i / 4) for i in range(4)])
    assert_close(found, torch.cat([angles.cos(), angles.sin()]), tolerance=1e-4)


def test_the_timestep_matters(denoiser):
    x, _, cond, mask = draw(1, 3)
    early, late = (denoiser(x, torch.tensor([t]), cond, mask) for t in (10, 900))
    assert (early - late).abs().max() > 1e-2


# --- what does not change from step to step -------------------------------------------------------


def written_out(block, x, modulation, attend):
    """Peebles & Xie 2023, 3.2, one operation after another."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, -1)
    h = block.norm1(x) * (1 + scale1) + shift1
    q, k, v = (part.unflatten(-1, (block.heads, -1)) for part in block.qkv(h).chunk(3, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~attend, -torch.inf).softmax(-1)
    x = x + gate1 * block.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    return x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)


def test_a_block_is_the_formula(denoiser):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 16, generator=generator)
    modulation = torch.randn(3, 6 * 16, generator=generator)
    attend = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    attend[1, ..., 4:] = False
    block = denoiser.blocks[0]
    found = block(x, modulation, attend)
    assert_close(found, written_out(block, x, modulation, attend), tolerance=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
def test_generation_computes_what_the_whole_denoiser_does(
    tiny_generator, sampler, guidance, prediction
):
    denoiser = randomise(copy.deepcopy(tiny_generator.denoiser))
    for parameter in denoiser.parameters():
        parameter.mul_(0.2)
    diffusion = DiffusionConfig(sampler=sampler, prediction=prediction)
    config = dataclasses.replace(tiny_generator.config, diffusion=diffusion)
    generator = dataclasses.replace(tiny_generator, denoiser=denoiser, config=config)
    embeddings, mask = generator.vocabulary.of([(0, 1, 2, 3), (4, 5), (6, 7, 8)])
    seeds, steps = (3, 4, 5), 6
    found = generator.generate(embeddings, mask, seeds=seeds, steps=steps, guidance=guidance)
    length = generator.codec.body_tokens + 4
    walk = begin(
        diffusion,
        noise=generator.noise(seeds)[:, :length],
        cond=generator.vocabulary.condition(embeddings),
        mask=mask,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
    )
    tokens = sample(as_x0(denoiser, diffusion), walk)
    asked = generator.vocabulary.asked(embeddings)
    for part, plain in zip(found, generator.finish(tokens, asked, mask), strict=True):
        assert_close(part, plain, tolerance=1e-5)
    inherited = generator.inherit(embeddings)[0]
    assert (found[0] - inherited).abs().max() > 1e-2  # there was something to compare


def test_a_class_of_several_words_is_as_probable_as_the_mean_says(tiny_generator):
    """Jensen's bound of any of them, where there is no denoiser."""
    vocabulary, groups = tiny_generator.vocabulary, [[0, 1, 2], [3], [4, 5]]
    asked = vocabulary.asked_by_any([vocabulary.embeddings[own] for own in groups])
    every, mask = together([asked])
    codec = tiny_generator.codec
    tokens = torch.zeros(1, codec.body_tokens + 3, codec.width)
    _, rows = tiny_generator.finish(tokens, every, mask)
    features = torch.rand(50, rows.shape[-1] - 1, generator=torch.Generator().manual_seed(0))
    seen = torch.nn.functional.pad(features, (0, 1), value=1.0)
    logits, members = seen @ rows[0].T, seen @ tiny_generator.generic.rows.T
    for k, own in enumerate(groups):
        whole, mean = members[:, own].logsumexp(1), members[:, own].mean(1)
        assert (logits[:, k] < whole + 1e-5).all()
        assert_close(logits[:, k], mean + math.log(len(own)), tolerance=1e-5)
    alone = dataclasses.replace(every, breadth=torch.zeros(1, 3))
    plain = tiny_generator.finish(tokens, alone, mask)[1]
    assert torch.equal(plain[..., :-1], rows[..., :-1])
    assert torch.equal(plain[0, 1], rows[0, 1])


def test_logits_are_divided_by_what_is_unfamiliar(tiny_generator):
    known = tiny_generator.vocabulary.embeddings
    new = torch.nn.functional.normalize(known + known.roll(1, 0), dim=1)
    embeddings = torch.stack([known[[0, 1, 2]], known[[3, 4, 5]], new[[0, 4, 8]]])
    embeddings[1, 2] = new[6]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    milder = tiny_generator.with_prompt(doubt=1.5)
    plain, found = (g.generate(embeddings, mask, seeds=[0, 1, 2]) for g in (tiny_generator, milder))
    assert torch.equal(found[0], plain[0])
    # what is padding is unfamiliar, too, and does not count
    assert_close(found[1][:2], plain[1][:2], tolerance=1e-6)
    share = tiny_generator.vocabulary.familiarity(embeddings[2]).mean()
    assert 0.1 < share < 0.9
    assert_close((1 + 1.5 * (1 - share)) * found[1][2], plain[1][2], tolerance=1e-5)


def test_a_class_that_is_new_is_favoured(tiny_generator):
    known = tiny_generator.vocabulary.embeddings
    new = torch.nn.functional.normalize(known + known.roll(1, 0), dim=1)
    embeddings = torch.stack([known[0], new[2], known[5], new[6]]).unsqueeze(0)
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    familiarity = tiny_generator.vocabulary.familiarity(embeddings)
    assert 0.1 < familiarity[0, 1] < 0.9

    def generate(**values):
        return tiny_generator.with_prompt(**values).generate(embeddings, mask, seeds=[0])

    (body, rows), (same_body, favoured) = generate(), generate(favour=3.0)
    assert torch.equal(same_body, body)
    assert torch.equal(favoured[..., :-1], rows[..., :-1])
    # the logit of a trained class is what it was, a new one's is raised, and padding stays empty
    raised = (favoured - rows)[0, :, -1]
    assert_close(raised, 3 * (1 - familiarity[0]) * mask[0], tolerance=1e-5)
    # what is doubted is all of a logit
    both, doubted = (generate(doubt=1.5, favour=f)[1] for f in (3.0, 0.0))
    temperature = 1 + 1.5 * (1 - familiarity[0, :3].mean())
    assert_close((both - doubted)[0, :, -1] * temperature, raised, tolerance=1e-5)


def test_a_timestep_that_was_not_named_is_refused(tiny_generator):
    embeddings, mask = tiny_generator.vocabulary.of([(0, 1)])
    walk = tiny_generator.begin(embeddings, mask, seeds=[0], steps=4)
    with pytest.raises(IndexError):
        sample(tiny_generator.denoise_at([999, 749, 499]), walk)


# --- training -------------------------------------------------------------------------------------


def changed(denoiser, before):
    return {name for name, p in denoiser.named_parameters() if not torch.equal(p, before[name])}


def test_training_reaches_every_parameter():
    # the outputs start at zero, so they move first, then what feeds them; the timestep's own layers
    # wait for the modulations, which start at zero too
    denoiser = new_denoiser()
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    x, t, cond, mask = draw(8, 3)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    drop, reached = torch.arange(8) < 3, []
    for _ in range(3):
        optimiser.zero_grad()
        (denoiser(x, t, cond, mask, drop) - target).square().mean().backward()
        optimiser.step()
        reached.append(changed(denoiser, before))
    assert reached[0] == {"body_out", "row_out.weight", "row_out.bias"}
    gates = {f"blocks.{i}.modulation.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert reached[1] >= gates | {"body_in", "position", "row_in.weight", "null_cond"}
    assert reached[2] == set(before)


def test_noisy_tokens_come_in_quietly():
    """Beside positions of unit scale."""
    denoiser, x = new_denoiser(), draw(64, 1)[0]
    body = torch.einsum("bsp,spd->bsd", x[:, :S], denoiser.body_in)
    assert 0.05 < body.std() < 0.2
    assert 0.5 < denoiser.position.std() < 1.5
    assert denoiser.row_in.weight.abs().max() <= 0.1 / R**0.5
