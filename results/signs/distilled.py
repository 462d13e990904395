"""Does a dense teacher help the pruned network? What `README.md` says of it.

    python results/signs/distilled.py TEACHER --data signs.tar.gz --draw 0 --follow features --out distilled

The teacher is the folder of the same draw that `make signs` keeps of the way "dense natural", host-dense-….
The network is pruned and trained on the host as there, and its loss follows the teacher, too: the features
before the last layer, or the answers (at a temperature of 4). Then a board trains it as there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from edge_bcs.runtime import Trainer
from torch import Tensor
from torch.nn import functional

import edge_bcs
from edge_bcs.bench.hands import photographs, pretrained
from edge_bcs.bench.signs import Draw, Settings, with_head
from edge_bcs.evaluation import evaluate
from edge_bcs.method import losses

_FEATURES, _TEMPERATURE = 10.0, 4.0


def main() -> None:
    """Train on the host and on the board, and say what each part comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("teacher", help="a checkpoint's folder")
    parser.add_argument("--data", type=Path, required=True, metavar="signs.tar.gz")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--follow", choices=["features", "answers"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the trainings are kept")
    options = parser.parse_args()
    s = Settings()
    torch.set_num_threads(1)
    images, labels, _ = photographs(options.data, s.size)
    draw = Draw(s, images, labels, options.draw, options.draws, options.out)
    measured = {"choosing": draw.choosing, "held out": draw.held_out}

    torch.manual_seed(options.draw)
    sparse = pretrained(s.sparsity, options.draw)
    follow(sparse, edge_bcs.load(options.teacher, with_head()), options.follow)
    edge_bcs.train(
        sparse, draw.training, objective="natural", batch_size=s.host_batch,
        schedule=edge_bcs.Schedule(epochs=s.host_epochs, kind="cosine", warmup=0.1),
        hyper=edge_bcs.Hyper(learning_rate=s.host_rate, weight_decay=0.005 * s.host_rate),
        feed=edge_bcs.Feed(augment=s.augment, validation=0), compute=edge_bcs.Compute(threads=1),
        output=edge_bcs.Output(options.out / "host", resume=(options.out / "host/last.safetensors").exists()),
    )  # fmt: skip
    learnt = edge_bcs.load(options.out / "host", with_head())
    for name, data in measured.items():
        found = evaluate(learnt, data, attack="none", batch_size=s.host_batch)
        print(f"host, {name}: {100 * found['clean_acc']:.1f} %", flush=True)

    artifact = edge_bcs.export(
        learnt, options.out / "artifact", input_shape=(3, s.size, s.size), memory="48MiB", validate=False,
        objective="natural", batch_size=s.batch, hyper=edge_bcs.Hyper(learning_rate=s.rate),
    )  # fmt: skip
    with Trainer(artifact, threads=1) as trainer:
        trainer.fit(
            draw.training, s.epochs, augment=s.augment, schedule="cosine", warmup=0.1, max_writes=None
        )
        for name, data in measured.items():
            print(f"board, {name}: {100 * trainer.evaluate(data, 0)['accuracy']:.1f} %", flush=True)


def follow(student: Any, teacher: Any, what: str) -> None:
    """Let the losses of a training follow the teacher's features or its answers."""
    ordinary, kept = losses.per_sample, dict[str, Tensor]()

    def keep(name: str) -> Any:
        return lambda module, given: kept.update({name: given[0]})

    for name, one in (("student", student), ("teacher", teacher)):
        layers = [module for module in one.network.modules() if isinstance(module, torch.nn.Linear)]
        layers[-1].register_forward_pre_hook(keep(name))
    student.network.register_forward_pre_hook(keep("images"))
    teacher.network.eval()

    def following(objective: Any, labels: Tensor, logits: Tensor, *others: Any) -> Tensor:
        loss = ordinary(objective, labels, logits, *others)
        with torch.no_grad():
            answers = teacher.network(kept["images"])
        if what == "features":
            mine, wanted = kept["student"], kept["teacher"]
            return loss + _FEATURES * (mine - wanted).square().mean(1) / wanted.square().mean()
        log_shares = [(values / _TEMPERATURE).log_softmax(1) for values in (logits, answers)]
        apart = functional.kl_div(*log_shares, log_target=True, reduction="none").sum(1)
        return loss + _TEMPERATURE**2 * apart

    losses.per_sample = following  # type: ignore[assignment]


if __name__ == "__main__":
    main()
