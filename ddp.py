"""
Parallelism: train on many processes, each with a part of the data, of the optimizer, of the weights, or of every matrix.

Rank r of N sees 1/N of each batch. What else is divided decides memory and traffic (P: bytes of the parameters):

    strategy         every rank keeps            a step moves, per rank     divided
    DDP              all                         2 (N-1)/N P                the batch
    ShardedOptimizer weights, gradients          3 (N-1)/N P                and the optimizer's state (ZeRO stage 1)
    FSDP             1/N of everything           3 (N-1)/N P                and gradients and weights (ZeRO stage 3)
    tensor_parallel  1/N of every large matrix   activations                every product, within a layer

(Rajbhandari et al. 2019, arXiv 1910.02054, for ZeRO; Shoeybi et al. 2019, arXiv 1909.08053, for tensor parallelism.) All four
stand on the collectives of torch.distributed (broadcast, all-reduce, all-gather, reduce-scatter), which NCCL runs on GPUs
and gloo on CPUs. They work with any nn.Module (tensor_parallel with those that use Llama's names) and compose:

    torch.distributed.init_process_group("gloo")                # or "nccl"; torchrun has set rank and world size
    data, tensor = mesh(tensor_parallel=2)                      # a grid of ranks; mesh(1): everybody is a data rank
    tensor_parallel(model, tensor)
    model = DDP(model, group=data)                              # or FSDP(model, group=data)
    loss(model(part)).backward()
    model.finish_gradient_synchronization()                     # now the gradients are those of the whole batch
    optimizer.step()

The file goes from "average the gradients" to FSDP, then tensor parallelism, then three commands:

    torchrun --nproc_per_node=2 ddp.py                          # each strategy: error, traffic, memory, time, overlap
    torchrun --nproc_per_node=2 ddp.py collectives              # speed of the collectives by size
    python ddp.py plan --config runs/NAME --gpus 64 --gpu h100  # the same on paper, for machines that are not here

Left out: pipeline, sequence and expert parallelism, CPU offload, ranks that come and go.
"""
import argparse
import ctypes
import difflib
import gc
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------------
# Collectives

# torch 2.13 calls these two ..._single, and warns when it hears the names that older releases know
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Transfers:
    """Collectives under way, and what is to be done when they have arrived."""

    def __init__(self, works, then=lambda: None):
        self.works, self.then = works, then

    def wait(self):
        for work in self.works:
            work.wait()
        self.then()


def all_gather(out: Tensor, part: Tensor, group) -> Transfers:
    """Sets off: out (N * n) on every rank becomes the parts (n) of all, in the order of ranks. `part` may be this rank's place
    in `out`. On CPUs one broadcast from each rank, side by side: up to 3 times as fast as gloo's own all-gather."""
    if out.device.type != "cpu":
        return Transfers([_all_gather(out, part, group=group, async_op=True)])
    places = out.split(len(part))
    places[dist.get_rank(group)].copy_(part)
    return Transfers([dist.broadcast(place, global_rank(group, r), group, async_op=True) for r, place in enumerate(places)])


def reduce_scatter(out: Tensor, full: Tensor, group) -> Transfers:
    """Sets off: out (n) becomes the sum over ranks of each one's `full` (N * n), of which rank r receives the r-th part;
    `full` is used up. On CPUs one reduction to each rank: gloo's own reduce-scatter moves twice as much, an all-reduce's bytes."""
    if out.device.type != "cpu":
        return Transfers([_reduce_scatter(out, full, group=group, async_op=True)])
    places = full.split(len(out))
    return Transfers([dist.reduce(place, global_rank(group, r), group=group, async_op=True) for r, place in enumerate(places)],
                     lambda: out.copy_(places[dist.get_rank(group)]))


def global_rank(group, rank: int) -> int:
    """The rank among all of a group's rank-th member."""
    return rank if group is None else dist.get_global_rank(group, rank)


def mesh(tensor_parallel: int = 1):
    """Arranges all ranks in a grid of data x tensor_parallel; returns this rank's (data group, tensor group).

    Neighbours share a tensor group: they exchange activations in every layer, so they should sit in one machine. The data
    group holds those who stand at the same place of every tensor group. None, here as everywhere, is the group of all ranks.
    ValueError when the ranks do not divide."""
    ranks = dist.get_world_size()
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise ValueError(f"{ranks} rank(s) cannot be divided into tensor-parallel groups of {tensor_parallel}")
    rows = [list(range(i, i + tensor_parallel)) for i in range(0, ranks, tensor_parallel)]
    mine = {}
    for kind, lines in (("data", zip(*rows)), ("tensor", rows)):
        for line in map(list, lines):                                        # every rank takes part in making every group
            group = None if len(line) == ranks else dist.new_group(line)
            if dist.get_rank() in line:
                mine[kind] = group
    return mine["data"], mine["tensor"]


@torch.no_grad()
def start_alike(module: nn.Module, group, who: str, device=None):
    """Gives every rank the first rank's parameters and buffers, by way of `device` if the module is elsewhere. ValueError
    when the ranks' modules have different ones."""
    named = [*module.named_parameters(), *module.named_buffers()]
    shapes = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in named]
    everyones = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, shapes, group)
    for rank, theirs in enumerate(everyones):
        if theirs != shapes:
            mine, other = next(((a, b) for a, b in zip(shapes, theirs) if a != b), (len(shapes), len(theirs)))
            raise ValueError(f"{who}: ranks hold different models: {mine} on rank {dist.get_rank(group)}, {other} on rank {rank}")
    for _, tensor in named:
        there = tensor.detach().to(device or tensor.device)
        dist.broadcast(there, global_rank(group, 0), group)
        if there.device != tensor.device:
            tensor.copy_(there)


# ------------------------------------------------------------------------------------------------------------------
# Data parallelism: every rank holds the whole model and averages gradients
#
# If the loss of a batch is the mean of its parts' losses, its gradient is the mean of the parts' gradients. So N processes
# that start from the same weights, see N equal parts of a batch and average their gradients make the step that one process
# would make on the whole batch, and their weights stay equal for ever without being sent again.

def average_gradients(module: nn.Module, group=None):
    """The idea, and the slow way: after the backward pass, one all-reduce for every parameter, and waiting for each."""
    for p in module.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


def average_gradients_flat(module: nn.Module, group=None):
    """One all-reduce for all: no time goes into starting many small ones, but it can only start when the last gradient is
    there, when nothing is left to compute beside it."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        torch.mul(mean.view_as(g), 1 / dist.get_world_size(group), out=g)


class DDP(nn.Module):
    """The fast way: gradients travel in buckets of about `bucket_mb` megabytes, laid out in the reverse order of
    registration, which is about the order in which the backward pass finishes them. A bucket sets off as soon as its last
    gradient is there, while the layers below are still at work (Li et al. 2020, arXiv 2006.15704).

    Same forward as `module`; parameters and buffers are the first rank's from the start. A parameter that a step used on
    some ranks gets the mean over all, where the others count as zero; one that no rank used stays without a gradient.
    With `reduce_dtype=torch.bfloat16` half the bytes of float32 gradients travel, rounded.
    ValueError when the ranks' modules differ, or when nothing in them can be trained."""

    def __init__(self, module: nn.Module, bucket_mb: float = 25, reduce_dtype: torch.dtype | None = None, group=None):
        super().__init__()
        self.module, self.synchronize = module, True
        self.group = group
        parameters = [p for p in module.parameters() if p.requires_grad]     # a tied parameter is listed once
        if not parameters:
            raise ValueError("DDP: no parameter of the module requires a gradient, so there is nothing to average")
        start_alike(module, self.group, "DDP")
        self.scale = 1 / dist.get_world_size(self.group)

        buckets, size = [[]], 0
        for p in reversed(parameters):
            limit = min(bucket_mb, 1) if len(buckets) == 1 else bucket_mb    # the first is small, so that it leaves early
            if buckets[-1] and (size + p.nbytes > limit * 2 ** 20 or p.dtype != buckets[-1][0].dtype):
                buckets.append([])
                size = 0
            buckets[-1].append(p)
            size += p.nbytes
        self.buckets, self.place = [], {}
        for i, bucket in enumerate(buckets):
            # behind the gradients, one number each that says whether this rank has it
            flat = torch.zeros(sum(p.numel() for p in bucket) + len(bucket), dtype=reduce_dtype or bucket[0].dtype,
                               device=bucket[0].device)
            *views, used = flat.split([p.numel() for p in bucket] + [len(bucket)])
            self.buckets.append((flat, bucket, [view.view_as(p) for view, p in zip(views, bucket)], used))
            self.place |= {p: (i, j) for j, p in enumerate(bucket)}
        self._start_step()
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._gradient_ready)

    def _start_step(self):
        self.waiting = [set(bucket) for _, bucket, _, _ in self.buckets]     # gradients that a bucket still waits for
        self.in_flight = []                                                  # all-reduces, one for each bucket that was sent

    def _gradient_ready(self, p):
        if not self.synchronize:
            return
        i, j = self.place[p]
        if i < len(self.in_flight):
            raise RuntimeError("DDP: a second backward pass before finish_gradient_synchronization(); put all but the last of a "
                               "step under no_sync()")
        self._take(i, j)
        self.waiting[i].discard(p)
        while len(self.in_flight) < len(self.buckets) and not self.waiting[len(self.in_flight)]:
            self._send()                                                     # buckets leave in order, on every rank alike

    def _take(self, i, j):
        """Move a gradient into its bucket, divided before the sum, which could overflow in float16."""
        _, bucket, views, _ = self.buckets[i]
        gradient = bucket[j].grad
        torch.mul(gradient.to(torch.promote_types(gradient.dtype, views[j].dtype)), self.scale, out=views[j])
        if views[j].dtype == bucket[j].dtype:
            bucket[j].grad = views[j]                                        # the bucket is the gradient's home from here on

    def _send(self):
        flat, bucket, views, used = self.buckets[len(self.in_flight)]
        used.fill_(1)
        for j, p in enumerate(bucket):
            if p in self.waiting[len(self.in_flight)] and p.grad is not None:
                self._take(len(self.in_flight), j)                           # from a pass under no_sync
            elif p in self.waiting[len(self.in_flight)]:
                views[j].zero_()
                used[j] = 0
        self.in_flight.append(dist.all_reduce(flat, group=self.group, async_op=True))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self):
        """Inside, backward passes accumulate gradients on this rank alone: for all but the last micro-batch of a step."""
        before, self.synchronize = self.synchronize, False
        try:
            yield
        finally:
            self.synchronize = before

    def finish_gradient_synchronization(self):
        """Call after the step's last backward pass: sends what has not set off by itself, and waits. Then every parameter's
        .grad is the mean over ranks; it lives in the bucket until zero_grad() lets go of it."""
        while len(self.in_flight) < len(self.buckets):                       # a parameter that the pass did not reach
            self._send()
        for reduction, (_, bucket, views, used) in zip(self.in_flight, self.buckets):
            reduction.wait()
            # looked at only where it matters: on a GPU, looking waits
            used = used.tolist() if any(p.grad is None for p in bucket) else [1] * len(bucket)
            for p, mean, used_somewhere in zip(bucket, views, used):
                if p.grad is not None:
                    if p.grad is not mean:
                        p.grad.copy_(mean)                                   # another dtype than the bucket's
                elif used_somewhere:
                    p.grad = mean.to(p.dtype)
        self._start_step()


# ------------------------------------------------------------------------------------------------------------------
# ZeRO stage 1: every rank keeps and updates 1/N of the optimizer's state

# optimizers that treat every number by itself, so that a parameter can be cut anywhere; all others get whole tensors
ELEMENTWISE = {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "Lion"}


class Around(torch.optim.Optimizer):
    """An optimizer around another, `optimizer`, which updates this rank's pieces of the parameters. `param_groups` are those of
    an ordinary optimizer: change a learning rate there. `state` and `state_dict` are the inner one's, of this rank alone."""

    def __init__(self, params, optimizer_cls, options):
        self.make, self.optimizer = lambda groups: optimizer_cls(groups, **options), None
        super().__init__(params, options)                                    # calls add_param_group for each

    def hand_over(self, pieces: list[Tensor]):
        """Give the inner optimizer the newest parameter group, with `pieces` for its parameters."""
        group = {**self.param_groups[-1], "params": pieces}
        if self.optimizer is None:
            self.optimizer = self.make([group])
        else:
            self.optimizer.add_param_group(group)
        self.look_inside()

    def look_inside(self):
        """Show the inner optimizer's options and state."""
        for ours, theirs in zip(self.param_groups, self.optimizer.param_groups):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
        self.defaults.update(self.optimizer.defaults)                        # schedulers look here
        self.state = self.optimizer.state

    def inner_step(self, **arguments):
        for ours, theirs in zip(self.param_groups, self.optimizer.param_groups):
            theirs.update({key: value for key, value in ours.items() if key != "params"})
        return self.optimizer.step(**arguments)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)
        self.look_inside()


class ShardedOptimizer(Around):
    """Any torch optimizer, each rank running it on its share of the parameters and then sending the others its results.

    The parameters of a group move into one flat buffer (they stay where the module has them, as views of it). With an
    element-wise optimizer rank r's share is the r-th part of the buffer, wherever that cuts; with one that needs whole
    matrices (Muon) tensors are dealt out whole, the largest first, each to the rank with the least so far. `split` says
    which, for an optimizer that `ELEMENTWISE` does not know by name. Used with DDP, which averages the gradients.

    `pieces` lists what this rank has: (parameter, where in it, flattened, the piece begins, the piece that `state` knows)."""

    def __init__(self, params, optimizer_cls, group=None, split: bool | None = None, **options):
        self.group = group
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.split = optimizer_cls.__name__ in ELEMENTWISE if split is None else split
        self.flats, self.pieces, self.loads = [], [], [0] * self.ranks
        super().__init__(params, optimizer_cls, options)

    @torch.no_grad()
    def add_param_group(self, param_group: dict):
        super().add_param_group(param_group)
        kinds = {}
        for p in self.param_groups[-1]["params"]:
            if p.requires_grad:
                kinds.setdefault((p.dtype, p.device), []).append(p)
        self.hand_over([piece for parameters in kinds.values() for piece in self._share(parameters)])

    def _share(self, parameters) -> list[Tensor]:
        """Lay parameters out in a flat buffer; returns this rank's pieces of them."""
        if self.split:
            size = -(-sum(p.numel() for p in parameters) // self.ranks)
            edges, order = [r * size for r in range(self.ranks + 1)], parameters
        else:
            hands = [[] for _ in range(self.ranks)]
            for p in sorted(parameters, key=lambda p: -p.numel()):
                least = self.loads.index(min(self.loads))
                hands[least].append(p)
                self.loads[least] += p.numel()
            order, edges = [p for hand in hands for p in hand], [0]
            for hand in hands:
                edges.append(edges[-1] + sum(p.numel() for p in hand))
        flat, start, pieces = order[0].new_zeros(edges[-1]), 0, []
        low, high = edges[self.rank], edges[self.rank + 1]
        for p in order:
            home = flat[start:start + p.numel()].view_as(p)
            home.copy_(p)
            p.data = home
            a, b = max(low - start, 0), min(high - start, p.numel())         # this rank's part of p
            if a < b:
                piece = home if b - a == p.numel() else home.view(-1)[a:b]
                pieces.append(nn.Parameter(piece))
                self.pieces.append((p, a, pieces[-1]))
            start += p.numel()
        self.flats.append((flat, edges))
        return pieces

    @torch.no_grad()
    def step(self, closure=None, **arguments):
        """Update this rank's share, then gather everybody's. `arguments` go to the inner optimizer's step."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for p, start, piece in self.pieces:
            piece.grad = None if p.grad is None else p.grad.reshape(-1)[start:start + piece.numel()].view_as(piece)
        self.inner_step(**arguments)
        for _, _, piece in self.pieces:
            piece.grad = None                                                # or zero_grad() would free no memory
        under_way = []
        for flat, edges in self.flats:
            if self.split:
                under_way.append(all_gather(flat, flat[edges[self.rank]:edges[self.rank + 1]], self.group))
            else:                                                            # shares of different sizes
                under_way += [dist.broadcast(flat[low:high], global_rank(self.group, r), self.group, async_op=True)
                              for r, (low, high) in enumerate(zip(edges, edges[1:])) if low < high]
        for transfer in under_way:
            transfer.wait()
        return loss


# ------------------------------------------------------------------------------------------------------------------
# FSDP (ZeRO stage 3): every rank keeps 1/N of weights, gradients and state, and gathers a layer when it is its turn

@dataclass
class Shard:
    """What of a parameter is where: this rank's numbers, the whole one's shape, and which of its numbers, flattened, each
    rank has (first, last + 1)."""
    parameter: nn.Parameter
    shape: torch.Size
    parts: list[tuple[int, int]]
    rank: int


class Flat:
    """Parameters of one dtype that are gathered and freed together: one behind the other, and cut in N equal parts.

    `master` (n) is this rank's part, in the parameters' dtype; `full` (N * n), in `compute_dtype`, is everybody's while it
    is gathered and takes no memory otherwise: its storage is resized to nothing, and given back before the next use, so
    that what autograd has saved of it is whole again by then. The module's attributes follow: the whole parameters while
    they are gathered, this rank's shards (one-dimensional, some perhaps empty) while they are not."""

    def __init__(self, places: dict[nn.Parameter, list[tuple[nn.Module, str]]], group, compute_dtype, reduce_dtype, device):
        parameters = list(places)
        self.places, self.group = list(places.values()), group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = [p.numel() for p in parameters]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.shapes = [p.shape for p in parameters]
        self.trainable = parameters[0].requires_grad
        size = max(1, -(-self.starts[-1] // self.ranks))                     # n
        device = device or parameters[0].device
        self.master = torch.zeros(size, dtype=parameters[0].dtype, device=device)
        self.full = torch.empty(size * self.ranks, dtype=compute_dtype or self.master.dtype, device=device)
        self.shards, self.wholes = [], []
        for i, p in enumerate(parameters):
            first, last = self.part(i, self.rank)
            here = self.mine(self.master, i)
            here.copy_(p.detach().reshape(-1)[first:last])
            self.shards.append(nn.Parameter(here, self.trainable))
            self.wholes.append(nn.Parameter(self.full[self.starts[i]:self.starts[i + 1]].view(p.shape), self.trainable))
            if self.trainable:
                self.wholes[i].register_post_accumulate_grad_hook(lambda whole, i=i: self.take(i))
        self.reduce_dtype = reduce_dtype or self.full.dtype
        self.gradient = None                                                 # (N * n) of this rank, while a backward pass fills it
        self.reduction = None                                                # (the reduce-scatter, its result (n), its input)
        self.total = None                                                    # (n) float32: the mean over ranks, since the last finish
        self.taken, self.used = set(), set()                                 # parameters in `gradient`; those ever used in this step
        self.gathering, self.version, self.gathered = None, None, True
        self.free()

    def part(self, i: int, rank: int) -> tuple[int, int]:
        """What `rank` holds of the i-th parameter, flattened: first and last + 1."""
        low, start, length = rank * len(self.master), self.starts[i], self.shapes[i].numel()
        return tuple(min(max(edge - start, 0), length) for edge in (low, low + len(self.master)))

    def mine(self, part: Tensor, i: int) -> Tensor:
        """The numbers of the i-th parameter in this rank's part (n) of anything laid out like `full`."""
        first, last = self.part(i, self.rank)
        begin = min(max(self.starts[i] - self.rank * len(part), 0), len(part))
        return part[begin:begin + last - first]

    def install(self, parameters):
        for parameter, places in zip(parameters, self.places):
            for module, name in places:
                module._parameters[name] = parameter

    def start_gather(self):
        """Have the others' parts sent. Nothing to do when they are here and the weights have not changed since."""
        if self.gathered and self.version == self.master._version:
            return
        self.full.untyped_storage().resize_(self.full.numel() * self.full.itemsize)
        full = self.full.data                        # .data: autograd is not to notice that what it saved goes and comes back
        mine = full[self.rank * len(self.master):(self.rank + 1) * len(self.master)]
        mine.copy_(self.master.data)                                         # rounds to compute_dtype
        self.gathering = all_gather(full, mine, self.group)
        self.gathered, self.version = True, self.master._version

    def finish_gather(self):
        self.start_gather()
        if self.gathering:
            self.gathering.wait()
            self.gathering = None
            self.install(self.wholes)

    def free(self):
        if not self.gathered:
            return
        if self.gathering:                                                   # for nothing: the module was not called
            self.gathering.wait()
            self.gathering = None
        self.full.untyped_storage().resize_(0)
        self.gathered = False
        self.install(self.shards)

    def take(self, i: int):
        """Move the gradient of the i-th parameter to its place in `gradient`, divided by N."""
        if self.gradient is None:
            self.gradient, self.taken = torch.empty(self.full.shape, dtype=self.reduce_dtype, device=self.full.device), set()
        place, whole = self.gradient[self.starts[i]:self.starts[i + 1]].view(self.shapes[i]), self.wholes[i]
        if i in self.taken:
            place.add_(whole.grad.to(place.dtype), alpha=1 / self.ranks)     # from an earlier pass under no_sync
        else:
            torch.mul(whole.grad.to(place.dtype), 1 / self.ranks, out=place)
        whole.grad = None
        self.taken.add(i)
        self.used.add(i)

    def start_reduce(self):
        """Send the gradients off: every rank gets the sum of its part."""
        self.finish_reduce()
        gradient = self.gradient if self.gradient is not None else torch.zeros(
            self.full.shape, dtype=self.reduce_dtype, device=self.full.device)
        if self.gradient is not None:
            for i, (start, stop) in enumerate(zip(self.starts, self.starts[1:])):
                if i not in self.taken:
                    gradient[start:stop].zero_()
            gradient[self.starts[-1]:].zero_()
        part = torch.empty(len(self.master), dtype=self.reduce_dtype, device=self.full.device)
        self.reduction = (reduce_scatter(part, gradient, self.group), part, gradient)
        self.gradient = None

    def finish_reduce(self):
        if self.reduction:
            work, part, _ = self.reduction
            work.wait()
            self.total = part.to(self.master.dtype) if self.total is None else self.total.add_(part)
            self.reduction = None


class Unit:
    """A module whose parameters FSDP gathers and frees together (several `Flat`s if dtypes differ, or some are frozen)."""

    def __init__(self, module: nn.Module, flats: list[Flat]):
        self.module, self.flats = module, flats
        self.call = None                             # the latest: has the backward pass reached it?
        self.in_backward = 0                         # how many calls the backward pass is in
        self.due = False                             # has gradients, or may have, that were not sent off yet

    def start_gather(self):
        for flat in self.flats:
            flat.start_gather()

    def finish_gather(self):
        for flat in self.flats:
            flat.finish_gather()

    def free(self):
        for flat in self.flats:
            flat.free()


class FSDP(nn.Module):
    """Fully sharded data parallelism (Rajbhandari et al. 2019; Zhao et al. 2023, arXiv 2304.11277).

    Same forward as `module`. Each of `units` (by default the members of the module's outermost ModuleLists: its layers) is
    gathered just before its forward pass and freed after it, gathered again for its backward pass and freed after that,
    when its gradients are reduced, each rank receiving the mean of its part. While a unit computes, the next one is on its
    way: two are in memory at a time. What belongs to no unit, or to several (embedding, head, tied weights), is gathered
    from the start of the forward pass to the end of the step.

    Between steps the module's parameters are this rank's shards, under their own names and one-dimensional: they are what
    an optimizer updates. Gathering and computing happen in `compute_dtype`, gradients travel in `reduce_dtype` (both: the
    parameters' dtype), and shards keep the dtype that the parameters had. `device`: where the shards are to live, so that a
    model that is too large for one GPU can be built on the CPU. All ranks must use the same units in a step.
    What units are given and return: tensors, in tuples, lists, dicts and the like, but not in dataclasses.
    An input that needs a gradient and goes to many units (an encoder's output) keeps them gathered until that is made.
    Choose dtype and device before, not after; gradients of gradients are not possible. After an error in a backward pass, call
    finish_gradient_synchronization() and zero_grad() before going on.
    ValueError when the ranks' modules differ, or when nothing in them can be trained."""

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None, reduce_dtype: torch.dtype | None = None,
                 group=None, units: list[nn.Module] | None = None, device=None):
        super().__init__()
        self.module, self.synchronize, self.compute_dtype = module, True, compute_dtype
        self.group = group
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError("FSDP: no parameter of the module requires a gradient, so there is nothing to train")
        self.state_names = list(module.state_dict())
        if device is not None:
            for part in module.modules():
                part._buffers.update({name: b if b is None else b.to(device) for name, b in part._buffers.items()})
        start_alike(module, self.group, "FSDP", device)
        if units is None:
            containers, units, inner = (nn.ModuleList, nn.ModuleDict), [], set()
            for part in module.modules():
                if isinstance(part, nn.ModuleList) and part not in inner:
                    units += [member for member in part if not isinstance(member, containers)]
                    inner.update(m for member in part if not isinstance(member, containers) for m in member.modules())
        units = list(dict.fromkeys(units))
        owners, places = {}, {}
        for unit in units:
            for p in unit.parameters():
                owners.setdefault(p, []).append(unit)
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    places.setdefault(p, []).append((part, name))
        kinds = {unit: {} for unit in [*units, module]}                      # of every unit: {(dtype, trainable): parameters}
        for p in places:
            owner = owners[p][0] if len(owners.get(p, [])) == 1 else module
            kinds[owner].setdefault((p.dtype, p.requires_grad), {})[p] = places[p]
        made = [Unit(unit, [Flat(parameters, self.group, compute_dtype if dtype.is_floating_point else None, reduce_dtype, device)
                            for (dtype, _), parameters in kinds[unit].items()]) for unit in kinds]
        self.units, self.root = made[:-1], made[-1]
        module.register_forward_pre_hook(self._before_everything, with_kwargs=True)
        module.register_forward_hook(self._after_everything, always_call=True)
        for i, unit in enumerate(self.units):
            unit.module.register_forward_pre_hook(lambda _, args, kwargs, i=i: self._before_forward(i, args, kwargs), with_kwargs=True)
            unit.module.register_forward_hook(lambda _, args, output, i=i: self._after_forward(i, output))

    # --- forward

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _before_everything(self, _, args, kwargs):
        self.root_was_gathered = any(flat.gathered for flat in self.root.flats)
        self.root.start_gather()
        if self.units:
            self.units[0].start_gather()                                     # on its way while the root's part begins
        self.root.finish_gather()
        self.root.due |= torch.is_grad_enabled()
        return self._cast((args, kwargs))

    def _cast(self, values):
        """Arguments of a module in the dtype of its weights."""
        cast = lambda v: v.to(self.compute_dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        return tree_map(cast, values) if self.compute_dtype else values

    def _after_everything(self, module, args, output):
        # after an evaluation, or a forward pass that failed (it has no output; nor has one that is recomputed until it has
        # what it needs), nothing will be needed again
        failed = output is None and not any(unit.in_backward for unit in self.units)
        if failed or not torch.is_grad_enabled() and not self.root_was_gathered:
            for unit in [*self.units, self.root]:
                unit.free()

    def _before_forward(self, i, args, kwargs):
        unit = self.units[i]
        unit.finish_gather()
        args, kwargs = self._cast((args, kwargs))
        if unit.in_backward:                                                 # activations are being recomputed
            return args, kwargs
        if i + 1 < len(self.units):
            self.units[i + 1].start_gather()
        unit.call = SimpleNamespace(reached=False)                           # a unit may be called more than once
        if torch.is_grad_enabled():
            unit.due, inputs = True, []

            def enter(v):
                # a view is made before all that the unit makes of it, so its gradient comes after all of that has been
                # through its backward pass
                if isinstance(v, Tensor) and v.requires_grad:
                    v = v.view_as(v)
                    inputs.append(v)
                return v

            args, kwargs = tree_map(enter, (args, kwargs))
            if inputs:
                torch.autograd.graph.register_multi_grad_hook(inputs, lambda _, call=unit.call: self._after_backward(i, call))
        return args, kwargs

    def _after_forward(self, i, output):
        unit = self.units[i]
        if unit.in_backward:
            return
        results = [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.requires_grad]
        if results:
            torch.autograd.graph.register_multi_grad_hook(
                results, lambda _, call=unit.call: self._before_backward(i, call), mode="any")
        if not results or i + 1 < len(self.units):                           # the last unit's backward pass follows at once
            unit.free()

    # --- backward

    def _before_backward(self, i, call):
        unit, call.reached = self.units[i], True
        unit.in_backward += 1
        unit.due = True
        unit.finish_gather()
        if i + 1 == len(self.units) and i > 0:
            self.units[i - 1].start_gather()

    def _after_backward(self, i, call):
        unit = self.units[i]
        if not call.reached:                                                 # its results were not used
            return
        call.reached = False
        unit.in_backward -= 1
        if unit.in_backward:                                                 # the call before has begun
            return
        unit.free()
        if i > 1:
            self.units[i - 2].start_gather()                                 # unit i - 1 computes now
        self._reduce(unit)

    def _reduce(self, unit):
        """Send off the gradients of a unit. One reduction is under way at a time: the memory of more would add up."""
        if not self.synchronize:
            return
        unit.due = False
        for flat in unit.flats:
            if flat.trainable:
                for other in self._flats():
                    other.finish_reduce()
                flat.start_reduce()

    def _flats(self):
        return [flat for unit in [*self.units, self.root] for flat in unit.flats]

    @contextmanager
    def no_sync(self):
        """Inside, backward passes add up whole gradients on this rank, which takes the memory that sharding saves, and
        saves a third of the traffic. Without it every backward pass reduces, and the shards add up."""
        before, self.synchronize = self.synchronize, False
        try:
            yield
        finally:
            self.synchronize = before

    def finish_gradient_synchronization(self):
        """Call after the step's last backward pass: waits for all, frees what is gathered, and leaves in every shard's .grad
        the mean over ranks. A parameter that no rank used since the last call gets none."""
        for unit in [*reversed(self.units), self.root]:
            unit.in_backward = 0
            if unit.due:
                self._reduce(unit)
        flats = [flat for flat in self._flats() if flat.trainable]
        for flat in flats:
            flat.finish_reduce()
        used = torch.ones(sum(len(flat.shards) for flat in flats), device=flats[0].full.device)
        for i, mine in enumerate(i in flat.used for flat in flats for i in range(len(flat.shards))):
            if not mine:
                used[i] = 0                                                  # a fill on the device, not a copy to it
        dist.all_reduce(used, group=self.group)
        everything = all(len(flat.used) == len(flat.shards) for flat in flats)
        used = iter([1] * len(used) if everything else used.tolist())        # on a GPU, looking waits
        for flat in flats:
            for i, (shard, used_somewhere) in enumerate(zip(flat.shards, used)):
                if flat.total is not None and used_somewhere:
                    part = flat.mine(flat.total, i)
                    shard.grad = part if shard.grad is None else shard.grad.add_(part)
            flat.total, flat.used = None, set()
        for unit in [*self.units, self.root]:
            unit.free()

    # --- whole tensors

    def shards(self) -> dict[str, "Shard"]:
        """Every parameter's name and what of it is where."""
        name_of = {(module, key): f"{prefix}.{key}" if prefix else key
                   for prefix, module in self.module.named_modules() for key in module._parameters}
        return {name_of[places[0]]: Shard(flat.shards[i], flat.shapes[i], [flat.part(i, r) for r in range(flat.ranks)], flat.rank)
                for flat in self._flats() for i, places in enumerate(flat.places)}

    @torch.no_grad()
    def full_state_dict(self, only_rank: int | None = None) -> dict[str, Tensor]:
        """The whole model's state, names as in the module's own state_dict(), on the CPU, gathered a unit at a time. Every
        rank must call it; with `only_rank` the others get an empty dict and need no memory for it."""
        wholes = {}
        for flat in self._flats():
            full = torch.empty(flat.full.shape, dtype=flat.master.dtype, device=flat.full.device)
            all_gather(full, flat.master, self.group).wait()
            if only_rank in (None, flat.rank):
                full = full.cpu()
                for places, shape, start in zip(flat.places, flat.shapes, flat.starts):
                    wholes |= dict.fromkeys(places, full[start:start + shape.numel()].view(shape).clone())
        state = {}
        for name in self.state_names if only_rank in (None, dist.get_rank(self.group)) else []:
            prefix, _, key = name.rpartition(".")
            module = self.module.get_submodule(prefix)
            state[name] = wholes[module, key] if (module, key) in wholes else module._buffers[key].cpu()
        return state

    @torch.no_grad()
    def load_full_state_dict(self, state: dict[str, Tensor]):
        """Take this rank's shards out of a whole model's state. ValueError when a parameter is missing or has another shape."""
        for name, shard in self.shards().items():
            if name not in state or state[name].shape != shard.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"FSDP: {name} should have shape {tuple(shard.shape)} and is {found}")
            first, last = shard.parts[shard.rank]
            shard.parameter.copy_(state[name].reshape(-1)[first:last])
        for name, buffer in self.module.named_buffers():
            if name in state:
                buffer.copy_(state[name])


class MatrixOptimizer(Around):
    """An optimizer that needs whole matrices (Muon) on FSDP's shards: each matrix belongs to one rank, which gathers its
    gradient and its weights, updates it, and sends every rank its shard of the result. Two all-to-alls a step.

    params: shards of `fsdp`, or parameter groups of them. `state` is that of the matrices that this rank owns, which `wholes`
    lists by their shards: about 1/N of all."""

    def __init__(self, fsdp: FSDP, params, optimizer_cls, **options):
        self.group = fsdp.group
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.shard_of = {shard.parameter: shard for shard in fsdp.shards().values()}
        self.owners, self.wholes, self.loads = {}, {}, [0] * self.ranks
        super().__init__(params, optimizer_cls, options)

    @torch.no_grad()
    def add_param_group(self, param_group: dict):
        super().add_param_group(param_group)
        mine = []
        for p in sorted(self.param_groups[-1]["params"], key=lambda p: -self.shard_of[p].shape.numel()):   # the largest first, to the idlest
            self.owners[p] = self.loads.index(min(self.loads))
            self.loads[self.owners[p]] += self.shard_of[p].shape.numel()
            if self.owners[p] == self.rank:
                self.wholes[p] = nn.Parameter(p.new_empty(self.shard_of[p].shape))
                mine.append(self.wholes[p])
        self.hand_over(mine)
        self._drop_wholes()

    def _drop_wholes(self):
        for whole in self.wholes.values():                                   # memory is taken during a step alone
            whole.data, whole.grad = whole.data.new_empty(0), None

    def _length(self, p, rank) -> int:
        first, last = self.shard_of[p].parts[rank]
        return last - first

    @torch.no_grad()
    def step(self, closure=None, **arguments):
        """Update all matrices. `arguments` go to the inner optimizer's step, on every rank."""
        with torch.enable_grad():
            loss = closure() if closure else None
        going = [p for group in self.param_groups for p in group["params"] if p.grad is not None]     # the same on all ranks
        of = [[p for p in going if self.owners[p] == r] for r in range(self.ranks)]
        mine, everybody = of[self.rank], range(self.ranks)
        # to each owner this rank's parts of its matrices; from each rank its parts of mine
        to_owner = [sum(self._length(p, self.rank) for p in of[r]) for r in everybody]
        to_shard = [sum(self._length(p, r) for p in mine) for r in everybody]
        empty = (going or self.param_groups[0]["params"])[0].new_empty(0)
        collect = lambda pieces: torch.cat([empty, *(piece.reshape(-1) for piece in pieces)])

        def exchange(sent, sizes, received_sizes):
            received = empty.new_empty(sum(received_sizes))
            dist.all_to_all_single(received, sent, received_sizes, sizes, group=self.group)
            return received.split(received_sizes)

        for name in ("data", "grad"):
            received = exchange(collect(getattr(p, name) for r in everybody for p in of[r]), to_owner, to_shard)
            parts = [dict(zip(mine, part.split([self._length(p, r) for p in mine]))) for r, part in enumerate(received)]
            for p in mine:
                setattr(self.wholes[p], name, torch.cat([part[p] for part in parts]).view(self.shard_of[p].shape))
        self.inner_step(**arguments)
        sent = collect(self.wholes[p].view(-1)[slice(*self.shard_of[p].parts[r])] for r in everybody for p in mine)
        for r, part in enumerate(exchange(sent, to_shard, to_owner)):
            for p, new in zip(of[r], part.split([self._length(p, self.rank) for p in of[r]])):
                p.copy_(new)
        self._drop_wholes()
        return loss


@torch.no_grad()
def gradient_norm(parameters, sharded: bool = False, data_group=None, divided=frozenset(), tensor_group=None) -> Tensor:
    """The L2 norm of the whole gradient, on the device, when a rank holds a part of it: with `sharded` every rank of the
    data group has its own part of all (FSDP), and ranks of the tensor group have different parts of the parameters in
    `divided`, and the same of all others, which are counted once."""
    parameters = list(parameters)
    norms = {False: [], True: []}                                            # of what tensor ranks hold alike; of what they divide
    for p in parameters:
        if p.grad is not None:
            norms[p in divided].append(p.grad.float().norm())
    zero = torch.zeros((), device=parameters[0].device)
    alike, parts = (torch.stack([zero, *norms[kind]]).square().sum() for kind in (False, True))
    if divided:
        dist.all_reduce(parts, group=tensor_group)
    total = alike + parts
    if sharded:
        dist.all_reduce(total, group=data_group)
    return total.sqrt()


# ------------------------------------------------------------------------------------------------------------------
# Tensor parallelism: every rank computes a part of every product
#
# In y = B f(A x), cut A into blocks of rows and B into blocks of columns: y = B_1 f(A_1 x) + B_2 f(A_2 x) + ... as long as f
# works on the parts by themselves, as attention does on heads and SwiGLU on its elements. So a rank needs all of x, and one
# sum over ranks gives all of y; in the backward pass it is x's gradient that has to be summed. (nn.Linear keeps A as a
# (output, input) matrix: "column parallel" in the papers, whose x A multiplies from the left, is a cut of dimension 0 here.)

class CopyToRanks(torch.autograd.Function):
    """x, which all ranks have and use for parts of a result: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class SumOverRanks(torch.autograd.Function):
    """The sum of every rank's part of a result, on every rank: each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx, part, group):
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class JoinRanks(torch.autograd.Function):
    """Parts of the last dimension, one behind the other, on every rank."""

    @staticmethod
    def forward(ctx, part, size, group):
        ctx.mine = slice(*bounds(size, group))
        return unsplit(part, part.dim() - 1, size, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[..., ctx.mine], None, None


def bounds(size: int, group, rank: int | None = None) -> tuple[int, int]:
    """Where a rank's part of a dimension of `size` begins and ends; parts differ by one at most."""
    rank, ranks = dist.get_rank(group) if rank is None else rank, dist.get_world_size(group)
    return rank * size // ranks, (rank + 1) * size // ranks


def unsplit(part: Tensor, dim: int, size: int, group) -> Tensor:
    """The whole of a tensor whose dimension `dim`, of `size`, is divided over the group by `bounds`, on every rank."""
    ranks = dist.get_world_size(group)
    longest = -(-size // ranks)
    rows = part.movedim(dim, 0).contiguous()
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[:len(rows)] = rows
    everybodys = padded.new_empty(ranks, *padded.shape)
    all_gather(everybodys.view(-1), padded.view(-1), group).wait()
    lengths = [stop - start for start, stop in (bounds(size, group, r) for r in range(ranks))]
    return torch.cat([whole[:length] for whole, length in zip(everybodys, lengths)]).movedim(0, dim)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """See `vocab_parallel_cross_entropy`. As the loss's gradient by the logits is (softmax - onehot) / count, it is at hand
    as soon as a chunk's logits are: both gradients are taken in the forward pass and the logits are dropped. What z_loss and
    softcap add: softmax is multiplied by 1 + 2 · z_loss · logsumexp, all by the cap's slope, 1 - tanh²."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, softcap, z_loss, start, rows, group, backward):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x, w, y = hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight.to(dtype), targets.reshape(-1)
        counted = y != ignore_index
        here = counted & (y >= start) & (y < start + len(w))                 # whose target lies in this rank's part of V
        y, count = (y - start).where(here, 0)[:, None], counted.sum()        # (N, 1), ()
        loss = torch.zeros((), device=x.device)
        x_grad, w_grad = (torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)) if backward else (None, None)
        with torch.autocast(device, enabled=False):
            for i in range(0, len(x), rows):
                part = slice(i, i + rows)
                logits = (x[part] @ w.T).float()                             # (rows, V / ranks)
                if softcap is not None:
                    logits.div_(softcap).tanh_()
                    slope = 1 - logits.square() if backward else None
                    logits.mul_(softcap)
                # one exchange: each rank's log of its part of the sum, and the target's logit from the one that has it.
                # A target that nobody has leaves -inf, and so an infinite loss, not a wrong one.
                target = logits.gather(1, y[part])[:, 0].where(here[part], float("-inf"))
                mine = torch.stack([torch.logsumexp(logits, -1), target])    # (2, rows)
                everybodys = mine.new_empty(dist.get_world_size(group), *mine.shape)
                all_gather(everybodys.view(-1), mine.view(-1), group).wait()
                total, target = torch.logsumexp(everybodys[:, 0], 0), everybodys[:, 1].amax(0)       # (rows), (rows)
                losses = total - target if not z_loss else total - target + z_loss * total.square()
                loss += losses.where(counted[part], 0).sum()
                if backward:
                    share = (counted[part] / count)[:, None]                 # of each position in the mean
                    pull = share if not z_loss else share * (1 + 2 * z_loss * total[:, None])
                    grad = logits.sub_(total[:, None]).exp_().mul_(pull)
                    grad = grad.scatter_add_(1, y[part], -share * here[part, None])
                    grad = (grad if softcap is None else grad.mul_(slope)).to(dtype)
                    x_grad[part] = grad @ w
                    w_grad += grad.T @ x[part]
        if backward:
            ctx.save_for_backward(x_grad.view_as(hidden).to(hidden.dtype), w_grad.to(weight.dtype))
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad):
        x_grad, w_grad = ctx.saved_tensors
        return x_grad * loss_grad, w_grad * loss_grad, *[None] * 8


def vocab_parallel_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, group,
                                 ignore_index: int = -100, softcap: float | None = None, z_loss: float = 0.0) -> Tensor:
    """Mean of -log softmax(hidden @ W.T)[target] in nats over targets that are not `ignore_index`, where each rank has the
    part `weight` of W's rows: nobody ever holds all logits, and 2 numbers a position travel instead of V. With `softcap`
    logits z count as softcap · tanh(z / softcap); z_loss times the mean of logsumexp(z)² is added.

    hidden (..., D) and targets (...) are the same on all ranks, and so is the result."""
    start, _ = bounds(vocab_size, group)
    rows = max(512, 2 ** 22 * dist.get_world_size(group) // vocab_size)      # at a time; parts of the vocabulary differ in size
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return VocabParallelCrossEntropy.apply(CopyToRanks.apply(hidden, group), weight, targets, ignore_index, softcap,
                                           z_loss, start, rows, group, backward)


DIVIDED_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
DIVIDED_INPUTS = ("o_proj", "down_proj")


@torch.no_grad()
def tensor_parallel(model: nn.Module, group, device=None) -> dict[str, tuple[int, int]]:
    """Leaves every rank its part of a decoder with Llama's names (`embed_tokens`, `q_proj`, ..., `lm_head`): heads, rows of
    the feed-forward network, rows of the vocabulary. Before DDP or FSDP. Returns the parameters that are divided: which
    dimension, and its whole size. `device`: one that the group can reach, if the model is elsewhere (on the CPU, and large).

    The embedding's rows are looked up where they are and summed; `lm_head` joins its logits, for sampling; the loss of a model
    that has `ops.linear_cross_entropy` (model.py's) does without them. ValueError when heads do not divide, or ranks hold different models."""
    ranks = dist.get_world_size(group)
    if not hasattr(model, "config") or not any(name.endswith("q_proj") for name, _ in model.named_modules()):
        raise ValueError("tensor_parallel: the model is no decoder with Llama's names (config.num_attention_heads, q_proj, ...)")
    for key, why in (("num_local_experts", "experts are not divided; take ddp, zero1 or fsdp without it"),
                     ("dropout", "each rank would drop something else; set it to 0")):
        if getattr(model.config, key, None):
            raise ValueError(f"tensor_parallel: {key} is {getattr(model.config, key)}, and {why}")
    start_alike(model, group, "tensor_parallel", device)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model.config, name)
        if heads % ranks:
            raise ValueError(f"tensor_parallel: {name} is {heads}, which cannot be divided over {ranks} ranks; heads stay whole")
    divided, moved = {}, {}

    def cut(name, module, key, dim):
        """The rank's part of a parameter, in its place; a tied one stays tied."""
        p = getattr(module, key)
        if p not in moved:
            start, stop = bounds(p.shape[dim], group)
            moved[p] = nn.Parameter(p.narrow(dim, start, stop - start).clone(), p.requires_grad), p.shape[dim]
        divided[f"{name}.{key}"] = dim, moved[p][1]
        setattr(module, key, moved[p][0])

    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in DIVIDED_OUTPUTS:
            for key, _ in list(module.named_parameters(recurse=False)):
                cut(name, module, key, 0)
            module.out_features = len(module.weight)
        elif kind in DIVIDED_INPUTS:
            cut(name, module, "weight", 1)
            module.in_features = module.weight.shape[1]
            # a bound method, so that a deep copy computes with its own weights
            module.forward = MethodType(lambda self, x: _add_bias(
                SumOverRanks.apply(F.linear(x, self.weight), group), self.bias), module)
        elif kind == "embed_tokens":
            size = len(module.weight)
            cut(name, module, "weight", 0)
            module.forward = MethodType(lambda self, tokens, size=size: _embed(tokens, self.weight, size, group), module)
        elif kind == "lm_head":
            size = len(module.weight)
            cut(name, module, "weight", 0)
            module.forward = MethodType(lambda self, x, size=size: JoinRanks.apply(
                F.linear(CopyToRanks.apply(x, group), self.weight), size, group), module)
            if hasattr(model, "ops"):
                model.ops = replace(model.ops, linear_cross_entropy=partial(
                    vocab_parallel_cross_entropy, vocab_size=size, group=group))
        if hasattr(module, "q_proj") or hasattr(module, "up_proj"):          # the input is copied once for all its products
            module.register_forward_pre_hook(lambda module, args, kwargs: _enter(module, args, kwargs, group), with_kwargs=True)
            module.register_forward_hook(lambda module, args, output: _leave(module), always_call=True)
    return divided


def _add_bias(x, bias):
    return x if bias is None else x + bias


def _embed(tokens, weight, size, group):
    start, stop = bounds(size, group)
    here = (tokens >= start) & (tokens < stop)
    rows = F.embedding((tokens - start).where(here, 0), weight)
    return SumOverRanks.apply(rows.where(here[..., None], 0), group)


def _enter(module, args, kwargs, group):
    for norm in (getattr(module, "q_norm", None), getattr(module, "k_norm", None)):
        if norm is not None:     # a weight that all heads share: each rank's heads give a part of its gradient
            norm.__dict__["weight"] = CopyToRanks.apply(norm._parameters["weight"], group)
    if args:
        return (CopyToRanks.apply(args[0], group), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": CopyToRanks.apply(kwargs["hidden_states"], group)}     # as transformers calls it


def _leave(module):
    for norm in (getattr(module, "q_norm", None), getattr(module, "k_norm", None)):
        if norm is not None:
            norm.__dict__.pop("weight", None)


# ------------------------------------------------------------------------------------------------------------------
# torchrun ddp.py: the strategies side by side

def cross_entropy_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What vocab_parallel_cross_entropy divides, on one rank."""
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2).float(), targets.flatten())


@dataclass(frozen=True)
class Ops:
    """What tensor_parallel puts its own in the place of, as in model.py."""
    linear_cross_entropy: object = cross_entropy_of


class Decoder(nn.Module):
    """A decoder with Llama's names, to try strategies on. It has no positions: nothing here depends on them."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int):
        super().__init__()
        self.config, self.ops = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=heads), Ops()
        self.embed_tokens, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.layers = nn.ModuleList(Layer(width, width // heads) for _ in range(layers))

    def forward(self, tokens, targets):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.ops.linear_cross_entropy(self.norm(x), self.lm_head.weight, targets)


class Layer(nn.Module):
    """Attention and feed-forward network, each added to the residual stream."""

    def __init__(self, width, head):
        super().__init__()
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.self_attn, self.mlp = Attention(width, head), FeedForward(width)

    def forward(self, x):
        x = x + self.self_attn(self.first(x))
        return x + self.mlp(self.second(x))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width, head):
        super().__init__()
        self.head = head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width):
        super().__init__()
        inner = -(-8 * width // 3 // 64) * 64
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Contender:
    """A strategy ready to train: forward gives a loss, finish ends the gradients' synchronization, state is the whole
    model's; passes: how many times (N-1)/N of all parameters the formula has a rank send."""
    forward: object
    optimizer: object
    state: object
    finish: object = lambda: None
    passes: int | None = None
    share: int = 1                                   # the batch is divided by this


def contenders(make, ranks: int) -> dict:
    """name -> a function that builds the Contender. A `torch ...` is the peer of the one above it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    adamw = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)

    def averaging(average, passes=2):
        def build():
            model = make()
            return Contender(model, adamw(model), model.state_dict, lambda: average(model), passes, ranks)
        return build

    def ours(wrap, optimizer, passes):
        def build():
            model = make()
            wrapped = wrap(model)
            state = wrapped.full_state_dict if isinstance(wrapped, FSDP) else model.state_dict
            return Contender(wrapped, optimizer(model), state, wrapped.finish_gradient_synchronization, passes, ranks)
        return build

    def torchs(wrap, optimizer, passes):
        def build():
            model = make()
            wrapped = wrap(model)
            whole = lambda: {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
            return Contender(wrapped, optimizer(model), whole, passes=passes, share=ranks)
        return build

    def shard(model):
        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def tensor():
        model = make()
        divided = tensor_parallel(model, None)
        whole = lambda: {name: unsplit(t, *divided[name], None) if name in divided else t for name, t in model.state_dict().items()}
        return Contender(model, adamw(model), whole)

    zero = dict(lr=1e-3, eps=1e-3)                       # such an eps that a rounding error cannot turn an update around
    return {
        "one process": lambda: (lambda model: Contender(model, adamw(model), model.state_dict))(make()),
        "average each parameter": averaging(average_gradients),
        "average one flat buffer": averaging(average_gradients_flat),
        "DDP": ours(DDP, adamw, 2),
        "torch DDP": torchs(nn.parallel.DistributedDataParallel, adamw, 2),
        "DDP + ShardedOptimizer": ours(DDP, lambda m: ShardedOptimizer(m.parameters(), torch.optim.AdamW, **zero), 3),
        "torch DDP + ZeroRedundancyOptimizer": torchs(nn.parallel.DistributedDataParallel, lambda m: ZeroRedundancyOptimizer(
            m.parameters(), torch.optim.AdamW, **zero), 3),
        "FSDP": ours(FSDP, adamw, 3),
        "torch fully_shard": torchs(shard, adamw, 3),
        "tensor_parallel": tensor,
    }


def step(c: Contender, tokens: Tensor, targets: Tensor):
    """One step on this rank's part of a batch."""
    size = len(tokens) // c.share
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size) if c.share > 1 else slice(None)
    c.forward(tokens[rows], targets[rows]).backward()
    c.finish()
    c.optimizer.step()
    c.optimizer.zero_grad()


def keep_freed_memory(keep: bool):
    """Whether malloc keeps what is freed, large blocks too: fast, as train.py has it; or gives it back at once, so that the
    system sees what is in use."""
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1                              # names of the dials in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, 2 ** 30 if keep else 2 ** 17)
        ctypes.CDLL(None).mallopt(trim_threshold, 2 ** 31 - 1 if keep else 2 ** 17)


class Memory:
    """The most memory that is taken from `restart` to `peak`, in bytes beyond what was held when this was made: by the
    allocator on a GPU, by the kernel's high-water mark of this process elsewhere (Linux; None where there is none)."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        self.restart()
        self.before = self.read("VmRSS")

    def restart(self):
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")                    # sets the mark back

    def read(self, key) -> int:
        if self.gpu:
            return torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
        if sys.platform != "linux":
            return 0
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def peak(self) -> int | None:
        return self.read("VmHWM") - self.before or None


def intervals(spans) -> list[tuple[float, float]]:
    """The union of (start, end) spans, in order and without overlap."""
    union = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


def common(a, b) -> float:
    """How long two unions of spans overlap."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return total


def observe(action, device, ranks: int) -> tuple[float, dict[str, list]]:
    """Run `action` under torch's profiler: bytes that this rank sends (by each collective's ring formula), and what ran when,
    as {"compute": [(name, start, end)], "communication": ...} in microseconds."""
    from torch.profiler import ProfilerActivity, profile
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, record_shapes=True) as profiler:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    sent, rows = 0.0, {"compute": [], "communication": []}
    widths = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "unsigned char": 1}
    for e in (e for e in events if e.get("ph") == "X"):
        name, args = e["name"], e.get("args", {})
        if name.startswith("c10d::"):                                        # the call; what it does comes under another name
            passes = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1, "reduce_": 1}
            shapes, kinds = args["Input Dims"], args["Input type"]
            shapes = shapes[0] if kinds[0] == "TensorList" else shapes[:2]   # of gathers and scatters the larger counts
            kind = "float" if kinds[0] == "TensorList" else kinds[0]
            if name[6:] in passes:
                size = max(math.prod(shape) for shape in shapes) * widths[kind]
                sent += passes[name[6:]] * size * (ranks - 1) / ranks
        elif device.type == "cuda" and e.get("cat") != "kernel":
            continue
        elif name.startswith(("gloo:", "nccl")):
            rows["communication"].append((name, e["ts"], e["ts"] + e["dur"]))
        elif e.get("cat") == "kernel" or name.startswith("aten::"):           # not what calls these, which may be waiting
            rows["compute"].append((name, e["ts"], e["ts"] + e["dur"]))
    return sent, rows


def write_trace(path, timelines: dict[str, dict[str, list]]):
    """A Chrome trace (chrome://tracing, ui.perfetto.dev): a process for each strategy, a row for compute, one for communication."""
    events = []
    for pid, (strategy, rows) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": strategy}})
        zero = min((start for row in rows.values() for _, start, _ in row), default=0)
        for tid, (row, spans) in enumerate(rows.items()):
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": row}})
            events += [{"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start - zero, "dur": end - start} for name, start, end in spans]
    temporary = Path(f"{path}.tmp.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"traceEvents": events}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def compare(args, device):
    """The table: every strategy's error, traffic, memory, time and overlap, beside torch's own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def make():
        torch.manual_seed(0)
        return Decoder(args.layers, args.width, args.heads, args.vocabulary).to(device)

    if args.batch_size % ranks:
        raise ValueError(f"--batch_size {args.batch_size} cannot be divided over {ranks} ranks")
    if args.width % args.heads or args.width < 1:
        raise ValueError(f"--width {args.width} is no multiple of --heads {args.heads}")
    if args.heads % ranks:
        raise ValueError(f"--heads {args.heads} cannot be divided over {ranks} ranks, as tensor_parallel does")
    if args.trace and (Path(args.trace).is_dir() or not Path(args.trace).absolute().parent.is_dir()):
        raise ValueError(f"--trace {args.trace}: a file is expected, in a folder that exists")
    torch.manual_seed(1)
    batch = torch.randint(0, args.vocabulary, (2, args.batch_size, args.sequence_length), device=device)
    bars = dict(disable=None if rank == 0 else True, leave=False)
    size = sum(p.nbytes for p in make().parameters())
    rows, ready, want, timelines = {}, {}, None, {}
    keep_freed_memory(False)
    step(contenders(make, ranks)["one process"](), *batch)                   # what the first step of a process takes is nobody's
    for name, build in tqdm(contenders(make, ranks).items(), desc="strategies", **bars):
        memory = Memory(device)
        c = build()
        for i in range(3):
            if i == 2:
                memory.restart()
            step(c, *batch)
        peak = memory.peak()
        state = {key: t.cpu().clone() for key, t in c.state().items()}
        want = want or state
        error = max((state[key] - want[key]).abs().max().item() for key in want)
        traffic, timelines[name] = observe(lambda: step(c, *batch), device, ranks)
        busy, moving = (intervals((a, b) for _, a, b in timelines[name][row]) for row in ("compute", "communication"))
        total = sum(b - a for a, b in moving)
        rows[name] = dict(error=error, memory=peak, traffic=traffic, formula=c.passes and c.passes * size * (ranks - 1) / ranks,
                          hidden=common(busy, moving) / total if total else None, times=[])
        ready[name] = c
    keep_freed_memory(True)
    for _ in tqdm(range(args.rounds + 1), desc="rounds", **bars):                # in turns: the machine's moods hit all alike
        for name, c in ready.items():                                        # the first round does not count
            dist.barrier()
            start = time.perf_counter()
            step(c, *batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            rows[name]["times"].append(time.perf_counter() - start)
    if rank:
        return
    for r in rows.values():
        del r["times"][0]
    mb = lambda n: "-" if n is None else f"{n / 1e6:.1f}"
    print(f"{ranks} ranks, {dist.get_backend()}, {device.type}: {args.layers} layers, width {args.width}, {size / 4e6:.1f}M parameters "
          f"({mb(size)} MB), float32; batch {args.batch_size} x {args.sequence_length} tokens, AdamW.\n"
          "error: largest difference of a weight from one process after three steps. sent: MB per rank and step, counted, and by the\n"
          "formula (FSDP gathers embedding, head and the last layer once and not twice). memory: the most that a step takes on rank 0. time: median; beside it, the median ratio to torch's of the\n"
          "line below. hidden: communication during which this rank computes.\n")
    print(f"{'strategy':36} {'error':>7} {'sent MB':>8} {'formula':>8} {'memory MB':>9} {'ms/step':>8} {'to torch':>8} {'hidden':>6}")
    names = list(rows)
    for name, below in zip(names, [*names[1:], ""]):
        r, ratio = rows[name], ""
        if below.startswith("torch"):
            ratio = f"{statistics.median(a / b for a, b in zip(r['times'], rows[below]['times'])):.2f}"
        print(f"{name:36} {r['error']:7.0e} {mb(r['traffic']):>8} {mb(r['formula']):>8} {mb(r['memory']):>9} "
              f"{1000 * statistics.median(r['times']):8.0f} {ratio:>8} {'-' if r['hidden'] is None else format(r['hidden'], '.0%'):>6}")
    whole, layer = size / 4, sum(p.numel() for p in make().layers[0].parameters()) if args.layers else 0
    print(f"\nFSDP on paper, without activations: {16 * whole / ranks / 1e6:.1f} MB for 1/{ranks} of weights, gradients and moments, "
          f"{mb(4 * (whole - args.layers * layer))} for what\nis gathered all the time, {mb(8 * layer)} for two layers, "
          f"{mb(4 * layer)} for a layer's whole gradient.")
    if args.trace:
        write_trace(args.trace, timelines)
        print(f"\n{args.trace}: open it in chrome://tracing or ui.perfetto.dev")


def collectives(args, device):
    """Time all-reduce, all-gather and reduce-scatter by size. Bandwidth: bytes that a ring sends per rank over the time."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"{ranks} ranks, {dist.get_backend()}, {device.type}; float32; median of {args.rounds}. GB/s: what a rank sends by the "
              f"formula, over the time.\n\n{'MB':>9}  " + "  ".join(f"{name:>24}" for name in ("all-reduce", "all-gather", "reduce-scatter")))
    for power in range(10, args.largest + 1, 2):
        n = max(1, 2 ** power // 4 // ranks)
        full, part = torch.ones(n * ranks, device=device), torch.ones(n, device=device)
        cells = []
        for passes, action in ((2, lambda: dist.all_reduce(full)), (1, lambda: all_gather(full, part, None).wait()),
                               (1, lambda: reduce_scatter(part, full, None).wait())):
            times = []
            for _ in range(args.rounds + 2):
                dist.barrier()
                start = time.perf_counter()
                action()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                full.fill_(1)
            median = statistics.median(times[2:])
            cells.append(f"{1000 * median:10.2f} ms {passes * full.nbytes * (ranks - 1) / ranks / median / 1e9:6.2f} GB/s")
        if rank == 0:
            print(f"{full.nbytes / 1e6:9.3f}  " + "  ".join(cells), flush=True)


# ------------------------------------------------------------------------------------------------------------------
# The same on paper: memory, traffic and time on machines that are not here
#
# A step takes as long as its products, and what of the exchanges does not fit beside them. Products take FLOPs / (N * peak *
# mfu), an exchange takes its bytes / the rate of the link they cross: NVLink inside a node, the network between nodes. The
# batch is given, so that with every doubling of N a GPU has half as much to compute; the weights do not get fewer.

@dataclass(frozen=True)
class GPU:
    """One GPU of a node of several, with its share of the links. Rates: bytes per second in one direction."""
    flops: float                                 # peak of dense bfloat16 products, FLOP/s
    memory: float                                # bytes
    nvlink: float
    network: float
    per_node: int = 8


# NVIDIA's data sheets; a network card for each GPU, of 200 Gb/s (a100) or 400 Gb/s
GPUS = {"a100": GPU(312e12, 80e9, 300e9, 25e9), "h100": GPU(989e12, 80e9, 450e9, 50e9),
        "h200": GPU(989e12, 141e9, 450e9, 50e9), "b200": GPU(2250e12, 180e9, 900e9, 50e9)}


@dataclass(frozen=True)
class Shape:
    """What of a decoder decides its cost, under config.json's keys. Biases and norms of heads are too small to count."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    tie_word_embeddings: bool = False


LLAMA_8B = Shape(128_256, 4096, 32, 32, 8, 128, 14336)           # Llama 3.1 8B (Grattafiori et al. 2024, arXiv 2407.21783)


@dataclass(frozen=True)
class Work:
    """What a step has to do, with float32 weights, gradients and AdamW moments, and products in bfloat16."""
    batch_tokens: int = 4_194_304                # of a step, over all GPUs
    sequence_length: int = 4096
    micro_batch_size: int = 1                    # sequences in one forward pass of a data rank
    mfu: float = 0.5                             # share of the peak that products reach while nothing waits
    recompute: bool = False                      # keep each layer's input alone, and run the layer again when it is needed

    def __post_init__(self):
        at_least_one({name: getattr(self, name) for name in ("batch_tokens", "sequence_length", "micro_batch_size")})
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it must be above 0 and at most 1")


def at_least_one(values: dict):
    """ValueError for the first of named values that is no whole number from 1 on."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def shape_from_config(values: dict) -> Shape:
    """The shape that a config.json describes; what it may leave out is as in model.Config. ValueError names the key that is
    missing or wrong, or that stands for experts, which this plan does not know."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if values.get(key):
            raise ValueError(f"{key} is {values[key]}, and models with experts cannot be planned")
    if values.get("model_type") == "gpt2":
        raise ValueError("model_type is gpt2, and only models with swiglu can be planned")
    if values.get("feed_forward", "swiglu") != "swiglu":
        raise ValueError(f"feed_forward is {values['feed_forward']}, and only swiglu can be planned")
    given = {key: values[key] for key in Shape.__dataclass_fields__ if values.get(key) is not None}
    tied = bool(given.pop("tie_word_embeddings", False))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if key not in given:
            raise ValueError(f"{key} is missing")
    at_least_one(given)
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    rules = {"num_key_value_heads": heads, "head_dim": hidden // heads, "intermediate_size": -(-8 * hidden // 192) * 64}
    sizes = {**rules, **given}
    at_least_one(sizes)                                          # more heads than hidden_size leave no head_dim
    return Shape(**sizes, tie_word_embeddings=tied)


def parameters_on_rank(shape: Shape, tensor: int = 1) -> dict[str, float]:
    """Parameters on one of `tensor` tensor-parallel ranks, which divide matrices and tables; every rank has the norms.

    `matrices` and `layer`: of one layer; `tables`: embedding and head, which may be one; `all`: the whole model's."""
    s = shape
    heads = 2 * s.head_dim * (s.num_attention_heads + s.num_key_value_heads)
    matrices = s.hidden_size * (heads + 3 * s.intermediate_size) / tensor
    tables = s.vocab_size * s.hidden_size * (1 if s.tie_word_embeddings else 2) / tensor
    layer = matrices + 2 * s.hidden_size
    everything = s.num_hidden_layers * layer + s.hidden_size + tables
    return {"matrices": matrices, "layer": layer, "tables": tables, "all": everything}


def step_flops(shape: Shape, work: Work) -> float:
    """FLOPs of a step, counted as in model.flops_per_token; with recomputation the layers run 4 times for 3."""
    scores = 4 * work.sequence_length * shape.num_attention_heads * shape.head_dim
    layers = shape.num_hidden_layers * (2 * parameters_on_rank(shape)["matrices"] + scores)
    head = 2 * shape.vocab_size * shape.hidden_size
    return 3 * (layers * (4 / 3 if work.recompute else 1) + head) * work.batch_tokens


def memory_per_gpu(shape: Shape, strategy: str, tensor: int, data: int, work: Work) -> float:
    """Bytes on each GPU of a grid of data x tensor ranks. Activations are those of model.memory_bytes: plain operations,
    attention without its scores, no logits."""
    count, layers, hidden = parameters_on_rank(shape, tensor), shape.num_hidden_layers, shape.hidden_size
    norm = (4 + 4 + 2) * hidden                                  # of a token, on every tensor rank
    inside = 2 * (5 * shape.num_attention_heads * shape.head_dim + 4 * shape.intermediate_size) / tensor
    kept = 2 * norm + inside                                     # of a token in a layer
    kept = layers * 4 * hidden + kept if work.recompute else layers * kept      # all inputs, and the layer that runs again
    activations = work.micro_batch_size * work.sequence_length * (kept + norm)
    head = 4 * shape.vocab_size * hidden / tensor                # its gradient, which the loss takes in the forward pass
    if strategy == "fsdp":
        gathered = 2 * (count["tables"] + hidden) + 2 * 2 * count["layer"]      # tables all the time; a layer and the next
        unreduced = 8 * count["layer"] + 4 * count["tables"]         # a layer's gradient on its way, the next one's filling
        return 16 * count["all"] / data + gathered + unreduced + activations + head
    moments = 8 * count["all"] / (data if strategy == "zero1" else 1)
    copies = 2 * layers * count["layer"]                         # autocast's, in bfloat16
    return 8 * count["all"] + moments + copies + activations + head


def data_pass(payload: float, ranks: int, per_node: int) -> tuple[float, float]:
    """Bytes that each rank receives over NVLink, and over the network, when `payload` bytes are gathered, or reduced and
    scattered, among `ranks` of whom `per_node` share a node. An all-reduce is two passes.

    On two levels: each rank fetches its part of the payload from other nodes, then those of a node exchange their parts."""
    inside = min(ranks, per_node)
    nodes = ranks / inside
    return payload * (inside - 1) / inside, payload / inside * (nodes - 1) / nodes


def undivided(shape: Shape, gpus: int, tensor: int, gpu: GPU) -> str | None:
    """The name and value of a number that cannot be divided over `tensor` tensor-parallel ranks."""
    numbers = {"num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads,
               "gpus_per_node": gpu.per_node, "gpus": gpus}
    return next((f"{name} {number}" for name, number in numbers.items() if number % tensor), None)


def plan(shape: Shape, strategy: str, gpus: int, tensor: int, gpu: GPU, work: Work) -> dict:
    """One step of "ddp", "zero1" or "fsdp" on gpus / tensor data ranks, each of `tensor` tensor-parallel ranks.

    Bytes are those that a GPU receives in a step. Beside products run, at most, ddp's and zero1's reduction (while the last
    backward pass does) and all that fsdp sends; nothing runs beside the sums of tensor parallelism and zero1's new weights.
    `efficiency` is compute / step. Where not `divides`, the batch is no whole number of micro-batches, and only the memory
    means something. ValueError when the GPUs are no whole nodes or cannot be divided over `tensor`."""
    at_least_one({"gpus": gpus, "tensor_parallel": tensor})
    if gpus > gpu.per_node and gpus % gpu.per_node:
        raise ValueError(f"gpus is {gpus}, which is no whole number of nodes of {gpu.per_node}")
    if number := undivided(shape, gpus, tensor, gpu):
        raise ValueError(f"tensor_parallel is {tensor}, which does not divide {number}")
    data, parameters = gpus // tensor, parameters_on_rank(shape, tensor)["all"]
    micro_batches = work.batch_tokens / (data * work.micro_batch_size * work.sequence_length)
    compute = step_flops(shape, work) / (gpus * gpu.flops * work.mfu)

    # sums of bfloat16 activations: two in each layer's forward pass, two in its backward pass, embedding's and head's
    activations = 2 * shape.hidden_size * work.batch_tokens / data
    # (two more where the forward pass runs again)
    sums = ((6 if work.recompute else 4) * shape.num_hidden_layers + 2) * 2 * data_pass(activations, tensor, tensor)[0]
    # float32 gradients: two passes, once a step
    beside = 2 * 4 * parameters
    if strategy == "fsdp":
        # a layer, for every micro-batch: bfloat16 weights before the forward and the backward pass (the last layer's stay for
        # it), then one pass for the gradients, as a rank needs its part of them alone. Tables and last norm: once a step
        layer = parameters_on_rank(shape, tensor)["layer"]
        beside = ((2 + 4) * (parameters - shape.num_hidden_layers * layer)
                  + micro_batches * ((2 + 2 + 4) * shape.num_hidden_layers - 2) * layer)
    alone = 4 * parameters if strategy == "zero1" else 0
    nvlink, network = data_pass(1, data, gpu.per_node // tensor)                # for each byte of these
    seconds = {"NVLink": nvlink / gpu.nvlink, "network": network / gpu.network}
    slower = max(seconds, key=seconds.get)                       # both levels are at work at a time, on different pieces
    backward = 3 / 4 if work.recompute else 2 / 3
    hidden = compute if strategy == "fsdp" else backward * compute / micro_batches
    waiting = max(0, beside * seconds[slower] - hidden) + alone * seconds[slower]
    step = compute + sums / gpu.nvlink + waiting
    bound = "compute" if compute >= 0.9 * step else slower if waiting > sums / gpu.nvlink else "NVLink"
    memory = memory_per_gpu(shape, strategy, tensor, data, work)
    return {"strategy": strategy, "tensor": tensor, "data": data, "micro_batches": micro_batches,
            "divides": micro_batches % 1 == 0, "memory_bytes": memory, "fits": memory <= gpu.memory,
            "nvlink_bytes": sums + (beside + alone) * nvlink, "network_bytes": (beside + alone) * network,
            "compute_seconds": compute, "step_seconds": step, "efficiency": compute / step, "bound": bound}


def largest_efficient(shape: Shape, strategy: str, tensor: int, gpu: GPU, work: Work) -> int | None:
    """The most GPUs, doubling from `tensor` and beyond a node in whole nodes, on which at least 90% of the step is compute,
    the memory suffices and the batch divides. None when there are none."""
    best, gpus = None, tensor
    while gpus // tensor * work.micro_batch_size * work.sequence_length <= work.batch_tokens:
        if gpus <= gpu.per_node or gpus % gpu.per_node == 0:
            row = plan(shape, strategy, gpus, tensor, gpu, work)
            best = gpus if row["divides"] and row["fits"] and row["efficiency"] >= 0.9 else best
        gpus *= 2
    return best


def read_shape(config: str | None, sizes: dict) -> tuple[str, Shape]:
    """A model's name and shape: of a folder with a config.json, or of that file, where `sizes` go before what it says; of
    `sizes` alone; with neither, of Llama 3.1 8B. ValueError in one line."""
    if config is None and not sizes:
        return "Llama 3.1 8B (no --config, no sizes given)", LLAMA_8B
    if config is None:
        return "sizes as given", shape_from_config(sizes)
    path = Path(config, "config.json") if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise ValueError(f"--config {config}: there is no config.json")
    try:
        return config, shape_from_config({**json.loads(path.read_text()), **sizes})
    except (ValueError, TypeError) as error:                     # no JSON, no object, or no shape
        raise ValueError(f"{path}: {error}") from None


def plan_command(argv: list[str]):
    """python ddp.py plan: a row for every strategy and grid."""
    parser = Parser(prog="ddp.py plan", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Memory, traffic and time of a training step on machines that are not here.")
    add = lambda name, kind, default, text: parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    add("config", str, None, "the model: a folder with a config.json, or the file (none: Llama 3.1 8B, or the sizes below)")
    for name in list(Shape.__dataclass_fields__)[:-1]:
        add(name, int, None, "the model's; goes before what --config says")
    parser.add_argument("--tie_word_embeddings", action="store_true", default=None, help="the head is the embedding")
    add("gpus", int, 64, "how many there are, N")
    add("gpu", str, "h100", ", ".join(GPUS))
    add("gpus_per_node", int, 8, "GPUs that NVLink connects")
    add("nvlink", float, None, "GB/s of each GPU in one direction (none: the data sheet's)")
    add("network", float, None, "GB/s of each GPU in one direction (none: of one card, 25 for a100, 50 for others)")
    add("tensor_parallel", int, None, "tensor-parallel ranks (none: 1 and the powers of two that divide heads and GPUs)")
    add("batch_tokens", int, Work.batch_tokens, "tokens of a step, over all GPUs")
    add("sequence_length", int, Work.sequence_length, "tokens of a sequence")
    add("micro_batch_size", int, Work.micro_batch_size, "sequences in one forward pass of a data rank")
    add("mfu", float, Work.mfu, "share of the peak that products reach while nothing waits")
    parser.add_argument("--recompute", action="store_true", help="keep each layer's input alone, and run the layer again")
    args = parser.parse_args(argv)
    try:
        if args.gpu not in GPUS:
            raise ValueError(f"gpu is {args.gpu!r}; known are {', '.join(GPUS)}")
        at_least_one({"gpus_per_node": args.gpus_per_node})
        rates = {name: getattr(args, name) * 1e9 for name in ("nvlink", "network") if getattr(args, name) is not None}
        if not all(rate > 0 for rate in rates.values()):
            raise ValueError(f"nvlink is {args.nvlink}, network {args.network}; these rates, in GB/s, must be above 0")
        gpu = replace(GPUS[args.gpu], per_node=args.gpus_per_node, **rates)
        sizes = {name: getattr(args, name) for name in Shape.__dataclass_fields__ if getattr(args, name) is not None}
        name, shape = read_shape(args.config, sizes)
        work = Work(**{field: getattr(args, field) for field in Work.__dataclass_fields__})
        powers = [2 ** i for i in range(gpu.per_node.bit_length())]
        tensors = [t for t in powers if not undivided(shape, args.gpus, t, gpu)]
        tensors = tensors if args.tensor_parallel is None else [args.tensor_parallel]
        rows = [plan(shape, strategy, args.gpus, t, gpu, work) for t in tensors for strategy in ("ddp", "zero1", "fsdp")]
    except (ValueError, OSError) as error:
        parser.error(error)

    print(f"model    {name}: {parameters_on_rank(shape)['all']:,.0f} parameters\n"
          f"machine  {args.gpus:,} {args.gpu}, {gpu.per_node} a node; each: {gpu.memory / 1e9:g} GB, products at "
          f"{work.mfu:.0%} of {gpu.flops / 1e12:g} TFLOP/s, "
          f"NVLink {gpu.nvlink / 1e9:g} GB/s, network {gpu.network / 1e9:g} GB/s\n"
          f"step     {work.batch_tokens:,} tokens, {work.micro_batch_size} x {work.sequence_length:,} of them in a forward "
          f"pass{', layers recomputed' * work.recompute}; AdamW in float32, products in bfloat16\n"
          "         traffic: received by a GPU in a step; largest N: most GPUs at 90% efficiency with this batch\n")
    numbers = "{:>9} {:>10}  {:>9} {:>7}  {:>10}  {:8}".format
    titles = numbers("NVLink GB", "network GB", "compute s", "step s", "efficiency", "bound by")
    print(f"strategy tensor x data  {'GB per GPU':>19}  {titles} largest N")
    short = lambda number: f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
    for row in rows:
        grid, memory = f"{row['tensor']} x {row['data']:,}", f"{row['memory_bytes'] / 1e9:,.1f}"
        cells = f"the batch does not divide: {row['micro_batches']:.4g} forward passes"
        if row["divides"]:
            gigabytes = short(row["nvlink_bytes"] / 1e9), short(row["network_bytes"] / 1e9)
            seconds = short(row["compute_seconds"]), short(row["step_seconds"])
            cells = numbers(*gigabytes, *seconds, f"{row['efficiency']:.0%}", row["bound"])
        most = largest_efficient(shape, row["strategy"], row["tensor"], gpu, work)
        print(f"{row['strategy']:8} {grid:>13}  {'' if row['fits'] else 'too much':8} {memory:>10}  {cells:61}"
              f" {f'{most:,}' if most else 'none':>9}")


# ------------------------------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """argparse, except that --a-b equals --a_b and a wrong flag is answered with the nearest right one."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            self.error(f"unknown argument {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "-h lists them all"))
        return namespace, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    """Compare the strategies, time the collectives, or plan on paper."""
    if sys.argv[1:2] == ["plan"]:
        return plan_command(sys.argv[2:])
    command = "collectives" if sys.argv[1:2] == ["collectives"] else ""
    parser = Parser(prog=f"ddp.py {command}".strip(), allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Compare parallel strategies (torchrun ddp.py), time collectives (torchrun ddp.py collectives), "
                                "or plan for machines that are not here (python ddp.py plan).")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="none: cuda where every rank finds a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each")
    if command:
        parser.add_argument("--largest", type=int, default=26, help="the largest size is two to this power, in bytes")
    else:
        for name, default in (("layers", 6), ("width", 512), ("heads", 8), ("vocabulary", 4096), ("sequence_length", 128), ("batch_size", 4)):
            parser.add_argument(f"--{name}", type=int, default=default, help=f"{name.replace('_', ' ')} of the decoder" if name != "batch_size" else
                                "sequences, over all ranks")
        parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace of one step of each strategy")
    args = parser.parse_args(sys.argv[2:] if command else None)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:                            # alone: start two ranks of the same
        print(f"$ torchrun --nproc_per_node=2 ddp.py {shlex.join(sys.argv[1:])}", flush=True)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL", "GROUP", "MASTER", "ROLE"))}
        sys.exit(subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                                 *sys.argv[1:]], env={"OMP_NUM_THREADS": "1", **clean}).returncode)
    local = int(os.environ["LOCAL_RANK"])
    kind = args.device or ("cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu")
    if kind == "cuda" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        parser.error(f"--device cuda: {os.environ['LOCAL_WORLD_SIZE']} ranks on a machine with {torch.cuda.device_count()} GPU(s)")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    try:
        (collectives if command else compare)(args, device)
    except (ValueError, OSError) as error:
        if local == 0:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        gc.collect()                                                         # a group that lives on at exit can end in an abort
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
