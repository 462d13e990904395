"""Opening a command's data: what is left out of it is told, and kept so that --resume leaves out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.files import read_small, write_json
from edge_bcs.metadata import parse_object
from edge_bcs.outputs import check_output, json_with
from edge_bcs.progress import say

if TYPE_CHECKING:
    from edge_bcs.data import Dataset
    from edge_bcs.data.faults import OnBad

RECORD = "left-out.json"
_LARGEST = 256 << 20  # a sentence for each of a million images
_TOLD = 20  # sentences on standard error; the report has them all


class Reading:
    """The splits of one data set, as a command reads them.

    Args:
        spec: what --data says. shape: (C, H, W) of the network. on_bad: "stop" or "skip".
        folder: of a training that goes on, whose record says what it left out; None: of a new one.
        watch: called now and then while images are looked at; what it raises ends that.
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
    ) -> None:
        self._spec, self._shape, self._on_bad = spec, shape, on_bad
        self._watch, self._quiet = watch, quiet
        self._known = None if folder is None else _recorded(folder)
        self._left_out: list[dict[str, str]] = []

    def open(self, split: str) -> Dataset:
        """Open one split, saying on standard error what is left out of it."""
        from edge_bcs.data import open_data

        data = open_data(
            self._spec, split, self._shape, on_bad=self._on_bad, known=self._known, watch=self._watch
        )
        self._left_out += [{"split": split, "image": image.name, "why": image.why} for image in data.left_out]
        if data.left_out and not self._quiet:
            count = len(data.left_out) + len(data)
            say(f"{len(data.left_out)} of {count} images ({split}) are left out:")
            for image in data.left_out[:_TOLD]:
                say(f"  {image.why}")
            if len(data.left_out) > _TOLD:
                say(f"  and {len(data.left_out) - _TOLD} more")
        return data

    def report(self) -> dict[str, Any]:
        """Return {"left_out": {"count", "images"}} for the command's report; nothing where nothing may be."""
        if self._on_bad == "stop" and not self._left_out:
            return {}
        return {"left_out": {"count": len(self._left_out), "images": self._left_out}}

    def record(self, folder: Path) -> None:
        """Keep in a training's folder what it leaves out, for `folder` of the next call.

        Raises:
            EdgeBcsError: a file of that name is there and is no such record, or it cannot be written.
        """
        if self._known is not None:
            return
        check_output(folder / RECORD, json_with("count", "images"), "a record of what a training left out")
        if self.report():
            write_json(folder / RECORD, self.report()["left_out"], make_folder=True)
        else:
            (folder / RECORD).unlink(missing_ok=True)


def _recorded(folder: Path) -> dict[str, str] | None:
    """What a training left out, by name, with the reasons; None if it kept no record that can be read."""
    try:
        images = parse_object(read_small(folder / RECORD, _LARGEST))["images"]
        return {str(image["image"]): str(image["why"]) for image in images}
    except (OSError, ValueError, KeyError, TypeError):
        return None
