"""
The model: a decoder-only Transformer in plain PyTorch, in the shape that Llama made standard.

A language model maps tokens t_0 .. t_i to a distribution over t_(i+1). Tokens become vectors; each layer adds to every
vector first what attention gathers from earlier positions, then what a feed-forward network makes of the position
itself; a last matrix turns vectors into logits over the vocabulary:

    x = embed(tokens)
    for each layer:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    logits = head(norm(x))

Norms are RMSNorm, positions are rotations (RoPE), the feed-forward network is SwiGLU, query heads may share key-value
heads, and there are no biases unless a switch in `Config` says so. Parameters bear Hugging Face's names and a model on
disk is a Hugging Face folder (config.json, model.safetensors), so there is nothing to convert: `AutoModelForCausalLM`
opens what `save_pretrained` writes, and `load_pretrained` opens Llama, Mistral, Qwen 2 and Qwen 3 folders (in one file, with
plain RoPE).

    model = Transformer(PRESETS["tiny"])        # or load_pretrained("runs/...")
    loss = model(tokens, targets)               # (B, S) and (B, S) -> mean nats per token

`python model.py` prints parameters, FLOPs and memory of every preset. Left out: training (train.py), sampling
(sample.py), fused GPU kernels (they come in through `Ops`), dropout, experts.
"""
import argparse
import difflib
import json
import math
import mmap
import os
import re
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------------------------
# Shape of a model

@dataclass(frozen=True)
class Config:
    """The shape of a model, under the keys that Hugging Face's config.json uses."""
    vocab_size: int = 4096
    hidden_size: int = 256                       # width of the residual stream
    num_hidden_layers: int = 6
    num_attention_heads: int = 4                 # query heads
    num_key_value_heads: int | None = None       # None: as many as query heads; fewer: grouped-query attention
    head_dim: int | None = None                  # None: hidden_size / num_attention_heads
    intermediate_size: int | None = None         # of SwiGLU; None: 8/3 of hidden_size, rounded up to a multiple of 64
    max_position_embeddings: int = 1024          # the longest sequence
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False            # the head is the embedding, transposed
    qkv_bias: bool = False                       # biases on q, k and v, as Qwen 2 has them
    qk_norm: bool = False                        # RMSNorm over each query and key head, as Qwen 3 has it
    sliding_window: int | None = None            # attend to this many latest positions, oneself counted; None: to all
    initializer: str = "fan_in"                  # or "glorot", the course's (see Transformer.initialize)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        fill = lambda name, value: object.__setattr__(self, name, value) if getattr(self, name) is None else None
        fill("num_key_value_heads", self.num_attention_heads)
        fill("head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        fill("intermediate_size", -(-8 * self.hidden_size // (3 * 64)) * 64)
        sizes = ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
                 "intermediate_size max_position_embeddings").split()
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}; each key-value head serves equally many")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and RoPE rotates pairs; make it even")
        if self.initializer not in ("fan_in", "glorot"):
            raise ValueError(f"initializer is {self.initializer!r}; it must be fan_in or glorot")


def _presets() -> dict[str, Config]:
    shape = lambda layers, heads, hidden, inner, vocab, context, **more: Config(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden, intermediate_size=inner,
        vocab_size=vocab, max_position_embeddings=context, **more)
    presets = {
        "tiny": shape(3, 2, 128, 384, 4096, 256),                   # the bare run's, on a CPU
        "mini": shape(8, 8, 512, 1408, 4096, 512),                  # the bare run's, on a GPU
        "tinystories": shape(4, 16, 512, 1344, 10_000, 256),        # CS336, assignment 1
    }
    # CS336, assignment 2 (systems): widths, depths and heads of its benchmarking table
    for name, layers, heads, hidden, inner in (
            ("small", 12, 12, 768, 3072), ("medium", 24, 16, 1024, 4096), ("large", 36, 20, 1280, 5120),
            ("xl", 48, 25, 1600, 6400), ("2.7b", 32, 32, 2560, 10240), ("10b", 50, 36, 4608, 12288)):
        presets["cs336-" + name] = shape(layers, heads, hidden, inner, 10_000, 1024)
    # GPT-2's widths and depths (Radford et al. 2019) in this architecture: 3 matrices of 8/3 hidden for 2 of 4 hidden
    for name, layers, heads, hidden, inner in (
            ("gpt2", 12, 12, 768, 2048), ("gpt2-medium", 24, 16, 1024, 2752),
            ("gpt2-large", 36, 20, 1280, 3392), ("gpt2-xl", 48, 25, 1600, 4288)):
        presets[name] = shape(layers, heads, hidden, inner, 50_257, 1024, tie_word_embeddings=True)
    presets |= {
        "llama2-7b": shape(32, 32, 4096, 11008, 32_000, 4096),
        "llama3.1-8b": shape(32, 32, 4096, 14336, 128_256, 8192, num_key_value_heads=8, rope_theta=500_000.0),
        "llama3.1-70b": shape(80, 64, 8192, 28672, 128_256, 8192, num_key_value_heads=8, rope_theta=500_000.0),
        "qwen2.5-1.5b": shape(28, 12, 1536, 8960, 151_936, 32768, num_key_value_heads=2, rope_theta=1e6,
                              rms_norm_eps=1e-6, tie_word_embeddings=True, qkv_bias=True),
        "qwen3-0.6b": shape(28, 16, 1024, 3072, 151_936, 40960, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
                            rms_norm_eps=1e-6, tie_word_embeddings=True, qk_norm=True),
        "qwen3-8b": shape(36, 32, 4096, 12288, 151_936, 40960, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
                          rms_norm_eps=1e-6, qk_norm=True),
    }
    return presets


PRESETS = _presets()


# ------------------------------------------------------------------------------------------------------------------
# The operations, each a plain function

def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x run: autocast's where it is on, x's own otherwise."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`, in float32, returned in x's dtype. The maximum is taken out first, so that no
    exponential overflows; the quotient does not change."""
    exponentials = torch.exp(x.float() - x.float().amax(dim, keepdim=True))
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[target], in nats, over the targets that are not `ignore_index`.

    logits (..., V), targets (...) of int64. log softmax(z)_t = z_t - logsumexp(z), so no softmax is formed. Float32:
    bfloat16 has 8 bits of mantissa, and V terms are summed."""
    logits, targets = logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1)
    counted = targets != ignore_index
    target_logits = logits.gather(-1, targets.where(counted, 0)[:, None])[:, 0]
    return (torch.logsumexp(logits, -1) - target_logits).where(counted, 0).sum() / counted.sum()


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. The gradient of the loss by the logits is (softmax - onehot) / count: it is at hand as
    soon as a chunk's logits are, so both gradients are taken in the forward pass and the logits are dropped."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, backward: bool) -> Tensor:
        dtype = product_dtype(weight)
        x, w, y = hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight.to(dtype), targets.reshape(-1)
        counted = y != ignore_index
        y, count = y.where(counted, 0)[:, None], counted.sum()                       # (N, 1), ()
        rows = max(512, 2 ** 22 // len(w))                       # 16 MB of float32 logits, or 512 positions' at least
        loss = torch.zeros((), device=x.device)
        x_grad, w_grad = (torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)) if backward else (None, None)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), rows):
                part = slice(i, i + rows)
                logits = (x[part] @ w.T).float()                                     # (rows, V)
                target, peak = logits.gather(1, y[part]), logits.amax(-1, keepdim=True)
                exponentials = logits.sub_(peak).exp_()                              # in the logits' memory: V is large
                total = exponentials.sum(-1, keepdim=True)                           # (rows, 1)
                loss += (total.log() + peak - target)[:, 0].where(counted[part], 0).sum()
                if backward:
                    share = (counted[part] / count)[:, None]                         # of each position in the mean
                    grad = exponentials.mul_(share / total).scatter_add_(1, y[part], -share).to(dtype)
                    x_grad[part] = grad @ w
                    w_grad += grad.T @ x[part]
        if backward:
            ctx.save_for_backward(x_grad.view_as(hidden).to(hidden.dtype), w_grad.to(weight.dtype))
        return loss / count

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, w_grad = ctx.saved_tensors
        return x_grad * loss_grad, w_grad * loss_grad, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """`cross_entropy(hidden @ weight.T, targets)`, a chunk of positions at a time, so that the logits (N × V, the largest
    tensor of a small model's step) never exist at once. hidden (..., hidden_size), weight (V, hidden_size), targets (...).
    Faster than the plain version by a quarter on a CPU, where a chunk stays in cache."""
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).
    In float32, returned in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope_tables(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim // 2) in float32, of the angle position * theta^(-2i / head_dim)
    (Su et al. 2021, arXiv 2104.09864). On the CPU whatever the default device, so that a model made on `meta` has them."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), 1 / theta ** exponents)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_(i + D/2)) by its position's angle, so that q·k depends on the distance alone.

    x (B, H, S, D); cos and sin (S, D // 2), or (B, 1, S, D // 2) where rows stand at different positions. Pairs are i and
    i + D/2, as in Hugging Face's Llama; the paper pairs neighbours, which is the same up to a permutation of weights."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_mask(queries: int, keys: int, device, causal: bool = True, window: int | None = None,
                   document_ids: Tensor | None = None, query_start: Tensor | None = None) -> Tensor:
    """True where a query may look: (S_q, S_k), or (B, 1, S_q, S_k) with `document_ids` or `query_start`.

    Queries stand at the last S_q of the S_k positions, or in row b at query_start[b], query_start[b] + 1, ..."""
    key = torch.arange(keys, device=device)                                          # (S_k)
    query = torch.arange(keys - queries, keys, device=device)[:, None]               # (S_q, 1)
    if query_start is not None:
        query = query_start[:, None, None, None] + torch.arange(queries, device=device)[:, None]   # (B, 1, S_q, 1)
    mask = key <= query if causal else torch.ones_like(key <= query)
    if window is not None:
        mask = mask & (key > query - window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, -queries:, None] == document_ids[:, None, None, :])
    return mask


def attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None,
                        window: int | None = None, document_ids: Tensor | None = None,
                        query_start: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v (Vaswani et al. 2017, arXiv 1706.03762), written out: S_q × S_k scores for every head.

    q (B, Hq, S_q, D), k and v (B, Hkv, S_k, D), Hq a multiple of Hkv; the result (B, Hq, S_q, D). `scale` is 1/√D unless
    given; `window` counts the query's own position; `document_ids` (B, S_k) keeps documents apart; `query_start` (B)
    places each row's queries in its cache (without it they are the last S_q positions)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))    # (B, Hq, S_k, D)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = attention_mask(q.shape[2], k.shape[2], q.device, causal, window, document_ids, query_start)
    return softmax(scores.masked_fill(~mask, float("-inf"))) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None,
              window: int | None = None, document_ids: Tensor | None = None,
              query_start: Tensor | None = None) -> Tensor:
    """What `attention_reference` computes, by PyTorch's fused kernel: it works in tiles and never holds the scores."""
    k, v = (t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    square = queries == keys and document_ids is None and query_start is None and (window is None or window >= keys)
    if square or (queries == 1 and query_start is None and document_ids is None and window is None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and square, scale=scale)
    mask = attention_mask(queries, keys, q.device, causal, window, document_ids, query_start)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x · sigmoid(x) (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


@dataclass(frozen=True)
class Ops:
    """The operations worth fusing, as callables of the signatures above; train.py hands in faster ones on a GPU."""
    attention: Callable = attention
    rms_norm: Callable = rms_norm
    swiglu: Callable = swiglu
    rope: Callable = apply_rope
    linear_cross_entropy: Callable = linear_cross_entropy


# ------------------------------------------------------------------------------------------------------------------
# The model

class KVCache:
    """Keys and values of the positions seen so far, so that a new token costs one position and not the whole prefix.

    Row b holds lengths[b] positions; new ones are written behind them. What lies beyond a row's length is left over from
    padding: it is never attended to, since attention is causal by each row's own positions, and it is overwritten later."""

    def __init__(self, config: Config, batch_size: int, max_length: int, device="cpu", dtype=torch.float32):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys, self.values = torch.zeros(2, *shape, device=device, dtype=dtype)  # each (layers, B, Hkv, T, D)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.end = 0                     # no row is longer than this; known to the host, so slicing needs no device sync

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, Hkv, S, D) behind each row; return the layer's keys and values (B, Hkv, end + S, D)."""
        rows = torch.arange(len(self.lengths), device=k.device)[:, None]             # (B, 1)
        positions = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)   # (B, S)
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)
        end = self.end + k.shape[2]
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int):
        """Every row has grown by `count` positions, in all layers."""
        self.lengths += count
        self.end += count


class RMSNorm(nn.Module):
    """A weight for `rms_norm`."""

    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight, self.eps, self.ops = nn.Parameter(torch.ones(size)), eps, ops

    def forward(self, x: Tensor) -> Tensor:
        # cast once here, or every product that reads the result casts it again
        return self.ops.rms_norm(x, self.weight, self.eps).to(product_dtype(x))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; query heads in groups that share a key-value head
    (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        query_size, key_value_size = (h * config.head_dim for h in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KVCache | None, document_ids) -> Tensor:
        split = lambda t: t.unflatten(-1, (-1, self.config.head_dim))                # (B, S, H, D)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                             # (B, H, S, D)
        q, k = self.ops.rope(q, cos, sin), self.ops.rope(k, cos, sin)
        placed = {}
        if cache is not None:
            # an empty cache needs no mask by rows: everybody starts at 0 and the fast causal path serves
            placed = {"query_start": cache.lengths} if cache.end else {}
            k, v = cache.append(layer, k, v)
            k, v = k.to(q.dtype), v.to(q.dtype)
        out = self.ops.attention(q, k, v, causal=True, window=self.config.sliding_window,
                                 document_ids=document_ids, **placed)                # (B, Hq, S, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward network. Norms stand before, so that the residual
    stream runs from embedding to head untouched."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = Attention(config, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = FeedForward(config, ops)

    def forward(self, x, cos, sin, layer, cache, document_ids):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache, document_ids)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder. `config` gives the shape, `ops` the implementations of the fusable operations."""

    def __init__(self, config: Config, ops: Ops = Ops()):
        super().__init__()
        self.config, self.ops = config, ops
        self.model = nn.ModuleDict({                       # the level that Hugging Face's names have: "model.layers.0..."
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config, ops) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps, ops)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        cos, sin = rope_tables(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Truncated normals (cut at three standard deviations).

        `fan_in`: standard deviation 1/√fan-in keeps the variance of activations from layer to layer; the two matrices
        that write to the residual stream are smaller by √(2 · layers), the number of writes that add up there (Radford
        et al. 2019). The embedding has 1/√hidden_size too, which also fits it for a tied head.
        `glorot`, the course's: 2/(fan-in + fan-out) as the variance of every matrix, 1 for the embedding."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                fan_out, fan_in = parameter.shape
                if self.config.initializer == "glorot":
                    std = 1.0 if "embed" in name else math.sqrt(2 / (fan_in + fan_out))
                else:
                    writes = 2 * self.config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                    std = 1 / math.sqrt(fan_in * writes)
                nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """The last hidden states, after the final norm: tokens (B, S) -> (B, S, hidden_size).

        With a cache, tokens continue each row where it stands, and the cache grows by S. `document_ids` (B, S): a
        position attends only to its own document. ValueError when a position passes max_position_embeddings."""
        end = tokens.shape[1] + (cache.end if cache is not None else 0)
        if end > self.config.max_position_embeddings:
            raise ValueError(f"{end} positions exceed max_position_embeddings {self.config.max_position_embeddings}; "
                             "give a shorter sequence")
        if cache is None or cache.end == 0:
            cos, sin = self.cos[:tokens.shape[1]], self.sin[:tokens.shape[1]]        # (S, D // 2)
        else:
            positions = cache.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]    # (B, 1, S, D // 2)
        x = self.model["embed_tokens"](tokens)                                       # (B, S, hidden_size)
        for i, layer in enumerate(self.model["layers"]):
            x = layer(x, cos, sin, i, cache, document_ids)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.model["norm"](x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                document_ids: Tensor | None = None) -> Tensor:
        """Logits (B, S, V); or, given targets (B, S), the mean loss in nats per token (targets of -100 do not count)."""
        hidden = self.hidden(tokens, cache, document_ids)
        if targets is None:
            return self.lm_head(hidden)
        return self.ops.linear_cross_entropy(hidden, self.lm_head.weight, targets)


# ------------------------------------------------------------------------------------------------------------------
# Counting

def num_parameters(config: Config, embeddings: bool = True) -> int:
    """Number of parameters N. embeddings=False leaves out both V × hidden_size tables, embedding and head: the N of
    Kaplan et al. 2020 (arXiv 2001.08361)."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = (c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
             + c.qkv_bias * (q + 2 * kv) + c.qk_norm * 2 * c.head_dim)
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return c.num_hidden_layers * layer + c.hidden_size + embeddings * tables


def flops_by_component(config: Config, sequence_length: int) -> dict[str, int]:
    """Forward FLOPs per token of the matrix products (a multiply-add is two; norms and the like are under one percent).

    `scores` are q kᵀ and the product with v over all S keys, the convention of published utilizations (Chowdhery et al.
    2022, arXiv 2204.02311, appendix B); causal attention that skips what is masked does half of them."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    keys = min(sequence_length, c.sliding_window or sequence_length)
    return {"projections": c.num_hidden_layers * 2 * c.hidden_size * (2 * q + 2 * kv),
            "scores": c.num_hidden_layers * 4 * keys * q,
            "feed_forward": c.num_hidden_layers * 6 * c.hidden_size * c.intermediate_size,
            "head": 2 * c.hidden_size * c.vocab_size}


def flops_per_token(config: Config, sequence_length: int) -> int:
    """FLOPs to train on one token: forward, and twice that for the backward pass (gradients by inputs and by weights)."""
    return 3 * sum(flops_by_component(config, sequence_length).values())


def memory_bytes(config: Config, batch_size: int = 1, sequence_length: int | None = None,
                 compute_bytes: int = 2) -> dict[str, int]:
    """Bytes that training takes on one device: weights, gradients and two AdamW moments in float32, and what the backward
    pass needs of `batch_size` sequences, with products in bfloat16 (compute_bytes=2) or in float32 (4).

    `activations` are what this file's plain operations keep: attention without its scores, no logits, in bfloat16 the
    copies of the weights too, and the gradient of the head's weight, which linear_cross_entropy takes early."""
    c = config
    parameters, tokens = num_parameters(c), batch_size * (sequence_length or c.max_position_embeddings)
    norm = (4 + 4 + compute_bytes) * c.hidden_size            # its input, and that divided by its root mean square; the output
    heads = 5 * c.num_attention_heads * c.head_dim            # q, k and v for every query head; the output, in two layouts
    inner = 4 * c.intermediate_size                           # gate, silu(gate), up, their product
    layer = 2 * norm + compute_bytes * (heads + inner)
    head = 4 * c.vocab_size * c.hidden_size
    copies = compute_bytes * num_parameters(c, embeddings=False) if compute_bytes < 4 else 0
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters,
            "activations": tokens * (c.num_hidden_layers * layer + norm) + head + copies}


# ------------------------------------------------------------------------------------------------------------------
# Files: config.json and model.safetensors, as Hugging Face lays them out

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_atomically(path, *chunks):
    """Write bytes to `path` by way of a temporary name and a rename: a reader sees the old file or the new one."""
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:                             # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_safetensors(tensors: dict[str, Tensor], path):
    """Write tensors in the safetensors format: 8 bytes of header length, a JSON header that gives each tensor's dtype,
    shape and place, then the raw little-endian data, one tensor after the other."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset, data = {"__metadata__": {"format": "pt"}}, 0, []
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                  # data starts at a multiple of 8, so that it can be mapped in place
    write_atomically(path, struct.pack("<Q", len(text)), text, *(raw.numpy() for raw in data))


def load_safetensors(path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read: pages come in when they are touched, and what is written to
    a tensor stays private to this process. ValueError when the file is cut short or is not a safetensors file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if size < 8 or length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places = {name: (info["dtype"], info["shape"], *info["data_offsets"]) for name, info in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path} is not a safetensors file, or its header is cut short; copy it again") from None
        need = 8 + length + max((end for *_, end in places.values()), default=0)
        if size < need:
            raise ValueError(f"{path} is cut short: its header describes {need:,} bytes and it has {size:,}; copy it again")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, (dtype, shape, start, end) in places.items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}; {', '.join(DTYPES)} can be read")
        count = (end - start) // DTYPES[dtype].itemsize
        if count != math.prod(shape):
            raise ValueError(f"{path}: {name} has shape {shape} but {end - start} bytes; the file is damaged")
        tensors[name] = (torch.frombuffer(buffer, dtype=DTYPES[dtype], count=count, offset=8 + length + start)
                         if count else torch.empty(0, dtype=DTYPES[dtype])).reshape(shape)
    return tensors


def model_type(config: Config) -> str:
    """The Hugging Face architecture that has exactly this model's switches on; "flatlm" when none has."""
    switches = (config.qkv_bias, config.qk_norm, config.sliding_window is not None)
    return {(False, False, False): "llama", (True, False, False): "qwen2", (False, True, False): "qwen3",
            (False, False, True): "mistral"}.get(switches, "flatlm")


CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "mistral": "MistralForCausalLM", "flatlm": "Transformer"}


def config_to_json(config: Config, dtype: torch.dtype = torch.float32) -> dict:
    """What config.json says of a model. RoPE stands twice: transformers 4 read rope_theta, 5 reads rope_parameters."""
    kind = model_type(config)
    keys = ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
            "max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings bos_token_id eos_token_id").split()
    keys += ["sliding_window"] if kind == "mistral" else ["qkv_bias", "qk_norm", "sliding_window"] if kind == "flatlm" else []
    return {"architectures": [CLASSES[kind]], "model_type": kind, **{key: getattr(config, key) for key in keys},
            "hidden_act": "silu", "rope_scaling": None, "torch_dtype": str(dtype).removeprefix("torch."),
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            **({"attention_bias": False, "mlp_bias": False} if kind == "llama" else {})}


def config_from_json(values: dict) -> Config:
    """The `Config` of a config.json. ValueError names the first field that this model cannot honour."""
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"model_type is {kind!r}; supported are {', '.join(CLASSES)}")
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    attention_bias = kind in ("llama", "qwen3") and values.get("attention_bias", False)    # qwen2 has q, k, v biases always
    supported = {"hidden_act": values.get("hidden_act", "silu") == "silu",
                 "attention_bias": not attention_bias,
                 "mlp_bias": not values.get("mlp_bias", False),
                 "rope_parameters": rope.get("rope_type", "default") == "default",
                 "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) == "default",
                 "use_sliding_window": not values.get("use_sliding_window", False)}
    for field, fine in supported.items():
        if not fine:
            raise ValueError(f"{field} is {values[field]!r}, which this model does not support")
    missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if key not in values]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    fields = {key: values[key] for key in Config.__dataclass_fields__ if key in values}
    fields["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if kind != "flatlm":
        fields |= {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3",
                   "sliding_window": values.get("sliding_window") if kind == "mistral" else None}
    return Config(**fields)


def save_pretrained(model: Transformer, folder, tensors: dict[str, Tensor] | None = None):
    """Write `model` as a folder that `AutoModelForCausalLM.from_pretrained` and `load_pretrained` open, with its own weights
    or with `tensors`, gathered from the ranks that share them. The tokenizer's files are the caller's to add. A model with a mix of switches that no Hugging Face architecture has is written all the
    same, as model_type "flatlm", which `load_pretrained` alone reads."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = dict(model.state_dict() if tensors is None else tensors)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    ends = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id") if getattr(config, key) is not None}
    save_safetensors(tensors, Path(folder, "model.safetensors"))
    write_atomically(Path(folder, "generation_config.json"), json.dumps(ends, indent=2).encode())
    write_atomically(Path(folder, "config.json"), json.dumps(config_to_json(config, model.lm_head.weight.dtype), indent=2).encode())


def read_json(path) -> dict:
    """The object in a JSON file; ValueError in one line when it is not one."""
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def load_pretrained(folder, ops: Ops = Ops()) -> Transformer:
    """The model in a Hugging Face folder, in the dtype it was stored in, its weights mapped from model.safetensors.

    ValueError in one line when the folder has no weights, when they are cut short, when their names or shapes contradict
    config.json, or when config.json asks for something this model does not have."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is no model folder: it has no {name}")
    values = read_json(folder / "config.json")
    try:
        config = config_from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if (folder / "generation_config.json").exists():      # chat models end at more tokens than config.json names
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        config = replace(config, eos_token_id=ends if ends is not None else config.eos_token_id)
    tensors = load_safetensors(folder / "model.safetensors")
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):                            # shapes only: the file's tensors become the parameters
        model = Transformer(config, ops)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in [*expected, *tensors]:
        have, want = tensors[name].shape if name in tensors else None, expected.get(name)
        if have != want:
            say = lambda shape: "none" if shape is None else str(tuple(shape))
            raise ValueError(f"{folder / 'model.safetensors'} does not fit config.json: {name} should have shape "
                             f"{say(want)} and has {say(have)}")
    model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    return model.requires_grad_()


# ------------------------------------------------------------------------------------------------------------------
# python model.py

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


def preset(name: str) -> Config:
    """The preset of that name; ValueError names the nearest one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.3)
        raise ValueError(f"unknown preset {name!r}; " + (f"did you mean {near[0]}? " if near else "")
                         + f"There are {', '.join(PRESETS)}")
    return PRESETS[name]


def main():
    """Print what each preset, or the model in a folder, costs."""
    parser = Parser(prog="model.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Parameters, training FLOPs per token and training memory of models.")
    parser.add_argument("models", nargs="*", help="presets, or folders with a config.json (none: every preset)")
    parser.add_argument("--sequence_length", type=int, help="tokens per sequence (none: 1024, or the model's longest)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences in memory at a time, for the activations")
    args = parser.parse_args()
    try:
        rows = {}
        for name in args.models or PRESETS:
            path = Path(name, "config.json")
            rows[name] = config_from_json(read_json(path)) if path.exists() else preset(name)
        for flag in ("sequence_length", "batch_size"):
            if getattr(args, flag) is not None and getattr(args, flag) < 1:
                raise ValueError(f"--{flag} is {getattr(args, flag)}; it must be at least 1")
    except (ValueError, OSError) as error:
        parser.error(error)
    print("N: parameters, with and without embedding and head. FLOPs: to train on one token, forward and backward, and where "
          "they go.\nMemory: float32 weights, gradients and two moments; activations of a bfloat16 step without recomputation, "
          f"{args.batch_size} sequence(s).\n")
    print(f"{'model':14} {'type':8} {'N':>9} {'N no emb':>9} {'context':>7} {'FLOPs/tok':>10}  {'proj':>4} {'scor':>4} "
          f"{'ffn':>4} {'head':>4}  {'weights':>9} {'+grads':>9} {'+AdamW':>9} {'activ.':>9}")
    count = lambda n: human(n).replace("G", "B")          # parameters are counted in billions, bytes in giga
    for name, config in rows.items():
        length = args.sequence_length or min(1024, config.max_position_embeddings)
        parts = flops_by_component(config, length)
        memory = memory_bytes(config, args.batch_size, length)
        shares = " ".join(f"{part / sum(parts.values()):4.0%}" for part in parts.values())
        print(f"{name:14} {model_type(config):8} {count(num_parameters(config)):>9} {count(num_parameters(config, False)):>9} "
              f"{length:7} {human(flops_per_token(config, length)):>10}  {shares}  "
              + " ".join(f"{human(memory[part]) + 'B':>9}" for part in ("weights", "gradients", "optimizer", "activations")))


def human(number: float) -> str:
    """1234567 -> '1.23M', with decimal prefixes."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10 ** power:
            return f"{number / 10 ** power:.3g}{prefix}"
    return f"{number:.3g}"


if __name__ == "__main__":
    main()
