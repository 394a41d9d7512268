"""
Training: tokens in, a model folder out.

`torchrun train.py` with nothing else runs the whole pipeline on the text that Python carries: it calls data.py and bpe.py
(and shows the commands), trains a small model for two and a half minutes, measures it, and lets sample.py speak. With --data
it trains on a text file of yours, on a folder of tokens (train.npy, val.npy, tokenizer.json) that bpe.py wrote, or on several.

    torchrun train.py                                                   # one process; --nproc_per_node=8 for eight
    torchrun train.py --data book.txt --preset tinystories --steps 2000
    torchrun train.py --data web:0.7 code:0.3 --anneal_data textbooks   # weights; and what the last part of the run reads
    torchrun train.py --resume runs/NAME                                # after Ctrl-C, kill -9, or to extend a run
    torchrun --nproc_per_node=8 train.py --parallel fsdp                # weights, gradients and moments divided over eight GPUs
    python train.py plot runs/*                                         # loss curves
    python train.py bench --preset gpt2                                 # tokens/s, utilization, where a step's time goes
    python train.py sweep                                               # learning rates, up to and past the edge of stability
    python train.py sweep --widths 64 128 256 --mup_base_width 64       # whether the best one holds at other widths
    python train.py coordinates                                         # whether activations stay level as the width grows (µP)
    python train.py ablate --variants adamw layer_norm --seeds 3        # what a choice is worth, with standard errors

The recipe: Muon for the layers' matrices and AdamW for all else; a learning rate that rises, stays, and falls to zero over
the second half. Every part of it is a flag, and so is every switch of model.py's Config.

The file goes in the order of a run: settings, optimizers, learning rate, batches, earlier stages, checkpoints, evaluation,
one step, the loop; then bench, coordinates, sweep and ablate, which are built on those. Three promises hold it together. The
batch at a step depends on the seed and the step alone, so neither the number of processes nor an interruption changes what is
learned. Nothing waits for the device inside a step: losses are read one step late. And every file appears by a rename, so that a
kill at any moment leaves a run that can be resumed.

A run folder is a Hugging Face model folder plus args.json, log.jsonl (one object per logged step) and state/ (what
--resume reads). Who holds what of the model when there are several ranks is ddp.py's affair; on a GPU the operations worth fusing
are kernels.py's.
"""
import argparse
import ctypes
import difflib
import gc
import hashlib
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

import kernels
from bpe import Tokenizer
from ddp import DDP, FSDP, MatrixOptimizer, ShardedOptimizer, bounds, gradient_norm, mesh, tensor_parallel, unsplit
from model import (Config, Ops, Parser, Transformer, attention, config_from_json, config_to_json, flops_per_token, human, load_pretrained,
                   memory_bytes, model_type, num_parameters, preset, read_json, save_pretrained, write_atomically)


# ------------------------------------------------------------------------------------------------------------------
# Settings: every field is a flag

def flag(kind, default, text):
    """A dataclass field that the command line shows: its type, its default, its sentence."""
    return field(default=default, metadata={"kind": kind, "text": text})


@dataclass
class Settings:
    """What a run depends on. The command line is made from these fields; args.json keeps them."""
    # what to train on, and what
    data: list = flag(list, None, "text files (.txt, .jsonl, .gz), a folder of tokens (train.npy and val.npy, or .bin "
                                  "shards), or several of either with weights, A:0.7 B:0.3; none: Python's own text")
    anneal_data: list = flag(list, None, "what wsd's decay phase reads instead, named like --data")
    vocab_size: int = flag(int, 4096, "size of the tokenizer that is trained when --data is text; of a folder that has none")
    preset: str = flag(str, None, "shape of the model, see `python model.py`; none: tiny on a CPU, mini on a GPU")
    sequence_length: int = flag(int, None, "tokens per sequence; none: the model's longest")
    init_from: str = flag(str, None, "start from the model in this folder, with its shape and tokenizer")
    # instead of the preset's: see model.py's Config, whose fields these are
    hidden_size: int = flag(int, None, "width of the residual stream")
    num_hidden_layers: int = flag(int, None, "layers")
    num_attention_heads: int = flag(int, None, "query heads")
    num_key_value_heads: int = flag(int, None, "key-value heads, shared by equally many query heads")
    intermediate_size: int = flag(int, None, "width of the feed-forward network")
    norm: str = flag(str, None, "rms or layer")
    norm_place: str = flag(str, None, "pre, post, both (before and after) or none")
    position: str = flag(str, None, "rope, learned, sinusoidal or none")
    feed_forward: str = flag(str, None, "swiglu, gelu, silu or relu2")
    use_parallel_residual: bool = flag(bool, None, "attention and feed-forward network side by side")
    sliding_window: int = flag(int, None, "positions that attention looks back, oneself counted")
    sliding_window_pattern: int = flag(int, None, "every so manieth layer looks at all positions instead")
    qk_norm: bool = flag(bool, None, "RMSNorm over each query and key head")
    qkv_bias: bool = flag(bool, None, "biases on queries, keys and values")
    o_bias: bool = flag(bool, None, "biases on the projection behind attention")
    mlp_bias: bool = flag(bool, None, "biases in the feed-forward network")
    final_logit_softcapping: float = flag(float, None, "bound of the logits, by tanh")
    num_local_experts: int = flag(int, None, "feed-forward networks to choose from in each layer")
    num_experts_per_tok: int = flag(int, None, "of which so many serve a token")
    tie_word_embeddings: bool = flag(bool, None, "the head is the embedding, transposed")
    initializer: str = flag(str, None, "fan_in or glorot (the course's)")
    mup_base_width: int = flag(int, None, "width at which learning rates and scales are those of an ordinary model; at others they "
                                          "follow µP")
    dropout: float = flag(float, None, "share of what is added to the residual stream that is dropped in training")
    # how long: one of three
    steps: int = flag(int, None, "number of optimizer steps")
    tokens: float = flag(float, None, "number of tokens, such as 1e9; rounded up to whole steps")
    max_seconds: float = flag(float, None, "seconds of training by the clock (none of the three: 150; on a GPU four epochs)")
    # how
    batch_tokens: int = flag(int, None, "tokens per optimizer step, over all ranks; none: 2048 on a CPU, 65536 on a GPU")
    batch_warmup: float = flag(float, 0.0, "share of the budget over which the batch doubles three times, from an eighth")
    micro_batch_size: int = flag(int, None, "sequences per forward pass on a rank; the rest is accumulated")
    optimizer: str = flag(str, None, "muon (the layers' matrices by Muon, all else by AdamW) or adamw; none: muon, unless "
                                     "--tensor_parallel divides the matrices")
    learning_rate: float = flag(float, None, "AdamW's peak learning rate; none: 2 / hidden_size beside Muon, 0.5 / hidden_size alone "
                                            "(with --mup_base_width: that in place of hidden_size)")
    muon_learning_rate: float = flag(float, None, "Muon's; none: 0.005 * hidden_size (or --mup_base_width) times the other, so 0.01 "
                                                 "unless that is given")
    final_learning_rate: float = flag(float, 0.0, "learning rate at the end, as a share of the peak")
    schedule: str = flag(str, "wsd", "wsd (warm up, stay, decay linearly) or cosine")
    warmup: float = flag(float, 0.05, "share of the budget over which the learning rate rises")
    decay: float = flag(float, 0.5, "share of the budget over which wsd decays")
    weight_decay: float = flag(float, 0.1, "decay of matrices; vectors are left alone")
    beta1: float = flag(float, 0.9, "AdamW's average of gradients")
    beta2: float = flag(float, 0.95, "AdamW's average of squared gradients")
    momentum: float = flag(float, 0.95, "Muon's average of gradients")
    clip: float = flag(float, 1.0, "largest global norm of the gradient")
    z_loss: float = flag(float, 0.0, "weight of mean(logsumexp(logits)²), which keeps logits from drifting; 1e-4 is usual")
    average_beta: float = flag(float, 0.0, "evaluate and export an average of weights, of which this share stays in each step")
    document_mask: bool = flag(bool, None, "attention stays within a document")
    max_skipped: int = flag(int, 25, "give up after this many non-finite steps in a row")
    seed: int = flag(int, 0, "of the weights and of the order of the data")
    # where
    device: str = flag(str, None, "cuda, mps or cpu; none: the first of these that is there")
    dtype: str = flag(str, None, "bfloat16 or float32 for matrix products; none: what the device is faster in")
    compile: bool = flag(bool, None, "compile the model with torch.compile")
    kernels: str = flag(str, None, "triton (kernels.py's) or torch; none: triton on a GPU from Ampere on")
    recompute: bool = flag(bool, None, "keep of each layer its input alone, and compute the rest again in the backward pass")
    workers: int = flag(int, None, "processes that tokenize; none: all cores")
    parallel: str = flag(str, "ddp", "what ranks share, beside the batch: ddp (nothing), zero1 (optimizer state), fsdp (everything)")
    tensor_parallel: int = flag(int, 1, "ranks that divide every matrix among them; the others divide the batch")
    # what is kept
    out: str = flag(str, None, "run folder; none: runs/PRESET-DATE-TIME")
    resume: str = flag(str, None, "continue the run in this folder, with its settings")
    log_every: int = flag(int, 10, "steps between lines of log.jsonl")
    eval_every: int = flag(int, None, "steps between evaluations; none: ten in a run")
    eval_tokens: int = flag(int, 65536, "validation tokens per evaluation")
    final_eval_tokens: int = flag(int, None, "validation tokens of the last evaluation; none: all")
    save_every: int = flag(int, None, "steps between checkpoints; none: with every evaluation")
    stop_after: int = flag(int, None, "stop at this step as if interrupted")
    profile: str = flag(str, None, "write a timeline of three steps into this folder (and on a GPU what holds its memory)")
    wandb: bool = flag(bool, None, "log to Weights & Biases too, if it is installed")


# A resumed run may change these freely: how long, where and how often (and where its data lies now), not what it is.
FREE = set("data anneal_data steps tokens max_seconds device compile workers out resume log_every eval_every eval_tokens "
           "final_eval_tokens save_every stop_after wandb profile micro_batch_size max_skipped parallel tensor_parallel kernels recompute".split())
# What a flag may change of a preset: fields of model.py's Config. Dropout is one too, but a matter of training.
SHAPE = [f.name for f in fields(Settings) if f.name in set(Config.__dataclass_fields__) - {"vocab_size", "dropout"}]
# Changing one of these makes it another run.
FIXED = {*SHAPE, *"vocab_size preset sequence_length init_from batch_tokens batch_warmup optimizer".split(),
         *"average_beta document_mask seed".split()}


# ------------------------------------------------------------------------------------------------------------------
# Optimizer, clipping, learning rate

class Skipping(torch.optim.Optimizer):
    """An optimizer whose step can be called off without the host knowing whether it was. Subclasses: `update(group, skip)`."""

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        """One update. Where `skip`, a boolean on the parameters' device, is true, nothing changes, step counts included."""
        if skip is not None and skip.device.type == "cpu":              # a CPU's host need not wait to know
            if skip:
                return
            skip = None
        for group in self.param_groups:
            self.update(group, skip)


class AdamW(Skipping):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101):

        m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
        p ← p - lr · wd · p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

    fused: by kernels.py's `adamw_step`, one pass over everything.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused))

    def update(self, group: dict, skip: Tensor | None):
        """The formulas; with `skip` their outcome is decided on the device, which spares the host from waiting for it."""
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p, dtype=torch.float32),
                                 "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32)}
        if group["fused"]:
            states = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
            return kernels.adamw_step(params, [p.grad for p in params], *states, lr, beta1, beta2, eps, group["weight_decay"], skip)
        for p in params:
            state = self.state[p]
            go = 1.0 if skip is None else (~skip).float()               # 1, or 0 to leave everything as it is
            state["step"] += go
            m, v = state["exp_avg"], state["exp_avg_sq"]
            t = state["step"].clamp(min=1)                               # 0 while every step so far was skipped
            gradient = p.grad.float() if skip is None else p.grad.float().where(~skip, 0)
            m.lerp_(gradient, (1 - beta1) * go)
            v.lerp_(gradient.square(), (1 - beta2) * go)
            p.mul_(1 - lr * group["weight_decay"] * go)
            p.addcdiv_(m * (-lr * go / (1 - beta1 ** t)), (v / (1 - beta2 ** t)).sqrt_().add_(eps))


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U Vᵀ, roughly, of matrices U S Vᵀ (..., rows, columns): all singular values are brought near 1, between 0.7 and 1.2.

    Newton-Schulz iteration: x ← a x + (b x xᵀ + c (x xᵀ)²) x applies the odd polynomial a s + b s³ + c s⁵ to every singular
    value s, and needs matrix products alone, in bfloat16. The coefficients are Jordan's (2024, "Muon: an optimizer for hidden
    layers"), chosen so that small values grow fast (by a = 3.4 a step), not so that they converge to exactly 1."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(dtype)                    # the smaller side first: x xᵀ is smallest
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)                  # no singular value is above the Frobenius norm
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x if wide else x.mT


class Muon(Skipping):
    """Momentum, orthogonalized (Jordan et al. 2024): every direction of a matrix's update gets the same length.

        m ← μ m + (1 - μ) g
        p ← p - lr · wd · p - lr · √max(1, rows / columns) · orthogonalize((1 - μ) g + μ m)

    The update of a gradient is dominated by a few directions; the rare ones, which it nearly leaves out, matter as much. As the
    update's singular values are about 1 for every size, one learning rate serves all widths; the root lets a matrix that
    has more outputs than inputs change them by as much as a square one (Bernstein 2025, "Deriving Muon"). For matrices
    (..., rows, columns) between hidden layers; embeddings, the head and vectors are AdamW's."""

    def __init__(self, params, lr=0.01, momentum=0.95, weight_decay=0.0, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, dtype=dtype))

    def update(self, group: dict, skip: Tensor | None):
        """The formulas, for all matrices of one shape together: a few large products instead of many small ones."""
        lr, momentum, shapes = group["lr"], group["momentum"], {}
        go = 1.0 if skip is None else (~skip).float()
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for shape, alike in shapes.items():
            together = max(1, 2 ** 26 // shape.numel())                  # the copies of so many fit into some hundred megabytes
            for i in range(0, len(alike), together):
                updates = []
                for p in alike[i:i + together]:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                    gradient = p.grad.float() if skip is None else p.grad.float().where(~skip, 0)
                    state["momentum"].lerp_(gradient, (1 - momentum) * go)
                    updates.append(gradient.lerp(state["momentum"], momentum))
                scale = -lr * max(1, shape[-2] / shape[-1]) ** 0.5
                for p, update in zip(alike[i:i + together], orthogonalize(torch.stack(updates), dtype=group["dtype"])):
                    p.mul_(1 - lr * group["weight_decay"] * go).add_(update.to(p.dtype) * (scale * go))


def decay_groups(named: dict[str, Tensor], matrices: set[str], weight_decay: float, hidden: set[str] = frozenset(),
                 widening: float = 1.0) -> list[dict]:
    """Parameter groups in which `matrices`, given by name (a shard does not show its shape), decay and all others (norms,
    biases) do not. Of the matrices the `hidden` ones are `widening` times as wide as where the learning rate was tuned; theirs
    is smaller by that (µP for Adam, Yang et al. 2022, arXiv 2203.03466, table 8: each of its updates has entries of the size
    of the rate, all in step, so that they add up over fan-in), and still they decay as much in a step."""
    pick = lambda wanted, **options: {"params": [p for name, p in named.items() if wanted(name)], **options}
    groups = [pick(lambda name: name in matrices and name not in hidden, weight_decay=weight_decay),
              pick(lambda name: name not in matrices, weight_decay=0.0),
              pick(lambda name: name in hidden, weight_decay=weight_decay * widening, scale=1 / widening)]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: Transformer) -> set[str]:
    """Names of the parameters that Muon is for: the layers' matrices, experts' stacks of them too, and not the router, whose
    outputs are scores and no features."""
    return {name for name, p in model.model["layers"].named_parameters(prefix="model.layers")
            if p.dim() >= 2 and p.requires_grad and not name.endswith("mlp.gate.weight")}


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; returns the norm before, on the device.
    `norm`: what it is, where this rank holds only a part of the gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if norm is None:
        norm = torch.stack([g.float().norm() for g in gradients]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for g in gradients:
        g.mul_(scale)
    return norm


def learning_rate(step: float, total: float, peak: float, warmup: float = 0, final: float = 0.0,
                  schedule: str = "cosine", decay: float = 0) -> float:
    """The learning rate at `step` of `total`; step, total, warmup and decay share a unit (steps, or seconds).

    It rises linearly from 0 over `warmup`. `cosine`: half a cosine from peak to final (Loshchilov and Hutter 2016, arXiv
    1608.03983). `wsd`: stays at the peak, then falls linearly over the last `decay` (Hu et al. 2024, arXiv 2404.06395)."""
    if step < warmup:
        return peak * step / warmup
    if schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(total - warmup, 1e-9))))
    elif schedule == "wsd":
        left = min(1, max(0, total - step) / decay) if decay else float(step < total)
    else:
        raise ValueError(f"schedule is {schedule!r}; it must be cosine or wsd")
    return final + (peak - final) * left


# ------------------------------------------------------------------------------------------------------------------
# Batches

def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0 .. size - 1 sends each index, without a table of the permutation.

    A Feistel network over the smallest even number of bits that holds `size` permutes a power of four; indices that land
    outside are sent through again until they land inside, which leaves a permutation of the rest (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains")."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2 ** half - 1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)
    out, todo = index.astype(np.uint64), np.ones(len(index), bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)          # multiply, fold the high bits down, multiply again
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= size
    return out.astype(np.int64)


class TokenDataset:
    """The tokens of .npy or .bin files, mapped from disk, cut into sequences that follow one another without overlap.

    Training reads an endless stream of them: all in the order of a permutation keyed by (seed, 0), then all in that of
    (seed, 1), and so on. ValueError when there is no whole sequence, or a file is not what bpe.py writes."""

    def __init__(self, paths, sequence_length: int, seed: int = 0):
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        self.sequence_length, self.seed = sequence_length, seed
        self.files = [map_tokens(path) for path in self.paths]
        self.num_tokens = sum(map(len, self.files))
        # where each file's sequences begin in the count of all
        self.starts = np.cumsum([0, *(max(0, (len(tokens) - 1) // sequence_length) for tokens in self.files)])
        if len(self) < 1:
            raise ValueError(f"{self.paths[0]} holds {self.num_tokens} tokens, too few for one sequence of {sequence_length} and "
                             f"its last target; give more text or a shorter --sequence_length")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def sequences(self, indices) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (n, S) of int64; targets are the inputs one position on."""
        rows, length = np.empty((len(indices), self.sequence_length + 1), np.int64), self.sequence_length
        for row, i, file in zip(rows, indices, np.searchsorted(self.starts, indices, side="right") - 1):
            first = int(i - self.starts[file]) * length
            row[:] = self.files[file][first:first + length + 1]
        rows = torch.from_numpy(rows)                                    # (n, S + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def stream(self, numbers: np.ndarray) -> np.ndarray:
        """Which sequences stand at places `numbers` of the endless stream."""
        epochs, indices = numbers // len(self), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(numbers[here] % len(self), len(self), [self.seed, int(epoch)])
        return indices

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Sequences number first .. first + count - 1 of the stream."""
        return self.sequences(self.stream(np.arange(first, first + count)))

    def largest(self) -> tuple[int, Path]:
        """The largest token id, and the file it stands in; read in pieces so that memory stays small."""
        return max((int(tokens[i:i + 2 ** 24].max()), path) for path, tokens in zip(self.paths, self.files)
                   for i in range(0, len(tokens), 2 ** 24))

    def fingerprint(self) -> str:
        """A hash of the length and of up to 64 pieces spread over each file: enough to notice that the data changed."""
        digest = hashlib.sha256()
        for tokens in self.files:
            digest.update(str(len(tokens)).encode())
            for i in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(int):
                digest.update(np.ascontiguousarray(tokens[i:i + 4096]).tobytes())
        return digest.hexdigest()[:16]


def has_tokens(folder) -> bool:
    """Whether a folder has files to train on and to validate on."""
    with suppress(ValueError):
        return bool(token_files(folder))
    return False


class Mixture:
    """Several datasets, each with its share of the sequences: a stream of its own, made of theirs.

    Who stands where is a pattern of a thousand places that repeats, with everybody's places spread evenly. So place n of the
    stream is known without reading what comes before."""

    def __init__(self, datasets: list[TokenDataset], weights: list[float]):
        self.datasets, period = datasets, 1000
        exact = np.array(weights) / sum(weights) * period
        places = exact.astype(int)
        for i in np.argsort(places - exact)[:period - places.sum()]:     # rounded down; the largest remainders get the rest
            places[i] += 1
        # source i's k-th place of n stands near (k + 1/2) / n of the way
        slots = sorted(((k + 0.5) / n, i, k) for i, n in enumerate(places) for k in range(n))
        self.source, self.earlier, self.places = np.array([i for _, i, _ in slots]), np.array([k for *_, k in slots]), places

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Sequences number first .. first + count - 1, inputs and targets, each (count, S)."""
        turn, place = np.divmod(np.arange(first, first + count), len(self.source))
        source = self.source[place]
        numbers = turn * self.places[source] + self.earlier[place]       # in the source's own stream
        batch = [torch.empty(count, self.datasets[0].sequence_length, dtype=torch.int64) for _ in range(2)]
        for i in np.unique(source):
            here = source == i
            for whole, part in zip(batch, self.datasets[i].sequences(self.datasets[i].stream(numbers[here]))):
                whole[torch.from_numpy(here)] = part
        return tuple(batch)

    def fingerprint(self) -> str:
        """Of all sources; their weights are among the settings."""
        return "+".join(dataset.fingerprint() for dataset in self.datasets)


def streams_of(sources: dict[str, list], length: int, seed: int) -> dict[str, Mixture]:
    """What a run reads, in sequences of `length`, of what `prepare` has made ready."""
    return {kind: Mixture([TokenDataset(token_files(folder)[0], length, seed) for folder, _ in of_kind],
                          [weight for _, weight in of_kind]) for kind, of_kind in sources.items() if of_kind}


def map_tokens(path) -> np.ndarray:
    """The tokens of a file as a memory map: .npy, as bpe.py writes it, or .bin, raw uint16 (nanoGPT) with or without a header
    of 256 int32 (llm.c: a magic number, the version, how many). ValueError when it is not a whole array of ids."""
    if Path(path).suffix == ".bin":
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", 3)
        if len(header) == 3 and header[0] == 20240520:
            if header[1] != 1 or size < 1024 + 2 * int(header[2]):
                raise ValueError(f"{path} has the header of a shard of version {header[1]} with {header[2]:,} tokens, and {size:,} "
                                 "bytes; version 1, whole, can be read")
            return np.memmap(path, "<u2", "r", offset=1024, shape=(int(header[2]),))
        if size % 2 or not size:
            raise ValueError(f"{path} has {size:,} bytes, which are no array of two-byte token ids")
        return np.memmap(path, "<u2", "r")
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        raise ValueError(f"{path} is not a .npy file, or is cut short; make it again with `python bpe.py encode`") from None
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; token ids are one dimension of unsigned "
                         "integers, as `python bpe.py encode` writes them")
    return tokens


def token_files(folder) -> tuple[list[Path], list[Path]]:
    """Files to train on and to validate on in a folder of tokens: train.npy and val.npy, or .bin shards with these words in
    their names. ValueError when one of the two is missing."""
    found = []
    for split in ("train", "val"):
        npy, shards = Path(folder, f"{split}.npy"), sorted(Path(folder).glob(f"*{split}*.bin"))
        if not npy.exists() and not shards:
            raise ValueError(f"{folder} is no folder of tokens: there is no {split}.npy (nor *{split}*.bin); make it with `python bpe.py "
                             "encode`, or give text files")
        found.append([npy] if npy.exists() else shards)
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------------------------
# Earlier stages: run what is missing

def run(*command) -> None:
    """Show a command of this project and run it. When it fails, its own line has said why, and this process ends as it did."""
    script, *rest = map(str, command)
    print("$ python", shlex.join([script, *rest]), flush=True)
    code = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *rest]).returncode
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        sys.exit(code)
    print(flush=True)


def whole(path: Path) -> bool:
    """Whether a file that an earlier stage wrote is there, and all of it."""
    try:
        if path.suffix == ".npy":
            return len(map_tokens(path)) > 0
        if path.suffix == ".json":
            return bool(read_json(path))
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except (OSError, ValueError):
        return False


def weighted(sources: list[str] | None, flag: str) -> list[tuple[list[str], float]]:
    """What --data or --anneal_data names: (paths, weight). Text files without weights are one source, as is no file at all."""
    parsed = []
    for source in sources or []:
        path, _, weight = source.rpartition(":")
        try:
            parsed.append((source, None) if os.path.exists(source) or not path else (path, float(weight)))
        except ValueError:
            parsed.append((source, None))
    for path, weight in parsed:
        if not os.path.exists(path):
            raise ValueError(f"--{flag} {path}: there is no such file or folder")
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"--{flag} {path}:{weight:g}: a weight must be above 0")
    if len({weight is None for _, weight in parsed}) > 1:
        raise ValueError(f"--{flag} gives some sources a weight and others none; give all of them one, as in A:0.7 B:0.3")
    if len(parsed) > 1 and parsed[0][1] is None and any(os.path.isdir(path) for path, _ in parsed):
        raise ValueError(f"--{flag} takes text files, one folder of tokens, or sources with weights, as in A:0.7 B:0.3; it was "
                         f"given {' '.join(sources)}")
    if parsed and parsed[0][1] is not None:
        total = sum(weight for _, weight in parsed)
        for path, weight in parsed:
            if weight < total / 1000:
                raise ValueError(f"--{flag} {path}:{weight:g} is under a thousandth of all; give it more, or leave it out")
        return [([path], weight) for path, weight in parsed]
    return [([path for path, _ in parsed], 1.0)]


def prepare(settings: Settings) -> dict[str, list]:
    """The folders of tokens to train on and, under "anneal", those for the end: [folder, weight] each. Texts are tokenized
    first, by the tokenizer of the first source, for all must share one."""
    wanted = {"data": weighted(settings.data, "data"),
              "anneal": weighted(settings.anneal_data, "anneal_data") if settings.anneal_data else []}
    sources, tokenizer, first = {"data": [], "anneal": []}, None, None
    for kind, paths, weight in ((kind, *source) for kind, of_kind in wanted.items() for source in of_kind):
        folder = Path(paths[0]) if paths and os.path.isdir(paths[0]) else tokenize(paths, settings, tokenizer)
        token_files(folder)                                              # both there, or an error
        own = folder / "tokenizer.json" if (folder / "tokenizer.json").exists() else None
        if first is None:
            first, tokenizer = folder, own
        alike = own == tokenizer or own and tokenizer and Tokenizer.load(own).vocab == Tokenizer.load(tokenizer).vocab
        if not alike:
            raise ValueError(f"{folder} was tokenized otherwise than {first}; all sources must share a tokenizer")
        sources[kind].append([str(folder.resolve()), weight])
    return sources


def described_sources(sources: dict[str, list]) -> list[str]:
    """What `prepare` returns, in words."""
    words = lambda folder, weight, several: f"{folder} ({weight:g})" if several else folder
    return [words(folder, weight, len(of_kind) > 1) + (" at the end" if kind == "anneal" else "")
            for kind, of_kind in sources.items() for folder, weight in of_kind]


def tokenize(sources: list[str], settings: Settings, tokenizer_from: Path | None = None) -> Path:
    """The folder of tokens of texts (none: Python's own), which go through data.py and bpe.py into corpus/, one folder for
    each list of texts. A stage runs when what it writes is missing, half there or changed since, when its command has
    changed, or when an earlier one ran. The tokenizer is trained on the text, unless there is one to take over."""
    if settings.init_from:                                               # a trained model brings its own tokenizer
        tokenizer_from = Path(settings.init_from, "tokenizer.json")
    # a text's folder is named after its path, size and date: when it changes, a new one is made
    stamp = hashlib.sha256(repr([(os.path.abspath(s), os.path.getsize(s), os.path.getmtime(s)) for s in sources]).encode())
    name = f"{Path(sources[0]).name.split('.')[0]}-{stamp.hexdigest()[:8]}" if sources else "local"
    if tokenizer_from:
        name += "-" + hashlib.sha256(tokenizer_from.read_bytes()).hexdigest()[:8]
    elif settings.vocab_size != Settings.vocab_size:
        name += f"-{settings.vocab_size}"
    folder = Path("corpus", name)
    documents, tokenizer = [folder / "train.jsonl", folder / "val.jsonl"], folder / "tokenizer.json"
    workers = ["--workers", settings.workers] if settings.workers else []
    stages = [
        (["data.py", *(["build", *sources] if sources else []), "--out", folder], documents),
        (["bpe.py", "train", documents[0], "--vocab_size", settings.vocab_size, "--out", tokenizer, *workers], [tokenizer]),
        (["bpe.py", "encode", *documents, "--tokenizer", tokenizer, "--out", folder, *workers],
         [folder / "train.npy", folder / "val.npy"])]
    if tokenizer_from:
        stages[1] = (None, [tokenizer])
    # commands.json says what was run and what came of it: a file that was changed by hand since is made again, and so is
    # all that follows. It is cut back before a stage runs, so that a stage that is interrupted counts as not run.
    record, stale = folder / "commands.json", False
    done = read_json(record) if whole(record) else {}
    for number, (command, outputs) in enumerate(stages):
        made = lambda: {"command": [str(word) for word in command or [tokenizer_from]],
                        "outputs": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in outputs]}
        if stale or not all(map(whole, outputs)) or done.get(str(number)) != made():
            stale, done = True, {key: value for key, value in done.items() if int(key) < number}
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(done, indent=2).encode())
            try:
                if command:
                    run(*command)
                else:
                    write_atomically(tokenizer, tokenizer_from.read_bytes())
            except BaseException:
                if not done:                                             # nothing came of this text: leave nothing behind
                    record.unlink(missing_ok=True)
                    with suppress(OSError):
                        folder.rmdir()
                raise
            done[str(number)] = made()
            write_atomically(record, json.dumps(done, indent=2).encode())
    return folder


# ------------------------------------------------------------------------------------------------------------------
# The machine

# bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12,
              "L40S": 362e12, "A10G": 70e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def data_sheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's FLOP/s of a GPU that has a line here, in bfloat16."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        return next((flops for chip, flops in DATA_SHEET.items() if re.search(rf"\b{chip}\b", name)), None)
    return None


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few products of large matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ b)[0, 0].item()                                             # reading a number waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What utilization is measured against, in FLOP/s: the data sheet's figure where there is one, else what is measured."""
    return data_sheet_flops(device, dtype) or measured_flops(device, dtype)


def faster_dtype(s: Settings, device: torch.device) -> tuple[str, float]:
    """--dtype, or else that in which the device multiplies faster; and its peak in FLOP/s."""
    peaks = {dtype: peak_flops(device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    dtype = s.dtype or max(peaks, key=peaks.get)
    return dtype, peaks[dtype]


def keep_freed_memory():
    """Have malloc keep large freed blocks. By default glibc returns them to the system, and every step pays again for
    the page faults of every activation: a third of a CPU step's time here."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3                          # names of the two dials in malloc.h
        mallopt(mmap_threshold, 2 ** 30)
        mallopt(trim_threshold, 2 ** 31 - 1)


def device_kind(settings: Settings) -> str:
    """cuda, mps or cpu: the fastest that is there, unless --device says which."""
    kind = settings.device or ("cuda" if torch.cuda.is_available() else
                               "mps" if torch.backends.mps.is_available() else "cpu")
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device is {kind!r}; it must be cuda, mps or cpu")
    return kind


def pick_device(settings: Settings, ranks: "Ranks") -> torch.device:
    """The device of this rank, made ready."""
    kind = device_kind(settings)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device is mps, and this machine has none; take cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and this machine has none that torch can use; take cpu")
    if kind == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} rank(s) on this machine, which has {gpus} GPU(s); lower --nproc_per_node or take --device cpu")
        torch.cuda.set_device(ranks.local)
        torch.backends.cuda.matmul.allow_tf32 = True                     # float32 products on tensor cores
        return torch.device("cuda", ranks.local)
    keep_freed_memory()
    return torch.device(kind)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: on the GPU if it uses one, in main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource                                                      # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints

@dataclass
class Part:
    """What this rank keeps of a parameter: `tensors`, each either one number or of shape `kept`, from number `first` on of the
    flattened local tensor of `shape`. With tensor parallelism that one begins at `start` of dimension `dim`, of `size`."""
    tensors: dict[str, Tensor]
    first: int
    kept: tuple
    shape: tuple
    dim: int = 0
    start: int = 0
    size: int | None = None


def save_checkpoint(folder, parts: dict[str, dict[str, Part]], step: int, rank: int = 0, **progress) -> str:
    """Write this rank's parts after `step`, of "weights" and of "states", by parameter name, and the numbers in `progress`,
    into folder/state; returns the file's name. It counts when `seal_checkpoint` has named it."""
    state = Path(folder, "state")
    state.mkdir(parents=True, exist_ok=True)
    name = f"step_{step}.rank_{rank}.pt"
    # on the host; torch.save would write all that a view looks at
    own = lambda t: t.cpu() if t.device.type != "cpu" else t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
    content = {"step": step, "progress": progress, **{kind: {
        name: {**vars(part), "tensors": {key: own(value.detach()) for key, value in part.tensors.items()}}
        for name, part in of_kind.items()} for kind, of_kind in parts.items()}}
    temporary = state / f"{name}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError:                                         # how torch reports a full disk
                raise OSError(f"{temporary.with_name(name)} could not be written (is the disk full?)") from None
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, state / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def seal_checkpoint(folder, step: int, files: list[str]):
    """All files of a state are there: have latest.json name them, then let the state before go."""
    state = Path(folder, "state")
    write_atomically(state / "latest.json", json.dumps({"step": step, "files": files}).encode())
    for old in state.glob("step_*"):
        if old.name not in files:
            old.unlink()


@torch.no_grad()
def load_checkpoint(folder, parts: dict[str, dict[str, Part]] = {}, device="cpu") -> dict:
    """Read the newest whole state of a run, whatever number of ranks and strategy wrote it: each tensor is put together from
    the files, and this rank takes its part, into the tensor that it has or, for an optimizer's state, a new one on `device`.
    Returns step and progress. ValueError when there is none, or it is another model's."""
    latest = Path(folder, "state", "latest.json")
    if not latest.exists():
        raise ValueError(f"{folder} holds no checkpoint (no state/latest.json), so there is nothing to resume; start it again with --out {folder}")
    if not read_json(latest).get("files"):
        raise ValueError(f"{latest} names no checkpoint; it is not what train.py writes")
    contents = []
    for path in (latest.parent / name for name in read_json(latest)["files"]):
        try:
            contents.append(torch.load(path, map_location="cpu", weights_only=True, mmap=True))   # read where it is looked at
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
        if "weights" not in contents[-1]:
            raise ValueError(f"{path} was written by an earlier version of train.py, and cannot be resumed; --init_from {folder} "
                             "starts a new run from its weights")

    def pieces(kind, name, part):
        found = [content[kind][name] for content in contents if name in content[kind]]
        full = lambda shape, dim, size: [size if size and d == dim else n for d, n in enumerate(shape)]
        want, have = full(part.shape, part.dim, part.size), found and full(*(found[0][key] for key in ("shape", "dim", "size")))
        if want != have:
            raise ValueError(f"{latest.parent}: {name} should have shape {want} and is {have or 'missing'}; this is another model's")
        return found, want

    def take(name, part, found, shape, values):
        """This rank's part of a tensor of `shape`, whose pieces are `found` and hold `values`."""
        whole, blocks, filled = torch.empty(shape, dtype=values[0].dtype), {}, {}
        for piece, value in zip(found, values):                          # blocks: the local tensors of tensor-parallel ranks
            block = blocks.setdefault(piece["start"], torch.empty(piece["shape"], dtype=value.dtype))
            block.view(-1)[piece["first"]:piece["first"] + value.numel()] = value.reshape(-1)
            filled[piece["start"]] = filled.get(piece["start"], 0) + value.numel()
        if any(filled[start] < block.numel() for start, block in blocks.items()) or sum(
                block.shape[found[0]["dim"]] for block in blocks.values()) < shape[found[0]["dim"]]:
            raise ValueError(f"{latest.parent}: a part of {name} is missing; the state is damaged")
        for start, block in blocks.items():
            whole.narrow(found[0]["dim"], start, block.shape[found[0]["dim"]]).copy_(block)
        local = whole.narrow(part.dim, part.start, part.shape[part.dim])
        return local.reshape(-1)[part.first:part.first + math.prod(part.kept)].view(part.kept)

    for kind, of_kind in parts.items():
        for name, part in of_kind.items():
            found, shape = pieces(kind, name, part)
            for key, value in found[0]["tensors"].items():               # a number for all, or one for each number of the parameter
                value = value if value.dim() == 0 else take(name, part, found, shape, [piece["tensors"][key] for piece in found])
                if key in part.tensors:
                    part.tensors[key].copy_(value)
                else:
                    part.tensors[key] = value.to(device, copy=True)
    return {key: contents[0][key] for key in ("step", "progress")}


def export(model: Transformer, tensors: dict[str, Tensor], folder, tokenizer: bytes | None):
    """Write the model folder that others open: weights, config, and the content of its tokenizer.json."""
    save_pretrained(model, folder, tensors)
    if tokenizer:
        names = {key: "<|endoftext|>" for key in ("bos_token", "eos_token") if model.config.eos_token_id is not None}
        write_atomically(Path(folder, "tokenizer_config.json"), json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False, **names}, indent=2).encode())
        write_atomically(Path(folder, "tokenizer.json"), tokenizer)


# ------------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(model: Transformer, data: TokenDataset, bytes_of: Tensor | None, batch_size: int, autocast,
             limit: int | None = None, ranks: "Ranks | None" = None, document_end: int | None = None) -> tuple[float, float | None]:
    """Mean loss in nats per token over `data`, the work shared out over the ranks, and bits per byte: the same nats, in
    bits, over the bytes that the target tokens stand for.

    `limit`: about so many tokens, in sequences spread evenly over the file, stand for all. bytes_of (V): the bytes of each
    token; without it there is no second figure. document_end: see `document_ids`."""
    device = model.lm_head.weight.device
    rank, count = (ranks.data_rank, ranks.data_count) if ranks else (0, 1)
    sequences = min(len(data), max(1, limit // data.sequence_length)) if limit else len(data)
    chosen = np.linspace(0, len(data) - 1, sequences).astype(int)
    mine, rounds = chosen[rank::count], -(-sequences // count)            # ranks that share weights make equally many passes
    total = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    model.eval()
    try:
        for i in tqdm(range(0, rounds, batch_size), desc="validation", leave=False,
                      disable=None if not ranks or ranks.rank == 0 else True):
            part = mine[i:i + batch_size]
            tokens, targets = data.sequences(part if len(part) else chosen[:1])
            size = bytes_of[targets].sum().item() if bytes_of is not None else 0
            tokens, targets = tokens.to(device), targets.to(device)
            with autocast():
                loss = model(tokens, targets, document_ids=document_ids(tokens, document_end))
            if len(part):
                total += torch.stack([loss.to(total) * targets.numel(), total.new_tensor(targets.numel()), total.new_tensor(size)])
    finally:
        model.train()
    if count > 1:
        dist.all_reduce(total, group=ranks.data)
    nats, tokens, size = total.tolist()
    return nats / tokens, nats / math.log(2) / size if size else None


def document_ids(tokens: Tensor, end: int | None) -> Tensor | None:
    """Number each position's document (B, S); the token `end` belongs to the one that it ends. None for None: one document."""
    if end is None:
        return None
    ends = (tokens == end).int()
    return ends.cumsum(1, dtype=torch.int32) - ends


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of every token (V); 0 for special tokens, which stand for no text."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([0 if i in special else len(tokenizer.vocab.get(i, b"")) for i in range(vocab_size)])


# ------------------------------------------------------------------------------------------------------------------
# Who holds what, and one step

class Ranks:
    """Who this process is among those that torchrun started, and with whom it shares what (see ddp.mesh)."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.data_rank, self.data_count, self.started = 0, 1, False
        # words: a group for a few words between hosts; patient: one for long waits, as rank 0 may be tokenizing a large text
        self.words = self.patient = self.data = self.tensor = None

    def start(self, device: torch.device, alone: bool, tensor_parallel: int):
        """Join the others. `alone`: even if there are none."""
        if self.count == 1 and not alone and tensor_parallel == 1:
            return
        if self.count % tensor_parallel:
            raise ValueError(f"{self.count} rank(s) cannot be divided into tensor-parallel groups of {tensor_parallel}")
        self.started = not dist.is_initialized()
        if self.started:
            # a single process needs nobody to tell it where the others are
            where = dict(store=dist.HashStore(), rank=0, world_size=1) if self.count == 1 else {}
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **where)
        self.words = dist.new_group(backend="gloo")
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.data, self.tensor = mesh(tensor_parallel)
        self.data_rank, self.data_count = dist.get_rank(self.data), dist.get_world_size(self.data)

    def stop(self):
        """Part, when all are here."""
        if self.started:
            dist.barrier(self.patient)
            dist.destroy_process_group()

    def everywhere(self, make) -> list:
        """What make() returns on each rank, on every rank; where it ends in a ValueError or OSError, the first of them."""
        try:
            result = make()
        except (ValueError, OSError) as error:
            result = error
        results = [result]
        if self.count > 1:
            results = [None] * self.count
            dist.all_gather_object(results, result, self.patient)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def from_first(self, make):
        """What make() returns on rank 0, on every rank; its ValueError or OSError too."""
        return self.everywhere(lambda: make() if self.rank == 0 else None)[0]

    def agree(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks, by way of the hosts: the device does not wait."""
        words = torch.tensor(numbers, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(words, dist.ReduceOp.MAX, group=self.words)
        return words.tolist()


def operations(choice: str | None, device: torch.device) -> Ops | None:
    """kernels.py's operations, by `choice` or where the device runs them; None for model.py's own. ValueError if they cannot run."""
    able = kernels.fused(torch.empty(0, device=device))
    if choice == "triton" and not able:
        raise ValueError(f"--kernels triton needs a GPU (or TRITON_INTERPRET=1, slowly) and the package triton, and this runs on {device.type}"
                         + (" without it" if kernels.triton is None else "") + "; take --kernels torch")
    if choice == "torch":
        return None
    if choice is None and not (able and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        return None                                                      # for older GPUs these kernels take minutes to compile

    def attend(q, k, v, **options):
        return (kernels.flash_attention if q.shape[-1] <= 128 else attention)(q, k, v, **options)      # which knows no larger heads

    return Ops(attend, kernels.rms_norm, kernels.swiglu, kernels.rope, kernels.linear_cross_entropy)


@dataclass
class Setup:
    """A model ready to train on this rank."""
    model: Transformer
    parallel: torch.nn.Module                # the model, in DDP or FSDP where ranks share the work
    forward: Callable                        # the same, compiled if asked
    optimizers: list                         # (optimizer, its peak learning rate)
    average: dict[Tensor, Tensor]            # of each parameter that this rank has, if asked
    shapes: dict[str, torch.Size]            # of this rank's tensors, before FSDP cuts them
    divided: dict[str, tuple[int, int]]      # see ddp.tensor_parallel
    autocast: Callable
    document_end: int | None
    device: torch.device
    ranks: Ranks


def assemble(s: Settings, model: Transformer, device: torch.device, ranks: Ranks, bfloat16: bool) -> Setup:
    """Give the model the device's operations, lay it out over the ranks (see ddp.py), and give its parameters to their optimizers."""
    ops = operations(s.kernels, device)
    for module in model.modules() if ops else ():
        if hasattr(module, "ops"):
            module.ops = ops
    if s.compile:                                                        # before torch.compile chooses a place in /tmp, which forgets
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "flatlm"))
    matrices = {name for name, p in model.named_parameters() if p.dim() >= 2}
    orthogonal = hidden_matrices(model) if s.optimizer == "muon" else set()
    divided = tensor_parallel(model, ranks.tensor, device) if s.tensor_parallel > 1 else {}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for layer in model.model["layers"] if s.recompute else ():
        layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    if s.parallel == "fsdp":                                             # a layer travels in bfloat16, its gradients in float32
        parallel = FSDP(model, torch.bfloat16 if bfloat16 else None, torch.float32, ranks.data, device=device)
    else:
        parallel = DDP(model.to(device), group=ranks.data) if ranks.data_count > 1 else model.to(device)
    if s.compile and parallel is not model:          # by layers: one graph would hand over all gradients at its end, and nothing
        for layer in model.model["layers"]:          # could be sent before
            layer.forward = torch.compile(layer.forward)
    forward = torch.compile(model) if s.compile and parallel is model else parallel

    adamw, muon = dict(lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=ops is not None), dict(
        lr=s.muon_learning_rate, momentum=s.momentum, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    optimizers, widening = [], model.config.hidden_size / model.config.base_width
    for kind, options in ((AdamW, adamw), (Muon, muon)):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad and (name in orthogonal) == (kind is Muon)}
        # the layers' matrices, of which AdamW has the router alone beside Muon; and Muon's rate serves all widths
        hidden = {name for name in matrices if name.startswith("model.layers.") and widening != 1 and kind is AdamW}
        groups = decay_groups(named, matrices, s.weight_decay, hidden, widening)
        if groups and s.parallel == "zero1":
            optimizers.append((ShardedOptimizer(groups, kind, ranks.data, **options), options["lr"]))
        elif groups and s.parallel == "fsdp" and kind is Muon:
            optimizers.append((MatrixOptimizer(parallel, groups, Muon, **options), options["lr"]))
        elif groups:
            optimizers.append((kind(groups, **options), options["lr"]))
    # FSDP gathers weights in bfloat16, so that all is computed in it, the residual stream too
    autocast = lambda: torch.autocast(device.type, torch.bfloat16) if bfloat16 and s.parallel != "fsdp" else nullcontext()
    average = {p: p.detach().clone() for p in model.parameters()} if s.average_beta else {}
    document_end = model.config.eos_token_id if s.document_mask else None
    return Setup(model, parallel, forward, optimizers, average, shapes, divided, autocast, document_end, device, ranks)


def parts_of(setup: Setup, to_save: bool) -> dict[str, dict[str, Part]]:
    """This rank's parts of all "weights" (and their averages), and of the optimizers' "states", by the parameters' names. To
    save, ranks that hold the same weights divide them as ZeRO-1 divides their states; to load, each takes all that it holds."""
    model, ranks = setup.model, setup.ranks
    names = {p: name for name, p in model.named_parameters()}
    firsts = {p: 0 for p in names}                                       # where in the whole local tensor a parameter begins
    if isinstance(setup.parallel, FSDP):
        names = {shard.parameter: name for name, shard in setup.parallel.shards().items()}
        firsts = {shard.parameter: shard.parts[shard.rank][0] for shard in setup.parallel.shards().values()}

    def part(p, tensors, first, kept):
        dim, size = setup.divided.get(names[p], (0, None))
        start = bounds(size, ranks.tensor)[0] if size else 0
        return names[p], Part(tensors, first, tuple(kept), tuple(setup.shapes[names[p]]), dim, start, size)

    pieces, states = [], []
    for optimizer, _ in setup.optimizers:
        if isinstance(optimizer, ShardedOptimizer):
            pieces += optimizer.pieces
            states += [part(p, optimizer.state[piece], first, piece.shape) for p, first, piece in optimizer.pieces]
        elif isinstance(optimizer, MatrixOptimizer):
            states += [part(p, optimizer.state[whole], 0, setup.shapes[names[p]]) for p, whole in optimizer.wholes.items()]
        else:
            states += [part(p, optimizer.state[p], firsts[p], p.shape) for group in optimizer.param_groups for p in group["params"]]
    if pieces:
        pieces += [(p, 0, p) for p in names if not p.requires_grad]
    weights = []
    for p, first, piece in pieces if pieces and to_save else [(p, first, p) for p, first in firsts.items()]:
        tensors = {"weight": piece}
        if setup.average:                                                # every rank averages all that the module shows it
            tensors["average"] = setup.average[p].view(-1)[first - firsts[p]:][:piece.numel()].view_as(piece)
        weights.append(part(p, tensors, first, piece.shape))
    return {"weights": dict(weights), "states": dict(states)}


@contextmanager
def averaged(setup: Setup):
    """Inside, the parameters are their averages, if there are any."""
    with torch.no_grad():
        own = {p: p.detach().clone() for p in setup.average}
        for p, average in setup.average.items():
            p.copy_(average)
        try:
            yield
        finally:
            for p, tensor in own.items():
                p.copy_(tensor)


def whole_weights(setup: Setup) -> dict[str, Tensor]:
    """All weights on the first rank, gathered from those that share them; the other ranks get what they need not keep."""
    model, ranks = setup.model, setup.ranks
    tensors = setup.parallel.full_state_dict(only_rank=0) if isinstance(setup.parallel, FSDP) else model.state_dict()
    tensors = {name: tensor.to("cpu", copy=True) if setup.average else tensor for name, tensor in tensors.items()}
    if ranks.data_rank == 0:
        for name, (dim, size) in setup.divided.items():
            tensors[name] = unsplit(tensors[name].to(setup.device), dim, size, ranks.tensor).cpu()
    return tensors


def micro_batches(stream, first: int, count: int, micro: int, device: torch.device):
    """Sequences number `first` to first + count - 1 of a stream, on the device, `micro` at a time: (inputs, targets). From pinned
    memory a copy does not hold up the host, which is a step ahead of the device: it fetches while that computes."""
    to_device = lambda t: t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
    for i in range(0, count, micro):
        yield tuple(map(to_device, stream.batch(first + i, min(micro, count - i))))


def loss_of(s: Settings, setup: Setup, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss to differentiate: beside the cross-entropy what --z_loss and experts add."""
    return setup.forward(tokens, targets, document_ids=document_ids(tokens, setup.document_end), z_loss=s.z_loss)


def training_step(s: Settings, setup: Setup, batches, share: int, factor: float, step: int, span=record_function) -> tuple[Tensor, ...]:
    """One optimizer step on `share` sequences of this rank, in micro-batches, with the learning rates at `factor` of their
    peaks; returns the mean loss over all ranks, the gradient's norm, and whether the step was skipped because one of the two
    is not finite. All three stay on the device. `span(name)` is a context around each part of the step."""
    ranks, loss, done = setup.ranks, torch.zeros((), device=setup.device), 0
    if setup.model.config.dropout:                                       # what is dropped depends on seed, step and rank alone
        torch.manual_seed(int(np.random.SeedSequence([s.seed, step, ranks.data_rank]).generate_state(1, np.uint64)[0] >> 1))
    batches = iter(batches)
    while done < share:
        with span("data"):
            tokens, targets = next(batches)
            done += len(tokens)
        with nullcontext() if done == share or not isinstance(setup.parallel, DDP) else setup.parallel.no_sync():
            with span("forward"), setup.autocast():
                part = loss_of(s, setup, tokens, targets) * (len(tokens) / share)
            with span("backward"):
                part.backward()
        loss += part.detach()
    return finish_step(s, setup, loss, factor, step, span)


def finish_step(s: Settings, setup: Setup, loss: Tensor, factor: float, step: int, span=record_function) -> tuple[Tensor, ...]:
    """The end of a step, when this rank's gradients are there: see `training_step`, which returns what this does. `loss` is
    this rank's; the mean over ranks is what counts."""
    ranks, parallel = setup.ranks, setup.parallel
    with span("communication"):
        if parallel is not setup.model:
            parallel.finish_gradient_synchronization()
        if ranks.data_count > 1:
            dist.all_reduce(loss, group=ranks.data)
            loss /= ranks.data_count
    with span("optimizer"), torch.no_grad():
        parameters = dict(setup.model.named_parameters())
        split = {parameters[name] for name in setup.divided if name in parameters}   # a tied head goes by the embedding's name
        norm = gradient_norm(parameters.values(), s.parallel == "fsdp", ranks.data, split, ranks.tensor)
        clip_grad_norm_(parameters.values(), s.clip, norm)
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        for optimizer, peak in setup.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor * group.get("scale", 1)      # see decay_groups
            optimizer.step(skip=bad)
            optimizer.zero_grad()
        beta = min(s.average_beta, (1 + step) / (10 + step))             # the first steps' weights are soon forgotten
        for p, average in setup.average.items():
            average.lerp_(p, 1 - beta)
    return loss, norm, bad


# ------------------------------------------------------------------------------------------------------------------
# The loop

class Interrupt:
    """Turns SIGINT and SIGTERM into a number to look at, so that the step under way is finished and saved."""

    def __init__(self):
        self.signal = 0
        note = lambda number, frame: setattr(self, "signal", number)
        self.before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Meter:
    """The bar and log.jsonl. A step's numbers are read after the next step has been launched: the device then has work
    while the host waits for them. A line is written when nothing more can come to it, such as a validation loss."""

    def __init__(self, out: Path | None, settings: Settings, bar, wandb, clock, device, tokens: int, flops, peak):
        self.out, self.settings, self.bar, self.wandb, self.clock, self.device = out, settings, bar, wandb, clock, device
        self.tokens, self.flops, self.peak = tokens, flops, peak         # tokens: of the step read last
        self.late, self.record, self.written, self.durations, self.mark = None, {}, True, [], time.perf_counter()
        self.validated = ""

    def put(self, *numbers):
        """Hand in (step, tokens so far, learning rate, loss, gradient norm, skipped steps) of a step just launched."""
        step, tokens, rate, *tensors = numbers
        values, copied = torch.cat([t.detach().float().reshape(-1) for t in tensors]), None
        if self.device.type == "cuda":                                   # copied when the device gets there; nobody waits
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        late, self.late = self.late, (step, tokens, rate, values, copied)
        if late:
            self.read(*late)
        if self.device.type == "cpu":                                    # its steps are done when they return
            self.catch_up()

    def catch_up(self):
        """Read the latest step too, and wait for it: before an evaluation, a checkpoint, the end."""
        late, self.late = self.late, None
        if late:
            self.read(*late)

    def read(self, step, tokens, rate, values, copied):
        """Wait for a step's numbers, not for the step that was launched after it, and show them."""
        self.write()
        if copied:
            copied.synchronize()
        loss, norm, skipped, in_a_row = values.tolist()
        now = time.perf_counter()
        self.durations = [*self.durations, (now - self.mark, tokens - self.tokens)][-self.settings.log_every:]
        self.mark, self.tokens = now, tokens
        seconds, count = map(sum, zip(*self.durations))
        speed = count / seconds
        mfu = speed * self.flops / self.peak
        self.record, self.written = {
            "step": step, "tokens": tokens, "seconds": round(self.clock(), 3), "loss": loss,
            "val_loss": None, "val_bpb": None, "lr": rate, "grad_norm": norm, "tokens_per_second": round(speed, 1),
            "mfu": round(mfu, 4), "memory_bytes": peak_memory(self.device), "skipped": int(skipped)}, False
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {human(speed)} tok/s, MFU {mfu:.0%}{self.validated}",
                                 refresh=False)
        if in_a_row >= self.settings.max_skipped:
            raise FloatingPointError(f"loss or gradient was not finite for {in_a_row:.0f} steps in a row, up to step {step}; lower "
                                     f"--learning_rate {self.settings.learning_rate:g}. {last_checkpoint(self.out)}")

    def validate(self, loss: float, bpb: float | None):
        """Add an evaluation to the latest step's line; the pause that it made is not the next step's."""
        self.record |= {"val_loss": loss, "val_bpb": bpb}
        self.validated = f", val {loss:.3f}"
        self.mark = time.perf_counter()

    def write(self):
        """Append the latest step's line to log.jsonl, if it is that step's turn or it bears a validation loss."""
        due = self.record and (self.record["step"] % self.settings.log_every == 0 or self.record["val_loss"] is not None)
        if due and not self.written and not self.bar.disable:            # the bar is enabled on rank 0 alone
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(self.record) + "\n")
            if self.wandb:
                self.wandb.log(self.record, step=self.record["step"])
        self.written = True


def resolve(settings: Settings, device: torch.device) -> Settings:
    """Fill in what depends on the machine, and refuse what cannot be."""
    s = replace(settings)
    gpu = device.type == "cuda"
    s.batch_tokens = s.batch_tokens if s.batch_tokens is not None else 65536 if gpu else 2048
    if s.steps is None and s.tokens is None and s.max_seconds is None and not gpu:
        s.max_seconds = 150.0
    if s.init_from is None:
        s.preset = s.preset or ("mini" if gpu else "tiny")
        preset(s.preset)                                                 # unknown: the error names the nearest
    elif not s.resume and not Path(s.init_from, "config.json").exists():
        raise ValueError(f"--init_from {s.init_from}: there is no model folder (no config.json)")
    for name in ("preset", *SHAPE):
        if s.init_from and getattr(s, name) is not None:
            raise ValueError(f"--{name} {getattr(s, name)} contradicts --init_from {s.init_from}, whose model has a shape already")
    s.optimizer = s.optimizer or ("muon" if s.tensor_parallel == 1 else "adamw")
    if s.tensor_parallel > 1 and s.optimizer == "muon":
        raise ValueError(f"--optimizer muon needs whole matrices, which --tensor_parallel {s.tensor_parallel} divides; "
                         + ("resume this run without" if s.resume else "take --optimizer adamw"))
    if s.anneal_data and (s.schedule != "wsd" or s.decay == 0):
        raise ValueError(f"--anneal_data belongs to the decay phase of --schedule wsd; the schedule is {s.schedule}, --decay {s.decay:g}")
    if s.schedule == "wsd" and s.warmup + s.decay > 1:
        raise ValueError(f"--warmup {s.warmup:g} and --decay {s.decay:g} are more than all of the budget; lower one")
    if s.compile and device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "icpx"))):
        raise ValueError("--compile needs a C++ compiler on a CPU: install g++, or leave it out")
    if sum(budget is not None for budget in (s.steps, s.tokens, s.max_seconds)) > 1:
        raise ValueError("give one of --steps, --tokens and --max_seconds: the schedule follows one budget")
    for f in fields(s):
        if isinstance(getattr(s, f.name), float) and not math.isfinite(getattr(s, f.name)):
            raise ValueError(f"--{f.name} is {getattr(s, f.name)}; it must be a finite number")
    if device.type == "mps" and (s.parallel != "ddp" or s.tensor_parallel > 1):
        raise ValueError(f"--parallel {s.parallel} and --tensor_parallel {s.tensor_parallel} need GPUs by NVIDIA, or --device cpu")
    if s.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs a package that is not installed: pip install wandb")
    positive = ("steps tokens max_seconds batch_tokens micro_batch_size sequence_length learning_rate clip log_every "
                "eval_every eval_tokens final_eval_tokens save_every stop_after vocab_size max_skipped workers tensor_parallel "
                "muon_learning_rate").split()
    for name in positive:
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            raise ValueError(f"--{name} is {getattr(s, name)}; it must be above 0")
    shares, betas = ["warmup", "decay", "batch_warmup", "final_learning_rate"], ["beta1", "beta2", "momentum", "average_beta"]
    for name in (*shares, *betas, "weight_decay", "z_loss", "seed"):
        if getattr(s, name) < 0:
            raise ValueError(f"--{name} is {getattr(s, name)}; it must not be negative")
    if s.seed >= 2 ** 63:
        raise ValueError(f"--seed is {s.seed}; it must be below 2^63")
    for name in (*shares, *betas):
        if getattr(s, name) > 1 or getattr(s, name) == 1 and name in betas:
            raise ValueError(f"--{name} is {getattr(s, name)}; it must lie between 0 and 1")
    for name, choices in {"schedule": ("cosine", "wsd"), "optimizer": ("muon", "adamw"), "dtype": (None, "bfloat16", "float32"),
                          "kernels": (None, "triton", "torch"), "parallel": ("ddp", "zero1", "fsdp")}.items():
        if getattr(s, name) not in choices:
            raise ValueError(f"--{name} is {getattr(s, name)!r}; it must be {' or '.join(filter(None, choices))}")
    operations(s.kernels, device)                                        # before anything is made
    return s


def config_of(s: Settings, tokenizer: Tokenizer | None) -> Config:
    """The preset's shape, changed where flags say so, with the tokenizer's vocabulary. ValueError for what cannot be."""
    given = {name: getattr(s, name) for name in (*SHAPE, "dropout") if getattr(s, name) is not None}
    derived = {}                                                         # what follows from a changed shape, unless given too
    if "hidden_size" in given or "num_attention_heads" in given:
        derived = {"head_dim": None, "num_key_value_heads": None}
    if "hidden_size" in given or "feed_forward" in given:
        derived["intermediate_size"] = None
    if s.sequence_length:
        derived["max_position_embeddings"] = s.sequence_length
    if tokenizer is not None:
        derived |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    elif s.vocab_size != Settings.vocab_size:
        derived["vocab_size"] = s.vocab_size
    return replace(preset(s.preset), **{**derived, **given})


def make_model(s: Settings, tokenizer: Tokenizer | None, saved: dict | None = None) -> Transformer:
    """A fresh model, the one of --init_from, or one of the shape that args.json of the run to resume has `saved`."""
    if saved is not None:                                                # presets may have changed; the weights come from the state
        return Transformer(replace(Config(**saved["config"]), dropout=s.dropout or 0.0))
    if not s.init_from:
        torch.manual_seed(s.seed)
        return Transformer(config_of(s, tokenizer))
    model = load_pretrained(s.init_from).float()
    theirs = Path(s.init_from, "tokenizer.json")
    if tokenizer is not None and theirs.exists() and Tokenizer.load(theirs).vocab != tokenizer.vocab:
        raise ValueError(f"the data was tokenized with another vocabulary than that of {s.init_from}; "
                         f"encode the text again with --tokenizer {theirs}")
    longest = model.config.max_position_embeddings
    if (s.sequence_length or 0) > longest:
        raise ValueError(f"--sequence_length {s.sequence_length} exceeds the {longest} positions of {s.init_from}")
    whole = Transformer(replace(model.config, dropout=s.dropout or 0.0))
    whole.load_state_dict(model.state_dict())
    return whole


def split_batch(settings: Settings, sequence_length: int, ranks: int, largest: int) -> tuple[int, int]:
    """Sequences per batch, over all ranks, and per forward pass of one rank (`largest` at most, unless it is given)."""
    sequences, rest = divmod(settings.batch_tokens, sequence_length)
    if rest or not sequences:
        raise ValueError(f"--batch_tokens {settings.batch_tokens} is no multiple of the sequence length {sequence_length}; "
                         f"{max(1, round(settings.batch_tokens / sequence_length)) * sequence_length} is")
    if settings.batch_warmup and sequences % (8 * ranks):
        raise ValueError(f"--batch_warmup begins with an eighth of {sequences} sequences ({settings.batch_tokens} tokens), which cannot "
                         f"be split evenly over {ranks} rank(s); make --batch_tokens a multiple of {8 * ranks * sequence_length}")
    if sequences % ranks:
        raise ValueError(f"a batch of {sequences} sequences ({settings.batch_tokens} tokens) cannot be split evenly over "
                         f"{ranks} ranks; make --batch_tokens a multiple of {ranks * sequence_length}")
    share = sequences // ranks
    micro = settings.micro_batch_size or max(n for n in range(1, min(share, largest) + 1) if share % n == 0)
    if share % micro:
        raise ValueError(f"--micro_batch_size {micro} does not divide the {share} sequences that a rank has of a batch")
    return sequences, micro


def default_rates(s: Settings, config: Config):
    """Fill in the learning rates. AdamW's falls with the width (alone 4e-3 at 128, 6.5e-4 at GPT-2's 768), Muon's does not.
    Beside Muon AdamW has embedding, head and vectors alone, which bear, and want, four times the rate of all together. With
    µP they are those of the base width, and `decay_groups` does the rest."""
    s.learning_rate = s.learning_rate or (2 if s.optimizer == "muon" else 0.5) / config.base_width
    s.muon_learning_rate = s.muon_learning_rate or 0.005 * config.base_width * s.learning_rate


def sequences_in(s: Settings, steps: int, batch: int) -> int:
    """Sequences that so many steps read."""
    growing = math.ceil(s.batch_warmup * steps)
    return sum(batch_now(batch, i, s.batch_warmup * steps) for i in range(growing)) + (steps - growing) * batch


def steps_for(s: Settings, batch: int, length: int) -> int:
    """The fewest steps that make up --tokens. Those of the batch's warm-up are 1/8, 1/4 and 1/2 of a whole one, 7/24 on average."""
    steps = max(1, int(s.tokens / (batch * length * (1 - s.batch_warmup * 17 / 24))) - 8)
    while sequences_in(s, steps, batch) * length < s.tokens:
        steps += 1
    return steps


def batch_now(batch: int, position: float, warmup: float) -> int:
    """The sequences of a step at `position`: an eighth of a batch at first, and twice as many after each third of `warmup`.
    Small batches serve early steps as well as large ones (McCandlish et al. 2018, arXiv 1812.06162)."""
    return batch if position >= warmup else batch >> 3 - int(3 * position / warmup)


def compile_ahead(s: Settings, setup: Setup, stream: Mixture, share: int, micro: int) -> float:
    """Have torch.compile do its work before the clock runs: a pass of each size, whose gradients are dropped. Returns seconds."""
    start = time.perf_counter()
    for size in sorted({min(micro, max(1, share >> k)) for k in (range(4) if s.batch_warmup else (0,))}, reverse=True):
        tokens, targets = next(micro_batches(stream, 0, size, size, setup.device))
        with setup.autocast():
            loss = loss_of(s, setup, tokens, targets)
        loss.backward()
    if setup.parallel is not setup.model:
        setup.parallel.finish_gradient_synchronization()
    for optimizer, _ in setup.optimizers:
        optimizer.zero_grad()
    return time.perf_counter() - start


def start_profiler(folder: Path, device: torch.device, rank: int):
    """A profiler that writes a Chrome trace of three steps, with its parts by name, into `folder`, and what holds GPU memory."""
    folder.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def write(profiler):
        profiler.export_chrome_trace(str(folder / f"trace.rank_{rank}.json"))    # for ui.perfetto.dev
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"memory.rank_{rank}.pickle"))   # for pytorch.org/memory_viz
            torch.cuda.memory._record_memory_history(enabled=None)

    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(skip_first=1, wait=0, warmup=1, active=3, repeat=1),
                                      on_trace_ready=write)
    profiler.start()
    return profiler


def stop_profiler(profiler, folder: str):
    """End profiling, wherever it stands; a trace that is cut short is written too."""
    profiler.stop()
    if not list(Path(folder).glob("trace.*")):
        print(f"--profile {folder}: nothing was written; it takes the third to the fifth step, and there were fewer than three")


def counts(config: Config, length: int) -> dict[str, int]:
    """How large a model is, for those who read args.json alone: active_parameters leave out the experts that a token does not
    go through."""
    return {"parameters": num_parameters(config), "parameters_without_embeddings": num_parameters(config, embeddings=False),
            "active_parameters": num_parameters(config, active=True), "flops_per_token": flops_per_token(config, length)}


def open_run(s: Settings, saved: dict | None, config: Config, sources: dict, fingerprint: str, device) -> tuple[Path, dict, float]:
    """The run folder, what its args.json shall say, and the FLOP/s to measure utilization against. Made on rank 0 for all."""
    if saved is not None:
        out = Path(s.resume)
        if saved["data_fingerprint"] != fingerprint:
            raise ValueError(f"--resume {out}: the training tokens are not those that the run began with (fingerprint "
                             f"{saved['data_fingerprint']} then, {fingerprint} now)")
    else:
        out = Path(s.out or f"runs/{s.preset or Path(s.init_from).name}-{datetime.now():%Y%m%d-%H%M%S}")
        if (out / "state" / "latest.json").exists():
            raise ValueError(f"--out {out} holds a run already; continue it with --resume {out}, or choose another folder")
        out.mkdir(parents=True, exist_ok=True)
    dtype, peak = faster_dtype(s, device)
    length = s.sequence_length or config.max_position_embeddings
    return out, {**asdict(s), "dtype": dtype, "config": asdict(config), "counts": counts(config, length), "sources": sources,
                 "data_fingerprint": fingerprint}, peak


def cut_log(out: Path, step: int, name: str = "log.jsonl"):
    """Drop what was logged after `step`, and a line cut short by a kill: a resumed run logs it again."""
    if (out / name).exists():
        kept = [json.dumps(record, ensure_ascii=False) + "\n" for record in read_log(out, name) if record["step"] <= step]
        write_atomically(out / name, "".join(kept).encode())


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """The records of a run's log.jsonl; a last line that a kill cut short does not count."""
    path = Path(folder, name)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def saved_files(folder: Path) -> list[str]:
    """The files of the newest whole state, if there is one."""
    latest = Path(folder, "state", "latest.json")
    return read_json(latest)["files"] if latest.exists() else []


def last_checkpoint(folder: Path) -> str:
    """A sentence about what --resume would find."""
    latest = Path(folder, "state", "latest.json")
    if not latest.exists():
        return "No checkpoint had been written yet."
    return f"The checkpoint of step {read_json(latest)['step']} stands: --resume {folder}"


def explain_changes(say, s: Settings, saved: dict, step: int, seconds: float, batch: int, length: int):
    """Say what a resumed run does otherwise than before."""
    for name in (f.name for f in fields(Settings)):
        if name not in FREE | FIXED and saved[name] != getattr(s, name):
            say(f"from step {step} on, {name} is {getattr(s, name)} and no longer {saved[name]}")

    def budget(d):
        """In words, and the learning rate now if the schedule is laid over it."""
        total = d["max_seconds"] or d["steps"] or steps_for(replace(s, tokens=d["tokens"]), batch, length)
        rate = s.learning_rate * learning_rate(seconds if d["max_seconds"] else step, total, 1.0, s.warmup * total,
                                               s.final_learning_rate, s.schedule, s.decay * total)
        return " ".join(f"{d[name]:g} {name.removeprefix('max_')}" for name in ("steps", "tokens", "max_seconds") if d[name]), rate

    (was, old_rate), (now, new_rate) = budget(saved), budget(asdict(s))
    if was != now:
        say(f"the budget is {now} and no longer {was}: the schedule is laid anew over all of it, and the learning rate goes on "
            f"at {new_rate:.3g} where it stood at {old_rate:.3g}")


def start_wandb(args: dict, out: Path):
    """A Weights & Biases run (the package is optional; `resolve` has looked whether it is there)."""
    import wandb
    wandb.init(project="flatlm", name=out.name, config=args)
    return wandb


def print_result(record: dict, out: Path):
    """The table at the end of a run."""
    bpb = f"{record['val_bpb']:.4f} bits per byte" if record["val_bpb"] else "bits per byte unknown without a tokenizer"
    print(f"\nvalidation loss   {record['val_loss']:.4f} nats per token, {bpb}\n"
          f"training loss     {record['loss']:.4f} nats per token, in the last step\n"
          f"steps             {record['step']:,}, {record['skipped']} of them skipped as not finite\n"
          f"tokens            {record['tokens']:,} in {record['seconds']:.0f} seconds\n"
          f"speed             {record['tokens_per_second']:,.0f} tokens/s at the end, MFU {record['mfu']:.0%}\n"
          f"peak memory       {human(record['memory_bytes'])}B\n"
          f"model             {out}\n", flush=True)


def train(settings: Settings, saved: dict | None = None) -> Path | None:
    """Run the whole of it; returns the run folder when the budget is used up. `saved`: the args.json of a run to resume."""
    ranks = Ranks()
    device = pick_device(settings, ranks)
    s = resolve(settings, device)
    ranks.start(device, s.parallel != "ddp", s.tensor_parallel)
    first = ranks.rank == 0
    say = print if first else lambda *words, **more: None

    # --- data and model
    at_hand = saved is not None and saved["data"] == s.data and saved["anneal_data"] == s.anneal_data and all(
        map(has_tokens, (folder for of_kind in saved["sources"].values() for folder, _ in of_kind)))
    sources = saved["sources"] if at_hand else ranks.from_first(lambda: prepare(s))   # a run outlives the text it came from
    tokenizer_file = Path(sources["data"][0][0], "tokenizer.json")
    tokenizer = Tokenizer.load(tokenizer_file) if tokenizer_file.exists() else None
    tokenizer_json = tokenizer_file.read_bytes() if tokenizer else None  # the run's own from now on, whatever becomes of corpus/
    model = make_model(s, tokenizer, saved)
    config, length = model.config, s.sequence_length or model.config.max_position_embeddings
    if s.document_mask and not isinstance(config.eos_token_id, int):
        raise ValueError("--document_mask needs a token that ends a document, and the data's tokenizer has none (or there is no tokenizer)")
    streams = streams_of(sources, length, s.seed)
    validation = TokenDataset([file for folder, _ in sources["data"] for file in token_files(folder)[1]], length)
    datasets = [dataset for stream in streams.values() for dataset in stream.datasets]
    for dataset in (*datasets, validation):
        largest, file = dataset.largest()
        if largest >= config.vocab_size:
            raise ValueError(f"{file} holds the token {largest}, beyond the model's vocabulary of {config.vocab_size}; "
                             "was it made with another tokenizer? (Without a tokenizer.json beside it, --vocab_size says how many there are.)")
    default_rates(s, config)
    if s.steps is None and s.tokens is None and s.max_seconds is None:
        s.tokens = 4.0 * sum(dataset.num_tokens for dataset in streams["data"].datasets)   # more epochs teach little (arXiv 2305.16264)
    batch, micro = split_batch(s, length, ranks.data_count, 32 if device.type == "cuda" else 8)
    by_clock = s.max_seconds is not None
    fingerprint = "|".join(stream.fingerprint() for stream in streams.values())
    out, args, peak = ranks.from_first(lambda: open_run(s, saved, config, sources, fingerprint, device))
    bfloat16 = args["dtype"] == "bfloat16"
    setup = assemble(s, model, device, ranks, bfloat16)
    total = s.max_seconds if by_clock else s.steps or steps_for(s, batch, length)

    # --- the run folder, new or resumed
    step, progress = 0, {"seconds": 0.0, "skipped": 0, "read": dict.fromkeys(streams, 0)}
    if saved is not None:
        content = load_checkpoint(out, parts_of(setup, to_save=False), device)
        step, progress = content["step"], content["progress"]
        if (progress["seconds"] if by_clock else step) >= total:
            say(f"{out} is finished ({step} steps, {progress['seconds']:.0f} seconds); a larger --steps or --max_seconds extends it")
            return ranks.stop()
        explain_changes(say, s, saved, step, progress["seconds"], batch, length)
    if first:
        cut_log(out, step)
        write_atomically(out / "args.json", json.dumps(args, indent=2).encode())
    bytes_of = token_bytes(tokenizer, config.vocab_size) if tokenizer else None
    kind = model_type(replace(config, mup_base_width=None))              # of the export, whose weights hold µP's factor
    kind = "flatlm (no architecture of transformers has these switches)" if kind == "flatlm" else kind
    say(f"model    {human(num_parameters(config))} parameters ({human(num_parameters(config, False))} without embedding and "
        f"head): {config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary {config.vocab_size}; {kind}\n"
        f"data     {sum(d.num_tokens for d in datasets):,} tokens to train on, {validation.num_tokens:,} to validate, in "
        f"{', '.join(described_sources(sources))}\n"
        f"batch    {batch} sequences of {length} tokens: {ranks.data_count} rank(s) x {batch // ranks.data_count // micro} forward "
        f"pass(es) x {micro}\n"
        + (f"ranks    {ranks.count}: {s.parallel} over {ranks.data_count}, matrices divided over {s.tensor_parallel}\n" if ranks.count > 1 else "") +
        f"machine  {device.type}, {args['dtype']}, {'kernels.py, ' if operations(s.kernels, device) else ''}{peak / 1e12:.3g} TFLOP/s at best\n"
        f"budget   " + (f"{total:g} seconds" if by_clock else f"{total} steps, {human(sequences_in(s, total, batch) * length)} tokens")
        + f", from step {step}; run folder {out}", flush=True)

    if s.compile:
        seconds = compile_ahead(s, setup, streams["data"], batch // ranks.data_count, micro)
        say(f"compile  {seconds:.1f} seconds, kept for the next time in {os.environ['TORCHINDUCTOR_CACHE_DIR']}", flush=True)

    # --- one step after the other
    clock_start = time.perf_counter() - progress["seconds"]
    clock = lambda: time.perf_counter() - clock_start                    # seconds of training, those before a resume too
    position, step_before = progress["seconds"] if by_clock else step, step      # how much of `total` is used up
    read = progress["read"]                                              # sequences of each stream
    bar = tqdm(total=math.ceil(total), initial=int(position), disable=not first,
               mininterval=0.2 if sys.stderr.isatty() else 15, unit="s" if by_clock else "steps",
               bar_format="{percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]")
    wandb = start_wandb(args, out) if s.wandb and first else None
    meter = Meter(out, s, bar, wandb, clock, device, sum(read.values()) * length, flops_per_token(config, length), peak * ranks.count)
    skipped = torch.tensor([progress["skipped"], 0], device=device)      # steps that were not finite: all, and the latest in a row
    profiler = start_profiler(Path(s.profile), device, ranks.rank) if s.profile else None
    interrupt = Interrupt()

    def save():
        meter.catch_up()
        meter.write()
        if saved is not None and step == step_before:                    # there already; other ranks would overwrite it file by file
            return
        with averaged(setup):
            tensors = whole_weights(setup)
        writes = ranks.data_rank == 0 or s.parallel != "ddp"             # under DDP the others have the same

        def finish(files):
            seal_checkpoint(out, step, files)
            export(model, tensors, out, tokenizer_json)

        try:
            files = ranks.everywhere(lambda: save_checkpoint(
                out, parts_of(setup, to_save=True), step, ranks.rank, seconds=clock(), skipped=int(skipped[0]),
                read=read) if writes else None)
            ranks.from_first(lambda: finish([name for name in files if name]))
        except OSError as error:
            if writes and not any(f"step_{step}." in name for name in saved_files(out)):
                (out / "state" / f"step_{step}.rank_{ranks.rank}.pt").unlink(missing_ok=True)
            raise OSError(f"step {step} could not be saved: {describe(error)}. {last_checkpoint(out)}") from None
        meter.mark = time.perf_counter()

    def validate(limit: int | None):
        meter.catch_up()
        with averaged(setup):
            meter.validate(*evaluate(model, validation, bytes_of, micro, setup.autocast, limit, ranks, setup.document_end))

    with bar:                                                            # closed before an error is told
        while True:
            # rank 0's clock and anybody's signal hold for all, or the ranks would leave the loop at different steps
            # 0 to go on, 1 to stop here, 2 and more for a signal's number
            stop = interrupt.signal or int(s.stop_after is not None and step >= s.stop_after)
            half = meter.durations[-1][0] / 2 if meter.durations else 0.0   # half of a step, in seconds
            stop, seconds, half = ranks.agree(stop, clock() if first else 0.0, half if first else 0.0)
            before, position = position, seconds if by_clock else step
            bar.update(min(int(position), bar.total) - bar.n)
            started = step > step_before                                 # at least one step is made, and nothing is done twice
            due = lambda every: started and (step % every == 0 if every else int(10 * position / total) > int(10 * before / total))
            if due(s.eval_every) and position < total and stop < 2:      # a signal is in a hurry, --stop_after is not
                validate(s.eval_tokens)
            if stop or started and position >= total:
                break
            pause = due(s.eval_every) or due(s.save_every)
            if due(s.save_every):
                save()
            if pause and by_clock:                                       # evaluating and saving used up time too
                position, = ranks.agree(clock() if first else 0.0)

            # a step's rate is taken at its middle, so that neither the first nor the last is zero
            middle = position + (half if by_clock else 0.5)
            factor = learning_rate(middle, total, 1.0, s.warmup * total, s.final_learning_rate, s.schedule, s.decay * total)
            now = batch_now(batch, position, s.batch_warmup * total)
            share = now // ranks.data_count                              # sequences of a batch that this rank sees
            kind = "anneal" if "anneal" in streams and position >= total - s.decay * total else "data"
            batches = micro_batches(streams[kind], read[kind] + ranks.data_rank * share, share, micro, device)
            loss, norm, bad = training_step(s, setup, batches, share, factor, step)
            skipped = torch.stack((skipped[0] + bad, (skipped[1] + 1) * bad))
            step, read[kind] = step + 1, read[kind] + now
            meter.put(step, sum(read.values()) * length, factor * s.learning_rate, loss, norm, skipped)
            if profiler:
                profiler.step()

        meter.catch_up()
        if profiler:
            stop_profiler(profiler, s.profile)
        if position >= total:
            validate(s.final_eval_tokens)
        save()
    interrupt.restore()
    ranks.stop()
    if position >= total:
        if first:
            print_result(meter.record, out)
        return out if not interrupt.signal else None
    together = f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')} " if ranks.count > 1 else ""
    say(f"stopped after step {step}; everything is in {out}. To go on: torchrun {together}train.py --resume {out}", flush=True)
    if interrupt.signal:
        sys.exit(128 + interrupt.signal)                                 # what a shell reports of a process that a signal ended
    return None


# ------------------------------------------------------------------------------------------------------------------
# How fast: python train.py bench

class Stopwatch:
    """Contexts that add up the seconds of what runs inside them, by name; the device is waited for at both ends."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds = {}

    @contextmanager
    def __call__(self, name: str):
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def transformers_step(config: Config, device: torch.device, autocast) -> Callable:
    """What the peer does in a step: the same architecture in transformers, its weights drawn anew, under torch's AdamW."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError("--peer needs a package that is not installed: pip install transformers") from None
    values = config_to_json(replace(config, mup_base_width=None))        # whose factor costs nothing
    if values["model_type"] == "flatlm":
        raise ValueError("--peer: no architecture of transformers has these switches on")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batches, share):
        for tokens, targets in batches:
            with autocast():
                logits = model(tokens, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            (loss * (len(tokens) / share)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench(argv: list[str]):
    """The command `bench`: speed, utilization, time by parts and memory of training steps on random tokens, on all ranks."""
    parser = settings_parser("train.py bench", "How fast training steps are, on random tokens, and where their time goes. Takes "
                             "train.py's flags; under torchrun all ranks are measured together.")
    parser.add_argument("--rounds", type=int, default=10, help="steps to measure (default: 10)")
    parser.add_argument("--peer", action="store_true", help="time transformers too, in turns with the steps here")
    given = given_flags(parser, argv)
    rounds, peer = given.pop("rounds"), given.pop("peer")
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1")
    for name in {"data", "anneal_data", "init_from", "resume", "out"} & set(given):
        raise ValueError(f"bench takes no --{name}: it trains a fresh model on random tokens")
    ranks = Ranks()
    settings = Settings(**given)
    device = pick_device(settings, ranks)
    s = resolve(settings, device)
    ranks.start(device, s.parallel != "ddp", s.tensor_parallel)
    say = print if ranks.rank == 0 else lambda *words, **more: None
    start_memory = peak_memory(device)
    config = replace(config_of(s, None), eos_token_id=0)                 # one token in V ends a document, for --document_mask
    length = s.sequence_length or config.max_position_embeddings
    default_rates(s, config)
    batch, micro = split_batch(s, length, ranks.data_count, 32 if device.type == "cuda" else 8)
    share = batch // ranks.data_count
    dtype, _ = ranks.from_first(lambda: faster_dtype(s, device))
    model = Transformer(config)
    orthogonal = hidden_matrices(model)
    setup = assemble(s, model, device, ranks, dtype == "bfloat16")
    generator = torch.Generator().manual_seed(ranks.data_rank)
    random = torch.randint(config.vocab_size, (share, length + 1), generator=generator)
    stream = SimpleNamespace(batch=lambda first, count: (random[first:first + count, :-1], random[first:first + count, 1:]))
    theirs = transformers_step(config, device, setup.autocast) if peer else None
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(step):
        wait()
        start = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - start

    def step(number, span=record_function):
        training_step(s, setup, micro_batches(stream, 0, share, micro, device), share, 1.0, number, span)

    if s.compile:
        say(f"compile   {compile_ahead(s, setup, stream, share, micro):.1f} seconds")
    profiler = start_profiler(Path(s.profile), device, ranks.rank) if s.profile else None
    seconds, parts, ratios = [], Stopwatch(device), []
    for number in tqdm(range(-3, rounds), desc="steps", leave=False, disable=None if ranks.rank == 0 else True):
        ours = timed(lambda: step(number + 3))
        other = timed(lambda: theirs(micro_batches(stream, 0, share, micro, device), share)) if theirs else None
        if profiler:
            profiler.step()
        if profiler and number == rounds - 1:
            stop_profiler(profiler, s.profile)
        if number < 0:                                                   # the first steps make what later ones find
            continue
        seconds.append(ours)
        ratios += [other / ours] if theirs else []
    memory = peak_memory(device) - start_memory
    for number in range(min(rounds, 5)):
        step(number, parts)
    milliseconds, tried = 1000 * np.array(seconds), min(rounds, 5)
    speed = batch * length / float(np.median(seconds))
    flops, rate = flops_per_token(config, length) * speed, lambda n: f"{n / 1e12:,.3g} TFLOP/s"
    sheet = data_sheet_flops(device, getattr(torch, dtype))
    ceiling = measured_flops(device, getattr(torch, dtype)) * ranks.count
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    plan = memory_bytes(config, micro, length, 2 if dtype == "bfloat16" else 4)
    if s.optimizer == "muon":                                            # one moment, where AdamW has two
        plan["optimizer"] -= 4 * sum(math.prod(setup.shapes[name]) for name in orthogonal)
    planned = f", {human(sum(plan.values()))}B planned: " + ", ".join(f"{part} {human(size)}B" for part, size in plan.items())
    lines = {
        "model": f"{human(num_parameters(config))} parameters ({human(num_parameters(config, False))} without embedding and head), "
                 f"{human(flops_per_token(config, length))} FLOPs per token",
        "machine": f"{ranks.count} x {chip}, {dtype}, torch {torch.__version__}",
        "batch": f"{batch} sequences of {length} tokens: {ranks.data_count} rank(s) x {share // micro} forward pass(es) x {micro}; "
                 + s.optimizer,
        "speed": f"{speed:,.0f} tokens/s, {np.median(milliseconds):.1f} ms a step (median of {rounds}, {milliseconds.min():.1f} to "
                 f"{milliseconds.max():.1f})",
        "MFU": (f"{flops / (sheet * ranks.count):.1%} of the data sheet's {rate(sheet * ranks.count)}, " if sheet else "")
               + f"{flops / ceiling:.1%} of the {rate(ceiling)} that products of large matrices reach here",
        "parts": ", ".join(f"{name} {1000 * total / tried:.1f} ms" for name, total in parts.seconds.items()) + " (each waited for)",
        "memory": f"{human(memory)}B at the peak beyond the start's" + (planned if ranks.count == 1 and not peer else " on the first rank")}
    if theirs:
        lines["peer"] = (f"transformers takes {np.median(ratios):.2f} times as long a step (with fused AdamW; median of {rounds} paired "
                         f"ratios, {min(ratios):.2f} to {max(ratios):.2f})")
    for name, text in lines.items():
        say(f"{name:9} {text}")
    ranks.stop()


# ------------------------------------------------------------------------------------------------------------------
# Whether rates carry over to other widths: python train.py coordinates

# The slopes of log(change) against log(width) that count as level. Logits fall with the root of the width as long as the head's
# random start, whose terms cancel, outweighs what it has learned; all that should not add up over the width grows.
LEVEL = -1.0, 0.3


def at_width(config: Config, width: int) -> dict[str, int]:
    """Flags for a model like that of `config` that is `width` wide: more or fewer heads of the same size, sharing keys and
    values as before, and a feed-forward network in proportion. ValueError for a width that has no such heads."""
    sharing = config.num_attention_heads // config.num_key_value_heads
    unit = config.head_dim * sharing
    if width < 1 or width % unit:
        heads = f"heads of {config.head_dim}" + (f", {sharing} to a key-value head" if sharing > 1 else "")
        raise ValueError(f"--widths holds {width}, which is no multiple of {unit} ({heads}); {max(1, round(width / unit)) * unit} is")
    return {"hidden_size": width, "num_attention_heads": width // config.head_dim, "num_key_value_heads": width // unit,
            "intermediate_size": max(8, round(config.intermediate_size * width / config.hidden_size / 8) * 8)}


@torch.no_grad()
def activations(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What flows through a model, in evaluation mode, for tokens (B, S): what enters the first layer, what attention and
    feed-forward network add in each, the last residual stream, the logits."""
    seen, layers = {}, model.model["layers"]
    first = lambda output: (output[0] if isinstance(output, tuple) else output).float()
    note = lambda name: lambda module, inputs, output: seen.update({name: first(output)})
    hooks = [layers[0].register_forward_pre_hook(lambda module, inputs: seen.update({"embedding": first(inputs)}))]
    for i, layer in enumerate(layers):
        hooks += [layer.self_attn.register_forward_hook(note(f"attention {i}")), layer.mlp.register_forward_hook(note(f"feed-forward {i}"))]
    hooks.append(layers[-1].register_forward_hook(note("residual stream")))
    model.eval()
    try:
        seen["logits"] = model(tokens).float()
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return seen


def coordinate_check(s: Settings, tokenizer: Tokenizer | None, stream: Mixture, device: torch.device) -> dict[str, dict[str, float]]:
    """Train a model for s.steps in float32 at its full rates, and look at its first batch: by activation, the mean absolute value
    at the "start" and at the "end", and that of its "change". (Tokens that it has not seen yet are nearly orthogonal to those
    that it has, the more so the wider it is: their changes say nothing.)"""
    model = make_model(s, tokenizer)
    length = s.sequence_length or model.config.max_position_embeddings
    batch, micro = split_batch(s, length, 1, 8)
    setup = assemble(s, model, device, Ranks(), bfloat16=False)
    tokens = stream.batch(0, min(batch, 4))[0].to(device)
    before = activations(model, tokens)
    for step in range(s.steps):
        training_step(s, setup, micro_batches(stream, step * batch, batch, micro, device), batch, 1.0, step)
    after, size = activations(model, tokens), lambda x: x.abs().mean().item()
    return {name: {"start": size(x), "end": size(after[name]), "change": size(after[name] - x)} for name, x in before.items()}


def slope(values: dict[int, float]) -> float:
    """Of log(value) against log(width), by least squares: 0 where the width does not matter, 1 where values grow with it. Not a
    number where a value is none, or not above 0."""
    if not all(0 < value < math.inf for value in values.values()):
        return math.nan
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def coordinates_table(sizes: dict[int, dict[str, dict[str, float]]], names: list[str], steps: int) -> list[list[str]]:
    """Rows for the activations `names`, after the steps and what changed in them, from `sizes` by width, name and moment; with
    the slope."""
    rows = [["mean |activation|", *(f"width {width:,}" for width in sizes), "slope"]]
    for moment, words in (("end", f"after {steps} steps"), ("change", "change")):
        for name in names:
            values = {width: of_width[name][moment] for width, of_width in sizes.items()}
            rows.append([f"{name}, {words}", *(f"{value:.3g}" for value in values.values()), f"{slope(values):+.2f}"])
    return rows


def coordinates_verdict(sizes: dict[int, dict[str, dict[str, float]]]) -> str:
    """In words, whether the changes of all activations are level over the widths."""
    slopes = {name: slope({width: of_width[name]["change"] for width, of_width in sizes.items()}) for name in next(iter(sizes.values()))}
    low, high = LEVEL
    outside = {name: math.inf if math.isnan(s) else max(s - high, low - s) for name, s in slopes.items()}
    worst = max(outside, key=outside.get)
    if outside[worst] <= 0:
        return f"level: the changes' slopes lie between {min(slopes.values()):+.2f} and {max(slopes.values()):+.2f} (allowed: {low} to {high})"
    how = "is not finite" if math.isnan(slopes[worst]) else "grows with the width" if slopes[worst] > 0 else "shrinks with the width"
    return f"not level: the change of {worst} {how}, slope {slopes[worst]:+.2f} (allowed: {low} to {high})"


def draw_coordinates(sizes: dict[str, dict[int, dict]], path: Path):
    """The change of each activation against the width, side by side for both parametrizations."""
    if importlib.util.find_spec("matplotlib") is None:
        return print("no picture without matplotlib: pip install matplotlib")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, both = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axes, (title, by_width) in zip(both, sizes.items()):
        for name in next(iter(by_width.values())):
            axes.plot(list(by_width), [of_width[name]["change"] for of_width in by_width.values()], "o-", ms=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="mean |change of activation|", title=title)
        axes.grid(alpha=0.3)
    both[1].legend(fontsize=7)
    save_picture(figure, path)


def coordinates(argv: list[str]):
    """The command `coordinates`: the check that Yang et al. 2022 (arXiv 2203.03466, appendix D.1) recommend for an
    implementation of µP. What a step changes in the activations must not depend on the width."""
    parser = settings_parser("train.py coordinates", "The coordinate check: train models of several widths for a few steps, all with "
                             "the rate of the narrowest, once as they are and once by µP, and show how large activations and "
                             "their changes are. Takes train.py's flags (AdamW, 10 steps of 256 tokens, in sequences of 128, "
                             "unless given); --out is a folder for results.json and a picture.")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512], metavar="INT",
                        help="at least two, the narrowest is µP's base (default: 64 128 256 512)")
    given = given_flags(parser, argv)
    widths = sorted(set(given.pop("widths")))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("coordinates is the work of one process; start it with python, without torchrun")
    refuse_flags(given, {"mup_base_width": "the narrowest of --widths is the base", "init_from": "it has one width",
                         "dtype": "they are in float32", **dict.fromkeys(("parallel", "tensor_parallel"), "they are in one process"),
                         **dict.fromkeys(("resume", "tokens", "max_seconds", "stop_after"), "they are as long as --steps says")})
    if len(widths) < 2:
        raise ValueError(f"--widths {widths[0]} is one width; give at least two to compare")
    out = given.pop("out", None)
    given = {"optimizer": "adamw", "steps": 10, "batch_tokens": 256, "sequence_length": 128, "preset": "tiny", **given}
    config = plan(given)[1]
    shapes = {width: at_width(config, width) for width in widths}
    s = plan({**given, **shapes[widths[0]]})[0]                          # with the rates that all take
    device, sources = pick_device(s, Ranks()), prepare(s)
    file = Path(sources["data"][0][0], "tokenizer.json")
    tokenizer = Tokenizer.load(file) if file.exists() else None
    stream = streams_of(sources, s.sequence_length, s.seed)["data"]
    sizes = {"standard": {}, "µP": {}}
    for kind, width in tqdm([(kind, width) for kind in sizes for width in widths], unit="model", leave=False):
        base = widths[0] if kind == "µP" else None
        sizes[kind][width] = coordinate_check(replace(s, **shapes[width], mup_base_width=base), tokenizer, stream, device)
    middle = config.num_hidden_layers // 2
    names = ["embedding", f"attention {middle}", f"feed-forward {middle}", "residual stream", "logits"]
    print(f"{config.num_hidden_layers} layers, heads of {config.head_dim}, {s.steps} steps of {s.batch_tokens} tokens, {s.optimizer}, learning "
          f"rate {s.learning_rate:.3g}" + (f" (Muon's {s.muon_learning_rate:.3g})" if s.optimizer == "muon" else "")
          + " at all widths")
    for kind, by_width in sizes.items():
        print(f"\n{kind}" + (f", base width {widths[0]}" if kind == "µP" else ""))
        print_table(coordinates_table(by_width, names, s.steps))
    print("\n" + "\n".join(f"{kind + ':':10}{coordinates_verdict(by_width)}" for kind, by_width in sizes.items()))
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        content = {"command": "coordinates", "flags": given, "widths": widths, "sizes": sizes}
        write_atomically(Path(out, "results.json"), json.dumps(content, indent=2).encode())
        draw_coordinates(sizes, Path(out, "coordinates.png"))


# ------------------------------------------------------------------------------------------------------------------
# Many runs: python train.py sweep, python train.py ablate

# What `ablate` compares: the recipe as it stands, and one switch away from it each.
VARIANTS = {
    "base": "",
    "layer_norm": "--norm layer",                                        # mean and bias too (Ba et al. 2016, arXiv 1607.06450)
    "norm_post": "--norm_place post",                                    # after the sum, as in 2017 (arXiv 1706.03762)
    "norm_both": "--norm_place both",                                    # around each sublayer, as in Gemma 2 (arXiv 2408.00118)
    "norm_none": "--norm_place none",                                    # what norms are good for
    "position_learned": "--position learned",                            # GPT-2's table
    "position_sinusoidal": "--position sinusoidal",                      # added waves, as in 2017 (arXiv 1706.03762)
    "position_none": "--position none",                                  # the causal mask alone (arXiv 2305.19466)
    "gelu": "--feed_forward gelu",                                       # GPT-2's, without a gate (arXiv 1606.08415)
    "silu": "--feed_forward silu",                                       # SwiGLU without its gate
    "relu2": "--feed_forward relu2",                                     # a squared ReLU (So et al. 2021, arXiv 2109.08668)
    "multi_query": "--num_key_value_heads 1",                            # one head of keys and values (arXiv 1911.02150)
    "parallel_residual": "--use_parallel_residual",                      # attention beside feed-forward, as in GPT-J
    "sliding_window": "--sliding_window 64",                             # attend to the last 64 positions (arXiv 2310.06825)
    "sliding_window_mixed": "--sliding_window 64 --sliding_window_pattern 3",    # every third layer sees all (arXiv 2503.19786)
    "qk_norm": "--qk_norm",                                              # norm on queries and keys (arXiv 2010.04245)
    "softcapping": "--final_logit_softcapping 15",                       # logits within ±15 (Gemma 2, arXiv 2408.00118)
    "experts": "--num_local_experts 4",                                  # a mixture in each layer (Mixtral, arXiv 2401.04088)
    "untied": "--no_tie_word_embeddings",                                # the head is not the embedding (arXiv 1608.05859)
    "adamw": "--optimizer adamw",                                        # for the layers' matrices too
    "cosine": "--schedule cosine",                                       # half a wave from peak to zero (arXiv 1608.03983)
    "z_loss": "--z_loss 1e-4",                                           # keeps the log-sum-exp small (PaLM, arXiv 2204.02311)
    "dropout": "--dropout 0.1",                                          # costs where no token is seen twice
    "batch_warmup": "--batch_warmup 0.1",                                # small batches first (GPT-3, arXiv 2005.14165)
    "average": "--average_beta 0.99",                                    # evaluate an average of the weights
}


def plan(flags: dict) -> tuple[Settings, Config, int, str]:
    """Of a run with these flags, its data made ready: settings, shape, sequence length and the data's fingerprint.
    ValueError for what train.py would refuse, so that it is known before the first run."""
    s = resolve(Settings(**flags), torch.device(device_kind(Settings(**flags))))
    sources = prepare(s)
    file = Path(sources["data"][0][0], "tokenizer.json")
    config = (config_from_json(read_json(Path(s.init_from, "config.json"))) if s.init_from else
              config_of(s, Tokenizer.load(file) if file.exists() else None))
    length = s.sequence_length or config.max_position_embeddings
    default_rates(s, config)
    split_batch(s, length, 1, 8)
    data = [TokenDataset(token_files(folder)[0], length, s.seed) for of_kind in sources.values() for folder, _ in of_kind]
    return s, config, length, "+".join(dataset.fingerprint() for dataset in data)


def grid_flags(parser: Parser, argv: list[str], refused: dict[str, str], *own: str) -> tuple[dict, list]:
    """The flags of `argv` that go to every run, and the values (None: not given) of the `own` ones, which stay here.
    ValueError for those `refused`, with the reason."""
    parser.add_argument("--keep", action="store_true", default=None, help="keep weights and states of finished runs")
    given = given_flags(parser, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several ranks cannot share a grid of runs; start it with python, without torchrun")
    given.setdefault("eval_tokens", 8192)                                # on the way
    refuse_flags(given, {"resume": (again := "the same command again goes on with its runs"), "stop_after": again, **refused})
    return given, [given.pop(name, None) for name in own]


def refuse_flags(given: dict, refused: dict[str, str]):
    """ValueError when `given` holds one of the names in `refused`, with the reason."""
    for name in set(given) & set(refused):
        raise ValueError(f"--{name} {given[name]} cannot be passed on to the runs: {refused[name]}")


def open_grid(out: Path, common: dict, runs: dict[str, dict]):
    """Make the folder of a grid, or check that what is there was made alike. grid.json keeps the flags that all runs share
    and those of each run; runs may be added."""
    path, whole = out / "grid.json", runs
    if path.exists():
        before = read_json(path)
        whole = {**before["runs"], **runs}
        then, now = before["common"] | before["runs"], common | before["runs"] | runs
        for name in (*before["common"], *common, *before["runs"]):
            if (old := then.get(name)) != (new := now.get(name)):
                raise ValueError(f"--out {out} was made with {name} {old}, and not {new}; choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds something else already (no grid.json); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"common": common, "runs": whole}, indent=2).encode())


def start_run(folder: Path, flags: dict) -> int:
    """Run train.py in `folder`, or go on with what is there, all that it says in output.txt; returns its exit code. Ctrl-C
    lets it finish its step and save."""
    words = ["--resume", str(folder)]
    if not saved_files(folder):
        values = lambda value: [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        words = [str(word) for name, value in {**flags, "out": folder}.items()
                 for word in (f"--no_{name}" if value is False else f"--{name}", *values(value))]
    folder.mkdir(exist_ok=True)
    with open(folder / "output.txt", "a") as file:
        print("$ python train.py", shlex.join(words), file=file, flush=True)
        child = subprocess.Popen([sys.executable, "-u", __file__, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                 env={**os.environ, "FLATLM_GRID": "1"})             # the run need not speak at its end
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)                             # a terminal has told it already; twice does no harm
            child.wait()
            raise
    if code in (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt
    return code


def judge(folder: Path, code: int, vocab_size: int) -> dict:
    """What became of a run that ended with `code`. It diverged if it stopped as not finite, or ends with a validation loss 1 %
    above its first (which sees fewer tokens) or no better than a uniform guess. ValueError for a mistake of the user's."""
    output = (folder / "output.txt").read_text(errors="replace").rpartition("$ python train.py ")[2].strip()
    message = re.split(r"[\r\n]+", output)[-1]
    if code == 2:
        raise ValueError(message.removeprefix("train.py: "))
    outcome = "finished"
    if code == 0:
        evaluated = [record for record in read_log(folder) if record["val_loss"] is not None]
        limit = min(math.log(vocab_size) - 0.01, 1.01 * evaluated[0]["val_loss"])
        high = [record["step"] for record in evaluated if not record["val_loss"] <= limit]       # NaN is
        if evaluated[-1]["step"] in high:
            outcome = f"diverged at step {high[0]}"
    elif found := re.search(r"not finite for (\d+) steps in a row, up to step (\d+)", message):
        outcome = f"diverged at step {int(found[2]) - int(found[1]) + 1}"
    elif code == -signal.SIGKILL or re.search("out of memory|ALLOC_FAILED|allocate|MemoryError", output[-3000:]):
        outcome = "out of memory"                                        # Linux kills who asks for too much
    else:
        outcome = f"failed with exit code {code}"
    return {"outcome": outcome, "message": message}


def read_result(folder: Path) -> dict:
    """The outcome of a run, and of one that finished what log.jsonl says at its end."""
    result = read_json(folder / "outcome.json")
    if result["outcome"] == "finished":
        records = read_log(folder)
        result |= {name: records[-1][name] for name in ("tokens", "seconds", "val_loss", "val_bpb", "memory_bytes")}
        result["tokens_per_second"] = float(np.median([record["tokens_per_second"] for record in records]))
    return result


def run_grid(command: str, given: dict, runs: dict[str, dict], keep: bool, show):
    """Run what has no outcome yet, one after the other: each of `runs` is the flags it has beside the `given` ones, of which
    --out is the folder of all. show(out, results) prints what came of them, by name, and returns what results.json shall say
    beside. Unless `keep`, a run's weights and state are deleted when its outcome is known."""
    out, common = Path(given["out"]), {name: value for name, value in given.items() if name != "out"}
    shapes = {name: plan({**common, **flags})[1] for name, flags in runs.items()}
    open_grid(out, {"command": command, **{f"--{name}": value for name, value in common.items()}, "data": plan(common)[3],
                    "shape": asdict(plan(common)[1])}, runs)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)                # raises KeyboardInterrupt, wherever we are
    results, bar = {}, tqdm(runs.items(), unit="run", mininterval=0.2 if sys.stderr.isatty() else 15)
    with bar, suppress(KeyboardInterrupt):
        for name, flags in bar:
            folder = out / name
            if not (folder / "outcome.json").exists():
                outcome = judge(folder, start_run(folder, {**common, **flags}), shapes[name].vocab_size)
                outcome["parameters"] = num_parameters(shapes[name])
                write_atomically(folder / "outcome.json", json.dumps(outcome, indent=2).encode())
                if not keep:
                    shutil.rmtree(folder / "state", ignore_errors=True)
                    (folder / "model.safetensors").unlink(missing_ok=True)
            results[name] = read_result(folder)
            bar.set_postfix_str(f"{name}: {results[name].get('val_loss', results[name]['outcome'])}")
    print()
    more = show(out, results) if results else {}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__,
               "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    rows = {name: {"flags": runs[name], **result} for name, result in results.items()}
    content = {"command": command, "flags": common, "machine": machine, **more, "runs": rows}
    write_atomically(out / "results.json", json.dumps(content, indent=2).encode())
    print(f"{len(results)} of {len(runs)} runs, see {out / 'results.json'}; to repeat one, delete its folder", flush=True)
    if len(results) < len(runs):
        print("interrupted; what the run had reached is saved, and the same command goes on from there", flush=True)
        sys.exit(130)


def print_table(rows: list[list[str]]):
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("   ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip())


def sweep_table(losses: dict[int, dict[float, float | str]], kind: str = "batch") -> list[list[str]]:
    """Rows for `losses` by batch size (or width) and learning rate, where words stand for a run without one: a star marks the
    best of a column; the last row is the edge of stability, the largest rate below all that diverge."""
    rows = [["learning rate", *(f"{kind} {size:,}" for size in losses)]]
    for rate in sorted({rate for column in losses.values() for rate in column}):
        rows.append([f"{rate:.3g}"])
        for column in losses.values():
            loss, best = column.get(rate, ""), min((x for x in column.values() if not isinstance(x, str)), default=None)
            rows[-1].append(loss if isinstance(loss, str) else f"{'* ' if loss == best else ''}{loss:.4f}")
    rows.append(["stable up to"])
    for column in losses.values():
        unstable = min((rate for rate, loss in column.items() if str(loss).startswith("diverged")), default=math.inf)
        stable = max((rate for rate, loss in column.items() if not isinstance(loss, str) and rate < unstable), default=None)
        rows[-1].append("none" if stable is None else f"{stable:.3g}" + (" or more" if unstable == math.inf else ""))
    return rows


def save_picture(figure, path: Path):
    """Write a matplotlib figure by way of a temporary name, whose suffix tells the format, and say where it is."""
    temporary = path.with_name(f"tmp.{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=150, bbox_inches="tight")
    os.replace(temporary, path)
    print(path)


def draw_sweep(losses: dict[int, dict[float, float | str]], path: Path, kind: str):
    """Loss against learning rate, a line for each batch size or width; a cross at the top is a run that has none."""
    if importlib.util.find_spec("matplotlib") is None:
        return print("no picture without matplotlib: pip install matplotlib")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5))
    for size, column in losses.items():
        finished = sorted(rate for rate, loss in column.items() if not isinstance(loss, str))
        label = f"batch of {size:,} tokens" if kind == "batch" else f"width {size:,}"
        line, = axes.plot(finished, [column[rate] for rate in finished], "o-", ms=4, label=label)
        failed = sorted(set(column) - set(finished))
        axes.plot(failed, [1] * len(failed), "x", color=line.get_color(), transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss in nats per token (crosses: diverged)")
    axes.legend()
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def sweep(argv: list[str]):
    """The command `sweep`: a run for each learning rate and batch size, or width, over equally many tokens."""
    parser = settings_parser("train.py sweep", "Train at learning rates up to and past the edge of stability, and at batch sizes "
                             "or widths if given: a table and a picture of the losses. --out is the folder of all runs; other "
                             "flags are passed on to each. Without --steps, --tokens, --max_seconds: a million tokens, 32 on a GPU.")
    parser.add_argument("--learning_rates", nargs="+", type=float, metavar="FLOAT", help="none: from 1/16 to 16 times the one that "
                        "a run (the narrowest) would take, in factors of 2")
    parser.add_argument("--batch_sizes", nargs="+", type=int, metavar="INT", help="in tokens; none: the one that a run would take")
    parser.add_argument("--widths", nargs="+", type=int, metavar="INT", help="instead of batch sizes: by the number of heads, all "
                        "else in proportion")
    given, (rates, batches, widths, keep) = grid_flags(parser, argv, {}, "learning_rates", "batch_sizes", "widths", "keep")
    refuse_flags(given, {"learning_rate": "--learning_rates are given"} if rates else {})
    refuse_flags(given, {"batch_tokens": "--batch_sizes are given"} if batches else {})
    refuse_flags(given, {"init_from": "it has one width, and --widths are given"} if widths else {})
    if widths and len(set(batches or [])) > 1:
        raise ValueError(f"--batch_sizes {shlex.join(map(str, batches))} beside --widths: columns are one or the other; give one batch size")
    center, batch = given.pop("learning_rate", None), given.pop("batch_tokens", (batches or [None])[0])
    settings, config, *_ = plan({**given, "learning_rate": center, "batch_tokens": batch})
    kind, sizes = ("width", widths) if widths else ("batch", batches or [settings.batch_tokens])
    columns = {size: at_width(config, size) if widths else {} for size in sorted(set(sizes))}
    if widths:                                                           # rates must be the same for all
        settings = plan({**given, "learning_rate": center, "batch_tokens": batch, **columns[min(columns)]})[0]
    rates = sorted(set(rates or (settings.learning_rate * 2.0 ** power for power in range(-4, 5))))
    if min(rates) <= 0:
        raise ValueError(f"--learning_rates holds {min(rates):g}; each must be above 0")
    if not {"steps", "tokens", "max_seconds"} & set(given):
        given["tokens"] = float(2 ** 20 if device_kind(settings) == "cpu" else 2 ** 25)
    given.setdefault("out", f"sweeps/{settings.preset or Path(settings.init_from).name}" + ("-widths" if widths else ""))
    points = {f"{kind}_{size}-lr_{rate}": (size, rate) for size in columns for rate in rates}
    runs = {name: {"batch_tokens": settings.batch_tokens if widths else size, "learning_rate": rate, **columns[size]}
            for name, (size, rate) in points.items()}
    if widths and settings.optimizer == "muon" and "muon_learning_rate" not in given:     # its default would grow with the width
        for flags in runs.values():
            flags["muon_learning_rate"] = settings.muon_learning_rate / settings.learning_rate * flags["learning_rate"]

    def show(out, results):
        losses = {size: {} for size in columns}
        for name, result in results.items():
            size, rate = points[name]
            losses[size][rate] = result.get("val_loss", result["outcome"])
        print_table(sweep_table(losses, kind))
        print("validation loss in nats per token; *: the best of its " + ("width" if widths else "batch size"))
        draw_sweep(losses, out / "sweep.png", kind)
        return {}

    run_grid("sweep", given, runs, keep, show)


def mean_and_error(values: list[float], weights: list[float] | None = None) -> tuple[float, float | None]:
    """The mean Σwx / Σw, and its standard error √(n / (n-1) Σw²(x - mean)²) / Σw, a ratio's; without weights that is the sample
    standard deviation / √n. Unknown for one value."""
    x, n = np.array(values, dtype=np.float64), len(values)
    w = np.ones(n) if weights is None else np.array(weights, dtype=np.float64)
    mean = float((w * x).sum() / w.sum())
    return mean, float(math.sqrt(n / (n - 1) * (w ** 2 * (x - mean) ** 2).sum()) / w.sum()) if n > 1 else None


def compare(results: dict[str, dict[int, dict]]) -> list[dict]:
    """A row for each variant, of results by variant and seed; the best first, those last of which not all runs finished. The
    difference to base is that of equal seeds, which share the order of the data: much of the noise cancels."""
    rows = []
    for variant, by_seed in results.items():
        done = {seed: result for seed, result in by_seed.items() if "val_loss" in result}
        row = {"variant": variant, "parameters": next(iter(by_seed.values()))["parameters"], "finished": len(done),
               "others": sorted({result["outcome"] for result in by_seed.values() if "val_loss" not in result})}
        rows.append(row)
        if not done:
            continue
        column = lambda name: [result[name] for result in done.values()]
        row["val_loss"], row["val_loss_error"] = mean_and_error(column("val_loss"))
        pairs = [result["val_loss"] - results["base"][seed]["val_loss"] for seed, result in done.items()
                 if "val_loss" in results["base"].get(seed, {})]
        if pairs and variant != "base":
            row["difference"], row["difference_error"] = mean_and_error(pairs)
        row |= {"tokens": round(np.mean(column("tokens"))), "tokens_per_second": float(np.median(column("tokens_per_second"))),
                "memory_bytes": max(column("memory_bytes"))}
    return sorted(rows, key=lambda row: (bool(row["others"]), row.get("val_loss", math.inf)))


def ablate_table(rows: list[dict]) -> list[list[str]]:
    """What `compare` returns, in words."""
    size = lambda row, name, unit="": human(row[name]) + unit if name in row else ""
    loss = lambda row, name, sign="": "" if name not in row else f"{row[name]:{sign}.4f}" + (
        f" ± {row[f'{name}_error']:.4f}" if row[f"{name}_error"] is not None else "")
    return [["variant", "parameters", "tokens", "validation loss", "against base", "tokens/s", "memory", ""]] + [
        [row["variant"], size(row, "parameters"), size(row, "tokens"), loss(row, "val_loss"),
         "(base)" if row["variant"] == "base" else loss(row, "difference", "+"), size(row, "tokens_per_second"),
         size(row, "memory_bytes", "B"), ", ".join(row["others"]) + (f"; {row['finished']} finished" if row["others"] else "")]
        for row in rows]


def chosen_variants(names: list[str] | None, texts: list[str] | None, given: dict) -> dict[str, dict]:
    """The flags by name of base and the variants asked for; none: all but those that change nothing of the `given` flags."""
    lines, own = {"base": VARIANTS["base"]}, [text.partition(":") for text in texts or []]
    for name in names or ([] if own else VARIANTS):
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, 1, 0.3)
            raise ValueError(f"unknown variant {name!r}; " + (f"did you mean {near[0]}? " if near else "")
                             + f"There are {', '.join(VARIANTS)}")
        lines[name] = VARIANTS[name]
    for name, colon, line in own:
        if not colon or not re.fullmatch(r"[\w-]+", name) or name in VARIANTS:
            raise ValueError(f"--variant {name + colon + line!r} needs a new name in front, such as 'wide: --hidden_size 256'")
        lines[name] = line
    variants = {}
    for name, line in lines.items():
        variants[name] = given_flags(settings_parser(f"train.py ablate: variant {name}", ""), shlex.split(line))
        refuse_flags(variants[name], dict.fromkeys(("out", "resume", "stop_after", "seed", "steps", "tokens", "max_seconds"),
                                                   f"variant {name} cannot have its own"))
    made = lambda flags: (lambda s, config, *_: (replace(s, **dict.fromkeys(SHAPE)), config))(*plan({**given, **flags}))
    changes = lambda flags: made(flags) != made({})
    return {name: flags for name, flags in variants.items() if name == "base" or names or own or changes(flags)}


def ablate(argv: list[str]):
    """The command `ablate`: variants of a recipe at equal cost, each with the same seeds."""
    parser = settings_parser("train.py ablate", "Change one thing at a time, with several seeds, at equal FLOPs or in equal time: "
                             "a table of losses with standard errors. --out is the folder of all runs; other flags are passed on "
                             "to each.")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"none: all of {', '.join(VARIANTS)}")
    parser.add_argument("--variant", action="append", metavar="'NAME: FLAGS'", help="one of your own (may be repeated)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, with seeds 0, 1, ... (default: 3)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--flops", type=float, help="of each run; none: base's for a million tokens, 32 million on a GPU")
    budget.add_argument("--seconds", type=float, help="of each run, instead of equal FLOPs: the machine's noise counts too")
    refused = {"seed": "say how many with --seeds"} | dict.fromkeys(("steps", "tokens", "max_seconds"), "give --flops or --seconds")
    given, (names, texts, seeds, flops, seconds, keep) = grid_flags(
        parser, argv, refused, "variants", "variant", "seeds", "flops", "seconds", "keep")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; it must be at least 1")
    variants = chosen_variants(names, texts, given)
    settings, config, length, _ = plan(given)
    given.setdefault("out", f"ablations/{settings.preset or Path(settings.init_from).name}")
    if flops is None:
        flops = flops_per_token(config, length) * (2 ** 20 if device_kind(settings) == "cpu" else 2 ** 25)
    budgets = {name: {"max_seconds": seconds} for name in variants}
    for name, flags in variants.items():
        try:
            settings, config, length, _ = plan({**given, **flags, **budgets[name]} if seconds else {**given, **flags})
        except ValueError as error:
            raise ValueError(f"variant {name}: {error}") from None
        if seconds is not None:
            continue
        one = flops_per_token(config, length) * settings.batch_tokens * (1 - settings.batch_warmup * 17 / 24)
        if not one <= flops < math.inf:
            raise ValueError(f"--flops is {flops:g}; it must be finite, and at least {one:.4g} for a single step of {name}")
        budgets[name] = {"steps": int(flops // one)}
    points = {f"{name}-seed_{seed}": (name, seed) for seed in range(seeds) for name in variants}
    runs = {run: {**variants[name], **budgets[name], "seed": seed} for run, (name, seed) in points.items()}
    cost = f"{human(flops)} FLOPs" if seconds is None else f"{seconds:g} seconds"
    print(f"{len(variants)} variants with {seeds} seed(s), each run of {cost}", flush=True)

    def show(out, results):
        by_variant = {}
        for run, result in results.items():
            by_variant.setdefault(points[run][0], {})[points[run][1]] = result
        rows = compare(by_variant)
        print_table(ablate_table(rows))
        print("validation loss in nats per token, ± standard error over seeds; against base: of runs with equal seeds")
        return {"variants": rows}

    run_grid("ablate", given, runs, keep, show)


# ------------------------------------------------------------------------------------------------------------------
# python train.py

def plot(runs: list[str], out: str):
    """Draw training loss (thin) and validation loss (dots) of runs against tokens, into a picture."""
    curves = {}
    for name in runs:
        path = Path(name, "log.jsonl")
        if not path.exists():
            raise ValueError(f"{name} is no run: it has no log.jsonl")
        curves[name] = read_log(name)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot needs a package that is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, records in curves.items():
        line, = axes.plot([r["tokens"] for r in records], [r["loss"] for r in records], lw=0.6, alpha=0.6)
        validated = [r for r in records if r["val_loss"] is not None]
        axes.plot([r["tokens"] for r in validated], [r["val_loss"] for r in validated], "o-", ms=4, color=line.get_color(),
                  label=Path(name).name + (f": {validated[-1]['val_loss']:.3f}" if validated else ""))
    axes.set(xlabel="tokens", ylabel="loss in nats per token (dots: validation)")
    axes.legend()
    axes.grid(alpha=0.3)
    save_picture(figure, Path(out))


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def settings_parser(prog: str, description: str) -> Parser:
    """A parser with a flag for every field of Settings; what is not given is None."""
    parser = Parser(prog=prog, allow_abbrev=False, description=description)
    for f in fields(Settings):
        kind, text = f.metadata["kind"], f.metadata["text"]
        if kind is bool:
            parser.add_argument(f"--{f.name}", action="store_true", default=None, help=text + f" (--no_{f.name}: not)")
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", default=None, help=argparse.SUPPRESS)
        elif kind is list:
            parser.add_argument(f"--{f.name}", nargs="+", metavar="PATH", help=text)
        else:
            text += f" (default: {f.default})" if f.default is not None else ""
            parser.add_argument(f"--{f.name}", type=kind, metavar=kind.__name__.upper(), help=text)
    return parser


def given_flags(parser: Parser, argv: list[str]) -> dict:
    """The flags that a command line gives, by name."""
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def parse(argv: list[str]) -> tuple[Settings, dict | None]:
    """The settings of a command line; with --resume those of the run, changed where they may be, and its args.json."""
    given = given_flags(settings_parser("train.py", (
        "Train a language model. Without flags: the whole pipeline on the text that Python carries, in about three minutes. `train.py plot "
        "RUN...` draws loss curves, `train.py sweep` and `train.py ablate` make many runs and compare them, `train.py coordinates` "
        "checks µP, `train.py bench` measures the speed.")), argv)
    if "resume" not in given:
        return Settings(**given), None
    path = Path(given["resume"], "args.json")
    if not path.exists():
        raise ValueError(f"--resume {given['resume']}: there is no run here (no args.json)")
    saved = read_json(path)
    missing = {"data", "preset", "seed", "config", "sources", "data_fingerprint"} - set(saved)
    if missing:
        raise ValueError(f"{path} has no {sorted(missing)[0]}; it is not what this version of train.py writes, which cannot resume it: "
                         f"--init_from {given['resume']} starts a new run from its weights")
    saved = {**asdict(Settings()), **saved}                              # settings that have come since then
    for name in sorted(FIXED & set(given)):
        if given[name] != saved[name]:
            raise ValueError(f"--resume {given['resume']}: --{name} {given[name]} contradicts the run, whose {name} is "
                             f"{saved[name]}; leave it out, or start a new run")
    if "out" in given:
        raise ValueError("--resume writes to the run's own folder; leave --out out")
    budgets = ("steps", "tokens", "max_seconds")
    if "learning_rate" in given:                                         # one dial for both
        given.setdefault("muon_learning_rate", None)
    kept = {f.name: saved[f.name] for f in fields(Settings) if f.name not in ("stop_after", "out", "wandb")}
    if any(name in given for name in budgets):
        kept |= dict.fromkeys(budgets)                                   # a new budget replaces the old one
    return Settings(**{**kept, **given}), saved


def guarded(program: str, work: Callable):
    """work(); what the user can mend ends in one line on standard error and exit code 2, a run that fails by itself in 1."""
    rank = int(os.environ.get("RANK", 0))

    def fail(code, error):
        # usually all ranks fail alike: the first one prints, and torchrun then ends the others, while they sleep
        if int(os.environ.get("LOCAL_RANK", 0)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(1)
        print(f"{program}: {f'rank {rank}: ' if rank else ''}{describe(error)}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            sys.stdout.flush()
            os._exit(code)                                               # an exit by the book may wait for the others, or abort
        sys.exit(code)

    try:
        work()
        gc.collect()                                                     # a process group that lives on at exit can end in an abort
    except KeyboardInterrupt:
        fail(130, ValueError("interrupted; what was written before is as it was"))
    except FloatingPointError as error:
        fail(1, error)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection (closed|reset)", str(error))):
            raise
        fail(1, ValueError(f"rank {rank} lost another rank, whose own error stands elsewhere ({str(error).splitlines()[0]:.100})"))
    except (ValueError, OSError) as error:
        fail(2, error)


def command_line():
    """A run, or `plot`, `sweep`, `ablate`, `coordinates`, `bench`."""
    if sys.argv[1:2] == ["plot"]:
        parser = Parser(prog="train.py plot", allow_abbrev=False, description="Draw loss curves of runs (needs matplotlib).")
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
        parser.add_argument("--out", default="loss.png", help="the picture (default: loss.png)")
        args = parser.parse_args(sys.argv[2:])
        return plot(args.runs, args.out)
    if sys.argv[1:2] in (["sweep"], ["ablate"], ["coordinates"], ["bench"]):
        return {"sweep": sweep, "ablate": ablate, "coordinates": coordinates, "bench": bench}[sys.argv[1]](sys.argv[2:])
    settings, saved = parse(sys.argv[1:])
    out = train(settings, saved)
    gc.collect()
    if out and int(os.environ.get("RANK", 0)) == 0 and settings.data is None and "FLATLM_GRID" not in os.environ:
        prompts = ("import os\n", "def __init__(self", "class Error(Exception):")
        run("sample.py", "--model", out, *(word for text in prompts for word in ("--prompt", text)), "--max_new_tokens", 100,
            "--temperature", 0.7, "--seed", 1)


def main():
    """The command line."""
    guarded("train.py", command_line)


if __name__ == "__main__":
    main()
