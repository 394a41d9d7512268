"""
Inference: a model folder in, text out; in the terminal, from Python, or over HTTP.

A model gives a distribution over the next token; drawing from it, appending, and asking again writes text. Without memory,
every new token would run the whole text through the model. The key-value cache keeps what attention needs of earlier
positions, so that there are two phases. Prefill runs all of a prompt at once, in parallel over positions, and is bound by
arithmetic. Decode runs one position of each text, and is bound by reading the weights: texts that are decoded together
share that reading, which is why many cost little more than one. All that follows serves one of two ends, to read fewer
bytes for a token (weights of 8 bits, a cache that is never copied) or to get more tokens from a reading (many texts in the
rows of one cache, where a waiting prompt takes the row of a finished text at once; drafted tokens, checked all at once).

    python sample.py                                             # the newest run speaks
    python sample.py --model FOLDER                              # chat, if the model has a chat template
    python sample.py --model FOLDER --prompt "def parse(" --prompt "import os" --temperature 0.7 --top_p 0.9
    python sample.py --model FOLDER --serve                      # OpenAI's HTTP interface, and a page to chat on
    python sample.py score FILE --model FOLDER                   # perplexity and bits per byte of a text; choices, ranked
    python sample.py bench                                       # tokens per second, beside transformers where installed

    new = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0)       # lists of token ids, any lengths

Works on any folder that `model.load_pretrained` opens. Left out: a cache in pages, several devices, 4-bit weights.
"""
import argparse
import codecs
import copy
import dataclasses
import datetime
import functools
import gzip
import html
import json
import math
import os
import queue
import random
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from collections import deque
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from reprlib import repr as short                        # as repr, but of a long value its beginning and end

import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bpe import Tokenizer
from model import (PRESETS, Config, KVCache, Parser, Transformer, human, load_pretrained, load_safetensors, num_parameters,
                   read_json, rms_norm, save_pretrained)


# ------------------------------------------------------------------------------------------------------------------
# A request

class Text:
    """What tokens say, as they come: `settled` grows and never shrinks. A character whose bytes are split over tokens waits
    for all of them, and what may turn out to be the beginning of a stop string waits until that is decided."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str], keep_stop: bool):
        self.tokenizer, self.stops, self.keep_stop = tokenizer, stops, keep_stop
        self.decoder, self.whole, self.settled = codecs.getincrementaldecoder("utf-8")("replace"), "", ""
        self.stopped = False

    def put(self, token: int | None, may_stop: bool = True) -> bool:
        """Add a token's text, or with None the end; True when a stop string is complete, behind which nothing is settled."""
        if self.stopped:
            return True
        start = max(0, len(self.whole) - max(map(len, self.stops), default=0))
        self.whole += self.decoder.decode(b"" if token is None else self.bytes_of(token), token is None)
        stops = self.stops if may_stop else []
        found = [(self.whole.find(stop, start), stop) for stop in stops]
        place, stop = min(((place, stop) for place, stop in found if place >= 0), default=(-1, ""))
        if place >= 0:
            self.settled, self.stopped = self.whole[:place + len(stop) * self.keep_stop], True
            return True
        # the longest end of the text that a stop string begins with is not settled yet
        held = 0 if token is None else max((n for stop in stops for n in range(1, min(len(stop), len(self.whole) + 1))
                                            if self.whole.endswith(stop[:n])), default=0)
        self.settled = self.whole[:len(self.whole) - held]
        return False

    def bytes_of(self, token: int) -> bytes:
        """What a token says: nothing, if it is one of a template's (<|im_start|>), or one that the tokenizer does not know, of
        which a vocabulary that was padded to a round number has some."""
        said = self.tokenizer.decode_bytes([token]) if token in self.tokenizer.vocab else b""
        hidden = said.startswith(b"<|") and said.endswith(b"|>") and said.decode() in self.tokenizer.special_tokens
        return b"" if hidden else said


@dataclass(eq=False)
class Request:
    """A prompt, how to go on from it, and what has come of it so far.

    The next token is drawn from softmax(logits / temperature); temperature 0 takes the likeliest. `top_k` leaves the k
    likeliest tokens (Fan et al. 2018, arXiv 1805.04833); `top_p` of these the smallest set of likeliest ones that makes up p of
    the probability (Holtzman et al. 2019, arXiv 1904.09751); `min_p` those at least p times as probable as the likeliest
    (Nguyen et al. 2024, arXiv 2407.01082). `repetition_penalty` divides positive logits, and multiplies negative ones, of every
    token that stands in the text (Keskar et al. 2019, arXiv 1909.05858). Before `min_tokens` no ending id is drawn, and no stop
    string counts."""
    prompt: list[int]
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple = ()                             # token ids and strings that end the text
    keep_stop: bool = False                      # leave the stop string in the text
    seed: int | None = None                      # the same seed, the same draws, whoever is decoded beside it
    log_probs: bool = False                      # keep the log-probability of each new token

    tokens: list[int] = dataclasses.field(default_factory=list)              # the new ones; what ends the text is the last
    token_log_probs: list[float] = dataclasses.field(default_factory=list)   # log softmax(logits), whatever the settings
    finish_reason: str | None = None             # then "stop" (an ending id, a stop), "length" or "cancelled"

    # the engine's: prompt and new tokens, ids that end the text, its random numbers, its text, what `look_up` remembers of it
    context: list[int] = dataclasses.field(init=False, repr=False)
    ends: set[int] = dataclasses.field(init=False, repr=False)
    dice: random.Random = dataclasses.field(init=False, repr=False)
    _text: Text = dataclasses.field(init=False, repr=False)
    follow: dict = dataclasses.field(init=False, repr=False)
    indexed: int = dataclasses.field(init=False, repr=False)

    @property
    def text(self) -> str:
        """What the new tokens say as far as it is settled, without ending ids."""
        return self._text.settled

    def check(self, config: Config, name: str = "the prompt"):
        """ValueError in one line for what cannot be generated."""
        if not isinstance(self.prompt, list) or not all(isinstance(id, int) for id in self.prompt):
            raise ValueError(f"{name} is {short(self.prompt)}; it must be a list of token ids")
        if self.tokens or self.finish_reason:
            raise ValueError(f"{name} belongs to a request that was answered before; make a new one")
        if len(self.prompt) >= config.max_position_embeddings:
            raise ValueError(f"{name} has {len(self.prompt)} tokens and the context holds {config.max_position_embeddings}, "
                             "one of which the first new token needs: nothing was generated; shorten the prompt")
        if not self.prompt and config.bos_token_id is None:
            raise ValueError(f"{name} is empty, and the model has no beginning-of-sequence token to start from")
        if self.prompt and not 0 <= min(self.prompt) <= max(self.prompt) < config.vocab_size:
            raise ValueError(f"{name} has an id outside the vocabulary of {config.vocab_size}")
        for stop in self.stop:
            if isinstance(stop, int) and not 0 <= stop < config.vocab_size:
                raise ValueError(f"stop has the id {stop}, outside the vocabulary of {config.vocab_size}")
        self.check_settings()

    def check_settings(self):
        """ValueError in one line for a setting that makes no sense, whatever the model."""
        for field, fine, rule in (
                ("max_new_tokens", self.max_new_tokens >= 0, "at least 0"),
                ("temperature", 0 <= self.temperature < math.inf, "at least 0, and finite"),
                ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
                ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
                ("min_tokens", self.min_tokens >= 0, "at least 0")):
            if not fine:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be {rule}")
        if "" in self.stop:
            raise ValueError("a stop string is empty; leave it out")


def ending_ids(config: Config, stop=()) -> set[int]:
    """The ids after which a text ends: the model's own (one, several or none) and those in `stop`."""
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {id for id in (*own, *stop) if isinstance(id, int) and 0 <= id < config.vocab_size}


# ------------------------------------------------------------------------------------------------------------------
# From logits to a token

def probabilities(logits: Tensor, requests: list[Request], seen: Tensor | None = None, ahead: int = 0) -> Tensor:
    """What the next token of each request is drawn from: logits (n, V) -> (n, V) in float32.

    `seen` (n, V) is true for the tokens that stand in the text, `ahead` the number of tokens drafted behind it."""
    column = lambda values: torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]
    logits = logits.float()
    if seen is not None:
        penalty = column([request.repetition_penalty for request in requests])
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    young = [row for row, request in enumerate(requests) if len(request.tokens) + ahead < request.min_tokens]
    if young:
        logits = logits.clone()
        for row in young:
            logits[row, list(requests[row].ends)] = float("-inf")
    likeliest = logits.argmax(-1, keepdim=True)
    greedy = [request.temperature == 0 for request in requests]
    if all(greedy):
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1)
    logits = logits - logits.gather(-1, likeliest)           # 0 at most, so that no temperature overflows
    p = (logits / column([max(request.temperature, 1e-6) for request in requests])).softmax(-1)
    if any(request.top_k or (request.top_p or 1) < 1 for request in requests):
        p = truncate(p, column([request.top_k or p.shape[-1] for request in requests]),
                     column([request.top_p or 1.0 for request in requests]))
    if any(request.min_p for request in requests):
        p = p.where(p >= column([request.min_p or 0.0 for request in requests]) * p.amax(-1, keepdim=True), 0)
    if any(greedy):
        rows = torch.tensor(greedy, device=logits.device)[:, None]
        p = torch.where(rows, torch.zeros_like(p).scatter_(-1, likeliest, 1), p)
    return p / p.sum(-1, keepdim=True)


def truncate(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities p (n, V) with all but each row's top_k likeliest tokens at zero, and of those all but the fewest that make
    up top_p of what is left; never none. top_k and top_p (n, 1).

    To sort a whole vocabulary takes ten times as long as to find its 1,024 likeliest tokens, which are mostly enough."""
    whole = (top_k >= p.shape[-1]) & (top_p >= 1)
    for count in (min(1024, p.shape[-1]), p.shape[-1]):
        values, order = p.topk(count)                                        # (n, count), descending
        within = values.where(torch.arange(count, device=p.device) < top_k, 0)
        total = torch.where(top_k <= count, within.sum(-1, keepdim=True), 1.0)
        before = within.cumsum(-1) - within                                  # the mass of likelier tokens
        # the rest matters to no row when top_k ends among these, or when without top_k the last of them would be left out
        enough = (top_k <= count) | (top_k >= p.shape[-1]) & (before[:, -1:] >= top_p)
        if count == p.shape[-1] or (whole | enough).all():
            kept = (before < top_p * total) | (before == 0)                  # the likeliest whatever top_p is
            return torch.where(whole, p, torch.zeros_like(p).scatter(-1, order, within.where(kept, 0)))


def pick(p: Tensor, u: list[float]) -> Tensor:
    """One token a row, (n): where the cumulated probabilities p (n, V) pass the share u (n) of their sum. Drawing costs a
    single uniform number this way, which each text takes from its own generator."""
    cumulated = p.cumsum(-1)
    share = torch.tensor(u, dtype=torch.float32, device=p.device)[:, None].clamp(max=1 - 2 ** -20)
    return torch.searchsorted(cumulated, share * cumulated[:, -1:], right=True)[:, 0]


# ------------------------------------------------------------------------------------------------------------------
# Weights made ready: matrices that share their input joined to one, and packed or rounded for the machine

def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> whole numbers of 8 bits, and a scale for each row in weight's dtype: row i is about
    scale[i] · int8[i], off by half a scale, where the scale is 1/127 of the row's largest weight."""
    scale = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).to(weight.dtype)
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Product:
    """x Wᵀ + b of one linear layer, or of several that share x and are computed as one.

    Decoding multiplies few rows by large matrices and waits for memory. On a CPU, oneDNN reads a matrix that it has laid
    out beforehand up to three times as fast as one in rows. 8 bits halve the bytes of bfloat16; their CPU kernel computes
    row by row, so that for many rows it is faster to widen the weights first."""

    def __init__(self, layers: list[nn.Linear], int8: bool, pack: bool):
        self.sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
        biases = [layer.bias for layer in layers]
        self.bias = torch.cat(biases) if biases[0] is not None else None
        self.scale, self.on_cpu = None, weight.device.type == "cpu"
        if int8:
            self.weight, self.scale = quantize(weight)
            return
        # small matrices gain nothing: a call of oneDNN's takes 10 microseconds more
        self.packed = (pack and self.on_cpu and torch.backends.mkldnn.is_available() and weight.numel() >= 2 ** 17
                       and weight.dtype in (torch.float32, torch.bfloat16))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16) if self.packed else weight

    def __call__(self, x: Tensor):
        if self.scale is not None:
            y = self.of_int8(x)
        elif self.packed:
            y = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if len(self.sizes) == 1 else y.split_with_sizes(self.sizes, -1)

    def of_int8(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.on_cpu and rows <= 24 and x.dtype == torch.bfloat16:
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """model.rms_norm by PyTorch's own: one call where the formula takes six, which count when each is a microsecond's work."""
    return F.rms_norm(x, weight.shape, weight, eps)


@torch.no_grad()
def prepare(model: Transformer, dtype: torch.dtype | None = None, int8: bool = False, pack: bool = True,
            consume: bool = False) -> Transformer:
    """A model for inference alone that computes what `model` does: its own modules, in evaluation mode, on the same tensors
    but for the linear layers, which become `Product`s (with int8 rounded, all but the embedding, the router and the experts,
    and in bfloat16 otherwise). Later changes to the weights of `model` do not reach it. `consume` takes them away from `model`,
    so that, as long as `dtype` is theirs, matrices go one by one and there are never two of all."""
    dtype = dtype or (torch.bfloat16 if int8 else model.lm_head.weight.dtype)
    ops = replace(model.ops, rms_norm=fused_rms_norm) if model.ops.rms_norm is rms_norm else model.ops
    with torch.device("meta"):
        ready = Transformer(model.config, ops)
    ready.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, assign=True)
    ready = ready.to(model.cos.device).eval().requires_grad_(False)
    if consume:
        model.to("meta")
    product = lambda *layers: Product(layers, int8, pack)

    def exchange(module: nn.Module, name: str):
        layer = getattr(module, name)
        delattr(module, name)                                                # a module's name takes nothing but modules
        setattr(module, name, product(layer))

    for layer in ready.model["layers"]:
        attention, mlp = layer.self_attn, layer.mlp
        attention.project = product(attention.q_proj, attention.k_proj, attention.v_proj)
        del attention.q_proj, attention.k_proj, attention.v_proj
        exchange(attention, "o_proj")
        if model.config.num_local_experts:
            continue
        if mlp.kind == "swiglu":
            mlp.project = product(mlp.gate_proj, mlp.up_proj)
            del mlp.gate_proj, mlp.up_proj
        else:
            exchange(mlp, "up_proj")
        exchange(mlp, "down_proj")
    exchange(ready, "lm_head")
    return ready


def ready_tensors(model: Transformer) -> list[Tensor]:
    """All weights of a model that `prepare` made, those of its products too."""
    products = [product for module in model.modules() for product in vars(module).values() if isinstance(product, Product)]
    return [*model.state_dict().values(), *(t for product in products for t in (product.weight, product.scale, product.bias)
                                            if t is not None)]


# ------------------------------------------------------------------------------------------------------------------
# The engine

class Rows:
    """A model and its cache: a row of `length` positions for each text that is being written, the busy ones first. `held` has
    the tokens whose keys stand in each row; the engine keeps it, for the draft model's rows and the model's alike."""

    def __init__(self, model: Transformer, held: list[list[int]], length: int, compile: bool):
        self.model, self.device, self.held, self.length = model, model.cos.device, held, length
        self.cache = KVCache(model.config, len(held), length, self.device, model.model["embed_tokens"].weight.dtype)
        self.graphs, self.fixed = {}, compile or self.device.type == "cuda"
        self.step = torch.compile(self.run, dynamic=False) if compile else self.run

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens (n, S) behind the rows of `cache` -> logits (n, S, V)."""
        return self.model.logits(self.model.hidden(tokens, cache))

    @torch.inference_mode()
    def prefill(self, first: int, lengths: list[int], texts: list[list[int]]):
        """Put texts behind rows `first` and following, which hold `lengths`. Shorter ones are padded on the right: nothing sees
        the padding, since attention is causal, and what comes next is written over it."""
        tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, text in zip(tokens, texts):
            row[:len(text)] = torch.tensor(text)
        cache = self.cache.rows(first, first + len(texts), max(lengths), min(lengths) == max(lengths))
        cache.lengths.copy_(torch.tensor(lengths))
        self.model.hidden(tokens.to(self.device), cache)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """tokens (n, S) behind rows 0 .. n-1, which hold `lengths` -> logits (n, S, V)."""
        rows, count = tokens.shape
        tokens = tokens.to(self.device)
        if not self.fixed:
            self.cache.lengths[:rows].copy_(torch.tensor(lengths))
            return self.run(tokens, self.cache.rows(0, rows, max(lengths), min(lengths) == max(lengths)))
        # shapes that were compiled or recorded can be used again: as many rows and positions as the next power of two
        wide = min(1 << (rows - 1).bit_length(), len(self.cache.lengths))
        end = min(max(256, 1 << (max(lengths) + count - 1).bit_length()), self.length)
        for row in range(rows, wide):                    # rows of nobody write, too: behind what they may keep
            del self.held[row][end - count:]
        self.cache.lengths[:wide].copy_(torch.tensor(lengths + [end - count] * (wide - rows)))
        return self.replay(F.pad(tokens, (0, 0, 0, wide - rows)), end)[:rows]

    def replay(self, tokens: Tensor, end: int) -> Tensor:
        """`step` for shapes seen before; on a GPU recorded once as a CUDA graph, so that its hundreds of kernels are launched
        as one."""
        key = (*tokens.shape, end)
        if self.device.type != "cuda":
            return self.step(tokens, self.cache.rows(0, len(tokens), end - tokens.shape[1], False))
        if key not in self.graphs:
            lengths, tokens = self.cache.lengths.clone(), tokens.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                                  # kernels are compiled and chosen before recording
                for _ in range(3):
                    self.cache.lengths.copy_(lengths)
                    self.step(tokens, self.cache.rows(0, len(tokens), end - tokens.shape[1], False))
            torch.cuda.current_stream().wait_stream(stream)
            self.cache.lengths.copy_(lengths)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.step(tokens, self.cache.rows(0, len(tokens), end - tokens.shape[1], False))
            self.graphs[key] = graph, tokens, logits
            self.cache.lengths.copy_(lengths)
        graph, static, logits = self.graphs[key]
        static.copy_(tokens)
        graph.replay()
        return logits

    def copy(self, source: int, target: int, count: int):
        """The first `count` positions of row `source`, to row `target` as well."""
        for store in (self.cache.keys, self.cache.values):
            store[:, target, :, :count] = store[:, source, :, :count]

    def swap(self, a: int, b: int, count: int):
        """Exchange the first `count` positions of two rows."""
        for store in (self.cache.keys, self.cache.values):
            store[:, [a, b], :, :count] = store[:, [b, a], :, :count]


class Engine:
    """Writes many texts at once: `submit` requests, `step` until nobody waits.

    A step gives waiting requests the free rows, runs their prompts but for the last token, and then decodes one token for
    every row (speculation: several). A row whose text is finished goes to the next request at once; its keys stay until then,
    so that a prompt that begins like a text in any row takes over what is computed already: samples of one prompt, a
    conversation's next turn, questions behind the same examples.

    `context` positions are kept for each text (by default the model's). `draft`, a smaller model with the same tokenizer, or
    without it a look-up of the latest tokens in the text itself, proposes `speculate` tokens; one pass of the model checks
    them all (see `verify`). dtype, int8 and consume are those of `prepare`; what it makes is made once, here."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, slots: int = 16, context: int | None = None,
                 draft: Transformer | None = None, speculate: int = 0, dtype: torch.dtype | None = None, int8: bool = False,
                 compile: bool = False, consume: bool = False):
        if draft is not None and draft.config.vocab_size != model.config.vocab_size:
            raise ValueError(f"the draft model has {draft.config.vocab_size} tokens and the model {model.config.vocab_size}; "
                             "they must share a tokenizer")
        for name, value, least in (("slots", slots, 1), ("context", 2 if context is None else context, 2),
                                   ("speculate", speculate, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.tokenizer, self.slots, self.speculate = tokenizer, slots, speculate or (4 if draft else 0)
        # drafts stand behind a text's last position, so the text has to leave room for them
        room = min(made.config.max_position_embeddings for made in (model, draft) if made) - self.speculate
        if room < 2:
            raise ValueError(f"speculate is {speculate}, and the models have no {self.speculate + 2} positions; take fewer")
        self.context = min(context or room, room)
        self.held = [[] for _ in range(slots)]           # the tokens whose keys stand in each row
        rows = lambda made: Rows(prepare(made, dtype, int8, not compile, consume), self.held,
                                 self.context + self.speculate, compile)
        self.target, self.draft = rows(model), rows(draft) if draft else None
        self.ready = dict(dtype=dtype, int8=int8, pack=not compile)
        self.both = [self.target] + ([self.draft] if draft else [])
        self.model = self.target.model
        self.waiting, self.active = deque(), []          # the request in active[i] has row i
        self.used = [0] * slots                          # when each row was last given away
        self.drafted = self.accepted = self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.active)

    def submit(self, request: Request, name: str = "the prompt"):
        """Let `request` wait for a row. ValueError in one line, with `name` for the prompt, for what cannot be generated."""
        request.check(replace(self.model.config, max_position_embeddings=self.context), name)
        stops = [stop for stop in request.stop if isinstance(stop, str)]
        if stops and self.tokenizer is None:
            raise ValueError(f"stop string {stops[0]!r} needs a tokenizer; give the engine one, or stop at token ids")
        request.context = [*(request.prompt or [self.model.config.bos_token_id])]        # and the new tokens behind it
        request.ends = ending_ids(self.model.config, request.stop)
        request.dice = random.Random(request.seed)
        request._text = Text(self.tokenizer, stops, request.keep_stop)
        request.follow, request.indexed = {}, 1                              # see `look_up`
        if request.max_new_tokens == 0:
            request.finish_reason = "length"
        else:
            self.waiting.append(request)

    def cancel(self, request: Request):
        """End a request, wherever it stands; nothing when it is finished."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            if request in self.active:
                self.release(self.active.index(request))
            elif request in self.waiting:
                self.waiting.remove(request)

    def reset(self):
        """Cancel everything and forget all rows, after a step that failed."""
        for request in (*self.waiting, *self.active):
            request.finish_reason = "cancelled"
        self.waiting.clear()
        self.active.clear()
        self.held[:] = [[] for _ in self.held]

    def refresh(self, model: Transformer):
        """Take over the weights of `model`, which has the shape of the engine's own: those of the same model after a training
        step, say. What the rows hold is forgotten. Where graphs were recorded the weights are overwritten where they lie, so that
        a model of the engine's dtype, with which it may share them, changes too. RuntimeError while requests wait or run."""
        if self.busy:
            raise RuntimeError(f"{len(self.waiting) + len(self.active)} request(s) are under way; finish or cancel them first")
        fresh = prepare(model, **self.ready)
        if self.target.fixed:                            # graphs read from where the weights lay when they were recorded
            with torch.no_grad():
                for old, new in zip(ready_tensors(self.model), ready_tensors(fresh)):
                    old.copy_(new)
        else:
            self.model = self.target.model = fresh
        self.reset()
        self.used, self.steps = [0] * self.slots, 0

    def step(self) -> list[Request]:
        """One round; the requests that took part."""
        self.admit()
        took_part = list(self.active)
        if not took_part:
            return []
        written = self.draft_and_verify(self.speculate) if self.speculate else self.decode()
        for row, (request, new) in enumerate(zip(took_part, written)):
            self.held[row] += [request.context[-1], *(token for token, _ in new[:-1])]
            for token, log_prob in new:
                self.extend(request, token, log_prob)
                if request.finish_reason:
                    break
        for row in reversed(range(len(took_part))):
            if took_part[row].finish_reason:
                self.release(row)
        return took_part

    # --- prompts

    def admit(self):
        """Give free rows to those who wait. Prompts that begin alike wait for the first of them, and take over its keys."""
        while self.waiting and len(self.active) < self.slots:
            wave, later, first = {}, [], len(self.active)                    # prompts of the wave by their beginning
            chosen, free = [], self.slots - first
            while self.waiting and len(chosen) + len(later) < free:
                request = self.waiting.popleft()
                prompt = request.context[:-1]
                alike = wave.setdefault(tuple(prompt[:64]), prompt)
                waits = alike is not prompt and shared(alike, prompt) > self.taken_over(prompt)[0] + 15
                (later if waits else chosen).append(request)
            self.waiting.extendleft(reversed(later))
            for request in sorted(chosen, key=lambda request: len(request.context)):     # alike in length: little padding
                self.place(request)
            self.prefill(first)

    def taken_over(self, prompt: list[int]) -> tuple[int, int]:
        """How much of a prompt stands in the row that holds most of it, and which row that is."""
        common = row = 0
        for slot, held in enumerate(self.held):
            alike = shared(held, prompt)
            common, row = (alike, slot) if alike > common else (common, row)
            if common == len(prompt):
                break
        return common, row

    def place(self, request: Request):
        """Give `request` the next row, with what another row holds of its prompt."""
        row, prompt = len(self.active), request.context[:-1]
        common, source = self.taken_over(prompt)
        common = common if common >= max(1, min(16, len(prompt))) else 0
        if common and source > row:                      # a free row that begins like this
            self.swap(source, row)
        elif not common or source < row:                 # the free row that was given away longest ago
            self.swap(min(range(row, self.slots), key=lambda free: (bool(self.held[free]), self.used[free])), row)
        if common and source < row:                      # somebody is writing there
            for rows in self.both:
                rows.copy(source, row, common)
        self.held[row] = prompt[:common]
        self.steps += 1
        self.used[row] = self.steps
        self.active.append(request)

    def prefill(self, first: int):
        """Run what the rows from `first` do not hold of their prompts, those of similar length together."""
        rest = {row: self.active[row].context[len(self.held[row]):-1] for row in range(first, len(self.active))}
        rows = [row for row in rest if rest[row]]
        while rows:
            group = [rows.pop(0)]
            while rows and self.go_together([*group, rows[0]], rest):
                group.append(rows.pop(0))
            for part in self.both:
                part.prefill(group[0], [len(self.held[row]) for row in group], [rest[row] for row in group])
            for row in group:
                self.held[row] += rest[row]

    def go_together(self, rows: list[int], rest: dict[int, list[int]]) -> bool:
        """Whether these rows can be prefilled as one: neighbours, all from the beginning or none (an empty cache has a faster
        attention), at most a fifth of it padding, of 8,192 positions at most, which keep any device busy, and none of it
        beyond the rows' end."""
        longest = max(len(rest[row]) for row in rows)
        return (rows[-1] - rows[0] == len(rows) - 1 and len({bool(self.held[row]) for row in rows}) == 1
                and longest * len(rows) <= min(8192, 1.25 * sum(len(rest[row]) for row in rows))
                and longest + max(len(self.held[row]) for row in rows) <= self.target.length)

    # --- tokens

    def lengths(self) -> list[int]:
        """How many positions each busy row holds."""
        return [len(held) for held in self.held[:len(self.active)]]

    def last_tokens(self) -> Tensor:
        """The token of each text that the cache does not hold yet: the next to run."""
        return torch.tensor([[request.context[-1]] for request in self.active])          # (n, 1)

    def decode(self) -> list[list[tuple[int, float | None]]]:
        """The next token of every row, each with its log-probability where that is wanted."""
        logits = self.target.forward(self.last_tokens(), self.lengths())[:, 0]
        plain = all(r.temperature == 0 and r.repetition_penalty == 1 and len(r.tokens) >= r.min_tokens for r in self.active)
        if plain:
            tokens = logits.float().argmax(-1)
        else:
            p = probabilities(logits, self.active, self.seen())
            tokens = pick(p, [request.dice.random() for request in self.active])
        return [[pair] for pair in zip(tokens.tolist(), self.log_probs(logits, tokens))]

    def seen(self) -> Tensor | None:
        """(n, V): the tokens that stand in each text; None when nobody asks."""
        if all(request.repetition_penalty == 1 for request in self.active):
            return None
        seen = torch.zeros(len(self.active), self.model.config.vocab_size, dtype=torch.bool)
        for row, request in zip(seen, self.active):
            row[request.context] = True
        return seen.to(self.target.device)

    def log_probs(self, logits: Tensor, tokens: Tensor) -> list[float | None]:
        """log softmax(logits)[token] of each row; None when nobody asks."""
        if not any(request.log_probs for request in self.active):
            return [None] * len(self.active)
        return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()

    def draft_and_verify(self, count: int) -> list[list[tuple[int, float | None]]]:
        """`count` tokens drafted for every row, and those of them that stand, with one more."""
        lengths, last = self.lengths(), self.last_tokens()
        drafts, q = self.look_up(count) if self.draft is None else self.draft_tokens(count, lengths, last)
        drafts = drafts.to(self.target.device)
        logits = self.target.forward(torch.cat((last.to(drafts.device), drafts), 1), lengths)        # (n, count + 1, V)
        tokens, counts = self.verify(logits, drafts, q)
        self.drafted += drafts.numel()
        self.accepted += int(counts.sum()) - len(counts)
        by_place = [self.log_probs(logits[:, place], tokens[:, place]) for place in range(count + 1)]
        return [[(token, by_place[place][row]) for place, token in enumerate(line[:n])]
                for row, (line, n) in enumerate(zip(tokens.tolist(), counts.tolist()))]

    def draft_tokens(self, count: int, lengths: list[int], token: Tensor) -> tuple[Tensor, Tensor]:
        """`count` tokens from the draft model, (n, count), and what each was drawn from, (n, count, V)."""
        drafts, q, seen = [], [], self.seen()
        for place in range(count):
            p = probabilities(self.draft.forward(token, [n + place for n in lengths])[:, 0], self.active, seen, place)
            token = pick(p, [request.dice.random() for request in self.active])[:, None]
            seen = seen if seen is None else seen.scatter(1, token, True)
            drafts.append(token)
            q.append(p)
        self.draft.forward(token, [n + count for n in lengths])              # its cache has to hold the last one, too
        return torch.cat(drafts, 1), torch.stack(q, 1)

    def look_up(self, count: int) -> tuple[Tensor, None]:
        """What followed the latest three tokens, or two, or one, when they last stood in the text: (n, count)
        (Saxena 2023, prompt lookup decoding)."""
        drafts = []
        for request in self.active:
            context = request.context
            for end in range(request.indexed, len(context)):                 # remember of every short sequence where it ends
                request.follow |= {tuple(context[end - n:end]): end for n in (1, 2, 3)}
            request.indexed = len(context)
            place = next((request.follow[key] for n in (3, 2, 1) if (key := tuple(context[-n:])) in request.follow), len(context))
            found = context[place:place + count]
            drafts.append(found + [context[-1]] * (count - len(found)))
        return torch.tensor(drafts), None

    def verify(self, logits: Tensor, drafts: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which drafted tokens stand: logits (n, S + 1, V), drafts (n, S) drawn from q (n, S, V), or certain where q is None ->
        tokens (n, S + 1) and how many of each row count, at least one.

        A draft x is accepted with probability min(1, p(x) / q(x)), p being the model's own distribution; the first one that is
        not is replaced by a draw from max(0, p - q), normed, and behind all that are accepted stands one drawn from p. Every
        token is then distributed as if drawn from p (Leviathan et al. 2023, arXiv 2211.17192, appendix A.1)."""
        tokens, seen = F.pad(drafts, (0, 1)), self.seen()
        counts = torch.zeros(len(drafts), dtype=torch.int64, device=drafts.device)
        alive = torch.ones_like(counts, dtype=torch.bool)
        uniform = lambda: [min(request.dice.random(), 1 - 2 ** -24) for request in self.active]    # below 1 in float32, too
        for place in range(drafts.shape[1] + 1):
            p = probabilities(logits[:, place], self.active, seen, place)
            stands, rest = torch.zeros_like(alive), p
            if place < drafts.shape[1]:
                draft = drafts[:, place:place + 1]                           # (n, 1)
                asked = torch.zeros_like(p).scatter_(1, draft, 1) if q is None else q[:, place]
                odds = (p.gather(1, draft) / asked.gather(1, draft))[:, 0]
                stands = torch.tensor(uniform(), device=p.device) < odds
                rest = (p - asked).clamp(min=0)
                rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # where p = q nothing is refused, but for rounding
            drawn = pick(rest, uniform())
            tokens[:, place] = torch.where(alive & ~stands, drawn, tokens[:, place])
            counts += alive
            alive = alive & stands
            if place < drafts.shape[1] and seen is not None:
                seen = seen.scatter(1, draft, True)
        return tokens, counts

    def extend(self, request: Request, token: int, log_prob: float | None):
        """Write a token behind a text, and see whether that ends it."""
        request.tokens.append(token)
        request.context.append(token)
        if request.log_probs:
            request.token_log_probs.append(log_prob)
        may_stop = len(request.tokens) >= request.min_tokens
        if token in request.ends or self.tokenizer is not None and request._text.put(token, may_stop):
            request.finish_reason = "stop"
        elif len(request.tokens) == request.max_new_tokens or len(request.context) == self.context:
            request.finish_reason = "length"
        if request.finish_reason and self.tokenizer is not None:
            request._text.put(None)                      # what was held back is text after all

    # --- rows

    def release(self, row: int):
        """Free a row; the last busy one takes its place, so that the busy rows stay together."""
        last = len(self.active) - 1
        if row != last:
            self.swap(row, last)
            self.active[row] = self.active[last]
        self.active.pop()

    def swap(self, a: int, b: int):
        """Exchange two rows of every cache, as far as they hold something."""
        count = max(len(self.held[a]), len(self.held[b]))
        if a != b and count:
            for rows in self.both:
                rows.swap(a, b, count)
        self.held[a], self.held[b] = self.held[b], self.held[a]
        self.used[a], self.used[b] = self.used[b], self.used[a]

    def run(self, requests: list[Request], progress: bool = False) -> list[Request]:
        """Submit requests and step until all of them are done."""
        for number, request in enumerate(requests, 1):
            request.check(replace(self.model.config, max_position_embeddings=self.context), f"prompt {number}")
        for number, request in enumerate(requests, 1):
            self.submit(request, f"prompt {number}")
        with tqdm(total=len(requests), unit="text", disable=not progress) as bar:
            while self.busy:
                bar.update(sum(request.finish_reason is not None for request in self.step()))
        return requests


def shared(a: list[int], b: list[int]) -> int:
    """How many tokens a and b have in common at their beginnings."""
    if a[:1] != b[:1]:
        return 0
    low, high = 0, min(len(a), len(b))
    while low < high:                                    # slices compare at 5 ns a token, a loop takes 50
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop=None, seed: int | None = None,
             draft: Transformer | None = None, tokenizer: Tokenizer | None = None, slots: int | None = None,
             speculate: int = 0, log_probs: bool = False, dtype: torch.dtype | None = None, int8: bool = False, **settings):
    """The new tokens for each prompt, a list of lists of ids; with log_probs=True also their log-probabilities, as lists.

    prompts: lists of ids of any lengths; an empty one starts from the model's beginning-of-sequence token. A text ends after
    `max_new_tokens`, where the context is full, or with one of the model's end-of-sequence ids or of `stop` (ids, or strings
    where a tokenizer is given), whose last token is its last then. With a seed prompt i draws by seed + i: the same seed gives
    the same tokens, and equal prompts draw independently. Further settings, such as min_p and min_tokens, are those of
    `Request`; draft, speculate, dtype and int8 those of `Engine`. ValueError for a prompt that fills the context, ids outside
    the vocabulary, or settings out of range."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    requests = [Request(prompt, max_new_tokens, temperature, top_k, top_p, stop=stop, log_probs=log_probs,
                        seed=None if seed is None else seed + number, **settings) for number, prompt in enumerate(prompts)]
    longest = max(map(len, prompts), default=0) + max_new_tokens + 1
    slots = slots or max(1, min(len(prompts), 256 if model.cos.device.type == "cuda" else 64))
    Engine(model, tokenizer, slots, max(2, longest), draft, speculate, dtype, int8).run(requests)
    tokens = [request.tokens for request in requests]
    return (tokens, [request.token_log_probs for request in requests]) if log_probs else tokens


# ------------------------------------------------------------------------------------------------------------------
# Chat: from messages to tokens

# for models that bring no template: with ChatML's tokens (Qwen's and SmolLM's form), and with no special tokens at all
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
PLAIN = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}Assistant:"
ROLES = ("system", "user", "assistant")


def chat_template(tokenizer: Tokenizer) -> tuple[str, tuple]:
    """The model's own template, or one that its tokens allow, and what ends an answer beside the model's ending ids."""
    if tokenizer.chat_template:
        return tokenizer.chat_template, ()
    if "<|im_start|>" in tokenizer.special_tokens and "<|im_end|>" in tokenizer.special_tokens:
        return CHATML, (tokenizer.special_tokens["<|im_end|>"],)
    return PLAIN, ("\n\nUser:", "\n\nSystem:")


def chat_tokens(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next answer begins.

    messages: {"role": "system" | "user" | "assistant", "content": text}, in order. The template (Jinja, in a sandbox) may
    write special tokens; what people say may not: a special token in it is encoded as the characters it is spelt with.
    ValueError for an unknown role, a message without content, or what the template refuses."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {number} has role {role!r}; it must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has content {message.get('content')!r}; it must be text")
    if not messages:
        raise ValueError("there is no message; give at least one")
    messages, mark = break_special_tokens(tokenizer, messages)
    if not mark:                                         # nobody said one: all that the template writes are meant
        return tokenizer.encode(render(tokenizer, messages), special="allow")
    ids, names = [], sorted(tokenizer.special_tokens, key=len, reverse=True)
    for i, part in enumerate(regex.split("(" + "|".join(map(regex.escape, names)) + ")", render(tokenizer, messages))):
        ids += [tokenizer.special_tokens[part]] if i % 2 else tokenizer.encode(part.replace(mark, ""), special="text")
    return ids


def break_special_tokens(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[dict], str]:
    """The messages with a mark, a character that nobody uses, inside of every special token that somebody spells; and the
    mark, "" if there is none to break. What the assistant thought stays marked as such: templates look for it."""
    mark = next(chr(code) for code in range(0xE000, 0xF900) if not any(chr(code) in message["content"] for message in messages))
    broken = []
    for message in messages:
        text = message["content"]
        for name in tokenizer.special_tokens:
            if len(name) > 1 and not (message["role"] == "assistant" and name in ("<think>", "</think>")):
                text = text.replace(name, name[0] + mark + name[1:])
        broken.append(message | {"content": text})
    return broken, mark if any(mark in message["content"] for message in broken) else ""


def render(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """The conversation as the template writes it, with the beginning of the next answer."""
    try:
        import jinja2.sandbox
    except ImportError:
        raise ValueError("chat templates need Jinja: pip install jinja2") from None
    names = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    try:
        template = compile_template(chat_template(tokenizer)[0])
        return template.render(messages=messages, add_generation_prompt=True, tools=None, **names)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from None


@functools.lru_cache(8)                                  # it takes milliseconds, and training renders thousands of conversations
def compile_template(template: str):
    """A chat template in Jinja's form, in a sandbox."""
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return environment.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))       # marks for training


# ------------------------------------------------------------------------------------------------------------------
# Scoring: how probable a model finds what is there

@torch.inference_mode()
def log_probs_of(model: Transformer, rows: list[list[int]]) -> list[Tensor]:
    """For each row of token ids the log-probability of every token but the first, given all before it, in float32."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for line, row in zip(tokens, rows):
        line[:len(row)] = torch.tensor(row)
    tokens = tokens.to(model.cos.device)
    hidden, out = model.hidden(tokens[:, :-1]), torch.empty(len(rows), tokens.shape[1] - 1)
    for start in range(0, out.shape[1], 256):            # the logits of a whole text would be its largest tensor by far
        part = model.logits(hidden[:, start:start + 256]).float().log_softmax(-1)
        out[:, start:start + 256] = part.gather(-1, tokens[:, start + 1:start + 257, None])[..., 0].cpu()
    return [line[:len(row) - 1] for line, row in zip(out, rows)]


def score(model: Transformer, tokens: list[int], stride: int | None = None, bar: tqdm | None = None) -> Tensor:
    """The log-probability of every token of a text but the first, through a window that is moved by `stride`: each token but
    those of the first window has at least context - stride tokens before it. stride is half of the context by default; 1 is
    the most exact, and takes a pass for each token."""
    context = model.config.max_position_embeddings
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}; it must be at least 1 and at most the context, {context}, or tokens are left out")
    windows, done = [], 1                                # tokens[:done] are scored, or first
    for start in range(0, len(tokens), stride):
        window = tokens[start:start + context + 1]
        if start + len(window) > done:
            windows.append((window, done - start - 1))
            done = start + len(window)
    parts, together = [torch.empty(0)], max(1, 16384 // context)
    for i in range(0, len(windows), together):
        group = windows[i:i + together]
        parts += [log_probs[skip:] for log_probs, (_, skip) in zip(log_probs_of(model, [window for window, _ in group]), group)]
        if bar is not None:
            bar.update(sum(map(len, parts[-len(group):])))
    return torch.cat(parts)


def choice_log_probs(model: Transformer, prompt: list[int], choices: list[list[int]]) -> list[float]:
    """The log-probability of each choice's tokens behind the prompt's (one token at least, in either)."""
    if not prompt:
        raise ValueError("the prompt is empty, and a choice's first token needs one before it")
    for name, choice in enumerate(choices, 1):
        if not choice or len(prompt) + len(choice) > model.config.max_position_embeddings:
            raise ValueError(f"choice {name} has {len(choice)} tokens behind a prompt of {len(prompt)}; they must be one at "
                             f"least, and no more than the context of {model.config.max_position_embeddings} together")
    return [log_probs[len(prompt) - 1:].sum().item() for log_probs in log_probs_of(model, [prompt + choice for choice in choices])]


def read_text(path: str) -> str:
    """What a file holds, which may be .gz. ValueError when it is not UTF-8, or damaged."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not gzip, or cut short ({error})") from None


def read_documents(path: str) -> list[dict]:
    """The rows of a .jsonl, each with "text" or each with "choices", or {"text"} for every text of another file, in which
    `<|endoftext|>` ends one. Either may be .gz."""
    text = read_text(path)
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return [{"text": part} for part in text.split("<|endoftext|>") if part.strip()]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) and not list_of(str, row.get("choices")):
            raise ValueError(f'{path}, line {number} has neither a "text" nor "choices", a list of texts')
        if rows and ("choices" in row) != ("choices" in rows[0]):
            raise ValueError(f'{path}, line {number}: some rows have "choices" and some have not; make two files of them')
        rows.append(row)
    return rows


def score_files(model: Transformer, tokenizer: Tokenizer, args):
    """Perplexity and bits per byte of texts; of rows with choices, which one the model finds likeliest."""
    start = tokenizer.start
    for path in args.files:
        rows = read_documents(path)
        if not rows:
            raise ValueError(f"{path} has no text")
        if "choices" in rows[0]:
            score_choices(model, tokenizer, path, rows, start)
            continue
        texts = [start + tokenizer.encode(row["text"], special="text") for row in rows]
        tokens, total = sum(max(0, len(ids) - 1) for ids in texts), 0.0
        # a text's first token has nothing to be predicted from, so its bytes do not count either
        letters = sum(len(row["text"].encode()) for row in rows) - sum(
            len(tokenizer.decode_bytes(ids[:1])) for ids in texts if not start)
        with tqdm(total=tokens, unit="token", unit_scale=True, desc=Path(path).name, leave=False) as bar:
            for ids in texts:
                total -= score(model, ids, args.stride, bar).double().sum().item()
        if not tokens:
            raise ValueError(f"{path} has a single token, and no token before it to predict it from")
        print(f"{path}: {len(rows):,} text(s), {tokens:,} tokens, {letters:,} bytes\n"
              f"  loss {total / tokens:.4f} nats per token, perplexity {math.exp(min(total / tokens, 700)):.2f}, "
              f"{total / letters / math.log(2):.4f} bits per byte")


def score_choices(model: Transformer, tokenizer: Tokenizer, path: str, rows: list[dict], start: list[int]):
    """Multiple choice by likelihood: the share of rows whose answer is the likeliest choice, and the likeliest per byte."""
    right, right_per_byte = [], []
    for number, row in enumerate(tqdm(rows, unit="question", desc=Path(path).name, leave=False), 1):
        prompt, choices, answer = row.get("prompt", row.get("question")), row.get("choices"), row.get("answer")
        letters = [chr(ord("A") + i) for i in range(len(choices or ()))]
        answer = letters.index(answer) if answer in letters else answer
        if not isinstance(prompt, str) or not choices or type(answer) is not int or answer not in range(len(choices)):
            raise ValueError(f'{path}, row {number} needs "prompt" or "question", "choices", and as "answer" the place of one, '
                             f"from 0, or its letter; its answer is {row.get('answer')!r}")
        choices = [choice if choice[:1].isspace() else " " + choice for choice in choices]
        ids = start + tokenizer.encode(prompt.rstrip(), special="text")
        scores = choice_log_probs(model, ids, [tokenizer.encode(choice, special="text") for choice in choices])
        per_byte = [value / len(choice.encode()) for value, choice in zip(scores, choices)]
        right.append(scores.index(max(scores)) == answer)
        right_per_byte.append(per_byte.index(max(per_byte)) == answer)
    for name, results in (("likeliest", right), ("likeliest per byte", right_per_byte)):
        share = sum(results) / len(results)
        print(f"{path}: {share:.1%} ± {math.sqrt(share * (1 - share) / len(results)):.1%} of {len(results):,} right, taking the {name}")


# ------------------------------------------------------------------------------------------------------------------
# Opening a folder

def open_folder(folder, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Transformer, Tokenizer]:
    """The model in a folder, and its tokenizer with what stands before a text as `start`; on the first device that is there."""
    folder = Path(folder)
    model, tokenizer = load_pretrained(folder, device=check_device(device), dtype=dtype), Tokenizer.load(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} entries and the model {model.config.vocab_size}")
    beside = folder / "tokenizer_config.json"
    tokenizer.start = start_of_text(folder, read_json(beside) if beside.exists() else {}, tokenizer, model.config)
    return model, tokenizer


def check_device(device: str | None) -> str:
    """`device`, or the first of cuda, mps and cpu that is there; ValueError for another, or one that is not there."""
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if device not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device is {device!r}; it must be cuda, mps or cpu")
    if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device is {device}, and this machine has none; take cpu")
    return device


def start_of_text(folder: Path, settings: dict, tokenizer: Tokenizer, config: Config) -> list[int]:
    """What stands before a text: the beginning-of-sequence token where the tokenizer's files ask for it, or where it is what
    separates documents, as in the models of this project; nothing elsewhere."""
    asked = settings.get("add_bos_token")
    if asked is None:
        path = folder / "tokenizer.json"
        processor = (read_json(path).get("post_processor") if path.exists() else None) or {}
        templates = [part.get("single", []) for part in processor.get("processors", [processor])]
        asked = (any("SpecialToken" in template[0] for template in templates if template)
                 or settings.get("tokenizer_class", "").startswith("Llama") or config.bos_token_id == tokenizer.eot)
    return [config.bos_token_id] if asked and config.bos_token_id is not None else []


def newest_run() -> Path:
    """The model folder below runs/ that was written last."""
    folders = [path.parent for path in Path("runs").glob("*/config.json") if (path.parent / "model.safetensors").exists()]
    if not folders:
        raise ValueError("there is no run in runs/ yet: train one with `torchrun train.py`, or name a folder with --model")
    return max(folders, key=lambda folder: (folder / "model.safetensors").stat().st_mtime)


def preferences(folder: Path) -> dict:
    """The sampling settings that the model's makers recommend, in generation_config.json."""
    path = folder / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    if values.get("do_sample") is False:
        return {}
    own = {name: values[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if values.get(name)}
    for name, value in own.items():
        if type(value) not in (int, float):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a number")
    return own


# ------------------------------------------------------------------------------------------------------------------
# A server
#
# One thread steps the engine; nobody else touches it. Every connection has a thread of its own, which reads the body, makes
# Requests of it, hands them over together with a queue, and writes out what the queue tells. So clients that come at
# different times share the engine's steps, a slow client slows nobody, and one that hangs up gives its places back. What
# goes over the wire is OpenAI's protocol: its client libraries, and the tools built on them, work with the base URL
# http://127.0.0.1:8000/v1 and any key. What a field asks and this server cannot do is refused, never silently left out.

LOOK_EVERY = 0.25           # seconds between two looks whether a waiting client is still there
MOST_ANSWERS = 128          # prompts times n, in one call
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
FAILED = "the server failed; its terminal says why"


class Refused(Exception):
    """What a client hears in place of an answer: an HTTP status, a sentence, the field it is about, OpenAI's code for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Worker(threading.Thread):
    """The engine's thread. `submit` and `cancel` leave a note, which it reads between two steps.

    What a step brought goes to the queue that came with the request, as (request, characters, tokens, finish_reason): how
    much of its text and tokens counts by now, since the next step may be writing while the client's thread reads. A Refused
    in the queue ends all requests that came with it."""

    def __init__(self, engine, max_waiting: int):
        super().__init__(name="engine")
        self.engine, self.max_waiting = engine, max_waiting
        self.notes = queue.SimpleQueue()
        self.readers = {}                                                    # request -> the queue that hears of it

    def submit(self, requests: list[Request], reader: queue.SimpleQueue):
        self.notes.put((self._admit, requests, reader))

    def cancel(self, requests: list[Request]):
        self.notes.put((self._drop, requests))

    def stop(self):
        """End after the present step, and leave what is unfinished."""
        self.notes.put(None)
        self.join()

    def run(self):
        while True:
            try:
                while not self.engine.busy or not self.notes.empty():        # idle, it sleeps in get
                    note = self.notes.get()
                    if note is None:
                        return
                    function, *arguments = note
                    function(*arguments)
                for request in self.engine.step():
                    self._tell(request)
            except Exception:                                                # these are lost; the next may fare better
                traceback.print_exc()
                for reader in set(self.readers.values()):
                    reader.put(Refused(500, FAILED))
                self.engine.reset()
                self._drop(list(self.readers))

    def _admit(self, requests, reader):
        if len(self.readers) + len(requests) > self.engine.slots + self.max_waiting:
            return reader.put(Refused(429, f"{len(self.readers)} requests run or wait already; try again later"))
        try:
            for request in requests:
                self.engine.submit(request)
                self.readers[request] = reader
        except ValueError as error:
            self._drop(requests)
            field = str(error).removeprefix("the ").partition(" ")[0]        # "temperature is -1; ...", "the prompt has ..."
            reader.put(Refused(400, str(error), field if field in {"prompt", *FIELDS} else None))
        except Exception:
            reader.put(Refused(500, FAILED))
            raise

    def _drop(self, requests):
        for request in requests:
            if self.readers.pop(request, None):                              # None: it has ended
                self.engine.cancel(request)

    def _tell(self, request):
        if reader := self.readers.get(request):
            reader.put((request, len(request.text), len(request.tokens), request.finish_reason))
            if request.finish_reason:
                del self.readers[request]


def list_of(kind: type, value) -> bool:
    """Whether value is a list of that kind of thing, of one at least."""
    return isinstance(value, list) and value != [] and all(type(item) is kind for item in value)


# The fields of a body, and what their values must be. null is the same as leaving the field out.
TYPES = {
    "a string": lambda value: isinstance(value, str),
    "a string or a list of up to 16, each of 1 to 256 characters":
        lambda value: value == [] or (isinstance(value, str) or list_of(str, value) and len(value) <= 16) and
        all(0 < len(stop) <= 256 for stop in ([value] if isinstance(value, str) else value)),
    "a string, a list of strings, a list of token ids or a list of such lists":
        lambda value: isinstance(value, str) or list_of(str, value) or list_of(int, value) or
        list_of(list, value) and all(item == [] or list_of(int, item) for item in value),
    "a list of messages": lambda value: list_of(dict, value),
    "an object": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "0 or 1": lambda value: type(value) is int and value in (0, 1),          # type: to isinstance, true is a number
    "a number": lambda value: type(value) in (int, float) and abs(value) < 1e30,
    "a whole number": lambda value: type(value) is int and abs(value) < 2 ** 63,
    "a whole number above 0": lambda value: type(value) is int and value > 0,
}
FIELDS = {
    "model": "a string", "stream": "true or false", "stream_options": "an object", "n": "a whole number above 0",
    "max_tokens": "a whole number above 0", "max_completion_tokens": "a whole number above 0", "seed": "a whole number",
    "temperature": "a number", "top_p": "a number", "stop": "a string or a list of up to 16, each of 1 to 256 characters",
    # as in vLLM
    "top_k": "a whole number", "min_p": "a number", "repetition_penalty": "a number", "min_tokens": "a whole number",
    "include_stop_str_in_output": "true or false",
}
CHAT_FIELDS = FIELDS | {"messages": "a list of messages", "logprobs": "true or false"}
COMPLETION_FIELDS = FIELDS | {
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "logprobs": "0 or 1", "best_of": "a whole number above 0",               # 0 and 1: of the tokens that were chosen
}
# What OpenAI has beyond these: the values that ask nothing of us, and the fields that never do.
NOT_DONE = {
    "presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}], "echo": [False], "suffix": [""],
    "top_logprobs": [0], "response_format": [{"type": "text"}], "modalities": [["text"]], "tools": [[]], "functions": [[]],
    "tool_choice": ["none", "auto"], "function_call": ["none", "auto"], "audio": [], "prediction": [],
}
IGNORED = {"user", "store", "metadata", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key"}


@dataclass
class Call:
    """A body that was understood: what to generate, and what the answer is to look like."""
    chat: bool
    tokenizer: object
    head: dict                     # id, object, created, model: the same in every piece
    requests: list[Request]        # the n answers to the first prompt, those to the second, ...
    prompt_tokens: int
    stream: bool
    include_usage: bool

    def whole(self) -> dict:
        """The answer in one piece, when all requests have ended."""
        choices = [self.choice(request, request.text, 0, len(request.tokens), request.finish_reason)
                   for request in self.requests]
        return self.head | {"choices": choices, "usage": self.usage()}

    def piece(self, *choices: dict) -> dict:
        """A piece of a streamed answer."""
        return self.head | {"choices": list(choices)} | ({"usage": None} if self.include_usage else {})

    def choice(self, request: Request, text: str, start: int = 0, end: int = 0, finish_reason: str | None = None) -> dict:
        """`text` of one request, and the log-probabilities of its tokens start to end."""
        if not self.chat:
            said = {"text": text}
        elif not self.stream:
            said = {"message": {"role": "assistant", "content": text}}
        else:
            said = {"delta": {"content": text} if text else {}}
        log_probs = self.log_probs(request, start, end) if request.log_probs and end > start else None
        return {"index": self.requests.index(request), **said, "logprobs": log_probs, "finish_reason": finish_reason}

    def log_probs(self, request: Request, start: int, end: int) -> dict:
        """Tokens as texts, with their log-probabilities (JSON has no -inf: -9999, as in vLLM)."""
        pieces = [self.tokenizer.decode_bytes([token]) for token in request.tokens[start:end]]
        texts = [piece.decode(errors="replace") for piece in pieces]
        values = [max(value, -9999.0) for value in request.token_log_probs[start:end]]
        if self.chat:
            return {"content": [{"token": text, "logprob": value, "bytes": list(piece), "top_logprobs": []}
                                for text, value, piece in zip(texts, values, pieces)], "refusal": None}
        decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), []
        place = len(decoder.decode(self.tokenizer.decode_bytes(request.tokens[:start])))
        for piece in pieces:
            offsets.append(place)
            place += len(decoder.decode(piece))
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}

    def usage(self) -> dict:
        new = sum(len(request.tokens) for request in self.requests)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}


def parse_body(data: bytes) -> dict:
    """The JSON object that a body is. Refused for all else, for NaN, and for half a surrogate pair: no text holds one."""
    def not_a_number(name):
        raise ValueError(f"it holds {name}")
    try:
        body = json.loads(data.decode(), parse_constant=not_a_number)
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {short(body)}; it must be a JSON object")
    return body


def check_fields(body: dict, fields: dict) -> dict:
    """The fields that ask for something: not null, not ignored. Refused for what is not known, or cannot be done."""
    for field, value in body.items():
        if field not in fields and field not in NOT_DONE and field not in IGNORED:
            raise Refused(400, f"there is no field {short(field)} here", field)
        if field in fields and value is not None and not TYPES[fields[field]](value):
            raise Refused(400, f"{field} is {short(value)}; it must be {fields[field]}", field)
        if field in NOT_DONE and value is not None and value not in NOT_DONE[field]:
            raise Refused(400, f"{field} is {short(value)}, which this server cannot do; leave it out", field)
    return {field: value for field, value in body.items() if field in fields and value is not None}


def parse_call(body: dict, chat: bool, server) -> Call:
    """What a body asks for. Refused where it cannot be had; the engine has the last word when it gets the requests."""
    given = check_fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    if given.get("model", server.name) != server.name:
        raise Refused(404, f"there is no model {short(given['model'])}, only {server.name!r}", "model", "model_not_found")
    needed = "messages" if chat else "prompt"
    if needed not in given:
        raise Refused(400, f"{needed} is missing", needed)
    with server.encoding:                                                    # the tokenizer serves one thread at a time
        prompts = (chat_prompt if chat else completion_prompts)(server.engine, given[needed])
    n, context = given.get("n", 1), server.engine.context
    if n * len(prompts) > MOST_ANSWERS:
        raise Refused(400, f"n is {n}, for {len(prompts)} prompt(s); {MOST_ANSWERS} answers are the most", "n")
    if given.get("best_of", n) != n:
        raise Refused(400, f"best_of is {given['best_of']} and n is {n}; all are returned, so they must be equal", "best_of")
    limit_field = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    limit = given.get(limit_field)
    if limit and limit > context:
        raise Refused(400, f"{limit_field} is {short(limit)} and the model's context holds {context}", limit_field)
    sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_tokens")
    settings = server.defaults | {field: given[field] for field in sampling if field in given}
    if settings.get("top_k") in (0, -1):                                     # vLLM's words for none
        settings["top_k"] = None
    stop, seed, ends = given.get("stop", []), given.get("seed"), chat_template(server.engine.tokenizer)[1] if chat else ()
    requests = [Request(prompt, max_new_tokens=limit or (max(1, context - len(prompt)) if chat else 16),
                        stop=(*ends, *([stop] if isinstance(stop, str) else stop)), seed=None if seed is None else seed + i,
                        keep_stop=given.get("include_stop_str_in_output", False),
                        log_probs=given.get("logprobs", False) is not False, **settings)   # 0 asks for them too
                for prompt in prompts for i in range(n)]
    stream, options = given.get("stream", False), given.get("stream_options", {})
    include_usage = options.get("include_usage") or False
    if not isinstance(include_usage, bool) or options.keys() - {"include_usage"}:
        raise Refused(400, f"stream_options is {short(options)}; it may have include_usage, true or false", "stream_options")
    head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "text_completion" if not chat else "chat.completion.chunk" if stream else "chat.completion",
            "created": int(time.time()), "model": server.name}
    return Call(chat, server.engine.tokenizer, head, requests, sum(map(len, prompts)), stream, include_usage)


def completion_prompts(engine, prompt) -> list[list[int]]:
    """The ids of the field `prompt`: one prompt or several, as texts (that begin as the model's texts do) or as ids."""
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    start = getattr(engine.tokenizer, "start", [])
    return [start + engine.tokenizer.encode(item, special="text") if isinstance(item, str) else item for item in several]


def chat_prompt(engine, messages) -> list[list[int]]:
    """The ids of the field `messages`, as one prompt. A content may be a list of text parts, which are joined."""
    def text(content):
        if not isinstance(content, list):
            return content
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(parts) if list_of(str, parts) and len(parts) == len(content) else content
    roles = [{"developer": "system"}.get(role, role) if isinstance(role := message.get("role"), str) else role for message in messages]
    plain = [{"role": role, "content": text(message.get("content"))} for role, message in zip(roles, messages)]
    for number, message in enumerate(plain):
        unknown = [key for key, value in messages[number].items() if key not in ("role", "content", "name") and value]
        if unknown:
            raise Refused(400, f"messages[{number}] has {short(unknown[0])}, which this server cannot do; leave it out", "messages")
        if not all(isinstance(value, str) for value in message.values()):
            raise Refused(400, f"messages[{number}] is {short(messages[number])}; it must have a role and a content: "
                               'a string, or a list of {"type": "text", "text": ...}', "messages")
    try:
        return [chat_tokens(engine.tokenizer, plain)]
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, one after the other, and answers each."""
    protocol_version = "HTTP/1.1"
    timeout = 60                            # seconds that a client may be silent in the middle of a request, or between two
    disable_nagle_algorithm = True          # a token goes out when it is there

    @property
    def paths(self) -> dict[str, str]:
        """What there is, and how it is asked for."""
        return {"/": "GET", "/health": "GET", "/v1/models": "GET", f"/v1/models/{self.server.name}": "GET",
                "/v1/completions": "POST", "/v1/chat/completions": "POST"}

    def route(self):
        """Any request: read all of it, so that the next on this connection is found where it begins; check, answer, log."""
        self.status, self.tokens, start = None, 0, time.perf_counter()
        self.path = path = self.path.partition("?")[0]
        try:
            body = self.read_body()
            self.check()
            if path == "/":
                self.reply(200, self.server.page, "text/html; charset=utf-8")
            elif path == "/health":
                alive = self.server.worker.is_alive()
                self.reply(200 if alive else 503, {"status": "ok" if alive else "the engine's thread has ended"})
            elif path.startswith("/v1/models"):
                about = {"id": self.server.name, "object": "model", "created": self.server.created, "owned_by": "local"}
                self.reply(200, {"object": "list", "data": [about]} if path == "/v1/models" else about)
            else:
                self.generate(parse_call(parse_body(body), path == "/v1/chat/completions", self.server))
        except Refused as error:
            self.reply(error.status, error.body)
        except (ConnectionError, TimeoutError):                              # the client has gone: 499, as nginx logs it
            self.close_connection, self.status = True, 499
        except Exception:
            traceback.print_exc()
            self.close_connection = True
            if self.status is None:
                self.reply(500, Refused(500, FAILED).body)
        if self.server.log:
            tokens = f"{self.tokens} tokens " if self.tokens else ""
            self.log_message("%s %.80s %s %s%.2f s", self.command, path, self.status, tokens, time.perf_counter() - start)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = route

    def read_body(self) -> bytes:
        """The body, as long as the header says. A refusal here ends the connection: nobody knows where the next begins."""
        length, close, self.close_connection = self.headers.get("Content-Length"), self.close_connection, True
        if "Transfer-Encoding" in self.headers or length is None and self.command == "POST":
            raise Refused(411, "send the body in one piece, with a Content-Length")
        if not re.fullmatch("[0-9]{1,15}", length or "0"):
            raise Refused(400, f"Content-Length is {short(length)}; it must be a number of bytes")
        length, most = int(length or 0), self.server.max_body
        if length > most:
            self.rfile.read(min(length, 16 * most))                          # most clients listen when they have spoken
            raise Refused(413, f"the body has {length} bytes; {most} are the most")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError
        self.close_connection = close
        return body

    def check(self):
        """Refused for what is not here, and for what a page from elsewhere can make a browser send: a request to a name that
        was pointed at this machine, or a form, for which no browser asks leave."""
        path, host, kind = self.path, self.headers.get("Host"), self.headers.get_content_type()
        if self.server.local and host and not LOOPBACK.fullmatch(host):
            raise Refused(403, f"the request is for {short(host)}; this server answers to localhost")
        if path not in self.paths:
            raise Refused(404, f"there is no {short(path)}; there are {', '.join(self.paths)}")
        if self.command.replace("HEAD", "GET") != self.paths[path]:
            raise Refused(405, f"{path} takes {self.paths[path]}, not {self.command}")
        if self.command == "POST" and kind != "application/json":
            raise Refused(415, f"the body came as {kind}; send it with the header Content-Type: application/json "
                               "(curl -H 'Content-Type: application/json')")

    def generate(self, call: Call):
        """Answer a call, in pieces or in one. Whatever happens, no request stays behind."""
        try:
            if call.stream:
                return self.stream(call)
            for _ in self.news(call.requests):
                pass
            self.reply(200, call.whole())
        finally:
            self.tokens = call.usage()["completion_tokens"]
            self.server.worker.cancel(call.requests)

    def news(self, requests: list[Request]):
        """Submit the requests, and yield what the worker tells of them until all have ended. ConnectionError when the client
        hangs up meanwhile."""
        worker, reader, running, look = self.server.worker, queue.SimpleQueue(), len(requests), 0
        worker.submit(requests, reader)
        while running:
            if time.monotonic() > look:
                if not worker.is_alive():
                    raise Refused(503, "the engine's thread has ended")
                self.check_client()
                look = time.monotonic() + LOOK_EVERY
            try:
                note = reader.get(timeout=LOOK_EVERY)
            except queue.Empty:
                continue
            if isinstance(note, Refused):
                raise note
            yield note
            running -= note[-1] is not None

    def check_client(self):
        """ConnectionError when the client has closed its side: what there is to read then is the end."""
        self.connection.setblocking(False)
        try:
            if self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionAbortedError
        except BlockingIOError:                                              # nothing to read: it waits
            pass
        finally:
            self.connection.settimeout(self.timeout)

    def stream(self, call: Call):
        """Server-sent events: of every request who speaks, its text as it settles, and why it ended; then [DONE]."""
        sent = {}                                                            # request -> characters and tokens so far
        try:
            for request, characters, tokens, finish_reason in self.news(call.requests):
                if request not in sent:
                    sent[request] = 0, 0
                    if call.chat:
                        self.event(call.piece(call.choice(request, "") | {"delta": {"role": "assistant", "content": ""}}))
                start, first = sent[request]
                if characters > start or finish_reason and request.log_probs and tokens > first:
                    self.event(call.piece(call.choice(request, request.text[start:characters], first, tokens)))
                    sent[request] = characters, tokens
                if finish_reason:
                    self.event(call.piece(call.choice(request, "", finish_reason=finish_reason)))
            if call.include_usage:
                self.event(call.piece() | {"usage": call.usage()})
        except Refused as error:
            if self.status is None:                                          # nothing is out yet: an error like any other
                raise
            self.event(error.body)
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n" if self.chunked else b"")

    def event(self, data: dict | str):
        """Send one event as a chunk, the first behind the header. HTTP/1.0 has no chunks: the connection's end ends it."""
        if self.status is None:
            self.status, self.chunked = 200, self.request_version == "HTTP/1.1"
            self.close_connection |= not self.chunked
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header(*(("Transfer-Encoding", "chunked") if self.chunked else ("Connection", "close")))
            self.end_headers()
        message = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(message), message) if self.chunked else message)

    def reply(self, status: int, body: dict | str, kind: str = "application/json"):
        """Send an answer in one piece."""
        data, self.status = (body if isinstance(body, str) else json.dumps(body)).encode(), status
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if status == 405:
            self.send_header("Allow", self.paths[self.path])
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def send_error(self, code, message=None, explain=None):
        """What the base class finds wrong, before `route` has begun."""
        self.close_connection, self.request_version = True, "HTTP/1.1"       # to 0.9, the base class sends no header
        self.reply(code, Refused(code, message or self.responses[code][0]).body)

    def log_request(self, *_):
        """Nothing: `route` writes the line, when there is something to say."""

    log_error = log_request


class Server(ThreadingHTTPServer):
    """A listening socket, a thread for each connection, and the engine's thread. Arguments as in `serve`."""
    request_queue_size = 128

    def __init__(self, engine, name, host="127.0.0.1", port=8000, defaults=None, log=True, max_body=10 ** 6,
                 max_waiting=256):
        self.worker = Worker(engine, max_waiting)
        self.worker.start()
        self.engine, self.name, self.defaults, self.log, self.max_body = engine, name, defaults or {}, log, max_body
        self.created, self.encoding = int(time.time()), threading.Lock()
        temperature = str(self.defaults.get("temperature", 1.0))
        self.page = PAGE.replace("{temperature}", temperature).replace("{name}", html.escape(name))
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)                              # a taken port ends in server_close
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"
        self.local = LOOPBACK.fullmatch(self.url.removeprefix("http://"))

    def server_close(self):
        super().server_close()
        self.worker.stop()

    def handle_error(self, request, client_address):
        """A client that vanishes between two requests is nothing to print."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(engine, name: str, host: str = "127.0.0.1", port: int = 8000, defaults: dict | None = None, log: bool = True,
          max_body: int = 10 ** 6, max_waiting: int = 256):
    """Answer HTTP requests until Ctrl-C: POST /v1/completions and /v1/chat/completions, GET /v1/models and /health, and at /
    a page to talk to the model. ValueError when the port is taken.

    name: what the model is called on the wire. host: with 127.0.0.1 only this machine can ask; with 0.0.0.0 everybody who
    reaches it, for there are no passwords. defaults: fields of Request, for what a body leaves out. log: a line on stderr
    for each request. max_body: bytes of a body, more are 413. max_waiting: requests that may wait, more are 429."""
    try:
        listening = Server(engine, name, host, port, defaults, log, max_body, max_waiting)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}; try another --port") from None
    with listening as server:
        print(f"[{name} at {server.url}: a page to talk to it, and OpenAI's protocol under /v1; Ctrl-C ends it]", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<link rel="icon" href="data:,">
<title>{name}</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.55 system-ui, sans-serif; --ground: #fff; --ink: #1c1d1f; --quiet: #65686d;
          --line: #d9dbde; --tint: #f1f2f4; --mark: #2456a6; --on-mark: #fff; --wrong: #a32020 }
  @media (prefers-color-scheme: dark) { :root { --ground: #17181a; --ink: #e4e5e7; --quiet: #9a9da3;
          --line: #36383c; --tint: #25272a; --mark: #8db4f2; --on-mark: #10151d; --wrong: #f09a94 } }
  * { box-sizing: border-box }
  body { margin: 0; height: 100vh; height: 100dvh; display: grid; grid-template-rows: auto 1fr auto;
         background: var(--ground); color: var(--ink) }
  header, form, #talk { width: 100%; max-width: 46rem; margin: 0 auto; padding: .75rem 1rem }
  header, .ask { display: flex; justify-content: space-between; align-items: center; gap: .5rem }
  h1 { margin: 0; font-size: 1rem; font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
  main { overflow-y: auto; border: solid var(--line); border-width: 1px 0 }
  article { margin: .5rem 0 1.25rem; white-space: pre-wrap; overflow-wrap: anywhere }
  .user { width: fit-content; max-width: 85%; margin-left: auto; padding: .5rem .85rem; border-radius: .9rem;
          background: var(--tint) }
  .assistant:empty::after { content: "\\2026"; color: var(--quiet) }
  .note { margin: 0 0 1.25rem; font-size: .85rem; color: var(--quiet) }
  .wrong { color: var(--wrong) }
  button, input, textarea { font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--line);
                            border-radius: .5rem }
  button { padding: .35rem .9rem; cursor: pointer; white-space: nowrap }
  button:hover { background: var(--tint) }
  :focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
  input:focus-visible, textarea:focus-visible { outline-width: 1px; outline-offset: 0; border-color: var(--mark) }
  .ask { align-items: flex-end }
  textarea { flex: 1; min-width: 0; max-height: 40vh; padding: .5rem .75rem; resize: none }
  #send { width: 5rem; padding: .5rem 0; background: var(--mark); border-color: var(--mark); color: var(--on-mark) }
  #send:hover { filter: brightness(1.1) }
  .settings { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .6rem; color: var(--quiet); font-size: .85rem }
  .settings input { width: 4.5rem; margin-left: .4rem; padding: 0 .4rem; color: var(--ink); font-size: 1rem }
</style>
<header><h1>{name}</h1><button type="button" id="fresh">New chat</button></header>
<main><div id="talk" role="log" aria-label="Conversation"></div></main>
<form id="form" novalidate>
  <div class="ask">
    <textarea id="box" rows="1" aria-label="Message" placeholder="Message" autofocus></textarea>
    <button id="send">Send</button>
  </div>
  <div class="settings">
    <label>Temperature<input id="temperature" type="number" min="0" step="0.1" value="{temperature}"></label>
    <label>Max tokens<input id="limit" type="number" min="1" placeholder="any"></label>
  </div>
</form>
<script type="module">
  const [talk, form, box, send, temperature, limit, fresh] =
    ["talk", "form", "box", "send", "temperature", "limit", "fresh"].map(id => document.getElementById(id));
  const view = talk.parentElement;
  let messages = [], running = null;            // what was said, as the server wants it; what stops the answer under way

  function change(what) {                       // the reader stays at the end, unless scrolled away from it
    const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
    what();
    if (atEnd) view.scrollTop = view.scrollHeight;
  }
  function add(tag, kind, text, attributes) {
    const element = document.createElement(tag);
    Object.assign(element, {className: kind, textContent: text}, attributes);
    change(() => talk.append(element));
    return element;
  }
  function write(text) {                        // into the box, which grows with it
    if (text !== undefined) box.value = text;
    box.style.height = "auto";
    box.style.height = box.scrollHeight + 2 + "px";
  }
  function run(controller) {
    running = controller;
    send.textContent = running ? "Stop" : "Send";
    talk.ariaBusy = String(!!running);
  }
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const whole = (rest + part.value).split("\\n\\n");
      rest = whole.pop();
      yield* whole.map(event => event.slice("data: ".length));
    }
  }
  async function ask(text) {
    const mine = messages, controller = new AbortController(), body = {messages: mine, stream: true};
    if (temperature.value) body.temperature = Number(temperature.value);
    if (limit.value) body.max_tokens = Number(limit.value);
    mine.push({role: "user", content: text});
    const asked = add("article", "user", text, {ariaLabel: "You"});
    const answer = add("article", "assistant", "", {ariaLabel: "Model"});
    view.scrollTop = view.scrollHeight;
    run(controller);
    let said = "", note = "", wrong = false, done = false;
    try {
      const reply = await fetch("v1/chat/completions", {method: "POST", headers: {"Content-Type": "application/json"},
                                                        body: JSON.stringify(body), signal: controller.signal});
      if (!reply.ok) throw new Error((await reply.json()).error.message);
      for await (const event of events(reply.body)) {
        if (done = event === "[DONE]") break;
        const {error, choices} = JSON.parse(event);
        if (error) throw new Error(error.message);
        said += choices[0].delta.content ?? "";
        if (choices[0].finish_reason === "length") note = "Cut off: the tokens are used up.";
        change(() => answer.textContent = said);
      }
      if (!done) throw new Error("the connection broke");
      if (!said) note = "The model said nothing.";
    } catch (error) {
      wrong = error.name !== "AbortError";
      note = wrong ? "Failed: " + error.message : "Stopped.";
    }
    if (said) mine.push({role: "assistant", content: said});
    else {                                      // as if not asked: the text goes back into the box
      mine.pop();
      asked.remove();
      answer.remove();
    }
    if (mine !== messages) return;              // a new chat has begun meanwhile
    if (!said && !box.value) write(text);
    if (note) add("p", wrong ? "note wrong" : "note", note, {role: wrong ? "alert" : "status"});
    run(null);
  }
  form.onsubmit = event => {
    event.preventDefault();
    const text = box.value.trim();
    if (running) return running.abort();
    if (!text) return;
    talk.querySelectorAll(".wrong").forEach(note => note.remove());
    write("");
    ask(text);
  };
  box.oninput = () => write();
  box.onkeydown = event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  };
  fresh.onclick = () => {
    running?.abort();
    messages = [];
    talk.replaceChildren();
    run(null);
    box.focus();
  };
</script>
"""


# ------------------------------------------------------------------------------------------------------------------
# python sample.py bench

# the model of the table: 125M parameters in the shape of a Llama
BENCH = Config(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
               num_key_value_heads=4, max_position_embeddings=1024)


def bench(args):
    """Tokens per second of decoding, beside transformers where it is installed: the contenders take turns, medians of rounds."""
    device = check_device(args.device)
    on_gpu = device == "cuda"
    for name in ("rounds", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    torch.manual_seed(0)
    if args.model:
        model = load_pretrained(args.model, device=device)
        name = args.model
    else:
        config = PRESETS["llama2-7b"] if on_gpu else BENCH
        name = "llama2-7b's shape, random weights" if on_gpu else "12 layers, width 768, random weights"
        with torch.device(device):
            model = Transformer(config).to(torch.bfloat16 if on_gpu else torch.float32)
    print(f"{name}: {human(num_parameters(model.config))} parameters; "
          + (torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads") + f"; torch {torch.__version__}")
    rng = random.Random(0)
    prompt = lambda length: [rng.randrange(model.config.vocab_size) for _ in range(length)]
    many = 256 if on_gpu else 16
    if model.config.max_position_embeddings < 121 + args.max_new_tokens:
        raise ValueError(f"prompts of up to 120 tokens and --max_new_tokens {args.max_new_tokens} exceed the model's context of "
                         f"{model.config.max_position_embeddings}; take fewer, or another model")
    work = {"1 prompt of 64": [prompt(64)], f"{many} prompts of 64": [prompt(64) for _ in range(many)],
            f"{many} prompts of 8 to 120": [prompt(rng.randint(8, 120)) for _ in range(many)]}
    dtypes = {kind: torch.bfloat16 if kind == "int8" else getattr(torch, kind) for kind in args.kinds or (
        ["bfloat16", "int8"] if on_gpu else ["float32", "bfloat16", "int8"])}
    contenders = {kind: ours_to_time(model, dtype, kind == "int8", many, args) for kind, dtype in dtypes.items()}
    for dtype in dict.fromkeys(dtypes.values()):
        peer = peer_to_time(model, dtype, args)
        if peer:
            contenders[f"transformers, {str(dtype).removeprefix('torch.')}"] = peer
    print(f"decode {args.max_new_tokens} tokens a prompt, greedily; tokens/s with the prompts' prefill, median of {args.rounds} rounds\n")
    rates = {name: {task: [] for task in work} for name in contenders}
    turns = [(task, round, name) for task in work for round in range(args.rounds + 1) for name in contenders]
    for task, round, name in tqdm(turns, unit="run", leave=False):
        start = time.perf_counter()
        contenders[name](work[task])
        if round:                                                            # the first one warms up
            rates[name][task].append(len(work[task]) * args.max_new_tokens / (time.perf_counter() - start))
    median = lambda values: sorted(values)[len(values) // 2]
    print(f"{'':28}" + "".join(f"{name:>24}" for name in work))
    for name in contenders:
        print(f"{name:28}" + "".join(f"{median(rates[name][task]):24,.0f}" for task in work))
    for kind, dtype in dtypes.items():
        dtype = str(dtype).removeprefix("torch.")
        if f"transformers, {dtype}" in rates:
            ratios = [median([a / b for a, b in zip(rates[kind][task], rates[f"transformers, {dtype}"][task])]) for task in work]
            print(f"{kind + ' against ' + dtype:28}" + "".join(f"{ratio:23.2f}x" for ratio in ratios))
    print()
    bench_errors(model, dtypes, work)
    if not args.model:
        bench_load(args.rounds)


def ours_to_time(model: Transformer, dtype, int8: bool, slots: int, args):
    """A function that decodes prompts with an engine that is made once."""
    engine = Engine(model, slots=slots, context=120 + args.max_new_tokens + 1, dtype=dtype, int8=int8, compile=args.compile)
    engine.model.config = replace(engine.model.config, eos_token_id=None)    # all the tokens that are counted are written

    def run(prompts):
        engine.reset()                                                       # nothing from the round before
        return engine.run([Request(prompt, args.max_new_tokens, temperature=0) for prompt in prompts])
    return run


def peer_to_time(model: Transformer, dtype, args):
    """The same in transformers, on the same weights; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(model.cos.device).eval()

    def run(prompts):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=peer.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=peer.device)
        with torch.inference_mode():
            peer.generate(ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, min_new_tokens=args.max_new_tokens,
                          do_sample=False, pad_token_id=0)
    return run


def bench_errors(model: Transformer, dtypes: dict, work: dict):
    """How far the engine's log-probabilities are from a training forward pass of the same weights."""
    prompts = next(prompts for task, prompts in work.items() if " to " in task)
    for dtype, int8 in ((dtype, kind == "int8") for kind, dtype in dtypes.items()):
        tokens, log_probs = generate(model, prompts, 64, seed=0, log_probs=True, dtype=dtype, int8=int8)
        plain = copy.deepcopy(model).to(dtype).eval()
        full = log_probs_of(plain, [prompt + new for prompt, new in zip(prompts, tokens)])
        off = [abs(a - b) for row, new in zip(full, log_probs) for a, b in zip(row[-len(new):].tolist(), new)]
        kind = f"int8 against {dtype}" if int8 else f"{dtype} against itself"
        print(f"log-probabilities, engine and one forward pass, {kind.replace('torch.', '')}: mean difference {sum(off) / len(off):.2g}, "
              f"largest {max(off):.2g}, over {len(off):,} sampled tokens")


def bench_load(rounds: int):
    """Seconds to have a gigabyte of weights in memory, beside safetensors where it is installed."""
    config = replace(BENCH, hidden_size=2048, intermediate_size=5632, num_hidden_layers=11, num_attention_heads=16)
    touch = lambda tensors: sum(tensor.view(torch.int16).flatten()[::2048].sum().item() for tensor in tensors)   # every page
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Transformer(config).to(torch.bfloat16), folder)
        path = Path(folder, "model.safetensors")
        ways = {"load_pretrained": lambda: touch(load_pretrained(folder).parameters()),
                "its load_safetensors": lambda: touch(load_safetensors(path).values())}
        try:
            from safetensors.torch import load_file
            ways["safetensors' load_file"] = lambda: touch(load_file(path).values())
        except ImportError:
            pass
        seconds = {name: [] for name in ways}
        for round in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                with torch.no_grad():
                    way()
                seconds[name] += [time.perf_counter() - start] if round else []
        print(f"load {path.stat().st_size / 1e9:.2f} GB, every page touched: " + ", ".join(
            f"{name} {sorted(values)[len(values) // 2]:.3f} s" for name, values in seconds.items()))


# ------------------------------------------------------------------------------------------------------------------
# python sample.py

def speak(engine: Engine, texts: list[str], args) -> None:
    """Continue each text `num_samples` times and print it: one as it comes, several when all are done. Then the speeds."""
    prompts = [engine.tokenizer.start + engine.tokenizer.encode(text, special="text") for text in texts for _ in range(args.num_samples)]
    requests = [new_request(args, prompt, number) for number, prompt in enumerate(prompts)]
    for number, request in enumerate(requests, 1):                           # before anything is printed
        engine.submit(request, f"prompt {number}")
    alone, start = len(requests) == 1, time.perf_counter()
    print(texts[0] if alone else "", end="", flush=True)
    try:
        write(engine, requests[0] if alone else None)
    except KeyboardInterrupt:
        for request in requests:
            engine.cancel(request)
        raise
    seconds = time.perf_counter() - start
    if not alone:
        for number, request in enumerate(requests, 1):
            text = texts[(number - 1) // args.num_samples]
            print(f"--- {number} of {len(requests)} " + "-" * 60 + f"\n{text}{request.text}")
    report(engine, requests, seconds)


def write(engine: Engine, request: Request | None, strip: bool = False):
    """Step until all is done, and print the text of `request` as it grows, without the space that it may begin with."""
    printed = 0
    while engine.busy:
        engine.step()
        if request is not None:
            text = request.text.lstrip() if strip else request.text
            print(text[printed:], end="", flush=True)
            printed = len(text)


def report(engine: Engine, requests: list[Request], seconds: float):
    """The line under what was written."""
    new = sum(len(request.tokens) for request in requests)
    if new:
        drafts = f"; {engine.accepted / engine.drafted:.0%} of {engine.drafted:,} drafted tokens accepted" if engine.drafted else ""
        print(f"\n[{len(requests)} text(s), {sum(len(request.prompt) for request in requests):,} tokens read, {new:,} written "
              f"in {seconds:.2f} s: {new / seconds:,.0f} tokens/s{drafts}]")


def new_request(args, prompt: list[int], number: int = 0, stop: tuple = ()) -> Request:
    """A request with the settings of the command line."""
    count, seed = 200 if args.max_new_tokens is None else args.max_new_tokens, None if args.seed is None else args.seed + number
    return Request(prompt, count, args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.min_tokens,
                   (*stop, *(args.stop or ())), args.keep_stop, seed)


def chat(engine: Engine, args):
    """A conversation in the terminal. An empty line does nothing, /new forgets all that was said, Ctrl-C ends an answer."""
    print("[/new begins again, Ctrl-C ends an answer, Ctrl-D ends the conversation]")
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(beginning)
    while True:
        text = input("\n> ").strip()
        if text == "/new":
            messages = list(beginning)
        if text in ("", "/new"):
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            request = new_request(args, chat_tokens(engine.tokenizer, asked), len(messages), chat_template(engine.tokenizer)[1])
            request.max_new_tokens = max(1, min(args.max_new_tokens or 2048, engine.context - len(request.prompt)))
            engine.submit(request)
        except ValueError as error:                                          # too long, most likely: no reason to leave
            print(f"sample.py: {error} (/new begins again)", file=sys.stderr)
            continue
        start = time.perf_counter()
        try:
            write(engine, request, strip=True)
        except KeyboardInterrupt:
            engine.cancel(request)
        messages = [*asked, {"role": "assistant", "content": request.text.strip()}]
        if args.verbose:
            report(engine, [request], time.perf_counter() - start)
        print()


def arguments(command: str) -> Parser:
    """The flags of `sample.py`, `sample.py score` or `sample.py bench`."""
    parser = Parser(prog=f"sample.py {command}".strip(), allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description={"": "Generate text from a model folder, chat with it, or serve it. (Also: sample.py score -h, "
                                     "sample.py bench -h.)", "score": "How well a model predicts texts, or chooses answers.",
                                 "bench": "Speed and error of the engine, beside peers that are installed."}[command])
    add = parser.add_argument
    add("--model", help="model folder; none: the newest in runs/" if command != "bench" else "model folder; none: random weights")
    add("--device", help="cuda, mps or cpu; none: the first of these that is there")
    if command == "bench":
        add("--max_new_tokens", type=int, default=128, help="tokens to decode for each prompt")
        add("--rounds", type=int, default=3, help="how many times each contender is timed")
        add("--compile", action="store_true", help="compile the decoding step")
        add("--kinds", nargs="+", choices=("float32", "bfloat16", "int8"), help="weights to time; none: all, on a GPU no float32")
        return parser
    add("--dtype", help="float32, bfloat16 or float16; none: as stored")
    add("--int8", action="store_true", help="round the weights to 8 bits")
    if command == "score":
        add("files", nargs="+", help='texts (.txt, .jsonl with "text"), or a .jsonl with "prompt", "choices", "answer"')
        add("--stride", type=int, help="tokens by which the window moves over a long text; none: half of the context")
        return parser
    add("--prompt", action="append", help="text to continue; may be given several times; none: chat with a model that has a chat "
                                          "template, else from nothing")
    add("--interactive", action="store_true", help="read texts to continue from the terminal, line by line")
    add("--chat", action="store_true", help="chat, even with a model that has no chat template")
    add("--system", help="what a chat begins with: how the assistant is to behave")
    add("--serve", action="store_true", help="serve OpenAI's HTTP interface and a page to chat on")
    add("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 for all")
    add("--port", type=int, default=8000, help="port to serve on; 0 for any that is free")
    add("--num_samples", type=int, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=int, help="tokens to generate at most; none: 200, or 2048 in a chat")
    add("--temperature", type=float, help="0 takes the likeliest token; 1 draws as the model says; none: generation_config.json's, "
                                          "or 0.8")
    add("--top_k", type=int, help="draw from this many likeliest tokens only")
    add("--top_p", type=float, help="draw from the likeliest tokens that make up this much probability")
    add("--min_p", type=float, help="draw from tokens at least this many times as probable as the likeliest")
    add("--repetition_penalty", type=float, help="above 1: less of what stands in the text")
    add("--min_tokens", type=int, default=0, help="no ending before this many tokens")
    add("--stop", action="append", type=lambda text: text.replace("\\n", "\n"),
        help=r"end before this text (\n is a line's end); may be given several times")
    add("--keep_stop", action="store_true", help="end behind the stop text, not before it")
    add("--seed", type=int, help="for the same text again")
    add("--draft", help="folder of a smaller model with the same tokenizer, whose guesses the model checks")
    add("--speculate", type=int, default=0, help="tokens to guess ahead; without --draft by looking them up in the text; "
                                                 "0: none, or 4 with --draft")
    add("--slots", type=int, default=16, help="texts that are written at a time")
    add("--context", type=int, help="positions to keep for each; none: the model's, 4096 at most")
    add("--compile", action="store_true", help="compile the decoding step, which takes a minute; for a GPU")
    add("--verbose", action="store_true", help="speeds after each answer of a chat")
    return parser


def main():
    """The command line."""
    command = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in ("score", "bench") else ""
    parser = arguments(command)
    args = parser.parse_args(sys.argv[2 if command else 1:])
    try:
        if command == "bench":
            return bench(args)
        if args.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {args.dtype!r}; it must be float32, bfloat16 or float16")
        args.dtype = getattr(torch, args.dtype) if args.dtype else None
        args.model = args.model or str(newest_run())
        if command == "score":
            if args.stride is not None and args.stride < 1:
                raise ValueError(f"--stride is {args.stride}; it must be at least 1")
            model, tokenizer = open_folder(args.model, args.device, args.dtype)
            ready = prepare(model, int8=args.int8, consume=True)
            del model
            print(f"[{args.model}]", flush=True)
            return score_files(ready, tokenizer, args)
        if args.num_samples < 1:
            raise ValueError(f"--num_samples is {args.num_samples}; it must be at least 1")
        refuse_for_serving(args)
        use_preferences(args)
        new_request(args, [0]).check_settings()                              # before a large model is opened for nothing
        model, tokenizer = open_folder(args.model, args.device, args.dtype)
        talks = args.chat or bool(tokenizer.chat_template) and not args.prompt and not args.interactive
        draft = load_pretrained(args.draft, device=model.cos.device, dtype=args.dtype) if args.draft else None
        wanted = len(args.prompt or [""]) * args.num_samples
        slots = args.slots if args.serve else min(args.slots, 1 if talks or args.interactive else wanted)
        context = min(model.config.max_position_embeddings, 4096) if args.context is None else args.context
        engine = Engine(model, tokenizer, slots, context, draft, args.speculate, None, args.int8, args.compile, consume=True)
        del model, draft                                                     # what the engine has made of them is left
        print(f"[{args.model}]", flush=True)
        if args.serve:
            fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            serve(engine, Path(args.model).resolve().name, args.host, args.port, {name: getattr(args, name) for name in fields})
        elif talks:
            chat(engine, args)
        elif not args.interactive:
            speak(engine, args.prompt or [""], args)
        while args.interactive:
            text = input("\nprompt> ")
            try:
                speak(engine, [text], args)
            except ValueError as error:                                      # a prompt too long is no reason to leave
                print(f"sample.py: {error}", file=sys.stderr)
    except (KeyboardInterrupt, EOFError):
        print()
        sys.exit(130 if isinstance(sys.exc_info()[1], KeyboardInterrupt) else 0)
    except BrokenPipeError:                                                  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        parser.error(f"{error.strerror}: {error.filename}" if error.strerror else error)
    except ValueError as error:
        parser.error(error)


def refuse_for_serving(args):
    """ValueError for what cannot be said together with --serve, since clients say it."""
    for name in ("prompt", "interactive", "chat", "system", "max_new_tokens", "min_tokens", "stop", "keep_stop", "seed"):
        if args.serve and getattr(args, name):
            raise ValueError(f"--{name} is nothing that --serve heeds; clients say such things in their requests")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; it must be from 0 to 65535")


def use_preferences(args):
    """Fill in what the command line leaves open: the model's own sampling settings, or ours."""
    own = preferences(Path(args.model))
    for name, usual in (("temperature", 0.8), ("top_k", None), ("top_p", None), ("min_p", None), ("repetition_penalty", 1.0)):
        if getattr(args, name) is None:
            setattr(args, name, own.get(name, usual))


if __name__ == "__main__":
    main()
