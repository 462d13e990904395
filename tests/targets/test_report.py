"""The report: one page that a browser draws without asking anybody for anything; and the trace adds up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.targets import report
from edge_bcs.targets.simulator import Simulation, simulate

from edge_bcs import EdgeBcsError
from edge_bcs.cli import main

Make = Callable[..., Path]

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.fixture(scope="module")
def simulation(tiny_artifact: Make) -> Simulation:
    path = tiny_artifact(objective="trades")
    need = Artifact.read(path).predicted_peak_bytes
    return simulate(path, "raspberry-pi-zero-2w", memory=need - 1000, run=False, curve=True)


class Links(HTMLParser):
    """Collects what a page would load, and the texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.loaded.append(f"{tag} {value}")
        fields = dict(attrs)
        if fields.get("http-equiv") == "Content-Security-Policy":
            self.policy = fields["content"] or ""


def test_the_page_loads_nothing(simulation: Simulation) -> None:
    page = report.html(simulation)
    links = Links()
    links.feed(page)
    assert links.loaded == [] and links.policy.startswith("default-src 'none'")
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address
    assert "@import" not in page and "url(" not in page and "fetch(" not in page


def test_a_name_cannot_break_out_of_the_page(simulation: Simulation) -> None:
    manifest = simulation.artifact.manifest
    network = {**manifest["network"], "name": "</script><img src=x>"}
    artifact = dataclasses.replace(simulation.artifact, manifest={**manifest, "network": network})
    page = report.html(dataclasses.replace(simulation, artifact=artifact))
    assert "<img src=x>" not in page and page.count("</script>") == 2


# Points at every tensor of the map and writes down what the page then says, and where.
_HOVER = """
const said = [...d.querySelectorAll('.tensor')].map(tensor => {
  tensor.scrollIntoView({block: 'center'});
  const box = tensor.getBoundingClientRect();
  const at = {clientX: (box.left + box.right) / 2, clientY: (box.top + box.bottom) / 2, bubbles: true};
  const hit = d.elementFromPoint(at.clientX, at.clientY);
  if (hit) hit.dispatchEvent(new w.PointerEvent('pointermove', at));
  const tip = d.getElementById('tip'), place = tip.getBoundingClientRect();
  return [tensor.dataset.name, tip.innerText, place.left, place.right, place.top, place.bottom];
});
"""


def drawn(page: Path, width: int, tmp_path: Path) -> str:
    """The document after its script has run, in a frame of the given width, and what pointing at it shows."""
    assert BROWSER is not None
    frame = page.with_name(f"frame-{width}.html")
    measure = (
        "<script>onload = () => { const w = document.querySelector('iframe').contentWindow, d = w.document;"
        "const page = d.documentElement.outerHTML, wide = d.documentElement.scrollWidth;"
        f"{_HOVER}document.body.append(page, ' scrolls ', wide, ' says ', JSON.stringify(said), ' end');"
        "}</script>"
    )
    frame.write_text(
        f"<meta charset=utf-8><iframe src='{page.name}' width={width} height=900></iframe>{measure}"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        frame.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return unescape(result.stdout)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to draw the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_it(simulation: Simulation, tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    report.write(page, report.html(simulation))
    document = drawn(page, width, tmp_path)
    training = simulation.plan.phases["training"]
    assert document.count('class="tensor"') == len(training.allocations)
    for tensor in training.allocations:
        assert f'data-name="{tensor.name}"' in document
    assert ">does not fit<" in document and "Raspberry Pi Zero 2 W" in document
    assert f">{simulation.predicted_peak_bytes:,}<" in document
    assert len(simulation.advice.curve) > 3
    for point in simulation.advice.curve:
        assert f'data-budget="{point.budget_bytes}"' in document
    for change in simulation.advice.changes:
        assert change.what in document and change.command in document
    scroll = re.search(r" scrolls (\d+)", document)
    assert scroll and int(scroll[1]) <= width  # nothing to scroll sideways, on a phone neither
    told = json.loads(document.split(" says ")[-1].split(" end")[0])
    types = {tensor.name: (f"{tensor.bytes:,} bytes", tensor.type) for tensor in training.allocations}
    assert {name for name, *_ in told} == types.keys()
    seen = [name for name, text, *_ in told if all(part in text for part in (name, *types[name]))]
    # Slivers less than a pixel high may lie under their neighbours.
    assert len(seen) >= 0.8 * len(types)
    for _, text, left, right, top, bottom in told:
        assert text and 0 <= left < right <= width and 0 <= top < bottom <= 900


def test_the_trace_adds_up(simulation: Simulation) -> None:
    content: dict[str, Any] = json.loads(json.dumps(report.trace(simulation)))
    events = content["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == len(simulation.plan.phases)
    for process, title in names.items():
        phase = simulation.plan.phases[title.split(" ")[0]]
        own = [event for event in events if event["pid"] == process]
        counters = [sum(event["args"].values()) for event in own if event["ph"] == "C"]
        assert max(counters) == phase.peak_bytes and counters[-1] == simulation.plan.bound_bytes
        bars = [event for event in own if event["ph"] == "X"]
        assert [bar["name"] for bar in bars if bar["tid"] == 0] == list(phase.nodes)
        tensors = [bar for bar in bars if bar["tid"] > 0]
        assert sorted(bar["args"]["bytes"] for bar in tensors) == sorted(t.bytes for t in phase.allocations)
        for track in {bar["tid"] for bar in tensors}:  # bars of one track follow one another
            spans = sorted((bar["ts"], bar["ts"] + bar["dur"]) for bar in tensors if bar["tid"] == track)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_files_from_the_command_line(tiny_artifact: Make, tmp_path: Path) -> None:
    files = {name: tmp_path / f"answer.{name}" for name in ("html", "trace", "json")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    result = CliRunner().invoke(main, ["simulate", str(tiny_artifact()), "--no-run", *words])
    assert result.exit_code == 0, result.output
    assert files["html"].read_text().startswith("<!doctype html>")
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert json.loads(files["json"].read_text())["verdict"] == "fits"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answer.html", "answer.json", "answer.trace"]


def test_a_place_that_cannot_be_written(simulation: Simulation, tmp_path: Path) -> None:
    report.write(tmp_path / "made" / "page.html", "x")
    assert (tmp_path / "made" / "page.html").read_text() == "x"
    with pytest.raises(EdgeBcsError, match="cannot be written"):
        report.write(tmp_path / "made" / "page.html" / "page.html", "x")
