"""A file of `torch.save` as the zip archive that it is: its members found and their checksums checked, before torch
reads it. Torch's own reader checks no checksum, and unpacks compressed members to whatever size they claim.

Torch stores every member uncompressed. An archive is taken only where it can be read in one way: one directory, at its
end, of members that lie apart.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

SMALL = 2**20  # bytes; members up to this size are checked even where the tensors are left in the file
_END, _LOCATOR, _END64, _LOCAL = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06", b"PK\x03\x04"


class Member(NamedTuple):
    """A stored file of the archive."""

    name: str
    begin: int  # of its content, in bytes from the archive's beginning
    size: int
    crc: int  # CRC-32 when it was written


def require_intact(path: Path, whole: bool = True) -> None:
    """ValueError naming the file unless it is such an archive and its content matches its checksums. OSError.

    whole: read all of it; else the large members, which are the numbers of large tensors, are left unread.
    """
    problem = checksum_problem(path, whole)
    if problem:
        raise ValueError(f"{path}: {problem}")


def checksum_problem(path: Path, whole: bool = True) -> str | None:
    """What is wrong with such an archive, None where nothing is; as `require_intact`."""
    with open(path, "rb") as file:
        try:
            held = members(file)
        except ValueError as error:
            return str(error)
        for member in held:
            if (whole or member.size <= SMALL) and _crc(file, member) != member.crc:
                return f"damaged (checksum of {member.name} does not match)"
    return None


def members(file: IO[bytes]) -> list[Member]:
    """What such an archive holds, in the order in which it lies there. ValueError with what is wrong where it cannot be
    taken."""
    file.seek(0)
    if file.read(4) != _LOCAL:
        older = "or by a torch before 1.6: load and save it with a newer one"
        raise ValueError(f"not a file that torch.save writes ({older})")
    try:
        return _members(file)
    except struct.error:
        raise ValueError("damaged (cut short)") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"damaged ({error})") from None


def _members(file: IO[bytes]) -> list[Member]:
    """All members, in the order in which they lie. ValueError and BadZipFile with what is wrong."""
    directory, n = _directory(file)
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = {info.filename.lower() for info in infos if info.filename.isprintable()}
    if len(infos) != n or len(names) != n:
        raise ValueError("its directory is not in order")
    found, free = [], 0  # the first byte behind the last member
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename} is compressed, which torch.save does not do")
        if info.external_attr & 0x10 or info.is_dir():  # for which torch takes memory that nobody has filled
            raise ValueError(f"{info.filename} is a folder, which torch.save does not write")
        file.seek(info.header_offset)
        signature, _, flags, method, *_, named, extra = struct.unpack("<4s5H3I2H", file.read(30))
        start, name = info.header_offset + 30 + named + extra, file.read(named)
        same = name == info.orig_filename.encode() and method == zipfile.ZIP_STORED and not flags & 1
        if signature != _LOCAL or not same or info.header_offset < free or start + info.file_size > directory:
            raise ValueError(f"{info.filename} is not where the directory says")
        found.append(Member(info.filename, start, info.file_size, info.CRC))
        free = start + info.file_size
    return found


def _directory(file: IO[bytes]) -> tuple[int, int]:
    """(begin, number of entries) of the archive's directory, from the records that are the file's last bytes."""
    size = file.seek(0, 2)
    end = size - 22
    file.seek(max(0, end))
    signature, *disks, _, n, length, begin, comment = struct.unpack("<4s4H2IH", file.read(22))
    if signature != _END or any(disks) or comment:
        raise ValueError("cut short, or with something behind its end")
    file.seek(max(0, end - 20))
    signature, _, place, _ = struct.unpack("<4sIQI", file.read(20))
    if signature == _LOCATOR:
        end -= 76
        file.seek(max(0, end))
        signature, *_, n, length, begin = struct.unpack("<4sQ2H2I4Q", file.read(56))
        if signature != _END64 or place != end:
            raise ValueError("its end is not in order")
    if begin + length != end:
        raise ValueError("its directory is not where its end says")
    return begin, n


def _crc(file: IO[bytes], member: Member) -> int:
    file.seek(member.begin)
    crc, left = 0, member.size
    while left and (content := file.read(min(left, 2**20))):
        crc, left = zlib.crc32(content, crc), left - len(content)
    return crc
