"""Whatever a user can get wrong: a typed error, one line, exit status 2, and no file touched."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from checkpoints import edit_header, rehash
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ray_jobs.build_zoo import ensure_generic
from ray_jobs.job import run_job
from tina import TinaPipeline, load_classifier
from tina.checkpoint import check_manifest
from tina.cli import main
from tina.configio import config_from_dict, config_to_dict, parse_config
from tina.errors import CheckpointError, ConfigError, DataError, NonFiniteError, PromptError
from tina.generic import GenericModel, save_generic
from tina.images import read_image
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.zoo import open_zoo, read_zoo

NAMES = ["one", "two", "five"]


def snapshot(folder):
    """Content of everything below a folder."""
    return {
        str(file.relative_to(folder)): file.is_file() and file.read_bytes()
        for file in folder.rglob("*")
    }


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINA_CHECKPOINT", raising=False)
    return tmp_path


@pytest.fixture
def refuse(workplace, capsys):
    """Run a command that must be refused; returns its one line."""

    def run(*words):
        before = snapshot(workplace)
        assert main([str(word) for word in words]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        (line,) = found.err.splitlines()
        assert line.startswith("error: ")
        assert snapshot(workplace) == before
        return line

    return run


@pytest.fixture
def generate(refuse, tiny_checkpoint):
    """Run a `tina generate` that must be refused."""
    return partial(
        refuse, "generate", "--checkpoint", tiny_checkpoint, "--out", "m.safetensors", "--force"
    )


@pytest.fixture
def checkpoint(workplace, tiny_checkpoint):
    """A checkpoint that may be damaged."""
    return shutil.copytree(tiny_checkpoint, workplace / "checkpoint")


@pytest.fixture
def run_folder(workplace, tiny_run, tiny_checkpoint):
    """A finished run that may be damaged."""
    folder = shutil.copytree(tiny_run.folder, workplace / "tiny")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return TinaPipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture
def model(workplace, pipe):
    """A classifier file that may be damaged."""
    pipe(NAMES).save(workplace / "model.safetensors")
    return workplace / "model.safetensors"


@pytest.fixture
def picture(workplace):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(workplace / "picture.png")
    return workplace / "picture.png"


# --- prompts --------------------------------------------------------------------------------------

PROMPTS = {
    "no class": (["", ""], "a class name is empty"),
    "one class": (["one", " "], "a class name is empty"),
    "twice": (["One", "two", "one"], "twice: one"),
    "underscores": (["maple_tree", "maple tree"], "twice: maple tree"),
    "too many": (["one", "two", "three", "four", "five"], "at most 4 classes, got 5"),
    "very long": (["x" * 1001, "one"], "has 1001 characters, at most 1000"),
    "huge": (["word " * 100_000, "one"], "at most 1000"),
    "not Unicode": (["one", "\udcff"], "not valid Unicode"),
}
SENTENCES = {
    "empty": ("", "at least 2 classes, got 0"),
    "only separators": (" , and ;", "at least 2 classes, got 0"),
    "one class": ("three", "at least 2 classes, got 1"),
    "twice": ("one, two and ONE", "twice: one"),
    "too many": (",".join(map(str, range(9))), "at most 4 classes, got 9"),
    "very long": ("x" * 10_000 + " and one", "has 10000 characters"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_names_that_are_no_task(case, generate, pipe):
    names, reason = PROMPTS[case]
    with pytest.raises(PromptError, match=reason):
        pipe(names)
    assert reason in generate(*names)


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences_that_are_no_task(case, generate, pipe):
    sentence, reason = SENTENCES[case]
    with pytest.raises(PromptError, match=reason):
        pipe(sentence)
    assert reason in generate(sentence)


def test_no_prompt_at_all(generate, pipe):
    with pytest.raises(PromptError, match="a prompt is needed"):
        pipe()
    assert "at least 2 classes" in generate()


def test_mixed_prompts_and_wrong_counts(pipe):
    with pytest.raises(PromptError, match="not a mixture"):
        pipe(["one", ["two"]])
    for nothing in ([], [[]], [["one", "two"], []]):
        with pytest.raises(PromptError, match="at least 2 classes, got 0"):
            pipe(nothing)
    with pytest.raises(PromptError, match="2 tasks need as many seeds, got 1"):
        pipe([["one", "two"], ["two", "five"]], seed=[0])
    with pytest.raises(PromptError, match="2 classes need as many descriptions, got 1"):
        pipe(["one", "two"], descriptions=["a stroke"])
    with pytest.raises(PromptError, match="not with a batch"):
        pipe([["one", "two"]], descriptions=["a stroke", "a swan"])


def test_descriptions_and_pictures_must_fit_the_prompt(generate, picture):
    assert "three" in generate("one or two", "--description", "three=a bird")
    assert "two" in generate("one or two", "--image", f"one={picture}")
    assert "zebra" in generate("one or two", "--image", f"zebra={picture}")
    assert "at least 2" in generate("--image", f"one={picture}")
    assert "twice" in generate("one or two", "--description", "one=two")


# --- options --------------------------------------------------------------------------------------


def test_steps_and_guidance_out_of_range(generate, pipe):
    for steps in (0, 101):
        with pytest.raises(ConfigError, match=r"must lie in 1\.\.100"):
            pipe(NAMES, num_inference_steps=steps)
    assert "1..100, got 101" in generate(*NAMES, "--steps", 101)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        pipe(NAMES, guidance_scale=float("nan"))
    assert "NaN or infinite" in generate(*NAMES, "--guidance", "nan")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["unknown"],
        ["generate", "one or two"],
        ["generate", "one or two", "--out", "m", "--seed", "-1"],
        ["generate", "one or two", "--out", "m", "--seed", str(2**63)],
        ["generate", "one or two", "--out", "m", "--steps", "0"],
        ["generate", "one or two", "--out", "m", "--image", "one"],
        ["generate", "one or two", "--out", "m", "--image", "=one.png"],
        ["generate", "--out", "m", "--image", "one=a.png", "--description", "one=a"],
        ["classify", "m"],
        ["evaluate", "runs/quickstart", "--steps", "1,,2"],
        ["evaluate", "runs/quickstart", "--images-per-class", "0"],
    ],
)
def test_usage_errors_exit_with_2(words, workplace, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert ": error: " in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(workplace) == {}


# --- images ---------------------------------------------------------------------------------------


def _text(file):
    file.write_text("no picture")


def _empty(file):
    file.write_bytes(b"")


def _truncated(file):
    Image.effect_noise((64, 64), 50).save(file, format="PNG")
    file.write_bytes(file.read_bytes()[:-2000])


def _deep(file):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file, format="PNG")


def _missing(file):
    assert not file.exists()


def _folder(file):
    file.mkdir()


@pytest.mark.parametrize("damage", [_text, _empty, _truncated, _deep, _missing, _folder])
def test_corrupt_images(damage, refuse, generate, workplace, model, picture):
    file = workplace / "bad.png"
    damage(file)
    with pytest.raises(DataError, match=r"bad\.png"):
        read_image(file, channels=1)
    assert "bad.png" in refuse("classify", model, file)
    shots = ["--image", f"one={picture}", "--image", f"two={file}"]
    assert "bad.png" in generate(*shots)


def test_pictures_of_another_shape(pipe):
    with pytest.raises(PromptError, match=r"C = 1, got \(1, 3, 8, 8\)"):
        pipe(images=[torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8)])


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def refuse_checkpoint(refuse, checkpoint):
    """Both the library and the commands refuse the checkpoint, for the same reason."""

    def check(reason, error=CheckpointError):
        with pytest.raises(error, match=reason) as raised:
            TinaPipeline.from_pretrained(checkpoint)(NAMES)
        line = "error: " + " ".join(str(raised.value).split())
        named = ["--checkpoint", checkpoint]
        assert refuse("generate", *NAMES, "--out", "m.safetensors", *named) == line

    return check


def test_what_git_and_the_hub_add_is_no_part_of_a_checkpoint(checkpoint):
    (checkpoint / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (checkpoint / ".git").mkdir()
    (checkpoint / ".cache").mkdir()
    check_manifest(checkpoint)


def test_a_changed_byte_in_a_checkpoint(checkpoint, refuse_checkpoint):
    file = checkpoint / "codec.safetensors"
    *content, last = file.read_bytes()
    file.write_bytes(bytes([*content, last ^ 1]))
    refuse_checkpoint("was changed: its sha256 is not the manifest's")


def test_an_unknown_family_in_a_checkpoint(checkpoint, refuse_checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())["config"]
    config["classifier"]["family"] = "cnn6k"
    edit_header(checkpoint, config=config)
    refuse_checkpoint("unknown family 'cnn6k'")


def test_another_width_than_the_weights(checkpoint, refuse_checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())["config"]
    config["denoiser"]["width"] = 64
    edit_header(checkpoint, config=config)
    refuse_checkpoint("size mismatch")


@pytest.mark.parametrize("name", ["model.safetensors", "codec.safetensors"])
def test_nan_in_a_checkpoint(name, checkpoint, refuse_checkpoint):
    tensors = load_file(checkpoint / name)
    save_file(
        {key: torch.full_like(value, float("nan")) for key, value in tensors.items()},
        checkpoint / name,
    )
    rehash(checkpoint)
    refuse_checkpoint("NaN or infinite weights", NonFiniteError)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("codec.safetensors", "generic_body"),
        ("codec.safetensors", "generic_rows"),
        ("prompts.safetensors", "embeddings"),
        ("prompts.safetensors", "trained"),
    ],
)
def test_a_tensor_that_is_cut_short_behind_a_true_manifest(
    name, key, checkpoint, refuse_checkpoint
):
    tensors = load_file(checkpoint / name)
    tensors[key] = tensors[key][..., :-1].clone()
    save_file(tensors, checkpoint / name)
    rehash(checkpoint)
    refuse_checkpoint("must have the shape")


@pytest.mark.parametrize("card", [None, b"\xff"])
def test_a_card_that_is_missing_or_no_text_behind_a_true_manifest(
    card, checkpoint, refuse_checkpoint
):
    file = checkpoint / "README.md"
    file.unlink() if card is None else file.write_bytes(card)
    rehash(checkpoint)
    refuse_checkpoint("has no model card")


@pytest.mark.parametrize("command", ["generate", "info"])
def test_no_checkpoint_at_all(command, refuse, workplace):
    words = [*NAMES, "--out", "m.safetensors"] if command == "generate" else []
    option = ["--checkpoint"] if command == "generate" else []
    assert "no checkpoint" in refuse(command, *words, *option, workplace / "none")
    (workplace / "empty").mkdir()
    assert "no manifest.json" in refuse(command, *words, *option, workplace / "empty")


# --- classifier files -----------------------------------------------------------------------------


def rewrite(file, *, change=lambda tensors: tensors, **metadata):
    with safe_open(str(file), "pt") as stream:
        old = stream.metadata()
    tensors = change(load_file(file))
    new = {key: value for key, value in (old | metadata).items() if value is not None}
    save_file(tensors, file, new)


def _one_nan(tensors):
    tensors["fc.bias"][0] = float("nan")
    return tensors


def _trunk_more(tensors):
    return tensors | {"trunk.stem.weight": torch.zeros(16, 1, 3, 3)}


def _one_infinity(tensors):
    tensors["convs.0.weight"][0, 0, 0, 0] = float("inf")
    return tensors


def _row_less(tensors):
    return tensors | {"fc.bias": tensors["fc.bias"][:-1]}


def _body_less(tensors):
    return {key: value for key, value in tensors.items() if key != "convs.1.weight"}


def _tensor_more(tensors):
    return tensors | {"extra": torch.zeros(1)}


def _strangers(file):
    save_file({"weight": torch.zeros(3)}, file)


def _strangers_metadata(file):
    save_file({"weight": torch.zeros(3)}, file, {"format": "pt"})


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


MODELS = {
    "nan": (partial(rewrite, change=_one_nan), NonFiniteError, "NaN or infinity"),
    "infinity": (partial(rewrite, change=_one_infinity), NonFiniteError, "NaN or infinity"),
    "row": (partial(rewrite, change=_row_less), CheckpointError, "another layout"),
    "body": (partial(rewrite, change=_body_less), CheckpointError, "another layout"),
    "extra": (partial(rewrite, change=_tensor_more), CheckpointError, "another layout"),
    "trunk": (partial(rewrite, change=_trunk_more), CheckpointError, "another layout"),
    "names": (partial(rewrite, class_names='["a"]'), CheckpointError, "another layout"),
    "family": (partial(rewrite, family="cnn6k"), ConfigError, "unknown family 'cnn6k'"),
    "stranger": (_strangers, CheckpointError, "not a classifier that Tina wrote"),
    "other tool": (_strangers_metadata, CheckpointError, "not a classifier that Tina wrote"),
    "text": (_text, CheckpointError, "not a readable safetensors file"),
    "empty": (_empty, CheckpointError, "not a readable safetensors file"),
    "cut": (_cut, CheckpointError, "not a readable safetensors file"),
    "missing": (lambda file: file.unlink(), CheckpointError, "there is no "),
    "folder": (
        lambda file: (file.unlink(), file.mkdir()),
        CheckpointError,
        "is a folder, not a classifier",
    ),
}
UNTRUSTED = {
    "no family": partial(rewrite, family=None),
    "no names": partial(rewrite, class_names=None),
    "names no JSON": partial(rewrite, class_names="one, two"),
    "shape of two": partial(rewrite, input_shape="[1, 8]"),
}
UNTRUSTED |= {
    f"names {names}": partial(rewrite, class_names=names)
    for names in ('[["one"], ["two"]]', '"ab"', '{"one": 1, "two": 2}', '["one", 2]')
}
UNTRUSTED |= {
    f"shape {shape}": partial(rewrite, input_shape=shape)
    for shape in ("[1, 0, 0]", "[1, -3, 0]", "[1, 2.5, 0]", '[1, "8", 8]', "[true, 8, 8]", '"188"')
}
UNTRUSTED |= {  # images are resized to it, to gigabytes
    f"shape {shape}": partial(rewrite, input_shape=shape)
    for shape in ("[1, 8, 16]", "[1, 20000, 20000]")
}
WHOLE = "is not a whole classifier"
MODELS |= {key: (damage, CheckpointError, WHOLE) for key, damage in UNTRUSTED.items()}


@pytest.mark.parametrize(
    "case",
    list(MODELS),
)
def test_models_that_are_refused(case, model, picture, refuse):
    damage, error, reason = MODELS[case]
    damage(model)
    with pytest.raises(error, match=reason):
        load_classifier(model)
    assert reason in refuse("classify", model, picture)
    assert reason in refuse("export", model, "--onnx", "m.onnx")
    if case != "folder":  # which `info` takes for a checkpoint
        assert reason in refuse("info", model)


# --- outputs --------------------------------------------------------------------------------------


def test_existing_outputs_stay(refuse, workplace, model, tiny_checkpoint):
    (workplace / "there.safetensors").write_text("mine")
    (workplace / "there.onnx").write_text("mine")
    make = ["generate", *NAMES, "--checkpoint", tiny_checkpoint]
    assert "--force" in refuse(*make, "--out", "there.safetensors")
    assert "--force" in refuse(*make, "--out", "new.safetensors", "--onnx", "there.onnx")
    assert "--force" in refuse("export", model, "--onnx", "there.onnx")


def test_outputs_that_cannot_be_written(refuse, generate, workplace, model):
    (workplace / "file").write_text("mine")
    assert "file" in generate(*NAMES, "--onnx", "file/m.onnx")
    assert "file" in generate(*NAMES, "--out", "file/m.safetensors")
    (workplace / "folder.safetensors").mkdir()
    assert "regular file" in generate(*NAMES, "--out", "folder.safetensors")
    assert "must end in .onnx" in generate(*NAMES, "--onnx", workplace / "m.safetensors")
    assert "file" in refuse("export", model, "--onnx", "file/m.onnx")


# --- configurations -------------------------------------------------------------------------------


def edit_config(folder, section, **changes):
    file = folder / "config.yaml"
    values = yaml.safe_load(file.read_text())
    target = values[section] if section else values
    target.update(changes)
    file.write_text(yaml.safe_dump(values))


CONFIGS = {
    "data set": ("data", {"name": "imagenet"}, "unknown data set 'imagenet'; valid: digits"),
    "family": ("classifier", {"family": "cnn6k"}, "unknown family 'cnn6k'; known: cnn5k"),
    "key": ("", {"optimizer": "sgd"}, "valid keys: name, storage, tracking, data.name"),
    "nested key": ("train", {"learning_rate": 1}, "train.weight_decay"),
    "type": ("train", {"steps": "many"}, "train.steps"),
    "value": ("tasks", {"min_classes": 9}, "got 9 and 4"),
    "choice": ("prompt", {"encoder": "bert"}, "open_clip"),
    "precision": ("train", {"precision": "fp8"}, "bf16"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(case, refuse, run_folder):
    section, changes, reason = CONFIGS[case]
    edit_config(run_folder, section, **changes)
    assert reason in refuse("evaluate", run_folder)
    with pytest.raises(ConfigError) as raised:
        assert Run.open(run_folder).store
    assert reason in " ".join(str(raised.value).split())


@pytest.mark.parametrize("text", ["name: [tiny", "name: \0"])
def test_a_configuration_that_is_no_yaml(text, refuse, run_folder):
    (run_folder / "config.yaml").write_text(text)
    assert "config.yaml" in refuse("evaluate", run_folder)


def test_an_unknown_key_lists_every_valid_one(tiny_run):
    values = config_to_dict(tiny_run.config) | {"optimizer": "sgd"}
    with pytest.raises(ConfigError, match="optimizer") as raised:
        config_from_dict(JobConfig, values)
    keys = ("name", "data.image_size", "classifier.direct.lr", "prompt.tower.warmup")
    for key in (*keys, "cluster.zero_stage"):
        assert f"{key}," in f"{raised.value},"


def test_a_folder_without_a_run(refuse, workplace):
    for folder in (workplace, workplace / "none"):
        assert f"{folder} holds no run: it has no config.yaml" in refuse("evaluate", folder)


def test_a_run_without_a_checkpoint(refuse, run_folder):
    shutil.rmtree(run_folder / "checkpoint")
    assert "no manifest.json" in refuse("evaluate", run_folder)


def test_a_run_without_a_generic_model(refuse, run_folder):
    (run_folder / "generic.safetensors").unlink()
    assert "generic.safetensors" in refuse("evaluate", run_folder)


# --- zoos -----------------------------------------------------------------------------------------


def _corrupt(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = b"\0" * (len(content) - len(content) // 2)
    file.write_bytes(content)


def _nan_theta(file):
    rows = pq.read_table(file).to_pylist()
    rows[0]["theta"][0] = float("nan")
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)


def _column_less(file):
    pq.write_table(pq.read_table(file).drop_columns(["accuracy"]), file)


def _gone(file):
    file.unlink()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_corrupt_zoo_json(text, tiny_run, workplace):
    folder = shutil.copytree(tiny_run.folder / "zoo", workplace / "zoo")
    (folder / "zoo.json").write_text(text)
    with pytest.raises(DataError, match=r"zoo\.json"):
        open_zoo(folder, tiny_run.describe_zoo("zoo"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(_column_less, "unreadable zoo file"),
        (_corrupt, "unreadable zoo file"),
        (_text, "unreadable zoo file"),
        (_empty, "unreadable zoo file"),
        (_nan_theta, "NaN or infinite weights"),
        (_gone, "holds no zoo rows"),
    ],
)
def test_damaged_zoos(damage, reason, refuse, run_folder):
    damage(run_folder / "zoo" / "part-0.parquet")
    with pytest.raises(DataError, match=reason):
        read_zoo(run_folder / "zoo")
    assert reason in refuse("evaluate", run_folder)


# --- jobs -----------------------------------------------------------------------------------------


def _no_work(run):
    raise AssertionError("the job must not begin")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--train.learning_rate", "1"], "valid keys: name, storage, tracking, data.name"),
        (["--train.lr", "fast"], "train.lr"),
        (["--train.lr", "-1"], "train.lr must be above 0, got -1"),
        (["--train.seed", "-1"], "train.seed must not be negative, got -1"),
        (["--data.seed", "-1"], "data.seed must not be negative, got -1"),
        (["--tasks.seed", "-1"], "tasks.seed must not be negative, got -1"),
        (["--classifier.seed", "-1"], "classifier.seed must not be negative, got -1"),
        (["--tasks.unseen_counts", "[1, 1]"], "tasks.unseen_counts holds a value twice"),
        (
            ["--evaluation.sampling_steps", "[4, 1, 4]"],
            "evaluation.sampling_steps holds a value twice",
        ),
        (
            ["--diffusion.guidance", "2", "--train.condition_dropout", "0"],
            "diffusion.guidance other than 1 needs train.condition_dropout and train.weight_loss",
        ),
        (
            ["--diffusion.guidance", "2", "--train.weight_loss", "0"],
            "diffusion.guidance other than 1 needs train.condition_dropout and train.weight_loss",
        ),
        (["--train.condition_dropout", "-0.1"], "train.condition_dropout is a share"),
        (["--prompt.shrinkage", "1.5"], "prompt.shrinkage is a share"),
        (["--prompt.doubt", "-1"], "prompt.doubt must not be negative"),
        (["--prompt.favour", "-1"], "prompt.favour must not be negative"),
        (["--prompt.prior", "0"], "prompt.prior must be above 0"),
        (["--storage", "runs"], "storage must be an absolute path"),
        (["--data.root", "images"], "data.root must be an absolute path"),
        (
            ["--prompt.encoder", "open_clip", "--prompt.weights", "rel/x.pt"],
            "prompt.weights must be an absolute path",
        ),
        (["--prompt.encoder", "table", "--prompt.weights", "t.parquet"], "prompt.weights must be"),
        (["--classifier.direct.warmup", "5"], "classifier.direct.warmup is a share"),
        (
            ["--classifier.finetune.weight_decay", "-1"],
            "classifier.finetune.weight_decay must not be",
        ),
        (["--classifier.generic.lr", "0"], "error: classifier.generic.lr must be above 0, got 0"),
        (["--prompt.tower.steps", "0"], "error: prompt.tower.steps must be above 0, got 0"),
        (["--prompt.tower", "{warmup: 2}"], "error: prompt.tower.warmup is a share"),
        (["--prompt.tower.stepz", "5"], "prompt.tower.steps, prompt.tower.batch_size"),
        (["--train.weight_loss", "-1"], "train.weight_loss must not be negative"),
        (["--train.min_snr", "-1"], "train.min_snr must not be negative"),
        (["--name", "../other"], "name must be a plain folder name"),
        (["--name", "my run"], "name must be a plain folder name"),
        (["--name", "run[1]"], "name must be a plain folder name"),
        (["--name", "übung"], "name must be a plain folder name"),
        (["--storage", "/runs[1]"], "storage must hold none of"),
        (["--storage", "s3://me:secret@bucket/runs"], "storage holds a password"),
        (["--storage", "s4://bucket/runs"], "s4://bucket/runs/tiny is no storage"),
        (["--storage", "fsspec+file:///proc/runs"], "/proc/runs"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--tasks.min_classes", "9"], "got 9 and 6"),
        (["--cluster.train_workers", "3"], "must be a multiple of cluster.train_workers"),
    ],
)
def test_jobs_refuse_a_bad_configuration(words, reason, workplace, capsys):
    given = ["--name", "tiny", "--storage", str(workplace / "runs"), *words]
    assert run_job(_no_work, given, name="train", about="Train.") == 2
    found = capsys.readouterr()
    (line,) = found.err.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert found.out == ""
    assert snapshot(workplace) == {}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data.name", "imagenet"], "unknown data set 'imagenet'; valid: digits"),
        (["--classifier.family", "cnn6k"], "unknown family 'cnn6k'; known: cnn5k"),
    ],
)
def test_jobs_refuse_what_their_configuration_only_names(words, reason, workplace, capsys):
    given = ["--name", "tiny", "--storage", str(workplace / "runs"), *words]
    assert run_job(lambda run: print(run.family), given, name="train", about="Train.") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.parametrize("change", [{"train": {"lr": None}}, {"cluster": {"zoo_block": None}}])
def test_nothing_is_no_number(change):
    given = {"name": "x", "storage": "/tmp"}
    with pytest.raises(ConfigError):
        config_from_dict(JobConfig, given | change)
    config_from_dict(JobConfig, given | {"data": {"image_size": None}})


@pytest.mark.parametrize("key", ["config", "__path__", "colour", 3])
def test_a_key_that_the_parser_itself_knows_is_unknown(key):
    with pytest.raises(ConfigError, match=rf"unknown key '{key}'; valid keys: name, storage, "):
        config_from_dict(JobConfig, {"name": "x", "storage": "/tmp", key: "y"})


def test_a_mended_typo_runs(workplace):
    given = ["--name", "tiny", "--storage", str(workplace / "runs")]
    job = partial(run_job, lambda run: run.family, name="train", about="Train.")
    assert job([*given, "--data.name", "digit"]) == 2
    assert job(given) == 0


def test_a_configuration_that_comes_to_nothing_leaves_its_name(workplace, capsys):
    given = ["--name", "tiny", "--storage", str(workplace / "runs")]
    job = partial(run_job, lambda run: run.space, name="train", about="Train.")
    assert job([*given, "--tasks.max_classes", "12"]) == 2
    assert "10 classes" in capsys.readouterr().err
    assert not list((workplace / "runs").iterdir())
    assert job(given) == 0

    def breaks(run):
        run.generic_file.touch()
        raise DataError("later")

    first, second = (Run(parse_config(JobConfig, given)) for _ in range(2))
    first.claim()
    second.claim()  # goes on with what the first began
    first.give_up()
    assert (first.folder / "config.yaml").exists()

    given[1] = "begun"
    assert run_job(breaks, given, name="train", about="Train.") == 2
    assert run_job(_no_work, [*given, "--tasks.max_classes", "5"], name="train", about="") == 2


def test_prompts_that_cannot_be_had_are_refused_before_anything_is_trained(workplace, capsys):
    given = ["--name", "tiny", "--storage", str(workplace / "runs"), "--prompt.encoder", "table"]
    weights = ["--prompt.weights", str(workplace / "none.parquet"), "--prompt.model", "x"]
    assert run_job(ensure_generic, given + weights, name="build_zoo", about="Build.") == 2
    assert "no table of prompt vectors" in capsys.readouterr().err
    assert not list((workplace / "runs").iterdir())


def test_a_generic_model_of_other_images_is_refused(workplace, capsys):
    """Cut anew, the images of a data set that has grown are in other partitions."""
    given = ["--name", "tiny", "--storage", str(workplace / "runs")]
    run = Run(parse_config(JobConfig, given))
    run.folder.mkdir(parents=True)
    generic = GenericModel(class_ids=(0,), body=torch.zeros(1), rows=torch.zeros(1, 1))
    save_generic(run.generic_file, generic, run.family, run.dataset)
    assert run_job(ensure_generic, given, name="build_zoo", about="Build.") == 0
    older = replace(run.dataset, fingerprint="of yesterday")
    save_generic(run.generic_file, generic, run.family, older)
    assert run_job(ensure_generic, given, name="build_zoo", about="Build.") == 2
    assert "trained on other images than digits has now" in capsys.readouterr().err


def test_of_two_generic_models_the_first_one_stays(workplace, monkeypatch):
    """A p-model may be on its way to it."""

    def train(*_, **__):
        run.generic_file.write_text("another job's")

    given = ["--name", "tiny", "--storage", str(workplace / "runs")]
    run = Run(parse_config(JobConfig, given))
    run.folder.mkdir(parents=True)
    monkeypatch.setattr("ray_jobs.build_zoo.train_generic", train)
    ensure_generic(run)
    assert run.generic_file.read_text() == "another job's"


def test_a_run_is_not_continued_with_another_configuration(tiny_run, capsys):
    before = snapshot(tiny_run.folder)
    given = ["--config", str(tiny_run.folder / "config.yaml"), "--tasks.seed", "5"]
    assert run_job(_no_work, given, name="train", about="Train.") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run with another tasks" in line
    assert snapshot(tiny_run.folder) == before
