"""Whose a run's folder is: it keeps its configuration, and refuses one it was not made with.

What nothing in the folder depends on may differ: evaluation, cluster and tracking; what the zoo
does not depend on, as long as there is no generator; and what generation alone reads, as long as no
checkpoint was released with it.
"""

from __future__ import annotations

from contextlib import suppress

import yaml

from tina.backbone import weights
from tina.config import GeneratorConfig
from tina.configio import config_from_dict, config_to_dict, read_config
from tina.errors import CheckpointError, ConfigError
from tina.families import build_family
from tina.files import read_table, write_text
from tina.inputs import KEPT
from tina.jobconfig import JobConfig
from tina.precision import has_bf16, settle
from tina.sources import find_source
from tina.storage import Place
from tina.stores import below

CONFIG = "config.yaml"
GENERATION = ("shrinkage", "favour", "doubt", "prior")
"""Keys of `prompt` that only generation reads."""


def claim(config: JobConfig, place: Place) -> tuple[JobConfig, int | None]:
    """Save a configuration in its run's folder, or make sure that it was made with the same one.

    Settles every `precision: auto`: as it was for the folder before, else for this machine.

    Returns:
        The settled configuration; if it is new there, when it was written.

    Raises:
        ConfigError: The folder was made with another, or its checkpoint was released with another
            prompt.
        CheckpointError: That checkpoint is unreadable.
    """
    # a typo in a name need not claim the folder at all
    find_source(config.data)
    family = build_family(config.classifier.family, channels=1, image_size=8)
    if (family.on_clip or family.on_imagenet) and config.data.shift:
        raise ConfigError(f"data.shift must be 0 for {family.name}: its trunk sees none of it")
    if family.on_imagenet:
        weights()  # now, not after the data
    # here and below again: since its last claim other processes may have written to the folder
    file = place.fetch(CONFIG, again=True)
    found = {}
    if file.is_file():  # with today's defaults for keys that it was made without
        found = config_to_dict(read_config(JobConfig, file))
    asked = config_to_dict(config)
    mine = settle(asked, found)
    if mine != asked:
        config = config_from_dict(JobConfig, mine)
        where = below(place.location, CONFIG)
        print(f"precision auto: see {where}; bf16 in hardware here: {has_bf16()}")
    loose = {"evaluation", "cluster", "storage", "tracking"}
    if not place.holds("start"):
        loose |= {"denoiser", "diffusion", "train"}
    if found:
        # what training does not read of the prompt, and a tower that nothing was trained for yet
        prompt = found["prompt"] | {key: mine["prompt"][key] for key in GENERATION}
        if not (prompt["tower"] and place.fetch("tower.safetensors", again=True).is_file()):
            prompt["tower"] = mine["prompt"]["tower"]
        found["prompt"] = prompt
        if odd := [k for k in mine if k not in loose and found.get(k) != mine[k]]:
            raise ConfigError(
                f"{place.location} holds a run with another {', '.join(odd)}: "
                "choose another name or remove it"
            )
    if place.holds("checkpoint"):
        header = read_table(place.fetch("checkpoint/config.json", again=True), CheckpointError)
        released = config_from_dict(GeneratorConfig, header.get("config", {})).prompt
        if config.prompt.settled(released) != released:
            raise ConfigError(
                f"checkpoint/ in {place.location} was released with another prompt: remove it "
                "(ray_jobs.evaluate releases another), or go on with its own"
            )
    write_text(file, yaml.safe_dump(mine, sort_keys=False))
    place.keep(CONFIG)
    return config, None if found else place.modified(CONFIG)


def give_up(place: Place, claimed: int | None) -> None:
    """Clear a folder of a configuration alone, written at that time, and what was kept for it."""
    with suppress(OSError):
        mine = place.modified(CONFIG) == claimed  # and no other job's, which goes on
        if mine and {name for name in place.names() if not name.startswith(KEPT)} == {CONFIG}:
            place.clear()
