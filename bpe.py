"""Byte-level BPE: turn text into token ids and back, with a vocabulary learned from the text itself.

The idea. Text is bytes, and 256 byte tokens can spell anything, but at one token a byte. Byte-pair encoding finds the
two neighbouring tokens that occur together most often, makes them one new token, and repeats: `t h` becomes `th`,
`th e` becomes `the`. The list of those merges is the whole tokenizer. To encode is to apply the merges in the order in
which they were learned; to decode is to join bytes, so every string survives the round trip.

A pattern first cuts text into words (with the space before them), and no merge crosses a cut. So the work is to number
the words of a text: training counts the numbers, encoding looks up their ids, and the merges are done once for each
distinct word. Numbering is done by NumPy for a whole block of text at once, merges for many words at once; the loops of
the textbook stay beside, to be read first, and tested against.

In:  documents: .jsonl (one {"text": ...} a line) or text where <|endoftext|> ends a document; .gz of either.
Out: tokenizer.json in the Hugging Face format; tokens as .npy (uint16 or uint32), <|endoftext|> after each document.

    python bpe.py train corpus.jsonl --vocab_size 4096 --out tokens/tokenizer.json
    python bpe.py encode corpus.jsonl --tokenizer tokens/tokenizer.json --out tokens

`Tokenizer.load` opens other people's files too, also in SentencePiece's form of BPE (Llama 2, Mistral), which starts from
characters. Left out: Unigram, WordPiece, training in SentencePiece's form. Method: Gage 1994 (the compressor); Sennrich,
Haddow and Birch 2016, arXiv:1508.07909 (words); Radford et al. 2019, "GPT-2" (bytes, and the pattern).
"""

import argparse
import base64
import concurrent.futures
import contextlib
import copy
import difflib
import functools
import gzip
import heapq
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
from tqdm import tqdm

# How text is cut into words. GPT-2's pattern, as published: contractions; letters, digits or symbols with at most one
# space before them; white space, which leaves its last character to the word that follows. The later ones take any
# symbol before letters, at most three digits (Qwen: one), and line ends after symbols. tiktoken ships cl100k's in a
# form that differs from Llama 3's at the end of a text only (`\s++$`); o200k's also cuts where small letters turn
# capital.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
              r"""\s*[\r\n]|\s+(?!\S)|\s""",
    "llama3": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
              r"""\s*[\r\n]+|\s+(?!\S)|\s+""",
    "qwen2": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"""
             r"""\s+(?!\S)|\s+""",
    "o200k": "|".join((
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""", r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""", r"""\s*[\r\n]+""", r"""\s+(?!\S)""", r"""\s+""")),
    # SmolLM and StarCoder take every digit out first, and apply GPT-2's pattern to what stands between: in one pattern,
    "digits": r"""\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+""",
}
ENDOFTEXT = "<|endoftext|>"
END_MARK = ENDOFTEXT.encode()
BLOCK = 1 << 22  # bytes of text handed to a worker at a time
GROUP = 1 << 20  # bytes of text that NumPy works on at a time


# ---------------------------------------------------------------------------------------------------------------------
# The textbook version: everything BPE is, too slow for more than a page of text. The fast version below gives the same.


def merge(ids, pair, new_id):
    """The list `ids` with every occurrence of the two neighbours `pair` replaced by `new_id`, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges_textbook(words, num_merges):
    """What `learn_merges` computes, by counting every pair of every word again for each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    spelled = [(list(word.encode()), frequency) for word, frequency in words.items()]
    merges = []
    while len(merges) < num_merges:
        counts = Counter()
        for ids, frequency in spelled:
            for pair in zip(ids, ids[1:]):
                counts[pair] += frequency
        if not counts:
            break
        pair = max(counts, key=lambda pair: (counts[pair], tokens[pair[0]], tokens[pair[1]]))
        spelled = [(merge(ids, pair, len(tokens)), frequency) for ids, frequency in spelled]
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return merges


def encode_textbook(text, merges, pattern=GPT2_PATTERN):
    """The tokens of a text, as bytes: each word's bytes, and each merge in turn applied to them."""
    tokens = []
    for word in compile_pattern(pattern).findall(text):
        word = [bytes([byte]) for byte in word.encode()]
        for first, second in merges:
            word = merge(word, (first, second), first + second)
        tokens += word
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Learning merges from the distinct words of a corpus


def learn_merges(words, num_merges):
    """The first `num_merges` merges (fewer when the words run out of pairs) for `words`, a dict from str to frequency.

    All words stand in one array of token ids, each followed by END, and a place is an index into it. Three things make
    it fast. A merge visits only the places where its pair stands. There, only the pairs to the left and right change
    their counts. And NumPy does that for all places of a pair at once.

    The books are simple, because a new pair holds the new token, so it was never seen before. Its count is known in
    full when it is made, and falls from then on. Its places are known in full, too, and are kept in ascending order as
    one slice of an array; a place where another merge took the pair away has another number in `pair_at` by then.
    Equally frequent pairs: the lexicographically greater pair of byte strings goes first.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    keys = [descending(token) for token in tokens]
    texts = [word.encode() for word in words]
    END, lengths = 256 + num_merges, np.fromiter(map(len, texts), np.int64, len(texts))
    size = int(lengths.sum()) + len(texts) + 1
    ids = np.full(size, END, np.int32)  # one END before the first word
    inside = np.ones(size, bool)
    inside[0] = inside[np.cumsum(lengths + 1)] = False
    ids[inside] = np.frombuffer(b"".join(texts), np.uint8)
    frequency = np.zeros(size, np.int64)
    frequency[1:] = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths + 1)
    right = np.arange(1, size + 1, dtype=np.int32)  # the next place in use, as merging empties places
    left = np.arange(-1, size - 1, dtype=np.int32)
    del texts

    # Pair p: its newer token, the other one (plus RIGHT, if it stands on the right), its count, its slice of `places`.
    # Pair 0 stands for none. A merge empties a place and makes at most two new pairs, so these are large enough; what
    # is not used costs no memory.
    RIGHT = END + 1
    newer, other = (np.zeros(3 * size + 2, np.int32) for _ in range(2))
    count, begin, end = (np.zeros(len(newer), np.int64) for _ in range(3))
    places, pair_at = np.empty(3 * size, np.int32), np.zeros(size, np.int32)
    num_pairs, num_places = 1, 0

    def add_pairs(names, at):
        """Number the new pairs that stand `at` these places; equal `names` are one pair -> (their numbers, as a slice;
        the name of each)."""
        nonlocal num_pairs, num_places
        both = np.sort(names.astype(np.int64) << 32 | at)  # so the places of each pair ascend
        names, at = both >> 32, both & 0xFFFFFFFF
        is_first = differs_from_left(names)
        starts = np.flatnonzero(is_first)
        new = slice(num_pairs, num_pairs + len(starts))
        if len(at):
            count[new] = np.add.reduceat(frequency[at], starts)
            begin[new] = end[new.start - 1 : new.stop - 1] = starts + num_places
            end[new.stop - 1] = num_places + len(at)
            pair_at[at] = is_first.cumsum() + (num_pairs - 1)
            places[num_places : num_places + len(at)] = at
        num_places, num_pairs = num_places + len(at), new.stop
        return new, names[starts]

    at = np.flatnonzero((ids[:-1] != END) & (ids[1:] != END))
    new_pairs, names = add_pairs(ids[at] << 8 | ids[at + 1], at)
    other[new_pairs], newer[new_pairs] = names >> 8, names & 255

    def tokens_of(pair):
        return (other[pair], newer[pair]) if other[pair] < RIGHT else (newer[pair], other[pair] - RIGHT)

    def entry(pair):
        a, b = tokens_of(pair)
        return -int(count[pair]), keys[a] + keys[b], pair

    # The heap holds the pairs that were as frequent as `enough` when they came; a true count is looked up at the top.
    # Only when it is empty can a rarer pair be next: then half as frequent is enough.
    heap, enough, merges = [], 0, []
    with tqdm(total=num_merges, desc="merging", unit=" merges", disable=None) as bar:
        while len(merges) < num_merges:
            if not heap:
                enough = int(count[:num_pairs].max()) // 2 + 1
                heap = [entry(pair) for pair in np.flatnonzero(count[:num_pairs] >= enough).tolist()]
                if not heap:
                    break
                heapq.heapify(heap)
            negative, _, pair = heapq.heappop(heap)
            if -negative != count[pair]:
                if count[pair] >= enough:
                    heapq.heappush(heap, entry(pair))
                continue
            (a, b), new = tokens_of(pair), len(tokens)
            tokens.append(tokens[a] + tokens[b])
            keys.append(descending(tokens[-1]))
            merges.append((tokens[a], tokens[b]))

            at = places[begin[pair] : end[pair]]
            at = at[pair_at[at] == pair]
            if a == b:
                at = every_other_of_runs(at, right)
            taken = right[at]
            after = right[taken]
            before = left[at[differs_from_left(at, after)]]  # unless a place just merged stands there
            here, of_here = np.concatenate((before, taken)), np.concatenate((before, at))
            np.subtract.at(count, pair_at[here], frequency[here])
            count[0] = count[pair] = 0  # 0: what stood beside an END was counted off there
            ids[at], right[at], left[after] = new, after, at
            pair_at[of_here] = pair_at[taken] = 0
            names = np.concatenate((ids[before], ids[after] + RIGHT))
            inside = (names != END) & (names != END + RIGHT)
            new_pairs, names = add_pairs(names[inside], of_here[inside])
            other[new_pairs], newer[new_pairs] = names, new
            for pair in new_pairs.start + np.flatnonzero(count[new_pairs] >= enough):
                heapq.heappush(heap, entry(pair))
            bar.update()
    return merges


def differs_from_left(values, others=None):
    """Whether each value differs from the one on its left (in `others`); the first does."""
    differs = np.ones(len(values), bool)
    np.not_equal(values[1:], (values if others is None else others)[:-1], out=differs[1:])
    return differs


def every_other_of_runs(places, right):
    """Of the places of a pair, those where it is merged: in a run like `a a a` two overlap, and the left goes first."""
    index = np.arange(len(places))
    run_start = np.maximum.accumulate(np.where(differs_from_left(places, right[places]), index, 0))
    return places[(index - run_start) % 2 == 0]


def descending(token):
    """A str that sorts before that of another token exactly when the token's bytes sort after: `heapq` finds minima."""
    return token.translate(COMPLEMENT).decode("latin-1") + "\u0100"  # above every byte, so a prefix comes after


COMPLEMENT = bytes(range(255, -1, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Text, cut into words


def compile_pattern(pattern):
    """The pattern, completed so that `findall` loses nothing: a stretch that it passes over is a word of its own."""
    try:
        compiled = regex.compile(rf"{pattern}|(?s:(?:(?!{pattern}).)+)")
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None
    if compiled.groups:
        raise ValueError(f"pattern {pattern!r} has a capturing group; write (?:...) instead of (...)")
    if compiled.match(""):
        raise ValueError(f"pattern {pattern!r} matches the empty string")
    return compiled


def compile_special_tokens(special_tokens):
    """A pattern whose `split` puts special tokens at odd places. Longest first: one may be a prefix of another."""
    if "" in special_tokens:
        raise ValueError("a special token cannot be the empty string")
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")" if special_tokens else r"((?!))")


# Running a pattern over every character is what costs, so text is first cut into chunks by looking at pairs of
# neighbouring bytes, and the pattern is run on each distinct chunk only. A cut is allowed where every text has a word
# boundary, and where the pattern, coming from the left, does not look at what follows:
# - after an ASCII letter or digit, before another kind of ASCII character. Not before an apostrophe: o200k's "don't";
# - between a symbol and white space (before a line end only by GPT-2's pattern: the others take it with the symbol);
# - between a symbol and a digit, and by GPT-2's pattern a letter, which in the others may take the symbol along;
# - before a white space that something solid follows. GPT-2's pattern leaves the last white space of a run to the word
#   that follows, or by itself: what is to the left is a run of white space that is now at the end, and stays one word.
#   The others take line ends together, so for them it must be a space; with `\s++$` they do look at the end, so not;
# - after a line end that something solid follows, when a pattern takes all line ends together.
# Bytes of other scripts: the first byte of a character that is no white space in Unicode is solid.
# test_all.py tries these rules on every short text of one character of each class that the patterns know.
LETTERS = bytes(byte for byte in range(128) if chr(byte).isalpha())
DIGITS = b"0123456789"
WHITE = b" \t\n\r\v\f"
SYMBOLS = bytes(byte for byte in range(33, 127) if byte not in LETTERS + DIGITS)
ENDING = bytes(byte for byte in range(128) if byte not in LETTERS + DIGITS + b"'")
SOLID = LETTERS + DIGITS + SYMBOLS + bytes(byte for byte in range(0xC3, 0xF5) if byte not in b"\xe1\xe2\xe3")
RULES = [("between", LETTERS + DIGITS, ENDING), ("between", LETTERS, DIGITS), ("between", DIGITS, LETTERS),
         ("between", SYMBOLS, b" \t"), ("between", SYMBOLS.replace(b"'", b""), DIGITS)]
GPT2_RULES = RULES + [("between", SYMBOLS, WHITE), ("between", SYMBOLS.replace(b"'", b""), LETTERS)]
CUTS = {
    PATTERNS["gpt2"]: GPT2_RULES + [("before", WHITE, SOLID)],
    PATTERNS["digits"]: GPT2_RULES + [("before", WHITE, LETTERS + SYMBOLS)],  # digits of other scripts are solid, too
    PATTERNS["cl100k"]: RULES + [("between", b"\n", SOLID)],
    PATTERNS["llama3"]: RULES + [("between", b"\n", SOLID), ("before", b" ", SOLID)],
    PATTERNS["qwen2"]: RULES + [("between", b"\n", SOLID), ("before", b" ", SOLID)],
    PATTERNS["o200k"]: RULES + [("between", b"\n", SOLID.replace(b"/", b"")), ("before", b" ", SOLID)],
}


@functools.lru_cache
def cut_tables(pattern):
    """Two tables of 256 bytes: where they have a bit in common for two neighbours, their text may be cut; bit 0 means
    before the first, another one between them. All zero for a pattern that `CUTS` does not know."""
    left, right = bytearray(256), bytearray(256)
    for rule, (where, firsts, seconds) in enumerate(CUTS.get(pattern, [])):
        bit = 1 if where == "before" else 2 << rule
        for byte in firsts:
            left[byte] |= bit
        for byte in seconds:
            right[byte] |= bit
    return bytes(left), bytes(right)


def cut_places(data, pattern, text_starts=()):
    """The places in `data` (UTF-8) where it may be cut, ascending; all of `text_starts`, where another text begins, are
    among them."""
    left, right = (np.frombuffer(data.translate(table), np.uint8) for table in cut_tables(pattern))
    both, text_starts = left[:-1] & right[1:], np.asarray(text_starts, np.int64)
    both[text_starts[text_starts > 0] - 1] = 0  # neighbours of two texts say nothing
    cut = np.zeros(len(data), bool)
    cut[1:] = both > 1
    cut[:-1] |= (both & 1).view(bool)
    cut[text_starts] = True
    return np.flatnonzero(cut)


def last_cut(data, pattern, special_tokens=()):
    """The last place where `data` may be cut before white space, and its parts be tokenized apart; 0: there is none.

    Only before white space, which few special tokens have inside: one must not be cut in two. And not in a run of it,
    which a special token might end: it would leave no last space to a word.
    """
    if any(map(str.isspace, "".join(token[1:] for token in special_tokens))):
        return 0
    for start in (max(0, len(data) - 4096), max(0, len(data) - 2 * GROUP)):  # most often the last page has one
        for place in (start + cut_places(data[start:], pattern)[::-1]).tolist():
            before = data[max(0, place - 4) : place].decode(errors="ignore")  # a whole character, and more
            if data[place] in WHITE and before and not before[-1].isspace():
                return place
    return 0


def groups(texts, pattern):
    """Yield lists of (text, whether it ends there) of a megabyte or so; a longer text is cut where that is allowed.

    The arrays of a group are small enough for the processor's cache, and their memory is used again by the next.
    """
    group, held = [], 0
    for text in texts:
        start, size = 0, GROUP
        while len(text) - start > size:
            places = cut_places(text[start : start + size], pattern)
            if len(places) and places[-1]:
                yield group + [(text[start : start + int(places[-1])], False)]
                start, size, group, held = start + int(places[-1]), GROUP, [], 0
            else:
                size *= 2
        group.append((text[start:], True))
        held += len(text) - start
        if held >= GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group


class Growing:
    """A NumPy array that grows at its end; `array` is what it holds."""

    def __init__(self, dtype):
        self.room, self.array = np.empty(1024, dtype), np.empty(0, dtype)

    def extend(self, values):
        old, size = len(self.array), len(self.array) + len(values)
        if size > len(self.room):
            self.room = np.resize(self.room, 2 * size)
        self.room[old:size] = values
        self.array = self.room[:size]


class Sequences:
    """Sequences of integers of any lengths, numbered 0, 1, 2, ..., in three arrays."""

    def __init__(self):
        self.flat, self.start, self.length = Growing(np.int32), Growing(np.int64), Growing(np.int64)

    def __len__(self):
        return len(self.length.array)

    def extend(self, flat, lengths):
        """Add sequences, given one after the other and with their lengths."""
        self.start.extend(len(self.flat.array) + np.cumsum(lengths) - lengths)
        self.length.extend(lengths)
        self.flat.extend(flat)

    def join(self, numbers):
        """The sequences of these numbers, one after the other -> (the integers, the length of each sequence)."""
        lengths = self.length.array[numbers]
        ends = np.cumsum(lengths)
        index = np.repeat(self.start.array[numbers] - ends + lengths, lengths)
        index += np.arange(len(index))
        return self.flat.array[index], lengths


class Chunks:
    """The chunks of texts (see `CUTS`) as numbers: 1 for the first that was ever met, and so on; `words_of_chunk` has
    the numbers of the words in each, from 0 in the order of `words`.

    A chunk of up to 15 bytes is two 64-bit integers, the second with its length, so that NumPy looks up all chunks of a
    group in a hash table at once: Fibonacci hashing and linear probing (Knuth, The Art of Computer Programming, 6.4).
    Keys are compared in full, so the numbers are exact. Longer chunks, few in most texts, go through a dict. The
    pattern sees only those that were not met before.
    """

    def __init__(self, pattern):
        self.pattern, self.find_words = pattern, compile_pattern(pattern).findall
        self.clear()

    def clear(self):
        """Forget all; numbers begin again."""
        self.words = {}  # from word to number
        self.long_chunks, self.stored_bytes = {}, 0
        self.slots = np.zeros(1 << 12, np.int32)  # hash table of chunk numbers; 0: free
        self.keys = Growing(np.uint64), Growing(np.uint64)  # by chunk number
        self.words_of_chunk = Sequences()
        for key in self.keys:
            key.extend(np.zeros(1, np.uint64))
        self._add_words([b""])  # chunk 0 stands for none, and has no words

    def __len__(self):
        return len(self.words_of_chunk)

    def full(self):
        """Whether it is time to `clear`: memory is bounded."""
        return len(self) > 1 << 20 or self.stored_bytes > 1 << 26

    def __call__(self, group):
        """The chunks of one of `groups` -> (the numbers of all, one text after the other; where each text's begin, and
        at last their number)."""
        data = b"".join([text for text, _ in group])
        text_starts = np.cumsum([0] + [len(text) for text, _ in group])
        if not data:
            return np.empty(0, np.int32), text_starts
        starts = cut_places(data, self.pattern, text_starts[text_starts < len(data)])
        return self._number_chunks(data, starts), np.searchsorted(starts, text_starts)

    def _number_chunks(self, data, starts):
        """The numbers of the chunks of `data` that begin at `starts`."""
        lengths = np.diff(starts, append=len(data))
        eight = np.ndarray(len(data) + 9, "<u8", data + bytes(16), strides=(1,))  # eight[i]: bytes i to i + 7
        numbers = np.empty(len(starts), np.int32)
        short = np.flatnonzero(lengths < 16)
        at, length = starts[short], lengths[short]
        low = eight[at] & MASKS[np.minimum(length, 8)]
        high = eight[np.minimum(at + 8, len(data))] & MASKS[np.maximum(length - 8, 0)]
        high |= length.astype(np.uint64) << np.uint64(56)
        numbers[short], new = self._look_up(low, high)
        new_chunks = [data[i : i + n] for i, n in zip(at[new].tolist(), length[new].tolist())]
        known = len(self.keys[0].array)
        long = np.flatnonzero(lengths > 15)
        for i, start, length in zip(long.tolist(), starts[long].tolist(), lengths[long].tolist()):
            chunk = data[start : start + length]
            number = self.long_chunks.get(chunk)
            if number is None:
                number, known = known, known + 1
                new_chunks.append(chunk)
                if length < 256:  # longer ones hardly come twice
                    self.long_chunks[chunk] = number
            numbers[i] = number
        for key in self.keys:
            key.extend(np.zeros(known - len(key.array), np.uint64))
        if new_chunks:
            self._add_words(new_chunks)
        return numbers

    def _look_up(self, low, high):
        """The numbers of chunks by their keys; and where those are that were new, in the order of numbers."""
        if 2 * (len(self.keys[0].array) + len(low)) > len(self.slots):
            self._make_room(len(low))
        slot, new = self._slot(low, high), []
        numbers = self.slots[slot]
        waiting = np.flatnonzero(~self._is_key(numbers, low, high))
        slot = slot[waiting]
        while len(waiting):
            a, b, known = low[waiting], high[waiting], len(self.keys[0].array)
            free = np.flatnonzero(self.slots[slot] == 0)
            if len(free):  # all write their number there, the last one stays, and the others see whether it is they
                tentative = np.arange(known, known + len(free), dtype=np.int32)
                self.slots[slot[free]] = tentative
                stayed = free[self.slots[slot[free]] == tentative]
                self.slots[slot[stayed]] = np.arange(known, known + len(stayed))
                self.keys[0].extend(a[stayed])
                self.keys[1].extend(b[stayed])
                new.append(waiting[stayed])
            number = self.slots[slot]
            found = self._is_key(number, a, b)
            numbers[waiting[found]] = number[found]
            waiting, slot = waiting[~found], (slot[~found] + 1) & (len(self.slots) - 1)
        return numbers, np.concatenate(new) if new else np.empty(0, np.int64)

    def _is_key(self, number, low, high):
        return (self.keys[0].array[number] == low) & (self.keys[1].array[number] == high)

    def _slot(self, low, high):
        """Where to look first: the highest bits of a product, which all bits of the key have a part in."""
        bits = len(self.slots).bit_length() - 1
        return ((low ^ high * HASH_2) * HASH_1 >> np.uint64(64 - bits)).astype(np.int64)

    def _make_room(self, more):
        """A larger table, at most half full with `more` chunks."""
        low, high = (key.array for key in self.keys)
        self.slots = np.zeros(1 << (4 * (len(low) + more)).bit_length(), np.int32)
        numbers = np.flatnonzero(high).astype(np.int32)  # not the long ones
        slot = self._slot(low[numbers], high[numbers])
        while len(numbers):
            free = self.slots[slot] == 0
            self.slots[slot[free]] = numbers[free]
            lost = self.slots[slot] != numbers
            numbers, slot = numbers[lost], (slot[lost] + 1) & (len(self.slots) - 1)

    def _add_words(self, chunks):
        """Run the pattern over new chunks, which get the next numbers, and number their words."""
        numbers, counts, number = [], [], self.words.setdefault
        for chunk in chunks:
            words = self.find_words(chunk.decode())
            counts.append(len(words))
            for word in words:
                numbers.append(number(word, len(self.words)))
        self.words_of_chunk.extend(np.array(numbers, np.int32), np.array(counts, np.int64))
        self.stored_bytes += sum(map(len, chunks))


MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # the first n bytes of eight
HASH_1 = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
HASH_2 = np.uint64(0xD1B54A32D192ED03)  # any other odd number


# ---------------------------------------------------------------------------------------------------------------------
# Documents from files. The files are cut into blocks here, quickly; reading the documents in them is the workers' work


class Block(NamedTuple):
    """A piece of a file: whole rows of a .jsonl, or text that begins and ends where it may be cut."""

    path: str
    start: int  # in bytes of the content
    size: int
    rows_before: int
    is_last: bool
    progress: int  # bytes on disk that were read for it
    content: bytes | None  # None: it is quicker to read it from the file again than to send it to a worker


def has_rows(path):
    """Whether a file is .jsonl: else it is text."""
    return str(path).lower().removesuffix(".gz").endswith(".jsonl")


def read_blocks(paths, cut, size):
    """Yield the blocks of files, of about `size` bytes. `cut`: where a text may be cut last, 0 for nowhere.

    ValueError or OSError, naming the file, when it is missing, empty or not a whole .gz.
    """
    for path in paths:
        packed = str(path).lower().endswith(".gz")
        is_file = os.path.isfile(path)  # and not a pipe, which can be read only once
        with open(path, "rb") as raw, gzip.open(raw) if packed else contextlib.nullcontext(raw) as file:
            start = rows = before = 0
            held, empty = b"", True
            try:
                while True:
                    data = file.read(size)
                    held += data
                    place = len(held) if not data else held.rfind(b"\n") + 1 if has_rows(path) else text_end(held, cut)
                    if place:
                        position = raw.tell() if packed and is_file else start + place
                        progress, before = position - before, position
                        block, held = held[:place], held[place:]
                        yield Block(str(path), start, place, rows, not data, progress, block if packed or not is_file else None)
                        start, rows = start + place, rows + (block.count(b"\n") if has_rows(path) else 0)
                        empty = empty and has_rows(path) and not block.strip()
                    if not data:
                        break
            except (EOFError, zlib.error, gzip.BadGzipFile):
                raise ValueError(f"{path}: not a whole gzip file") from None
            if empty:
                raise ValueError(f"{path}: empty, no documents in it")


def text_end(text, cut):
    """The last place in a text where a document ends or, after that, `cut` allows it."""
    end = text.rfind(END_MARK)
    end = 0 if end < 0 else end + len(END_MARK)
    return end + cut(text[end:])


def documents(block):
    """The documents in a block: a list of (UTF-8 text, whether the document ends there).

    ValueError that names the file, and the row, when it is not text, or not rows with a text.
    """
    content = block.content
    if content is None:
        with open(block.path, "rb") as file:
            file.seek(block.start)
            content = file.read(block.size)
    try:
        content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{block.path}: not UTF-8 text (binary, or in another encoding)") from None
    if has_rows(block.path):
        rows = enumerate(content.split(b"\n"), block.rows_before + 1)
        return [(row_text(row, f"{block.path}, line {number}"), True) for number, row in rows if row.strip()]
    if b"\0" in content:
        raise ValueError(f"{block.path}: binary, it holds a NUL byte")
    *whole, rest = content.split(END_MARK)
    return [(text, True) for text in whole] + ([(rest, block.is_last)] if rest else [])


def row_text(row, where):
    """The UTF-8 text of one row of a .jsonl."""
    try:
        return json.loads(row)["text"].encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which UTF-8 cannot
        raise ValueError(f'{where}: "text" holds a lone surrogate') from None
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f'{where}: not a JSON object with a string "text"') from None


def texts_of(*paths):
    """The documents of files, as a list of str."""
    whole = read_blocks(paths, lambda text: 0, BLOCK)
    return [text.decode() for block in whole for text, _ in documents(block)]


def as_list(paths):
    """One path or several, as a list."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


# ---------------------------------------------------------------------------------------------------------------------
# All cores


def parallel_map(function, items, num_workers):
    """Yield (item, function(item)) in the order of `items`, which are fetched only a few ahead of what is asked for.

    `function` goes to each worker process once, and may keep a cache there. One worker, or one item, runs right here.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    if num_workers == 1 or len(first) < 2:
        for item in items:
            yield item, function(item)
        return
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, initializer=start_worker, initargs=(function,))
    try:
        waiting = deque()
        for item in items:
            waiting.append((item, pool.submit(run_in_worker, item)))
            if len(waiting) > 2 * num_workers:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    except concurrent.futures.BrokenExecutor:
        raise ValueError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(function):
    """What a new worker process does first: keep the function, and end when the parent does."""
    global worker_function
    worker_function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the group; the parent answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait for the parent process to end, and end too."""
    multiprocessing.parent_process().join()  # else a parent that was killed leaves its workers waiting for ever
    os._exit(1)


def run_in_worker(item):
    """Call the worker's function; at the top level, since processes find functions by name."""
    return worker_function(item)


def enough_workers(paths, num_workers):
    """`num_workers`, or for None all cores, unless the files are so small that starting a process takes longer."""
    return num_workers or max(1, min(os.cpu_count(), sum(os.stat(path).st_size for path in paths) // (4 * BLOCK)))


def progress_bar(paths, description):
    """A bar over the bytes of the files."""
    total = sum(os.stat(path).st_size for path in paths)
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=None)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_bpe(paths, vocab_size, special_tokens=(ENDOFTEXT,), pattern=GPT2_PATTERN, num_workers=None):
    """Learn a byte-level BPE vocabulary from one file or a list of files -> (vocab, merges).

    vocab: dict from id to bytes: the 256 bytes, then the merges in order, then the special tokens; `vocab_size` in all,
    or fewer, with a warning, when every word has become one token. merges: list of pairs of bytes.
    Special tokens in the text are boundaries and are not counted. Equally frequent pairs: the lexicographically greater
    pair of byte strings first. The result does not depend on `num_workers` (None: all cores), and memory grows with the
    number of distinct words. ValueError or OSError for files that cannot be read and a `vocab_size` too small.
    """
    paths, special_tokens = as_list(paths), list(dict.fromkeys(special_tokens))
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
                         f"take {vocab_size - num_merges}")
    for token in special_tokens:
        if len(token.encode()) == 1:
            raise ValueError(f"special token {token!r} is one of the 256 bytes; give it two characters or more")
    words = Counter()
    count = WordCounter(pattern, special_tokens)
    with progress_bar(paths, "counting words") as bar:
        cut = functools.partial(last_cut, pattern=pattern, special_tokens=special_tokens)
        blocks = read_blocks(paths, cut, 4 * BLOCK)
        for block, counts in parallel_map(count, blocks, enough_workers(paths, num_workers)):
            words.update(counts)
            bar.update(block.progress)
    merges = learn_merges(words, num_merges)
    tokens = [bytes([byte]) for byte in range(256)] + [first + second for first, second in merges]
    vocab = dict(enumerate(tokens + [token.encode() for token in special_tokens]))
    if len(vocab) < vocab_size:
        print(f"the text has pairs for {len(vocab)} tokens only, not for {vocab_size}", file=sys.stderr)
    return vocab, merges


class WordCounter:
    """How often each word occurs in a block. It remembers words from one block to the next."""

    def __init__(self, pattern, special_tokens):
        self.chunks = Chunks(pattern)
        self.split_special = compile_special_tokens(special_tokens).split

    def __call__(self, block):
        if self.chunks.full():
            self.chunks.clear()
        texts = [part.encode() for text, _ in documents(block) for part in self.split_special(text.decode())[::2]]
        numbers = [self.chunks(group)[0] for group in groups(texts, self.chunks.pattern)]
        counts = np.bincount(np.concatenate([*numbers, np.empty(0, np.int32)]))
        met = np.flatnonzero(counts)
        numbers, lengths = self.chunks.words_of_chunk.join(met)
        counts = np.bincount(numbers, np.repeat(counts[met], lengths))
        words = list(self.chunks.words)
        return {words[number]: int(counts[number]) for number in np.flatnonzero(counts)}


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


class Tokenizer:
    """A vocabulary (dict from id to bytes) and a list of merges (pairs of bytes, the first learned first), put to work.

    merges: None for a vocabulary that came without: any two tokens that make a third may be merged, lowest id first.
    special_tokens: names (one that the vocabulary lacks gets the next free id), or a dict from name to id.
    ignore_merges: a word that is in the vocabulary is that token, whatever the merges would make of it (Llama 3).
    normalizer: None, or the Unicode form ("NFC": Qwen) that a text is brought to first.
    Attributes: these, `chat_template` (a str for `tokenizer_config.json`, or None) and `eot` (the id of <|endoftext|>,
    or None). `len` is the highest id + 1, the number of rows that a model's embedding needs.
    """

    bos_token = eos_token = None

    def __init__(self, vocab, merges, special_tokens=(), pattern=GPT2_PATTERN, ignore_merges=False, normalizer=None):
        self.vocab, self.pattern, self.normalizer = dict(vocab), pattern, normalizer
        self.ignore_merges, self.chat_template = ignore_merges, None
        if not isinstance(special_tokens, dict):
            ids = {token: id for id, token in self.vocab.items()}
            special_tokens = {token: ids.setdefault(token.encode(), max(ids.values(), default=-1) + 1)
                              for token in special_tokens}
        self.special_tokens = dict(special_tokens)
        self.vocab |= {id: token.encode() for token, id in special_tokens.items()}
        self.eot = self.special_tokens.get(ENDOFTEXT, self.special_tokens.get("<|end_of_text|>"))
        special_ids = set(special_tokens.values())
        self._ids = ids = {token: id for id, token in self.vocab.items() if id not in special_ids}
        self.merges = merges_of_ranks(ids) if merges is None else [tuple(pair) for pair in merges]
        for needed in itertools.chain(map(bytes, zip(range(256))), *self.merges, map(b"".join, self.merges)):
            if needed not in ids:
                raise ValueError(f"the vocabulary lacks {needed!r}, a byte or what a merge joins or makes")
        self._byte_ids = [ids[bytes([byte])] for byte in range(256)]
        # A merge's rank says which goes first. It is its place in the list; without a list, the id that it makes.
        self._merged = [ids[a + b] for a, b in self.merges] if merges is not None else range(len(self))
        ranks = range(len(self.merges)) if merges is not None else (ids[a + b] for a, b in self.merges)
        self._ranks = {(ids[a], ids[b]): rank for rank, (a, b) in zip(ranks, self.merges)}
        self._find_words = compile_pattern(pattern).findall
        self._split_special = compile_special_tokens(self.special_tokens).split
        self._ids_of_word = {}
        self._integers = np.arange(len(self)).astype(object)
        self._fast = None

    def __len__(self):
        return max(self.vocab) + 1

    def encode(self, text, special="allow"):
        """The token ids of a str, a list. A special token in it becomes its id ("allow"), is read as the characters it
        is written with ("text", right for all text that others wrote), or raises ValueError ("error")."""
        parts = self._parts(text, special)
        if len(text) > 2000:  # below, the many small steps of NumPy cost more than they save
            ids, starts = self._encode_texts([utf8(part) for part in parts[::2]])
            if len(parts) > 1:
                ids = np.insert(ids, starts[1:-1], [self.special_tokens[part] for part in parts[1::2]])
            return self._integers[ids].tolist()  # twice as fast as making an int for each
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                part = unicodedata.normalize(self.normalizer, part) if self.normalizer else part
                for word in self._find_words(part):
                    ids += self._ids_of_word.get(word) or self._encode_new_word(word)
        return ids

    def _parts(self, text, special):
        """The text as a list, cut at special tokens, which stand at odd places, as far as `special` wants them."""
        if special not in ("allow", "text", "error"):
            raise ValueError(f'special={special!r}: expected "allow", "text" or "error"')
        parts = self._split(text, special != "text")
        if special == "error" and len(parts) > 1:
            raise ValueError(f'the text holds the special token {parts[1]!r}; special="text" reads it as plain text')
        return parts

    def _split(self, text, special):
        return self._split_special(text) if special else [text]

    def _encode_new_word(self, word):
        """The ids of a word, which are remembered."""
        if len(self._ids_of_word) >= 1 << 18:
            self._ids_of_word.clear()  # memory is bounded
        self._ids_of_word[word] = ids = self._encode_word(utf8(word))
        return ids

    def _encode_word(self, word):
        """The ids of one word, given in UTF-8: its bytes, merged."""
        if self.ignore_merges and word in self._ids:
            return [self._ids[word]]
        return merge_by_rank([self._byte_ids[byte] for byte in word], self._ranks, self._merged)

    def _encode_texts(self, texts):
        """The ids of UTF-8 texts, many at once -> (the ids of all, one after the other; where each text's begin, and at
        last their number)."""
        if self._fast is None:
            self._fast = BatchEncoder(self)
        if self.normalizer:
            texts = [text if text.isascii() else unicodedata.normalize(self.normalizer, text.decode()).encode()
                     for text in texts]
        return self._fast(texts)

    def encode_batch(self, texts):
        """The ids of many strings, a list of lists. Special tokens in them are read as text."""
        ids, starts = self._encode_texts([utf8(text) for text in texts])
        ids = self._integers[ids].tolist()
        return [ids[start:end] for start, end in itertools.pairwise(starts)]

    def encode_iterable(self, chunks, special="allow"):
        """Yield the ids of the strings in `chunks` (lines of an open file, say) joined, without joining them.

        What a later chunk could change is held back. Where no cut is known (see `CUTS`), that is everything.
        """
        special_tokens = () if special == "text" else self.special_tokens
        held, size, enough = [], 0, GROUP // 16
        for chunk in chunks:
            held.append(chunk)
            size += len(chunk)
            if size >= enough:
                text = utf8("".join(held))
                place = last_cut(text, self.pattern, special_tokens)
                yield from self.encode(text[:place].decode(), special)
                held, size = [text[place:].decode()], len(text) - place
                enough = max(GROUP // 16, 2 * size)  # twice as much as did not help, or long words cost n * n
        yield from self.encode("".join(held), special)

    def encode_file(self, paths, out, num_workers=None):
        """Encode the documents of one file or a list of files into `out`, a .npy of one dimension -> number of tokens.

        uint16, or uint32 when the vocabulary needs it; <|endoftext|> after every document. Special tokens inside a
        document are read as text. Memory does not grow with the files; `out` appears whole or not at all.
        """
        paths = as_list(paths)
        if self.eot is None:
            raise ValueError(f"the tokenizer has no {ENDOFTEXT} to put between documents")
        total, self._fast = 0, self._fast or BatchEncoder(self)  # here, for the workers to share
        with replacing(out) as file, progress_bar(paths, "encoding") as bar:
            header = {"descr": self._dtype().str, "fortran_order": False, "shape": (0,)}
            np.lib.format.write_array_header_1_0(file, header)  # padded: room for the length, known at the end
            start = file.tell()
            blocks = read_blocks(paths, functools.partial(last_cut, pattern=self.pattern), BLOCK)
            # What a worker returns would go through a pipe; a file in between is faster by a quarter.
            with tempfile.TemporaryDirectory(prefix=f"{Path(out).name}.tmp.", dir=Path(out).parent) as folder:
                encode = functools.partial(self._encode_block, folder=folder)
                with contextlib.closing(parallel_map(encode, blocks, enough_workers(paths, num_workers))) as results:
                    for block, part in results:
                        total += file.write(Path(part).read_bytes()) // self._dtype().itemsize
                        os.unlink(part)
                        bar.update(block.progress)
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": (total,)})
            assert file.tell() == start
        return total

    def _encode_block(self, block, folder):
        """Write the ids of a block to a file of its own, and return its path."""
        texts = documents(block)
        ids, starts = self._encode_texts([text for text, _ in texts])
        ends = [start for start, (_, document_ends) in zip(starts[1:], texts) if document_ends]
        handle, path = tempfile.mkstemp(dir=folder)
        with open(handle, "wb") as file:
            np.insert(ids, ends, self.eot).astype(self._dtype()).tofile(file)
        return path

    def _dtype(self):
        return np.dtype("<u2" if len(self) <= 1 << 16 else "<u4")

    def decode_bytes(self, ids):
        """The bytes of a sequence (or array) of ids. ValueError for an id that is not in the vocabulary."""
        try:
            return b"".join([self.vocab[id] for id in (ids.tolist() if hasattr(ids, "tolist") else ids)])
        except KeyError as error:
            raise ValueError(f"token id {error} is not in the vocabulary of {len(self)} tokens") from None

    def decode(self, ids):
        """The text of a sequence of ids; bytes that are not UTF-8 (part of a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write tokenizer.json in the Hugging Face format: `tokenizers` and `transformers` read it, with equal ids.

        To a folder (any path that does not end in .json) goes a tokenizer_config.json too, with the chat template.
        """
        path, special = Path(path), {id: token for token, id in self.special_tokens.items()}
        content = json.dumps(to_hugging_face(self), ensure_ascii=False, indent=1)
        if path.suffix != ".json":
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            if (end := special.get(self.eot)) is not None:
                config |= {"bos_token": "<s>" if end == "</s>" else end, "eos_token": end}
            config |= {"chat_template": self.chat_template} if self.chat_template else {}
            with replacing(path / "tokenizer_config.json") as file:
                file.write(json.dumps(config, ensure_ascii=False, indent=2).encode())
            path /= "tokenizer.json"
        with replacing(path) as file:
            file.write(content.encode())

    @staticmethod
    def load(path, pattern=None):
        """A Tokenizer from a tokenizer.json (byte-level BPE; a CharacterTokenizer if it is in SentencePiece's form), a
        folder with one, or with GPT-2's vocab.json and merges.txt, or a .tiktoken file of ranks.

        pattern: one to use in place of the file's own, or of the one that OpenAI's vocabulary of that size goes with.
        ValueError that names the field when the file asks for something that this file does not do.
        """
        path = Path(path)
        if path.suffix == ".tiktoken":
            tokenizer = from_tiktoken(path, pattern)
        elif path.is_dir() and not (path / "tokenizer.json").exists():
            if not (path / "vocab.json").exists() or not (path / "merges.txt").exists():
                raise ValueError(f"{path}: neither tokenizer.json nor vocab.json and merges.txt in this folder")
            lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
            model = {"type": "BPE", "vocab": read_json(path / "vocab.json"),
                     "merges": [line for line in lines if line and not line.startswith("#version")]}
            tokenizer = from_hugging_face({"model": model, "pre_tokenizer": {"type": "ByteLevel"}}, path, pattern)
        else:
            path = path / "tokenizer.json" if path.is_dir() else path
            tokenizer = from_hugging_face(read_json(path), path, pattern)
        if path.suffix != ".tiktoken":
            read_chat_template(tokenizer, path if path.is_dir() else path.parent)
        return tokenizer


class BatchEncoder:
    """The ids of texts, many words at once: what `Tokenizer.encode` gives word by word."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chunks, self.ids_of_word, self.ids_of_chunk = Chunks(tokenizer.pattern), Sequences(), Sequences()
        self.byte_ids = np.array(tokenizer._byte_ids, np.int32)
        self.merged = np.array(tokenizer._merged, np.int32)
        pairs = np.array(list(tokenizer._ranks), np.int64).reshape(-1, 2)
        pairs, ranks = pairs[:, 0] << 32 | pairs[:, 1], np.array(list(tokenizer._ranks.values()), np.int64)
        order = np.argsort(pairs)
        self.pairs, self.ranks = np.append(pairs[order], NEVER), np.append(ranks[order], NEVER)
        self.first_of_bytes = self._wanted(self.byte_ids[:, None], self.byte_ids[None], 0)  # (256, 256), for place 0
        # Whether every merge comes after those that make what it joins, as it does when they were learned.
        made_by = np.full(len(tokenizer), -1)
        np.maximum.at(made_by, self.merged[ranks], ranks)
        self.in_order = (ranks > np.maximum(made_by[pairs >> 32], made_by[pairs & 0xFFFFFFFF])).all()

    def __call__(self, texts):
        """UTF-8 texts -> (the ids of all; where each text's begin, and at last their number)."""
        if self.chunks.full():
            self.chunks.clear()
            self.ids_of_word, self.ids_of_chunk = Sequences(), Sequences()
        ids, starts, total = [np.empty(0, np.int32)], [0], 0
        for group in groups(texts, self.chunks.pattern):
            numbers, chunk_starts = self.chunks(group)
            self._add_chunks()
            group_ids, lengths = self.ids_of_chunk.join(numbers)
            ends = np.append(0, np.cumsum(lengths))[chunk_starts[1:]]
            starts += [total + end for end, (_, text_ends) in zip(ends.tolist(), group) if text_ends]
            total += len(group_ids)
            ids.append(group_ids)
        return np.concatenate(ids), np.array(starts)

    def _add_chunks(self):
        """Store the ids of the words, and of the chunks, that were not met before."""
        if len(self.ids_of_chunk) == len(self.chunks):
            return
        new = len(self.chunks.words) - len(self.ids_of_word)
        words = [word.encode() for word in itertools.islice(reversed(self.chunks.words), new)]
        self.ids_of_word.extend(*self._encode_words(words[::-1]))
        words, num_words = self.chunks.words_of_chunk.join(np.arange(len(self.ids_of_chunk), len(self.chunks)))
        ids, lengths = self.ids_of_word.join(words)
        before, ends = np.append(0, np.cumsum(lengths)), np.cumsum(num_words)
        self.ids_of_chunk.extend(ids, before[ends] - before[ends - num_words])

    def _encode_words(self, words):
        """The ids of words, joined, and how many each has. Words of a length are merged together, as the longest
        decides how many rounds it takes. Very long words, few words, and words that are tokens where merges are ignored
        go one by one."""
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        if self.tokenizer.ignore_merges:
            lengths[[word in self.tokenizer._ids for word in words]] = 1 << 30
        ids, order = Sequences(), []
        for low, high in ((0, 12), (12, 24), (24, 1000)) if len(words) > 100 else ():
            some = np.flatnonzero((lengths > low) & (lengths <= high))
            ids.extend(*self._merge_words([words[i] for i in some]))
            order.append(some)
            lengths[some] = 0
        order.append(np.flatnonzero(lengths))
        alone = [self._encode_alone(words[i]) for i in order[-1]]
        ids.extend(list(itertools.chain.from_iterable(alone)), np.array(list(map(len, alone)), np.int64))
        return ids.join(np.argsort(np.concatenate(order)))

    def _encode_alone(self, word):
        if len(word) > 20_000 and self.in_order and not (self.tokenizer.ignore_merges and word in self.tokenizer._ids):
            return self._merge_long_word(word)
        return self.tokenizer._encode_word(word)

    def _merge_words(self, words):
        """One round merges, in every word, the pair that goes first, until there is none left.

        The words stand one after the other in an array, each followed by -1. `first` says for each place which merge
        the pair there asks for, and where it stands: rank << 32 | place, or NEVER.
        """
        if not words:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        ends = np.cumsum(lengths + 1) - 1
        in_use = np.ones(ends[-1] + 1, bool)
        in_use[ends] = False
        text = np.frombuffer(b"\0".join(words) + b"\0", np.uint8)
        ids = np.where(in_use, self.byte_ids[text], -1)
        right, left = np.arange(1, len(ids) + 1), np.arange(-1, len(ids) - 1)
        first, starts = np.full(len(ids), NEVER), ends - lengths
        pairs = np.flatnonzero(in_use[:-1] & in_use[1:])
        first[pairs] = self.first_of_bytes[text[pairs], text[pairs + 1]] | pairs
        while len(wanted := (best := np.minimum.reduceat(first, starts))[best < NEVER]):
            place, rank = wanted & 0xFFFFFFFF, wanted >> 32
            taken = right[place]
            after, before = right[taken], left[place]
            ids[place], right[place], left[after] = self.merged[rank], after, place
            in_use[taken], first[taken] = False, NEVER
            first[place] = self._wanted(ids[place], ids[after], place)
            first[before] = self._wanted(ids[before], ids[place], before)  # before the first place stands the last -1
        return ids[in_use], np.add.reduceat(in_use, starts, dtype=np.int64)

    def _merge_long_word(self, word):
        """The ids of one word of many thousand bytes, where each merge in turn is done at all its places at once.

        That is the order of one place at a time, as no merge makes a pair that should have come earlier (`in_order`).
        `waiting` has the places of each merge, some of which another merge has taken: those now want something else.
        """
        text = np.frombuffer(word, np.uint8)
        ids = np.append(self.byte_ids[text], -1)
        right, left = np.arange(1, len(ids) + 1), np.arange(-1, len(ids) - 1)
        first, waiting, ranks = np.full(len(ids), NEVER), {}, []  # ranks: a heap of those in `waiting`

        def wait(wanted):
            wanted = np.sort(wanted[wanted < NEVER])
            first[wanted & 0xFFFFFFFF] = wanted
            starts = np.flatnonzero(differs_from_left(wanted >> 32)).tolist()
            for start, end in zip(starts, starts[1:] + [len(wanted)]):
                rank = int(wanted[start]) >> 32
                if rank not in waiting:
                    heapq.heappush(ranks, rank)
                waiting.setdefault(rank, []).append(wanted[start:end])

        wait(self.first_of_bytes[text[:-1], text[1:]] | np.arange(len(text) - 1))
        while ranks:
            rank = heapq.heappop(ranks)
            wanted = np.sort(np.concatenate(waiting.pop(rank)))
            wanted = wanted[(first[wanted & 0xFFFFFFFF] == wanted) & differs_from_left(wanted)]
            at = every_other_of_runs(wanted & 0xFFFFFFFF, right)
            taken = right[at]
            after = right[taken]
            ids[at], right[at], left[after] = self.merged[rank], after, at
            ids[taken], first[taken], first[at], first[left[at]] = -1, NEVER, NEVER, NEVER
            before = left[at]
            wait(np.concatenate((self._wanted(ids[at], ids[after], at), self._wanted(ids[before], ids[at], before))))
        return ids[ids >= 0].tolist()

    def _wanted(self, left, right, place):
        """rank << 32 | place for the pairs that are merges, NEVER for the others."""
        pair = left.astype(np.int64) << 32 | right
        at = np.searchsorted(self.pairs, pair)
        return np.where(self.pairs[at] == pair, self.ranks[at] << 32 | place, NEVER)


NEVER = np.int64(1 << 62)


def utf8(text):
    """A str as UTF-8; ValueError for half of a surrogate pair, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds a lone surrogate at character {error.start:,}; UTF-8 has none") from None


def merge_by_rank(ids, ranks, merged):
    """The ids of one word, after all merges: those that training learned first go first, the leftmost first among equals.

    ranks: from a pair of ids to the rank of its merge. merged: from the rank to the id that it makes.
    Looking through the word for each merge would cost n * n for n ids; a heap of (rank, place), held in one integer, and
    a linked list of the places still in use make it n log n. At the end stands an id that merges with nothing, and so it
    does before the start, which is place -1.
    """
    ids = ids + [-1]
    left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    heap = [ranks[pair] << 32 | i for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = divmod(heapq.heappop(heap), 1 << 32)
        j = right[i]
        if ids[i] < 0 or ranks.get((ids[i], ids[j])) != rank:  # an earlier merge took one of the two
            continue
        ids[i], ids[j] = merged[rank], -1
        right[i] = right[j]
        left[right[j]] = i
        for i, j in ((left[i], i), (i, right[i])):
            if (rank := ranks.get((ids[i], ids[j]))) is not None:
                heapq.heappush(heap, rank << 32 | i)
    return [id for id in ids if id >= 0]


def merges_of_ranks(ids):
    """The merges of a vocabulary that came without: every way to join two of its tokens to a third, in the order of the
    third's id (tiktoken's form). `ids`: dict from bytes to id."""
    return [(token[:i], token[i:]) for token in sorted(ids, key=ids.get) for i in range(1, len(token))
            if token[:i] in ids and token[i:] in ids]


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` when all is written; on any failure `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece's form of BPE (Llama 2, Mistral): the merges start from characters, and only rare ones become bytes


class CharacterTokenizer(Tokenizer):
    """A tokenizer.json in SentencePiece's form, put to work. It does all that a Tokenizer does but train.

    Tokens are strings of characters in which "▁" stands for a space, and most texts get a "▁" in front, so that the first
    word is like the others. A character that the vocabulary lacks becomes its UTF-8 bytes, which have the tokens <0x00>
    to <0xFF>, or else the token for the unknown. No pattern cuts text into words: a merge may join anything. But where
    no token has "▁" behind another character, no merge reaches over such a place, and words are what stands between.

    content: what the file holds, which `save` writes again. normalizer: where "▁" is put in front, see `_mark`.
    Other attributes as of Tokenizer: `vocab` has bytes, with spaces; `merges` pairs of str; `eot` is the id of </s>.
    """

    def __init__(self, content, normalizer):
        model, added = content["model"], content.get("added_tokens") or []
        self.content, self.normalizer, self.ignore_merges, self.chat_template = content, normalizer, False, None
        self._ids, self.special_tokens = model["vocab"], {token["content"]: token["id"] for token in added}
        self.eot = self.special_tokens.get("</s>")
        self.vocab = {id: piece_bytes(name) for name, id in (self._ids | self.special_tokens).items()}
        self.merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        joined, unknown = list(map("".join, self.merges)), [model["unk_token"]] if model.get("unk_token") else []
        for needed in itertools.chain(unknown, *self.merges, joined):
            if needed not in self._ids:
                raise ValueError(f"the vocabulary lacks {needed!r}, the unknown token or what a merge joins or makes")
        self._ranks = {(self._ids[a], self._ids[b]): rank for rank, (a, b) in enumerate(self.merges)}
        self._merged = [self._ids[name] for name in joined]
        names_of_bytes = [f"<0x{byte:02X}>" if model.get("byte_fallback") else None for byte in range(256)]
        self._byte_ids = [self._ids.get(name) for name in names_of_bytes]
        self._unknown, self._fuse = [self._ids[name] for name in unknown], model.get("fuse_unk")
        drops = not unknown and None in self._byte_ids  # and what stands around a character that is dropped may join
        reaches = drops or any("▁" in name.lstrip("▁") for name in joined)
        self.pattern = r"(?s:.+)" if reaches else r"▁*[^▁]+|▁+"
        self._find_words, self._ids_of_word = regex.compile(self.pattern).findall, {}
        self._fast = True  # no BatchEncoder to make before workers start
        # Names that the file calls normalized are looked for later, and as its normalizer leaves them: often with a "▁".
        self._marks_first = normalizer in ("Prepend", "Replace")  # by a normalizer, that is; or else by a pre_tokenizer
        late = {token["content"] for token in added if token.get("normalized")}
        late_ids = {self._mark(name) if self._marks_first else name: self.special_tokens[name] for name in late}
        self.vocab |= {id: piece_bytes(name) for name, id in late_ids.items()}  # as tokenizers 0.23 spells them
        self._split_special = compile_special_tokens(self.special_tokens.keys() - late).split
        self._split_late, self._special_ids = compile_special_tokens(late_ids).split, self.special_tokens | late_ids

    def encode(self, text, special="allow"):
        """As Tokenizer.encode. What the file would add around a text, such as <s>, is left to the caller."""
        ids = []
        for i, part in enumerate(self._parts(text, special)):
            if i % 2:
                ids.append(self._special_ids[part])
            else:
                for word in self._find_words(part):
                    ids += self._ids_of_word.get(word) or self._encode_new_word(word)
        return ids

    def _split(self, text, special):
        """The parts of a text, marked, with special tokens, if wanted, at odd places."""
        parts = super()._split(text, special)
        if self._marks_first:
            parts = self._mark_parts(parts)
        if special:
            parts = [cut for i, part in enumerate(parts) for cut in ([part] if i % 2 else self._split_late(part))]
        return parts if self._marks_first else self._mark_parts(parts)

    def _mark_parts(self, parts):
        return [part if i % 2 else self._mark(part, i == 0) for i, part in enumerate(parts)]

    def _mark(self, text, first=True):
        """The text with "▁" for each space, and one more in front: of any ("Prepend"), of one that does not begin with
        "▁" ("always"), of such a one where the whole text begins ("first"), or of none ("never", "Replace")."""
        text = text.replace(" ", "▁")
        wanted = self.normalizer == "always" or self.normalizer == "first" and first
        if text and (self.normalizer == "Prepend" or wanted and text[0] != "▁"):
            text = "▁" + text
        return text

    def _encode_word(self, word):
        """The ids of one word, given in UTF-8: its characters, or their bytes, merged."""
        ids, unknown = [], []
        for character in word.decode():
            if character in self._ids:
                ids += [*unknown, self._ids[character]]
                unknown = []
            elif None not in (as_bytes := [self._byte_ids[byte] for byte in character.encode()]):
                ids += as_bytes  # `unknown` waits on: so it does in `tokenizers`, which we follow
            else:
                ids += [] if self._fuse else unknown
                unknown = self._unknown
        return merge_by_rank(ids + unknown, self._ranks, self._merged)

    def _encode_texts(self, texts):
        """As Tokenizer's, one text after the other."""
        ids = [np.array(self.encode(text.decode(), "text"), np.int32) for text in texts]
        return np.concatenate([np.empty(0, np.int32), *ids]), np.cumsum([0, *map(len, ids)])

    def encode_batch(self, texts):
        """The ids of many strings, a list of lists. Special tokens in them are read as text."""
        return [self.encode(text, "text") for text in texts]

    def decode(self, ids):
        """The text of a sequence of ids, without the space that `encode` put in front, where the file takes it away.

        `decode_bytes` keeps that space: it is for tokens as they come, whose text is not the first of all.
        """
        text, steps = super().decode(ids), self.content["decoder"]["decoders"]
        return text.removeprefix(" ") if steps[-1]["type"] == "Strip" else text


def piece_bytes(name):
    """What a token of that name stands for: <0x0A> for one byte, other names for their characters, "▁" for a space."""
    return bytes([int(name[3:5], 16)]) if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name) else name.replace("▁", " ").encode()


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face format. JSON holds text, not bytes, so each byte is written as a printable character (as in GPT-2).


def byte_characters():
    """The 256 characters for the 256 bytes: printable Latin-1 stands for itself, the others are U+0100, U+0101, ..."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in itself]
    return [chr(byte) if byte in itself else chr(256 + others.index(byte)) for byte in range(256)]


CHARACTER_OF_BYTE = byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


def spell(token):
    """A token's bytes, each as its printable character."""
    return "".join([CHARACTER_OF_BYTE[byte] for byte in token])


def unspell(name):
    """The bytes of a token that `spell` wrote."""
    return bytes([BYTE_OF_CHARACTER[character] for character in name])


def read_json(path):
    """The content of a JSON file; ValueError in one line when it is not one."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from None


def to_hugging_face(tokenizer):
    """The content of tokenizer.json for a Tokenizer. ValueError when two ids stand for one token: there, none can."""
    if isinstance(tokenizer, CharacterTokenizer):
        return tokenizer.content
    special_ids = set(tokenizer.special_tokens.values())
    names = {id: spell(token) for id, token in sorted(tokenizer.vocab.items()) if id not in special_ids}
    names |= {id: token for token, id in tokenizer.special_tokens.items()}
    vocab = {name: id for id, name in names.items()}
    if len(vocab) < len(names):
        twice = next(name for id, name in names.items() if vocab[name] != id)
        raise ValueError(f"two ids stand for the token {twice!r}, which tokenizer.json cannot express")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    own_pattern = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token} | flags for token, id in tokenizer.special_tokens.items()],
        "normalizer": {"type": tokenizer.normalizer} if tokenizer.normalizer else None,
        "pre_tokenizer": byte_level if tokenizer.pattern == GPT2_PATTERN else own_pattern,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": tokenizer.ignore_merges,
                  "vocab": vocab, "merges": [f"{spell(first)} {spell(second)}" for first, second in tokenizer.merges]},
    }


def from_hugging_face(data, path, pattern=None):
    """A Tokenizer from what a tokenizer.json holds. A field that changes the ids of a text is understood or refused.

    (The post_processor is neither: what it adds around a text, such as a beginning-of-text id, is the caller's affair.)
    """

    def need(condition, field, value, expected):
        if not condition:
            raise ValueError(f"{path}: {field} is {json.dumps(value)[:80]}; only {expected} is understood here")

    need(isinstance(data, dict), "the top level", type(data).__name__, "an object")
    model = data.get("model")
    need(isinstance(model, dict), "model", model, "an object")
    need(model.get("type") == "BPE", "model.type", model.get("type"), "BPE")
    need(isinstance(model.get("vocab"), dict), "model.vocab", model.get("vocab"), "an object")
    need(isinstance(model.get("merges"), list), "model.merges", model.get("merges"), "a list")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not model.get(field), f"model.{field}", model.get(field), "none")
    special_tokens = {}
    for token in data.get("added_tokens") or []:
        for field in ("single_word", "lstrip", "rstrip"):
            need(not token.get(field), f"added_tokens {token['content']!r} {field}", token.get(field), "false")
        special_tokens[token["content"]] = token["id"]
    if "▁" in model["vocab"]:  # which no byte is written as
        need(pattern is None, "pattern", pattern, "none, as nothing cuts a text in SentencePiece's form,")
        normalizer = space_marking(data, need)
        try:
            return CharacterTokenizer(data, normalizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    need(not model.get("byte_fallback"), "model.byte_fallback", model.get("byte_fallback"), "none")
    normalizer = (data.get("normalizer") or {"type": None})
    need(normalizer["type"] in (None, "NFC", "NFD", "NFKC", "NFKD"), "normalizer", normalizer, "a Unicode form")

    pre_tokenizer = data.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    kinds, first = [step.get("type") for step in steps], steps[0]
    need(kinds in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]), "pre_tokenizer", pre_tokenizer,
         "[Split or Digits, and] ByteLevel")
    need(not steps[-1].get("add_prefix_space"), "pre_tokenizer.add_prefix_space", True, "false")
    use_regex = steps[-1].get("use_regex", True)
    need(use_regex == (kinds[0] != "Split"), "pre_tokenizer.use_regex", use_regex, "false after Split, and else true")
    own = PATTERNS["gpt2"]
    if kinds[0] == "Split":
        own = (first.get("pattern") or {}).get("Regex")
        need(own and first.get("behavior") == "Isolated" and not first.get("invert"), "pre_tokenizer Split", first,
             "an isolating Regex")
    elif kinds[0] == "Digits":
        own = PATTERNS["digits"]
        need(first.get("individual_digits"), "pre_tokenizer Digits.individual_digits", False, "true")

    if ENDOFTEXT in model["vocab"]:
        special_tokens.setdefault(ENDOFTEXT, model["vocab"][ENDOFTEXT])
    try:
        vocab = {id: unspell(name) for name, id in model["vocab"].items() if name not in special_tokens}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(unspell(first), unspell(second)) for first, second in merges]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: model.vocab or model.merges is not byte-level BPE ({error})") from None
    vocab |= {id: token.encode() for token, id in special_tokens.items()}
    try:
        ignore_merges = bool(model.get("ignore_merges"))
        return Tokenizer(vocab, merges, special_tokens, pattern or own, ignore_merges, normalizer["type"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def space_marking(data, need):
    """Where a file in SentencePiece's form puts "▁" (see `CharacterTokenizer._mark`): the older ones say so by a
    normalizer, the newer ones by a pre_tokenizer. `need` refuses what else would change the ids, or their text."""
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = [replace | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    need(not data["model"].get("ignore_merges"), "model.ignore_merges", True, "false")
    decoder, pre_tokenizer = data.get("decoder") or {}, data.get("pre_tokenizer") or {}
    need(decoder.get("decoders") in (back, [*back, strip]), "decoder", decoder, "Replace, ByteFallback, Fuse[, Strip]")
    normalizer, scheme = data.get("normalizer") or {}, pre_tokenizer.get("prepend_scheme")
    if normalizer:
        need(not pre_tokenizer, "pre_tokenizer", pre_tokenizer, "null beside a normalizer")
        steps = normalizer.get("normalizers", [normalizer])
        need(steps in ([prepend, replace], [replace]), "normalizer", normalizer, '[Prepend "▁" and] Replace " " by "▁"')
        return steps[0]["type"]
    need(pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("replacement") == "▁"
         and pre_tokenizer.get("split") is False and scheme in ("always", "first", "never"), "pre_tokenizer", pre_tokenizer,
         'Metaspace of "▁", with a prepend_scheme and without split,')
    return scheme


def read_chat_template(tokenizer, folder):
    """Give a tokenizer what stands beside its file: chat_template, from chat_template.jinja or a field of
    tokenizer_config.json; and from the latter, as texts, bos_token and eos_token, which templates write."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    for name in ("bos_token", "eos_token"):  # a text, or an object that has it
        token = config.get(name)
        setattr(tokenizer, name, token.get("content") if isinstance(token, dict) else token)


# Of a .tiktoken file the number of ranks tells which of OpenAI's vocabularies it is: those have these special tokens.
TIKTOKEN = {
    50256: ("gpt2", {ENDOFTEXT: 50256}),
    50280: ("gpt2", {ENDOFTEXT: 50256}),  # p50k
    100256: ("cl100k", {ENDOFTEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
                        "<|endofprompt|>": 100276}),
    199998: ("o200k", {ENDOFTEXT: 199999, "<|endofprompt|>": 200018}),
}


def from_tiktoken(path, pattern=None):
    """A Tokenizer from a .tiktoken file: a token in base64 and its rank, which is its id, on each line; no merges."""
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line]
        vocab = {int(rank): base64.b64decode(token, validate=True) for token, rank in rows}
    except ValueError:
        raise ValueError(f"{path}: not a .tiktoken file: a token in base64 and its rank on each line") from None
    name, special_tokens = TIKTOKEN.get(len(vocab), (None, ()))
    if pattern is None and name is None:
        raise ValueError(f"{path}: {len(vocab):,} ranks, of no vocabulary known here, and the file does not say how "
                         f"text is cut into words; load it with pattern=bpe.PATTERNS[...], one of {', '.join(PATTERNS)}")
    try:
        return Tokenizer(vocab, None, special_tokens, pattern or PATTERNS[name], ignore_merges=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The command line

LOCAL = Path("corpus/local")  # where data.py puts the text that every Python installation carries


def command_train(args):
    """`bpe.py train`: learn a tokenizer from files and save it."""
    start = time.time()
    pattern = PATTERNS.get(args.pattern, args.pattern)
    vocab, merges = train_bpe(args.files, args.vocab_size, args.special_tokens, pattern, args.workers)
    seconds = time.time() - start
    Tokenizer(vocab, merges, args.special_tokens, pattern).save(args.out)
    megabytes = sum(os.stat(path).st_size for path in args.files) / 1e6
    print(f"{args.out}: {len(vocab):,} tokens from {megabytes:.1f} MB of files in {seconds:.1f} s "
          f"({megabytes / seconds:.1f} MB/s); the longest: {max(vocab.values(), key=len)!r}")


def command_encode(args):
    """`bpe.py encode`: the tokens of each file, and the tokenizer beside them."""
    tokenizer, out = load_tokenizer(args.tokenizer), Path(args.out)
    copy = out / "tokenizer.json"
    if copy.exists() and identity(Tokenizer.load(copy)) != identity(tokenizer):
        raise ValueError(f"{copy} is not the tokenizer of {args.tokenizer}: tokens of both in one folder could not be "
                         "told apart; take another --out")
    stems = [re.sub(r"(\.jsonl|\.txt)?(\.gz)?$", "", Path(path).name) for path in args.files]
    if len(set(stems)) < len(stems):
        raise ValueError(f"two of the files would be written to {out / max(stems, key=stems.count)}.npy; rename one")
    for path, stem in zip(args.files, stems):
        target, start = out / f"{stem}.npy", time.time()
        count = tokenizer.encode_file(path, target, args.workers)
        seconds = time.time() - start
        if not copy.exists():
            original = Path(args.tokenizer)
            original = original / "tokenizer.json" if original.is_dir() else original
            if original.exists():
                with replacing(copy) as file:  # the file itself: it may hold more than a Tokenizer does
                    file.write(original.read_bytes())
            else:
                tokenizer.save(copy)
        size = text_bytes(tokenizer, np.load(target, mmap_mode="r"))
        print(f"{target}: {count:,} tokens, {size / count:.3f} bytes per token, {tokenizer._dtype()}, "
              f"{size / 1e6 / seconds:.1f} MB/s")


def command_decode(args):
    """`bpe.py decode`: the text of tokens."""
    npy = args.ids[0].endswith(".npy")
    if npy and len(args.ids) > 1:
        raise ValueError("decode takes one .npy file, or token ids")
    beside = Path(args.ids[0]).parent / "tokenizer.json" if npy else LOCAL / "tokenizer.json"
    tokenizer = load_tokenizer(args.tokenizer or beside)
    if npy:
        ids = np.load(args.ids[0], mmap_mode="r")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{args.ids[0]}: {ids.dtype} of shape {ids.shape}, not one dimension of token ids")
    else:
        try:
            ids = np.array([int(id) for id in args.ids])
        except ValueError:
            raise ValueError(f"{' '.join(args.ids)[:80]}: neither a .npy file nor token ids") from None
    ids = ids[: args.limit]
    for start in range(0, len(ids), BLOCK):
        sys.stdout.buffer.write(tokenizer.decode_bytes(ids[start : start + BLOCK]))
    if sys.stdout.isatty():
        print()


def command_show(args):
    """`bpe.py show`: a text with its tokens in colour, and their number."""
    tokenizer = load_tokenizer(args.tokenizer)
    text, note = args.text, ""
    if os.path.isfile(text):
        cut = functools.partial(last_cut, pattern=GPT2_PATTERN)
        with contextlib.closing(read_blocks([text], cut, GROUP)) as blocks:
            whole = documents(next(blocks))[0][0].decode()
        text = whole[:4000]
        note = f"  (the first {len(text):,} characters of {args.text})" if len(text) < len(whole) else ""
    ids = tokenizer.encode(text, special="text")
    size = len(text.encode())
    sys.stdout.reconfigure(errors="backslashreplace")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(coloured(tokenizer, ids) if colour else "│".join(visible(tokenizer.vocab[id]) for id in ids))
    print(f"\n{len(text):,} characters, {size:,} bytes, {len(ids):,} tokens, "
          f"{size / max(len(ids), 1):.2f} bytes per token{note}")


def coloured(tokenizer, ids):
    """The text of the ids, neighbours on backgrounds of different colours (ANSI, black on five pastels)."""
    lines = (visible(tokenizer.vocab[id]).replace("\n", "↵\033[0m\n") for id in ids)
    return "".join(f"\033[30;48;5;{(153, 157, 223, 218, 189)[i % 5]}m{line}\033[0m" for i, line in enumerate(lines))


def visible(token):
    """The text of one token; bytes that are part of a character, and characters that move the cursor, as escapes."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def demonstrate(vocab_size=4096):
    """Train on the local corpus and print what a lecture on tokenizers would show."""
    train, held_out = local_corpus()
    vocab, merges = train_bpe(train, vocab_size)
    train_texts, texts = texts_of(train), texts_of(held_out)
    train_size, size = (sum(len(text.encode()) for text in part) for part in (train_texts, texts))
    text, characters = "".join(texts), set().union(*train_texts)
    words = set().union(*map(compile_pattern(GPT2_PATTERN).findall, train_texts))

    print(f"\nTrained on {train_size / 1e6:.1f} MB of {train}, measured on {size / 1e6:.1f} MB of {held_out}\n")
    print(f"{'tokens are':<14}{'vocabulary':>11}{'bytes per token':>17}{'never seen in training':>24}")

    def row(name, vocabulary, tokens, unseen=0):
        print(f"{name:<14}{vocabulary:>11,}{size / tokens:>17.2f}{unseen / tokens:>24.3%}")

    row("bytes", 256, size)
    row("characters", len(characters), len(text), sum(character not in characters for character in text))
    for entries in sorted({512, 1024, 2048, len(vocab)}):
        tokenizer = Tokenizer(dict(list(vocab.items())[: entries - 1]), merges[: entries - 257], [ENDOFTEXT])
        row("BPE", len(tokenizer), sum(len(tokenizer.encode(text, "text")) for text in texts))
    found = compile_pattern(GPT2_PATTERN).findall(text)
    row("words", len(words), len(found), sum(word not in words for word in found))

    names = [token.decode(errors="replace") for token in vocab.values()]
    longest = sorted((name for name in names if any(map(str.isalpha, name))), key=len, reverse=True)
    print("\nThe longest tokens with a letter in them:", "  ".join(map(repr, longest[:12])))

    tokenizer = Tokenizer(vocab, merges, [ENDOFTEXT])
    compare_speed([train], vocab_size, tokenizer)
    target = LOCAL / "tokenizer.json"
    if target.exists():
        print(f"\n{target} was there already and stays as it is")
    else:
        tokenizer.save(target)
        print(f"\nWrote {target}. Now try: python bpe.py show \"any text\"")


# The peers: other tokenizers, where they are installed. A trainer takes files and a vocabulary size; an encoder is made
# from a Tokenizer and gives the ids of a text.


def train_tokenizers(paths, vocab_size):
    """Hugging Face's trainer."""
    import tokenizers

    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[ENDOFTEXT], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    peer.train_from_iterator(iter(texts_of(*paths)), trainer)


def train_rustbpe(paths, vocab_size):
    """nanochat's trainer."""
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(iter(texts_of(*paths)), vocab_size, pattern=GPT2_PATTERN)


def tiktoken_encoder(tokenizer):
    """OpenAI's encoder."""
    import tiktoken

    ranks = tokenizer._ids
    peer = tiktoken.Encoding("peer", pat_str=tokenizer.pattern, mergeable_ranks=ranks,
                             special_tokens=tokenizer.special_tokens)
    return peer.encode_ordinary


def tokenizers_encoder(tokenizer):
    """Hugging Face's encoder."""
    import tokenizers

    peer = tokenizers.Tokenizer.from_str(json.dumps(to_hugging_face(tokenizer)))
    peer.encode_special_tokens = True  # means: as text
    return lambda text: peer.encode(text).ids


def gigatoken_encoder(tokenizer):
    """The fastest encoder there is: SIMD by hand, in Rust."""
    import gigatoken

    return gigatoken.Tokenizer.from_json(json.dumps(to_hugging_face(tokenizer))).encode


TRAINERS = {"tokenizers": train_tokenizers, "rustbpe": train_rustbpe}
ENCODERS = {"tiktoken": tiktoken_encoder, "tokenizers": tokenizers_encoder, "gigatoken": gigatoken_encoder}


def installed(names):
    """Those of the names that can be imported."""
    return [name for name in names if importlib.util.find_spec(name)]


def timed(function, *arguments):
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - start


def command_bench(args):
    """`bpe.py bench`: speed beside the peers that are installed."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if isinstance(tokenizer, CharacterTokenizer):
        raise ValueError(f"{args.tokenizer} is in SentencePiece's form; bench compares byte-level tokenizers")
    compare_speed(args.files or [local_corpus()[0]], args.vocab_size, tokenizer, args.repeats, args.only)


def compare_speed(files, vocab_size, tokenizer=None, repeats=1, only=None):
    """Print tables of training, encoding and encode_file: medians of some rounds in which all contenders take turns.

    tokenizer: the one to encode with; None: the one trained. only: one of the three; None: all.
    """
    texts = texts_of(*files)
    text, size = "".join(texts), sum(len(text.encode()) for text in texts) / 1e6
    print(f"\nSpeed on {size:.1f} MB in {len(texts):,} documents, median of {repeats} round(s)")

    def table(title, contenders):
        """contenders: functions that give their seconds, and something to say of them."""
        rounds = [{name: measure() for name, measure in contenders.items()} for _ in range(repeats)]
        print(f"\n{title:<32}{'seconds':>9}{'MB/s':>8}{'speed against the first':>25}")
        for name, (_, note) in rounds[-1].items():
            seconds = statistics.median(taken[name][0] for taken in rounds)
            ratio = statistics.median(taken[next(iter(taken))][0] / taken[name][0] for taken in rounds)
            print(f"{name:<32}{seconds:>9.2f}{size / seconds:>8.1f}{ratio:>25.2f}   {note}", flush=True)

    if only in (None, "training"):
        trainers = {"bpe.py": train_bpe} | {name: TRAINERS[name] for name in installed(TRAINERS)}
        table(f"training, {vocab_size:,} tokens",
              {name: functools.partial(in_child, train, files, vocab_size) for name, train in trainers.items()})
    if only == "training":
        return
    if tokenizer is None:
        vocab, merges = train_bpe(files, vocab_size)
        tokenizer = Tokenizer(vocab, merges, [ENDOFTEXT])
    unused = copy.deepcopy(tokenizer)
    encoders = {name: ENCODERS[name](tokenizer) for name in installed(ENCODERS)}
    for title, parts in (("encoding, as one text", [text]), ("encoding, a document at a time", texts)):
        if only == "encode_file":
            break
        expected = [tokenizer.encode(part, "text") for part in parts]

        def encoding(encode_all):
            def measure():
                ids, seconds = timed(encode_all())
                return seconds, "equal ids" if list(map(list, ids)) == expected else "OTHER IDS"
            return measure

        def one_by_one(encode, *arguments):
            return lambda: [encode(part, *arguments) for part in parts]

        contenders = {"bpe.py": encoding(lambda: one_by_one(copy.deepcopy(unused).encode, "text")),
                      "bpe.py, that knows the words": encoding(lambda: one_by_one(tokenizer.encode, "text"))}
        if len(parts) > 1:
            contenders["bpe.py, encode_batch"] = encoding(
                lambda: functools.partial(copy.deepcopy(unused).encode_batch, parts))
        table(title, contenders | {
            name: encoding(functools.partial(one_by_one, encode)) for name, encode in encoders.items()})
    if only in (None, "encode_file"):
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/tokens.npy"
            table("encode_file", {
                f"{workers} worker(s)": functools.partial(in_child, unused.encode_file, files, out, workers)
                for workers in sorted({1, 2, os.cpu_count()})})


def in_child(function, *arguments):
    """The seconds that a call takes in a process of its own, and the memory that it and its workers take at most."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, multiprocessing.get_start_method(), function, *arguments).result()


def measured(start_method, function, *arguments):
    """What `in_child` tells, from inside: a thread looks at the memory twenty times a second."""
    multiprocessing.set_start_method(start_method, force=True)  # of its own workers; else that of `in_child`
    done, peak = threading.Event(), 0

    def watch():
        nonlocal peak
        while not done.wait(0.05):
            with contextlib.suppress(OSError):  # a worker has just ended; or not on Linux
                peak = max(peak, memory_of())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        _, seconds = timed(function, *arguments)
    finally:
        done.set()
        thread.join()
    return seconds, f"{peak / 1e6:,.0f} MB" if peak else ""


def memory_of(process="self"):
    """The bytes of memory of a process and its children, pages that they share counted once (Linux)."""
    folder = Path("/proc", process)
    own = int(re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.M)[1]) * 1024
    children = itertools.chain.from_iterable(path.read_text().split() for path in folder.glob("task/*/children"))
    return own + sum(map(memory_of, children))


def local_corpus():
    """The training and validation files of the local corpus, which data.py builds if need be."""
    train, held_out = LOCAL / "train.jsonl", LOCAL / "val.jsonl"
    if not (train.exists() and held_out.exists()):
        script = Path(__file__).with_name("data.py")
        if not script.exists():
            raise ValueError(f"no {train}, and no data.py beside bpe.py to build it; on text of your own: "
                             "python bpe.py train FILES")
        print(f"$ python data.py --out {LOCAL}", flush=True)
        if subprocess.run([sys.executable, script, "--out", LOCAL]).returncode:
            raise ValueError(f"data.py could not build {LOCAL}")
    return train, held_out


def load_tokenizer(path):
    """A tokenizer from a path; ValueError that says how to make one when there is none."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no tokenizer there; `python bpe.py train FILES --out {path}` makes one")
    return Tokenizer.load(path)


def identity(tokenizer):
    """All that decides which ids a text gets."""
    if isinstance(tokenizer, CharacterTokenizer):
        return tokenizer.content
    return (tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern, tokenizer.ignore_merges,
            tokenizer.normalizer)


def text_bytes(tokenizer, ids):
    """How many bytes of text an array of ids stands for, special tokens not counted."""
    lengths = np.zeros(len(tokenizer), np.int64)
    special_ids = set(tokenizer.special_tokens.values())
    for id, token in tokenizer.vocab.items():
        lengths[id] = 0 if id in special_ids else len(token)
    return sum(int(lengths[ids[start : start + BLOCK]].sum()) for start in range(0, len(ids), BLOCK))


class Parser(argparse.ArgumentParser):
    """argparse, except that --a-b equals --a_b and a wrong flag is answered with the nearest right one."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else "-h lists them all"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return namespace, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_args(argv):
    """The command line of every subcommand."""
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="bpe.py", description="Byte-level BPE. Without a command: train on the local corpus, and show "
                                               "what came of it.", **style)
    commands = parser.add_subparsers(dest="command", metavar="{train,encode,decode,show,bench}")
    tokenizer_help = "tokenizer.json, a folder with one or with GPT-2's vocab.json and merges.txt, or a .tiktoken file"
    files_help = ".jsonl or text, .gz of either"

    def add(name, description):
        return commands.add_parser(name, help=description, description=description, **style)

    def add_workers(command):
        command.add_argument("--workers", type=positive, help="processes; None: all cores for large files")

    train = add("train", "Learn a tokenizer from files.")
    train.add_argument("files", nargs="+", help=files_help)
    train.add_argument("--vocab_size", type=positive, default=4096, help="tokens in all: 256 bytes, merges, special tokens")
    train.add_argument("--out", default="tokenizer.json", help="the file to write, or a folder")
    train.add_argument("--special_tokens", nargs="*", default=[ENDOFTEXT], help="never split; take the last ids")
    train.add_argument("--pattern", default="gpt2", help=f"cuts text into words: {', '.join(PATTERNS)}, or a regex")
    add_workers(train)
    encode = add("encode", "Write the tokens of each file as FOLDER/<name>.npy, and the tokenizer.json beside them.")
    encode.add_argument("files", nargs="+", help=files_help)
    encode.add_argument("--tokenizer", default=str(LOCAL / "tokenizer.json"), help=tokenizer_help)
    encode.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write into")
    add_workers(encode)
    decode = add("decode", "Print the text of tokens.")
    decode.add_argument("ids", nargs="+", help="a .npy file, or token ids")
    decode.add_argument("--tokenizer", help=f"{tokenizer_help}; None: the one beside the .npy, or {LOCAL}'s")
    decode.add_argument("--limit", type=positive, metavar="N", help="the first N tokens only; None: all")
    show = add("show", "Print a text with its tokens in colour, and their number.")
    show.add_argument("text", help="a text, or a file (its first document, 4,000 characters of it)")
    show.add_argument("--tokenizer", default=str(LOCAL / "tokenizer.json"), help=tokenizer_help)
    bench = add("bench", "Speed of training and encoding, beside the peers that are installed.")
    bench.add_argument("files", nargs="*", help=f"{files_help}; none: the local corpus")
    bench.add_argument("--vocab_size", type=positive, default=4096, help="tokens to train")
    bench.add_argument("--tokenizer", help=f"{tokenizer_help}, to encode with; None: the one trained")
    bench.add_argument("--only", choices=("training", "encoding", "encode_file"), help="one of the tables; None: all")
    bench.add_argument("--repeats", type=positive, default=5, help="rounds, of which the medians are printed")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line; returns the exit code."""
    args = parse_args(argv)
    commands = {"train": command_train, "encode": command_encode, "decode": command_decode, "show": command_show,
                "bench": command_bench}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that temporary files are removed
    try:
        commands[args.command](args) if args.command else demonstrate()
    except KeyboardInterrupt:
        print("bpe.py: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush fails, too
        return 141
    except (ValueError, OSError) as error:
        told = getattr(error, "strerror", None) or str(error)
        print(f"bpe.py: {told}" + (f": {error.filename}" if getattr(error, "filename", None) else ""), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
