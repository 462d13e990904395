"""The page and the figure of `edge_bcs.bench.fleet_learning`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.files import write_atomically, write_json
from edge_bcs.plots import save

FIGURE = "rounds.png"
NAMES = {
    "ours": "merged (ours)",
    "feddst": "FedDST's rule",
    "dense": "FedAvg of dense weights, pruned",
    "seeds": "ours, each board grows elsewhere",
    "alone": "each board alone (mean)",
}
SPLITS = {"iid": "evenly", "dirichlet": "by class, Dirichlet"}
_PAGE = """# What boards learn together

`make fleet-learning DATA=cifar10`: CIFAR-10 (JPEG), ResNet-18 of a quarter of the width on 16×16 pixels,
99 % sparse from the first step, dealt out to simulated boards. In a round each board goes once over its
images with what the round before became; then they are merged. AT with {attack_steps} step of size
{step_size:g}/255 from a random start, batches of {batch_size}, the paper's schedule over {rounds} rounds,
batch norms with statistics of the batch. All begin with the same network, and except where it says otherwise
all boards have the same seed. Each row is one training; one standard deviation of a share of 40 % of
{samples:,} images is {deviation:.1f} points.

| way to merge | which positions stay, and with what values |
| --- | --- |
| ours | the κ largest of \\|Σ n·w / Σ n\\|, an absent connection counted as 0; the mean over the holders |
| ours, each board grows elsewhere | the same; but each board has a seed of its own in every round |
| FedDST's rule | the mean over the holders, and the κ largest of it, over the whole network |
| FedAvg of dense weights, pruned | the mean over all boards, absent counted as 0, and the κ largest of it |

FedDST itself prunes layer by layer and grows by gradients; here its rule for merging alone is compared, and
boards train alike in all rows. Test images choose nothing: what is measured is the state after the last
round.

## At the end

{samples:,} test images. *In common*: the share of their positions that two boards have in common when they
are merged; *of one board*: of the merged network's, those that one board alone held. Alone, no board learns
with the images of others, for as many rounds.

| boards | images dealt | way | rounds | clean | PGD-{measured_steps} | in common | of one board |
| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |
{ends}

{missing}
![by rounds]({figure})

{held_out:,} images that are held out of training; solid under PGD-{measured_steps}, dotted clean.

## What is sent

{bytes}
"""


def write_page(
    results: Path, rows: Sequence[Mapping[str, Any]], planned: Iterable[tuple[int, str, str]]
) -> None:
    """Write the rows, the page and the figure.

    Args:
        rows: of `fleet_learning.Run.row`. planned: (boards, split, method) that there shall be.
    """
    begun = [row for row in rows if row["rounds"]]
    write_json(results / "learning.json", {"runs": begun, "planned": sorted(planned)}, make_folder=True)
    write_atomically(results / "README.md", page(begun, planned).encode())
    if begun:
        save(lambda: figure(begun), results / FIGURE)


def page(rows: Sequence[Mapping[str, Any]], planned: Iterable[tuple[int, str, str]]) -> str:
    """Return the page of rows."""
    if not rows:
        return "# What boards learn together\n\nNothing is measured yet.\n"
    ordered = sorted(rows, key=_place)
    settings = ordered[0]["settings"]
    samples = max([one["samples"] for row in rows for one in row["test"] or ()], default=8000)
    return _PAGE.format(
        **{name: settings[name] for name in ("attack_steps", "step_size", "batch_size", "rounds")},
        **{name: settings[name] for name in ("measured_steps", "held_out")},
        samples=samples,
        deviation=100 * (0.4 * 0.6 / samples) ** 0.5,
        ends="\n".join(_end(row) for row in ordered),
        missing=_missing(ordered, planned),
        figure=FIGURE,
        bytes=_bytes(ordered),
    )


def _place(row: Mapping[str, Any]) -> tuple[int, int, int]:
    settings = row["settings"]
    return settings["boards"], list(SPLITS).index(settings["split"]), list(NAMES).index(row["method"])


def _split(settings: Mapping[str, Any]) -> str:
    of = f" {settings['alpha']:g}" if settings["split"] == "dirichlet" else ""
    return f"{SPLITS[settings['split']]}{of}"


def _end(row: Mapping[str, Any]) -> str:
    settings, rounds, test = row["settings"], row["rounds"], row["test"]
    shares = ["", ""]
    if test:
        for number, name in enumerate(("accuracy", "robust_accuracy")):
            found = [100 * one[name] for one in test]
            shares[number] = f"{np.mean(found):.1f} %"
            if len(found) > 1:
                shares[number] += f" ({min(found):.1f} to {max(found):.1f})"
    masks = [f"{100 * rounds[-1][name]:.1f} %" if name in rounds[-1] else "" for name in ("overlap", "alone")]
    done = f"{len(rounds)}" + ("" if len(rounds) == settings["rounds"] else f" of {settings['rounds']}")
    cells = (f"{settings['boards']}", _split(settings), NAMES[row["method"]], done, *shares, *masks)
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def _missing(rows: Sequence[Mapping[str, Any]], planned: Iterable[tuple[int, str, str]]) -> str:
    done = {
        (row["settings"]["boards"], row["settings"]["split"], row["method"]) for row in rows if row["test"]
    }
    missing = [one for one in sorted(planned) if one not in done]
    if not missing:
        return ""
    told = "; ".join(
        f"{boards} boards, {SPLITS[split]}: {NAMES[method]}" for boards, split, method in missing
    )
    return f"Not measured to the end yet (the same command goes on with them): {told}.\n"


def _bytes(rows: Sequence[Mapping[str, Any]]) -> str:
    told = [row for row in rows if "sent" in row["rounds"][-1]]
    if not told:
        return "Nothing was sent yet.\n"
    lines = ["| boards | images dealt | way | a board sends in a round | all boards, all rounds, both ways |",
             "| ---: | --- | --- | ---: | ---: |"]  # fmt: skip
    for row in told:
        settings, rounds = row["settings"], row["rounds"]
        each = np.mean([one["sent"] for one in rounds]) / settings["boards"]
        whole = sum(one["sent"] + one["received"] for one in rounds)
        lines.append(
            f"| {settings['boards']} | {_split(settings)} | {NAMES[row['method']]} | {each:,.0f} bytes | "
            f"{whole / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the figure: accuracy and masks by rounds, a row of panels for each deal."""
    from matplotlib import pyplot

    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=_place):
        groups.setdefault((row["settings"]["boards"], _split(row["settings"])), []).append(row)
    drawn, panels = pyplot.subplots(len(groups), 2, figsize=(11, 3.6 * len(groups)), squeeze=False)
    for (left, right), ((boards, split), some) in zip(panels, groups.items(), strict=True):
        for row in some:
            colour = f"C{list(NAMES).index(row['method'])}"
            for name, style in (("robust_accuracy", "-"), ("accuracy", ":")):
                points = [(one["round"], 100 * one[name]) for one in row["rounds"] if name in one]
                label = NAMES[row["method"]] if style == "-" else None
                if points:
                    left.plot(*zip(*points, strict=True), style, color=colour, label=label)
            points = [(one["round"], 100 * one["overlap"]) for one in row["rounds"] if "overlap" in one]
            if points:
                right.plot(*zip(*points, strict=True), color=colour, label=NAMES[row["method"]])
        left.set(title=f"{boards} boards, {split}: accuracy (%)", xlabel="round", ylim=(0, None))
        right.set(title="positions that two boards have in common (%)", xlabel="round")
        left.legend(frameon=False, fontsize=8)
    drawn.tight_layout()
    return drawn
