"""Several processes that train one network, each on its share of every batch (torchrun).

What DistributedDataParallel does, for a network that is sparse and rewires: gradients are summed over the
replicas after the backward pass, with torch's own collectives, and every replica then makes the same update
from the same seed, so that connectivity agrees to the bit. Only the gradients of the κ connections and of the
dense parameters travel, in one message a step, instead of those of all weights.

As there, batch norm takes the statistics of a replica's share; running statistics are averaged after each
step. With frozen statistics the sum is that of one process, up to rounding.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.sparse_model import SparseModel


@dataclass(frozen=True)
class Replicas:
    """This process among `count`: its number, and sums over all of them."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Replicas:
        """Return the place that torchrun gave this process; a single process is alone."""
        if not distributed.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not distributed.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(distributed.destroy_process_group)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, begin: int, end: int) -> tuple[int, int]:
        """Return this replica's part of the places begin to end − 1, as (first, end)."""
        length = end - begin
        return begin + length * self.rank // self.count, begin + length * (self.rank + 1) // self.count

    def sum(self, *tensors: Tensor) -> None:
        """Replace float tensors of one device by their sums over the replicas, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in tensors])
        distributed.all_reduce(flat)
        begin = 0
        for tensor in tensors:
            tensor.copy_(flat[begin : begin + tensor.numel()].view(tensor.shape))
            begin += tensor.numel()

    def sum_gradients(self, sparse: SparseModel, numbers: Tensor, *, everything: bool) -> None:
        """Sum gradients (of dormant weights, too, if `everything`) and `numbers`; average running statistics.

        Args:
            sparse: the network after its backward pass.
            numbers: f32[n], summed along.
            everything: whether gradients of dormant weights are wanted.
        """
        if self.count == 1:
            return
        gradients, dense = sparse.all_gradients(), sparse.gradients()[1]
        chosen = gradients if everything else gradients[sparse.index]
        running = [
            getattr(module, name)
            for module in sparse.network.modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
            for name in ("running_mean", "running_var")
        ]
        self.sum(chosen, dense, numbers, *running)
        for statistics in running:
            statistics.div_(self.count)
        if not everything:
            gradients[sparse.index] = chosen

    def start_alike(self, sparse: SparseModel) -> None:
        """Give every replica the first one's state."""
        if self.count == 1:
            return
        state = sparse.state()
        for name, buffer in state.items():
            tensor = torch.from_numpy(buffer).to(sparse.index.device)
            distributed.broadcast(tensor, 0)
            state[name] = tensor.cpu().numpy()
        sparse.load_state(state)

    def check_agreement(self, sparse: SparseModel) -> None:
        """Raise `EdgeBcsError` unless every replica has the same state to the bit."""
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for buffer in sparse.state().values():
            digest.update(buffer.tobytes())
        mine = torch.tensor(int.from_bytes(digest.digest()[:7], "little"), device=sparse.index.device)
        least, most = mine.clone(), mine.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        if least != most:
            raise EdgeBcsError(
                "the processes no longer have the same network; run all of them on the same kind of machine"
            )
