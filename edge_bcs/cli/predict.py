"""edge-bcs predict."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import (
    class_names_option,
    engine_option,
    examples,
    json_option,
    machine_of,
    memory_option,
    percent,
    print_json,
    threads_option,
    trust_option,
    trusted,
)
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import say
from edge_bcs.core.text import shown


@click.command()
@click.argument("path", type=click.Path())
@click.argument("images", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--top", type=click.IntRange(1), default=3, show_default=True, help="Classes that are named for an image."
)
@class_names_option
@memory_option
@threads_option
@engine_option
@trust_option
@json_option
@examples("""
    edge-bcs predict run photo.jpg
    edge-bcs predict run new/ --top 1
    edge-bcs predict out/vgg16 a.jpg b.png --json
""")
def command(path: str, images: tuple[str, ...], top: int, as_json: bool, **options: Any) -> None:
    """Name what is on photographs: the likeliest classes of an artifact or a run, with their probabilities.

    PATH is a folder, or an artifact's .tar. IMAGES are image files, and folders of them at any depth. They
    are read as by finetune and evaluate, a micro-batch at a time, inside the byte budget. A file that is no
    image gets a sentence, and the others go on.

    Exit status: 0 all images were read; 1 one was not, or nothing could be done.
    """
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.trainer import Trainer

    artifact = Artifact.read(path, **trusted(options))
    answers: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with Trainer(artifact, **machine_of(options)) as trainer:
        for answer in _answers(trainer, images, top):
            if "why" in answer:
                failed.append(answer)
                say(shown(answer["why"]))
            elif as_json:
                answers.append(answer)
            else:
                named = ", ".join(
                    f"{shown(one['name'])} {percent(one['probability'])}" for one in answer["classes"]
                )
                click.echo(f"{shown(answer['image'])}: {named}")
        peak = trainer.peak_bytes
    if as_json:
        print_json({"path": path, "images": answers, "failed": failed, "peak_bytes": peak})
    sys.exit(1 if failed else 0)


def _answers(trainer: Any, images: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
    """Yield {"image", "classes"}, or {"image", "why"} where it cannot be used, for each image in order."""
    import numpy as np

    from edge_bcs.data.faults import BadImageError
    from edge_bcs.data.images import check_channels
    from edge_bcs.data.photographs import read_image

    shape = trainer.artifact.input_shape
    check_channels(shape)
    files = _files(images)
    while part := list(itertools.islice(files, trainer.artifact.attack_micro_batch)):
        whys, read = [why for _, why in part], []
        for number, (file, why) in enumerate(part):
            try:
                if not why:
                    read.append(read_image(Path(file), shape, trainer.artifact.resize))
            except BadImageError as error:
                whys[number] = str(error)
        rows = iter(trainer.probabilities(np.stack(read)) if read else ())
        for (file, _), why in zip(part, whys, strict=True):
            if why:
                yield {"image": file, "why": why}
                continue
            row = next(rows)
            best = np.argsort(-row, kind="stable")[:top]
            named = [
                {"name": trainer.name_of(label), "label": int(label), "probability": float(row[label])}
                for label in best
            ]
            yield {"image": file, "classes": named}


def _files(images: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (file, "") for each image file, and (folder, why) for a folder that cannot be used."""
    from edge_bcs.data.photographs import image_files

    for image in images:
        try:
            yield from ((str(file), "") for file in image_files([image]))
        except EdgeBcsError as error:
            yield image, str(error)
