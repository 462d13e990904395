"""`make ablation`: a row for each candidate and seed, kept when it is whole; what a table says of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from helpers.training_commands import commands_in_this_process, write_digits

from edge_bcs.bench import ablation, commands
from edge_bcs.bench.ablation import Settings, main, page, summary


@pytest.mark.slow
def test_rows_of_a_tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, on digits, by the commands themselves."""
    asked = commands_in_this_process(monkeypatch)
    write_digits(tmp_path / "digits.npz")
    common = [
        "bench",
        str(tmp_path / "r"),
        "--data",
        str(tmp_path / "digits.npz"),
        "--out",
        str(tmp_path / "o"),
    ]
    sizes = {"epochs": 1, "width": 0.0625, "size": 8, "batch-size": 16, "judged-steps": 2, "validation": 0.25}
    small = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    some = ["--candidates", "paper", "growth, recycle", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*common, *small, *some])
    main()
    assert [words[0] for words in asked] == ["train", "export"] * 2  # no test image is seen
    assert "--recycle" in asked[2] and "--grow" in asked[2] and "--recycle" not in asked[0]
    rows = json.loads((tmp_path / "r" / "rows.json").read_text())["rows"]
    assert [(row["candidate"], row["seed"]) for row in rows] == [("paper", 1), ("growth, recycle", 1)]
    assert all(row["held_out"]["samples"] == 16 and "test" not in row for row in rows)
    for row, end in zip(rows, ("paper-1", "growth+recycle-1"), strict=True):  # the images that it chose by
        (trained,) = (tmp_path / "o").glob(f"*-{end}.json")
        assert row["held_out"]["accuracy"] == json.loads(trained.read_text())["found"]["best_clean_acc"]
    assert (tmp_path / "r" / "ablation.png").exists()
    readme = tmp_path / "r" / "README.md"
    readme.write_text(readme.read_text() + "\nMine.\n")
    main()
    assert len(asked) == 4  # rows that are there stay
    tests = ["--test", "--restarts", "1", "--few", "0"]
    monkeypatch.setattr(sys, "argv", [*common, *small, "--candidates", "paper", "--seeds", "1", *tests])
    main()
    assert [words[0] for words in asked[4:]] == ["evaluate"]
    rows = json.loads((tmp_path / "r" / "rows.json").read_text())["rows"]
    tested = {row["candidate"]: row.get("test") for row in rows}
    assert tested["growth, recycle"] is None and tested["paper"]["pgd50"]["samples"] == 64
    main()
    assert len(asked) == 5
    # What was measured with other settings is no answer.
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-3], "2", *sys.argv[-2:]])
    main()
    assert [words[words.index("--restarts") + 1] for words in asked[4:]] == ["1", "2"]
    assert readme.read_text().endswith("\nMine.\n") and "Test images:" in readme.read_text()


@pytest.mark.slow
def test_comparators_begin_with_one_dense_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = commands_in_this_process(monkeypatch)
    write_digits(tmp_path / "digits.npz")
    settings = Settings(epochs=2, width=0.125, size=8, batch_size=16, judged_steps=1, validation=0.25)
    sparser = replace(settings, sparsity="0.8")
    rows = [
        ablation.row(name, 0, str(tmp_path / "digits.npz"), tmp_path / "o", sparser, 1, None)
        for name in ("lwm", "hydra", "admm")
    ]
    trainings = [words for words in asked if words[0] == "train"]
    methods = [words[words.index("--method") + 1] for words in trainings]
    assert methods == ["dense", "lwm", "hydra", "admm"]
    dense = trainings[0][trainings[0].index("-o") + 1]
    assert all(words[words.index("--weights") + 1] == dense for words in trainings[1:])
    assert ["0.8" in words for words in trainings] == [False, True, True, True]
    assert len(list((tmp_path / "o").glob("*.json"))) == 4  # what each one said
    assert all(row["held_out"]["samples"] == 16 for row in rows)
    text = page(rows, "")
    assert "## 8×8 pixels, 80 % sparse, 2 epochs" in text and "HYDRA a\nthird, ADMM" in text
    from edge_bcs import load
    from edge_bcs.method.connectivity import kappa

    for name in methods[1:]:
        sparse = load(next((tmp_path / "o").glob(f"*-{name}-0")))
        assert sparse.kappa == kappa(sparse.size, "0.8")


def test_what_was_cut_in_a_phase_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(commands, "command", lambda *words: asked.append(words) or '{"loss": 1}')
    for name in ("a-0.9-hydra-0", "a-0.9-admm-0"):
        commands.train(tmp_path / name, "--seed", 0)
    assert "--resume" not in asked[0] + asked[1]
    assert len(list(tmp_path.glob("*.json"))) == 2  # each has its own
    (tmp_path / "cut" / "scores").mkdir(parents=True)
    (tmp_path / "cut" / "scores" / "last.safetensors").touch()
    commands.train(tmp_path / "cut", "--seed", 0)
    assert asked[2][-1] == "--resume"


def row(candidate: str, seed: int, clean: float, robust: float) -> dict[str, Any]:
    held_out = {"accuracy": clean, "robust_accuracy": robust, "samples": 100}
    return {
        "candidate": candidate,
        "seed": seed,
        "loss": 2.0,
        "held_out": held_out,
        "settings": asdict(Settings()),
    }


def test_what_an_option_adds_is_told_with_the_same_seed() -> None:
    rows = [row("paper", 0, 0.40, 0.20), row("paper", 1, 0.44, 0.26), row("growth", 1, 0.45, 0.28)]
    found = summary(rows)
    assert list(found) == ["growth", "paper"]  # the most robust first
    growth = found["growth"]
    assert growth["robust_accuracy"]["gain"] == pytest.approx(0.02)  # not 0.28 − 0.23
    assert growth["accuracy"]["deviation"] is None and growth["seeds"] == 1
    assert found["paper"]["robust_accuracy"]["deviation"] == pytest.approx(0.0424, abs=1e-4)
    text = page(rows, "")
    assert "| growth | `--grow` | 1 | 2.000 | 45.0 | 28.0 | +1.0 | +2.0 |" in text
    assert "| paper |  | 2 | 2.000 | 42.0 ± 2.8 | 23.0 ± 4.2 |  |  |" in text
    other = row("paper", 0, 0.5, 0.3)
    other["settings"] = asdict(Settings(size=32))
    assert page([*rows, other], "").count("## 16×16") == page([*rows, other], "").count("## 32×32") == 1
    assert "compression.png" not in page(rows, "")


def test_accuracy_against_compression(tmp_path: Path) -> None:
    """Of candidates with several sparsities, with the settings of the first row: their means."""
    rows = [row("paper", 0, 0.40, 0.20), row("paper", 1, 0.44, 0.26), row("growth", 0, 0.45, 0.28)]
    for sparsity, size in (("0.9", 16), ("0.95", 32)):
        rows.append(
            {**row("paper", 0, 0.60, 0.35), "settings": asdict(Settings(sparsity=sparsity, size=size))}
        )
    found = ablation.compressed(rows)
    assert {name: list(of) for name, of in found.items()} == {"paper": ["0.9", "0.99"]}
    assert found["paper"]["0.99"]["accuracy"]["mean"] == pytest.approx(0.42)
    clean, robust = ablation.draw_compression(found).axes
    assert [list(axes.lines[0].get_xdata()) for axes in (clean, robust)] == [pytest.approx([10, 100])] * 2
    assert list(clean.lines[0].get_ydata()) == pytest.approx([60, 42])
    assert list(robust.lines[0].get_ydata()) == pytest.approx([35, 23])
    ablation.write_page(tmp_path, rows, Settings())
    text = (tmp_path / "README.md").read_text()
    assert (tmp_path / "compression.png").exists() and "## 16×16 pixels, 90 % sparse, 60 epochs" in text
    # Rows that are older than a setting have its default.
    old = row("paper", 0, 0.4, 0.2)
    del old["settings"]["sparsity"]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [old]}))
    assert ablation.rows_of(tmp_path / "rows.json") == [row("paper", 0, 0.4, 0.2)]
    assert ablation.named(Settings()) == "16x16-fgsm-rs-60"
    assert ablation.named(Settings(sparsity="0.9")) == "16x16-fgsm-rs-60-0.9"


def test_every_candidate_is_a_command(tmp_path: Path) -> None:
    """Each one's options are options of `edge-bcs train` that go together."""
    from helpers.commands import run

    candidates = {name: of for name, of in ablation.CANDIDATES.items() if "--method" not in of}
    for name, options in candidates.items():
        said = run(
            "train",
            "--data",
            tmp_path / "nothing.npz",
            "--engine",
            "sparse",
            "--training-attack",
            ablation.Settings().attack,
            *options,
            "-o",
            tmp_path / "run",
        )
        assert said.exit_code and "nothing.npz" in said.output, (name, said.output)
