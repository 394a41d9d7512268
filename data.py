"""data.py: documents in, a training corpus out.

A corpus is two files of documents, train.jsonl and val.jsonl, one {"text": ..., "source": ...} a line. Every document
passes a list of rules. A rule is a plain function from text to text: what it returns goes on to the next rule, and None
drops the document. Documents and bytes are counted before and after each rule, so that the table at the end shows what
was thrown away, and why. A document's side, training or validation, follows from a hash of its text: the same document
lands on the same side in every build, whatever surrounds it.

Bare, it builds the local corpus from the text that every Python installation carries: the documentation topics, the
docstrings of modules written in C, and the sources of the standard library. Real, offline, and under one licence (PSF).
`build` makes a corpus of your own text: .jsonl (one object a line, its "text" a string) or .txt, where <|endoftext|>
ends a document and a file without it is one document; .gz of either. Documents are streamed: memory holds the longest
one, a 16-byte hash of each, and those that wait for the first document of the other side (about 1 / val_fraction).

    python data.py                                           # corpus/local/train.jsonl and val.jsonl, in seconds
    python data.py build story.txt more/*.jsonl.gz --out corpus/mine

Left out for now: web archives, languages, quality, near duplicates in your own text.
"""

import argparse
import difflib
import gzip
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import sys
import textwrap
import time
import zlib
from pathlib import Path

from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
MIN_CHARACTERS = 200  # below this a source file is a stub: an empty __init__.py, a module that only renames another
MAX_TABLE = 0.4       # ordinary code lies near 0.05, modules of constants below 0.40, tables and code pages above 0.43
MIN_LINES = 3         # shorter paragraphs (`else: pass`, a two-line definition) repeat in good code too


# ---------------------------------------------------------------------------------------------------------------------
# Reading: files of documents

def read_documents(path):
    """Yields the texts of one file: .jsonl, or anything else as text in which <|endoftext|> ends a document; .gz too.

    Characters come through exactly (a carriage return stays); nothing is stripped. Raises OSError for a file that
    cannot be opened, ValueError for one that is empty or binary and for a row (named by its line) that holds no text.
    """
    path = os.fspath(path)
    is_rows = path.removesuffix(".gz").endswith(".jsonl")
    with open(path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        # Rows end at \n alone, and a byte order mark in front of the first is no part of it.
        file = io.TextIOWrapper(stream, encoding="utf-8-sig" if is_rows else "utf-8", newline="\n" if is_rows else "")
        try:
            if not stream.peek(1):
                raise ValueError(f"{path}: the file is empty")
            yield from read_rows(file, path) if is_rows else read_text(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.object[error.start]:#04x})") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from None


def read_rows(file, path):
    """Yields the "text" of every row of an open .jsonl file; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'{path}, line {number}: expected an object whose "text" is a string')
        if not is_utf8(row["text"]):
            raise ValueError(f"{path}, line {number}: half of a surrogate pair (such as \\ud800) is not text")
        yield row["text"]


def read_text(file, path):
    """Yields the documents of an open text file, read in blocks and cut at <|endoftext|>."""
    parts, edge = [], ""  # the current document is parts + edge; edge may hold the beginning of an <|endoftext|>
    while block := file.read(1 << 20):
        if "\0" in block:
            raise ValueError(f"{path}: a binary file (it holds NUL bytes)")
        *ended, rest = (edge + block).split(END_OF_TEXT)
        for text in ended:
            yield "".join(parts) + text
            parts = []
        keep = len(END_OF_TEXT) - 1
        parts.append(rest[:-keep])
        edge = rest[-keep:]
    if last := "".join(parts) + edge:  # nothing after the last <|endoftext|> is no document
        yield last


# ---------------------------------------------------------------------------------------------------------------------
# The local corpus: what Python brought along

# Parts that distributions split off or drop, that start programs, or that are data (pydoc_data is read as topics).
LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv",
            "pydoc_data", "antigravity", "this"}

# Written in C, built everywhere, harmless to import. Not sys: programs hang their own hooks into it. A module that
# another system or another Python lacks (posix, nt) is passed over.
C_MODULES = """
    _abc _ast _asyncio _bisect _codecs _collections _contextvars _csv _datetime _decimal _elementtree
    _functools _heapq _io _json _locale _lsprof _opcode _operator _pickle _queue _random _signal _socket
    _sre _stat _statistics _string _struct _symtable _thread _tokenize _tracemalloc _typing _warnings
    _weakref array atexit binascii builtins cmath errno faulthandler gc itertools marshal math nt posix
    pyexpat select time unicodedata zlib
""".split()


def local_documents():
    """Yields {"text", "source"} for everything local, unfiltered and in a fixed order. Bytes that are no UTF-8 arrive
    as lone surrogates, which the first rule drops."""
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield {"text": docstrings(module), "source": f"docstrings/{name}"}
    library = Path(os.__file__).parent
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        single = library / f"{name}.py"
        for path in [single] if single.exists() else sorted((library / name).rglob("*.py")):
            source = path.relative_to(library).as_posix()
            if not LEFT_OUT & set(source.split("/")):
                text = path.read_text(encoding="utf-8", errors="surrogateescape")
                yield {"text": text, "source": f"stdlib/{source}"}
    from pydoc_data.topics import topics
    for name in sorted(topics):
        yield {"text": topics[name], "source": f"topics/{name}"}


def docstrings(module):
    """The documentation of a module written in C: functions and classes with signatures, methods indented below."""
    parts = [f"{module.__name__}\n\n{inspect.cleandoc(module.__doc__ or '')}"]
    for name, thing in sorted(vars(module).items()):
        if isinstance(thing, type) or inspect.isbuiltin(thing):
            # A thing may have several names (OSError is also IOError): it is described under its own.
            if not name.startswith("__") and thing.__name__ == name and isinstance(thing.__doc__, str):
                parts.append(describe(f"{module.__name__}.{name}", thing))
    return "\n\n".join(parts) + "\n"


def describe(name, thing):
    """One function, class, method or attribute: a line with its signature, then its docstring, then its members."""
    documentation = inspect.cleandoc(thing.__doc__)
    signature = getattr(thing, "__text_signature__", None) or ""
    signature = re.sub(r"\(\$\w+(, /)?(, )?", "(", signature)  # ($self, x, /) is called as (x, /)
    head, _, rest = documentation.partition("\n")
    if not signature and head.startswith(name.rpartition(".")[2] + "("):  # the docstring begins with the signature
        signature, documentation = head[head.index("("):], rest.lstrip("\n")
    parts = ["class " * isinstance(thing, type) + name + signature + "\n" + textwrap.indent(documentation, "    ")]
    if isinstance(thing, type):
        for member in sorted(vars(thing)):
            if member.startswith("__"):  # every class has them, with the same words
                continue
            value = getattr(thing, member)
            if isinstance(value.__doc__, str) and (inspect.isroutine(value) or inspect.isdatadescriptor(value)):
                parts.append(textwrap.indent(describe(member, value), "    "))
    return "\n\n".join(part.rstrip() for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Rules: text in, text out; None drops the document

def is_utf8(text):
    """Whether a text can be written as UTF-8, that is, holds no lone surrogates."""
    return re.search("[\ud800-\udfff]", text) is None


def table_share(text):
    """The share of a text's characters (without margins) that stand in lines of the same shape as the line before.

    A line's shape is what is left when every word and number becomes one letter: `0x41: 'A',` and `0x42: 'B',` have one
    shape.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    shapes = [re.sub(r"\s+", " ", re.sub(r"\w+", "a", line)) for line in lines]
    alike = sum(len(line) for line, shape, before in zip(lines[1:], shapes[1:], shapes) if shape == before)
    return alike / max(1, sum(map(len, lines)))


def fingerprint(text):
    """16 bytes of a text's SHA-256: among a trillion texts, any two share them with a chance of one in 10^14."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]


def deduplicate(text, seen, fold=False):
    """The text, or None when `seen`, a set of fingerprints to which this one is added, has it already. With `fold`,
    texts that differ only in white space count as the same."""
    key = fingerprint(" ".join(text.split()) if fold else text)
    if key in seen:
        return None
    seen.add(key)
    return text


def remove_repeats(text, seen):
    """The text without the paragraphs of 3 lines and more that stood in an earlier document (licences, boilerplate,
    a chapter that another one includes). Where less than half of it is left, nothing is: the rest is fragments."""
    pieces = re.split(r"(\n(?:[ \t]*\n)+)", text)
    kept, new = [], set()
    for block, gap in zip(pieces[::2], pieces[1::2] + [""]):
        if block.count("\n") + 1 >= MIN_LINES:
            key = fingerprint(" ".join(block.split()))
            if key in seen:
                continue
            new.add(key)
        kept.append(block + gap)
    rest = "".join(kept)
    if len(rest) < max(MIN_CHARACTERS, len(text) / 2):
        return None
    seen |= new
    return rest


def local_rules():
    """The rules of the local corpus in order, as (what goes, function). The sets make a list good for one corpus."""
    documents, paragraphs = set(), set()
    return [
        ("not UTF-8", lambda text: text if is_utf8(text) else None),
        (f"shorter than {MIN_CHARACTERS} characters", lambda text: text if len(text) >= MIN_CHARACTERS else None),
        (f"generated table (share > {MAX_TABLE})", lambda text: text if table_share(text) <= MAX_TABLE else None),
        ("duplicate of an earlier document", lambda text: deduplicate(text, documents, fold=True)),
        ("paragraph of an earlier document", lambda text: remove_repeats(text, paragraphs)),
    ]


def build_rules():
    """The rules for somebody's own text, which is otherwise taken as it is."""
    documents = set()
    return [
        ("empty", lambda text: text if text and not text.isspace() else None),
        ("duplicate of an earlier document", lambda text: deduplicate(text, documents)),
    ]


def clean(documents, rules, table):
    """Yields the documents that pass the rules, as the rules left them. `table`, an empty list, receives a dict for
    each rule: rule, documents_in, documents_out, bytes_in, bytes_out."""
    for name, _ in rules:
        table.append({"rule": name, "documents_in": 0, "documents_out": 0, "bytes_in": 0, "bytes_out": 0})
    for document in documents:
        text = document["text"]
        size = utf8_bytes(text)
        for row, (_, rule) in zip(table, rules):
            row["documents_in"] += 1
            row["bytes_in"] += size
            before, text = text, rule(text)
            if text is None:
                break
            size = size if text is before else utf8_bytes(text)
            row["documents_out"] += 1
            row["bytes_out"] += size
        else:
            yield {**document, "text": text}


def utf8_bytes(text):
    """The length of a text in bytes, whatever it holds."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------------------------------------------------
# Splitting and writing

def side_of(text, val_fraction):
    """"val" when the text's hash, read as a number in [0, 1), falls below val_fraction, else "train"."""
    return "val" if int.from_bytes(fingerprint(text)[:8], "big") < val_fraction * 2**64 else "train"


def split(documents, val_fraction):
    """Yields (side, document) in order. Both sides get something: of a few documents that all fall on one side, the one
    with the smallest hash is validation (or the one with the greatest is training); a single document is cut after
    int(characters * (1 - val_fraction)). ValueError when there is nothing to split."""
    waiting, sides = [], set()  # documents are held back until both sides have one
    for document in documents:
        waiting.append((side_of(document["text"], val_fraction), document))
        sides.add(waiting[-1][0])
        if len(sides) == 2:
            yield from waiting
            waiting.clear()
    if len(sides) == 2:
        return
    if not waiting:
        raise ValueError("no documents are left: nothing to write")
    if len(waiting) == 1:
        text = waiting[0][1]["text"]
        cut = int(len(text) * (1 - val_fraction))
        if not 0 < cut < len(text):
            raise ValueError(f"one document of {len(text)} characters cannot be split at {1 - val_fraction:g}")
        yield "train", {**waiting[0][1], "text": text[:cut]}
        yield "val", {**waiting[0][1], "text": text[cut:]}
        return
    side, best = ("val", min) if sides == {"train"} else ("train", max)
    chosen = best(range(len(waiting)), key=lambda i: fingerprint(waiting[i][1]["text"]))
    for i, (other, document) in enumerate(waiting):
        yield (side if i == chosen else other), document


def write_corpus(documents, out, val_fraction=0.1):
    """Splits documents, dicts with a "text", into out/train.jsonl and out/val.jsonl, and replaces the pair only when
    both are complete. Returns {"train" and "val": {"documents", "bytes"}, "sha256"}: the hash runs over the texts in
    order, training first, each followed by <|endoftext|>, as a model sees them. Raises ValueError and OSError."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction:g}")
    os.makedirs(out, exist_ok=True)
    report = {side: {"documents": 0, "bytes": 0} for side in ("train", "val")}
    final = {side: os.path.join(out, f"{side}.jsonl") for side in report}
    temporary = {side: f"{final[side]}.tmp.{os.getpid()}" for side in report}
    digest = hashlib.sha256()
    try:
        with (open(temporary["train"], "w", encoding="utf-8", newline="\n") as train,
              open(temporary["val"], "w", encoding="utf-8", newline="\n") as val):
            for side, document in split(documents, val_fraction):
                (train if side == "train" else val).write(json.dumps(document, ensure_ascii=False) + "\n")
                text = document["text"].encode("utf-8")
                report[side]["documents"] += 1
                report[side]["bytes"] += len(text)
                if side == "train":
                    digest.update(text + END_OF_TEXT.encode())
        with open(temporary["val"], encoding="utf-8", newline="\n") as val:
            for text in read_rows(val, temporary["val"]):
                digest.update((text + END_OF_TEXT).encode("utf-8"))
        os.replace(temporary["val"], final["val"])  # train.jsonl last: where it is new, the pair is
        os.replace(temporary["train"], final["train"])
    finally:
        for path in temporary.values():
            if os.path.exists(path):
                os.remove(path)
    return {**report, "sha256": digest.hexdigest()}


def build_local(out="corpus/local", val_fraction=0.1):
    """Builds the local corpus; returns write_corpus's report with "filters", clean's table."""
    table = []
    documents = tqdm(local_documents(), desc="local text", unit=" documents", leave=False, disable=None)
    return {**write_corpus(clean(documents, local_rules(), table), out, val_fraction), "filters": table}


def build(paths, out, val_fraction=0.1):
    """Builds a corpus of the documents in `paths`, in that order; returns what build_local does. The "source" of a
    document is its file's name."""
    for path in paths:
        os.stat(path)  # a misspelt name is an error now, not after an hour
    documents = ({"text": text, "source": os.path.basename(path)} for path in paths for text in read_documents(path))
    table = []
    documents = tqdm(documents, desc="documents", unit="", leave=False, disable=None)
    return {**write_corpus(clean(documents, build_rules(), table), out, val_fraction), "filters": table}


def print_report(report, out):
    """The tables that end a run."""
    print(f"{'what goes':<36}{'documents in':>13}{'out':>9}{'MB in':>11}{'out':>11}{'removed':>10}")
    for row in report["filters"]:
        removed = (row["bytes_in"] - row["bytes_out"]) / 1e6
        print(f"{row['rule']:<36}{row['documents_in']:>13,}{row['documents_out']:>9,}"
              f"{row['bytes_in'] / 1e6:>11,.3f}{row['bytes_out'] / 1e6:>11,.3f}{removed:>10,.3f}")
    print(f"\n{'what is written':<36}{'documents':>22}{'MB':>22}")
    for side in ("train", "val"):
        print(f"{os.path.join(out, side + '.jsonl'):<36}{report[side]['documents']:>22,}"
              f"{report[side]['bytes'] / 1e6:>22,.3f}")
    print(f"sha256 of the texts {report['sha256']}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

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


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    own = argv[:1] == ["build"]
    parser = Parser(prog="data.py build" if own else "data.py", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Build a corpus of your own text." if own else "Build the corpus of text that this "
                    "Python carries. (A corpus of your own text: data.py build FILE..., see data.py build -h.)")
    if own:
        parser.add_argument("files", nargs="+", metavar="FILE",
                            help=".jsonl, or text in which <|endoftext|> ends a document; .gz of either")
    parser.add_argument("--out", default="corpus/own" if own else "corpus/local",
                        help="folder for train.jsonl and val.jsonl; an earlier pair is replaced")
    parser.add_argument("--val_fraction", type=float, default=0.1,
                        help="share of the documents that becomes validation, between 0 and 1")
    args = parser.parse_args(argv[own:])
    begin = time.perf_counter()
    try:
        report = build(args.files, args.out, args.val_fraction) if own else build_local(args.out, args.val_fraction)
        print_report(report, args.out)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the files of before are as they were", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{parser.prog}: {error.strerror or error}: {error.filename or args.out}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - begin:.1f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
