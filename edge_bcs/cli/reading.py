"""Opening a command's data: what is left out of it is told, and kept so that --resume leaves out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_json
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.outputs import check_output, json_with
from edge_bcs.core.progress import say

if TYPE_CHECKING:
    from edge_bcs.core.resizing import Resize
    from edge_bcs.data import Dataset
    from edge_bcs.data.faults import OnBad

RECORD = "left-out.json"
_LARGEST = 256 << 20  # a sentence for each of a million images
_UNLABELLED = "unlabelled"  # beside the splits of the data
_TOLD = 20  # sentences on standard error; the report has them all


class Reading:
    """The splits of one data set, as a command reads them.

    Args:
        spec: what --data says. shape: (C, H, W) of the network. on_bad: "stop" or "skip".
        folder: of a training that goes on, whose record says what it left out; None: of a new one.
        watch: called now and then while images are looked at; what it raises ends that.
        resize: how image files are brought to ``shape``, where the network says.
        quiet: say nothing of what is left out (all processes of torchrun but the first).
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, int, int],
        on_bad: OnBad,
        *,
        folder: Path | None = None,
        watch: Callable[[], None] = lambda: None,
        quiet: bool = False,
        resize: Resize | None = None,
    ) -> None:
        self._spec, self._shape, self._on_bad = spec, shape, on_bad
        self._watch, self._quiet = watch, quiet
        self._how = {} if resize is None else {"resize": resize}
        self._resumes = folder is not None
        self._recorded = {} if folder is None else _recorded(folder)
        self._left_out: dict[str, dict[str, str]] = {}

    def open(self, split: str) -> Dataset:
        """Open one split, saying on standard error what is left out of it."""
        from edge_bcs.data import open_data

        known: dict[str, str] = {}
        for other, images in self._recorded.items():  # an image of another split has its place, too
            known |= images if other != _UNLABELLED else {}
        data = open_data(
            self._spec,
            split,
            self._shape,
            on_bad=self._on_bad,
            known=known,
            strict=split in self._recorded,
            watch=self._watch,
            **self._how,
        )
        self._tell(split, data)
        return data

    def open_unlabelled(self, folder: str) -> Dataset:
        """Open a folder of photographs without labels, saying on standard error what is left out of it."""
        from edge_bcs.data.faults import Handling
        from edge_bcs.data.photographs import open_photographs

        known, strict = self._recorded.get(_UNLABELLED, {}), _UNLABELLED in self._recorded
        handling = Handling(self._on_bad, known, strict, self._watch)
        data = open_photographs(folder, self._shape, handling, **self._how)
        self._tell(_UNLABELLED, data)
        return data

    def _tell(self, split: str, data: Dataset) -> None:
        self._left_out[split] = {image.name: image.why for image in data.left_out}
        if data.left_out and not self._quiet:
            count = len(data.left_out) + len(data)
            say(f"{len(data.left_out)} of {count} images ({split}) are left out:")
            for image in data.left_out[:_TOLD]:
                say(f"  {image.why}")
            if len(data.left_out) > _TOLD:
                say(f"  and {len(data.left_out) - _TOLD} more")

    def report(self) -> dict[str, Any]:
        """Return {"left_out": {"count", "images"}} for the command's report; nothing where nothing may be."""
        images = [
            {"split": split, "image": name, "why": why}
            for split, left_out in self._left_out.items()
            for name, why in left_out.items()
        ]
        if self._on_bad == "stop" and not images:
            return {}
        return {"left_out": {"count": len(images), "images": images}}

    def record(self, folder: Path) -> None:
        """Keep in a training's folder what it leaves out, for `folder` of the next call.

        Raises:
            EdgeBcsError: a file of that name is there and is no such record, or it cannot be written.
        """
        kept = {**self._recorded, **self._left_out}
        if kept == self._recorded and kept:
            return
        if not self._resumes:
            check_output(folder / RECORD, json_with("left_out"), "a record of what a training left out")
        if self.report() or self._recorded:
            write_json(folder / RECORD, {"left_out": kept}, make_folder=True)
        elif (folder / RECORD).exists():  # a disk that is read-only refuses even what there is not
            (folder / RECORD).unlink(missing_ok=True)


def check_apart(output: Path, spec: str) -> None:
    """Raise EdgeBcsError if a new run would lie among the class folders of the data ``spec``, where the next
    reading would take it for one of them."""
    from edge_bcs.data.listing import around_classes, folder_entries

    data, place = Path(spec).resolve(), output.resolve()
    around = {place, *place.parents}
    if spec == "digits" or data not in around:
        return
    try:
        amid = place == data or any(parent in around for parent in around_classes(data))
        holds_classes = next(folder_entries(data), None) is not None
    except (EdgeBcsError, OSError):  # as the reading of the data will find and say
        return
    if amid and holds_classes:
        raise EdgeBcsError(
            f"{output} lies among the class folders of {spec}, where it would be taken for one: choose "
            "another -o."
        )


def _recorded(folder: Path) -> dict[str, dict[str, str]]:
    """What a training left out of each split that it opened: names and reasons; {} without a record."""
    try:
        content = parse_object(read_small(folder / RECORD, _LARGEST))["left_out"]
        return {
            split: {str(name): str(why) for name, why in dict(images).items()}
            for split, images in dict(content).items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
