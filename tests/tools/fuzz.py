#!/usr/bin/python3
"""Throw mutated archives at the unpacking code: each is unpacked, or refused, and nothing else may happen.

Usage: python3 tests/tools/fuzz.py [--inputs N] [--seed N] [--jobs N] [--only INDEX [--keep FILE]]

Inputs are made from a grammar (members, extension headers, zip records) and
then damaged: fields that lie, headers moved and repeated, bytes turned, with
checksums mended or not.  An input depends on the seed and its index alone, so
that `--only INDEX` repeats it.  Counted are the outcomes: accepted, or refused
by the class of the reason.  A failure is any exception but ArtifactRefused, an
input that takes over 10 s, anything written outside the release, and an
accepted release that is not what its manifest says or leads outside.
"""

import argparse
import bz2
import collections
import faulthandler
import gzip
import hashlib
import io
import json
import lzma
import errno
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))

from archives import BLOCK_BYTES, RawEntry, checksum, entry, gnu_long, header, patched, pax, raw_zip  # noqa: E402
from archives import zip64_end, zstd  # noqa: E402
from support import load_deploy  # noqa: E402

deploy = load_deploy()

HANG_SECONDS = 10
WATCHED_INPUTS, WATCHED_SECONDS = 100, 200
MEMORY_BYTES, FILE_BYTES, DESCRIPTORS = 1 << 30, 16 << 20, 64
CLASSES_SHOWN = 200
FAILURES_KEPT = 40

# Small limits, so that small archives reach them.
SETTINGS = (
    {},
    {},
    {("artifact", "strip_components"): "1"},
    {("artifact", "symlinks"): "refuse"},
    {("limits", "max_files"): "8", ("limits", "max_file"): "2k", ("limits", "max_expanded"): "16k"},
    {("limits", "max_ratio"): "0"},
)  # type: Tuple[Dict[Tuple[str, str], str], ...]

PIECES = ((deploy.BLOCK_BYTES, deploy.SLICE_BYTES), (1000, 700), (512, 512), (37, 11))


# -- the grammar ---------------------------------------------------------------

# There is no such directory: whoever tries to write there fails, which is a failure here.
NOWHERE = b"/no-such-directory-of-the-fuzzer"
NAMES = [
    b"a", b"b", b"c", b"d", b"a/b", b"d/e", b"d/e/f", b"d/a", b"l", b"l/x", b"l/../a", b"./a", b"./d/a", b"A", b"D/e",
    b"x" * 100, b"y" * 255,
    b"\xc3\xa9", b"e\xcc\x81", b"\xe9", b"\xff\xfe", b"pkg/VERSION", b"pkg/bin/run", b"pkg/lib/m.py", b" ", b"-rf", b"*",
    b"a b", b"VERSION",
]
BAD_NAMES = [
    b"", b".", b"..", b"../a", b"../../a", b"a/..", b"a/../b", b"a/../../b", b"a/./b", b"a//b", b"//a", b"a/", b"./",
    b"a\\b", b"a\nb", b"a\0b",
    b"\x1b[m", b"z" * 256, b"/".join([b"n"] * 65), b"/".join([b"m" * 200] * 6), b"../../../../../sentinel/evil",
    b"../../../../../sentinel/file",
    NOWHERE + b"/evil", NOWHERE + b"/sub/",
]
MODES = [0o644, 0o755, 0o600, 0o000, 0o444, 0o555, 0o777, 0o4755, 0o6777, 0o7777]
NUMBERS = [0, 1, 2, 5, 46, 255, 511, 512, 513, 0x7fff, 0xfffe, 0xffff, 0x7fffffff, 0xfffffffe, 0xffffffff, 1 << 33, 1 << 47,
           1 << 62, (1 << 63) - 1]
SIZE_FIELDS = [b"", b"-1", b"\xff" * 12, b"\x80" + bytes(10) + b"\x01", b"\x80" + b"\x7f" * 11,
               b"\x80" + bytes(6) + b"\2" + bytes(4), b"0_1",
               b" 17\0", b"7" * 12, b"9", b"\x81" + bytes(11), b"\xc0" * 12, b"00000000010 ", b"\0" * 12]
INNOCENT = entry(b"a", b"x")
FLAGS = [b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"D", b"M", b"V", b"X", b"x", b"g", b"L", b"K", b"A",
         b"N", b"\xff"]
PAX_KEYS = [b"path", b"linkpath", b"size", b"mtime", b"comment", b"GNU.sparse.major", b"GNU.sparse.map", b"uname",
            b"hdrcharset",
            b"SCHILY.xattr.user.x", b"LIBARCHIVE.creationtime", b"path ", b"PATH"]
BAD_PAX = [b"", b"0 a=b\n", b"5 a=b\n", b"7 a=b\n", b"6 a=b", b"6 a=b\n\0\0", b"-6 a=b\n", b"99999999999 a=b\n", b"6 =ab\n",
           b"06 a=b\n", b" 6 a=b\n",
           b"6\ta=b\n", b"6 a=b\n6 a=c\n", b"10 path=a\n\n", b"9 path=a\nx"]


class Chance(random.Random):
    """A source of decisions; knows the names it has given out, so that links may lead to them."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.used = []  # type: List[bytes]
        # What is refused at its first member never shows what its second one would have done.
        self._calm = self.choice([1, 1, 12])

    def once_in(self, number: int) -> bool:
        """True once in so many times."""
        return not self.randrange(number)

    def rarely(self, number: int) -> bool:
        """True once in so many times, and in a calm archive far less often."""
        return self.once_in(number * self._calm)

    def name(self) -> bytes:
        """A name, mostly harmless and mostly new."""
        if self.rarely(16):
            return self.choice(BAD_NAMES)
        if self.used and self.rarely(12):
            return self.choice(self.used)
        name = self.choice(NAMES)
        if self.once_in(2):
            name = b"%s%s%d" % (name, self.choice([b"", b"", b"/"]), len(self.used))
        self.used.append(name)
        return name

    def target(self) -> bytes:
        """Where a link leads: mostly to a name that there is."""
        name = self.choice(self.used[:-1]) if len(self.used) > 1 and not self.rarely(4) else self.name()
        if self.rarely(5):
            return self.choice([b"../" + name, b"l/../" + name, b"../../" + name, b"../../../x", b".."])
        return name

    def data(self) -> bytes:
        """Some content: empty, short, of whole blocks, repetitive."""
        return self.choice([b"", b"x", b"#!/bin/sh\n", b"y" * 511, b"z" * 512, bytes(700), b"ab" * 1500])

    def number(self) -> int:
        """A number of which somebody may not have thought."""
        return self.choice(NUMBERS) if self.once_in(2) else self.randrange(1 << self.choice([3, 8, 12, 16, 32]))

    def damage(self, data: bytes) -> bytes:
        """Turn, insert, remove or repeat bytes."""
        changed = bytearray(data)
        for _ in range(self.choice([1, 1, 1, 2, 4, 9])):
            at = self.randrange(len(changed) + 1)
            length = self.choice([1, 1, 2, 4, 12, 512])
            how = self.randrange(6)
            if how < 3 and at < len(changed):
                changed[at] = changed[at] ^ 1 << self.randrange(8) if how else self.randrange(256)
            elif how == 3:
                del changed[at:at + length]
            elif how == 4:
                changed[at:at] = bytes(changed[at:at + length])
            else:
                changed[at:at + length] = self.number().to_bytes(8, "little")[:length]
        return bytes(changed)


# -- tar -----------------------------------------------------------------------

def tar_extension(chance: Chance) -> bytes:
    """An extension header: pax, global or GNU."""
    how = chance.randrange(10)
    if how < 5:
        records = [(chance.choice(PAX_KEYS),
                    chance.choice([chance.name(), b"%d" % chance.number(), b"1.5", b"-1", b"x" * 900]))
                   for _ in range(chance.choice([1, 1, 2, 3]))]
        return pax(records, b"g" if chance.once_in(8) else b"x")
    if how < 6:
        return entry(b"pax", chance.choice(BAD_PAX), chance.choice([b"x", b"g"]))
    if how < 7:
        return pax([(b"path", chance.name())])
    return gnu_long(chance.name(), chance.choice([b"L", b"L", b"K"]))


def tar_member(chance: Chance) -> List[bytes]:
    """One member, with its extension headers; each item begins with a header."""
    items = [tar_extension(chance) for _ in range(chance.choice([0] * 9 + [1, 1, 2]) if not chance.rarely(2) else 0)]
    how, name, mode = chance.randrange(20), chance.name(), chance.choice(MODES)
    fields = {}  # type: Dict[str, bytes]
    if chance.rarely(40):
        fields["size_field"] = chance.choice(SIZE_FIELDS)
    if chance.rarely(15):
        fields["prefix"] = chance.name()[:155]
    if chance.once_in(8):
        fields["magic"] = chance.choice([b"ustar  \0", bytes(8), b"ustar\0 0", b"junk\0\0\0\0"])
    if chance.rarely(40):
        fields["mode_field"] = chance.choice(SIZE_FIELDS)[:8]
    if how < 9:
        items.append(entry(name, chance.data(), mode=mode, **fields))
    elif how < 12:
        items.append(entry(name if chance.once_in(2) else name + b"/", flag=b"5", mode=mode, **fields))
    elif how < 15:
        items.append(entry(name, flag=b"2", target=chance.target(), **fields))
    elif how < 19:
        items.append(entry(name, flag=b"1", target=chance.target(), **fields))
    elif chance.rarely(1):
        items.append(entry(name, chance.choice([b"", chance.data()]), chance.choice(FLAGS), chance.name(), mode, **fields))
    return items


def mutate_header(chance: Chance, item: bytes) -> bytes:
    """Change bytes of a header; mostly mend its checksum afterwards."""
    places = [(0, 100), (100, 108), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500), (0, 512)]
    start, end = chance.choice(places)
    for _ in range(chance.choice([1, 1, 2, 5])):
        byte = chance.choice([0, 0x20, 0x2d, 0x2f, 0x30, 0x37, 0x80, 0xff, chance.randrange(256)])
        item = patched(item, chance.randrange(start, end), bytes([byte]))
    if not chance.once_in(6):
        item = patched(item, 148, checksum(item))
    return item


def tar_archive(chance: Chance) -> bytes:
    """A tar archive: members from the grammar, some moved, repeated, mutated or cut."""
    items = [item for _ in range(chance.choice([1, 2, 3, 3, 5, 9])) for item in tar_member(chance)] or [INNOCENT]
    for _ in range(chance.choice([1, 1, 3]) if chance.rarely(2) else 0):
        at, other, how = chance.randrange(len(items)), chance.randrange(len(items)), chance.randrange(8)
        if how < 4:
            items[at] = mutate_header(chance, items[at])
        elif how == 4:
            items.insert(other, items[at])
        elif how == 5:
            items[at], items[other] = items[other], items[at]
        elif how == 6:
            items.insert(at,
                         chance.choice([bytes(BLOCK_BYTES), bytes(2 * BLOCK_BYTES), b"junk".ljust(BLOCK_BYTES, b"\0"),
                                        header(b"h", chance.number() % (8 << 30))]))
        else:
            items[at] = items[at][:-BLOCK_BYTES] or items[at]
    data = b"".join(items) + bytes(chance.choice([0, 512, 1023, 1536] if chance.rarely(10) else [1024, 1024, 10240]))
    if chance.rarely(12):
        unit = chance.choice([1, BLOCK_BYTES])
        data = data[:chance.randrange(len(data) // unit + 1) * unit]
    return chance.damage(data) if chance.rarely(10) else data


def fast_gzip(data: bytes) -> bytes:
    """Compress a little, without the time of day in it."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as stream:
        stream.write(data)
    return out.getvalue()


def fast_xz(data: bytes) -> bytes:
    """Compress a little."""
    return lzma.compress(data, preset=0)


def compressed_tar(chance: Chance) -> bytes:
    """A compressed tar archive, perhaps in several streams, its compressed bytes perhaps damaged."""
    data = tar_archive(chance)
    how = chance.randrange(100)
    pack = fast_gzip if how < 60 else bz2.compress if how < 78 else zstd if how == 99 and shutil.which("zstd") else fast_xz
    cut = chance.randrange(len(data) + 1) if chance.once_in(4) else len(data)
    streams = [pack(piece) for piece in (data[:cut], data[cut:]) if piece]
    if chance.rarely(8):
        between = chance.choice([bytes(4), bytes(5), b"junk", pack(b""), pack(bytes(3 << 20))])
        streams.insert(chance.randrange(len(streams) + 1), between)
    out = b"".join(streams)
    if chance.rarely(10):
        out = out[:chance.randrange(len(out) + 1)]
    return chance.damage(out) if chance.rarely(5) else out


# -- zip -----------------------------------------------------------------------

LOCAL = ["flags", "method", "crc", "packed", "size", "name_length", "extra_length", "version", "time"]
CENTRAL = LOCAL + ["system", "attributes", "disk", "comment_length", "offset", "internal"]


def zip_extra(chance: Chance) -> bytes:
    """An extra field: zip64, unknown or malformed."""
    values = [chance.number() for _ in range(chance.choice([1, 2, 2, 3]))]
    full = struct.pack("<HH", 1, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)
    return chance.choice([full, full, full[:-3], b"UT\5\0\1\0\0\0\0", b"\1\0\xff\xff", b"\1\0", b"up\6\0\1\0\0\0\0a",
                          full + full])


def zip_value(chance: Chance, field: str) -> int:
    """A value for a header's field, within its width."""
    if field == "flags":
        return chance.choice([0, 1, 8, 0x800, 0x808, 0x2000, 0x40, 0xffff])
    if field == "method":
        return chance.choice([0, 8, 9, 12, 14, 93, 99, chance.randrange(100)])
    if field == "attributes":
        mode = chance.choice([0o100644, 0o040755, 0o120777, 0o020600, 0o010600, 0o140600, 0o107777, 0, 0o177777])
        return mode << 16 | chance.choice([0, 16])
    width = {"crc": 4, "packed": 4, "size": 4, "offset": 4, "system": 1}.get(field, 2)
    return chance.number() & (1 << 8 * width) - 1


def zip_item(chance: Chance) -> RawEntry:
    """One entry, consistent at first, and then perhaps not."""
    name, data, how = chance.name(), chance.data(), chance.randrange(10)
    mode = 0o040755 if name.endswith(b"/") else 0o120777 if how == 9 else 0o100000 | chance.choice(MODES)
    data = b"" if name.endswith(b"/") else chance.target() if how == 9 else data
    method = 8 if data and chance.once_in(2) else 0
    item = RawEntry(name, data, method, mode=mode)
    if chance.once_in(6):
        describe_later(chance, item)
    if chance.rarely(8):
        field = chance.choice(LOCAL)
        value = zip_value(chance, field)
        for where in chance.choice([("local",), ("central",), ("local", "central"), ("local", "central")]):
            item.but(where, **{field: value})
    if chance.rarely(16):
        field = chance.choice(CENTRAL)
        item.but("central", **{field: zip_value(chance, field)})
    if chance.once_in(8):
        widen(chance, item)
    if chance.rarely(20):
        item.but(chance.choice(["local", "central"]), name=chance.name())
    if chance.rarely(15):
        item.raw = chance.damage(item.raw)
    return item


def describe_later(chance: Chance, item: RawEntry) -> None:
    """Move CRC and sizes into a data descriptor, mostly the right one."""
    values = [item.local["crc"], item.local["packed"], item.local["size"]]
    if chance.rarely(5):
        values[chance.randrange(3)] ^= 1
    form = chance.choice(["<III", "<III", "<IQQ"])
    item.followed_by(chance.choice([b"PK\7\x08", b"PK\7\x08", b""]) + struct.pack(form, *values))
    for where, fields in (("local", {"flags": 0x808, "crc": 0, "packed": 0, "size": 0}), ("central", {"flags": 0x808})):
        item.but(where, **fields)


def widen(chance: Chance, item: RawEntry) -> None:
    """Move sizes into zip64 extra fields, or pretend to."""
    true = struct.pack("<HHQQ", 1, 16, item.central["size"], item.central["packed"])
    for where in ("local", "central"):
        extra = true if not chance.rarely(6) else zip_extra(chance)
        item.but(where, extra=extra, size=0xffffffff, packed=0xffffffff)


def zip_archive(chance: Chance) -> bytes:
    """A zip: entries from the grammar, end records that may lie, bytes perhaps damaged."""
    items = [zip_item(chance) for _ in range(chance.choice([1, 2, 3, 3, 6]))]
    if chance.rarely(10):
        items.append(chance.choice(items))
    end = {}  # type: Dict[str, Any]
    end64 = None  # type: Optional[Dict[str, int]]
    if chance.rarely(8):
        field = chance.choice(["disk", "first_disk", "here", "total", "size", "start", "comment"])
        most = 0xffffffff if field in ("size", "start") else 0xffff
        end[field] = b"comment" if field == "comment" else chance.number() & most
    if chance.once_in(6):
        end64 = {} if not chance.rarely(2) else {chance.choice(["record", "here", "total", "size", "start",
                                                                "at"]): chance.number()}
        end = chance.choice([end, {"here": 0xffff, "total": 0xffff, "size": 0xffffffff, "start": 0xffffffff}])
    gap = chance.choice([b"hidden", zip64_end(1, 1, 1), items[0].local_bytes()]) if chance.rarely(20) else b""
    data = raw_zip(items, end, end64, gap)
    if chance.rarely(25):
        data = data[:chance.randrange(len(data))]
    return chance.damage(data) if chance.rarely(8) else data


class Input(NamedTuple):
    """An archive, the settings it is unpacked with, and the sizes of the blocks and slices it is read in."""

    data: bytes
    values: Dict[Tuple[str, str], str]
    pieces: Tuple[int, int]


def make_input(seed: int, index: int) -> Input:
    """The input with an index."""
    chance = Chance(f"{seed}/{index}")
    how = chance.randrange(10)
    data = (tar_archive if how < 4 else compressed_tar if how < 7 else zip_archive)(chance)
    # Small pieces put the seams between blocks everywhere.
    pieces = chance.choice(PIECES)
    return Input(data, chance.choice(SETTINGS), pieces)


# -- one input ------------------------------------------------------------------

class Hang(BaseException):
    """An input takes too long."""


def is_circle(path: str) -> bool:
    """Whether a symlink leads nowhere, since it comes back to itself."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


class Wrong(Exception):
    """What came of an input is not what may."""


def reason_class(message: str) -> str:
    """A refusal's message without what only this archive has: names and numbers."""
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "NAME", message)
    text = re.sub(r"artifact /\S+|\binput\b", "ARTIFACT", text)
    text = re.sub(r"[0-9a-f]{4,}(?= \()", "HEX", text)
    text = re.sub(r"\d+ members: (NAME: [^;]*)(;.*)?", r"member \1", text)  # the first of them
    return re.sub(r"\(?b?NAME\)?|\d[\d.,]*( [kMGTP]?B)?", "..", text)[:110]


def nothing(done_bytes: int) -> None:
    """Watch, and do nothing."""


class Ground:
    """Where inputs are unpacked: deep below a sentinel that must stay as it is."""

    def __init__(self, top: str) -> None:
        self.top, self.place = top, os.path.join(top, "1", "2", "3", "4")
        os.makedirs(self.place)
        self.sentinel = os.path.join(top, "sentinel")
        self.path, self.release = os.path.join(top, "input"), os.path.join(self.place, "release")
        os.mkdir(self.sentinel)
        for directory in (self.sentinel, self.place):
            with open(os.path.join(directory, "file"), "w") as stream:
                stream.write("untouched")
        self.before = self.state()

    def state(self) -> List[Any]:
        """What there is outside the release."""
        found = []  # type: List[Any]
        for directory in [self.top, self.sentinel] + [os.path.join(self.top, *"1234"[:depth]) for depth in (1, 2, 3, 4)]:
            for name in sorted(set(os.listdir(directory)) - {"input", "release"}):
                status = os.lstat(os.path.join(directory, name))
                found.append((directory, name, status.st_mode) + (
                    () if stat.S_ISDIR(status.st_mode) else (status.st_mtime_ns, status.st_size)))
        return found

    def _remove(self, function: Any, path: str, _: Any) -> None:
        if path != self.release or os.path.lexists(path):
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(path, 0o700)
            function(path)

    def try_input(self, given: Input) -> str:
        """Unpack one input as a deployment would; returns how it ended, raises for what must not be."""
        with open(self.path, "wb") as stream:
            stream.write(given.data)
        self.sha256 = hashlib.sha256(given.data).hexdigest()
        os.mkdir(self.release, 0o700)
        settings = deploy.Settings({key: (value, "fuzz") for key, value in given.values.items()}, [])
        deploy.BLOCK_BYTES, deploy.SLICE_BYTES = given.pieces
        try:
            return self._unpack(settings)
        finally:
            deploy.BLOCK_BYTES, deploy.SLICE_BYTES = PIECES[0]
            shutil.rmtree(self.release, onerror=self._remove)
            if self.state() != self.before:  # says more than whatever else went wrong
                raise Wrong("written outside the release")

    def _unpack(self, settings: Any) -> str:
        try:
            with deploy.Artifact(self.path, settings.limits) as artifact, \
                    deploy.Directory(self.release) as destination:
                artifact.identify(settings, nothing, self.sha256)
                manifest, _ = deploy.unpack(artifact, destination, settings, nothing)
                self._check(manifest, destination)
        except deploy.ArtifactRefused as refusal:
            if not refusal.message or refusal.exit_code != 4 or not refusal.hint:
                raise Wrong(f"a refusal without its words: {refusal.message!r}")
            return "refused: " + reason_class(refusal.message)
        return "accepted"

    def _check(self, manifest: Any, destination: Any) -> None:
        """Hold an accepted release against its manifest and against what no release may have."""
        for directory, names, files in os.walk(self.release):
            for name in names + files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if stat.S_ISLNK(status.st_mode):
                    # Of a circle the kernel says ELOOP; realpath joins what is left of it, which may begin with a slash.
                    if not (os.path.realpath(path) + "/").startswith(self.release + "/") and not is_circle(path):
                        raise Wrong("a symlink leads outside")
                elif not (stat.S_ISREG(status.st_mode) and status.st_nlink == 1 or stat.S_ISDIR(status.st_mode)):
                    raise Wrong("a special file or a hard link")
                elif stat.S_IMODE(status.st_mode) & 0o7022:
                    raise Wrong(f"mode {stat.S_IMODE(status.st_mode):04o}")
        found = deploy.differences(manifest, deploy.scan_tree(destination, nothing, known=manifest))
        wrong = {name for name, why in found["changed"].items() if not why.startswith("has mode")}
        if wrong or found["missing"] or found["added"]:
            raise Wrong(f"the release is not what its manifest says: {found}")


# -- many inputs -----------------------------------------------------------------

class Tally(NamedTuple):
    """What came of a run: how often each outcome, and the failures as (index, text)."""

    outcomes: Any  # a Counter
    failures: List[Tuple[int, str]]


def stop_hanging(*_: Any) -> None:
    """The alarm's handler."""
    raise Hang()


def limit_resources() -> None:
    """Bound what this process may take: a leak or a bomb becomes a failure."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def run(seed: int, indexes: Any, top: str) -> Tally:
    """Try inputs one after the other, below a directory."""
    tally, handler = Tally(collections.Counter(), []), signal.signal(signal.SIGALRM, stop_hanging)
    try:
        for count, index in enumerate(indexes):
            if not count % WATCHED_INPUTS:
                # The alarm is not heard within a call of C: this ends the process all the same.
                faulthandler.dump_traceback_later(WATCHED_SECONDS, exit=True)
            if not os.path.isdir(top):
                ground = Ground(top)
            outcome = try_in_time(ground, make_input(seed, index))
            tally.outcomes[outcome] += 1
            if outcome.startswith("FAILED"):
                tally.failures.append((index, outcome))
                shutil.rmtree(top)
                if len(tally.failures) >= FAILURES_KEPT:
                    break
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
    return tally


def try_in_time(ground: Ground, given: Input) -> str:
    """Try one input; returns how it ended, which for a failure begins with FAILED."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        return ground.try_input(given)
    except Hang:
        return "FAILED: takes too long"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILED: {type(error).__name__} in {last.name}:{last.lineno}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def start_job(seed: int, indexes: Any, directory: str) -> int:
    """Fork a process that tries inputs and writes its tally; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        limit_resources()
        tally = run(seed, indexes, os.path.join(directory, "ground"))
        with open(os.path.join(directory, "tally"), "w") as stream:
            json.dump([tally.outcomes, tally.failures], stream)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_jobs(seed: int, inputs: int, jobs: int) -> Tally:
    """Divide the inputs among processes and add up what they found."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    total = Tally(collections.Counter(), [])
    with tempfile.TemporaryDirectory(prefix="deploy-fuzz-", dir=place) as top:
        pids = {}
        for job in range(jobs):
            directory = os.path.join(top, str(job))
            os.mkdir(directory)
            pids[start_job(seed, range(job, inputs, jobs), directory)] = directory
        for pid, directory in pids.items():
            _, status = os.waitpid(pid, 0)
            if status:
                total.failures.append((-1, f"FAILED: a job ended with status {status}"))
                continue
            with open(os.path.join(directory, "tally")) as stream:
                outcomes, failures = json.load(stream)
            total.outcomes.update(outcomes)
            total.failures.extend(map(tuple, failures))
    return total


def report(tally: Tally, seconds: float) -> None:
    """Print the counts, and each kind of failure with what repeats it."""
    total = sum(tally.outcomes.values())
    print(f"{total} inputs in {seconds:.0f} s: {tally.outcomes['accepted']} accepted, "
          f"{len(tally.outcomes) - 1} classes of refusal, {len(tally.failures)} failures")
    for outcome, number in tally.outcomes.most_common(CLASSES_SHOWN):
        print(f"{number:9d}  {outcome}")
    for index, text in tally.failures[:FAILURES_KEPT]:
        print(f"--only {index}: {text}")


def repeat(seed: int, index: int, keep: str) -> int:
    """Try one input again, with its traceback; `keep` is where its bytes go."""
    given = make_input(seed, index)
    if keep:
        with open(keep, "wb") as stream:
            stream.write(given.data)
    print(f"{len(given.data)} bytes, settings {given.values}, read in pieces of {given.pieces}")
    with tempfile.TemporaryDirectory() as top:
        print(Ground(os.path.join(top, "ground")).try_input(given))
    return 0


def main() -> int:
    """Run; 1 when there was a failure."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=10000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="where they come from (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes (default: %(default)s)")
    parser.add_argument("--only", type=int, default=-1, metavar="INDEX", help="repeat one input")
    parser.add_argument("--keep", default="", metavar="FILE", help="write that input to a file")
    given = parser.parse_args()
    if given.only >= 0:
        return repeat(given.seed, given.only, given.keep)
    started = time.monotonic()
    tally = run_jobs(given.seed, given.inputs, given.jobs)
    report(tally, time.monotonic() - started)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
