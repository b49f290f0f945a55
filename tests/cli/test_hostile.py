"""Hostile archives: each is refused by name and reason, and nothing outside the staging notices.

One table, a row for each refusal.  Every row goes through the command line as
an operator's artifact would, with the right SHA-256: a digest says that the
bytes are those that were promised, not that they are harmless.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple, Union

import pytest

from archives import (FORMATS, RawEntry, entry, folder, gnu_long, hard_link, header, link, patched, pax, raw_zip, tar,
                      xz_number, zip64_end, zip_end, zstd)
from crashes import warm
from support import WARM, Result, clean_environment, decode_one_object, deploy_argv, described, make_artifact, make_tree, run_deploy, snapshot

SECONDS_ALLOWED = 10.0
PATIENCE_SECONDS = 60.0
MEMORY_ALLOWED_BYTES = 256 << 20
# Stops a faulty program before it hurts the host: far above what is allowed, which is measured.
ADDRESS_SPACE_BYTES = 2 << 30

Archive = Union[bytes, Callable[[bytes], bytes]]


class Case(NamedTuple):
    """One hostile archive: its bytes, or what makes them given the sentinel's path; the reason, and the member to be named.

    `why` is a pattern.  `member` is text that must stand in the message, or
    several with `|` between; none where the archive as a whole is refused.
    """

    archive: Archive
    why: str
    member: str = ""
    options: Tuple[str, ...] = ()


# -- tar: what is wrong with one member ------------------------------------------

INNOCENT = entry(b"innocent", b"fine")
CLIMB = b"../../../.."  # from within a staged release to the directory that holds the root


def after_innocent(*entries: bytes) -> bytes:
    """A tar archive whose first member is harmless: what was written for it must go as well."""
    return tar(INNOCENT, *entries)


def absolute_names(sentinel: bytes) -> bytes:
    """A file by its absolute name."""
    return after_innocent(entry(sentinel + b"/evil", b"x"))


def absolute_symlink(sentinel: bytes) -> bytes:
    """A symlink to an absolute path, and a file through it."""
    return after_innocent(link(b"a", sentinel), entry(b"a/evil", b"x"))


def absolute_symlink_alone(sentinel: bytes) -> bytes:
    """A symlink to an absolute path that exists."""
    return after_innocent(link(b"a", sentinel + b"/file"))


def absolute_hard_link(sentinel: bytes) -> bytes:
    """A hard link to a file outside, which a later member writes through."""
    return after_innocent(hard_link(b"a", sentinel + b"/file"), entry(b"a", b"overwritten"))


TAR_NAMES = {
    "name-absolute": Case(absolute_names, "absolute", "/sentinel/evil"),
    "name-absolute-twice-slashed": Case(after_innocent(entry(b"//etc/passwd", b"x")), "absolute", "//etc/passwd"),
    "name-climbs-to-the-sentinel": Case(after_innocent(entry(CLIMB + b"/sentinel/evil", b"x")), "climbs", "sentinel/evil"),
    "name-climbs-from-below": Case(after_innocent(entry(b"a/../../b", b"x")), "climbs", "a/../../b"),
    "name-climbs-behind-a-dot": Case(after_innocent(entry(b"./../b", b"x")), "climbs", "./../b"),
    "name-climbs-in-a-prefix": Case(after_innocent(entry(b"b", b"x", prefix=b"a/../..")), "climbs", "a/../../b"),
    "name-climbs-in-a-pax-header": Case(after_innocent(pax([(b"path", b"../b")]), entry(b"b", b"x")), "climbs", "../b"),
    "name-climbs-in-a-gnu-long-name": Case(after_innocent(gnu_long(b"../b"), entry(b"b", b"x")), "climbs", "../b"),
    "name-is-dot-dot": Case(after_innocent(entry(b"..", b"x")), "climbs", ".."),
    "directory-is-dot-dot": Case(after_innocent(folder(b"../", 0o777)), "climbs", "../"),
    "directory-climbs-to-the-sentinel": Case(after_innocent(folder(CLIMB + b"/sentinel/", 0o777)), "climbs", "sentinel/"),
    "name-empty": Case(after_innocent(entry(b"", b"x")), "empty", "''"),
    "name-empty-in-a-pax-header": Case(after_innocent(pax([(b"path", b"")]), entry(b"a", b"x")), "empty", "''"),
    "directory-name-empty": Case(after_innocent(folder(b"")), "empty", "''"),
    "directory-is-the-file-systems-root": Case(after_innocent(folder(b"/")), "absolute", "'/'"),
    "name-is-only-a-dot": Case(after_innocent(entry(b".", b"x")), "empty", "'.'"),
    "name-with-a-newline": Case(after_innocent(entry(b"a\nb", b"x")), "control", r"a\nb"),
    "name-with-an-escape-sequence": Case(after_innocent(entry(b"a\x1b[2Jb", b"x")), "control", r"a\x1b[2Jb"),
    "name-with-a-delete-character": Case(after_innocent(entry(b"a\x7f", b"x")), "control", r"a\x7f"),
    "name-with-a-nul": Case(after_innocent(pax([(b"path", b"a\0b")]), entry(b"a", b"x")), "control", r"a\x00b"),
    "name-with-a-nul-in-a-gnu-long-name": Case(after_innocent(gnu_long(b"a\0b"), entry(b"a", b"x")), "control", r"a\x00b"),
    "name-with-a-backslash": Case(after_innocent(entry(b"a\\b", b"x")), "backslash", r"a\\b"),
    "name-climbs-by-backslashes": Case(after_innocent(entry(b"..\\..\\evil", b"x")), "backslash", r"..\\..\\evil"),
    "component-of-256-bytes": Case(after_innocent(pax([(b"path", b"n" * 256)]), entry(b"a", b"x")), "255", "n" * 256),
    "component-of-256-bytes-in-a-gnu-long-name": Case(
        after_innocent(gnu_long(b"n" * 256), entry(b"a", b"x")), "255", "n" * 256),
    "path-of-1205-bytes": Case(
        after_innocent(pax([(b"path", b"/".join([b"n" * 200] * 6))]), entry(b"a", b"x")), "1024", "n" * 200),
    "path-of-65-levels": Case(after_innocent(pax([(b"path", b"/".join([b"n"] * 65))]), entry(b"a", b"x")), "64", "n/n/n"),
    "directory-of-65-levels": Case(after_innocent(pax([(b"path", b"n/" * 65)]), folder(b"a/")), "64", "n/n/n"),
}

TAR_CLASHES = {
    "file-twice": Case(after_innocent(entry(b"a", b"x"), entry(b"a", b"y")), "twice", "'a'"),
    "file-twice-once-behind-a-dot": Case(after_innocent(entry(b"a", b"x"), entry(b"./a", b"y")), "twice", "'./a'"),
    "file-twice-once-by-a-pax-name": Case(
        after_innocent(entry(b"a", b"x"), pax([(b"path", b"a")]), entry(b"b", b"y")), "twice", "'a'"),
    "file-and-hard-link-of-one-name": Case(
        after_innocent(entry(b"a", b"x"), entry(b"b", b"y"), hard_link(b"b", b"a")), "twice", "'b'"),
    "hard-link-and-file-of-one-name": Case(
        after_innocent(entry(b"a", b"x"), hard_link(b"b", b"a"), entry(b"b", b"y")), "twice", "'b'"),
    "symlink-and-file-of-one-name": Case(after_innocent(link(b"a", b"b"), entry(b"a", b"y")), "twice", "'a'"),
    "symlink-twice": Case(after_innocent(link(b"a", b"innocent"), link(b"a", b"b")), "twice", "'a'"),
    "file-over-an-implied-directory": Case(
        after_innocent(entry(b"a/b", b"x"), entry(b"a", b"y")), "directory already", "'a'"),
    "file-over-a-directory": Case(after_innocent(folder(b"a/"), entry(b"a", b"y")), "directory already", "'a'"),
    "directory-over-a-file": Case(after_innocent(entry(b"a", b"x"), folder(b"a/")), "file already", "'a/'"),
    "directory-over-a-symlink": Case(after_innocent(link(b"a", b"b"), folder(b"a/")), "symlink already", "'a/'"),
    "symlink-over-a-directory": Case(after_innocent(entry(b"a/b", b"x"), link(b"a", b"c")), "twice", "'a'"),
    "file-below-a-file": Case(after_innocent(entry(b"a", b"x"), entry(b"a/b", b"y")), "below", "'a/b'"),
    "directory-below-a-file": Case(after_innocent(entry(b"a", b"x"), folder(b"a/b/c/")), "below", "'a/b/c/'"),
    "file-below-a-symlink": Case(after_innocent(link(b"a", b"b"), entry(b"a/c", b"y")), "below", "'a/c'"),
    "file-below-a-symlink-to-the-outside": Case(
        after_innocent(link(b"a", CLIMB + b"/sentinel"), entry(b"a/evil", b"y")), "below", "'a/evil'"),
}

# Directories whose names are so long that what leads through all of them exceeds PATH_MAX, and short links to each
# (CVE-2025-4517): resolved on disk the path is too long to be followed, and is taken for harmless as it stands.
LONG_NAME = b"d" * 247


def long_chain(*last: bytes) -> bytes:
    """Sixteen nested directories of 247 characters, each beside a link of one letter to it, and then `last`."""
    members, path = [], b""
    for letter in b"abcdefghijklmnop":
        members += [pax([(b"path", path + LONG_NAME)]), folder(b"d/")]
        members += [pax([(b"path", path + bytes([letter])), (b"linkpath", LONG_NAME)]), link(b"l", b"d")]
        path += LONG_NAME + b"/"
    return tar(INNOCENT, *(members + list(last)))


def doubling_links(*last: bytes) -> bytes:
    """Thirty links, each of which leads twice through the one before: followed naively, a billion steps; and then `last`."""
    members = [folder(b"s/d/"), link(b"s/l0", b"d/../d")]
    members += [link(b"s/l%d" % index, b"l%d/../l%d" % (index - 1, index - 1)) for index in range(1, 31)]
    return tar(INNOCENT, *(members + list(last)))


TAR_LINKS = {
    "symlink-absolute": Case(absolute_symlink_alone, "leaves", "'a'"),
    "symlink-absolute-and-a-file-through-it": Case(absolute_symlink, "below", "'a/evil'"),
    "symlink-leaves": Case(after_innocent(link(b"d/a", b"../../x")), "leaves", "'d/a'"),
    "symlink-leaves-to-the-sentinel": Case(after_innocent(link(b"a", CLIMB + b"/sentinel/file")), "leaves", "'a'"),
    "symlink-leaves-and-returns": Case(after_innocent(link(b"a", b"../x/innocent")), "leaves", "'a'"),
    "symlink-is-dot-dot": Case(after_innocent(link(b"a", b"..")), "leaves", "'a'"),
    "symlink-leaves-by-a-symlink": Case(
        after_innocent(folder(b"d/e/"), link(b"d/e/up", b".."), link(b"x", b"d/e/up/../../y")), "leaves", "'x'"),
    "symlink-leaves-by-a-later-symlink": Case(
        after_innocent(link(b"x", b"d/e/up/../../y"), folder(b"d/e/"), link(b"d/e/up", b"..")), "leaves", "'x'"),
    "symlink-climbs-out-of-a-file": Case(after_innocent(entry(b"f", b"x"), link(b"a", b"f/../b")), "climbs", "'a'"),
    "symlink-climbs-out-of-nothing": Case(after_innocent(link(b"a", b"nothing/../b")), "climbs", "'a'"),
    "symlink-without-a-target": Case(after_innocent(link(b"a", b"")), "empty", "'a'"),
    "symlink-target-with-a-control-character": Case(after_innocent(link(b"a", b"b\x07")), "control", "'a'"),
    "symlink-target-with-a-backslash": Case(after_innocent(link(b"a", b"..\\b")), "backslash", "'a'"),
    "symlink-target-of-1100-bytes": Case(
        after_innocent(pax([(b"linkpath", b"./" * 550)]), link(b"a", b"b")), "too long", "'a'"),
    "symlink-target-over-4096-bytes-that-leaves": Case(
        after_innocent(gnu_long(b"./" * 2100 + b"../x", b"K"), link(b"a", b"b")), "too long", "'a'"),
    "symlink-with-data": Case(after_innocent(entry(b"a", b"x", b"2", b"b")), "has data", "'a'"),
    "symlink-chain-beyond-path-max-writes-a-file": Case(
        long_chain(link(b"escape", b"a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/" + b"../" * 20 + b"sentinel"),
                   entry(b"escape/evil", b"x")),
        "1024", LONG_NAME.decode()),
    "symlink-doubling-thirty-times-writes-a-file": Case(
        doubling_links(link(b"escape", b"s/l30/" + b"../" * 8 + b"sentinel"), entry(b"escape/evil", b"x")), "below",
        "'escape/evil'"),
    "symlink-doubling-thirty-times-climbs": Case(
        doubling_links(link(b"escape", b"s/l30/" + b"../" * 8 + b"sentinel/file")), "leaves|climbs", "'escape'"),
    "symlink-doubling-thirty-times-is-hard-linked": Case(
        doubling_links(link(b"escape", b"s/l30/../../../../sentinel/file"), hard_link(b"copy", b"escape")),
        "leaves|climbs", "'copy'"),
    "hard-link-to-a-symlink-that-leaves": Case(
        after_innocent(link(b"a", b"../a/x"), hard_link(b"d/b", b"a")), "leaves", "'a'"),
    "hard-link-absolute": Case(absolute_hard_link, "absolute", "'a'|sentinel/file"),
    "hard-link-climbs": Case(after_innocent(hard_link(b"a", CLIMB + b"/sentinel/file")), "climbs", "sentinel/file"),
    "hard-link-to-a-later-file": Case(after_innocent(hard_link(b"a", b"b"), entry(b"b", b"x")), "no earlier file", "'a'"),
    "hard-link-to-nothing": Case(after_innocent(hard_link(b"a", b"b")), "no earlier file", "'a'"),
    "hard-link-to-a-directory": Case(after_innocent(folder(b"b/"), hard_link(b"a", b"b")), "no earlier file", "'a'"),
    "hard-link-to-itself": Case(after_innocent(hard_link(b"a", b"a")), "no earlier file", "'a'"),
    "hard-link-without-a-target": Case(after_innocent(hard_link(b"a", b"")), "empty", "''|'a'"),
    "hard-link-through-a-symlink": Case(
        after_innocent(entry(b"d/f", b"x"), link(b"s", b"d"), hard_link(b"a", b"s/f")), "no earlier file", "'a'"),
    "hard-link-with-data": Case(after_innocent(entry(b"b", b"x"), entry(b"a", b"y", b"1", b"b")), "has data", "'a'"),
}

def sparse(*settings: bytes) -> bytes:
    """A sparse file as GNU tar's pax formats have it; in 1.0 the map stands before the data."""
    records = [(b"GNU.sparse." + key, value) for key, _, value in (setting.partition(b"=") for setting in settings)]
    return after_innocent(pax(records), entry(b"b", b"1\n0\n1\n".ljust(512, b"\0") + b"x"))


TAR_TYPES = {
    "character-device": Case(after_innocent(entry(b"a", flag=b"3")), "character device", "'a'"),
    "block-device": Case(after_innocent(entry(b"a", flag=b"4")), "block device", "'a'"),
    "fifo": Case(after_innocent(entry(b"a", flag=b"6")), "FIFO", "'a'"),
    "sparse-old-gnu": Case(after_innocent(entry(b"a", b"x", b"S", magic=b"ustar  \0")), "sparse", "'a'"),
    "sparse-pax-0.0": Case(sparse(b"size=99999999", b"numblocks=1", b"offset=0", b"numbytes=1"), "sparse", "'b'"),
    "sparse-pax-0.1": Case(sparse(b"map=0,1", b"size=99999999", b"name=a"), "sparse", "'b'"),
    "sparse-pax-1.0": Case(sparse(b"major=1", b"minor=0", b"name=a", b"realsize=99999999"), "sparse", "'b'"),
    "multi-volume-continuation": Case(after_innocent(entry(b"a", b"x", b"M")), "another volume", "'a'"),
    "volume-label": Case(after_innocent(entry(b"a", flag=b"V")), "volume label", "'a'"),
    "gnu-dump-directory": Case(after_innocent(entry(b"a/", b"Yb\0\0", b"D")), "incremental archive", "'a/'"),
    "solaris-extended-header": Case(after_innocent(entry(b"a", b"12 path=../b\n", b"X")), "extended header", "'a'"),
    "unknown-type": Case(after_innocent(entry(b"a", flag=b"Q")), "unknown type", "'a'"),
    "directory-with-data": Case(after_innocent(entry(b"a/", b"x", b"5")), "has data", "'a/'"),
    "fifo-with-data": Case(after_innocent(entry(b"a", b"x", b"6")), "FIFO", "'a'"),
    "pax-name-makes-a-file-a-directory": Case(
        after_innocent(pax([(b"path", b"a/")]), entry(b"a", b"x")), "has data|disagree", "'a/'"),
    "pax-target-makes-a-file-a-link": Case(
        after_innocent(pax([(b"linkpath", b"innocent")]), entry(b"a", b"x")), "target|disagree|link", "'a'"),
}

HUGE = b"\x80" + bytes(6) + b"\2" + bytes(4)  # 8 GiB in base-256

TAR_SIZES = {
    "size-negative-base-256": Case(after_innocent(header(b"a", size_field=b"\xff" * 12)), "negative", "'a'"),
    "size-negative-by-a-sign": Case(after_innocent(header(b"a", size_field=b"-0000000001\0")), "negative", "'a'"),
    "size-minus-one-header-loops": Case(
        after_innocent(header(b"a", size_field=b"\xff" * 10 + b"\xfe\x00") + entry(b"b", b"x")), "negative", "'a'"),
    "pax-header-of-negative-size": Case(
        after_innocent(header(b"p", size_field=b"\xff" * 12, flag=b"x"), entry(b"a")), "negative", "'p'"),
    "gnu-long-name-of-negative-size": Case(
        after_innocent(header(b"p", size_field=b"\xff" * 12, flag=b"L"), entry(b"a")), "negative", "'p'"),
    "size-with-an-underscore": Case(after_innocent(header(b"a", size_field=b"0_0000000001")), "unreadable", "'a'"),
    "size-with-a-decimal-digit": Case(after_innocent(header(b"a", size_field=b"00000000009\0")), "unreadable", "'a'"),
    "size-absurd": Case(after_innocent(header(b"a", size_field=b"\x80" + b"\x7f" * 11)), "absurd|max_file", "'a'"),
    "size-of-8-gib": Case(after_innocent(header(b"a", size_field=HUGE)), "max_file", "'a'"),
    "size-of-1-gib-that-is-not-there": Case(after_innocent(header(b"a", 1 << 30)), "middle of a member|max_ratio"),
    "mode-unreadable": Case(after_innocent(entry(b"a", b"x", mode_field=b"xyz\0\0\0\0\0")), "unreadable", "'a'"),
    "mode-negative": Case(after_innocent(entry(b"a", b"x", mode_field=b"\xff" * 8)), "negative", "'a'"),
    "pax-header-of-8-gib": Case(after_innocent(header(b"p", size_field=HUGE, flag=b"x")), "too large", "'p'"),
    "global-pax-header-of-8-gib": Case(after_innocent(header(b"p", size_field=HUGE, flag=b"g")), "too large", "'p'"),
    "gnu-long-name-of-8-gib": Case(after_innocent(header(b"p", size_field=HUGE, flag=b"L")), "too large", "'p'"),
    "gnu-long-target-of-8-gib": Case(after_innocent(header(b"p", size_field=HUGE, flag=b"K")), "too large", "'p'"),
    "pax-header-of-2-mib": Case(
        lambda sentinel: gzip.compress(after_innocent(pax([(b"comment", b"x" * (2 << 20))]), entry(b"a"))), "too large",
        "'pax'"),
    "pax-headers-of-40-before-one-member": Case(
        after_innocent(*([pax([(b"comment", b"x")])] * 40 + [entry(b"a", b"x")])), "too many", "'pax'"),
    "pax-size-disagrees": Case(after_innocent(pax([(b"size", b"5")]), entry(b"a", b"x")), "ustar header", "'a'"),
    "pax-size-negative": Case(after_innocent(pax([(b"size", b"-5")]), entry(b"a", b"x")), "unreadable", "'a'"),
    "pax-size-of-30-digits": Case(after_innocent(pax([(b"size", b"9" * 30)]), entry(b"a", b"x")), "unreadable", "'a'"),
    "pax-size-of-9-gib-over-a-small-file": Case(
        after_innocent(pax([(b"size", b"9663676416")]), entry(b"a", b"x")), "max_file|ustar header", "'a'"),
    "pax-size-for-a-directory": Case(
        after_innocent(pax([(b"size", b"9663676416")]), folder(b"a/")), "has data|ustar header", "'a/'"),
    "pax-record-too-long": Case(after_innocent(entry(b"p", b"99 path=x\n", b"x"), entry(b"a", b"x")), "malformed", "'a'"),
    "pax-record-too-short": Case(after_innocent(entry(b"p", b"5 path=x\n", b"x"), entry(b"a", b"x")), "malformed", "'a'"),
    "pax-record-of-length-0": Case(after_innocent(entry(b"p", b"0 path=x\n", b"x"), entry(b"a", b"x")), "malformed", "'a'"),
    "pax-record-of-negative-length": Case(
        after_innocent(entry(b"p", b"-9 path=x\n", b"x"), entry(b"a", b"x")), "malformed", "'a'"),
    "pax-record-without-its-newline": Case(
        after_innocent(entry(b"p", b"9 path=xy", b"x"), entry(b"a", b"x")), "malformed", "'a'"),
    "pax-record-without-a-key": Case(after_innocent(entry(b"p", b"6 =xy\n", b"x"), entry(b"a", b"x")), "malformed", "'a'"),
    "pax-name-twice": Case(after_innocent(pax([(b"path", b"a"), (b"path", b"b")]), entry(b"c", b"x")), "twice", "'c'"),
    "pax-name-in-two-headers": Case(
        after_innocent(pax([(b"path", b"a")]), pax([(b"path", b"b")]), entry(b"c", b"x")), "twice", "'c'"),
    "pax-and-gnu-names": Case(
        after_innocent(pax([(b"path", b"a")]), gnu_long(b"b"), entry(b"c", b"x")), "twice", "'c'"),
    "gnu-long-name-twice": Case(after_innocent(gnu_long(b"a"), gnu_long(b"b"), entry(b"c", b"x")), "twice", "'c'"),
    "global-pax-name": Case(after_innocent(pax([(b"path", b"a")], b"g"), entry(b"c", b"x")), "global", "'c'"),
    "global-pax-name-behind-all": Case(after_innocent(pax([(b"path", b"a")], b"g")), "global", "'pax'"),
    "global-pax-malformed-behind-all": Case(after_innocent(entry(b"p", b"99 x=y\n", b"g")), "malformed", "'p'"),
    "global-pax-size": Case(after_innocent(pax([(b"size", b"0")], b"g"), entry(b"c", b"x")), "global", "'c'"),
    "global-pax-target": Case(
        after_innocent(pax([(b"linkpath", b"/etc")], b"g"), link(b"c", b"innocent")), "global", "'c'"),
}


# -- tar: what is wrong with the archive -------------------------------------------

def cut(data: bytes, at: float) -> bytes:
    """The first part of an archive."""
    return data[:int(len(data) * at)]


NOISE = hashlib.sha512(b"noise").digest() * 400  # 25,600 bytes; its 64 bytes repeat, which no checksum minds
WHOLE = tar(INNOCENT, entry(b"a", NOISE), entry(b"b", NOISE))
AT_A = len(INNOCENT)


def xz_with_dictionary(code: int) -> bytes:
    """An xz stream whose block header claims a dictionary (40 is 4 GiB - 1, 30 is 128 MiB), its CRC mended."""
    data = bytearray(lzma.compress(WHOLE, check=lzma.CHECK_NONE))
    data[data.index(b"\x21\x01") + 2] = code
    size = (data[12] + 1) * 4
    data[12 + size - 4:12 + size] = struct.pack("<I", zlib.crc32(bytes(data[12:12 + size - 4])))
    return bytes(data)


def xz_with_index(claimed_bytes: int) -> bytes:
    """An xz stream whose index claims another size; what is wrong with it stands at its very end."""
    data = lzma.compress(WHOLE, check=lzma.CHECK_CRC32)
    index_bytes = (struct.unpack("<I", data[-8:-4])[0] + 1) * 4
    blocks = data[12:-12 - index_bytes]
    padding = -len(blocks) % 4
    index = b"\0" + xz_number(1) + xz_number(unpadded(data, index_bytes)) + xz_number(claimed_bytes)
    index += bytes(-len(index) % 4)
    index += struct.pack("<I", zlib.crc32(index))
    tail = struct.pack("<I", len(index) // 4 - 1) + data[-4:-2]
    return data[:12] + blocks + bytes(padding) + index + struct.pack("<I", zlib.crc32(tail)) + tail + b"YZ"


def unpadded(data: bytes, index_bytes: int) -> int:
    """The unpadded size that an xz stream's index has for its only block."""
    value = shift = 0
    for byte in data[-12 - index_bytes + 2:]:
        value |= (byte & 0x7f) << shift
        shift += 7
        if byte < 0x80:
            return value
    raise ValueError("no number")


def flipped(data: bytes, at: int, bits: int = 0xff) -> bytes:
    """The bytes with some bits of one of them turned."""
    at %= len(data)
    return patched(data, at, bytes([data[at] ^ bits]))


TAR_DAMAGE = {
    "checksum-wrong": Case(tar(INNOCENT, header(b"b", checksum=b"000001\0 ")), "checksum", "'b'"),
    "checksum-empty": Case(tar(INNOCENT, header(b"b", checksum=bytes(8))), "checksum", "'b'"),
    "checksum-negative": Case(tar(INNOCENT, header(b"b", checksum=b"-00001\0 ")), "checksum", "'b'"),
    "header-changed-after-its-checksum": Case(patched(WHOLE, AT_A, b"../x"), "checksum", "'../x'"),
    "end-missing": Case(tar(INNOCENT, entry(b"a", b"x"), end=0), "end-of-archive"),
    "members-after-one-zero-block": Case(tar(INNOCENT, bytes(512), entry(b"../evil", b"x")), "single end-of-archive"),
    "cut-in-a-header": Case(WHOLE[:AT_A + 100], "middle of a member"),
    "cut-after-a-header": Case(WHOLE[:AT_A + 512], "middle of a member"),
    "cut-in-the-data": Case(WHOLE[:AT_A + 20000], "middle of a member"),
    "cut-in-the-padding": Case(tar(INNOCENT, entry(b"a", b"x"))[:AT_A + 600], "middle of a member"),
    "cut-between-members": Case(WHOLE[:AT_A + 512 + len(NOISE)], "end-of-archive"),
    "cut-in-a-pax-header": Case(tar(INNOCENT, pax([(b"path", b"p" * 900)]), entry(b"a"))[:AT_A + 900], "middle of a member"),
    "cut-after-a-pax-header": Case(tar(INNOCENT, pax([(b"path", b"p")]), end=0), "end-of-archive"),
    "end-after-a-pax-header": Case(tar(INNOCENT, pax([(b"path", b"p")])), "end-of-archive|header"),
    "end-after-a-gnu-long-name": Case(tar(INNOCENT, gnu_long(b"p")), "end-of-archive|header"),
    "only-the-top": Case(tar(folder(b"./")), "holds nothing"),
    "only-a-global-header": Case(tar(pax([(b"comment", b"x")], b"g")), "holds nothing"),
    "gz-cut": Case(cut(gzip.compress(WHOLE), 0.6), "too early"),
    "gz-without-its-trailer": Case(gzip.compress(WHOLE)[:-8], "too early"),
    "gz-with-a-wrong-crc": Case(flipped(gzip.compress(WHOLE), -8), "check"),
    "gz-with-a-wrong-length": Case(flipped(gzip.compress(WHOLE), -4, 1), "check"),
    "gz-with-garbage-behind": Case(gzip.compress(WHOLE) + b"garbage", "damaged"),
    "gz-of-an-unknown-method": Case(patched(gzip.compress(WHOLE), 2, b"\7"), "unknown format"),
    "gz-of-nothing": Case(gzip.compress(b""), "no tar"),
    "gz-of-text": Case(gzip.compress(b"hello\n" * 200), "no tar"),
    "gz-of-gz": Case(gzip.compress(gzip.compress(os.urandom(9999))), "a tar.gz and no tar"),
    "gz-header-flags-without-an-end": Case(b"\x1f\x8b\x08\x18" + bytes(6) + b"n" * 5000, "too early"),
    "bz2-cut": Case(cut(bz2.compress(WHOLE), 0.6), "too early"),
    "bz2-damaged": Case(flipped(bz2.compress(WHOLE), 60), "damaged"),
    "xz-cut": Case(cut(lzma.compress(WHOLE), 0.6), "too early|end of input"),
    "xz-damaged": Case(flipped(lzma.compress(WHOLE), 60), "damaged"),
    "xz-dictionary-of-4-gib": Case(xz_with_dictionary(40), "(?i)memory"),
    "xz-dictionary-of-192-mib": Case(xz_with_dictionary(31), "(?i)memory"),
    "xz-within-xz-dictionaries": Case(lzma.compress(b"") + xz_with_dictionary(40), "(?i)memory"),
    "xz-index-of-2-to-the-62": Case(xz_with_index(1 << 62), "damaged"),
    "xz-index-of-40-tib": Case(xz_with_index(40 << 40), "damaged"),
    "zst-cut": Case(lambda sentinel: cut(zstd(WHOLE), 0.6), "damaged"),
    "zst-damaged": Case(lambda sentinel: flipped(zstd(WHOLE, "--check"), -3), "damaged"),
    "zst-window-of-2-gib": Case(
        lambda sentinel: patched(zstd(WHOLE, "--no-check", "--no-content-size"), 4, b"\x04\xa8"), "memory|damaged"),
    "zst-bomb": Case(lambda sentinel: zstd(tar(INNOCENT)) + zstd(bytes(1 << 26)) * 17, "max_ratio"),
    "two-archives-of-one-name": Case(
        gzip.compress(tar(INNOCENT, end=512)) + gzip.compress(tar(INNOCENT)), "single end-of-archive"),
}


# -- tar: what costs too much --------------------------------------------------------

def bomb(compression: str, size: int = 2 << 30) -> Callable[[bytes], bytes]:
    """One file of zeros, as much of it as is looked at."""
    def make(sentinel: bytes) -> bytes:
        encoder = {"gz": lambda: zlib.compressobj(9, zlib.DEFLATED, 31), "bz2": bz2.BZ2Compressor,
                   "xz": lambda: lzma.LZMACompressor(preset=1)}
        stream = encoder[compression]()  # type: Any
        pieces = [stream.compress(INNOCENT + header(b"a", size))]
        pieces += [stream.compress(bytes(1 << 20)) for _ in range(min(64, size >> 20))]
        return b"".join(pieces) + stream.compress(bytes(1024)) + stream.flush()
    return make


def links_to(size: int, number: int, data: bytes = b"") -> bytes:
    """One file and many hard links to it, which become as many copies."""
    return tar(INNOCENT, entry(b"a", data or bytes(size)), *[hard_link(b"l%d" % index, b"a") for index in range(number)])


def many_extensions(one: bytes, number: int) -> bytes:
    """Members that each come behind 15 extension headers; gzip streams repeat, so that it is quickly written."""
    chunk = gzip.compress(one * 15, 1)
    return gzip.compress(INNOCENT) + b"".join(
        chunk + gzip.compress(entry(b"m%d" % index), 1) for index in range(number)) + gzip.compress(bytes(1024))


def large_comment(size: int) -> bytes:
    """A pax header that says nothing, at length, and does not compress so well that its ratio stands out."""
    quarter = hashlib.sha512(b"comment").hexdigest().encode() * (size // 512)
    noise = os.urandom(size // 100).hex().encode()
    return pax([(b"comment", (noise + quarter * 4)[:size])])


def quine_of_streams(number: int) -> bytes:
    """Empty gzip streams, one after the other."""
    return gzip.compress(INNOCENT) + gzip.compress(b"") * number


TAR_COSTS = {
    "gz-bomb": Case(bomb("gz"), "max_ratio"),
    "bz2-bomb": Case(bomb("bz2"), "max_ratio"),
    "xz-bomb": Case(bomb("xz"), "max_ratio"),
    "gz-bomb-against-max-expanded": Case(bomb("gz", 64 << 20), "max_expanded", "", ("--set", "limits.max_expanded=32M")),
    "gz-bomb-against-max-file": Case(bomb("gz", 64 << 20), "max_file", "'a'", ("--set", "limits.max_file=32M")),
    "gz-bomb-behind-the-end": Case(
        lambda sentinel: gzip.compress(tar(INNOCENT)) + gzip.compress(bytes(16 << 20)) * 80, "max_ratio"),
    "gz-300000-empty-streams": Case(lambda sentinel: quine_of_streams(300000), "streams"),
    "hard-link-bomb-against-max-expanded": Case(
        links_to(1 << 20, 100), "max_expanded", "'l", ("--set", "limits.max_expanded=8M")),
    "hard-link-bomb-in-a-plain-tar": Case(
        lambda sentinel: links_to(1 << 19, 800), "max_expanded", "'l", ("--set", "limits.max_expanded=8M")),
    "hard-link-bomb-against-max-ratio": Case(
        lambda sentinel: gzip.compress(links_to(1 << 28, 9), 1), "max_ratio", "'l"),
    "hard-link-bomb-of-links-to-links": Case(
        lambda sentinel: gzip.compress(tar(INNOCENT, entry(b"l0", bytes(1 << 19)), *[
            hard_link(b"l%d" % (index + 1), b"l%d" % index) for index in range(800)])), "max_expanded", "'l",
        ("--set", "limits.max_expanded=8M")),
    "hard-link-bomb-in-xz": Case(
        lambda sentinel: lzma.compress(links_to(1 << 19, 800)), "max_expanded", "'l", ("--set", "limits.max_expanded=8M")),
    "pax-headers-of-1-mib-by-the-thousand": Case(
        lambda sentinel: many_extensions(large_comment((1 << 20) - 600), 70), "too large", "'pax'",
        ("--set", "limits.max_ratio=0")),
    "global-pax-headers-of-1-mib-by-the-thousand": Case(
        lambda sentinel: many_extensions(pax([(b"comment", b"n" * ((1 << 20) - 600))], b"g"), 70), "too large", "'pax'",
        ("--set", "limits.max_ratio=0")),
    "members-beyond-max-files": Case(
        after_innocent(*[entry(b"f%d" % index) for index in range(50)]), "max_files", "'f",
        ("--set", "limits.max_files=20")),
    "implied-directories-beyond-max-files": Case(
        after_innocent(entry(b"/".join([b"d"] * 40), b"x")), "max_files", "'d/", ("--set", "limits.max_files=20")),
    "directories-repeated-beyond-max-files": Case(
        after_innocent(*([folder(b"d/")] * 50)), "max_files", "'d/'", ("--set", "limits.max_files=20")),
    "artifact-beyond-max-artifact": Case(WHOLE, "max_artifact", "", ("--set", "limits.max_artifact=1k")),
    "symlinks-refused-by-setting": Case(
        after_innocent(link(b"a", b"innocent")), "symlinks = refuse", "'a'", ("--set", "artifact.symlinks=refuse")),
    "symlinks-that-double-at-each-step": Case(
        after_innocent(folder(b"d/"), link(b"l0", b"d"), *[
            link(b"l%d" % index, b"l%d/../l%d/.." % (index - 1, index - 1)) for index in range(1, 60)]),
            "leaves|climbs|far|follow", "'l"),
}


# -- zip -------------------------------------------------------------------------------

PLAIN = b"plain text\n" * 9
NEXT = RawEntry(b"next", b"after")
DESCRIBED = {"flags": 0x808}


def innocent() -> RawEntry:
    """An entry that is well."""
    return RawEntry(b"innocent", b"fine")


def zipped(*entries: RawEntry, **ends: Any) -> bytes:
    """A zip of a harmless entry and others."""
    return raw_zip((innocent(),) + entries, **ends)


def named(name: bytes, **fields: Any) -> bytes:
    """A zip with one more entry of that name."""
    return zipped(RawEntry(name, b"x", **fields))


def disagreeing(where: str = "central", **fields: Any) -> bytes:
    """A zip with an entry whose local and central headers differ."""
    return zipped(RawEntry(b"a", PLAIN, 8).but(where, **fields), RawEntry(b"b", PLAIN))


def descriptor(data: bytes, *lies: int) -> bytes:
    """A data descriptor with CRC-32 and sizes; each lie is added to one of them."""
    values = [zlib.crc32(data) & 0xffffffff, len(data), len(data)]
    return b"PK\7\x08" + struct.pack("<III", *[value + lie for value, lie in zip(values, list(lies) + [0, 0, 0])])


def with_descriptor(*lies: int, **fields: int) -> bytes:
    """A zip with an entry whose sizes come after its data."""
    late = dict({"crc": 0, "packed": 0, "size": 0}, **fields)
    return zipped(RawEntry(b"a", PLAIN, **DESCRIBED).but("local", **late).followed_by(descriptor(PLAIN, *lies)), NEXT)


def hidden_first() -> bytes:
    """A zip whose first local entry the central directory does not list."""
    hidden, shown = RawEntry(b"../evil", b"x").local_bytes(), RawEntry(b"a", b"x")
    body, central = hidden + shown.local_bytes(), shown.central_bytes(len(hidden))
    return body + central + zip_end(1, len(central), len(body))


def quoted_overlap(number: int) -> bytes:
    """Entries whose data quote the local headers of those after them, down to one kernel that all share."""
    kernel = RawEntry(b"k", bytes(1 << 20), 8)
    entries, data, raw, local = [kernel], bytes(1 << 20), kernel.raw, kernel.local_bytes()
    for index in range(number):
        # A stored deflate block, which is not the last one, holds the next local header; what follows it is shared.
        quoted = local[:len(local) - len(raw)]
        raw = b"\0" + struct.pack("<HH", len(quoted), len(quoted) ^ 0xffff) + local
        data = quoted + data
        entries.insert(0, RawEntry(b"e%d" % index, data, 8, raw=raw))
        local = entries[0].local_bytes()
    central = b"".join(item.central_bytes(len(local) - len(item.local_bytes())) for item in entries)
    return local + central + zip_end(len(entries), len(central), len(local))


def same_data(number: int) -> bytes:
    """Many central entries for one local entry."""
    item = RawEntry(b"a", bytes(100000), 8)
    central = b"".join(RawEntry(b"a%d" % index, bytes(100000), 8).central_bytes(0) for index in range(number))
    body = item.local_bytes()
    return body + central + zip_end(number, len(central), len(body))


def bloated_central(number: int) -> bytes:
    """A zip that is nothing but central headers, all of them for one empty local entry."""
    item = RawEntry(b"a")
    body, central = item.local_bytes(), item.central_bytes(0) * number
    return body + central + zip64_end(number, len(central), len(body)) + zip_end(0xffff, len(central), len(body))


def zip64_extra(*values: int) -> bytes:
    """The zip64 extra field."""
    return struct.pack("<HH", 1, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


FULL = 0xffffffff
ONE_ZIP = raw_zip([RawEntry(b"a", PLAIN, 8)])

ZIP_NAMES = {
    "zip-name-absolute": Case(lambda sentinel: named(sentinel + b"/evil"), "absolute", "/sentinel/evil"),
    "zip-name-climbs": Case(named(CLIMB + b"/sentinel/evil"), "climbs", "sentinel/evil"),
    "zip-name-climbs-from-below": Case(named(b"a/../../evil"), "climbs", "a/../../evil"),
    "zip-name-empty": Case(named(b""), "empty", "''"),
    "zip-name-with-a-nul": Case(named(b"a\0b"), "control", r"a\x00b"),
    "zip-name-with-a-control-character": Case(named(b"a\x1bb"), "control", r"a\x1bb"),
    "zip-name-with-a-backslash": Case(named(b"a\\b"), "backslash", r"a\\b"),
    "zip-name-of-a-windows-drive": Case(named(b"C:\\evil"), "backslash", r"C:\\evil"),
    "zip-component-of-256-bytes": Case(named(b"n" * 256), "255", "n" * 256),
    "zip-path-of-1205-bytes": Case(named(b"/".join([b"n" * 200] * 6)), "1024", "n" * 200),
    "zip-path-of-65-levels": Case(named(b"/".join([b"n"] * 65)), "64", "n/n/n"),
    "zip-file-twice": Case(zipped(RawEntry(b"a", b"x"), RawEntry(b"a", b"y")), "twice", "'a'"),
    "zip-file-twice-once-behind-a-dot": Case(zipped(RawEntry(b"a", b"x"), RawEntry(b"./a", b"y")), "twice", "'./a'"),
    "zip-file-twice-in-two-encodings": Case(
        zipped(RawEntry("\u00e9".encode(), b"x"), RawEntry(b"\x82", b"y", flags=0).but("central", system=0)), "twice",
        "'\u00e9'"),
    "zip-file-over-a-directory": Case(zipped(RawEntry(b"a/b", b"x"), RawEntry(b"a", b"y")), "directory already", "'a'"),
    "zip-file-below-a-file": Case(zipped(RawEntry(b"a", b"x"), RawEntry(b"a/b", b"y")), "below", "'a/b'"),
    "zip-file-below-a-symlink": Case(
        zipped(RawEntry(b"a", CLIMB + b"/sentinel", mode=0o120777), RawEntry(b"a/evil", b"y")), "below", "'a/evil'"),
    "zip-symlink-absolute": Case(
        lambda sentinel: zipped(RawEntry(b"l", sentinel + b"/file", mode=0o120777)), "leaves", "'l'"),
    "zip-symlink-leaves": Case(zipped(RawEntry(b"l", b"../../x", mode=0o120777)), "leaves", "'l'"),
    "zip-symlink-without-a-target": Case(zipped(RawEntry(b"l", b"", mode=0o120777)), "empty", "'l'"),
    "zip-symlink-of-2000-bytes": Case(zipped(RawEntry(b"l", b"./" * 1000, mode=0o120777)), "too long", "'l'"),
    "zip-device": Case(zipped(RawEntry(b"d", mode=0o020644)), "character device", "'d'"),
    "zip-fifo": Case(zipped(RawEntry(b"d", mode=0o010644)), "FIFO", "'d'"),
    "zip-socket": Case(zipped(RawEntry(b"d", mode=0o140644)), "socket", "'d'"),
    "zip-directory-with-data": Case(zipped(RawEntry(b"d/", b"data", mode=0o040755)), "has data", "'d/'"),
    "zip-directory-name-of-a-symlink": Case(zipped(RawEntry(b"d/", b"x", mode=0o120777)), "disagree", "'d/'"),
    "zip-file-name-of-a-directory": Case(zipped(RawEntry(b"d", mode=0o040755)), "disagree", "'d'"),
}

ZIP_HEADERS = {
    "zip-local-name-differs": Case(disagreeing(name=b"A"), "disagree", "'A'"),
    "zip-local-name-climbs": Case(disagreeing("local", name=b"../b"), "disagree", "'a'"),
    "zip-local-utf8-flag-differs": Case(disagreeing("local", flags=0), "disagree", "'a'"),
    "zip-local-descriptor-flag-differs": Case(disagreeing("local", flags=0x808), "disagree", "'a'"),
    "zip-local-encrypted-flag-differs": Case(disagreeing("local", flags=0x801), "disagree", "'a'"),
    "zip-local-method-differs": Case(disagreeing("local", method=0), "disagree", "'a'"),
    "zip-local-crc-differs": Case(disagreeing("local", crc=1), "disagree", "'a'"),
    "zip-local-packed-size-differs": Case(disagreeing("local", packed=5), "disagree", "'a'"),
    "zip-local-size-differs": Case(disagreeing("local", size=5), "disagree", "'a'"),
    "zip-local-name-length-differs": Case(disagreeing("local", name_length=0), "disagree", "'a'"),
    "zip-local-extra-length-swallows-data": Case(
        disagreeing("local", extra_length=4), "damaged|disagree|announced|end", "'a'"),
    "zip-central-crc-wrong-in-both": Case(zipped(RawEntry(b"a", PLAIN, crc=1)), "checksum", "'a'"),
    "zip-size-too-small-in-both": Case(zipped(RawEntry(b"a", PLAIN, 8, size=9)), "size or checksum", "'a'"),
    "zip-size-too-large-in-both": Case(zipped(RawEntry(b"a", PLAIN, 8, size=1 << 20)), "size or checksum", "'a'"),
    "zip-stored-size-differs-from-packed": Case(zipped(RawEntry(b"a", PLAIN, size=9)), "size or checksum", "'a'"),
    "zip-packed-size-too-small-in-both": Case(zipped(RawEntry(b"a", PLAIN, 8, packed=5)), "end|damaged|hidden", "'a'"),
    "zip-packed-size-too-large-in-both": Case(zipped(RawEntry(b"a", PLAIN, 8, packed=500)), "end|damaged", "'a'|middle"),
    "zip-packed-size-of-4-gib": Case(
        zipped(RawEntry(b"a", PLAIN, packed=FULL - 1, size=FULL - 1)), "middle|max_file", "'a'|middle"),
    "zip-deflate-garbage": Case(zipped(RawEntry(b"a", PLAIN, 8, raw=b"\xff" * 50)), "damaged", "'a'"),
    "zip-deflate-with-a-tail": Case(
        zipped(RawEntry(b"a", PLAIN, 8, raw=RawEntry(b"a", PLAIN, 8).raw + b"tail")), "end where", "'a'"),
    "zip-deflate-cut": Case(
        zipped(RawEntry(b"a", PLAIN, 8, raw=RawEntry(b"a", PLAIN, 8).raw[:-2])), "announced|end where", "'a'"),
    "zip-encrypted": Case(zipped(RawEntry(b"a", PLAIN, flags=0x801)), "encrypted", "'a'"),
    "zip-strongly-encrypted": Case(zipped(RawEntry(b"a", PLAIN, flags=0x841)), "encrypted", "'a'"),
    "zip-encrypted-central-directory": Case(zipped(RawEntry(b"a", PLAIN, flags=0x2800)), "encrypted", "'a'"),
    "zip-aes": Case(zipped(RawEntry(b"a", PLAIN, 99)), "method 99", "'a'"),
    "zip-bzip2": Case(zipped(RawEntry(b"a", PLAIN, 12)), "method 12", "'a'"),
    "zip-lzma": Case(zipped(RawEntry(b"a", PLAIN, 14)), "method 14", "'a'"),
    "zip-zstd": Case(zipped(RawEntry(b"a", PLAIN, 93)), "method 93", "'a'"),
    "zip-unknown-method": Case(zipped(RawEntry(b"a", PLAIN, 77)), "method 77", "'a'"),
    "zip-offset-of-another-entry": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", offset=0), NEXT), "overlap|disagree", "'a'|'innocent'"),
    "zip-offset-into-data": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", offset=50), NEXT), "overlap|local header", "'a'|'innocent'"),
    "zip-offset-beyond-the-end": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", offset=FULL - 1)), "hidden|middle", "'a'|'innocent'"),
    "zip-descriptor-crc-differs": Case(with_descriptor(1), "hidden|overlap", "'a'"),
    "zip-descriptor-packed-size-differs": Case(with_descriptor(0, 1), "hidden|overlap", "'a'"),
    "zip-descriptor-size-differs": Case(with_descriptor(0, 0, 1), "hidden|overlap", "'a'"),
    "zip-described-later-and-lying-before": Case(with_descriptor(size=3), "disagree", "'a'"),
    "zip-gap-before-the-first-entry": Case(hidden_first(), "hidden", "''"),
    "zip-gap-between-entries": Case(zipped(RawEntry(b"a", PLAIN).followed_by(b"hidden"), NEXT), "hidden", "'a'"),
    "zip-gap-before-the-central-directory": Case(zipped(NEXT, gap=b"hidden"), "hidden", "'next'"),
    "zip-local-entry-that-is-not-listed": Case(
        zipped(NEXT, gap=RawEntry(b"../evil", b"x").local_bytes()), "hidden", "'next'"),
}

ZIP_STRUCTURE = {
    "zip-cut-in-the-end-record": Case(ONE_ZIP[:-10], "missing"),
    "zip-cut-in-the-central-directory": Case(ONE_ZIP[:-40], "missing"),
    "zip-cut-in-the-data": Case(ONE_ZIP[:40], "missing"),
    "zip-of-one-local-header": Case(RawEntry(b"a", PLAIN).local_bytes(), "missing"),
    "zip-with-garbage-behind": Case(ONE_ZIP + b"garbage", "7 bytes .* lie behind"),
    "zip-with-garbage-before": Case(b"PK\3\4" + ONE_ZIP, "where it should be"),
    "zip-two-end-records": Case(zipped(end={"comment": zip_end(0, 0, 0)}), "ambiguous"),
    "zip-two-archives": Case(ONE_ZIP + zipped(NEXT), "where it should be"),
    "zip-comment-holds-a-zip": Case(zipped(end={"comment": ONE_ZIP}), "ambiguous"),
    "zip-empty": Case(raw_zip([]), "holds nothing"),
    "zip-over-several-disks": Case(zipped(end={"disk": 1}), "disks"),
    "zip-central-directory-on-another-disk": Case(zipped(end={"first_disk": 1}), "disks"),
    "zip-entry-on-another-disk": Case(zipped(RawEntry(b"a", b"x").but("central", disk=1)), "malformed"),
    "zip-counts-that-differ": Case(zipped(end={"here": 5}), "disks"),
    "zip-count-too-large": Case(zipped(end={"here": 2, "total": 2}), "entries|too large"),
    "zip-count-too-small": Case(zipped(NEXT, end={"here": 1, "total": 1}), "entries"),
    "zip-count-of-65534": Case(zipped(end={"here": 65534, "total": 65534}), "too large"),
    "zip-central-size-too-small": Case(zipped(end={"size": 46}), "where it should be"),
    "zip-central-start-wrong": Case(zipped(end={"start": 3}), "where it should be"),
    "zip-central-name-runs-over": Case(zipped(RawEntry(b"a", b"x").but("central", name_length=9999)), "malformed"),
    "zip-central-comment-hides-an-entry": Case(
        zipped(RawEntry(b"a", b"x").but("central", comment_length=51), NEXT), "entries|malformed"),
    "zip-central-signature-wrong": Case(patched(ONE_ZIP, ONE_ZIP.index(b"PK\1\2"), b"PK\1\3"), "malformed"),
    "zip64-extra-missing": Case(zipped(RawEntry(b"a", PLAIN, size=FULL)), "zip64", "'a'"),
    "zip64-extra-cut": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", size=FULL, packed=FULL, extra=zip64_extra(len(PLAIN)))), "zip64", "'a'"),
    "zip64-extra-only-central": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", size=FULL, extra=zip64_extra(len(PLAIN) + 1))), "disagree", "'a'"),
    "zip64-local-extra-differs": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", size=FULL, extra=zip64_extra(len(PLAIN)))
               .but("local", size=FULL, extra=zip64_extra(5))), "disagree", "'a'"),
    "zip64-size-of-2-to-the-63": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", size=FULL, extra=zip64_extra(1 << 63))
               .but("local", size=FULL, extra=zip64_extra(1 << 63))), "max_expanded"),
    "zip64-packed-size-of-2-to-the-63": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", packed=FULL, extra=zip64_extra(1 << 63))
               .but("local", packed=FULL, extra=zip64_extra(1 << 63))), "middle|size", "'a'|middle"),
    "zip64-offset-of-2-to-the-63": Case(
        zipped(RawEntry(b"a", PLAIN).but("central", offset=FULL, extra=zip64_extra(1 << 63))), "hidden|overlap",
        "'innocent'|'a'"),
    "zip64-end-disagrees": Case(zipped(end64={"total": 3, "here": 3}), "disagree"),
    "zip64-end-of-another-directory": Case(zipped(end64={"start": 0}), "disagree"),
    "zip64-locator-points-nowhere": Case(zipped(end64={"at": 1 << 63}), "nowhere"),
    "zip64-locator-points-elsewhere": Case(zipped(end64={"at": 0}), "where it should be"),
    "zip64-record-too-large": Case(zipped(end64={"record": 1 << 62}), "where it should be"),
    "zip64-locator-of-several-disks": Case(zipped(end64={"disks": 2}), "nowhere"),
    "zip64-count-of-2-to-the-63": Case(
        zipped(end64={"total": 1 << 63, "here": 1 << 63}, end={"total": 0xffff, "here": 0xffff}), "too large"),
    "zip64-central-start-of-2-to-the-63": Case(zipped(end64={"start": 1 << 63}, end={"start": FULL}), "where it should be"),
}

ZIP_COSTS = {
    "zip-bomb": Case(lambda sentinel: zipped(RawEntry(b"a", bytes(1 << 20), 8, size=2 << 30)), "max_ratio"),
    "zip-bomb-that-understates-its-size": Case(
        lambda sentinel: zipped(RawEntry(b"a", bytes(64 << 20), 8, size=1000)), "size or checksum", "'a'"),
    "zip-bomb-against-max-file": Case(
        lambda sentinel: zipped(RawEntry(b"a", bytes(64 << 20), 8)), "max_file|max_ratio", "",
        ("--set", "limits.max_file=32M")),
    "zip-quoted-overlap-bomb": Case(quoted_overlap(50), "overlap|hidden|end where", "'e|'k'"),
    "zip-all-entries-share-their-data": Case(same_data(500), "overlap|disagree", "'a"),
    "zip-entries-beyond-max-files": Case(
        raw_zip([RawEntry(b"f%d" % index) for index in range(50)]), "max_files", "", ("--set", "limits.max_files=20")),
    "zip-1400000-central-headers": Case(lambda sentinel: bloated_central(1400000), "max_files|overlap|too large"),
    "zip-central-directory-of-80-mib": Case(lambda sentinel: bloated_central(1790000), "too large"),
}

TABLES = (TAR_NAMES, TAR_CLASHES, TAR_LINKS, TAR_TYPES, TAR_SIZES, TAR_DAMAGE, TAR_COSTS,
          ZIP_NAMES, ZIP_HEADERS, ZIP_STRUCTURE, ZIP_COSTS)
HOSTILE = {name: case for table in TABLES for name, case in table.items()}

# Told by its first bytes a stream is unpacked before its members are judged: these go through it as well.
COMPRESSED = {
    "tar.gz": ("name-climbs-to-the-sentinel", "name-absolute", "file-below-a-symlink-to-the-outside",
               "symlink-leaves-to-the-sentinel", "hard-link-absolute", "size-negative-base-256", "size-minus-one-header-loops",
               "size-of-8-gib", "pax-header-of-8-gib", "symlink-doubling-thirty-times-climbs",
               "members-after-one-zero-block", "end-missing"),
    "tar.bz2": ("name-climbs-to-the-sentinel", "size-negative-base-256", "pax-header-of-8-gib"),
    "tar.xz": ("name-climbs-to-the-sentinel", "size-negative-base-256", "pax-header-of-8-gib"),
    "tar.zst": ("name-climbs-to-the-sentinel", "size-negative-base-256", "pax-header-of-8-gib", "cut-in-the-data"),
}


# -- running one ---------------------------------------------------------------------------

# A small process of its own starts the program: what a process has used, its child is told to have used as well
# (execve keeps the larger of both), and pytest has used much.
LAUNCHER = """
import json, os, resource, sys
limit, report, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
child = os.fork()
if not child:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.execv(argv[0], argv)
_, status, usage = os.wait4(child, 0)
with open(report, "w") as stream:
    json.dump({"status": status, "seconds": usage.ru_utime + usage.ru_stime, "bytes": usage.ru_maxrss << 10}, stream)
"""


class Cost(NamedTuple):
    """What a run took: processor time, which a busy host does not stretch, and memory at its peak."""

    seconds: float
    memory_bytes: int


def run_forked(argv: List[str], directory: Path) -> Tuple[Result, Cost]:
    """Run a command line in a fork of a Python that has deploy.py loaded."""
    place = {"env": clean_environment(), "cwd": str(directory)}
    result = warm().run_argv(argv, place, timeout=PATIENCE_SECONDS, address_space_bytes=ADDRESS_SPACE_BYTES)
    milliseconds, kibibytes = warm().cost
    return result, Cost(milliseconds / 1000, kibibytes << 10)


def run_measured(argv: List[str], directory: Path) -> Tuple[Result, Cost]:
    """Run a command line in a process of its own."""
    report = directory / "report"
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(ADDRESS_SPACE_BYTES), str(report)]
    process = subprocess.Popen(
        launcher + argv, env=clean_environment(), cwd=str(directory), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        texts = [text.decode("utf-8", "surrogateescape") for text in process.communicate(timeout=PATIENCE_SECONDS)]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"still running after {PATIENCE_SECONDS:.0f} s, killed", pytrace=False)
    found = json.loads(report.read_text())
    code = os.WEXITSTATUS(found["status"]) if os.WIFEXITED(found["status"]) else -os.WTERMSIG(found["status"])
    return Result(argv, code, texts[0], texts[1], None), Cost(found["seconds"], found["bytes"])


class Site:
    """A root with a live release, a sentinel beside it, and what both hold."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root, self.sentinel = directory / "site" / "root", directory / "site" / "sentinel"
        self.incoming = directory / "incoming"
        self.make()

    def make(self) -> None:
        """Make it as it is before anything hostile came near."""
        shutil.rmtree(str(self.directory))
        self.root.mkdir(parents=True)
        self.incoming.mkdir()
        make_tree(self.sentinel, {"file": "untouched\n", "directory/file": "untouched\n"})
        (self.sentinel / "link").symlink_to("file")
        os.chmod(str(self.sentinel / "file"), 0o640)
        os.chmod(str(self.sentinel / "directory"), 0o750)
        for path in [self.sentinel / "file", self.sentinel / "directory", self.sentinel]:
            os.utime(str(path), (1500000000, 1500000000))
        run_deploy("deploy", make_artifact(self.incoming, "0.9.0"), root=self.root, check=0)

    def state(self) -> Dict[str, Any]:
        """Everything there is, but for what every run writes: the history, the lock, the staging's own place."""
        found = snapshot(self.directory / "site")  # type: Dict[str, Any]
        for name in [name for name in found if name.startswith(("root/.deploy/history.", "root/.deploy/lock"))]:
            del found[name]
        for name in ("root/.deploy", "root/releases"):
            found[name] = found[name][:2]
        return found

    def staging(self) -> List[str]:
        """What a run has left unfinished."""
        return [path.name for path in (self.root / "releases").glob(".new-*")]

    def stage(self, data: bytes, *options: str) -> Tuple[Result, Cost]:
        """Stage an archive with its own SHA-256, and measure."""
        path = self.incoming / "app-1.0.bin"
        path.write_bytes(data)
        argv = deploy_argv("stage", path, "--sha256", hashlib.sha256(data).hexdigest(), *options, root=self.root)
        result, cost = (run_forked if WARM else run_measured)(argv, self.incoming)
        assert "Traceback" not in result.stdout + result.stderr, result.describe()
        return result._replace(data=decode_one_object(result)), cost


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: Any) -> Site:
    """One site for all: making one takes longer than refusing an archive."""
    return Site(Path(str(tmp_path_factory.mktemp("hostile"))))


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """The site; made again after a case that has changed it."""
    before = shared_site.state()
    yield shared_site
    if shared_site.state() != before:
        shared_site.make()


def build(case: Case, site: Site) -> bytes:
    """A case's bytes."""
    return case.archive if isinstance(case.archive, bytes) else case.archive(os.fsencode(str(site.sentinel)))


def assert_refused(site: Site, data: bytes, case: Case) -> None:
    """Stage it: refused for the reason, within the limits, and nothing else has happened."""
    before = site.state()
    result, cost = site.stage(data, *case.options)
    error = result.data["error"] or {"message": result.data["msg"], "hint": ""}
    assert (result.exit_code, site.staging(), site.state() == before) == (4, [], True), error["message"]
    assert re.search(case.why, error["message"]) and error["hint"], described(error)
    assert any(name in error["message"] for name in case.member.split("|")), described(error)
    assert cost.seconds < SECONDS_ALLOWED and cost.memory_bytes < MEMORY_ALLOWED_BYTES, cost


# -- the tests --------------------------------------------------------------------------------

def test_the_table_has_enough_rows_and_no_two_are_the_same() -> None:
    written = [case.archive for case in HOSTILE.values() if isinstance(case.archive, bytes)]
    assert len(HOSTILE) == sum(map(len, TABLES)) == 301 and len(set(written)) == len(written)


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(site: Site, name: str) -> None:
    assert_refused(site, build(HOSTILE[name], site), HOSTILE[name])


@pytest.mark.parametrize("kind,name", [(kind, name) for kind in COMPRESSED for name in COMPRESSED[kind]])
def test_refused_when_compressed(site: Site, kind: str, name: str) -> None:
    assert_refused(site, FORMATS[kind](build(HOSTILE[name], site)), HOSTILE[name])


# -- what is not refused, but tamed -----------------------------------------------------------------

def staged(site: Site, data: bytes, *options: str) -> Tuple[Path, Result]:
    """Stage an archive that passes; returns the release, and what was said."""
    result, cost = site.stage(data, *options)
    assert result.exit_code == 0, result.describe()
    assert cost.seconds < SECONDS_ALLOWED and cost.memory_bytes < MEMORY_ALLOWED_BYTES, cost
    return site.root / "releases" / result.data["release"], result


def modes_below(top: Path) -> Dict[str, int]:
    """The modes of all files and directories."""
    return {str(path.relative_to(top)): stat.S_IMODE(path.lstat().st_mode)
            for path in top.rglob("*") if not path.is_symlink()}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_dangerous_mode_bits_are_dropped(site: Site, kind: str) -> None:
    if kind == "tar":
        data = tar(folder(b"d/", 0o7777), entry(b"d/s", b"x", mode=0o6777), entry(b"t", b"x", mode=0o1666))
    else:
        data = raw_zip([RawEntry(b"d/", mode=0o047777), RawEntry(b"d/s", b"x", mode=0o106777),
                        RawEntry(b"t", b"x", mode=0o101666)])
    release, _ = staged(site, data)
    assert modes_below(release) == {"d": 0o755, "d/s": 0o755, "t": 0o644}


def test_owners_extended_attributes_and_times_that_are_none_are_dropped(site: Site) -> None:
    strange = [(b"uid", b"12345"), (b"gid", b"12345"), (b"uname", b"daemon"), (b"mtime", b"-1e99"), (b"atime", b"nan"),
               (b"SCHILY.xattr.security.capability", b"\1\0\0\2\0\0\0\0"), (b"SCHILY.acl.access", b"user::rwx,other::rwx"),
               (b"LIBARCHIVE.xattr.user.x", b"eA==")]
    release, _ = staged(site, tar(pax(strange), entry(b"a", b"x")))
    found = (release / "a").lstat()
    assert (found.st_uid, found.st_gid, found.st_mtime > 0) == (os.geteuid(), os.getegid(), True)
    assert os.listxattr(str(release / "a")) == []


def test_hard_links_are_copies_and_change_alone(site: Site) -> None:
    release, _ = staged(site, tar(entry(b"a", b"one"), hard_link(b"b", b"./a")))
    assert (release / "a").lstat().st_nlink == (release / "b").lstat().st_nlink == 1


def test_of_two_archives_one_behind_the_other_only_the_first_is_unpacked(site: Site) -> None:
    release, _ = staged(site, tar(entry(b"a", b"x")) + tar(entry(CLIMB + b"/sentinel/evil", b"x")))
    assert os.listdir(str(release)) == ["a"] and sorted(os.listdir(str(site.sentinel))) == ["directory", "file", "link"]
    # Of whatever length: it is read and forgotten.
    staged(site, gzip.compress(tar(entry(b"a", b"y"))) + gzip.compress(b"more" * (1 << 18)) * 400)


def test_names_that_collide_elsewhere_are_noted_with_measure(site: Site) -> None:
    pairs = [entry(spelling % index) for index in range(3000) for spelling in (b"readme%d", b"README%d")]
    release, result = staged(site, tar(*pairs))
    assert len(os.listdir(str(release))) == 6000
    assert 1 <= len(result.data["warnings"]) <= 20


def test_what_an_archive_names_reaches_no_terminal_raw(site: Site) -> None:
    result, _ = site.stage(tar(entry(b"\x1b]0;owned\x07\x1b[31m", b"x")))
    assert result.exit_code == 4 and "\x1b" not in result.stdout + result.stderr
