"""The `tina` command: generate, classify, score, evaluate, export, info.

What a user can mend ends as one line on stderr and exit status 2. torch is imported by the command
that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tina.config import TextEncoder
from tina.errors import DataError, PromptError, TinaError, UnfamiliarWarning
from tina.files import check_suffix
from tina.packaged import pretrained

if TYPE_CHECKING:
    from tina.pipeline import TinaPipeline

DEMO = Path("runs/quickstart/checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when the work is done, 2 for what the user can mend, 130 when interrupted, 141 when
        nobody reads on.
    """
    args = _parser().parse_args(argv)
    try:
        code: int | None = args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nothing is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (TinaError, OSError) as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0


def generate(args: argparse.Namespace) -> None:
    """Generate a classifier for the classes of a prompt, as safetensors and ONNX."""
    outputs = _check_outputs({".safetensors": args.out, ".onnx": args.onnx}, force=args.force)
    import torch

    from tina.advice import placed, unfamiliar
    from tina.files import write_whole
    from tina.images import read_image, shrink, square
    from tina.mapped import MappedEncoder
    from tina.model import GeneratedModel
    from tina.names import normalise_name, read_sentence
    from tina.prompts import check_examples, described

    pairs = args.image or args.description or args.example
    extras = [(normalise_name(name), value) for name, value in pairs]
    given, words = dict(extras), args.prompt or list(dict(extras))
    names, said = read_sentence(words[0]) if len(args.prompt) == 1 else (words, None)
    keys = [normalise_name(name) for name in names]
    if odd := given.keys() - keys:
        odd_ones, all_keys = " or ".join(sorted(odd)), ", ".join(keys)
        raise PromptError(f"no class of the prompt is called {odd_ones}: it has {all_keys}")
    if args.image and (bare := [key for key in keys if key not in given]):
        raise PromptError(f"with --image every class needs one; none has {', '.join(bare)}")
    if args.example:
        check_examples([key in given for key in keys])
    pipe = _load(args.checkpoint, encoder=args.encoder)
    # one prompt is made as fast by one thread, and a second waits where it finds no core
    torch.set_num_threads(1)
    options = {"seed": args.seed, "guidance_scale": args.guidance}
    if args.image or args.example:
        channels = pipe.generator.family.channels
        cut = shrink if args.image else square  # as an endpoint
        options["images" if args.image else "examples"] = [
            [cut(read_image(v, channels=channels)) for k, v in extras if k == key] for key in keys
        ]
    if said or args.description:
        texts = [[*(own or ())] for own in said or [None] * len(keys)]
        for name, text in extras if args.description else ():
            texts[keys.index(name)].append(text)
        options["descriptions"] = [own or None for own in texts]
    with warnings.catch_warnings():  # they are said below, without the place in the code
        warnings.simplefilter("ignore", UnfamiliarWarning)
        # imports and encoders: loading, not generation
        pipe(names, num_inference_steps=1, **options)
        begin = time.perf_counter()
        model = pipe(names, num_inference_steps=args.steps, **options)
        milliseconds = 1000 * (time.perf_counter() - begin)
    assert isinstance(model, GeneratedModel)

    def write(temporary: Path) -> None:
        temporary.write_bytes(model.to_safetensors())
        if args.onnx:  # complete before the first file gets its name: both or none
            _export(model.export_onnx, args.onnx)

    write_whole(args.out, write)
    rows = zip(model.class_names, model.familiarity, model.nearest, strict=True)
    head = ("class", "familiarity  nearest trained class")
    _print_table([head, *((name, f"{x:<11.2f}  {near}") for name, x, near in rows)])
    made = f"{model.family.name}, {model.theta.numel():,} parameters, {model.steps} steps"
    print(*outputs, sep=" and ", end=f": {made}, generated in {milliseconds:.1f} ms\n")
    asked = None if args.image else described(names, options.get("descriptions"))
    for warning in unfamiliar(model, asked):
        print(f"warning: {warning}", file=sys.stderr)
    if args.example:
        from tina.examples import NEEDLESS, teach

        if not teach(model.familiarity, [key in given for key in keys]):
            print(f"note: {NEEDLESS}", file=sys.stderr)
    lookup = pipe.generator.vocabulary.lookup
    if new := [text for own in asked or () for text in own if lookup(text) is None]:
        if not pipe.is_semantic:
            print("note: the hash encoder has no semantics: it compares spelling", file=sys.stderr)
        elif isinstance(pipe.encoder, MappedEncoder):
            print(f"note: {placed(new)}", file=sys.stderr)


def classify(args: argparse.Namespace) -> int:
    """Classify pictures with a generated classifier."""
    from tina.images import read_image
    from tina.model import load_classifier

    classifier = load_classifier(args.model)
    found = []
    for file in args.images:
        try:
            image = read_image(file, channels=classifier.family.channels)
        except DataError as error:  # the other pictures can be looked at all the same
            _complain(error)
            continue
        values = classifier(image)[0].softmax(0).tolist()
        ranked = sorted(zip(classifier.class_names, values, strict=True), key=lambda x: -x[1])
        found.append({"image": str(file), "probabilities": dict(ranked)})
        if not args.json:
            print(file)
            _print_table([(f"  {k}", f"{p:6.1%}  {'#' * round(30 * p)}") for k, p in ranked])
    if args.json:
        print(json.dumps(found, indent=1))
    return 0 if len(found) == len(args.images) else 2


def score(args: argparse.Namespace) -> int:
    """Measure a classifier on pictures of your own, in a folder for each class."""
    from tina import scoring
    from tina.model import load_classifier

    scored = scoring.score(load_classifier(args.model), args.folder)
    print(json.dumps(scored.plain(), indent=1) if args.json else scored)
    for error in scored.unread:
        _complain(error)
    if scored.others:
        print("note: none of its classes:", ", ".join(scored.others), file=sys.stderr)
    if scored.missing:
        print("note: no pictures of:", ", ".join(scored.missing), file=sys.stderr)
    return 2 if scored.unread else 0


def evaluate(args: argparse.Namespace) -> None:
    """Measure a run's checkpoint again; its report and plots are replaced."""
    from tqdm import tqdm

    from tina.checkpoint import load_generator
    from tina.report import print_report
    from tina.run import Run

    config = Run.open(args.run).config
    keys = ("seeds", "images_per_class", "sampling_steps")
    changes = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    run = Run(replace(config, evaluation=replace(config.evaluation, **changes)))
    with run.place.named():
        generator = load_generator(run.checkpoint)
    with tqdm(desc="evaluation", unit="cell", disable=None) as bar, run.place.named():

        def show(done: int, cells: int) -> None:
            bar.total = cells
            bar.update(done - bar.n)

        report = run.evaluate(generator, on_progress=show)
    print_report(report)
    print(f"{run.place.location}: report.json, plots/")


def export(args: argparse.Namespace) -> None:
    """Export a saved classifier as ONNX."""
    _check_outputs({".onnx": args.onnx}, force=args.force)
    from tina.model import export_onnx, load_classifier

    classifier = load_classifier(args.model)
    _export(partial(export_onnx, classifier), args.onnx)
    print(args.onnx)


def info(args: argparse.Namespace) -> None:
    """Say what a checkpoint or a saved classifier is."""
    file = Path(args.model or "")
    is_classifier = file.is_file() or file.suffix == ".safetensors"
    if is_classifier and args.words:
        raise DataError(f"{file} is a classifier; only checkpoints have words")
    if not is_classifier:
        pipe = _load(args.model)
        if args.words:
            print(*pipe.generator.vocabulary.names, sep="\n")
        else:
            _print_table(_checkpoint_facts(pipe).items())
        return
    from safetensors import safe_open

    from tina.model import load_classifier

    size = sum(p.numel() for p in load_classifier(file).network.parameters())
    with safe_open(str(file), "pt") as stream:
        _print_table([("parameters", f"{size:,}"), *stream.metadata().items()])


def _load(name: str | Path | None, *, encoder: TextEncoder | None = None) -> TinaPipeline:
    """The checkpoint that is named, or that of `make demo`, or one that comes with Tina."""
    from tina.pipeline import TinaPipeline

    name = name or os.environ.get("TINA_CHECKPOINT")
    if not name:
        name = DEMO if DEMO.is_dir() else pretrained()[0]
        print(f"note: no checkpoint is named, taking {name}", file=sys.stderr)
    return TinaPipeline.from_pretrained(name, encoder=encoder)


def _check_outputs(outputs: Mapping[str, Path | None], *, force: bool) -> list[Path]:
    """The files that were asked for, by what they must end in."""
    files = {suffix: file for suffix, file in outputs.items() if file}
    for suffix, file in files.items():
        check_suffix(file, suffix)
        if file.exists() and not (force and file.is_file()):
            raise DataError(f"{file} exists already; --force replaces it if it is a regular file")
    return list(files.values())


def _export(export: Callable[[Path], object], file: Path) -> None:
    """Write an ONNX file; who waits at a terminal is told that it takes so long."""
    if sys.stderr.isatty():
        print("exporting ONNX, which takes some seconds ...", file=sys.stderr)
    export(file)


def _complain(error: Exception) -> None:
    print("error:", *str(error).split(), file=sys.stderr)


def _print_table(rows: Collection[tuple[str, str]]) -> None:
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}".rstrip())


def _checkpoint_facts(pipe: TinaPipeline) -> dict[str, str]:
    generator, diffusion = pipe.generator, pipe.generator.config.diffusion
    family, words, most = generator.family, generator.vocabulary, generator.max_classes
    meaning = "semantic" if pipe.is_semantic else "no semantics: spelling alone"
    own = "an image tower of its own" if generator.tower else "the generic model"
    clip = generator.config.prompt.encoder == "open_clip"
    return {
        "family": f"{family.name}, {family.layout(most).size:,} parameters at {most} classes",
        "images": f"{family.channels} x {family.side} x {family.side}",
        "data set": generator.dataset,
        "max classes": str(most),
        "embedding space": f"{words.space.model}, {words.space.dim} values ({meaning})",
        "pictures": f"seen by {'CLIP' if clip else own}",
        "generator": f"{sum(p.numel() for p in generator.denoiser.parameters()):,} parameters",
        "sampler": f"{diffusion.sampler}, {diffusion.sampling_steps} steps",
        "trained classes": ", ".join(words.own_names),
        **({"lent by ImageNet": f"{len(words.lent)} names"} if words.lent else {}),
        "further words": str(len(words.names) - len(words.trained_names)),
        "sha256": pipe.checkpoint,
    }


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if least <= int(text) < 2**63:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^63, got {text}")

    return number


def _steps(text: str) -> tuple[int, ...]:
    return tuple(_number(1)(part) for part in text.split(","))


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name.strip() or not value:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


class _Version(argparse.Action):
    """Prints the version, which takes longer to find than `--help` to print."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print("tina", version("tina-text2model"))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    about = "Text to model: name the classes, get the weights of a classifier for them."
    example = 'example: tina generate "otter, bicycle, maple tree" --out mine.safetensors'
    parser = argparse.ArgumentParser(prog="tina", description=about, epilog=example)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        run: Callable[[argparse.Namespace], int | None], example: str
    ) -> argparse.ArgumentParser:
        about, epilog = run.__doc__, f"example: tina {example}"
        command = commands.add_parser(run.__name__, help=about, description=about, epilog=epilog)
        command.set_defaults(command=run)
        return command

    default = f"(default: the variable TINA_CHECKPOINT, else {DEMO}, else {pretrained()[0]})"
    checkpoint = f"a checkpoint's folder or URI, {', '.join(pretrained())}, or a hub id {default}"
    folder: Any = {"help": checkpoint}
    force: Any = {"action": "store_true", "help": "replace existing files (default: refuse)"}
    model: Any = {"type": Path, "metavar": "MODEL.safetensors", "help": "a classifier of Tina's"}
    onnx: Any = {"type": Path, "metavar": "FILE.onnx", "help": "write ONNX, opset 18, here"}
    pair: Any = {"type": _pair, "action": "append", "default": []}

    command = add(generate, 'generate "otter, bicycle, maple tree" --out mine.safetensors')
    arg = command.add_argument
    arg(
        "prompt",
        nargs="*",
        help="one sentence, split at commas, and, or, vs; or one class name each; in a sentence "
        '"vehicle: bus, train; otter" has a class that is any of several words',
    )
    arg("--out", type=Path, required=True, metavar="FILE.safetensors", help="write weights here")
    arg("--onnx", **onnx)
    arg("--checkpoint", **folder)
    unknown = (
        "of words that the checkpoint does not know: MiniLM, which comes with the extra of that "
    )
    unknown += "name, or CLIP, downloaded once (default: they are refused)"
    arg("--encoder", choices=get_args(TextEncoder), help=unknown)
    arg("--seed", type=_number(0), default=0, help="of the initial noise (default: 0)")
    arg("--steps", type=_number(1), help="denoising steps (default: the checkpoint's)")
    trained = "factor, of a generator trained for it; 1 is none"
    arg("--guidance", type=float, help=f"{trained} (default: the checkpoint's)")
    arg("--force", **force)
    arg = command.add_mutually_exclusive_group().add_argument
    arg("--image", **pair, metavar="NAME=FILE", help="show class NAME; repeat for more pictures")
    texts = "a text in the place of class NAME; repeat for a class that is any of several"
    arg("--description", **pair, metavar="NAME=TEXT", help=texts)
    beside = "a picture beside the word of class NAME, of two classes at least: new ones learn"
    arg("--example", **pair, metavar="NAME=FILE", help=beside)
    arg = add(classify, "classify mine.safetensors photo.png").add_argument
    arg("model", **model)
    arg("images", type=Path, nargs="+", metavar="IMAGE", help="picture files, any size in pixels")
    arg("--json", action="store_true", help="probabilities 0 to 1 as JSON (default: percent bars)")
    arg = add(score, "score mine.safetensors photos").add_argument
    arg("model", **model)
    called = "with a sub-folder of pictures for each class, called as the class is"
    arg("folder", type=Path, metavar="FOLDER", help=called)
    arg("--json", action="store_true", help="shares 0 to 1 as JSON (default: a table in percent)")
    arg = add(evaluate, "evaluate runs/quickstart --seeds 5 --steps 1,5,20").add_argument
    arg("run", metavar="RUN_DIR", help="folder or URI of a finished run")
    arg("--seeds", type=_number(1), help="sampling seeds per task (default: the run's)")
    arg("--images-per-class", type=_number(1), help="report images at most (default: the run's)")
    arg("--steps", type=_steps, dest="sampling_steps", help="to compare (default: the run's)")
    arg = add(export, "export mine.safetensors --onnx mine.onnx").add_argument
    arg("model", **model)
    arg("--onnx", required=True, **onnx)
    arg("--force", **force)
    arg = add(info, "info tina-cifar100-cnn5k").add_argument
    arg("model", nargs="?", help=f"a classifier's .safetensors, or {checkpoint}")
    arg("--words", action="store_true", help="list the words that a checkpoint knows instead")
    return parser
