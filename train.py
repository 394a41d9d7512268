"""
Training: tokens in, a model folder out.

`torchrun train.py` with nothing else runs the whole pipeline on the text that Python carries: it calls data.py and bpe.py
(and shows the commands), trains a small model for two and a half minutes, measures it, and lets sample.py speak. With --data
it trains on a text file of yours, or on a folder of tokens (train.npy, val.npy, tokenizer.json) that bpe.py wrote.

    torchrun train.py                                                   # one process; --nproc_per_node=8 for eight
    torchrun train.py --data book.txt --preset tinystories --steps 2000
    torchrun train.py --resume runs/NAME                                # after Ctrl-C, kill -9, or to extend a run
    torchrun --nproc_per_node=8 train.py --parallel fsdp                # weights, gradients and moments divided over eight GPUs
    python train.py plot runs/*                                         # loss curves

The file goes in the order of a run: settings, optimizer, learning rate, batches, earlier stages, checkpoints, evaluation,
the loop. Three promises hold it together. The batch at a step depends on the seed and the step alone, so neither the
number of processes nor an interruption changes what is learned. Nothing waits for the device inside a step: losses are
read one step late. And every file appears by a rename, so that a kill at any moment leaves a run that can be resumed.

A run folder is a Hugging Face model folder plus args.json, log.jsonl (one object per logged step) and state/ (what
--resume reads). Who holds what of the model when there are several ranks is ddp.py's affair. Left out so far: Muon, several
weighted sources, fused kernels.
"""
import ctypes
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
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from bpe import Tokenizer
from ddp import DDP, FSDP, ShardedOptimizer, bounds, gradient_norm, mesh, tensor_parallel, unsplit
from model import (Parser, Transformer, flops_per_token, human, load_pretrained, num_parameters, preset, read_json,
                   save_pretrained, write_atomically)


# ------------------------------------------------------------------------------------------------------------------
# Settings: every field is a flag

def flag(kind, default, text):
    """A dataclass field that the command line shows: its type, its default, its sentence."""
    return field(default=default, metadata={"kind": kind, "text": text})


@dataclass
class Settings:
    """What a run depends on. The command line is made from these fields; args.json keeps them."""
    # what to train on, and what
    data: list = flag(list, None, "text files (.txt, .jsonl, .gz), or one folder with train.npy; none: Python's own text")
    vocab_size: int = flag(int, 4096, "size of the tokenizer that is trained when --data is text")
    preset: str = flag(str, None, "shape of the model, see `python model.py`; none: tiny on a CPU, mini on a GPU")
    hidden_size: int = flag(int, None, "instead of the preset's")
    num_hidden_layers: int = flag(int, None, "instead of the preset's")
    num_attention_heads: int = flag(int, None, "instead of the preset's")
    num_key_value_heads: int = flag(int, None, "instead of the preset's")
    intermediate_size: int = flag(int, None, "instead of the preset's")
    initializer: str = flag(str, None, "fan_in or glorot (the course's); none: the preset's")
    sequence_length: int = flag(int, None, "tokens per sequence; none: the model's longest")
    init_from: str = flag(str, None, "start from the model in this folder, with its shape and tokenizer")
    # how long: one of three
    steps: int = flag(int, None, "number of optimizer steps")
    tokens: float = flag(float, None, "number of tokens, such as 1e9; rounded up to whole steps")
    max_seconds: float = flag(float, None, "seconds of training by the clock (none of the three: 150; on a GPU four epochs)")
    # how
    batch_tokens: int = flag(int, None, "tokens per optimizer step, over all ranks; none: 2048 on a CPU, 65536 on a GPU")
    micro_batch_size: int = flag(int, None, "sequences per forward pass on a rank; the rest is accumulated")
    learning_rate: float = flag(float, None, "peak learning rate; none: 0.5 / hidden_size")
    final_learning_rate: float = flag(float, 0.0, "learning rate at the end")
    schedule: str = flag(str, "cosine", "cosine, or wsd: warm up, stay, decay linearly")
    warmup: float = flag(float, 0.05, "share of the budget over which the learning rate rises")
    decay: float = flag(float, 0.2, "share of the budget over which wsd decays")
    weight_decay: float = flag(float, 0.1, "decay of matrices; vectors are left alone")
    beta1: float = flag(float, 0.9, "AdamW's average of gradients")
    beta2: float = flag(float, 0.95, "AdamW's average of squared gradients")
    clip: float = flag(float, 1.0, "largest global norm of the gradient")
    max_skipped: int = flag(int, 25, "give up after this many non-finite steps in a row")
    seed: int = flag(int, 0, "of the weights and of the order of the data")
    # where
    device: str = flag(str, None, "cuda, mps or cpu; none: the first of these that is there")
    dtype: str = flag(str, None, "bfloat16 or float32 for matrix products; none: what the device is faster in")
    compile: bool = flag(bool, False, "compile the model with torch.compile")
    workers: int = flag(int, None, "processes that tokenize; none: all cores")
    parallel: str = flag(str, "ddp", "what ranks share, beside the batch: ddp (nothing), zero1 (optimizer state), fsdp (everything)")
    tensor_parallel: int = flag(int, 1, "ranks that divide every matrix among them; the others divide the batch")
    # what is kept
    out: str = flag(str, None, "run folder; none: runs/PRESET-DATE-TIME")
    resume: str = flag(str, None, "continue the run in this folder, with its settings")
    log_every: int = flag(int, 10, "steps between lines of log.jsonl")
    eval_every: int = flag(int, None, "steps between evaluations; none: ten in a run")
    eval_tokens: int = flag(int, 65536, "validation tokens per evaluation; the last one takes them all")
    save_every: int = flag(int, None, "steps between checkpoints; none: with every evaluation")
    stop_after: int = flag(int, None, "stop at this step as if interrupted")
    wandb: bool = flag(bool, False, "log to Weights & Biases too, if it is installed")


# A resumed run may change these freely: how long, where and how often, not what it is.
FREE = set("steps tokens max_seconds device compile workers out resume log_every eval_every eval_tokens save_every "
           "stop_after wandb micro_batch_size max_skipped parallel tensor_parallel".split())
# What a flag may change of a preset.
SHAPE = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size initializer".split()
# Changing one of these makes it another run.
FIXED = {*SHAPE, *"data vocab_size preset sequence_length init_from batch_tokens seed".split()}


# ------------------------------------------------------------------------------------------------------------------
# Optimizer, clipping, learning rate

class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101):

        m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
        p ← p - lr · wd · p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        """One update. Where `skip`, a boolean on the parameters' device, is true, nothing changes, t included."""
        if skip is None or skip.device.type != "cpu":
            self.update(skip)
        elif not skip:                                                   # a CPU's host need not wait to know
            self.update(None)

    @torch.no_grad()
    def update(self, skip: Tensor | None):
        """The formulas; with `skip` its outcome is decided on the device, which spares the host from waiting for it."""
        for group in self.param_groups:
            lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                go = 1.0 if skip is None else (~skip).float()           # 1, or 0 to leave everything as it is
                state["step"] += go
                m, v = state["exp_avg"], state["exp_avg_sq"]
                t = state["step"].clamp(min=1)                           # 0 while every step so far was skipped
                gradient = p.grad.float() if skip is None else p.grad.float().where(~skip, 0)
                m.lerp_(gradient, (1 - beta1) * go)
                v.lerp_(gradient.square(), (1 - beta2) * go)
                p.mul_(1 - lr * group["weight_decay"] * go)
                p.addcdiv_(m * (-lr * go / (1 - beta1 ** t)), (v / (1 - beta2 ** t)).sqrt_().add_(eps))


def decay_groups(module, matrices: set[str], weight_decay: float) -> list[dict]:
    """Parameter groups in which `matrices`, given by name (a shard does not show its shape), decay and all others (norms,
    biases) do not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [{"params": [p for name, p in named if name in matrices], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name not in matrices], "weight_decay": 0.0}]


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
    """The tokens of a .npy file, mapped from disk, cut into sequences that follow one another without overlap.

    Training reads an endless stream of them: all in the order of a permutation keyed by (seed, 0), then all in that of
    (seed, 1), and so on. ValueError when there is no whole sequence, or the file is not what bpe.py writes."""

    def __init__(self, path, sequence_length: int, seed: int = 0):
        self.path, self.sequence_length, self.seed = Path(path), sequence_length, seed
        self.tokens = map_tokens(path)
        if len(self) < 1:
            raise ValueError(f"{path} holds {len(self.tokens)} tokens, too few for one sequence of {sequence_length} and "
                             f"its last target; give more text or a shorter --sequence_length")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def sequences(self, indices) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (n, S) of int64; targets are the inputs one position on."""
        rows = np.stack([self.tokens[i * self.sequence_length:(i + 1) * self.sequence_length + 1] for i in indices])
        rows = torch.from_numpy(rows.astype(np.int64))                   # (n, S + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Sequences number first .. first + count - 1 of the stream."""
        numbers = np.arange(first, first + count)
        epochs = numbers // len(self)
        indices = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(numbers[here] % len(self), len(self), [self.seed, int(epoch)])
        return self.sequences(indices)

    def largest(self) -> int:
        """The largest token id, read in pieces so that memory stays small."""
        return max(int(self.tokens[i:i + 2 ** 24].max()) for i in range(0, len(self.tokens), 2 ** 24))

    def fingerprint(self) -> str:
        """A hash of the length and of up to 64 pieces spread over the file: enough to notice that the data changed."""
        digest = hashlib.sha256(str(len(self.tokens)).encode())
        for i in np.linspace(0, max(0, len(self.tokens) - 4096), 64).astype(int):
            digest.update(np.ascontiguousarray(self.tokens[i:i + 4096]).tobytes())
        return digest.hexdigest()[:16]


def map_tokens(path) -> np.ndarray:
    """The tokens of a .npy file as a memory map; ValueError when it is not a whole, one-dimensional array of ids."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        raise ValueError(f"{path} is not a .npy file, or is cut short; make it again with `python bpe.py encode`") from None
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; token ids are one dimension of unsigned "
                         "integers, as `python bpe.py encode` writes them")
    return tokens


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


def prepare(settings: Settings) -> Path:
    """The folder of tokens to train on. Text goes through data.py and bpe.py into corpus/, one folder per text; a stage
    runs when what it writes is missing, half there or changed since, when its command has changed, or when an earlier one ran."""
    sources = settings.data or []
    for source in sources:
        if not os.path.exists(source):
            raise ValueError(f"--data {source}: there is no such file or folder")
    if any(os.path.isdir(source) for source in sources):
        folder = Path(sources[0])
        if len(sources) > 1:
            raise ValueError(f"--data takes text files, or one folder of tokens; it was given {' '.join(sources)}")
        for name in ("train.npy", "val.npy"):
            if not (folder / name).exists():
                raise ValueError(f"--data {folder}: there is no {name}; make it with `python bpe.py encode`, or give text files")
        return folder
    # a text's folder is named after its path, size and date: when it changes, a new one is made
    stamp = hashlib.sha256(repr([(os.path.abspath(s), os.path.getsize(s), os.path.getmtime(s)) for s in sources]).encode())
    name = f"{Path(sources[0]).name.split('.')[0]}-{stamp.hexdigest()[:8]}" if sources else "local"
    if settings.init_from:
        name += "-" + Path(settings.init_from).name
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
    if settings.init_from:                                               # a trained model brings its own tokenizer
        stages[1] = (None, [tokenizer])
    # commands.json says what was run and what came of it: a file that was changed by hand since is made again, and so is
    # all that follows. It is cut back before a stage runs, so that a stage that is interrupted counts as not run.
    record, stale = folder / "commands.json", False
    done = read_json(record) if whole(record) else {}
    for number, (command, outputs) in enumerate(stages):
        made = lambda: {"command": [str(word) for word in command or [settings.init_from]],
                        "outputs": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in outputs]}
        if stale or not all(map(whole, outputs)) or done.get(str(number)) != made():
            stale, done = True, {key: value for key, value in done.items() if int(key) < number}
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(done, indent=2).encode())
            try:
                if command:
                    run(*command)
                else:
                    write_atomically(tokenizer, Path(settings.init_from, "tokenizer.json").read_bytes())
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What utilization is measured against, in FLOP/s: the data sheet's figure for bfloat16 on a GPU that has one here,
    the best of a few products of large matrices elsewhere."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for chip, flops in DATA_SHEET.items():
            if re.search(rf"\b{chip}\b", name):
                return flops
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ b)[0, 0].item()                                             # reading a number waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def keep_freed_memory():
    """Have malloc keep large freed blocks. By default glibc returns them to the system, and every step pays again for
    the page faults of every activation: a third of a CPU step's time here."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3                          # names of the two dials in malloc.h
        mallopt(mmap_threshold, 2 ** 30)
        mallopt(trim_threshold, 2 ** 31 - 1)


def pick_device(settings: Settings, ranks: "Ranks") -> torch.device:
    """The device of this rank, made ready: the fastest kind that is there, unless --device says which."""
    kind = settings.device or ("cuda" if torch.cuda.is_available() else
                               "mps" if torch.backends.mps.is_available() else "cpu")
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device is {kind!r}; it must be cuda, mps or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device is mps, and this machine has none; take cpu")
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
    """What this rank keeps of a parameter: `tensor`, under which the optimizer has its state, from number `first` on of the
    flattened local tensor of `shape`. With tensor parallelism that one begins at `start` of dimension `dim`, of `size`."""
    tensor: Tensor
    first: int
    shape: tuple
    dim: int = 0
    start: int = 0
    size: int | None = None


def parts_of(model, parallel, optimizer, shapes: dict, divided: dict, tensor_group) -> dict[str, Part]:
    """This rank's part of every parameter, by name. shapes: of the local tensors; divided: see ddp.tensor_parallel."""
    if isinstance(parallel, FSDP):
        held = [(name, shard.parameter, shard.parts[shard.rank][0]) for name, shard in parallel.shards().items()]
    elif isinstance(optimizer, ShardedOptimizer):
        names = {p: name for name, p in model.named_parameters()}
        held = [(names[p], piece, first) for p, first, piece in optimizer.pieces]
        held += [(name, p, 0) for name, p in model.named_parameters() if not p.requires_grad]
    else:
        held = [(name, p, 0) for name, p in model.named_parameters()]
    place = lambda name: (divided[name][0], bounds(divided[name][1], tensor_group)[0], divided[name][1]) if name in divided else ()
    return {name: Part(tensor, first, tuple(shapes[name]), *place(name)) for name, tensor, first in held}


def save_checkpoint(folder, parts: dict[str, Part], optimizer: torch.optim.Optimizer, step: int, rank: int = 0, **progress) -> str:
    """Write this rank's parts after `step`, weights and optimizer state by parameter name, and the numbers in `progress`,
    into folder/state; returns the file's name. It counts when `seal_checkpoint` has named it."""
    state = Path(folder, "state")
    state.mkdir(parents=True, exist_ok=True)
    name = f"step_{step}.rank_{rank}.pt"
    # on the host; torch.save would write all that a view looks at
    own = lambda t: t.cpu() if t.device.type != "cpu" else t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
    content = {"step": step, "progress": progress, "parts": {
        name: {**vars(part), "tensor": own(part.tensor.detach()),
               "state": {key: own(value) for key, value in optimizer.state.get(part.tensor, {}).items()}}
        for name, part in parts.items()}}
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
def load_checkpoint(folder, weights: dict[str, Part] = {}, states: dict[str, Part] = {},
                    optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Read the newest whole state of a run, whatever number of ranks and strategy wrote it: each parameter is put together
    from the files, and this rank takes its part, of the weights and of the optimizer's state. Returns step and progress.
    ValueError when there is none, or it is another model's."""
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
        if "parts" not in contents[-1]:
            raise ValueError(f"{path} was written by an earlier version of train.py, and cannot be resumed; --init_from {folder} "
                             "starts a new run from its weights")

    def pieces(name, part):
        found = [content["parts"][name] for content in contents if name in content["parts"]]
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
        return local.reshape(-1)[part.first:part.first + part.tensor.numel()].view_as(part.tensor).to(part.tensor.device)

    for name, part in weights.items():
        found, shape = pieces(name, part)
        part.tensor.copy_(take(name, part, found, shape, [piece["tensor"] for piece in found]))
    for name, part in states.items():
        found, shape = pieces(name, part)
        for key, value in found[0]["state"].items():                     # a number for all, or one for each number of the parameter
            optimizer.state[part.tensor][key] = value.to(part.tensor.device, copy=True) if value.dim() == 0 else take(
                name, part, found, shape, [piece["state"][key] for piece in found])
    return {key: contents[0][key] for key in ("step", "progress")}


def whole_weights(model, parallel, divided: dict, ranks: "Ranks") -> dict[str, Tensor]:
    """All weights on the first rank, gathered from those that share them; the other ranks get what they need not keep."""
    tensors = parallel.full_state_dict(only_rank=0) if isinstance(parallel, FSDP) else model.state_dict()
    if ranks.data_rank == 0:
        for name, (dim, size) in divided.items():
            tensors[name] = unsplit(tensors[name].to(model.cos.device), dim, size, ranks.tensor).cpu()
    return tensors


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
             limit: int | None = None, ranks: "Ranks | None" = None) -> tuple[float, float | None]:
    """Mean loss in nats per token over `data`, the work shared out over the ranks, and bits per byte: the same nats, in
    bits, over the bytes that the target tokens stand for.

    `limit`: about so many tokens, in sequences spread evenly over the file, stand for all. bytes_of (V): the bytes of each
    token; without it there is no second figure."""
    device = model.cos.device
    rank, count = (ranks.data_rank, ranks.data_count) if ranks else (0, 1)
    sequences = min(len(data), max(1, limit // data.sequence_length)) if limit else len(data)
    chosen = np.linspace(0, len(data) - 1, sequences).astype(int)
    mine, rounds = chosen[rank::count], -(-sequences // count)            # ranks that share weights make equally many passes
    total = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for i in tqdm(range(0, rounds, batch_size), desc="validation", leave=False, disable=None if not ranks or ranks.rank == 0 else True):
        part = mine[i:i + batch_size]
        tokens, targets = data.sequences(part if len(part) else chosen[:1])
        size = bytes_of[targets].sum().item() if bytes_of is not None else 0
        with autocast():
            loss = model(tokens.to(device), targets.to(device))
        if len(part):
            total += torch.stack([loss.to(total) * targets.numel(), total.new_tensor(targets.numel()), total.new_tensor(size)])
    if count > 1:
        dist.all_reduce(total, group=ranks.data)
    nats, tokens, size = total.tolist()
    return nats / tokens, nats / math.log(2) / size if size else None


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of every token (V); 0 for special tokens, which stand for no text."""
    special = set(tokenizer.special_tokens.values())
    return torch.tensor([0 if i in special else len(tokenizer.vocab.get(i, b"")) for i in range(vocab_size)])


# ------------------------------------------------------------------------------------------------------------------
# The loop

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

    def __init__(self, out: Path | None, settings: Settings, bar, wandb, clock, device, tokens_per_step, flops, peak):
        self.out, self.settings, self.bar, self.wandb, self.clock, self.device = out, settings, bar, wandb, clock, device
        self.tokens_per_step, self.flops, self.peak = tokens_per_step, flops, peak
        self.late, self.record, self.written, self.durations, self.mark = None, {}, True, [], time.perf_counter()
        self.validated = ""

    def put(self, *numbers):
        """Hand in (step, learning rate, loss, gradient norm, skipped steps) of a step just launched."""
        step, rate, *tensors = numbers
        values, copied = torch.cat([t.detach().float().reshape(-1) for t in tensors]), None
        if self.device.type == "cuda":                                   # copied when the device gets there; nobody waits
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        late, self.late = self.late, (step, rate, values, copied)
        if late:
            self.read(*late)
        if self.device.type == "cpu":                                    # its steps are done when they return
            self.catch_up()

    def catch_up(self):
        """Read the latest step too, and wait for it: before an evaluation, a checkpoint, the end."""
        late, self.late = self.late, None
        if late:
            self.read(*late)

    def read(self, step, rate, values, copied):
        """Wait for a step's numbers, not for the step that was launched after it, and show them."""
        self.write()
        if copied:
            copied.synchronize()
        loss, norm, skipped, in_a_row = values.tolist()
        now = time.perf_counter()
        self.durations = [*self.durations, now - self.mark][-self.settings.log_every:]
        self.mark = now
        speed = self.tokens_per_step * len(self.durations) / sum(self.durations)
        mfu = speed * self.flops / self.peak
        self.record, self.written = {
            "step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.clock(), 3), "loss": loss,
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
                "eval_every eval_tokens save_every stop_after vocab_size max_skipped workers tensor_parallel").split()
    for name in positive:
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            raise ValueError(f"--{name} is {getattr(s, name)}; it must be above 0")
    for name in ("final_learning_rate", "weight_decay", "seed", "warmup", "decay", "beta1", "beta2"):
        if getattr(s, name) < 0:
            raise ValueError(f"--{name} is {getattr(s, name)}; it must not be negative")
    for name, fine in {"warmup": s.warmup <= 1, "decay": s.decay <= 1, "beta1": s.beta1 < 1, "beta2": s.beta2 < 1}.items():
        if not fine:
            raise ValueError(f"--{name} is {getattr(s, name)}; it must lie between 0 and 1")
    for name, choices in {"schedule": ("cosine", "wsd"), "dtype": (None, "bfloat16", "float32"), "parallel": ("ddp", "zero1", "fsdp")}.items():
        if getattr(s, name) not in choices:
            raise ValueError(f"--{name} is {getattr(s, name)!r}; it must be {' or '.join(filter(None, choices))}")
    return s


def make_model(settings: Settings, tokens: Path) -> Transformer:
    """A fresh model of the preset's shape with the tokenizer's vocabulary, or the one of --init_from."""
    tokenizer = Tokenizer.load(tokens / "tokenizer.json") if (tokens / "tokenizer.json").exists() else None
    if settings.init_from:
        model = load_pretrained(settings.resume or settings.init_from).float()
        theirs = Path(settings.init_from, "tokenizer.json")
        if tokenizer is not None and theirs.exists() and Tokenizer.load(theirs).vocab != tokenizer.vocab:
            raise ValueError(f"{tokens} was tokenized with another vocabulary than that of {settings.init_from}; "
                             f"encode the text again with --tokenizer {theirs}")
        longest = model.config.max_position_embeddings
        if (settings.sequence_length or 0) > longest:
            raise ValueError(f"--sequence_length {settings.sequence_length} exceeds the {longest} positions of {settings.init_from}")
        return model
    given = {name: getattr(settings, name) for name in SHAPE if getattr(settings, name) is not None}
    derived = {}                                                         # what follows from a changed shape, unless given too
    if "hidden_size" in given or "num_attention_heads" in given:
        derived = {"head_dim": None, "num_key_value_heads": None}
    if "hidden_size" in given:
        derived["intermediate_size"] = None
    if settings.sequence_length:
        derived["max_position_embeddings"] = settings.sequence_length
    if tokenizer is not None:
        derived |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    torch.manual_seed(settings.seed)
    return Transformer(replace(preset(settings.preset), **{**derived, **given}))


def split_batch(settings: Settings, sequence_length: int, ranks: int, largest: int) -> tuple[int, int]:
    """Sequences per batch, over all ranks, and per forward pass of one rank (`largest` at most, unless it is given)."""
    sequences, rest = divmod(settings.batch_tokens, sequence_length)
    if rest or not sequences:
        raise ValueError(f"--batch_tokens {settings.batch_tokens} is no multiple of the sequence length {sequence_length}; "
                         f"{max(1, round(settings.batch_tokens / sequence_length)) * sequence_length} is")
    if sequences % ranks:
        raise ValueError(f"a batch of {sequences} sequences ({settings.batch_tokens} tokens) cannot be split evenly over "
                         f"{ranks} ranks; make --batch_tokens a multiple of {ranks * sequence_length}")
    share = sequences // ranks
    micro = settings.micro_batch_size or max(n for n in range(1, min(share, largest) + 1) if share % n == 0)
    if share % micro:
        raise ValueError(f"--micro_batch_size {micro} does not divide the {share} sequences that a rank has of a batch")
    return sequences, micro


def open_run(s: Settings, saved: dict | None, tokens_folder: Path, fingerprint: str, device: torch.device) -> tuple[Path, dict, float]:
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
    peaks = {dtype: peak_flops(device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    dtype = s.dtype or max(peaks, key=peaks.get)
    return out, {**asdict(s), "dtype": dtype, "tokens_folder": str(tokens_folder.resolve()), "data_fingerprint": fingerprint}, peaks[dtype]


def cut_log(out: Path, step: int):
    """Drop what was logged after `step`, and a line cut short by a kill: a resumed run logs it again."""
    if (out / "log.jsonl").exists():
        kept = [json.dumps(record) + "\n" for record in read_log(out) if record["step"] <= step]
        write_atomically(out / "log.jsonl", "".join(kept).encode())


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.jsonl; a last line that a kill cut short does not count."""
    path = Path(folder, "log.jsonl")
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
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


def explain_changes(say, s: Settings, saved: dict, step: int, seconds: float, tokens_per_step: int):
    """Say what a resumed run does otherwise than before."""
    for name in (f.name for f in fields(Settings)):
        if name not in FREE | FIXED and saved[name] != getattr(s, name):
            say(f"from step {step} on, {name} is {getattr(s, name)} and no longer {saved[name]}")

    def budget(d):
        """In words, and the learning rate now if the schedule is laid over it."""
        total = d["max_seconds"] or d["steps"] or math.ceil(d["tokens"] / tokens_per_step)
        rate = learning_rate(seconds if d["max_seconds"] else step, total, s.learning_rate, s.warmup * total,
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

    # --- data, model, optimizer
    at_hand = saved is not None and Path(saved["tokens_folder"], "train.npy").exists()   # a run outlives the text it came from
    tokens_folder = Path(saved["tokens_folder"]) if at_hand else ranks.from_first(lambda: prepare(s))
    model = make_model(s, tokens_folder)
    config, length = model.config, s.sequence_length or model.config.max_position_embeddings
    training, validation = (TokenDataset(tokens_folder / name, length, s.seed) for name in ("train.npy", "val.npy"))
    for data in (training, validation):
        if (largest := data.largest()) >= config.vocab_size:
            raise ValueError(f"{data.path} holds the token {largest}, beyond the model's vocabulary of {config.vocab_size}; "
                             "was it made with another tokenizer?")
    s.learning_rate = s.learning_rate or 0.5 / config.hidden_size        # 4e-3 at width 128, 6.5e-4 at GPT-2's 768
    if s.steps is None and s.tokens is None and s.max_seconds is None:
        s.tokens = 4.0 * len(training.tokens)                            # more epochs teach little (arXiv 2305.16264)
    batch, micro = split_batch(s, length, ranks.data_count, 32 if device.type == "cuda" else 8)
    share = batch // ranks.data_count                                    # sequences of a batch that this rank sees
    by_clock = s.max_seconds is not None
    total = s.max_seconds if by_clock else s.steps or math.ceil(s.tokens / (batch * length))
    matrices = {name for name, p in model.named_parameters() if p.dim() >= 2}
    divided = tensor_parallel(model, ranks.tensor, device) if s.tensor_parallel > 1 else {}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    out, args, peak = ranks.from_first(lambda: open_run(s, saved, tokens_folder, training.fingerprint(), device))
    bfloat16 = args["dtype"] == "bfloat16"

    # --- who holds what of it (see ddp.py)
    options = dict(lr=s.learning_rate, betas=(s.beta1, s.beta2))
    if s.parallel == "fsdp":                                             # a layer travels in bfloat16, its gradients in float32
        parallel = FSDP(model, torch.bfloat16 if bfloat16 else None, torch.float32, ranks.data, device=device)
    else:
        parallel = DDP(model.to(device), group=ranks.data) if ranks.data_count > 1 else model.to(device)
    make = AdamW if s.parallel != "zero1" else lambda groups, **options: ShardedOptimizer(groups, AdamW, ranks.data, **options)
    optimizer = make(decay_groups(model, matrices, s.weight_decay), **options)
    places = lambda optimizer: parts_of(model, parallel, optimizer, shapes, divided, ranks.tensor)
    parameters = dict(model.named_parameters())
    split = {parameters[name] for name in divided if name in parameters}    # a tied head is listed under the embedding's name
    if s.compile and parallel is not model:          # by layers: one graph would hand over all gradients at its end, and nothing
        for layer in model.model["layers"]:          # could be sent before
            layer.forward = torch.compile(layer.forward)
    forward = torch.compile(model) if s.compile and parallel is model else parallel

    # --- the run folder, new or resumed
    step, seconds, skipped = 0, 0.0, 0
    if saved is not None:
        content = load_checkpoint(out, places(None), places(optimizer), optimizer)
        step, seconds, skipped = content["step"], content["progress"]["seconds"], content["progress"]["skipped"]
        if (seconds if by_clock else step) >= total:
            say(f"{out} is finished ({step} steps, {seconds:.0f} seconds); a larger --steps or --max_seconds extends it")
            return ranks.stop()
        explain_changes(say, s, saved, step, seconds, batch * length)
    tokenizer = tokens_folder / "tokenizer.json"
    tokenizer_json = tokenizer.read_bytes() if tokenizer.exists() else None  # the run's own from now on, whatever becomes of corpus/
    if first:
        cut_log(out, step)
        write_atomically(out / "args.json", json.dumps(args, indent=2).encode())
    bytes_of = token_bytes(Tokenizer.load(tokenizer), config.vocab_size) if tokenizer.exists() else None
    # FSDP gathers weights in bfloat16, so that all is computed in it, the residual stream too
    autocast = lambda: torch.autocast(device.type, torch.bfloat16) if bfloat16 and s.parallel != "fsdp" else nullcontext()
    say(f"model    {human(num_parameters(config))} parameters ({human(num_parameters(config, False))} without embedding and "
        f"head): {config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary {config.vocab_size}\n"
        f"data     {len(training.tokens):,} tokens to train on, {len(validation.tokens):,} to validate, in {tokens_folder}\n"
        f"batch    {batch} sequences of {length} tokens: {ranks.data_count} rank(s) x {share // micro} forward pass(es) x {micro}\n"
        + (f"ranks    {ranks.count}: {s.parallel} over {ranks.data_count}, matrices divided over {s.tensor_parallel}\n" if ranks.count > 1 else "") +
        f"machine  {device.type}, {args['dtype']}, {peak / 1e12:.3g} TFLOP/s at best\n"
        f"budget   " + (f"{total:g} seconds" if by_clock else f"{total} steps, {human(total * batch * length)} tokens")
        + f", from step {step}; run folder {out}", flush=True)

    # --- one step after the other
    clock_start = time.perf_counter() - seconds
    clock = lambda: time.perf_counter() - clock_start                    # seconds of training, those before a resume too
    position, step_before = seconds if by_clock else step, step          # how much of `total` is used up
    bar = tqdm(total=math.ceil(total), initial=int(position), disable=not first,
               mininterval=0.2 if sys.stderr.isatty() else 15, unit="s" if by_clock else "steps",
               bar_format="{percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]")
    # from pinned memory a copy runs beside the computation
    to_device = lambda t: t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
    wandb = start_wandb(args, out) if s.wandb and first else None
    meter = Meter(out, s, bar, wandb, clock, device, batch * length, flops_per_token(config, length), peak * ranks.count)
    skipped = torch.tensor([skipped, 0], device=device)                  # steps that were not finite: all, and the latest in a row
    interrupt = Interrupt()

    def save():
        meter.catch_up()
        meter.write()
        if saved is not None and step == step_before:                    # there already; other ranks would overwrite it file by file
            return
        tensors = whole_weights(model, parallel, divided, ranks)
        writes = ranks.data_rank == 0 or s.parallel != "ddp"             # under DDP the others have the same

        def finish(files):
            seal_checkpoint(out, step, files)
            export(model, tensors, out, tokenizer_json)

        try:
            files = ranks.everywhere(lambda: save_checkpoint(out, places(optimizer), optimizer, step, ranks.rank, seconds=clock(),
                                                             skipped=int(skipped[0])) if writes else None)
            ranks.from_first(lambda: finish([name for name in files if name]))
        except OSError as error:
            if writes and not any(f"step_{step}." in name for name in saved_files(out)):
                (out / "state" / f"step_{step}.rank_{ranks.rank}.pt").unlink(missing_ok=True)
            raise OSError(f"step {step} could not be saved: {describe(error)}. {last_checkpoint(out)}") from None
        meter.mark = time.perf_counter()

    with bar:                                                            # closed before an error is told
        while True:
            # rank 0's clock and anybody's signal hold for all, or the ranks would leave the loop at different steps
            # 0 to go on, 1 to stop here, 2 and more for a signal's number
            stop = interrupt.signal or int(s.stop_after is not None and step >= s.stop_after)
            half = meter.durations[-1] / 2 if meter.durations else 0.0   # half of a step, in seconds
            stop, seconds, half = ranks.agree(stop, clock() if first else 0.0, half if first else 0.0)
            before, position = position, seconds if by_clock else step
            bar.update(min(int(position), bar.total) - bar.n)
            started = step > step_before                                 # at least one step is made, and nothing is done twice
            due = lambda every: started and (step % every == 0 if every else int(10 * position / total) > int(10 * before / total))
            if due(s.eval_every) and position < total and stop < 2:      # a signal is in a hurry, --stop_after is not
                meter.catch_up()
                meter.validate(*evaluate(model, validation, bytes_of, micro, autocast, s.eval_tokens, ranks))
            if stop or started and position >= total:
                break
            pause = due(s.eval_every) or due(s.save_every)
            if due(s.save_every):
                save()
            if pause and by_clock:                                       # evaluating and saving used up time too
                position, = ranks.agree(clock() if first else 0.0)

            # a step's rate is taken at its middle, so that neither the first nor the last is zero
            middle = position + (half if by_clock else 0.5)
            rate = learning_rate(middle, total, s.learning_rate, s.warmup * total, s.final_learning_rate, s.schedule, s.decay * total)
            loss = torch.zeros((), device=device)
            for i in range(0, share, micro):
                tokens, targets = map(to_device, training.batch(step * batch + ranks.data_rank * share + i, micro))
                last = i + micro == share
                with nullcontext() if last or not isinstance(parallel, DDP) else parallel.no_sync():
                    with autocast():
                        part = forward(tokens, targets) * (micro / share)
                    part.backward()
                loss += part.detach()
            if parallel is not model:
                parallel.finish_gradient_synchronization()
            if ranks.data_count > 1:
                dist.all_reduce(loss, group=ranks.data)
                loss /= ranks.data_count
            norm = gradient_norm(model.parameters(), s.parallel == "fsdp", ranks.data, split, ranks.tensor)
            clip_grad_norm_(model.parameters(), s.clip, norm)
            bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step(skip=bad)
            optimizer.zero_grad()
            skipped = torch.stack((skipped[0] + bad, (skipped[1] + 1) * bad))
            step += 1
            meter.put(step, rate, loss, norm, skipped)

        meter.catch_up()
        if position >= total:
            meter.validate(*evaluate(model, validation, bytes_of, micro, autocast, None, ranks))
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
    temporary = Path(out).with_name(f"tmp.{os.getpid()}.{Path(out).name}")    # the suffix tells matplotlib the format
    figure.savefig(temporary, dpi=150, bbox_inches="tight")
    os.replace(temporary, out)
    print(out)


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def parse(argv: list[str]) -> tuple[Settings, dict | None]:
    """The settings of a command line; with --resume those of the run, changed where they may be, and its args.json."""
    parser = Parser(prog="train.py", allow_abbrev=False, description="Train a language model. Without flags: the whole pipeline "
                    "on the text that Python carries, in about three minutes. `train.py plot RUN...` draws loss curves.")
    for f in fields(Settings):
        kind, text = f.metadata["kind"], f.metadata["text"]
        if kind is bool:
            parser.add_argument(f"--{f.name}", action="store_true", default=None, help=text)
        elif kind is list:
            parser.add_argument(f"--{f.name}", nargs="+", metavar="PATH", help=text)
        else:
            text += f" (default: {f.default})" if f.default is not None else ""
            parser.add_argument(f"--{f.name}", type=kind, metavar=kind.__name__.upper(), help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "resume" not in given:
        return Settings(**given), None
    path = Path(given["resume"], "args.json")
    if not path.exists():
        raise ValueError(f"--resume {given['resume']}: there is no run here (no args.json)")
    saved = read_json(path)
    missing = {*FIXED, "tokens_folder", "data_fingerprint"} - set(saved)
    if missing:
        raise ValueError(f"{path} has no {sorted(missing)[0]}; it is not what train.py writes")
    saved = {**asdict(Settings()), **saved}                              # settings that have come since then
    for name in sorted(FIXED & set(given)):
        if given[name] != saved[name]:
            raise ValueError(f"--resume {given['resume']}: --{name} {given[name]} contradicts the run, whose {name} is "
                             f"{saved[name]}; leave it out, or start a new run")
    if "out" in given:
        raise ValueError("--resume writes to the run's own folder; leave --out out")
    budgets = ("steps", "tokens", "max_seconds")
    kept = {f.name: saved[f.name] for f in fields(Settings) if f.name not in ("stop_after", "out", "wandb")}
    if any(name in given for name in budgets):
        kept |= dict.fromkeys(budgets)                                   # a new budget replaces the old one
    return Settings(**{**kept, **given}), saved


def main():
    """The command line: a run, or `plot`."""
    rank = int(os.environ.get("RANK", 0))

    def fail(code, error):
        # usually all ranks fail alike: the first one prints, and torchrun then ends the others, while they sleep
        if int(os.environ.get("LOCAL_RANK", 0)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(1)
        print(f"train.py: {f'rank {rank}: ' if rank else ''}{describe(error)}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            sys.stdout.flush()
            os._exit(code)                                               # an exit by the book may wait for the others, or abort
        sys.exit(code)

    try:
        if sys.argv[1:2] == ["plot"]:
            parser = Parser(prog="train.py plot", allow_abbrev=False, description="Draw loss curves of runs (needs matplotlib).")
            parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
            parser.add_argument("--out", default="loss.png", help="the picture (default: loss.png)")
            args = parser.parse_args(sys.argv[2:])
            return plot(args.runs, args.out)
        settings, saved = parse(sys.argv[1:])
        out = train(settings, saved)
        gc.collect()                                                     # a process group that lives on at exit can end in an abort
        if out and rank == 0 and settings.data is None:
            prompts = ("import os\n", "def __init__(self", "class Error(Exception):")
            run("sample.py", "--model", out, *(word for text in prompts for word in ("--prompt", text)), "--max_new_tokens", 100,
                "--temperature", 0.7, "--seed", 1)
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


if __name__ == "__main__":
    main()
