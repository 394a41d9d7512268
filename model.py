"""
The model: a decoder-only Transformer in plain PyTorch, in the shape that Llama made standard.

A language model maps tokens t_0 .. t_i to a distribution over t_(i+1). Tokens become vectors; each layer adds to every
vector first what attention gathers from earlier positions, then what a feed-forward network makes of the position
itself; a last matrix turns vectors into logits over the vocabulary:

    x = embed(tokens)
    for each layer:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    logits = head(norm(x))

Norms are RMSNorm, positions are rotations (RoPE), the feed-forward network is SwiGLU, query heads may share key-value
heads, and there are no biases. Each of these choices is a switch in `Config`, beside what others chose: LayerNorm, norms
after or on both sides or none, tables of positions or none, RoPE for a longer context, other feed-forward networks, a
mixture of experts, biases, sliding windows in some layers, parallel residuals, capped logits. Parameters bear Hugging
Face's names and a model on disk is a Hugging Face folder (config.json, model.safetensors), so there is nothing to convert:
`AutoModelForCausalLM` opens what `save_pretrained` writes as long as a family there has the same switches on, and
`load_pretrained` opens the folders of Llama, Mistral, Mixtral, Qwen 2, Qwen 3, Qwen 3 MoE and GPT-2, in one file or in
shards.

    model = Transformer(PRESETS["tiny"])        # or load_pretrained("runs/...")
    loss = model(tokens, targets)               # (B, S) and (B, S) -> mean nats per token

`python model.py` prints parameters, FLOPs and memory of every preset. Left out: training (train.py), sampling
(sample.py), fused GPU kernels (they come in through `Ops`).
"""
import argparse
import copy
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
    intermediate_size: int | None = None         # of the feed-forward network, or of each expert; None: 8/3 of hidden_size,
                                                 # rounded up to a multiple of 64, for SwiGLU; 4 times hidden_size for others
    max_position_embeddings: int = 1024          # the longest sequence
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None             # RoPE for a longer context than it was learned in (see scale_frequencies)
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False            # the head is the embedding, transposed
    qkv_bias: bool = False                       # biases on q, k and v, as Qwen 2 has them
    o_bias: bool = False                         # on the projection of what attention gathers, as in GPT-2
    mlp_bias: bool = False                       # and on all of the feed-forward network, as in GPT-2
    qk_norm: bool = False                        # RMSNorm over each query and key head, as Qwen 3 has it
    sliding_window: int | None = None            # attend to this many latest positions, oneself counted; None: to all
    sliding_window_pattern: int | None = None    # every so manieth layer attends to all of them even so, as in Gemma 3
    norm: str = "rms"                            # or "layer": LayerNorm with weight and bias, as in GPT-2
    norm_place: str = "pre"                      # x + f(norm(x)); or "post", norm(x + f(x)), as in Vaswani et al. 2017;
                                                 # "both", x + norm(f(norm(x))), as in Gemma 2; "none"
    position: str = "rope"                       # or "learned", a table added to the embeddings; "sinusoidal", a fixed one
                                                 # (see sinusoidal_table); "none" (Kazemnejad et al. 2023, arXiv 2305.19466)
    feed_forward: str = "swiglu"                 # or down(f(up x)), f being "gelu", as in GPT-2; "silu"; "relu2", the square
                                                 # of ReLU (So et al. 2021, arXiv 2109.08668)
    use_parallel_residual: bool = False          # x + attention(n) + feed_forward(n) with n = norm(x), as in GPT-J and PaLM
    final_logit_softcapping: float | None = None   # logits end softly at plus and minus this, as in Gemma 2
    num_local_experts: int | None = None         # feed-forward networks in each layer, as in Mixtral; None: a single one
    num_experts_per_tok: int = 2                 # how many a token goes through (if 1, the balance alone teaches the router)
    router_aux_loss_coef: float = 0.01           # times the loss that balances the experts' load, in training mode
    dropout: float = 0.0                         # of the embeddings and of all that layers add to them, in training mode
    initializer: str = "fan_in"                  # or "glorot", the course's (see Transformer.initialize)
    mup_base_width: int | None = None            # the width at which this model is an ordinary one: initialization and the scale
                                                 # of the logits follow µP, so that what is tuned there holds at other widths
                                                 # (see Transformer.initialize). Vary the width by the number of heads
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        fill = lambda name, value: object.__setattr__(self, name, value) if getattr(self, name) is None else None
        fill("num_key_value_heads", self.num_attention_heads)
        fill("head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        two_thirds, whole = -(-8 * self.hidden_size // (3 * 64)) * 64, 4 * self.hidden_size      # 3 matrices cost what 2 do
        fill("intermediate_size", two_thirds if self.feed_forward == "swiglu" else whole)
        sizes = ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
                 "intermediate_size max_position_embeddings").split()
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}; each key-value head serves equally many")
        if self.head_dim % 2 and self.position == "rope":
            raise ValueError(f"head_dim {self.head_dim} is odd, and RoPE rotates pairs; make it even")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {', '.join(choices[:-1])} or {choices[-1]}")
        given = lambda name: getattr(self, name) is not None
        scaling = wrong_scaling(self.rope_scaling) if given("rope_scaling") else None
        if given("rope_scaling") and self.position != "rope":
            scaling = f" with position {self.position}; only rope is scaled"
        refused = {       # the first that holds is told, with the field's value
            "rope_theta": (not self.rope_theta > 0, "; it must be above 0"),
            "rope_scaling": (scaling is not None, scaling),
            "sliding_window": (given("sliding_window") and self.sliding_window < 1, "; it must be at least 1"),
            "sliding_window_pattern": (given("sliding_window_pattern") and (self.sliding_window_pattern < 2 or not given(
                "sliding_window")), "; it must be at least 2" if given("sliding_window") else " without a sliding_window; give both"),
            "use_parallel_residual": (self.use_parallel_residual and self.norm_place == "post",
                                      " with norm_place post; it needs a norm before both: take pre, both or none"),
            "final_logit_softcapping": (given("final_logit_softcapping") and not self.final_logit_softcapping > 0,
                                        "; it must be above 0, or None for no cap"),
            "dropout": (not 0 <= self.dropout < 1, "; it must be at least 0 and below 1"),
            "mup_base_width": (given("mup_base_width") and self.mup_base_width < 1, "; it must be at least 1, or None for no µP"),
            "initializer": (given("mup_base_width") and self.initializer == "glorot",
                            f" with mup_base_width {self.mup_base_width}; µP begins with fan_in")}
        if given("num_local_experts"):
            refused |= {
                "num_local_experts": (self.num_local_experts < 1, "; it must be at least 1, or None for no experts"),
                "num_experts_per_tok": (not 1 <= self.num_experts_per_tok <= self.num_local_experts,
                                        f"; it must be from 1 to num_local_experts, {self.num_local_experts}"),
                "router_aux_loss_coef": (not self.router_aux_loss_coef >= 0, "; it must be at least 0"),
                "feed_forward": (self.feed_forward != "swiglu", " with num_local_experts; experts are swiglu"),
                "mlp_bias": (self.mlp_bias, " with num_local_experts; experts have no biases"),
                # grouped_mm reads 16 bytes at a time: 8 numbers of bfloat16
                "hidden_size": (self.hidden_size % 8, "; with num_local_experts it must be a multiple of 8"),
                "intermediate_size": (self.intermediate_size % 8, "; with num_local_experts it must be a multiple of 8")}
        for name, (wrong, why) in refused.items():
            if wrong:
                raise ValueError(f"{name} is {getattr(self, name)!r}{why}")

    @property
    def base_width(self) -> int:
        """The width that sets the scale of embedding and logits: µP's base, or else this model's own."""
        return self.mup_base_width or self.hidden_size

    def window_of(self, layer: int) -> int | None:
        """How many latest positions a layer attends to; None: all."""
        n = self.sliding_window_pattern
        return None if n and layer % n == n - 1 else self.sliding_window


CHOICES = {"norm": ("rms", "layer"), "norm_place": ("pre", "post", "both", "none"), "initializer": ("fan_in", "glorot"),
           "position": ("rope", "learned", "sinusoidal", "none"), "feed_forward": ("swiglu", "gelu", "silu", "relu2")}
ROPE_SCALINGS = {"linear": ("factor",),           # what each needs, beside its name as rope_type
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def wrong_scaling(scaling: dict) -> str | None:
    """What is wrong with a rope_scaling, to be read behind its value; None if nothing is."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_SCALINGS:
        return f"; its rope_type must be {' or '.join(ROPE_SCALINGS)}"
    for key in ROPE_SCALINGS[kind]:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            return f"; with rope_type {kind} it needs a {key} above 0"
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        return "; its high_freq_factor must be above its low_freq_factor"
    return None


GPT2_SWITCHES = {"norm": "layer", "position": "learned", "feed_forward": "gelu",      # what makes this model a GPT-2
                 "qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _presets() -> dict[str, Config]:
    shape = lambda layers, heads, hidden, inner, vocab, context, **more: Config(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden, intermediate_size=inner,
        vocab_size=vocab, max_position_embeddings=context, **more)
    presets = {
        "tiny": shape(3, 2, 128, 384, 4096, 256, tie_word_embeddings=True),      # the bare run's, on a CPU
        "mini": shape(8, 8, 512, 1408, 4096, 512, tie_word_embeddings=True),     # the bare run's, on a GPU
        "tinystories": shape(4, 16, 512, 1344, 10_000, 256),        # CS336, assignment 1
    }
    # CS336, assignment 2 (systems): widths, depths and heads of its benchmarking table
    for name, layers, heads, hidden, inner in (
            ("small", 12, 12, 768, 3072), ("medium", 24, 16, 1024, 4096), ("large", 36, 20, 1280, 5120),
            ("xl", 48, 25, 1600, 6400), ("2.7b", 32, 32, 2560, 10240), ("10b", 50, 36, 4608, 12288)):
        presets["cs336-" + name] = shape(layers, heads, hidden, inner, 10_000, 1024)
    for name, layers, heads, hidden in (("gpt2", 12, 12, 768), ("gpt2-medium", 24, 16, 1024),
                                        ("gpt2-large", 36, 20, 1280), ("gpt2-xl", 48, 25, 1600)):     # Radford et al. 2019
        presets[name] = shape(layers, heads, hidden, 4 * hidden, 50_257, 1024, tie_word_embeddings=True, **GPT2_SWITCHES)
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


def cap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap): as they are while small, never beyond ±cap (Gemma Team 2024, arXiv 2408.00118)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, z_loss: float = 0.0) -> Tensor:
    """Mean of -log softmax(logits)[target], in nats, over the targets that are not `ignore_index`, plus z_loss times the
    mean of logsumexp(logits)², which keeps logits from drifting off (Chowdhery et al. 2022, arXiv 2204.02311).

    logits (..., V), targets (...) of int64. log softmax(z)_t = z_t - logsumexp(z), so no softmax is formed. Float32:
    bfloat16 has 8 bits of mantissa, and V terms are summed."""
    logits, targets = logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1)
    counted = targets != ignore_index
    target_logits, total = logits.gather(-1, targets.where(counted, 0)[:, None])[:, 0], torch.logsumexp(logits, -1)
    return (total - target_logits + z_loss * total.square()).where(counted, 0).sum() / counted.sum()


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. The gradient of the loss by the logits is (softmax - onehot) / count: it is at hand as
    soon as a chunk's logits are, so both gradients are taken in the forward pass and the logits are dropped. What z_loss
    and softcap add: softmax is multiplied by 1 + 2 · z_loss · logsumexp, all by the cap's slope, 1 - tanh²."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, softcap: float | None,
                z_loss: float, backward: bool) -> Tensor:
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
                if softcap is not None:
                    logits.div_(softcap).tanh_()
                    slope = 1 - logits.square() if backward else None
                    logits.mul_(softcap)
                target, peak = logits.gather(1, y[part]), logits.amax(-1, keepdim=True)
                exponentials = logits.sub_(peak).exp_()                              # in the logits' memory: V is large
                total = exponentials.sum(-1, keepdim=True)                           # (rows, 1)
                log_total = total.log() + peak
                losses = log_total - target if not z_loss else log_total - target + z_loss * log_total.square()
                loss += losses[:, 0].where(counted[part], 0).sum()
                if backward:
                    share = (counted[part] / count)[:, None]                         # of each position in the mean
                    pull = share if not z_loss else share * (1 + 2 * z_loss * log_total)
                    grad = exponentials.mul_(pull / total).scatter_add_(1, y[part], -share)
                    grad = (grad if softcap is None else grad.mul_(slope)).to(dtype)
                    x_grad[part] = grad @ w
                    w_grad += grad.T @ x[part]
        if backward:
            ctx.save_for_backward(x_grad.view_as(hidden).to(hidden.dtype), w_grad.to(weight.dtype))
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad: Tensor):
        x_grad, w_grad = ctx.saved_tensors
        return x_grad * loss_grad, w_grad * loss_grad, None, None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
                         softcap: float | None = None, z_loss: float = 0.0) -> Tensor:
    """`cross_entropy(cap_logits(hidden @ weight.T, softcap), targets, ignore_index, z_loss)`, a chunk of positions at a
    time, so that the logits (N × V, the largest tensor of a small model's step) never exist at once.
    hidden (..., hidden_size), weight (V, hidden_size), targets (...). Faster than the plain version by a quarter on a CPU,
    where a chunk stays in cache."""
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, softcap, z_loss, backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).
    In float32, returned in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450).
    In float32, returned in x's dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rope_tables(head_dim: int, length: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim // 2) in float32, of the angle position * theta^(-2i / head_dim)
    (Su et al. 2021, arXiv 2104.09864), or what `scaling` makes of it (see `scale_frequencies`). On the CPU whatever the
    default device, so that a model made on `meta` has them."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1 / theta ** exponents                                             # radians per position
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequencies)
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """RoPE's frequencies for a context that is longer by `factor` than the one they were learned in.

    `linear` divides them all, so that no angle is new (Chen et al. 2023, arXiv 2306.15595). `llama3` divides those that turn
    less than low_freq_factor times within the original context, leaves alone those that turn more than high_freq_factor
    times, since these tell near positions apart, and blends in between (Llama 3.1's code; the Llama Team 2024, arXiv
    2407.21783)."""
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def sinusoidal_table(hidden_size: int, length: int) -> Tensor:
    """(length, hidden_size): sines of position · 10000^(-2i / hidden_size) in even places 2i, their cosines in the odd ones
    behind them (Vaswani et al. 2017, arXiv 1706.03762)."""
    cos, sin = rope_tables(hidden_size, length, 10000.0)
    return torch.stack((sin, cos), -1).flatten(1)[:, :hidden_size]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_(i + D/2)) by its position's angle, so that q·k depends on the distance alone.

    x (B, H, S, D); cos and sin (S, D // 2), or (B, 1, S, D // 2) where rows stand at different positions. Pairs are i and
    i + D/2, as in Hugging Face's Llama; the paper pairs neighbours, which is the same up to a permutation of weights."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1)


def attention_mask(queries: int, keys: int, device, causal: bool = True, window: int | None = None,
                   document_ids: Tensor | None = None) -> Tensor:
    """True where a query may look: (S_q, S_k), or (B, 1, S_q, S_k) with `document_ids`. Queries stand at the last S_q of the
    S_k positions."""
    key = torch.arange(keys, device=device)                                          # (S_k)
    query = torch.arange(keys - queries, keys, device=device)[:, None]               # (S_q, 1)
    mask = key <= query if causal else torch.ones_like(key <= query)
    if window is not None:
        mask = mask & (key > query - window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, -queries:, None] == document_ids[:, None, None, :])
    return mask


def attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None,
                        window: int | None = None, document_ids: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v (Vaswani et al. 2017, arXiv 1706.03762), written out: S_q × S_k scores for every head.

    q (B, Hq, S_q, D), k and v (B, Hkv, S_k, D), Hq a multiple of Hkv; the result (B, Hq, S_q, D). `scale` is 1/√D unless
    given; `window` counts the query's own position; `document_ids` (B, S_k) keeps documents apart."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))    # (B, Hq, S_k, D)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = attention_mask(q.shape[2], k.shape[2], q.device, causal, window, document_ids)
    return softmax(scores.masked_fill(~mask, float("-inf"))) @ v


class TiledAttention(torch.autograd.Function):
    """Attention for a CPU, some heads at a time, whose scores (S × S each) stay in cache and are never all there. The backward
    pass computes the probabilities P again (Dao et al. 2022, arXiv 2205.14135): with out = P v and gradients g of out,
    those of v are Pᵀ g, and those of the scores are P · (g vᵀ - rowsum(g · out)). In bfloat16 the scores are rounded before
    the softmax (PyTorch's kernel keeps them in float32): three times its error on sharp attention, for training alone."""

    @staticmethod
    def probabilities(q, k, scale, bias):
        return torch.add(bias, (q @ k.mT).float(), alpha=scale).softmax(-1)          # (heads, S, S)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
        ctx.scale, ctx.heads, shape = scale, max(1, 2 ** 20 // bias.numel()), q.shape     # 4 MB of float32 scores
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))                               # (B · H, S, D)
        out = torch.empty_like(q)
        for i in range(0, len(q), ctx.heads):
            part = slice(i, i + ctx.heads)
            out[part] = TiledAttention.probabilities(q[part], k[part], scale, bias).to(v.dtype) @ v[part]
        ctx.save_for_backward(q, k, v, out, bias)
        return out.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (q, k, v, out, bias), g = ctx.saved_tensors, gradient.flatten(0, 1)
        q_grad, k_grad, v_grad = (torch.empty_like(t) for t in (q, k, v))
        for i in range(0, len(q), ctx.heads):
            part = slice(i, i + ctx.heads)
            p = TiledAttention.probabilities(q[part], k[part], ctx.scale, bias)
            v_grad[part] = p.to(v.dtype).mT @ g[part]
            delta = (g[part] * out[part]).sum(-1, keepdim=True, dtype=torch.float32)
            scores = (g[part] @ v[part].mT).float().sub_(delta).mul_(p).mul_(ctx.scale).to(q.dtype)
            q_grad[part], k_grad[part] = scores @ k[part], scores.mT @ q[part]
        return *(t.view_as(gradient) for t in (q_grad, k_grad, v_grad)), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None,
              window: int | None = None, document_ids: Tensor | None = None) -> Tensor:
    """What `attention_reference` computes, by PyTorch's fused kernel, which works in tiles and never holds the scores; on a CPU
    by tiles of our own, which take half its time in training, as long as the scores of a head fit into the cache."""
    k, v = (t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    tiled = (q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled() and 1 < queries == keys <= 1024
             and document_ids is None and v.shape == k.shape and q.dtype in (torch.float32, torch.bfloat16)
             # a compiler unrolls the tiles
             and not (torch.compiler.is_compiling() and q.shape[0] * q.shape[1] * queries * keys > 2 ** 23))
    if tiled:
        mask = attention_mask(queries, keys, q.device, causal, window)
        bias = torch.zeros(queries, keys, device=q.device).masked_fill(~mask, float("-inf"))
        q, k, v = (t.to(product_dtype(t)) for t in (q, k, v))
        return TiledAttention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, bias)
    square = queries == keys and document_ids is None and (window is None or window >= keys)
    if square or (queries == 1 and document_ids is None and window is None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and square, scale=scale)
    mask = attention_mask(queries, keys, q.device, causal, window, document_ids)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of new positions to a cache: q (B, Hq, S, D), k and v (B, Hkv, T, D), mask (B or 1, 1, S, T) true where a query
    may look (None: everywhere). The query heads that share a key-value head become more queries of that head, so that the cache, which is all that
    decoding has to read beside the weights, is neither repeated nor read twice."""
    heads, queries, groups = k.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    grouped = q.reshape(len(q), heads, groups * queries, -1)                         # a group's heads stand side by side
    mask = mask if mask is None or queries == 1 else mask.repeat(1, 1, groups, 1)    # (B, 1, G · S, T)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x · sigmoid(x) (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


ACTIVATIONS = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu2": lambda x: F.relu(x).square()}


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (N, in), sorted by expert, times their expert's matrix in weight (E, out, in): (N, out). Expert e's rows end
    before ends[e] (int32, on the device: the host need not know how many there are)."""
    dtype = product_dtype(x)                                                 # autocast does not know this product
    product = F.grouped_mm
    if dtype != torch.bfloat16 and torch.compiler.is_compiling():            # PyTorch 2.13 compiles it for bfloat16 alone
        product = torch.compiler.disable(product)
    return product(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends)


def load_balance_loss(probabilities: Tensor, counts: Tensor) -> Tensor:
    """E · Σ_e f_e P_e, where f_e is the share of all choices that fell on expert e (counts (E)) and P_e the router's mean
    probability for it (probabilities (N, E)): 1 when all are equal, E when one expert gets everything. The gradient flows
    through P: what is chosen too often becomes less probable (Fedus et al. 2021, arXiv 2101.03961, for several choices)."""
    return len(counts) * (counts / counts.sum() * probabilities.mean(0)).sum()


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
        # what the host knows without asking the device: no row is longer than `end`, and whether all are exactly that long
        self.end, self.even = 0, True

    def rows(self, first: int, last: int, end: int, even: bool) -> "KVCache":
        """The rows from `first` to before `last`, as a cache of their own on the same memory."""
        part = copy.copy(self)
        part.keys, part.values, part.lengths = self.keys[:, first:last], self.values[:, first:last], self.lengths[first:last]
        part.end, part.even = end, even
        return part

    def place(self, count: int):
        """Say where the next `count` positions of each row stand, once for all layers."""
        self.row = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]              # (B, 1)
        self.positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)     # (B, S)
        self.masks = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, Hkv, S, D) behind each row; return the layer's keys and values (B, Hkv, end + S, D)."""
        end = self.end + k.shape[2]
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self.even:
                store[:, :, self.end:end] = new
            else:
                store[self.row, :, self.positions] = new.transpose(1, 2)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, window: int | None) -> Tensor | None:
        """Where the new positions may look, (B, 1, S, end + S), the same for all layers with this window; None: everywhere."""
        if self.even and window is None and self.positions.shape[1] == 1:
            return None
        if window not in self.masks:
            key = torch.arange(self.end + self.positions.shape[1], device=self.positions.device)
            query = self.positions[:, None, :, None]                                 # (B, 1, S, 1)
            self.masks[window] = key <= query if window is None else (key <= query) & (key > query - window)
        return self.masks[window]

    def advance(self, count: int):
        """Every row has grown by `count` positions, in all layers."""
        self.lengths += count
        self.end += count


class Linear(nn.Linear):
    """nn.Linear, except that on `meta`, where there are shapes alone, nothing is drawn: torch takes a second to learn how."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, with the same exception."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """A weight for `rms_norm`."""

    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight, self.eps, self.ops = nn.Parameter(torch.ones(size)), eps, ops

    def forward(self, x: Tensor) -> Tensor:
        # cast once here, or every product that reads the result casts it again
        return self.ops.rms_norm(x, self.weight, self.eps).to(product_dtype(x))


class LayerNorm(nn.Module):
    """A weight and a bias for `layer_norm`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps).to(product_dtype(x))


def make_norm(config: Config, ops: Ops, *places: str) -> nn.Module:
    """A norm of the residual stream, where config.norm_place is one of `places`; nothing elsewhere."""
    if config.norm_place not in places:
        return nn.Identity()
    size, eps = config.hidden_size, config.rms_norm_eps
    return LayerNorm(size, eps) if config.norm == "layer" else RMSNorm(size, eps, ops)


class Attention(nn.Module):
    """Causal self-attention, to all earlier positions or to the `window` latest; query heads in groups that share a
    key-value head (Ainslie et al. 2023, arXiv 2305.13245). Scores are q·k / √head_dim, under µP too, where other widths mean
    other numbers of heads: its 1 / head_dim is the same as long as head_dim is."""

    def __init__(self, config: Config, ops: Ops, window: int | None):
        super().__init__()
        self.config, self.ops, self.window = config, ops, window
        query_size, key_value_size = (h * config.head_dim for h in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each (B, S, H · D). sample.py puts one product in the place of three."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KVCache | None, document_ids) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = (t.view(batch, count, -1, self.config.head_dim) for t in self.project(x))       # (B, S, H, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                             # (B, H, S, D)
        if self.config.position == "rope":
            q, k = self.ops.rope(q, cos, sin), self.ops.rope(k, cos, sin)
        if cache is not None:
            keys, values = cache.append(layer, k, v)
        if cache is None or cache.end == 0:                   # an empty cache: the new positions have only each other
            out = self.ops.attention(q, k, v, causal=True, window=self.window, document_ids=document_ids)
        else:
            out = cached_attention(q, keys, values, cache.mask(self.window))
        return self.o_proj(out.transpose(1, 2).reshape(batch, count, -1))            # of (B, Hq, S, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x); or down(f(up x)) with another function f and no gate."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.ops, self.kind = ops, config.feed_forward
        if self.kind == "swiglu":
            self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, each (B, S, intermediate_size). sample.py puts one product in the place of two."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down_proj(self.ops.swiglu(*self.project(x)))
        return self.down_proj(ACTIVATIONS[self.kind](self.up_proj(x)))


class Experts(nn.Module):
    """E SwiGLU networks side by side, their matrices stacked."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.ops = ops
        count, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        gate, up = grouped_linear(x, self.gate_proj, ends), grouped_linear(x, self.up_proj, ends)
        return grouped_linear(self.ops.swiglu(gate, up), self.down_proj, ends)


class MixtureOfExperts(nn.Module):
    """Each token goes through the k experts that the router finds likeliest for it, and their results are added up, weighted
    by its probabilities, which are made to sum to one (Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv
    2401.04088). No expert has a limit, so no token is dropped.

    Sorted by expert, all tokens go through all experts in three products, whose row ranges stay on the device."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.choices = config.num_experts_per_tok
        self.gate = Linear(config.hidden_size, config.num_local_experts, bias=False)      # the router
        self.experts = Experts(config, ops)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result, (B, S, hidden_size), and in training mode the load-balancing loss."""
        tokens = x.flatten(0, -2)                                                    # (N, hidden_size)
        probabilities = softmax(self.gate(tokens).float())                           # (N, E)
        weights, experts = probabilities.topk(self.choices)                          # each (N, k)
        weights = weights / weights.sum(-1, keepdim=True)
        experts = experts.flatten()                                                  # (N · k)
        counts = torch.zeros_like(probabilities[0], dtype=torch.int64).scatter_add_(0, experts, torch.ones_like(experts))
        order = experts.argsort(stable=True)
        sorted_results = self.experts(tokens[order // self.choices], counts.cumsum(0).to(torch.int32))
        results = sorted_results[order.argsort()].unflatten(0, (-1, self.choices))   # (N, k, hidden_size)
        out = (results * weights.to(results.dtype)[..., None]).sum(1).view_as(x)
        return out, load_balance_loss(probabilities, counts) if self.training else None


class Layer(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward network. Norms stand before, so that the residual
    stream runs from embedding to head untouched; elsewhere, too, or instead, where `config.norm_place` says so."""

    def __init__(self, config: Config, ops: Ops, window: int | None):
        super().__init__()
        self.config = config
        self.input_layernorm = make_norm(config, ops, "pre", "both")
        self.self_attn = Attention(config, ops, window)
        if not config.use_parallel_residual:
            self.post_attention_layernorm = make_norm(config, ops, "pre", "both")
        self.mlp = MixtureOfExperts(config, ops) if config.num_local_experts else FeedForward(config, ops)
        self.attention_output_layernorm = make_norm(config, ops, "both", "post")
        self.mlp_output_layernorm = make_norm(config, ops, "both", "post")
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, cos, sin, layer, cache, document_ids) -> tuple[Tensor, Tensor | None]:
        """The residual stream behind this layer, and its load-balancing loss; None where it has no experts."""
        attend = lambda y: self.self_attn(y, cos, sin, layer, cache, document_ids)
        feed = self.mlp if self.config.num_local_experts else lambda y: (self.mlp(y), None)
        if self.config.norm_place == "post":
            x = self.attention_output_layernorm(x + self.dropout(attend(x)))
            y, balance = feed(x)
            return self.mlp_output_layernorm(x + self.dropout(y)), balance
        n = self.input_layernorm(x)
        x = x + self.dropout(self.attention_output_layernorm(attend(n)))
        if not self.config.use_parallel_residual:                                    # which takes the same n for both
            n = self.post_attention_layernorm(x)
        y, balance = feed(n)
        return x + self.dropout(self.mlp_output_layernorm(y)), balance


class Transformer(nn.Module):
    """The decoder. `config` gives the shape, `ops` the implementations of the fusable operations."""

    def __init__(self, config: Config, ops: Ops = Ops()):
        super().__init__()
        self.config, self.ops = config, ops
        self.model = nn.ModuleDict({                       # the level that Hugging Face's names have: "model.layers.0..."
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config, ops, config.window_of(i)) for i in range(config.num_hidden_layers)),
            "norm": make_norm(config, ops, "pre", "both")})
        if config.position == "learned":
            self.model["embed_positions"] = Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        cos, sin = rope_tables(config.head_dim, config.max_position_embeddings, config.rope_theta, config.rope_scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if config.position == "sinusoidal":
            table = sinusoidal_table(config.hidden_size, config.max_position_embeddings)
            self.register_buffer("sinusoids", table, persistent=False)
        if not self.lm_head.weight.is_meta:
            self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Truncated normals (cut at three standard deviations).

        `fan_in`: standard deviation 1/√fan-in keeps the variance of activations from layer to layer; the two matrices
        that write to the residual stream are smaller by √(2 · layers), the number of writes that add up there (Radford
        et al. 2019). The embedding has 1/√hidden_size too, which also fits it for a tied head; so have learned positions.
        `glorot`, the course's: 2/(fan-in + fan-out) as the variance of every matrix, 1 for learned positions and for the
        embedding (as it enters the residual stream: sinusoidal positions have it multiplied by √hidden_size), unless that is
        the head too.

        With `mup_base_width` (µP, Yang et al. 2022, arXiv 2203.03466, table 8): embedding, learned positions and head are drawn
        as at the base width, whatever this model's, and `run` divides the last hidden states by hidden_size / base. All else is
        as it was, since fan-in grows along. The learning rates' part is train.py's."""
        multiplied = self.config.position == "sinusoidal"
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() >= 2:                     # of stacked experts each by its own fan-in
                fan_out, fan_in = parameter.shape[-2:]
                if self.config.initializer == "glorot" and "embed" in name:
                    std = 1 / math.sqrt(fan_in) if multiplied or self.config.tie_word_embeddings else 1.0
                elif self.config.initializer == "glorot":
                    std = math.sqrt(2 / (fan_in + fan_out))
                else:
                    fan_in = self.config.base_width if "embed" in name or name == "lm_head.weight" else fan_in
                    residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                    writes = 2 * self.config.num_hidden_layers if residual else 1
                    std = 1 / math.sqrt(fan_in * writes)
                nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)

    def run(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> tuple[Tensor, list]:
        """The last hidden states, as of `hidden`, and the load-balancing loss of every layer that has one."""
        end = tokens.shape[1] + (cache.end if cache is not None else 0)
        if end > self.config.max_position_embeddings:
            raise ValueError(f"{end} positions exceed max_position_embeddings {self.config.max_position_embeddings}; "
                             "give a shorter sequence")
        if cache is not None:
            cache.place(tokens.shape[1])
        if cache is None or cache.even:
            positions = slice(end - tokens.shape[1], end)
            cos, sin = self.cos[positions], self.sin[positions]                      # (S, D // 2)
        else:
            positions = cache.positions                                              # (B, S)
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]    # (B, 1, S, D // 2)
        x = self.model["embed_tokens"](tokens)                                       # (B, S, hidden_size)
        if not torch.is_autocast_enabled(x.device.type):
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)                              # once for all layers
        if self.config.position == "learned":
            x = x + self.model["embed_positions"].weight[positions]
        if self.config.position == "sinusoidal":
            # embeddings of variance 1/hidden_size would drown in sines; the paper multiplies them too
            x = math.sqrt(self.config.base_width) * x + self.sinusoids[positions].to(x.dtype)
        x, balances = self.dropout(x), []
        for i, layer in enumerate(self.model["layers"]):
            x, balance = layer(x, cos, sin, i, cache, document_ids)
            balances += [] if balance is None else [balance]
        if cache is not None:
            cache.advance(tokens.shape[1])
        x = self.model["norm"](x)
        if self.config.base_width != self.config.hidden_size:
            # features that training makes agree with the head add up over the width, where random ones cancel to its root
            x = x * (self.config.base_width / self.config.hidden_size)
        return x, balances

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """The last hidden states, after the final norm (and µP's factor): tokens (B, S) -> (B, S, hidden_size).

        With a cache, tokens continue each row where it stands, and the cache grows by S. `document_ids` (B, S): a
        position attends only to its own document (tables of positions count on from the start of the row all the same).
        ValueError when a position passes max_position_embeddings."""
        return self.run(tokens, cache, document_ids)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: last hidden states (..., hidden_size) -> logits (..., V)."""
        return cap_logits(self.lm_head(hidden), self.config.final_logit_softcapping)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                document_ids: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Logits (B, S, V); or, given targets (B, S), the mean loss in nats per token (targets of -100 do not count), plus
        z_loss times the mean of logsumexp(logits)², plus in training mode the load-balancing loss of experts."""
        hidden, balances = self.run(tokens, cache, document_ids)
        if targets is None:
            return self.logits(hidden)
        extras = {"softcap": self.config.final_logit_softcapping, "z_loss": z_loss}
        extras = {name: value for name, value in extras.items() if value}            # an op need not know what is off
        loss = self.ops.linear_cross_entropy(hidden, self.lm_head.weight, targets, **extras)
        return loss + self.config.router_aux_loss_coef * torch.stack(balances).mean() if balances else loss


# ------------------------------------------------------------------------------------------------------------------
# Counting

def num_parameters(config: Config, embeddings: bool = True, active: bool = False) -> int:
    """Number of parameters N. embeddings=False leaves out the tables: embedding, head and learned positions: the N of Kaplan
    et al. 2020 (arXiv 2001.08361). active=True counts of the experts those alone that a token goes through."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norm = c.hidden_size * (2 if c.norm == "layer" else 1)
    experts = (c.num_experts_per_tok if active else c.num_local_experts) if c.num_local_experts else 1
    layer = (c.hidden_size * (2 * q + 2 * kv) + experts * feed_forward_size(c) + c.hidden_size * (c.num_local_experts or 0)
             + norms_per_layer(c) * norm + c.qkv_bias * (q + 2 * kv) + c.o_bias * c.hidden_size + c.qk_norm * 2 * c.head_dim
             + c.mlp_bias * ((2 if c.feed_forward == "swiglu" else 1) * c.intermediate_size + c.hidden_size))
    tables = c.hidden_size * (c.vocab_size * (1 if c.tie_word_embeddings else 2)
                              + (c.position == "learned") * c.max_position_embeddings)
    final = norm if c.norm_place in ("pre", "both") else 0
    return c.num_hidden_layers * layer + final + embeddings * tables


def feed_forward_size(config: Config) -> int:
    """Parameters of a feed-forward network, or of one expert."""
    return (3 if config.feed_forward == "swiglu" else 2) * config.hidden_size * config.intermediate_size


def norms_per_layer(config: Config) -> int:
    """Norms of the residual stream in each layer."""
    inputs = 1 if config.use_parallel_residual else 2            # what goes in is normed, or what comes out, or both
    return {"pre": inputs, "post": 2, "both": inputs + 2, "none": 0}[config.norm_place]


def flops_by_component(config: Config, sequence_length: int) -> dict[str, int]:
    """Forward FLOPs per token of the matrix products (a multiply-add is two; norms and the like are under one percent). Of
    experts those that the token goes through, and the router.

    `scores` are q kᵀ and the product with v over all S keys, the convention of published utilizations (Chowdhery et al.
    2022, arXiv 2204.02311, appendix B); causal attention that skips what is masked does half of them."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    keys = sum(min(sequence_length, c.window_of(i) or sequence_length) for i in range(c.num_hidden_layers))
    experts = c.num_experts_per_tok if c.num_local_experts else 1
    feed_forward = experts * feed_forward_size(c) + c.hidden_size * (c.num_local_experts or 0)
    return {"projections": c.num_hidden_layers * 2 * c.hidden_size * (2 * q + 2 * kv),
            "scores": 4 * keys * q,
            "feed_forward": c.num_hidden_layers * 2 * feed_forward,
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
    # of RMSNorm its input, that divided by its root mean square, and the output; of LayerNorm, one kernel, input and output
    norm = ((4 if c.norm == "layer" else 4 + 4) + compute_bytes) * c.hidden_size
    stream = norms_per_layer(c) * norm or 2 * 4 * c.hidden_size   # without norms: what goes into attention and feed-forward
    heads = 5 * c.num_attention_heads * c.head_dim            # q, k and v for every query head; the output, in two layouts
    inner = (4 if c.feed_forward == "swiglu" else 2) * c.intermediate_size   # gate, silu(gate), up, product; or up, f(up)
    if c.num_local_experts:                                   # of each passed; what goes in, what comes out in two orders
        inner = c.num_experts_per_tok * (inner + 3 * c.hidden_size)
    layer = stream + compute_bytes * (heads + inner)
    final = norm if c.norm_place in ("pre", "both") else 0
    head = 4 * c.vocab_size * c.hidden_size
    copies = compute_bytes * num_parameters(c, embeddings=False) if compute_bytes < 4 else 0
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters,
            "activations": tokens * (c.num_hidden_layers * layer + final) + head + copies}


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


def load_safetensors(path, skip: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read: pages come in when they are touched, and what is written to
    a tensor stays private to this process. Those whose name the pattern `skip` is found in are left out. ValueError when
    the file is cut short or is not a safetensors file."""
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
        if skip and re.search(skip, name):
            continue
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}; {', '.join(DTYPES)} can be read")
        count = (end - start) // DTYPES[dtype].itemsize
        if count != math.prod(shape):
            raise ValueError(f"{path}: {name} has shape {shape} but {end - start} bytes; the file is damaged")
        tensors[name] = (torch.frombuffer(buffer, dtype=DTYPES[dtype], count=count, offset=8 + length + start)
                         if count else torch.empty(0, dtype=DTYPES[dtype])).reshape(shape)
    return tensors


CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
           "gpt2": "GPT2LMHeadModel", "flatlm": "Transformer"}
# what config.json and `Config` call by the same name: in every family, and beyond that in some
SHARED_KEYS = ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
               "max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings bos_token_id eos_token_id").split()
FAMILY_KEYS = {"mistral": ["sliding_window"], "qwen3_moe": ["num_experts_per_tok", "router_aux_loss_coef"],
               "mixtral": ["sliding_window", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"],
               "flatlm": list(Config.__dataclass_fields__)}
# what config.json calls otherwise than `Config`
RENAMED_KEYS = {"gpt2": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                         "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
                         "layer_norm_epsilon": "rms_norm_eps"},
                "qwen3_moe": {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}}
COMPUTED = {      # fields that change what comes out, and their values that are computed here
    "all": {"quantization_config": [None], "hidden_act": ["silu", "swish"], "partial_rotary_factor": [None, 1]},
    "qwen3_moe": {"norm_topk_prob": [True], "decoder_sparse_step": [1], "mlp_only_layers": [[], None]},
    "gpt2": {"activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_weights": [True],
             "scale_attn_by_inverse_layer_idx": [False], "reorder_and_upcast_attn": [False], "add_cross_attention": [False]}}


def _defaults() -> dict[str, dict]:
    """What transformers takes for fields that a config.json leaves out, by family."""
    llama = dict(vocab_size=32_000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                 max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2)
    mistral = {**llama, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    qwen = dict(vocab_size=151_936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=32, max_position_embeddings=32768, rms_norm_eps=1e-6)
    return {
        "flatlm": {}, "llama": llama, "mistral": {**mistral, "sliding_window": 4096},
        "qwen2": qwen, "qwen3": {**qwen, "head_dim": 128},
        "mixtral": {**mistral, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
                    "router_aux_loss_coef": 0.001},
        "qwen3_moe": {**qwen, "hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4,
                      "num_local_experts": 128, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
                      "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
        "gpt2": dict(vocab_size=50_257, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                     max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
                     bos_token_id=50_256, eos_token_id=50_256)}


DEFAULTS = _defaults()


def model_type(config: Config) -> str:
    """The Hugging Face architecture that has exactly this model's switches on; "flatlm" when none has."""
    c = config
    has = lambda **switches: all(getattr(c, name) == value for name, value in switches.items())
    if not has(norm_place="pre", use_parallel_residual=False, final_logit_softcapping=None, mup_base_width=None):
        return "flatlm"
    if has(**GPT2_SWITCHES, qk_norm=False, sliding_window=None, num_key_value_heads=c.num_attention_heads):
        return "gpt2" if c.num_attention_heads * c.head_dim == c.hidden_size else "flatlm"
    if not has(norm="rms", position="rope", feed_forward="swiglu"):
        return "flatlm"
    plain, biased = ("llama", "llama") if c.sliding_window is None else ("mistral", "flatlm")
    kinds = {(False, False, False, False): plain, (True, True, False, False): biased, (True, False, False, False): "qwen2",
             (False, False, True, False): "qwen3", (True, True, True, False): "qwen3",
             (False, False, True, True): "qwen3_moe", (True, True, True, True): "qwen3_moe",
             (False, False, False, True): "mixtral"}
    kind = kinds.get((c.qkv_bias, c.o_bias, c.qk_norm, c.num_local_experts is not None), "flatlm")
    if c.mlp_bias and kind != "llama" or c.sliding_window_pattern is not None and kind not in ("qwen2", "qwen3"):
        return "flatlm"
    return kind


def layer_types(config: Config) -> list[str]:
    """What each layer attends to, in config.json's words."""
    return [("full" if config.window_of(i) is None else "sliding") + "_attention" for i in range(config.num_hidden_layers)]


def config_to_json(config: Config, dtype: torch.dtype = torch.float32) -> dict:
    """What config.json says of a model. RoPE stands twice: transformers 4 reads rope_theta and rope_scaling, 5 reads
    rope_parameters. That of a flatlm model has every field of `Config`; that of a GPT-2 has GPT-2's keys, and no dropout,
    which is the trainer's."""
    kind = model_type(config)
    values = {"architectures": [CLASSES[kind]], "model_type": kind, "torch_dtype": str(dtype).removeprefix("torch."),
              **{key: getattr(config, key) for key in SHARED_KEYS + FAMILY_KEYS.get(kind, [])}}
    if kind == "gpt2":
        for theirs, ours in RENAMED_KEYS[kind].items():
            values[theirs] = values.pop(ours)
        for name in ("num_key_value_heads", "head_dim", "rope_theta"):
            del values[name]
        return values | {"activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    values |= {"hidden_act": "silu", "rope_scaling": config.rope_scaling,
               "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})}}
    if kind in ("llama", "qwen3", "qwen3_moe"):
        values["attention_bias"] = config.o_bias
    if kind == "llama":
        values["mlp_bias"] = config.mlp_bias
    if kind == "qwen3_moe":
        values |= {"num_experts": config.num_local_experts, "moe_intermediate_size": config.intermediate_size,
                   "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if kind.startswith("qwen") and config.sliding_window is not None:
        values |= {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": 0}
        values |= {"layer_types": layer_types(config)} if kind in ("qwen2", "qwen3") else {}
    return values


def config_from_json(values: dict) -> Config:
    """The `Config` of a config.json; what that leaves out is as in transformers. ValueError names the first field that this
    model cannot honour. The probabilities of dropout are not read: they are the trainer's."""
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"model_type is {kind!r}; supported are {', '.join(CLASSES)}")
    values = {**DEFAULTS[kind], **values}
    for field, computed in {**COMPUTED["all"], **COMPUTED.get(kind, {})}.items():
        if field in values and values[field] not in computed:
            raise ValueError(f"{field} is {values[field]!r}, which this model does not support")
    if values.get("mlp_bias") and kind not in ("llama", "flatlm"):
        raise ValueError(f"mlp_bias is {values['mlp_bias']!r}, which a {kind} does not have")
    renamed = RENAMED_KEYS.get(kind, {})
    values |= {ours: values[theirs] for theirs, ours in renamed.items() if theirs in values}
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    needed += ["num_local_experts", "num_experts_per_tok", "intermediate_size"] if kind in ("mixtral", "qwen3_moe") else []
    for key in needed:
        if values.get(key) is None:
            raise ValueError(f"{next((theirs for theirs, ours in renamed.items() if ours == key), key)} is missing")
    fields = {key: values[key] for key in SHARED_KEYS + FAMILY_KEYS.get(kind, []) if key in values}
    if kind == "gpt2":
        absent = ("num_key_value_heads", "head_dim", "rope_theta")
        return Config(**{key: value for key, value in fields.items() if key not in absent}, **GPT2_SWITCHES)
    fields |= read_rope(values)
    if kind == "flatlm":
        return Config(**fields)
    if kind == "qwen3_moe":
        fields["num_local_experts"] = values["num_local_experts"]
    attention_bias = kind in ("llama", "qwen3", "qwen3_moe") and bool(values.get("attention_bias"))
    fields |= {"qkv_bias": attention_bias or kind == "qwen2", "o_bias": attention_bias,
               "mlp_bias": bool(values.get("mlp_bias")), "qk_norm": kind in ("qwen3", "qwen3_moe")}
    config = Config(**fields)
    if kind == "mistral" and values.get("layer_types") not in (None, layer_types(config)):
        raise ValueError(f"layer_types is {values['layer_types']!r}, but the layers of a mistral have one sliding_window")
    return with_windows(config, values) if kind.startswith("qwen") else config


def read_rope(values: dict) -> dict:
    """rope_theta and rope_scaling as `Config` has them. transformers 4 writes rope_theta and rope_scaling (whose rope_type
    was called type at first), 5 writes both as rope_parameters."""
    field = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(field) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{field} is {rope!r}; supported is one that is the same for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and kind not in ROPE_SCALINGS:
        raise ValueError(f"{field} has rope_type {kind!r}; supported are default, {', '.join(ROPE_SCALINGS)}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"{field} has partial_rotary_factor {rope['partial_rotary_factor']!r}; 1 is supported")
    theta = rope.get("rope_theta", values.get("rope_theta", Config.rope_theta))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    rope = {"original_max_position_embeddings": values.get("max_position_embeddings"), **rope, "rope_type": kind}
    scaling = {key: rope[key] for key in ("rope_type", *ROPE_SCALINGS[kind]) if key in rope}
    wrong = wrong_scaling(scaling)
    if wrong:
        raise ValueError(f"{field} is {values[field]!r}{wrong}")
    return {"rope_theta": theta, "rope_scaling": scaling}


def with_windows(config: Config, values: dict) -> Config:
    """The config of a Qwen with the sliding windows that its config.json asks for, in all layers or all but every n-th."""
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    if window is None and not values.get("layer_types"):
        return config
    if config.num_local_experts:                          # a list of layers is nothing to Qwen 3 MoE
        return replace(config, sliding_window=window)
    first = values.get("max_window_layers", 28)           # where windows begin, if there is no list
    field = "layer_types" if values.get("layer_types") else "max_window_layers"
    asked = values.get("layer_types") or [
        ("full" if i < first else "sliding") + "_attention" for i in range(config.num_hidden_layers)]
    if "sliding_attention" not in asked:
        window = None
    n = asked.index("full_attention") + 1 if "full_attention" in asked else 1
    config = replace(config, sliding_window=window, sliding_window_pattern=n if window and n > 1 else None)
    if layer_types(config) != asked:
        raise ValueError(f"{field} is {values.get(field)!r}, which no sliding_window_pattern gives")
    return config


# Experts are stacked in memory and stand one by one on disk, under names that each family chose for itself
EXPERTS_ON_DISK = {"mixtral": ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
                   "qwen3_moe": ("mlp", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"})}


def to_disk(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The module's tensors as model.safetensors has them: "model.layers.0.mlp.experts.up_proj" becomes
    "model.layers.0.block_sparse_moe.experts.0.w3.weight" and so on, in a Mixtral."""
    if kind == "gpt2":
        return gpt2_to_disk(tensors)
    if kind not in EXPERTS_ON_DISK:
        return tensors
    block, names = EXPERTS_ON_DISK[kind]
    out = {}
    for name, tensor in tensors.items():
        prefix, found, matrix = name.replace(".mlp.", f".{block}.").rpartition(".experts.")
        if found:
            out |= {f"{prefix}.experts.{e}.{names[matrix]}.weight": one for e, one in enumerate(tensor)}
        else:
            out[matrix] = tensor
    return out


def from_disk(tensors: dict[str, Tensor], kind: str, place: Callable = lambda tensor: tensor) -> dict[str, Tensor]:
    """What `to_disk` did, undone, each tensor sent through `place` on its way; experts are copied together."""
    if kind == "gpt2":
        return gpt2_from_disk(tensors, place)
    if kind not in EXPERTS_ON_DISK:
        return {name: place(tensor) for name, tensor in tensors.items()}
    block, names = EXPERTS_ON_DISK[kind]
    ours = {theirs: name for name, theirs in names.items()}
    out, stacks = {}, {}
    for name, tensor in tensors.items():
        name = name.replace(f".{block}.", ".mlp.")
        if ".experts." in name:
            prefix, number, matrix = name.removesuffix(".weight").rsplit(".", 2)
            stacks.setdefault(f"{prefix}.{ours[matrix]}", {})[int(number)] = tensor
        else:
            out[name] = place(tensor)
    return out | {name: torch.stack([place(stack[e]) for e in range(len(stack))]) for name, stack in stacks.items()}


GPT2_NAMES = {"model.embed_tokens.": "transformer.wte.", "model.embed_positions.": "transformer.wpe.",
              "model.norm.": "transformer.ln_f.", "model.layers.": "transformer.h.", ".input_layernorm.": ".ln_1.",
              ".post_attention_layernorm.": ".ln_2.", ".self_attn.c_attn.": ".attn.c_attn.",
              ".self_attn.o_proj.": ".attn.c_proj.", ".mlp.up_proj.": ".mlp.c_fc.", ".mlp.down_proj.": ".mlp.c_proj."}


def gpt2_to_disk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GPT-2's tensors under GPT-2's names: the layers' matrices transposed, those of q, k and v side by side."""
    out = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        tensor = tensor.T if ".layers." in name and tensor.dim() == 2 else tensor
        name = name.replace("q_proj", "c_attn")
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(ours, theirs)
        out[name] = tensor
    return out


def gpt2_from_disk(tensors: dict[str, Tensor], place: Callable) -> dict[str, Tensor]:
    """What `gpt2_to_disk` did, undone; the layers' matrices are copied."""
    out = {}
    for name, tensor in tensors.items():
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        parts = {"c_attn": tensor}
        if ".c_attn." in name:
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3, -1)))
        for part, one in parts.items():
            one = place(one)
            out[name.replace("c_attn", part)] = one.T.contiguous() if ".layers." in name and one.dim() == 2 else one
    return out


def fold_logit_scale(config: Config, tensors: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
    """An ordinary model that computes what this one with `mup_base_width` does: the factor of its last hidden states goes into
    the final norm, or without one into the head. It stays where there is neither, only a tied head."""
    if config.mup_base_width is None or config.norm_place not in ("pre", "both") and config.tie_word_embeddings:
        return config, tensors
    place = "model.norm." if config.norm_place in ("pre", "both") else "lm_head."
    factor = config.base_width / config.hidden_size
    return replace(config, mup_base_width=None), {
        name: tensor * factor if name.startswith(place) else tensor for name, tensor in tensors.items()}


def save_pretrained(model: Transformer, folder, tensors: dict[str, Tensor] | None = None):
    """Write `model` as a folder that `AutoModelForCausalLM.from_pretrained` and `load_pretrained` open, with its own weights
    or with `tensors`, gathered from the ranks that share them. The tokenizer's files are the caller's to add. A model with a
    mix of switches that no Hugging Face architecture has is written all the same, as model_type "flatlm", which
    `load_pretrained` alone reads. µP leaves no trace, see `fold_logit_scale`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config, tensors = fold_logit_scale(model.config, dict(model.state_dict() if tensors is None else tensors))
    dtype = tensors["model.embed_tokens.weight"].dtype
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    ends = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id") if getattr(config, key) is not None}
    save_safetensors(to_disk(tensors, model_type(config)), Path(folder, "model.safetensors"))
    write_atomically(Path(folder, "generation_config.json"), json.dumps(ends, indent=2).encode())
    write_atomically(Path(folder, "config.json"), json.dumps(config_to_json(config, dtype), indent=2).encode())


def read_json(path) -> dict:
    """The object in a JSON file; ValueError in one line when it is not one."""
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


# what is not read: buffers that older files carry and that are computed here, RoPE's frequencies and GPT-2's causal masks; and
# the score of a reward model, which is align.py's
BUFFERS = r"\.rotary_emb\.inv_freq$|(^|\.)attn\.(masked_)?bias$|^score\.weight$"


def load_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights in a folder, mapped from model.safetensors or from all the shards that model.safetensors.index.json names,
    and that file's path. ValueError when there are none, or when a shard is missing."""
    path = folder / "model.safetensors"
    if path.exists():
        return path, load_safetensors(path, BUFFERS)
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        pickled = sorted(file.name for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}"))
        raise ValueError(f"{folder} is no model folder: it has no model.safetensors" + (
            f"; pickled weights ({pickled[0]}) are never read: convert them to safetensors" if pickled else ""))
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{path} has no weight_map from names to files; copy it again")
    tensors = {}
    for shard in dict.fromkeys(shards.values()):
        if not (folder / shard).exists():
            raise ValueError(f"{folder} has no {shard}, which {path.name} names; copy it too")
        tensors |= load_safetensors(folder / shard, BUFFERS)
    return path, tensors


def spelled_as_today(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors under the names that transformers writes by default: OpenAI's files of GPT-2 leave out "transformer.", and
    experts may be stacked, gates upon ups."""
    if kind == "gpt2":
        whole = lambda name: name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        return {whole(name): tensor for name, tensor in tensors.items()}
    if kind not in EXPERTS_ON_DISK:
        return tensors
    block, names = EXPERTS_ON_DISK[kind]
    out = {}
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", f".{block}.")
        prefix, _, matrix = name.rpartition(".experts.")
        stacks = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(matrix)
        if stacks is None:
            out[name] = tensor
            continue
        for ours, stack in zip(stacks, tensor.chunk(len(stacks), 1)):
            out |= {f"{prefix}.experts.{e}.{names[ours]}.weight": one for e, one in enumerate(stack)}
    return out


def load_pretrained(folder, ops: Ops = Ops(), device=None, dtype: torch.dtype | None = None,
                    vocab_size: int | None = None) -> Transformer:
    """The model in a Hugging Face folder, its weights mapped from model.safetensors or from shards.

    `dtype`: None for the stored one (that of the embedding, where the file has several). `device`: where weights go, one
    after the other, so that no second copy is ever in memory; those that stay on the CPU in their dtype are not even read
    until they are used. `vocab_size`: see `grow_vocabulary`. ValueError in one line when the folder has no weights, when
    they are cut short, when their names or shapes contradict config.json, or when config.json asks for something this
    model does not have."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    values = read_json(folder / "config.json")
    try:
        config = config_from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if (folder / "generation_config.json").exists():      # chat models end at more tokens than config.json names
        ends = read_json(folder / "generation_config.json").get("eos_token_id")
        config = replace(config, eos_token_id=ends if ends is not None else config.eos_token_id)
    kind = values["model_type"]
    path, tensors = load_tensors(folder)
    tensors = spelled_as_today(tensors, kind)
    with torch.device("meta"):                            # shapes only: the file's tensors become the parameters
        model = Transformer(config, ops)
    expected = {name: tensor.shape for name, tensor in to_disk(model.state_dict(), kind).items()}
    embedding = next(iter(expected))
    if config.tie_word_embeddings:                        # which of the two names stands in the file is all the same
        del expected["lm_head.weight"]
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, tensors.setdefault(embedding, head).to(head.dtype)):
            raise ValueError(f"{path}: lm_head.weight is not {embedding}, though config.json ties them; if both are meant, "
                             "set tie_word_embeddings to false there")
    for name in [*expected, *tensors]:
        have, want = tensors[name].shape if name in tensors else None, expected.get(name)
        if have != want:
            say = lambda shape: "none" if shape is None else str(tuple(shape))
            raise ValueError(f"{path} does not fit config.json: {name} should have shape {say(want)} and has {say(have)}")
    dtype = dtype or tensors[embedding].dtype
    tensors = from_disk(tensors, kind, lambda tensor: tensor.to(device, dtype))
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model = model.to(device).requires_grad_()             # the tables of positions go along
    return model if vocab_size is None else grow_vocabulary(model, vocab_size)


@torch.no_grad()
def grow_vocabulary(model: Transformer, vocab_size: int) -> Transformer:
    """`model` with rows for more tokens in its embedding and its head, in place. Each new row is the mean of the old ones: a
    new token then gets at most 1 / old size of the probability that all old ones have together, whatever the hidden state,
    and theirs relative to each other stay (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    ValueError when `vocab_size` is smaller than the model's."""
    old, embedding, head = model.config.vocab_size, model.model["embed_tokens"], model.lm_head
    if vocab_size < old:
        raise ValueError(f"vocab_size is {vocab_size} and the model has {old} tokens, all of which stay; give {old} or more")

    def grown(weight: Tensor) -> nn.Parameter:
        mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        return nn.Parameter(torch.cat((weight, mean.expand(vocab_size - old, -1))), weight.requires_grad)

    embedding.weight = grown(embedding.weight)
    head.weight = embedding.weight if model.config.tie_word_embeddings else grown(head.weight)
    embedding.num_embeddings = head.out_features = vocab_size
    model.config = replace(model.config, vocab_size=vocab_size)
    return model


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
