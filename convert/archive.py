"""The zip archive that `torch.save` writes, seen as bytes: what lies where, and whether it is what was written."""

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

CHUNK = 1 << 22  # bytes read at a time
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field; the content follows these


class Member(NamedTuple):
    """A stored file of the archive."""

    name: str  # without the archive's own folder: data.pkl (which tensors there are), data/0 (numbers of one), ...
    begin: int  # of its content in the archive, bytes
    size: int
    crc: int  # CRC-32 when it was written


def members(file: Path) -> list[Member]:
    """What an archive holds, in the order in which it lies there. ValueError naming the file where that cannot be."""
    found, end = [], 0
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                raw.seek(info.header_offset)
                signature, name, extra = LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size))
                begin = info.header_offset + LOCAL_HEADER.size + name + extra
                if signature != b"PK\3\4" or info.header_offset < end or info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile
                end = begin + info.file_size
                found.append(Member(info.filename.partition("/")[2], begin, info.file_size, info.CRC))
        if end > file.stat().st_size:
            raise zipfile.BadZipFile
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError):
        raise ValueError(f"{file}: damaged, or not an archive of torch.save's") from None
    return found


def read_through(
    file: Path, members: list[Member], seen: Callable[[bytes], object], progress: Callable[[int], object]
) -> Iterator[tuple[Member, bool]]:
    """Read a file once from beginning to end; each member, when it has gone by, with whether it is what was written.

    seen: is given all bytes; progress: how many they are.
    """

    def pass_over(length: int) -> int:
        crc = 0
        while length > 0 and (chunk := raw.read(min(CHUNK, length))):
            seen(chunk)
            progress(len(chunk))
            crc = zlib.crc32(chunk, crc)
            length -= len(chunk)
        return crc

    with open(file, "rb") as raw:
        for member in members:
            pass_over(member.begin - raw.tell())
            yield member, pass_over(member.size) == member.crc
        pass_over(file.stat().st_size - raw.tell())


def homes(members: list[Member], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Member -> names of the mapped tensors that lie in it; empty where they cannot be told apart.

    A mapping keeps distances, so one address that is known would do; the first tensor's is one of the members' places.
    """
    places = {(member.begin, member.size): member.name for member in members}
    storages = {key: tensor.untyped_storage() for key, tensor in tensors.items() if tensor.numel()}
    first = min((storage.data_ptr() for storage in storages.values()), default=0)
    for begin, _ in places:
        found: dict[str, list[str]] = {}
        for key, storage in storages.items():
            place = (storage.data_ptr() - first + begin, storage.nbytes())
            if place not in places:
                break
            found.setdefault(places[place], []).append(key)
        else:
            return found
    return {}
