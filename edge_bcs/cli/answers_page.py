"""What a network answered, as one web page: nothing is loaded from anywhere, and nothing runs in it."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from edge_bcs import __version__
from edge_bcs.core.answers import NO_ANSWER, Answers, Array, Mistake
from edge_bcs.core.text import shown

TITLE = "Answers of an edge-bcs network"
"""By which such a page is recognised."""
_MOST_CLASSES = 40  # in a table of all against all
_MOST_PAIRS = 40  # without that table
_FEW_PAIRS = 10  # below it
_LARGEST_SIDE = 224  # pixels of a picture
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1a2230; --soft: #5d6878;
  --line: #dfe3e9; --grid: #e9ecf1; --right: 47 111 222; --wrong: 192 38 38;
  --bar: #2f6fde; --robust: #1a9c8c; }
@media (prefers-color-scheme: dark) { :root { --page: #11151b; --card: #1a2029; --ink: #e7ebf1;
  --soft: #98a3b3; --line: #2d3541; --grid: #262e39; --right: 96 150 255; --wrong: 240 90 82; --bar: #7aa8ff;
  --robust: #4cc3ae; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 4px 0 10px; color: var(--soft); overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 16px; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 16px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
.list { width: 100%; }
.list th, .list td { text-align: right; padding: 5px 0 5px 14px; border-bottom: 1px solid var(--grid); }
.list th:first-child, .list td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
@media (min-width: 561px) { .classes th:nth-child(n + 3) { width: 32%; } }
.list.pairs th:nth-child(2), .list.pairs td:nth-child(2) { text-align: left; overflow-wrap: anywhere; }
.bar { display: block; height: 5px; border-radius: 3px; background: var(--grid); min-width: 60px;
  margin-top: 3px; }
.bar i { display: block; height: 5px; border-radius: 3px; background: var(--bar); }
.bar i.robust { background: var(--robust); }
.matrix td, .matrix th { text-align: center; min-width: 34px; padding: 4px; border: 1px solid var(--card); }
.matrix tbody th { text-align: right; padding-right: 8px; position: sticky; left: 0; background: var(--card);
  max-width: 130px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 8px;
  max-height: 130px; overflow: hidden; white-space: nowrap; }
.matrix thead th:first-child { writing-mode: horizontal-tb; transform: none; }
.matrix td { background: var(--page); } .matrix td.none { color: transparent; }
.matrix td.right { background: rgb(var(--right) / var(--part)); }
.matrix td.wrong { background: rgb(var(--wrong) / var(--part)); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--page);
  border: 1px solid var(--line); border-radius: 8px; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: 13px; line-height: 1.4; margin-top: 5px; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); display: block; font-size: 12px; }
footer { color: var(--soft); font-size: 13px; margin-top: 18px; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } section { padding: 14px; }
  h1 { font-size: 20px; }
  .tiles { gap: 8px; grid-template-columns: 1fr 1fr; } .tile { padding: 10px 12px; }
  .tile b { font-size: 17px; }
  .list th, .list td { padding-left: 8px; font-size: 13px; } .pictures { grid-template-columns: 1fr 1fr; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: dict[str, Any], answers: Answers, name: Callable[[int], str]) -> str:
    """Return the page.

    Args:
        report: of `edge-bcs evaluate`. answers: what was counted beside it.
        name: of the image at a place of the data, as people find it again.
    """
    robust = report.get("robust_accuracy")
    attack = str(report["attack"])
    steps = f"-{report['steps']}" if attack == "pgd" and "steps" in report else ""
    tiles = [("images", f"{report['samples']:,}"), ("clean accuracy", _percent(report["accuracy"]))]
    if robust is not None:
        tiles.append((f"under {attack.upper()}{steps}, ε = {_epsilon(report['eps'])}", _percent(robust)))
    tiles.append(("classes with images", f"{int((answers.samples > 0).sum()):,}"))
    sections = [_classes(answers), *_confusion(answers), _worst(answers.worst, answers.classes, name)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{TITLE}</title>\n<style>{_STYLE}</style>\n<main>",
            f"<header><h1>{_text(report['path'])}</h1>",
            f"<p>measured on {_text(report['data'])} ({_text(report['split'])})</p></header>",
            '<div class="tiles">',
            *(f'<div class="tile"><b>{value}</b><span>{title}</span></div>' for title, value in tiles),
            "</div>",
            *sections,
            f"<footer>edge-bcs {__version__}</footer>\n</main>\n</html>\n",
        ]
    )


def _classes(answers: Answers) -> str:
    rows = []
    for entry in sorted(answers.per_class(), key=lambda one: one["accuracy"]):
        cells = [_text(entry["class"]), f"{entry['samples']:,}", _bar(entry["accuracy"], "clean")]
        if answers.attacked:
            cells.append(_bar(entry["robust_accuracy"], "robust"))
        rows.append(cells)
    head = ["class", "images", "clean", *(["under attack"] if answers.attacked else [])]
    table = _table("list classes", head, rows)
    return f"<section><h2>Each class, the worst first</h2>{table}</section>"


def _bar(share: float, kind: str) -> str:
    return (
        f'{_percent(share)}<span class="bar"><i class="{kind}" style="width:{100 * share:.1f}%"></i></span>'
    )


def _confusion(answers: Answers) -> Iterator[str]:
    involved = np.flatnonzero(answers.confusion.sum(axis=0) + answers.samples)
    if len(involved) <= _MOST_CLASSES:
        yield _matrix(answers, involved)
    pairs = answers.confused()
    most = _FEW_PAIRS if len(involved) <= _MOST_CLASSES else _MOST_PAIRS
    if pairs:
        rows = [
            [_text(pair["class"]), _text(pair["taken_for"]), f"{pair['images']:,}"] for pair in pairs[:most]
        ]
        left = f"<p>and {len(pairs) - most:,} more</p>" if len(pairs) > most else ""
        table = _table("list pairs", ["class", "taken for", "images"], rows)
        yield f"<section><h2>Most often confused</h2>{table}{left}</section>"


def _matrix(answers: Answers, involved: Array) -> str:
    names = [_text(answers.classes[label]) for label in involved]
    rows = []
    for label, name in zip(involved, names, strict=True):
        counts = answers.confusion[label, involved]
        cells = []
        for answer, count in zip(involved, counts, strict=True):
            kind = "none" if not count else "right" if answer == label else "wrong"
            part = f' style="--part:{0.15 + 0.75 * count / counts.sum():.2f}"' if count else ""
            cells.append(f'<td class="{kind}"{part}>{count}</td>')
        rows.append(f'<tr><th title="{name}">{name}</th>{"".join(cells)}</tr>')
    head = "".join(f"<th>{name}</th>" for name in names)
    table = (
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    words = "A row is a class, a column what its images were taken for, as they are (no attack)."
    return f"<section><h2>What is taken for what</h2><p>{words}</p>{table}</section>"


def _worst(worst: Sequence[Mistake], classes: Sequence[str], name: Callable[[int], str]) -> str:
    if not worst:
        return "<section><h2>Mistakes</h2><p>None: every image was answered rightly.</p></section>"
    figures = []
    for mistake in worst:
        label = _text(classes[mistake.label])
        if mistake.answer == NO_ANSWER:
            alternative, words = f"{label}, without an answer", f"<b>{label}</b>, without an answer"
        else:
            answer = _text(classes[mistake.answer])
            alternative = f"{label}, taken for {answer}"
            words = f"<b>{label}</b> {_percent(mistake.share)}, taken for "
            words += f"<b>{answer}</b> {_percent(mistake.wrong_share)}"
        figures.append(
            f"<figure>{_picture(mistake.image, alternative)}<figcaption>{words}"
            f"<span>{_text(name(mistake.place))}</span></figcaption></figure>"
        )
    words = "The images whose own class got the least probability, as the network sees them."
    pictures = f'<div class="pictures">{"".join(figures)}</div>'
    return f"<section><h2>The worst mistakes</h2><p>{words}</p>{pictures}</section>"


def _picture(image: Array, alternative: str) -> str:
    channels, height, width = image.shape
    if channels not in (1, 3):
        return ""
    every = -(-max(height, width) // _LARGEST_SIDE)
    small = ' class="small"' if max(height, width) < 100 else ""
    data = base64.b64encode(png(image[:, ::every, ::every])).decode()
    return f'<img{small} alt="{alternative}" src="data:image/png;base64,{data}">'


def png(image: Array) -> bytes:
    """Return an image f32 [C, H, W] in [0, 1], of 1 (grey) or 3 channels, as a PNG of 8 bits."""
    channels, height, width = image.shape
    pixels = np.rint(np.nan_to_num(image).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def _table(kind: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    content = f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{content}</table></div>'


def _text(text: object) -> str:
    return escape(shown(str(text)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _epsilon(epsilon: float) -> str:
    of_255 = 255 * epsilon
    return f"{of_255:.3g}/255" if abs(of_255 - round(of_255)) < 1e-6 else f"{epsilon:.4g}"
