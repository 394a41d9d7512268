"""
Data parallelism: every rank holds the whole model, works on its own part of the batch, and averages gradients.

If the loss of a batch is the mean of its parts' losses, its gradient is the mean of the parts' gradients. So N processes
that start from the same weights, see N equal parts of a batch and average their gradients make the step that one process
would make on the whole batch, and their weights stay equal for ever without being sent again.

    torch.distributed.init_process_group("gloo")          # or "nccl"; torchrun has set rank and world size
    model = DDP(model)
    loss(model(part)).backward()
    model.finish_gradient_synchronization()                # now every rank holds the same mean gradients
    optimizer.step()

Gradients travel in buckets of about `bucket_mb` megabytes, laid out in the reverse order of registration, which is about
the order in which the backward pass finishes them: a bucket sets off as soon as its last gradient is there, while the
layers below are still at work. Works with any nn.Module. Left out so far: sharding (ZeRO, FSDP) and tensor parallelism.
"""
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


class DDP(nn.Module):
    """Wraps `module`: same forward; parameters and buffers are rank 0's from the start; gradients are averaged.

    A parameter that a step used on some ranks gets the mean over all, where the others count as zero; one that no rank
    used stays without a gradient. ValueError when the ranks' modules differ, or when nothing in them can be trained."""

    def __init__(self, module: nn.Module, bucket_mb: float = 25):
        super().__init__()
        self.module, self.synchronize = module, True
        parameters = [p for p in module.parameters() if p.requires_grad]     # a tied parameter is listed once
        if not parameters:
            raise ValueError("DDP: no parameter of the module requires a gradient, so there is nothing to average")
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()]
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, shapes)
        for rank, theirs in enumerate(everyones):
            if theirs != shapes:
                mine, other = next(((a, b) for a, b in zip(shapes, theirs) if a != b), (len(shapes), len(theirs)))
                raise ValueError(f"DDP: ranks hold different models: {mine} on rank {dist.get_rank()}, {other} on rank {rank}")
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)

        self.buckets, size = [[]], 0
        for p in reversed(parameters):
            bucket = self.buckets[-1]
            if bucket and (size + p.nbytes > bucket_mb * 2 ** 20 or p.dtype != bucket[0].dtype):
                bucket, size = [], 0
                self.buckets.append(bucket)
            bucket.append(p)
            size += p.nbytes
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._start_step()
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._gradient_ready)

    def _start_step(self):
        self.waiting = [set(bucket) for bucket in self.buckets]              # gradients that a bucket still waits for
        self.in_flight = []                                                  # (bucket, flat gradients, all-reduce)
        self.sent = 0                                                        # buckets leave in order, on every rank alike

    def _gradient_ready(self, p):
        if self.synchronize:
            self.waiting[self.bucket_of[p]].discard(p)
            while self.sent < len(self.buckets) and not self.waiting[self.sent]:
                self._send(self.buckets[self.sent])

    def _send(self, bucket):
        # behind the gradients, one number each that says whether this rank has it
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        used = [p.new_full((1,), float(p.grad is not None)) for p in bucket]     # a fill on the device, not a copy to it
        flat = torch.cat([g.reshape(-1) for g in gradients + used])
        flat /= dist.get_world_size()                                        # before the sum, which could overflow in float16
        self.in_flight.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        self.sent += 1

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
        """Call after the step's last backward pass: sends what has not set off by itself, waits, and puts the means into
        the parameters' .grad."""
        while self.sent < len(self.buckets):                                 # a parameter that the pass did not reach
            self._send(self.buckets[self.sent])
        for bucket, flat, reduction in self.in_flight:
            reduction.wait()
            *means, used = flat.split([p.numel() for p in bucket] + [len(bucket)])
            for p, mean, used_somewhere in zip(bucket, means, used):
                if p.grad is not None:
                    p.grad.copy_(mean.view_as(p))
                elif used_somewhere:                                         # looked at only here: on a GPU, looking waits
                    p.grad = mean.view_as(p).clone()
        self._start_step()
