"""The zip archive that `torch.save` writes, read through once: what is as it was written, and whose numbers it is."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from moa.archive import Member

CHUNK = 1 << 22  # bytes read at a time


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
