"""The command line, run in process: what each command writes, prints and returns."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tina import TinaPipeline, cli, load_classifier
from tina.cli import main
from tina.images import read_image
from tina.packaged import pretrained

COMMANDS = ("generate", "classify", "score", "evaluate", "export", "info")
SIZES = ((8, 8), (5, 13), (40, 17), (1, 1))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory, and no checkpoint named by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINA_CHECKPOINT", raising=False)
    return tmp_path


@pytest.fixture
def tina(capsys, tiny_checkpoint):
    """Run a command that must succeed; `generate` and `info` on the tiny checkpoint."""

    def run(command, *words):
        named = ["--checkpoint", tiny_checkpoint] if command == "generate" else []
        assert main([command, *map(str, [*words, *named])]) == 0
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint):
    """A folder with mine.safetensors and mine.onnx, made by one command."""
    folder = tmp_path_factory.mktemp("made")
    out = ["--out", str(folder / "mine.safetensors"), "--onnx", str(folder / "mine.onnx")]
    assert main(["generate", "one, two and five", *out, "--checkpoint", str(tiny_checkpoint)]) == 0
    return folder


def write_image(file, *, size=(8, 8), mode="L", seed=0):
    shape = size if mode == "L" else (*size, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def tensors(file):
    return torch.cat([value.flatten() for _, value in sorted(load_file(file).items())])


# --- help -----------------------------------------------------------------------------------------


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    text = " ".join(help_of(capsys, command).split())
    example = text.split("example: ")[1]
    program, *words = shlex.split(example)
    assert program == "tina"
    assert cli._parser().parse_args(words).command is getattr(cli, command)


def test_help_lists_the_commands(capsys):
    text = help_of(capsys)
    assert "example: tina generate" in text
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ["default: 0", "TINA_CHECKPOINT", "runs/quickstart/checkpoint", "refuse"]),
        ("classify", ["size in pixels", "percent"]),
        ("evaluate", ["default: the run's"]),
    ],
)
def test_help_says_units_and_defaults(command, words, capsys):
    text = " ".join(help_of(capsys, command).split())
    assert [word for word in words if word not in text] == []


def test_packaged_generators_are_named(capsys):
    text = "".join(help_of(capsys, "generate").split())  # a name may go on in the next line
    assert [name for name in pretrained() if name not in text] == []


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tina {version('tina-text2model')}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys, tina.cli\n"
        "try: tina.cli.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'rich', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="tina")
    assert script.load() is main


# --- generate -------------------------------------------------------------------------------------


def test_a_sentence_becomes_a_classifier(tina, workplace):
    found = tina("generate", "One, two or five", "--out", "m.safetensors")
    assert found.err == ""
    head, *rows, last = found.out.splitlines()
    assert head.split() == ["class", "familiarity", "nearest", "trained", "class"]
    assert [row.split() for row in rows] == [
        [name, "1.00", name.lower()] for name in ("One", "two", "five")
    ]
    assert last.startswith("m.safetensors: cnn5k, 4,851 parameters, 4 steps, generated in ")
    assert 0 < float(last.split()[-2]) < 60_000
    assert last.split()[-1] == "ms"
    assert load_classifier("m.safetensors").class_names == ("One", "two", "five")
    assert [file.name for file in workplace.iterdir()] == ["m.safetensors"]


def test_several_words_are_one_class_each(tina):
    tina("generate", "rock and roll", "two", "--out", "m.safetensors")
    assert load_classifier("m.safetensors").class_names == ("rock and roll", "two")


def test_a_strange_class_is_warned_about(tina):
    found = tina("generate", "dragon", "three", "--out", "m.safetensors")
    far, note = found.err.splitlines()
    assert far.startswith("warning: 'dragon' is not close to anything the generator was trained on")
    assert far.split("; nearest is ")[1].strip("'") in found.out.splitlines()[1]
    assert "no semantics" in note


def test_the_packaged_checkpoints_that_know_better_are_named(capsys):
    """A user of one need not know what the others were trained on."""

    def said(*words):
        out = ["--out", "m.safetensors", "--force", "--checkpoint", "tina-cifar100-cnn5k"]
        status = main(["generate", "a bus", *words, *out])
        return status, capsys.readouterr().err

    heads = "tina-cifar100-efficientnet-head", "tina-cifar100-mini-imagenet-resnet20-head"
    others = f"{heads[0]}, tina-cifar100-mini-imagenet-cnn5k and {heads[1]} were"
    status, found = said("Golden Retrievers", "otter")
    far, hint = found.splitlines()
    assert status == 0
    assert far.startswith("warning: 'Golden Retrievers' is not close to anything")
    assert hint == f"warning: {others} trained on 'Golden Retrievers'"
    status, found = said("french bulldog", "zzzzzz")
    assert status == 2
    assert f"'zzzzzz'; {others} trained on 'french bulldog'; `tina info --words" in found
    assert said("otter", "stapler")[1].count("warning") == 1  # none was trained on that
    # of several words none is named, for the others would be too
    several = ["--description", "vehicle=tractor", "--description", "vehicle=stapler"]
    assert said("vehicle", *several)[1].count("warning") == 1
    mine = said("mine", "--description", "mine=golden retriever")[1]  # not by what it is called
    assert f"{others} trained on 'golden retriever'" in mine
    retriever = said("golden retriever", "--description", "golden retriever=stapler")[1]
    assert "'golden retriever' is not close" in retriever
    assert "trained on 'golden" not in retriever


def test_a_class_may_be_called_class(tina):
    head, *rows = tina("generate", "one", "class", "--out", "a.safetensors").out.splitlines()
    assert head.split()[:2] == ["class", "familiarity"]
    assert [row.split()[0] for row in rows[:2]] == ["one", "class"]


def test_a_near_class_of_the_hash_encoder_is_not_called_known(tina):
    found = tina("generate", "threed", "one", "--out", "m.safetensors")
    assert found.err.startswith("note: the hash encoder has no semantics")


def test_command_and_library_agree(tina, tiny_checkpoint):
    words = ["--seed", "3", "--steps", "2", "--guidance", "1.5", "--out", "m.safetensors"]
    tina("generate", "three", "eight", *words)
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    model = pipe(["three", "eight"], seed=3, num_inference_steps=2, guidance_scale=1.5)
    assert torch.equal(
        load_classifier("m.safetensors").network.fc.weight, model.classifier.network.fc.weight
    )
    with safe_open("m.safetensors", "pt") as stream:
        metadata = stream.metadata()
    assert (metadata["seed"], metadata["steps"]) == ("3", "2")
    assert metadata["checkpoint_sha256"] == pipe.checkpoint


def test_the_seed_decides(tina, workplace):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tina("generate", "three or eight", "--seed", seed, "--out", f"{name}.safetensors")
    a, b, c = (tensors(f"{name}.safetensors") for name in "abc")
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 0


def test_the_same_command_writes_the_same_bytes(tina, workplace):
    for name in "abcd":
        tina("generate", "three or eight", "--out", f"{name}.safetensors")
    assert len({file.read_bytes() for file in workplace.iterdir()}) == 1


def test_pictures_take_the_place_of_words(tina, workplace):
    first = write_image(workplace / "1.png")
    large = write_image(workplace / "2.png", size=(20, 31), mode="RGB", seed=1)
    other = write_image(workplace / "3.png", size=(9, 9), seed=2)
    shots = [f"--image=one={first}", f"--image=one={large}", f"--image=zebra={other}"]
    tina("generate", *shots, "--out", "shown.safetensors")
    tina("generate", "Zebra, one", *shots, "--out", "turned.safetensors")
    tina("generate", "one", "zebra", "--out", "told.safetensors")
    shown, turned = (load_classifier(f"{name}.safetensors") for name in ("shown", "turned"))
    assert shown.class_names == ("one", "zebra")
    assert turned.class_names == ("Zebra", "one")
    assert not torch.equal(tensors("shown.safetensors"), tensors("told.safetensors"))


def test_examples_stand_beside_words(tina, workplace):
    """The class that nothing was trained on learns from them, the other has its row already."""
    shots = [write_image(workplace / f"{i}.png", seed=i) for i in range(3)]
    given = [
        f"--example=zebra={shots[0]}",
        f"--example=zebra={shots[1]}",
        f"--example=one={shots[2]}",
    ]
    found = tina("generate", "one, zebra", *given, "--out", "shown.safetensors")
    assert "zebra" in found.err
    tina("generate", "one, zebra", "--out", "told.safetensors")
    with safe_open("shown.safetensors", "pt") as shown, safe_open("told.safetensors", "pt") as told:
        for key in told.keys():  # noqa: SIM118
            one, other = shown.get_tensor(key), told.get_tensor(key)
            if key.startswith("fc"):
                assert torch.equal(one[0], other[0])
                assert not torch.equal(one[1], other[1])
            else:
                assert torch.equal(one, other)
    assert "change nothing" not in found.err


@pytest.mark.parametrize("prompt", ["one, two", "one, zebra, two"])
def test_examples_of_known_classes_alone_are_said_to_change_nothing(tina, workplace, prompt):
    given = [
        f"--example={name}={write_image(workplace / f'{name}.png', seed=i)}"
        for i, name in enumerate(("one", "two"))
    ]
    found = tina("generate", prompt, *given, "--out", "known.safetensors")
    assert "note: examples change nothing: the generator was trained on every class" in found.err
    tina("generate", prompt, "--out", "told.safetensors")
    known, told = (workplace / f"{name}.safetensors" for name in ("known", "told"))
    assert known.read_bytes() == told.read_bytes()


def test_a_description_takes_the_place_of_a_name(tina):
    found = tina("generate", "zebra, two", "--description", "zebra=three", "--out", "a.safetensors")
    assert "warning" not in found.err
    tina("generate", "three, two", "--out", "b.safetensors")
    assert load_classifier("a.safetensors").class_names == ("zebra", "two")
    torch.testing.assert_close(
        tensors("a.safetensors"), tensors("b.safetensors"), atol=1e-5, rtol=0
    )


def test_a_class_may_be_any_of_several_texts(tina, tiny_checkpoint):
    described = ["--description", "zebra=two", "--description", "Zebra=three"]
    tina("generate", "zebra, one", *described, "--out", "m.safetensors")
    pipe = TinaPipeline.from_pretrained(tiny_checkpoint)
    expected = pipe(["zebra", "one"], descriptions=[["two", "three"], None])
    found = torch.nn.utils.parameters_to_vector(
        load_classifier("m.safetensors").network.parameters()
    )
    torch.testing.assert_close(found, expected.theta, atol=1e-5, rtol=0)


def test_a_sentence_says_several_texts_too(tina):
    tina("generate", "zebra: two, three; one", "--out", "a.safetensors")
    options = ["--description", "one=four"]
    tina("generate", "zebra: two; one", "--description", "zebra=three", "--out", "b.safetensors")
    assert load_classifier("a.safetensors").class_names == ("zebra", "one")
    assert torch.equal(tensors("a.safetensors"), tensors("b.safetensors"))
    tina("generate", "zebra: two, three; one", *options, "--out", "c.safetensors")
    assert not torch.equal(tensors("a.safetensors"), tensors("c.safetensors"))


def test_a_text_stands_for_one_class(tiny_checkpoint, capsys):
    described = ["--description", "zebra=two", "--description", "one=Two"]
    words = ["generate", "zebra, one", *described, "--out", "m.safetensors"]
    assert main([*words, "--checkpoint", str(tiny_checkpoint)]) == 2
    assert "each text may stand once in a task; twice: two" in capsys.readouterr().err


def test_force_replaces_regular_files_alone(workplace, capsys):
    os.mkfifo(workplace / "pipe.safetensors")
    assert main(["generate", "one or two", "--force", "--out", "pipe.safetensors"]) == 2
    assert "regular file" in capsys.readouterr().err
    assert not Path("pipe.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "suffix"),
    [
        (["generate", "one or two", "--out", "m.onnx"], ".safetensors"),
        (["generate", "one or two", "--out", "-"], ".safetensors"),
        (["generate", "one or two", "--out", "m.safetensors", "--onnx", "m"], ".onnx"),
        (["export", "m.safetensors", "--onnx", "m.safetensors"], ".onnx"),
    ],
)
def test_files_are_called_what_they_are(words, suffix, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {words[-1]} must end in {suffix}\n"


def test_every_class_has_a_picture_or_none(tina, workplace, tiny_checkpoint, capsys):
    file = write_image(workplace / "a.png")
    words = ["generate", "--out", "m.safetensors", "--checkpoint", str(tiny_checkpoint)]
    for option, prompt, given, said in (
        ("--image", "one, two", "one", "with --image every class needs one; none has two"),
        ("--example", "one, two", "one", "examples are needed of two classes at least"),
        ("--image", "one, two", "three", "no class of the prompt is called three: it has one, two"),
    ):
        assert main([*words, prompt, option, f"{given}={file}"]) == 2
        assert said in capsys.readouterr().err


def test_force_replaces(tina, workplace):
    for name in ("m.safetensors", "m.onnx"):
        (workplace / name).write_text("mine")
    outputs = ["--out", "m.safetensors", "--onnx", "m.onnx", "--force"]
    tina("generate", "one or two", *outputs)
    assert load_classifier("m.safetensors").class_names == ("one", "two")
    assert onnxruntime.InferenceSession("m.onnx").get_inputs()[0].name == "images"
    assert sorted(file.name for file in workplace.iterdir()) == ["m.onnx", "m.safetensors"]


def test_the_checkpoint_is_found(workplace, tiny_checkpoint, monkeypatch, capsys):
    make = ["generate", "otter and bicycle", "--force", "--out", "m.safetensors"]
    assert main(make) == 0
    assert capsys.readouterr().err == "note: no checkpoint is named, taking tina-cifar100-cnn5k\n"
    make[1] = "one or two"
    monkeypatch.setenv("TINA_CHECKPOINT", str(tiny_checkpoint))
    assert main(make) == 0
    monkeypatch.delenv("TINA_CHECKPOINT")
    shutil.copytree(tiny_checkpoint, workplace / "runs" / "quickstart" / "checkpoint")
    capsys.readouterr()
    assert main(make) == 0
    demo = "note: no checkpoint is named, taking runs/quickstart/checkpoint\n"
    assert capsys.readouterr().err == demo


# --- classify -------------------------------------------------------------------------------------


def test_probabilities_are_sorted_and_those_of_the_classifier(tina, made, workplace):
    files = [
        write_image(workplace / f"{i}.png", size=size, mode=mode)
        for i, (size, mode) in enumerate([((8, 8), "L"), ((30, 21), "RGB")])
    ]
    model = made / "mine.safetensors"
    found = json.loads(tina("classify", "--json", model, *files).out)
    assert [row["image"] for row in found] == list(map(str, files))
    classifier = load_classifier(model)
    for row, file in zip(found, files, strict=True):
        values = list(row["probabilities"].values())
        assert values == sorted(values, reverse=True)
        pixels = np.asarray(Image.open(file).convert("L"), dtype=np.float32) / 255
        expected = classifier(torch.from_numpy(pixels)[None, None])[0].softmax(0)
        mine = torch.tensor([row["probabilities"][name] for name in classifier.class_names])
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)


def test_a_picture_that_is_named_twice_is_answered_twice(tina, made, workplace):
    file = write_image(workplace / "a.png")
    found = json.loads(tina("classify", "--json", made / "mine.safetensors", file, file).out)
    assert [row["image"] for row in found] == [str(file)] * 2


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_bad_picture_takes_no_answer_from_the_others(option, made, workplace, capsys):
    files = [write_image(workplace / "a.png"), workplace / "none.png", write_image("b.png")]
    assert main(["classify", str(made / "mine.safetensors"), *map(str, files), *option]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: cannot read image")
    assert found.err.count("\n") == 1
    if option:
        assert [row["image"] for row in json.loads(found.out)] == [str(files[0]), "b.png"]
    else:
        names = [line for line in found.out.splitlines() if line[0] != " "]
        assert names == [str(files[0]), "b.png"]


def test_bars_for_people(tina, made, workplace):
    file = write_image(workplace / "a.png")
    name, *rows = tina("classify", made / "mine.safetensors", file).out.splitlines()
    assert name == str(file)
    assert {row.split()[0] for row in rows} == {"one", "two", "five"}
    share = [float(row.split()[1].rstrip("%")) for row in rows]
    assert sum(share) == pytest.approx(100, abs=0.2)
    assert len(rows[0].split()[2]) == pytest.approx(0.3 * share[0], abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_are_read(mode, channels, workplace):
    file = workplace / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (7, 4), (255, 255, 255)).convert(mode).save(file)
    image = read_image(file, channels=channels)
    assert (image.shape, image.dtype) == ((1, channels, 4, 7), torch.float32)
    assert bool((image == 1).all())


def test_a_turned_photograph_is_read_upright(workplace):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (7, 4)).save(workplace / "a.png", exif=exif)
    assert read_image(workplace / "a.png", channels=1).shape == (1, 1, 7, 4)


# --- export ---------------------------------------------------------------------------------------


def assert_same_logits(onnx, model):
    session = onnxruntime.InferenceSession(onnx)
    classifier = load_classifier(model)
    for seed, size in enumerate(SIZES):
        for count in (1, 3):
            images = torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(seed))
            (logits,) = session.run(["logits"], {"images": images.numpy()})
            torch.testing.assert_close(
                torch.from_numpy(logits), classifier(images), atol=1e-4, rtol=0
            )


def test_the_onnx_of_generate_is_the_classifier(made):
    assert_same_logits(made / "mine.onnx", made / "mine.safetensors")


def test_the_onnx_of_export_is_the_classifier(tina, made, workplace):
    tina("export", made / "mine.safetensors", "--onnx", "new/mine.onnx")
    assert_same_logits(workplace / "new" / "mine.onnx", made / "mine.safetensors")
    metadata = onnxruntime.InferenceSession("new/mine.onnx").get_modelmeta()
    assert json.loads(metadata.custom_metadata_map["class_names"]) == ["one", "two", "five"]


def test_who_waits_for_onnx_at_a_terminal_is_told(tina, made, monkeypatch):
    assert not tina("export", made / "mine.safetensors", "--onnx", "a.onnx").err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = "exporting ONNX, which takes some seconds ...\n"
    assert tina("export", made / "mine.safetensors", "--onnx", "b.onnx").err == told


# --- info -----------------------------------------------------------------------------------------


def test_info_of_a_checkpoint(tina, tiny_checkpoint, tiny_generator):
    lines = tina("info", tiny_checkpoint).out.splitlines()
    facts = dict(line.split("  ", 1) for line in lines)
    facts = {key: value.strip() for key, value in facts.items()}
    size = sum(p.numel() for p in tiny_generator.denoiser.parameters())
    assert facts == {
        "family": "cnn5k, 4,884 parameters at 4 classes",
        "images": "1 x 8 x 8",
        "data set": "digits",
        "max classes": "4",
        "embedding space": "hash-ngram-v1, 256 values (no semantics: spelling alone)",
        "pictures": "seen by the generic model",
        "generator": f"{size:,} parameters",
        "sampler": "ddim, 4 steps",
        "trained classes": "zero, one, two, three, four, five, six, seven, eight, nine",
        "further words": "0",
        "sha256": TinaPipeline.from_pretrained(tiny_checkpoint).checkpoint,
    }


def test_info_of_a_packaged_checkpoint_by_its_name(tina):
    facts = tina("info", "tina-cifar100-cnn5k").out
    known = tina("info", "tina-cifar100-cnn5k", "--words").out.splitlines()
    assert f"further words    {len(known) - 80}\n" in facts
    assert {"otter", "red fox"} < set(known)


def test_info_of_a_model(tina, made):
    out = tina("info", made / "mine.safetensors").out
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["parameters"] == "4,851"
    assert json.loads(facts["class_names"]) == ["one", "two", "five"]
    assert (facts["family"], facts["input_shape"], facts["seed"]) == ("cnn5k", "[1, 8, 8]", "0")
    assert len(facts["checkpoint_sha256"]) == 64


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_measures_the_folder_that_it_is_given(tina, tiny_run, tiny_checkpoint, workplace):
    folder = workplace / "moved"
    shutil.copytree(tiny_run.folder, folder)
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    options = ["--seeds", 1, "--images-per-class", 3, "--steps", "1,3"]
    found = tina("evaluate", folder, *options)
    assert found.err == ""
    assert "tina" in found.out
    assert "classifier_selection" in found.out
    report = json.loads((folder / "report.json").read_text())
    assert report["seeds"] == [0]
    assert report["axes"]["unseen_combination"]["images_per_class"] == 3
    assert [point["steps"] for point in report["accuracy_by_steps"]] == [1, 3]
    assert (folder / "plots" / "accuracy.png").is_file()
    assert not tiny_run.report_file.exists()


# --- ending ---------------------------------------------------------------------------------------


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def info(args):
        """Wait for ever."""
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", info)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_whoever_stops_reading_sees_no_error(workplace):
    """As `| head` does, here before the first word."""
    command = [sys.executable, "-m", "tina", "info", "--words", "tina-cifar100-cnn5k"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as listing:
        listing.stdout.close()
        assert listing.stderr.read() == ""
    assert listing.returncode == 141


def test_files_that_are_no_classifiers_are_told_apart(made, workplace, capsys):
    (workplace / "m.onnx").write_bytes((made / "mine.onnx").read_bytes())
    for words, said in (
        (["info", "none.safetensors"], "there is no none.safetensors"),
        (["info", "m.onnx"], "ONNX is written for others, not read"),
        (["info", "--words", str(made / "mine.safetensors")], "only checkpoints have words"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
