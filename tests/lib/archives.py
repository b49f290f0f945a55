"""Archives written byte by byte, however hostile: headers, extension headers and zip records exactly as told.

support.make_tar and support.make_zip write what ordinary tools write; here a
field may lie.
"""

import bz2
import io
import lzma
import struct
import subprocess
import zipfile
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from support import compress, needs

BLOCK_BYTES = 512


# -- tar -----------------------------------------------------------------------

def header(name: bytes, size: int = 0, flag: bytes = b"0", target: bytes = b"", mode: int = 0o644, **fields: bytes) -> bytes:
    """One ustar header; `fields` override raw bytes: size_field, mode_field, magic, prefix, checksum."""
    block = struct.pack("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x", name[:100], fields.get("mode_field", b"%07o" % mode),
                        b"0000000", b"0000000", fields.get("size_field", b"%011o" % size), b"0" * 11, b" " * 8, flag,
                        target[:100],
                        fields.get("magic", b"ustar\x0000"), b"", b"", b"", b"", fields.get("prefix", b""))
    return block[:148] + fields.get("checksum", checksum(block)) + block[156:]


def checksum(block: bytes) -> bytes:
    """The checksum field a header must have, whatever stands in that field now."""
    return b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:BLOCK_BYTES]))


def entry(name: bytes, data: bytes = b"", flag: bytes = b"0", target: bytes = b"", mode: int = 0o644,
          **fields: bytes) -> bytes:
    """One member: its header and its data, filled up to whole blocks."""
    return header(name, len(data), flag, target, mode, **fields) + data + bytes(-len(data) % BLOCK_BYTES)


def pax_record(key: bytes, value: bytes) -> bytes:
    """`length key=value`, the length counting its own digits."""
    length = len(key) + len(value) + 3
    while len(b"%d %s=%s\n" % (length, key, value)) != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(records: Iterable[Tuple[bytes, bytes]], flag: bytes = b"x") -> bytes:
    """A pax extension header; flag `g` makes it a global one."""
    return entry(b"pax", b"".join(pax_record(key, value) for key, value in records), flag)


def gnu_long(name: bytes, flag: bytes = b"L") -> bytes:
    """GNU tar's long name; flag `K` makes it a long link target."""
    return entry(b"././@LongLink", name + b"\0", flag, magic=b"ustar  \0")


def folder(name: bytes, mode: int = 0o755) -> bytes:
    """A directory."""
    return entry(name, flag=b"5", mode=mode)


def link(name: bytes, target: bytes) -> bytes:
    """A symlink."""
    return entry(name, flag=b"2", target=target, mode=0o777)


def hard_link(name: bytes, target: bytes) -> bytes:
    """A hard link."""
    return entry(name, flag=b"1", target=target)


def tar(*entries: bytes, end: int = 2 * BLOCK_BYTES) -> bytes:
    """Members one after another, and `end` bytes of zeros."""
    return b"".join(entries) + bytes(end)


# -- compression ---------------------------------------------------------------

def zstd(data: bytes, *options: str) -> bytes:
    """Compress with the zstd program; without it the test is skipped."""
    return subprocess.run([needs("zstd"), "-qc"] + list(options), input=data, stdout=subprocess.PIPE, check=True).stdout


FORMATS = {
    "tar": lambda data: data, "tar.gz": lambda data: compress(data, "gz"), "tar.bz2": bz2.compress, "tar.xz": lzma.compress, "tar.zst": zstd,
}  # type: Dict[str, Any]


def xz_number(value: int) -> bytes:
    """An integer as xz writes it: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7f:
        out.append(value & 0x7f | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


# -- zip -----------------------------------------------------------------------

def make_zip(*entries: Tuple[Union[str, zipfile.ZipInfo], bytes]) -> bytes:
    """A zip as zipfile writes it; entries are (name, data) or (ZipInfo, data)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return stream.getvalue()


def zip_info(name: str, mode: int, system: int = 3) -> zipfile.ZipInfo:
    """An entry's description with a Unix mode, file type included."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr, info.compress_type = system, mode << 16, zipfile.ZIP_DEFLATED
    return info


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """The bytes with some of them replaced, the length kept."""
    return data[:at] + new + data[at + len(new):]


CENTRAL_FIELDS = ("made", "system", "version", "flags", "method", "time", "date", "crc", "packed", "size", "name_length",
                  "extra_length", "comment_length", "disk", "internal", "attributes", "offset")
_CENTRAL_FORM, _LOCAL_FORM = "<4sBBHHHHHIIIHHHHHII", "<4sHHHHHIIIHH"
LOCAL_FIELDS = ("version", "flags", "method", "time", "date", "crc", "packed", "size", "name_length", "extra_length")


class RawEntry:
    """One entry of a zip: what its local header, its data and its central header say, each on its own."""

    def __init__(self, name: bytes, data: bytes = b"", method: int = 0, raw: Optional[bytes] = None, mode: int = 0o100644,
                 **both: int) -> None:
        import zlib
        if raw is None:
            encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
            raw = encoder.compress(data) + encoder.flush() if method == 8 else data
        self.raw, self.after = raw, b""
        self.local_name = self.central_name = name
        self.local_extra = self.central_extra = b""
        common = {"version": 20, "flags": 0x800, "method": method, "time": 0, "date": 33,
                  "crc": zlib.crc32(data) & 0xffffffff,
                  "packed": len(raw), "size": len(data)}
        common.update(both)
        self.local = dict(common)  # type: Dict[str, int]
        self.central = dict(common, made=20, system=3, comment_length=0, disk=0, internal=0)  # type: Dict[str, int]
        self.central["attributes"] = mode << 16

    def but(self, where: str, **fields: Any) -> "RawEntry":
        """Change fields of the `local` or the `central` header alone; returns the entry."""
        for field, value in fields.items():
            if field in ("name", "extra"):
                setattr(self, f"{where}_{field}", value)
            else:
                getattr(self, where)[field] = value
        return self

    def followed_by(self, after: bytes) -> "RawEntry":
        """Put bytes after the data, such as a data descriptor; returns the entry."""
        self.after = after
        return self

    def local_bytes(self) -> bytes:
        """The local header, the data and what follows them."""
        fields = dict({"name_length": len(self.local_name), "extra_length": len(self.local_extra)}, **self.local)
        head = struct.pack(_LOCAL_FORM, b"PK\3\4", *(fields[field] for field in LOCAL_FIELDS))
        return head + self.local_name + self.local_extra + self.raw + self.after

    def central_bytes(self, offset: int) -> bytes:
        """The central header."""
        fields = dict({"name_length": len(self.central_name), "extra_length": len(self.central_extra), "offset": offset},
                      **self.central)
        head = struct.pack(_CENTRAL_FORM, b"PK\1\2", *(fields[field] for field in CENTRAL_FIELDS))
        return head + self.central_name + self.central_extra


def zip_end(number: int, size_bytes: int, start_at: int, **fields: Any) -> bytes:
    """The end-of-central-directory record; `fields` override disk, first_disk, here, total, size, start, comment."""
    values = dict({"disk": 0, "first_disk": 0, "here": min(number, 0xffff), "total": min(number, 0xffff),
                   "size": min(size_bytes, 0xffffffff), "start": min(start_at, 0xffffffff), "comment": b""}, **fields)
    return struct.pack("<4sHHHHIIH", b"PK\5\6", values["disk"], values["first_disk"], values["here"], values["total"],
                       values["size"], values["start"], len(values["comment"])) + values["comment"]


def zip64_end(number: int, size_bytes: int, start_at: int, **fields: int) -> bytes:
    """The zip64 record and its locator; `fields` override record, here, total, size, start, at, disks."""
    values = dict({"record": 44, "here": number, "total": number, "size": size_bytes, "start": start_at,
                   "at": start_at + size_bytes, "disks": 1}, **fields)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", values["record"], 45, 45, 0, 0, values["here"], values["total"],
                         values["size"], values["start"])
    return record + struct.pack("<4sIQI", b"PK\6\7", 0, values["at"], values["disks"])


def raw_zip(entries: Sequence[RawEntry], end: Optional[Dict[str, Any]] = None, end64: Optional[Dict[str, int]] = None,
            gap: bytes = b"") -> bytes:
    """A zip of raw entries; `end` and `end64` override fields of its end records, `gap` lies before the directory."""
    body, offsets = b"", []  # type: bytes, List[int]
    for item in entries:
        offsets.append(len(body))
        body += item.local_bytes()
    body += gap
    central = b"".join(item.central_bytes(offset) for item, offset in zip(entries, offsets))
    tail = zip64_end(len(entries), len(central), len(body), **end64) if end64 is not None else b""
    return body + central + tail + zip_end(len(entries), len(central), len(body), **(end or {}))
