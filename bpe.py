"""Byte-level BPE: turn text into token ids and back, with a vocabulary learned from the text itself.

The idea. Text is bytes, and 256 byte tokens can spell anything, but at one token a byte. Byte-pair encoding finds the
two neighbouring tokens that occur together most often, makes them one new token, and repeats: `t h` becomes `th`,
`th e` becomes `the`. The list of those merges is the whole tokenizer. To encode is to apply the merges in the order in
which they were learned; to decode is to join bytes, so every string survives the round trip.

A pattern first cuts text into words (with the space before them), and no merge crosses a cut. So a corpus of gigabytes
need only be counted: training works on its distinct words, and encoding remembers the ids of the words it has met.

In:  documents: .jsonl (one {"text": ...} a line) or text where <|endoftext|> ends a document; .gz of either.
Out: tokenizer.json in the Hugging Face format; tokens as .npy (uint16 or uint32), <|endoftext|> after each document.

    python bpe.py train corpus.jsonl --vocab_size 4096 --out tokens/tokenizer.json
    python bpe.py encode corpus.jsonl --tokenizer tokens/tokenizer.json --out tokens

Left out: Unicode normalizers, Unigram and WordPiece models, `.tiktoken` rank files. Method: Gage 1994 (the compressor);
Sennrich, Haddow and Birch 2016, arXiv:1508.07909 (words); Radford et al. 2019, "GPT-2" (bytes, and the pattern).
"""

import argparse
import concurrent.futures
import contextlib
import difflib
import functools
import gzip
import heapq
import io
import itertools
import json
import multiprocessing
import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

# GPT-2's published pattern: contractions; letters, digits or symbols with at most one space before them; white space,
# which leaves its last character to the word that follows. It covers every character of any text.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
ENDOFTEXT = "<|endoftext|>"
BLOCK = 1 << 20  # characters read, and handed to a worker, at a time


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


# ---------------------------------------------------------------------------------------------------------------------
# Learning merges from the distinct words of a corpus


def learn_merges(words, num_merges):
    """The first `num_merges` merges (fewer when the words run out of pairs) for `words`, a dict from str to frequency.

    Three things make it fast. A merge visits only the words that hold its pair. In such a word only the neighbours of
    the merged places change their counts. And a word is kept as a str whose characters are token ids, so that finding a
    pair is one `str.split` and merging it one `str.join`, both leftmost first as `merge` is.
    Equally frequent pairs: the lexicographically greater pair of byte strings goes first.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    frequencies = list(words.values())
    words = [word.encode().decode("latin-1") for word in words]  # character b is byte b
    counts, where = defaultdict(int), defaultdict(list)  # by pair, a str of two characters
    for index, (word, frequency) in enumerate(zip(words, frequencies)):
        for pair in map(operator.add, word, word[1:]):
            counts[pair] += frequency
            where[pair].append(index)

    def entry(pair):
        return -counts[pair], descending(tokens[ord(pair[0])]) + descending(tokens[ord(pair[1])]), pair

    # Counts of old pairs only ever fall (a new pair holds the new token), so a heap entry is never too low: one found
    # too high when it reaches the top goes back with its present count, and the first true one is the maximum.
    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges = []
    with tqdm(total=num_merges, desc="merging", unit=" merges", disable=None) as bar:
        while heap and len(merges) < num_merges:
            count, _, pair = heapq.heappop(heap)
            if -count != counts[pair]:
                if counts[pair]:
                    heapq.heappush(heap, entry(pair))
                continue
            first, second = pair
            new = chr(len(tokens))
            tokens.append(tokens[ord(first)] + tokens[ord(second)])
            merges.append((tokens[ord(first)], tokens[ord(second)]))
            new_pairs = set()
            for index in set(where.pop(pair)):  # a set: a word that held the pair twice is listed twice
                pieces = words[index].split(pair)
                if len(pieces) == 1:  # an earlier merge took what this word had of the pair
                    continue
                words[index] = new.join(pieces)
                changes = []  # (the pair that was here, the pair that is here now)
                for left, right in zip(pieces, pieces[1:]):
                    if left:
                        changes.append((left[-1] + first, left[-1] + new))
                    if right:
                        changes.append((second + right[0], new + right[0]))
                changes += [(second + first, new + new)] * pieces[1:-1].count("")  # two merged places side by side
                frequency = frequencies[index]
                for before, after in changes:
                    counts[before] -= frequency
                    counts[after] += frequency
                    where[after].append(index)
                    new_pairs.add(after)
            del counts[pair]
            for pair in new_pairs:
                heapq.heappush(heap, entry(pair))
            bar.update()
    return merges


def descending(token):
    """A str that sorts before that of another token exactly when the token's bytes sort after: `heapq` finds minima."""
    return token.translate(COMPLEMENT).decode("latin-1") + "\u0100"  # above every byte, so a prefix comes after


COMPLEMENT = bytes(range(255, -1, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Text from files, cut into words


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


def can_cut(pattern, special_tokens=()):
    """Whether text may be cut before any space that follows a non-space, and its parts be tokenized apart.

    True of GPT-2's pattern: a word has white space at its start only, or is all white space, so one always ends there;
    what is left of the cut does not look ahead beyond it, since only words of white space do. Other patterns get
    their documents whole. A special token with a space inside might be cut in two.
    """
    return pattern == GPT2_PATTERN and not any(" " in token[1:] for token in special_tokens)


def last_cut(text):
    """The last place in `text` that `can_cut` speaks of; 0 when there is none."""
    cut = text.rfind(" ", 1)
    while cut > 0 and text[cut - 1].isspace():
        cut = text.rfind(" ", 1, cut)
    return max(cut, 0)


def read_documents(path, cut=False):
    """Yield (text, ends, position) from a .jsonl or text file, possibly .gz; position counts the bytes read on disk.

    With `cut` a document of a text file comes in parts, cut where `can_cut` allows, of which the last has `ends` true:
    memory does not grow with the file. ValueError or OSError, naming the file, when it is missing, empty or not text.
    """
    name = str(path).lower()
    with open(path, "rb") as raw, gzip.open(raw) if name.endswith(".gz") else contextlib.nullcontext(raw) as file:
        texts = read_jsonl(file, path) if name.removesuffix(".gz").endswith(".jsonl") else read_text(file, path, cut)
        empty = True
        try:
            for text, ends in texts:
                yield text, ends, raw.tell()
                empty = False
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text (binary, or in another encoding)") from None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ValueError(f"{path}: not a whole gzip file") from None
        if empty:
            raise ValueError(f"{path}: empty, no documents in it")


def read_jsonl(file, path):
    """Yield (text, True) for each row of a binary .jsonl file."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            text.encode()  # JSON can spell half of a surrogate pair, which UTF-8 cannot
        except UnicodeEncodeError:
            raise ValueError(f'{path}, line {number}: "text" holds a lone surrogate') from None
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f'{path}, line {number}: not a JSON object with a string "text"') from None
        yield text, True


def read_text(file, path, cut):
    """Yield (text, ends) from a binary file of text in which <|endoftext|> ends a document."""
    file, held = io.TextIOWrapper(file, encoding="utf-8", newline=""), ""
    while block := file.read(BLOCK):
        if "\0" in block:
            raise ValueError(f"{path}: binary, it holds a NUL byte")
        *documents, held = (held + block).split(ENDOFTEXT)
        for text in documents:
            yield text, True
        if cut and (place := last_cut(held)):
            yield held[:place], False
            held = held[place:]  # at least the space, so that the document's last part is still to come
    if held:
        yield held, True


def read_batches(paths, cut):
    """Yield (parts, progress): about BLOCK characters of (text, ends), and how many bytes of the files they took."""
    parts, size, progress = [], 0, 0
    for path in paths:
        before = 0
        for text, ends, position in read_documents(path, cut):
            parts.append((text, ends))
            size, progress, before = size + len(text) + 1, progress + position - before, position
            if size >= BLOCK:
                yield parts, progress
                parts, size, progress = [], 0, 0
    if parts:
        yield parts, progress


def as_list(paths):
    """One path or several, as a list."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


# ---------------------------------------------------------------------------------------------------------------------
# All cores: the files are read here, and the workers do what takes time


def parallel_map(function, items, num_workers=None):
    """Yield (item, function(item)) in the order of `items`, which are fetched only a few ahead of what is asked for.

    `function` goes to each worker process once, and may keep a cache there. One worker, or one item, runs right here.
    """
    num_workers = num_workers or os.cpu_count()
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
    compile_pattern(pattern), compile_special_tokens(special_tokens)  # a bad one is told here, not by a worker
    words = Counter()
    count = functools.partial(count_words, pattern=pattern, special_tokens=special_tokens)
    with progress_bar(paths, "counting words") as bar:
        batches = read_batches(paths, can_cut(pattern, special_tokens))
        for (_, progress), counts in parallel_map(count, batches, num_workers):
            words.update(counts)
            bar.update(progress)
    merges = learn_merges(words, num_merges)
    tokens = [bytes([byte]) for byte in range(256)] + [first + second for first, second in merges]
    vocab = dict(enumerate(tokens + [token.encode() for token in special_tokens]))
    if len(vocab) < vocab_size:
        print(f"the text has pairs for {len(vocab)} tokens only, not for {vocab_size}", file=sys.stderr)
    return vocab, merges


def count_words(batch, pattern, special_tokens):
    """How often each word occurs in a batch of `read_batches`."""
    find_words, split_special = compile_pattern(pattern).findall, compile_special_tokens(special_tokens).split
    counts = Counter()
    for text, _ in batch[0]:
        for part in split_special(text)[::2]:
            counts.update(find_words(part))
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


class Memo(dict):
    """The values of a function of a str: a missing one is worked out. Emptied when full, so that memory is bounded."""

    def __init__(self, function, limit):
        self.function, self.limit = function, limit

    def __missing__(self, key):
        value = self.function(key)
        if len(key) <= 64:  # longer words hardly come twice
            if len(self) >= self.limit:
                self.clear()
            self[key] = value
        return value


class Tokenizer:
    """A vocabulary (dict from id to bytes) and a list of merges (pairs of bytes, the first learned first), put to work.

    special_tokens: names (one that the vocabulary lacks gets the next free id), or a dict from name to id.
    Attributes: `vocab` (with the special tokens), `merges`, `special_tokens` (dict from name to id), `pattern`, `eot`
    (the id of <|endoftext|>, or None). `len` is the highest id + 1, the number of rows that a model's embedding needs.
    """

    def __init__(self, vocab, merges, special_tokens=(), pattern=GPT2_PATTERN):
        self.vocab, self.merges, self.pattern = dict(vocab), [tuple(pair) for pair in merges], pattern
        if not isinstance(special_tokens, dict):
            ids = {token: id for id, token in self.vocab.items()}
            special_tokens = {token: ids.setdefault(token.encode(), max(ids.values(), default=-1) + 1)
                              for token in special_tokens}
        self.special_tokens = dict(special_tokens)
        self.vocab |= {id: token.encode() for token, id in special_tokens.items()}
        self.eot = self.special_tokens.get(ENDOFTEXT)
        special_ids = set(special_tokens.values())
        ids = {token: id for id, token in self.vocab.items() if id not in special_ids}
        for needed in itertools.chain(map(bytes, zip(range(256))), *self.merges, map(b"".join, self.merges)):
            if needed not in ids:
                raise ValueError(f"the vocabulary lacks {needed!r}, a byte or what a merge joins or makes")
        self._byte_ids = [ids[bytes([byte])] for byte in range(256)]
        self._ranks = {(ids[a], ids[b]): rank for rank, (a, b) in enumerate(self.merges)}  # rank: place in the list
        self._merged = [ids[a + b] for a, b in self.merges]
        self._find_words = compile_pattern(pattern).findall
        self._split_special = compile_special_tokens(self.special_tokens).split
        self._ids_of_word = Memo(self._encode_word, limit=1 << 18)

    def __len__(self):
        return max(self.vocab) + 1

    def encode(self, text, special="allow"):
        """The token ids of a str, a list. A special token in it becomes its id ("allow"), is read as the characters it
        is written with ("text", right for all text that others wrote), or raises ValueError ("error")."""
        if special not in ("allow", "text", "error"):
            raise ValueError(f'special={special!r}: expected "allow", "text" or "error"')
        parts = [text] if special == "text" else self._split_special(text)
        if special == "error" and len(parts) > 1:
            raise ValueError(f'the text holds the special token {parts[1]!r}; special="text" reads it as plain text')
        ids = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                ids.extend(itertools.chain.from_iterable(map(self._ids_of_word.__getitem__, self._find_words(part))))
        return ids

    def _encode_word(self, word):
        """The ids of one word: its bytes, of which the neighbours that training merged earliest are merged first.

        Looking through the word for each merge would cost n * n for n bytes; a heap of (rank, place), held in one
        integer, and a linked list of the places still in use make it n log n. At the end stands an id that merges with
        nothing, and so it does before the start, which is place -1.
        """
        try:
            ids = [self._byte_ids[byte] for byte in word.encode()] + [-1]
        except UnicodeEncodeError:
            raise ValueError(f"the text holds a lone surrogate, in {word[:40]!r}: it has no UTF-8 bytes") from None
        ranks, left, right = self._ranks, list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        heap = [ranks[pair] << 32 | i for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = divmod(heapq.heappop(heap), 1 << 32)
            j = right[i]
            if ids[i] < 0 or ranks.get((ids[i], ids[j])) != rank:  # an earlier merge took one of the two
                continue
            ids[i], ids[j] = self._merged[rank], -1
            right[i] = right[j]
            left[right[j]] = i
            for i, j in ((left[i], i), (i, right[i])):
                if (rank := ranks.get((ids[i], ids[j]))) is not None:
                    heapq.heappush(heap, rank << 32 | i)
        return [id for id in ids if id >= 0]

    def encode_iterable(self, chunks, special="allow"):
        """Yield the ids of the strings in `chunks` (lines of an open file, say) joined, without joining them.

        What a later chunk could change is held back. Where `can_cut` says no, that is everything.
        """
        cut = can_cut(self.pattern, () if special == "text" else self.special_tokens)
        held, size, enough = [], 0, BLOCK // 16
        for chunk in chunks:
            held.append(chunk)
            size += len(chunk)
            if cut and size >= enough:
                text = "".join(held)
                place = last_cut(text)
                yield from self.encode(text[:place], special)
                held, size = [text[place:]], len(text) - place
                enough = max(BLOCK // 16, 2 * size)  # twice as much as did not help, or long words cost n * n
        yield from self.encode("".join(held), special)

    def encode_file(self, paths, out, num_workers=None):
        """Encode the documents of one file or a list of files into `out`, a .npy of one dimension -> number of tokens.

        uint16, or uint32 when the vocabulary needs it; <|endoftext|> after every document. Special tokens inside a
        document are read as text. Memory does not grow with the files; `out` appears whole or not at all.
        """
        paths = as_list(paths)
        if self.eot is None:
            raise ValueError(f"the tokenizer has no {ENDOFTEXT} to put between documents")
        total = 0
        with replacing(out) as file, progress_bar(paths, "encoding") as bar:
            header = {"descr": self._dtype().str, "fortran_order": False, "shape": (0,)}
            np.lib.format.write_array_header_1_0(file, header)  # padded: room for the length, known at the end
            start = file.tell()
            batches = read_batches(paths, can_cut(self.pattern))
            for (_, progress), ids in parallel_map(self._encode_batch, batches, num_workers):
                file.write(ids.tobytes())
                total += len(ids)
                bar.update(progress)
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": (total,)})
            assert file.tell() == start
        return total

    def _encode_batch(self, batch):
        ids = []
        for text, ends in batch[0]:
            ids += self.encode(text, special="text")
            if ends:
                ids.append(self.eot)
        return np.array(ids, self._dtype())

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
        """Write tokenizer.json in the Hugging Face format: `tokenizers` and `transformers` read it, with equal ids."""
        with replacing(path) as file:
            file.write(json.dumps(to_hugging_face(self), ensure_ascii=False, indent=1).encode())

    @staticmethod
    def load(path):
        """A Tokenizer from a tokenizer.json (byte-level BPE), a folder with one, or GPT-2's vocab.json and merges.txt.

        ValueError that names the field when the file asks for something that this file does not do.
        """
        path = Path(path)
        if path.is_dir() and not (path / "tokenizer.json").exists():
            if not (path / "vocab.json").exists() or not (path / "merges.txt").exists():
                raise ValueError(f"{path}: neither tokenizer.json nor vocab.json and merges.txt in this folder")
            lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
            model = {"type": "BPE", "vocab": read_json(path / "vocab.json"),
                     "merges": [line for line in lines if line and not line.startswith("#version")]}
            return from_hugging_face({"model": model, "pre_tokenizer": {"type": "ByteLevel"}}, path)
        path = path / "tokenizer.json" if path.is_dir() else path
        return from_hugging_face(read_json(path), path)


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
        "normalizer": None,
        "pre_tokenizer": byte_level if tokenizer.pattern == GPT2_PATTERN else own_pattern,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": [f"{spell(first)} {spell(second)}" for first, second in tokenizer.merges]},
    }


def from_hugging_face(data, path):
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
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        need(not model.get(field), f"model.{field}", model.get(field), "none")
    need(data.get("normalizer") is None, "normalizer", data.get("normalizer"), "none")

    pre_tokenizer = data.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    kinds = [step.get("type") for step in steps]
    need(kinds in (["ByteLevel"], ["Split", "ByteLevel"]), "pre_tokenizer", pre_tokenizer, "[Split and] ByteLevel")
    need(not steps[-1].get("add_prefix_space"), "pre_tokenizer.add_prefix_space", True, "false")
    pattern, use_regex = GPT2_PATTERN, steps[-1].get("use_regex", True)
    need(use_regex == (len(steps) == 1), "pre_tokenizer.use_regex", use_regex, "true alone and false after Split")
    if len(steps) == 2:
        split, pattern = steps[0], (steps[0].get("pattern") or {}).get("Regex")
        need(pattern and split.get("behavior") == "Isolated" and not split.get("invert"), "pre_tokenizer Split", split,
             "an isolating Regex")

    special_tokens = {}
    for token in data.get("added_tokens") or []:
        for field in ("single_word", "lstrip", "rstrip"):
            need(not token.get(field), f"added_tokens {token['content']!r} {field}", token.get(field), "false")
        special_tokens[token["content"]] = token["id"]
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
        return Tokenizer(vocab, merges, special_tokens, pattern)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The command line

LOCAL = Path("corpus/local")  # where data.py puts the text that every Python installation carries


def command_train(args):
    """`bpe.py train`: learn a tokenizer from files and save it."""
    start = time.time()
    vocab, merges = train_bpe(args.files, args.vocab_size, args.special_tokens, num_workers=args.workers)
    seconds = time.time() - start
    Tokenizer(vocab, merges, args.special_tokens).save(args.out)
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
    quiet_when_piped()
    for start in range(0, len(ids), BLOCK):
        sys.stdout.buffer.write(tokenizer.decode_bytes(ids[start : start + BLOCK]))
    if sys.stdout.isatty():
        print()


def command_show(args):
    """`bpe.py show`: a text with its tokens in colour, and their number."""
    tokenizer = load_tokenizer(args.tokenizer)
    text, note = args.text, ""
    if os.path.isfile(text):
        with contextlib.closing(read_documents(text, cut=True)) as documents:
            whole = next(documents)[0]
        text = whole[:4000]
        note = f"  (the first {len(text):,} characters of {args.text})" if len(text) < len(whole) else ""
    ids = tokenizer.encode(text, special="text")
    size = len(text.encode())
    quiet_when_piped()
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
    (vocab, merges), seconds = timed(train_bpe, train, vocab_size)
    train_texts, texts = ([text for text, _, _ in read_documents(path)] for path in (train, held_out))
    train_size, size = (sum(len(text.encode()) for text in part) for part in (train_texts, texts))
    text, characters = "".join(texts), set().union(*train_texts)
    words = count_words(([(text, True) for text in train_texts], 0), GPT2_PATTERN, [ENDOFTEXT])

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

    tokenizer = Tokenizer(vocab, merges, [ENDOFTEXT])  # a fresh one, that remembers no words yet
    ids, encode_seconds = timed(lambda: [tokenizer.encode(text, "text") for text in texts])
    print(f"\n{'MB/s':<20}{'training':>9}{'encoding, one thread':>22}{'ids':>7}")
    print(f"{'bpe.py':<20}{train_size / 1e6 / seconds:>9.1f}{size / 1e6 / encode_seconds:>22.1f}")
    for name, train_seconds, peer_seconds, peer_ids in peers(tokenizer, train_texts, texts):
        speed = f"{train_size / 1e6 / train_seconds:.1f}" if train_seconds else "-"
        same = "equal" if peer_ids == ids else "differ"
        print(f"{name:<20}{speed:>9}{size / 1e6 / peer_seconds:>22.1f}{same:>7}")

    target = LOCAL / "tokenizer.json"
    if target.exists():
        print(f"\n{target} was there already and stays as it is")
    else:
        tokenizer.save(target)
        print(f"\nWrote {target}. Now try: python bpe.py show \"any text\"")


def peers(tokenizer, train_texts, texts):
    """Yield (name, seconds of training or None, seconds of encoding, ids) of each other tokenizer that is installed."""
    with contextlib.suppress(ImportError):
        import tokenizers

        peer = tokenizers.Tokenizer(tokenizers.models.BPE())
        peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=len(tokenizer), special_tokens=[ENDOFTEXT], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        _, train_seconds = timed(peer.train_from_iterator, train_texts, trainer)
        peer = tokenizers.Tokenizer.from_str(json.dumps(to_hugging_face(tokenizer)))
        ids, seconds = timed(lambda: [peer.encode(text).ids for text in texts])
        yield f"tokenizers {tokenizers.__version__}", train_seconds, seconds, ids
    with contextlib.suppress(ImportError):
        import tiktoken

        special_ids = set(tokenizer.special_tokens.values())
        ranks = {token: id for id, token in tokenizer.vocab.items() if id not in special_ids}
        peer = tiktoken.Encoding("peer", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens=tokenizer.special_tokens)
        ids, seconds = timed(lambda: [peer.encode_ordinary(text) for text in texts])
        yield f"tiktoken {tiktoken.__version__}", None, seconds, ids


def timed(function, *arguments):
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    value = function(*arguments)
    return value, time.perf_counter() - start


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
    return tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern


def text_bytes(tokenizer, ids):
    """How many bytes of text an array of ids stands for, special tokens not counted."""
    lengths = np.zeros(len(tokenizer), np.int64)
    special_ids = set(tokenizer.special_tokens.values())
    for id, token in tokenizer.vocab.items():
        lengths[id] = 0 if id in special_ids else len(token)
    return sum(int(lengths[ids[start : start + BLOCK]].sum()) for start in range(0, len(ids), BLOCK))


def quiet_when_piped():
    """Have `| head` end this process without a traceback."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` then ends this process, as it ends any other


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


def parse_args(argv):
    """The command line of every subcommand."""
    style = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="bpe.py", description="Byte-level BPE. Without a command: train on the local corpus, and show "
                                               "what came of it.", **style)
    commands = parser.add_subparsers(dest="command", metavar="{train,encode,decode,show}")
    tokenizer_help = "tokenizer.json, or a folder with one, or with GPT-2's vocab.json and merges.txt"
    files_help = ".jsonl or text, .gz of either"

    def add(name, description):
        return commands.add_parser(name, help=description, description=description, **style)

    def add_workers(command):
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that share the work")

    train = add("train", "Learn a tokenizer from files.")
    train.add_argument("files", nargs="+", help=files_help)
    train.add_argument("--vocab_size", type=int, default=4096, help="tokens in all: 256 bytes, merges, special tokens")
    train.add_argument("--out", default="tokenizer.json", help="the file to write")
    train.add_argument("--special_tokens", nargs="*", default=[ENDOFTEXT], help="never split; take the last ids")
    add_workers(train)
    encode = add("encode", "Write the tokens of each file as FOLDER/<name>.npy, and the tokenizer.json beside them.")
    encode.add_argument("files", nargs="+", help=files_help)
    encode.add_argument("--tokenizer", default=str(LOCAL / "tokenizer.json"), help=tokenizer_help)
    encode.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write into")
    add_workers(encode)
    decode = add("decode", "Print the text of tokens.")
    decode.add_argument("ids", nargs="+", help="a .npy file, or token ids")
    decode.add_argument("--tokenizer", help=f"{tokenizer_help}; None: the one beside the .npy, or {LOCAL}'s")
    decode.add_argument("--limit", type=int, metavar="N", help="the first N tokens only; None: all")
    show = add("show", "Print a text with its tokens in colour, and their number.")
    show.add_argument("text", help="a text, or a file (its first document, 4,000 characters of it)")
    show.add_argument("--tokenizer", default=str(LOCAL / "tokenizer.json"), help=tokenizer_help)
    return parser.parse_args(argv)


def main(argv=None):
    """The command line; returns the exit code."""
    args = parse_args(argv)
    commands = {"train": command_train, "encode": command_encode, "decode": command_decode, "show": command_show}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that temporary files are removed
    try:
        commands[args.command](args) if args.command else demonstrate()
    except KeyboardInterrupt:
        print("bpe.py: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        told = getattr(error, "strerror", None) or str(error)
        print(f"bpe.py: {told}" + (f": {error.filename}" if getattr(error, "filename", None) else ""), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
