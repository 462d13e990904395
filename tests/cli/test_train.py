"""edge-bcs train: every method, resumed, and stopped by Ctrl-C."""

# mypy: disable-error-code="arg-type, assignment, call-overload"

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.commands import run, succeed
from helpers.training_commands import SMALL, write_digits


def train(tmp_path: Path, *more: object) -> dict[str, Any]:
    pytest.importorskip("torch")
    if not (tmp_path / "digits.npz").exists():
        write_digits(tmp_path / "digits.npz")
    common = ("--model", "resnet18", "--data", tmp_path / "digits.npz", "--steps", 2, "--batch-size", 16)
    return succeed("train", *common, *SMALL, *more)


@pytest.mark.parametrize("engine", ["torch", "sparse"])
def test_train_on_the_host(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from edge_bcs.exporters.passes import Passes

    result = train(tmp_path, "--engine", engine, "-o", tmp_path / "checkpoint")
    again = train(tmp_path, "--engine", engine, "-o", tmp_path / "again")
    assert {**again, "seconds": 0, "output": 0} == {**result, "seconds": 0, "output": 0}
    assert result["step"] == 2 and 0 <= result["best_robust_acc"] <= result["best_clean_acc"] <= 1
    # The network's shape and classes, and how far it has been trained, come from the checkpoint.
    exported = succeed("export", "--checkpoint", tmp_path / "checkpoint", "-o", tmp_path / "a")
    assert exported["batch_norm"] == "frozen" and exported["sparsity"] == "0.8"
    assert load_file(tmp_path / "a")["step"] == "2"
    evaluate = ("evaluate", "--data", tmp_path / "digits.npz", "--attack-steps", 1)
    evaluated = succeed(*evaluate, tmp_path / "checkpoint")
    assert evaluated["engine"] == "torch" and 0 <= evaluated["robust_accuracy"] <= evaluated["accuracy"] <= 1
    board = succeed(*evaluate, tmp_path / "a")
    from_artifact = succeed(*evaluate, tmp_path / "a", "--engine", "torch")
    assert board["accuracy"] == from_artifact["accuracy"] == evaluated["accuracy"]
    assert from_artifact["kappa"] == exported["kappa"]
    # An option that is torch's alone chooses the engine; the images and the report's names are the same.
    sample = (*evaluate, tmp_path / "a", "--limit", 30)
    board, by_torch = succeed(*sample), succeed(*sample, "--resume", tmp_path / "counts.json")
    assert (board["engine"], by_torch["engine"]) == ("board", "torch")
    names = {"clean_acc", "norm", "eps", "attack", "steps", "restarts", "step_size"}
    names |= {"samples", "sparsity", "kappa", "size", "step"}
    assert all(board[name] == by_torch[name] for name in names)
    assert set(board) & set(by_torch) >= {"adv_acc", "accuracy", "robust_accuracy"}
    with monkeypatch.context() as patch:
        passes: list[int] = []
        forward = Passes.forward
        patch.setattr(
            Passes, "forward", lambda self, x, *kept: passes.append(len(x)) or forward(self, x, *kept)
        )
        by_graphs = succeed(*sample, "--engine", "sparse", "--step-size", "2/255", "--corruptions")
    assert len(passes) > 14 * 5  # of the corruptions alone
    expected = succeed(*sample, "--engine", "torch", "--step-size", "2/255", "--corruptions")
    assert (by_graphs.pop("engine"), expected.pop("engine")) == ("sparse", "torch")
    assert {**by_graphs, "seconds": 0} == {**expected, "seconds": 0}
    refused = run(*evaluate, tmp_path / "a", "--engine", "sparse", "--device", "cpu")
    assert refused.exit_code == 1 and "leave --device out" in refused.output
    refused = run(*evaluate, tmp_path / "a", "--engine", "sparse", "--memory", "16MiB")
    assert refused.exit_code == 1 and "--memory needs --engine board or native" in refused.output
    half = ("--attack-precision", "half", "-o", tmp_path / "none")
    refused = run("train", "--data", "digits", "--model", "resnet18", *half)
    assert refused.exit_code == 1 and "--attack-precision needs --engine sparse" in refused.output


def load_file(artifact: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(artifact / "state.safetensors"), framework="numpy") as stored:
        return dict(stored.metadata())


def test_train_every_baseline(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from helpers.training import lines

    bcs = train(tmp_path, "-o", tmp_path / "bcs")
    fixed = train(tmp_path, "--method", "fixed", "--counts-from", tmp_path / "bcs", "-o", tmp_path / "fixed")
    assert bcs["connections"] == fixed["connections"]
    with_other_counts = ("--method", "fixed", "--counts-from", tmp_path / "bcs", "--sparsity", 0.9)
    refused = run(
        "train", "--data", tmp_path / "digits.npz", "--model", "resnet18", *SMALL, *with_other_counts
    )
    assert refused.exit_code == 1 and "which is not a sparsity of 0.9" in refused.stderr
    random = train(tmp_path, "--method", "random", "-o", tmp_path / "random")
    first = next(iter(random["connections"].values()))
    assert first == pytest.approx(0.2 * 9 * 4, abs=1)  # the same share of every layer: 1 × 4 kernels of 3 × 3
    dense = train(tmp_path, "--method", "dense", "-o", tmp_path / "dense")
    assert sum(dense["connections"].values()) == 5 * sum(bcs["connections"].values())
    lengths = ("--pretrain-epochs", 1, "--search-epochs", 1, "--epochs", 1, "--admm-interval", 1)
    rates = ("--learning-rate", 0.05, "--fine-tuning-rate", 0.02)
    for method in ("lwm", "hydra", "admm"):
        pruned = train(tmp_path, "--method", method, *lengths, *rates, "-o", tmp_path / method)
        begun = [lines(tmp_path / method / phase, "metrics.jsonl")[0] for phase in ("pretraining", "")]
        assert [line["learning_rate"] for line in begun] == [0.05, 0.02]
        assert sum(pruned["connections"].values()) == sum(bcs["connections"].values())
        succeed("export", "--checkpoint", tmp_path / method, "-o", tmp_path / f"{method}.artifact")


@pytest.mark.filterwarnings("always::edge_bcs.core.errors.EdgeBcsDeprecationWarning")
def test_pruning_begins_with_the_weights_of_a_file(tmp_path: Path) -> None:
    """A checkpoint as it is, by its old option with a word; a state dict as it is, or trained further."""
    torch = pytest.importorskip("torch")
    import edge_bcs

    train(tmp_path, "--method", "dense", "-o", tmp_path / "dense")
    torch.save(edge_bcs.load(tmp_path / "dense").network.state_dict(), tmp_path / "dense.pt")
    weights = {
        "file": ("--weights", tmp_path / "dense" / "checkpoint.safetensors"),
        "old": ("--pretrained", tmp_path / "dense"),
        "state": ("--weights", tmp_path / "dense.pt"),
        "more": ("--weights", tmp_path / "dense.pt", "--pretrain-epochs", 1),
    }
    command = ("train", "--data", tmp_path / "digits.npz", "--model", "resnet18", *SMALL, "--method", "lwm")
    for name, words in weights.items():
        result = run(*command, *words, "--steps", 1, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        old = (
            "--pretrained FILE is an old spelling that a later release refuses; write --weights"
            in result.stderr
        )
        assert old == (name == "old")
        assert (tmp_path / name / "pretraining").exists() == (name == "more")
    states = [edge_bcs.load(tmp_path / name).state() for name in weights]
    same = [all((one[key] == states[0][key]).all() for key in one) for one in states]
    assert same == [True, True, True, False]
    for words, sentence in (
        ((*weights["file"], "--pretrain-epochs", 1), "a checkpoint is taken as it is"),
        ((*weights["state"], *weights["old"]), "--pretrained is the old spelling of --weights"),
    ):
        refused = run(*command, *words, "-o", tmp_path / "refused")
        assert refused.exit_code == 1 and sentence in refused.stderr


def test_train_rst_and_resume(tmp_path: Path) -> None:
    write_digits(tmp_path / "more.npz")
    rst = ("--objective", "rst", "--pseudo-labelled", tmp_path / "more.npz", "-o", tmp_path / "rst")
    first = train(tmp_path, *rst)
    again = train(tmp_path, *rst, "--resume")
    assert again["step"] == first["step"] and again["best_step"] == first["best_step"]


def test_what_is_resumed_has_the_same_pixels(tmp_path: Path) -> None:
    kept = ("--steps", 2, "--batch-size", 16, "-o", tmp_path / "run")
    train(tmp_path, "--normalize", "0.5:0.2", *kept)
    for words in (), ("--normalize", "0.5:0.3"):
        given = ("train", "--model", "resnet18", *SMALL, "--data", tmp_path / "digits.npz", *words, *kept)
        said = " ".join(run(*given, "--resume").output.split())
        assert "was begun with normalize {'mean': [0.5], 'std': [0.2]}, not" in said
        assert "resume it as it was begun, or choose another folder" in said
    train(tmp_path, "--normalize", "0.5:0.2", *kept, "--resume")


def test_square_and_its_curve(tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack")
    train(tmp_path, "-o", tmp_path / "run")
    square = ("--attack", "square", "--queries", 5, "--queries", 20, "--limit", 12)
    report = succeed("evaluate", tmp_path / "run", "--data", tmp_path / "digits.npz", *square)
    assert [point["queries"] for point in report["curve"]] == [5, 20]
    assert report["curve"][1]["adv_acc"] <= report["curve"][0]["adv_acc"]


def test_train_stopped_by_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_bcs.training.backends import TorchBackend

    write_digits(tmp_path / "digits.npz")
    step = TorchBackend.step

    def interrupted_at(when: int) -> Callable[..., Any]:
        def interrupt(self: TorchBackend, batch: Any, hyper: Any, number: int, *more: Any) -> Any:
            if number == when:
                raise KeyboardInterrupt
            return step(self, batch, hyper, number, *more)

        return interrupt

    common = ("--model", "resnet18", "--data", tmp_path / "digits.npz", *SMALL, "--batch-size", 16)
    go_on = f"go on with --resume -o '{tmp_path}/my run'."
    for when, said in ((0, "; nothing was saved yet."), (4, f" after step 4; {go_on}")):
        monkeypatch.setattr(TorchBackend, "step", interrupted_at(when))
        result = run("train", *common, "--epochs", 2, "-o", tmp_path / "my run")
        assert result.exit_code == 130 and result.stderr.endswith(f"Stopped{said}\n")


def recommended(result: Result) -> list[list[str]]:
    """The commands that an answer recommends, as a shell reads them: words without "edge-bcs"."""
    assert result.exit_code == 0, result.output
    return [
        shlex.split(line.partition("edge-bcs ")[2])
        for line in result.output.splitlines()
        if "edge-bcs " in line
    ]


@pytest.mark.parametrize("classes", [3, 10])
def test_what_is_recommended_fits_the_network_and_can_be_typed(tmp_path: Path, classes: int) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "it's my net; $HOME"
    small = ("--model", "resnet18", "--width", 0.0625, "--input-size", 8, "--sparsity", 0.9)
    exported = run("export", *small, "--classes", classes, "--no-validate", "-o", folder)
    simulate, finetune = recommended(exported)
    assert run(*simulate, "--no-run").exit_code == 0
    assert finetune[:2] == ["finetune", str(folder)]
    if classes != 10:
        assert "digits" not in finetune and "a folder of 3 class folders" in exported.stdout
        return
    (evaluate,) = recommended(run(*finetune, "--steps", 1, "--batch-size", 8, "--eval-samples", 0))
    assert evaluate == ["evaluate", f"{folder}-run", "--data", "digits"]
    assert run(*evaluate, "--attack", "none", "--limit", 8).exit_code == 0


def test_a_recipe_is_the_options_that_it_has(tmp_path: Path) -> None:
    from edge_bcs.checkpoint import read_checkpoint

    def plan(name: str, *more: object) -> str:
        train(tmp_path, *more, "-o", tmp_path / name)
        return read_checkpoint(tmp_path / name / "last.safetensors").metadata["plan"]

    best = plan("best", "--recipe", "best")
    assert best == plan("grow", "--grow") and '"growth_share": 0.3' in best
    paper = plan("paper", "--recipe", "paper")
    assert paper == plan("default") and "growth" not in paper
    given = plan("given", "--recipe", "best", "--grow", 0.1, "--grow-until", 0.5)
    assert '"growth_share": 0.1' in given and '"growth_until": 0.5' in given
    refused = run("train", "--data", tmp_path / "digits.npz", "--recipe", "best", "--method", "random")
    assert refused.exit_code and "--recipe belongs to bcs, not to random" in refused.output
    for more in (("--gradual",), ("--rewire", "by-layer"), ("--train", "head")):
        refused = run("train", "--data", tmp_path / "digits.npz", "--recipe", "best", *more)
        assert refused.exit_code and "--recipe best has --grow" in refused.output
