"""What each process holds of model, gradients and optimiser state, by ``run.sharding``.

none   everything; gradients are averaged (DistributedDataParallel)
zero1  all of model and gradients; a parameter's optimiser state lies with its owner alone, which takes the step and
       sends the result to the others (Rajbhandari et al., 2020, stage 1)
fsdp   a slice of everything; a block's weights are put together while it computes (FSDP2)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretraining.compilation import compiled
from pretraining.config import TrainConfig
from pretraining.distributed import Processes
from pretraining.objective import Learner, Objective
from pretraining.optimizers import freeze_norms, make_optimizers
from pretraining.shards import whole
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel


def make_replica(cfg: TrainConfig, group: Processes, objective: Objective) -> Replica:
    """This process's part of a fresh model and its optimisers; alone, a process holds everything whatever is asked.

    Args:
        objective: what is minimised.
    """
    kinds = {"none": Replica, "zero1": OwnerReplica, "fsdp": SlicedReplica}
    return kinds[cfg.run.sharding if group.world_size > 1 else "none"](cfg, group, objective)


class Replica:
    """All of it, gradients averaged with the other processes.

    Attributes:
        model: the model with this process's parameters.
        losses: the objective's, of inputs and targets; compiled, at its first call, if the configuration says so.
        optimizers: those of the parameters that this process updates.
    """

    def __init__(self, cfg: TrainConfig, group: Processes, objective: Objective) -> None:
        self.cfg, self.group = cfg, group
        self.model = self.build()
        if cfg.optimizer.freeze_norms:
            freeze_norms(self.model)
        objective.prepare(self.model)
        self.learner = Learner(self.model, objective)
        module = self.distribute()
        self.losses: Any = compiled(module) if cfg.run.compile else module
        self.optimizers = make_optimizers(self.model, cfg.optimizer, self.updated())

    def build(self) -> HookedModel:
        return build_model(self.cfg.model, seed=self.cfg.weights_seed, device=self.group.device).train()

    def distribute(self) -> nn.Module:
        """The module whose backward pass averages gradients over the processes."""
        if self.group.world_size == 1:
            return self.learner
        devices = [self.group.device] if self.group.device.type == "cuda" else None
        # The buffers are tables of angles, the same everywhere. Newer versions of torch have another name for this.
        new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_buffers: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
        return DistributedDataParallel(self.learner, device_ids=devices, gradient_as_bucket_view=True, **no_buffers)

    def updated(self) -> Collection[str]:
        """Names of the parameters that this process's optimisers update."""
        return dict(self.model.named_parameters())

    @contextlib.contextmanager
    def backward_pass(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: processes average once a step, on the last of them."""
        with contextlib.nullcontext() if last or self.group.world_size == 1 else self.losses.no_sync():
            yield

    def step(self) -> None:
        """Let the optimisers act, and drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def gather(self) -> tuple[HookedModel, dict[str, Tensor]]:
        """On the first process the whole model, and the optimisers' state as a checkpoint names it: ``"{index of the
        optimiser}/{parameter}/{entry}"``. All processes ask together; what the others get is of no use."""
        return self.model, optimizer_state(self.model, self.optimizers)


class OwnerReplica(Replica):
    """ZeRO-1."""

    def __init__(self, cfg: TrainConfig, group: Processes, objective: Objective) -> None:
        sizes = {name: p.numel() for name, p in build_model(cfg.model, device="meta").named_parameters()}
        self.owners = owners(sizes, group.world_size)
        super().__init__(cfg, group, objective)

    def updated(self) -> Collection[str]:
        return [name for name, rank in self.owners.items() if rank == self.group.rank]

    def step(self) -> None:
        super().step()
        pending = [
            dist.broadcast(_in_memory_order(parameter.detach()), self.owners[name], async_op=True)
            for name, parameter in self.model.named_parameters()
        ]
        for work in pending:
            work.wait()

    def gather(self) -> tuple[HookedModel, dict[str, Tensor]]:
        model, own = super().gather()
        shapes: list[Any] = [None] * self.group.world_size
        dist.all_gather_object(shapes, {key: (value.shape, value.dtype) for key, value in own.items()})
        state = dict(own)
        for rank, described in enumerate(shapes[1:], start=1):
            for key, (shape, dtype) in described.items():
                if self.group.rank == rank:
                    dist.send(own[key].contiguous(), 0)
                elif self.group.is_first:
                    received = torch.empty(shape, dtype=dtype, device=self.group.device)
                    dist.recv(received, rank)
                    state[key] = received.cpu()
        return model, state


class SlicedReplica(Replica):
    """FSDP2.

    Slices are float32. With ``bfloat16`` the matrices of a block are sent and put together in it, which is how autocast
    uses them elsewhere; a copy made by autocast would stay whole until the backward pass. Norms, and what is outside
    the blocks, are float32 as elsewhere.
    """

    def build(self) -> HookedModel:
        # On the CPU, so that the accelerator never holds the whole model.
        return build_model(self.cfg.model, seed=self.cfg.weights_seed).train()

    def distribute(self) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                contiguous = parameter.detach().contiguous()  # all that FSDP2 takes
                setattr(module, name, nn.Parameter(contiguous, parameter.requires_grad))
        mesh = init_device_mesh(self.group.device.type, (self.group.world_size,))
        dtype = torch.bfloat16 if self.cfg.run.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.model.blocks:  # weights that blocks share are sliced with the rest
            if parts := [block.get_submodule(name) for name in self.model.sublayers]:
                fully_shard(parts, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh)
        self.model.cfg = dataclasses.replace(self.model.cfg, device=str(self.group.device))
        return self.learner

    @contextlib.contextmanager
    def backward_pass(self, *, last: bool) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(last)
        yield

    def gather(self) -> tuple[HookedModel, dict[str, Tensor]]:
        self._sharded.reshard()  # after an evaluation what is outside the blocks is still whole
        weights = {}
        for name, parameter in self.model.named_parameters():
            full = whole(parameter.detach())
            weights[name] = full.cpu() if self.group.is_first else full.new_empty(0)
        state = {}
        for key, value in optimizer_state(self.model, self.optimizers).items():
            full = whole(value)
            state[key] = full.cpu() if self.group.is_first else full.new_empty(0)
        model = build_model(self.cfg.model, device="meta")
        if self.group.is_first:
            model.load_state_dict(weights, assign=True)
        return model, state

    @property
    def _sharded(self) -> Any:
        return self.model  # fully_shard made it an FSDPModule too


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimisers remember: ``{"0/embed.W_basis/exp_avg": tensor, ...}``, in the order of the parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{i}/{names[parameter]}/{entry}": value
        for i, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Which process owns each parameter: the largest first, each to the process that has least so far.

    >>> owners({"a": 5, "b": 3, "c": 3}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads = [0] * world_size
    assigned = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = loads.index(min(loads))
        assigned[name] = rank
        loads[rank] += sizes[name]
    return {name: assigned[name] for name in sizes}


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A contiguous view of a tensor whose axes are permuted in memory (a head matrix): what can be sent."""
    return tensor.permute(sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis]))
