"""
Generation: a model folder and a prompt in, text out.

A model gives a distribution over the next token; drawing from it, appending, and asking again writes text. The cost lies in
asking: without memory, every new token would run the whole text through the model. The key-value cache keeps what attention
needs of earlier positions, so that there are two phases. Prefill runs all prompts at once, in parallel over positions, and is
bound by arithmetic. Decode runs one position per row, and is bound by reading the weights: rows that are decoded together
share that reading, which is why several prompts cost little more than one.

    python sample.py                                             # the newest run speaks
    python sample.py --model FOLDER --prompt "def parse(" --prompt "import os" --temperature 0.7 --top_p 0.9
    python sample.py --interactive                               # type a beginning, read on

    new = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0)       # lists of token ids, any lengths

Works on any folder that `model.load_pretrained` opens. Left out so far: stop strings, continuous batching, speculative
decoding, chat, a server.
"""
import argparse
import codecs
import os
import sys
import time
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from bpe import Tokenizer
from model import KVCache, Parser, Transformer, load_pretrained


# ------------------------------------------------------------------------------------------------------------------
# From logits to a token

def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Put -inf where a token may not be drawn. logits (B, V).

    `top_k` leaves the k likeliest tokens (Fan et al. 2018, arXiv 1805.04833). `top_p` leaves the smallest set of likeliest
    tokens whose probabilities add up to p (Holtzman et al. 2019, arXiv 1904.09751), counted after top_k; never none."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]                         # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        values, order = logits.sort(descending=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities                    # the mass of likelier tokens
        values = values.masked_fill(before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter(-1, order, values)
    return logits


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """One token per row, (B): from softmax(logits / temperature) after the filters; the likeliest at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)          # 0 at most, so that no temperature overflows
    probabilities = filter_logits(logits / max(temperature, 1e-6), top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


# ------------------------------------------------------------------------------------------------------------------
# Prefill and decode

def prefill(model: Transformer, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Run the prompts through an empty cache; returns the logits behind each prompt's last token, (B, V).

    Shorter prompts are padded on the right. Nothing sees the padding: attention is causal, and each row's length is set
    back to its own afterwards, so that decoding writes over what the padding left in the cache."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.cos.device)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    hidden = model.hidden(tokens.to(model.cos.device), cache)                # (B, S, hidden_size)
    cache.lengths.copy_(lengths)
    return model.logits(hidden[torch.arange(len(prompts)), lengths - 1])


def decode_one(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token (B) to each row; returns the logits behind it, (B, V)."""
    return model.logits(model.hidden(tokens[:, None], cache)[:, -1])


def stream(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, stop=None,
           seed: int | None = None) -> Iterator[list[int | None]]:
    """Yield, step by step, each row's new token, or None for a row that has ended. Arguments as in `generate`."""
    config = model.config
    check(config, prompts, max_new_tokens, temperature, top_k, top_p)
    if model.training and config.dropout:
        raise ValueError(f"the model is in training mode, with dropout {config.dropout}; call model.eval() first")
    if not prompts:
        return
    prompts = [prompt or [config.bos_token_id] for prompt in prompts]
    ends = ending_ids(config, stop)
    longest = max(map(len, prompts))
    device, weight = model.cos.device, model.lm_head.weight
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    room = min(longest + max_new_tokens, config.max_position_embeddings)
    cache = KVCache(config, len(prompts), room, device, weight.dtype)
    # a row ends at max_new_tokens, at an ending token, or where the context is full
    left = [min(max_new_tokens, config.max_position_embeddings - len(prompt)) for prompt in prompts]
    drawn, tokens = 0, None
    while any(left):
        with torch.inference_mode():                                         # not around the yield: the caller's code is its own
            if drawn == 0:
                logits = prefill(model, prompts, cache)
            else:
                cache.end = max(len(prompt) for prompt, n in zip(prompts, left) if n) + drawn - 1
                logits = decode_one(model, tokens, cache)
            tokens = draw(logits, temperature, top_k, top_p, generator)
        drawn += 1
        new = [token if n else None for token, n in zip(tokens.tolist(), left)]
        yield new
        ended = [n > 0 and (token in ends or n == 1) for token, n in zip(new, left)]
        left = [0 if over else max(n - 1, 0) for over, n in zip(ended, left)]
        if any(ended):                                                       # its row computes on, from the start of its cache
            cache.lengths *= torch.tensor([n > 0 for n in left], device=device)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop=None, seed: int | None = None) -> list[list[int]]:
    """The new tokens for each prompt, a list of lists of ids.

    prompts: lists of ids of any lengths; an empty one starts from the model's beginning-of-sequence token. temperature 0 takes
    the likeliest token. A row ends after `max_new_tokens`, where the context is full, or with one of the model's end-of-sequence
    ids or of `stop` (ids), which is its last token then. The same seed gives the same tokens; equal prompts in a batch draw
    independently. ValueError for a prompt that fills the context, ids outside the vocabulary, or settings out of range."""
    out = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, temperature, top_k, top_p, stop, seed):
        for row, token in zip(out, new):
            if token is not None:
                row.append(token)
    return out


def ending_ids(config, stop=None) -> set[int]:
    """The ids after which a row ends: the model's own (one, several or none) and `stop`."""
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {*own, *(stop or ())} - {None}


def check(config, prompts, max_new_tokens, temperature, top_k, top_p):
    """ValueError in one line for what cannot be generated."""
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= config.max_position_embeddings:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens and the model's context holds {config.max_position_embeddings}, "
                             "one of which the first new token needs: nothing was generated; shorten the prompt")
        if not prompt and config.bos_token_id is None:
            raise ValueError(f"prompt {number} is empty, and the model has no beginning-of-sequence token to start from")
        if prompt and not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(f"prompt {number} has an id outside the vocabulary of {config.vocab_size}")
    for name, value, fine, rule in (("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
                                    ("temperature", temperature, temperature >= 0, "at least 0"),
                                    ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
                                    ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1")):
        if not fine:
            raise ValueError(f"{name} is {value}; it must be {rule}")


# ------------------------------------------------------------------------------------------------------------------
# python sample.py

class Printer:
    """Writes tokens to the terminal as they come; a character whose bytes are split over tokens waits for all of them."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int):
        """Print what `token` completes."""
        print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="", flush=True)


def speak(model: Transformer, tokenizer: Tokenizer, texts: list[str], args) -> None:
    """Continue each text `num_samples` times and print it: one as it comes, several when all are done. Then the speeds."""
    start_token = [model.config.bos_token_id] if model.config.bos_token_id is not None else []
    prompts = [start_token + tokenizer.encode(text, special="text") for text in texts for _ in range(args.num_samples)]
    stop = [single_token(tokenizer, text) for text in args.stop or ()]
    alone = len(prompts) == 1
    check(model.config, prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p)   # before anything is printed
    out, times, printer = [[] for _ in prompts], [time.perf_counter()], Printer(tokenizer)
    print(texts[0] if alone else "", end="", flush=True)
    silent = ending_ids(model.config, stop)
    for new in stream(model, prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p, stop, args.seed):
        times.append(time.perf_counter())
        for row, token in zip(out, new):
            if token is not None:
                row.append(token)
        if alone and new[0] is not None and new[0] not in silent:
            printer.put(new[0])
    if not alone:
        for number, (prompt, row) in enumerate(zip(prompts, out), 1):
            text = tokenizer.decode([*prompt[len(start_token):], *(token for token in row if token not in silent)])
            print(f"--- {number} of {len(prompts)} " + "-" * 60 + f"\n{text}")
    if len(times) > 2:
        given, new, prefill_time, decode_time = sum(map(len, prompts)), sum(map(len, out)), times[1] - times[0], times[-1] - times[1]
        print(f"\n[{len(prompts)} sample(s); prefill {given} tokens at {given / prefill_time:,.0f} tokens/s, "
              f"decode {new} tokens at {(new - len(prompts)) / decode_time:,.0f} tokens/s]")


def single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is one token; ValueError when it is none or several."""
    ids = tokenizer.encode(text, special="allow")
    if len(ids) != 1:
        raise ValueError(f"--stop {text!r} is {len(ids)} tokens, and must be one")
    return ids[0]


def newest_run() -> Path:
    """The model folder below runs/ that was written last."""
    folders = [path.parent for path in Path("runs").glob("*/config.json") if (path.parent / "model.safetensors").exists()]
    if not folders:
        raise ValueError("there is no run in runs/ yet: train one with `torchrun train.py`, or name a folder with --model")
    return max(folders, key=lambda folder: (folder / "model.safetensors").stat().st_mtime)


def main():
    """The command line: speak from a model folder."""
    parser = Parser(prog="sample.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Generate text from a model folder.")
    parser.add_argument("--model", help="model folder; none: the newest in runs/")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times; none: from nothing")
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal, line by line")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; 1 draws as the model says")
    parser.add_argument("--top_k", type=int, help="draw from this many likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that make up this much probability")
    parser.add_argument("--stop", action="append", help="end at this token (a text that is one token); may be given several times")
    parser.add_argument("--seed", type=int, help="for the same text again")
    parser.add_argument("--device", help="cuda, mps or cpu; none: the first of these that is there")
    args = parser.parse_args()
    try:
        if args.num_samples < 1:
            raise ValueError(f"--num_samples is {args.num_samples}; it must be at least 1")
        device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
        if device not in ("cuda", "mps", "cpu"):
            raise ValueError(f"--device is {device!r}; it must be cuda, mps or cpu")
        if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
            raise ValueError(f"--device is {device}, and this machine has none; take cpu")
        folder = Path(args.model) if args.model else newest_run()
        model = load_pretrained(folder).to(device).eval()
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} entries and the model {model.config.vocab_size}")
        print(f"[{folder}]", flush=True)
        if not args.interactive:
            speak(model, tokenizer, args.prompt or [""], args)
        while args.interactive:
            text = input("\nprompt> ")
            try:
                speak(model, tokenizer, [text], args)
            except ValueError as error:                                      # a prompt too long is no reason to leave
                print(f"sample.py: {error}", file=sys.stderr)
    except (KeyboardInterrupt, EOFError):
        print()
        sys.exit(0 if args.interactive else 130)
    except BrokenPipeError:                                                  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        parser.error(f"{error.strerror}: {error.filename}" if error.strerror else error)
    except ValueError as error:
        parser.error(error)


if __name__ == "__main__":
    main()
