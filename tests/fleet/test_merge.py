"""Runs made one: what is merged, what is refused or left out, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import state as states
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers.artifacts import DENSE, KAPPA, SIZE, STATISTICS, write_artifact
from helpers.commands import run as command
from safetensors.numpy import load_file

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.fleet.merging import merge

Array = np.ndarray[Any, Any]
State = dict[str, Array]


def a_state(seed: int, index: list[int] | None = None) -> State:
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(SIZE, KAPPA, replace=False)) if index is None else np.array(index)
    return {
        "coo.value": rng.normal(size=KAPPA).astype(np.float32),
        "coo.index": chosen.astype(np.int32),
        "coo.momentum": rng.normal(size=KAPPA).astype(np.float32),
        "dense.value": rng.normal(size=DENSE).astype(np.float32),
        "dense.momentum": rng.normal(size=DENSE).astype(np.float32),
        "batchnorm.mean": rng.normal(size=STATISTICS).astype(np.float32),
        "batchnorm.variance": rng.random(STATISTICS).astype(np.float32),
    }


class Fleet:
    """Runs of hand-made artifacts below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def artifact(self, name: str = "artifact", **changes: Any) -> Path:
        if not (self.folder / name).exists():
            write_artifact(self.folder / name, lambda manifest: manifest.update(changes))
        return self.folder / name

    def run(
        self,
        name: str,
        state: State,
        images: int | None = 64,
        artifact: Path | None = None,
        step: int = 3,
        classes: tuple[str, ...] | None = None,
    ) -> Path:
        metadata = {"step": str(step), "seed": "7"}
        if images is not None:
            metadata["images"] = str(images)
        write_run(self.folder / name, Artifact.read(artifact or self.artifact()), state, metadata, classes)
        return self.folder / name

    def bad(self, name: str, state: State, change: Callable[[State], None], **more: Any) -> Path:
        """A run whose writer checked nothing."""
        change(state)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(states, "state_fault", lambda *any_: None)
            return self.run(name, state, **more)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def state_of(path: Path | str) -> tuple[State, Mapping[str, str]]:
    return read_state(Artifact.read(path))


# What is merged


def test_a_merged_run_by_hand(fleet: Fleet) -> None:
    a, b = a_state(0, [2, 5, 10, 20, 71]), a_state(1, [2, 6, 10, 30, 71])
    a["coo.value"][:] = [1, 0.25, 4, -2, 1]
    b["coo.value"][:] = [3, 0.5, -4, 1, 2]
    report = merge([fleet.run("a", a, step=9), fleet.run("b", b, step=4)], fleet.folder / "m")
    # Scores: 2: 2, 5: 0.125, 6: 0.25, 10: 0, 20: 1, 30: 0.5, 71: 1.5.
    found, metadata = state_of(fleet.folder / "m")
    assert found["coo.index"].tolist() == [2, 6, 20, 30, 71]
    assert found["coo.value"].tolist() == [2, 0.5, -2, 1, 1.5]
    assert not found["coo.momentum"].any() and not found["dense.momentum"].any()
    for name in ("dense.value", "batchnorm.mean", "batchnorm.variance"):
        assert found[name] == pytest.approx((a[name] + b[name]) / 2)
    assert metadata == {
        "format": "edge-bcs-state", "version": "1", "step": "9", "seed": "7", "images": "128",
    }  # fmt: skip
    assert report["overlap"] == {"union": 7, "common": 3, "pairwise": 3 / 5}
    assert [(row["kept"], row["alone"]) for row in report["runs"]] == [(3, 1), (4, 2)]
    assert report["bytes"]["connections"] == 8 * KAPPA and report["bytes"]["dense"] == 4 * SIZE
    assert json.loads((fleet.folder / "m" / "merge.json").read_text()) == report


def test_images_seen_are_the_weights_unless_others_are_given(fleet: Fleet) -> None:
    a, b = a_state(0), a_state(1)
    runs = [fleet.run("a", a, images=300), fleet.run("b", b, images=100)]
    for weights, share in ((None, 0.75), ([1, 1], 0.5), ([0.5, 2], 0.2)):
        out = fleet.folder / f"m{share}"
        merge(runs, out, weights=weights)
        expected = share * a["dense.value"].astype(np.float64) + (1 - share) * b["dense.value"]
        assert state_of(out)[0]["dense.value"] == pytest.approx(expected, rel=1e-6)
    assert state_of(fleet.folder / "m0.75")[1]["images"] == "400"


def test_given_weights_are_no_count_of_images(fleet: Fleet) -> None:
    runs = [fleet.run("a", a_state(0), images=30), fleet.run("b", a_state(1), images=10)]
    merge(runs, fleet.folder / "m", weights=[0.5, 2])
    assert state_of(fleet.folder / "m")[1]["images"] == "40"
    merge([*runs, fleet.run("c", a_state(2), images=None)], fleet.folder / "n", weights=[1, 1, 1])
    assert "images" not in state_of(fleet.folder / "n")[1]


def test_no_weight_is_above_ten_times_the_median(fleet: Fleet) -> None:
    states = [a_state(seed) for seed in range(3)]
    runs = [fleet.run(str(seed), states[seed], images=images) for seed, images in enumerate((10, 20, 10**9))]
    report = merge(runs, fleet.folder / "m")
    assert [(row["weight"], row["capped"]) for row in report["runs"]] == [
        (10, False),
        (20, False),
        (200, True),
    ]
    weights = np.array([10, 20, 200]) / 230
    expected = sum(
        n * state["dense.value"].astype(np.float64) for n, state in zip(weights, states, strict=True)
    )
    assert state_of(fleet.folder / "m")[0]["dense.value"] == pytest.approx(expected, rel=1e-6)


def test_the_order_of_the_runs_and_their_names_change_no_bit(fleet: Fleet) -> None:
    rng = np.random.default_rng(0)
    states = [a_state(seed) for seed in range(5)]
    files = set()
    for number in range(3):
        order = rng.permutation(5)
        runs = [
            fleet.run(f"{number}-{place}", states[each], 10 + int(each)) for place, each in enumerate(order)
        ]
        merge(runs, fleet.folder / f"m{number}")
        files.add((fleet.folder / f"m{number}" / "state.safetensors").read_bytes())
    assert len(files) == 1


def test_a_run_merged_with_its_copies_is_that_run_at_rest(fleet: Fleet) -> None:
    state = a_state(0)
    merge([fleet.run(name, state) for name in "abc"], fleet.folder / "m")
    found = state_of(fleet.folder / "m")[0]
    for name, array in state.items():
        assert np.array_equal(found[name], 0 * array if name.endswith("momentum") else array), name


def test_the_median_has_the_positions_of_the_rule(fleet: Fleet) -> None:
    states = [a_state(seed, [1, 2, 3, 4, 5 + seed % 2]) for seed in range(5)]
    for state in states:
        state["coo.value"][:4] = np.abs(state["coo.value"][:4]) + 1
    states[2]["dense.value"][0] = 90
    states[2]["coo.value"][1] = 50
    runs = [fleet.run(str(seed), state) for seed, state in enumerate(states)]
    merge(runs, fleet.folder / "mean")
    report = merge(runs, fleet.folder / "median", robust="median")
    mean, found = state_of(fleet.folder / "mean")[0], state_of(fleet.folder / "median")[0]
    assert np.array_equal(found["coo.index"], mean["coo.index"]) and report["robust"] == "median"
    for place, position in enumerate(found["coo.index"]):
        held = [state["coo.value"][state["coo.index"] == position] for state in states]
        assert found["coo.value"][place] == np.median(np.concatenate(held)).astype(np.float32)
    for name in ("dense.value", "batchnorm.mean", "batchnorm.variance"):
        expected = np.median([state[name] for state in states], axis=0)
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert found["dense.value"][0] < 5 < mean["dense.value"][0]


def test_medians_are_taken_in_blocks(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [fleet.run(str(seed), a_state(seed)) for seed in range(4)]
    merge(runs, fleet.folder / "whole", robust="median")
    monkeypatch.setattr("edge_bcs.fleet.merging.BLOCK", 4 * 4 * 2)  # two positions of four runs
    merge(runs, fleet.folder / "blocks", robust="median")
    files = [(fleet.folder / name / "state.safetensors").read_bytes() for name in ("whole", "blocks")]
    assert files[0] == files[1]


def test_runs_of_different_boards_are_merged(fleet: Fleet) -> None:
    """Memory, micro-batches and kernels are a board's own; the merged run has those of the first."""
    other = fleet.artifact("other", micro_batch=2, lanes=2, created_by="edge-bcs 9")
    runs = [fleet.run("a", a_state(0)), fleet.run("b", a_state(1), artifact=other)]
    merge(runs, fleet.folder / "m")
    merge(runs[::-1], fleet.folder / "n")
    assert [Artifact.read(fleet.folder / name).micro_batch for name in "mn"] == [4, 2]
    states = [state_of(fleet.folder / name)[0] for name in "mn"]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_names_of_classes_come_together(fleet: Fleet) -> None:
    runs = [fleet.run("a", a_state(0)), fleet.run("b", a_state(1), classes=("cat", "dog"))]
    merge(runs, fleet.folder / "m")
    assert Artifact.read(fleet.folder / "m").classes == ("cat", "dog")
    # One that does not take part names nothing.
    far_away = fleet.bad("c", a_state(2), far, classes=("dog", "cat"))
    merge([fleet.run("d", a_state(3)), runs[0], far_away], fleet.folder / "n", on_bad="skip")
    assert Artifact.read(fleet.folder / "n").classes is None


def test_what_is_trained_in_part(fleet: Fleet) -> None:
    """Two connections of `linear` learn; the three of `conv` are the same in all runs, and stay."""
    train = {"part": "head", "layers": ["linear"], "dense": ["rest"], "kappa": 2}

    def change(manifest: dict[str, Any]) -> None:
        manifest.update(version=2, train=train)

    def fewer_moving(state: dict[str, Any]) -> None:
        state["coo.index"] = np.array([0, 9, 30, 60, 71], np.int32)
        state["coo.momentum"], state["dense.momentum"] = np.zeros(2, np.float32), np.zeros(6, np.float32)

    artifact = write_artifact(fleet.folder / "part", change, fewer_moving)
    began = load_file(artifact / "state.safetensors")
    runs = []
    for number, (moved, value) in enumerate((([55, 60], [0.5, 2]), ([55, 70], [1.0, 3]))):
        state = {name: array.copy() for name, array in began.items()}
        state["coo.index"][3:], state["coo.value"][3:] = moved, value
        state["dense.value"][3:] += number
        state["coo.momentum"] += 1
        runs.append(fleet.run(f"r{number}", state, artifact=artifact))
    merge(runs, fleet.folder / "m")
    found = state_of(fleet.folder / "m")[0]
    assert found["coo.index"].tolist() == [0, 9, 30, 60, 70]  # 55 scores 0.75; 60 scores 1, 70 scores 1.5
    assert np.array_equal(found["coo.value"][:3], began["coo.value"][:3])
    assert found["coo.value"][3:].tolist() == [2, 3]
    assert np.array_equal(found["dense.value"][:3], began["dense.value"][:3])
    assert found["coo.momentum"].tolist() == [0, 0] and found["dense.momentum"].shape == (6,)
    other = {name: array.copy() for name, array in began.items()}
    other["coo.value"][0] += 1
    with pytest.raises(EdgeBcsError, match=r"r9 differs .* what --train head leaves as it is"):
        merge([*runs, fleet.run("r9", other, artifact=artifact)], fleet.folder / "n")


# What is refused, or left out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": "0.94"}, "sparsity is \"0.94\" in the former and \"0.93\" in the latter"),
        (
            {"network": {"name": "tiny", "arguments": {}, "input_shape": [2, 6, 6], "num_classes": 3}},
            "network.num_classes is 3",
        ),
        (
            {"network": {"name": "tiny", "arguments": {}, "input_shape": [2, 6, 6], "num_classes": 2,
                         "normalize": {"mean": [0.5], "std": [0.5]}}},
            "network.normalize is",
        ),
        ({"dense": [{"name": "other", "shape": [9], "offset": 0}]}, "dense is"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(fleet: Fleet, changes: dict[str, Any], message: str) -> None:
    other = fleet.artifact("other", **changes)
    runs = [fleet.run("a", a_state(0)), fleet.run("b", a_state(1), artifact=other)]
    with pytest.raises(EdgeBcsError, match=message) as error:
        merge(runs, fleet.folder / "m")
    assert "b cannot be merged" in str(error.value) and not (fleet.folder / "m").exists()


def test_another_number_of_connections_is_refused(fleet: Fleet) -> None:
    def fewer(manifest: dict[str, Any]) -> None:
        manifest.update(kappa=4, lists_length=manifest["lists_length"] - 3)

    def four(state: dict[str, Any]) -> None:
        for name in ("coo.value", "coo.index", "coo.momentum"):
            state[name] = state[name][:4]

    other = write_artifact(fleet.folder / "fewer", fewer, four)
    with pytest.raises(EdgeBcsError, match="another network: kappa is 4 in the former and 5 in the latter"):
        merge([fleet.artifact(), other], fleet.folder / "m", weights=[1, 1])


def test_other_classes_are_refused(fleet: Fleet) -> None:
    runs = [
        fleet.run("a", a_state(0), classes=("cat", "dog")),
        fleet.run("b", a_state(1), classes=("dog", "cat")),
    ]
    with pytest.raises(
        EdgeBcsError, match=r"b cannot be merged with runs that have other classes: .*dog, cat"
    ):
        merge(runs, fleet.folder / "m")


def nan(state: State) -> None:
    state["coo.value"][2] = np.nan


def infinite(state: State) -> None:
    state["batchnorm.variance"][0] = np.inf


def unsorted(state: State) -> None:
    state["coo.index"][:2] = state["coo.index"][:2][::-1].copy()


def twice(state: State) -> None:
    state["coo.index"][1] = state["coo.index"][0]


def beyond(state: State) -> None:
    state["coo.index"][-1] = SIZE


def shorter(state: State) -> None:
    state["coo.value"] = state["coo.value"][:-1]


def far(state: State) -> None:
    state["coo.value"] *= np.float32(1e4)


def far_statistics(state: State) -> None:
    state["batchnorm.mean"] += np.float32(1e4)


BAD = [
    (nan, "coo.value of conv.weight holds nan"),
    (infinite, "batchnorm.variance of bn holds inf"),
    (unsorted, "not strictly ascending"),
    (twice, "not strictly ascending"),
    (beyond, "within the network's 72 positions"),
    (shorter, r"coo.value is F32\[4\] instead of float32\[5\]"),
    (far, r"the weights of \S*bad have a norm of .* times that of the others"),
    (far_statistics, r"the running statistics of \S*bad have a norm"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_run_is_refused_and_named_or_left_out(
    fleet: Fleet, change: Callable[[State], None], message: str
) -> None:
    good = [fleet.run("a", a_state(0, [1, 2, 3, 4, 5])), fleet.run("b", a_state(1))]
    bad = fleet.bad("bad", a_state(2, [10, 20, 30, 40, 70]), change)
    with pytest.raises(EdgeBcsError, match=message):
        merge([good[0], bad, good[1]], fleet.folder / "m")
    assert not (fleet.folder / "m").exists()
    report = merge([good[0], bad, good[1]], fleet.folder / "m", on_bad="skip")
    merge(good, fleet.folder / "without")
    assert [one["run"] for one in report["left_out"]] == [str(bad)]
    files = [(fleet.folder / name / "state.safetensors").read_bytes() for name in ("m", "without")]
    assert files[0] == files[1]


def test_the_first_run_that_can_be_read_says_which_network_it_is(fleet: Fleet) -> None:
    """A damaged one before it, of another network, has no say."""

    def fewer(manifest: dict[str, Any]) -> None:
        manifest.update(kappa=4, lists_length=manifest["lists_length"] - 3)

    def four(state: dict[str, Any]) -> None:
        for name in ("coo.value", "coo.index", "coo.momentum"):
            state[name] = state[name][:4]

    other = write_artifact(fleet.folder / "fewer", fewer, four)
    foreign = fleet.run("foreign", read_state(Artifact.read(other))[0], artifact=other)
    (foreign / "state.safetensors").write_bytes(b"torn")
    runs = [foreign, fleet.run("a", a_state(0)), fleet.run("b", a_state(1))]
    report = merge(runs, fleet.folder / "m", on_bad="skip")
    assert [Path(row["run"]).name for row in report["runs"]] == ["a", "b"]


def test_of_two_runs_the_far_larger_one_is_told(fleet: Fleet) -> None:
    runs = [fleet.bad("a", a_state(0), far), fleet.run("b", a_state(1))]
    with pytest.raises(EdgeBcsError, match=r"the weights of \S*/a have"):
        merge(runs, fleet.folder / "m")


def test_a_network_without_norms_has_no_statistics_to_compare(fleet: Fleet) -> None:
    states = [a_state(seed) for seed in range(3)]
    for state in states:
        state["batchnorm.mean"][:] = state["batchnorm.variance"][:] = 0
    states[1]["batchnorm.mean"][0] = 1
    merge([fleet.run(str(seed), state) for seed, state in enumerate(states)], fleet.folder / "m")


def test_a_torn_save_costs_one_save(fleet: Fleet) -> None:
    """As everywhere: the save before it takes its place, with a sentence."""
    a = fleet.run("a", a_state(0), images=32)
    fleet.run("a", a_state(5), images=64)
    torn = a / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.warns(EdgeBcsWarning, match="the one before it is used"):
        report = merge([a, fleet.run("b", a_state(1))], fleet.folder / "m")
    assert [row["images"] for row in report["runs"]] == [32, 64]


def test_what_runs_must_say(fleet: Fleet) -> None:
    a, b = fleet.run("a", a_state(0)), fleet.run("b", a_state(1), images=None)
    with pytest.raises(EdgeBcsError, match=r"b does not say how many images .* --weight"):
        merge([a, b], fleet.folder / "m")
    with pytest.raises(EdgeBcsError, match="c has seen no image"):
        merge([a, fleet.run("c", a_state(2), images=0)], fleet.folder / "m")
    merge([a, b, fleet.artifact()], fleet.folder / "m", weights=[1, 2, 3])


def test_impossible_requests(fleet: Fleet) -> None:
    a, b = fleet.run("a", a_state(0)), fleet.run("b", a_state(1))
    out = fleet.folder / "m"
    for runs, options, message in (
        ([a], {}, "two runs or more"),
        ([a, a], {}, "a is given twice"),
        ([a, fleet.folder / "." / "a"], {}, "given twice"),
        ([a, b], {"weights": [1]}, "1 weights for 2 runs"),
        ([a, b], {"weights": [1, 0]}, "a positive number, not 0"),
        ([a, b], {"weights": [1, float("nan")]}, "a positive number, not nan"),
        ([a, b], {"robust": "mode"}, "'median' or None"),
        ([a, fleet.folder / "none"], {}, "the run \\S*none does not exist[.]$"),
        ([fleet.folder / "none", fleet.folder / "nil"], {"on_bad": "skip"}, "none of the runs can take part"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            merge(runs, out, **options)
        assert not out.exists()
    before = (a / "state.safetensors").read_bytes()
    for taken in (a, fleet.artifact()):
        with pytest.raises(EdgeBcsError, match=r"already holds a manifest\.json"):
            merge([a, b], taken)
    assert (a / "state.safetensors").read_bytes() == before


def test_a_run_that_is_written_meanwhile_is_told(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_bcs.fleet import merging

    a, b = fleet.run("a", a_state(0)), fleet.run("b", a_state(1))
    merged_state = merging.merged_state

    def later(*arguments: Any, **more: Any) -> Any:
        fleet.run("a", a_state(more["robust"] is None))
        return merged_state(*arguments, **more)

    monkeypatch.setattr(merging, "merged_state", later)
    with pytest.raises(EdgeBcsError, match="a was written to while it was being merged"):
        merge([a, b], fleet.folder / "m")
    with pytest.raises(EdgeBcsError, match="a was written to while it was being merged"):
        merge([a, b], fleet.folder / "m", robust="median")


def in_place(file: Path, name: str) -> None:
    """Change the first number of a tensor, in the file, to one that no state has."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[begin : begin + 4] = np.int32(-9).tobytes()
    file.write_bytes(content)


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_that_is_altered_meanwhile_is_told(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    from edge_bcs.fleet import merging

    a, b = fleet.run("a", a_state(0)), fleet.run("b", a_state(1))
    file, merged_state = a / "state.safetensors", merging.merged_state

    def later(*arguments: Any, **more: Any) -> Any:
        if cut:
            file.write_bytes(file.read_bytes()[:-40])
        else:
            in_place(file, "coo.index")
        return merged_state(*arguments, **more)

    monkeypatch.setattr(merging, "merged_state", later)
    with pytest.raises(EdgeBcsError, match="a was written to while it was being merged"):
        merge([a, b], fleet.folder / "m")
    assert not (fleet.folder / "m").exists()


# The command


def test_the_command(fleet: Fleet) -> None:
    a, b = fleet.run("a", a_state(0)), fleet.run("b", a_state(1))
    bad = fleet.bad("bad", a_state(2), nan)
    refused = command("merge", a, b, bad, "-o", fleet.folder / "m")
    assert refused.exit_code == 1 and "bad" in refused.output and "Traceback" not in refused.output
    printed = command("merge", a, b, bad, "-o", fleet.folder / "m", "--on-bad", "skip", "--weight", 1)
    assert printed.exit_code == 0, printed.output
    assert "Merged 2 runs of 5 connections each" in printed.output and "Left out" in printed.output
    report = json.loads(
        command("merge", a, b, "-o", fleet.folder / "n", "--json", "--robust", "median").stdout
    )
    assert report["run"] == str(fleet.folder / "n") and report["robust"] == "median"
    assert command("inspect", fleet.folder / "m").exit_code == 0
