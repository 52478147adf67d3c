"""The container format GGUF: metadata and tensors of one file, read over a memory map.

Only the header is read on opening, and of its arrays (a vocabulary has tens of thousands of
strings) only where they end. No size that the file claims is believed before it is checked against
the file itself.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_probe.errors import CheckpointError, UnknownNameError, near

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4  # ggml's own limit
# The value types of the metadata, as struct and as numpy call them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
# The least bytes that an entry can take: name, type and value; name, dimensions, type and offset.
_LEAST_PAIR, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
_CHUNK = 1 << 14  # elements dequantised at a time: small enough for the allocator to reuse
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Attributes:
        name: As the file calls it.
        shape: Row-major, as torch has it: GGUF's own order reversed.
        type: How its numbers are stored.
        offset: Of its first byte, from the beginning of the file.
        n_bytes: Its size in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


class GgufFile:
    """An open GGUF file (little-endian, version 2 or 3).

    Attributes:
        path: The file.
        metadata: Its key-value pairs; lists are read when they are first asked for.
        tensors: Its tensors, by name.

    Raises:
        CheckpointError: The file is missing, damaged or cut short, or not of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{self.path} cannot be opened: {error}") from None
        try:
            header = _Header(self._map, str(self.path))
            self.metadata: Mapping[str, Any] = header.metadata
            self.tensors: dict[str, TensorInfo] = header.tensors
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers as a float32 array of its own, dequantised.

        Raises:
            UnknownNameError: The file has no such tensor; the message gives the near names.
            CheckpointError: Its type cannot be dequantised, or the file is closed.
        """
        if name not in self.tensors:
            raise UnknownNameError(f"{self.path} has no tensor {name!r}{near(name, self.tensors)}")
        if self._map.closed:
            raise CheckpointError(f"{self.path} is closed: {name!r} can no longer be read")
        info = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, info.n_bytes, info.offset)
        try:
            return _floats(raw, info.type, prod(info.shape)).reshape(info.shape)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {info.type.name}, which cannot be read"
            ) from None

    def close(self) -> None:
        """Close the file; what was read stays. Lists of the metadata not yet read are lost."""
        # An error on its way up may hold a view of the map, which then goes when the error does.
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _floats(raw: np.ndarray, kind: GGMLQuantizationType, count: int) -> np.ndarray:
    """Dequantise into a new array, in chunks so that the intermediate results stay small."""
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return raw.view("<f4" if kind == GGMLQuantizationType.F32 else "<f2").astype(np.float32)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    step = max(1, _CHUNK // block)
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty(count, np.float32)
    # Random or damaged scales may overflow; the numbers are what the file says all the same.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            row = blocks[start : start + step].reshape(1, -1)
            values = gguf.quants.dequantize(row, kind)
            out[start * block : start * block + values.size] = values.reshape(-1)
    return out


class _Lazy:
    """A list that has been found in the file, but not read."""

    __slots__ = ("count", "kind", "offset")

    def __init__(self, kind: int, count: int, offset: int) -> None:
        self.kind, self.count, self.offset = kind, count, offset


class _Metadata(Mapping[str, Any]):
    """The key-value pairs; a list is read when it is first asked for."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self._data = data
        self._where = where
        self.values_: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        value = self.values_[key]
        if isinstance(value, _Lazy):
            if self._data.closed:
                raise CheckpointError(f"{self._where} is closed: {key!r} can no longer be read")
            value = self.values_[key] = self._list(key, value)
        return value

    def _list(self, key: str, lazy: _Lazy) -> list[Any]:
        if lazy.kind != _STRING:
            kind = np.dtype(f"<{_SCALARS[lazy.kind]}")
            return np.frombuffer(self._data, kind, lazy.count, lazy.offset).tolist()
        strings: list[str] = []
        data, length_at, offset = self._data, _U64.unpack_from, lazy.offset
        try:
            for _ in range(lazy.count):  # the lengths were checked when the header was read
                end = offset + 8 + length_at(data, offset)[0]
                strings.append(data[offset + 8 : end].decode())
                offset = end
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._where}: entry {len(strings)} of {key!r} is not UTF-8: {error}"
            ) from None
        return strings

    def __contains__(self, key: object) -> bool:
        return key in self.values_

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


class _Header:
    """Reads the header, from the magic to the last tensor's description."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0
        self._where = where
        n_tensors, n_pairs = self._start()
        self.metadata = self._pairs(n_pairs)
        self.tensors = self._tensors(n_tensors)

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where} is no sound GGUF file: {what}")

    def _take(self, n_bytes: int, what: str) -> int:
        """Step over bytes after checking that they are there; returns where they begin."""
        start = self._at
        if n_bytes > self._size - start:
            raise self._wrong(
                f"{what} at byte {start} should take {n_bytes} bytes, "
                f"but the file ends at byte {self._size}"
            )
        self._at = start + n_bytes
        return start

    def _u32(self, what: str) -> int:
        return _U32.unpack_from(self._data, self._take(4, what))[0]

    def _u64(self, what: str) -> int:
        return _U64.unpack_from(self._data, self._take(8, what))[0]

    def _string(self, what: str) -> str:
        length = self._u64(f"the length of {what}")
        start = self._take(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} at byte {start} is not UTF-8: {error}") from None

    def _start(self) -> tuple[int, int]:
        """Check magic and version; returns the counts of tensors and of key-value pairs."""
        magic = self._data[self._take(4, "the magic number") : 4]
        if magic != b"GGUF":
            raise self._wrong(f"it begins with {magic!r} instead of b'GGUF'")
        version = self._u32("the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS
            which = "big-endian" if swapped else f"of version {version}"
            raise self._wrong(f"it is {which}, but little-endian files of version 2 or 3 are read")
        n_tensors, n_pairs = self._u64("the count of tensors"), self._u64("the count of metadata")
        least = n_tensors * _LEAST_TENSOR + n_pairs * _LEAST_PAIR
        if least > self._size - self._at:
            raise self._wrong(
                f"it claims {n_tensors} tensors and {n_pairs} metadata entries, which need at "
                f"least {least} bytes, but the file has {self._size}"
            )
        return n_tensors, n_pairs

    def _pairs(self, count: int) -> _Metadata:
        metadata = _Metadata(self._data, self._where)
        for index in range(count):
            key = self._string(f"the key of metadata entry {index}")
            if key in metadata:
                raise self._wrong(f"the metadata has {key!r} twice")
            metadata.values_[key] = self._value(key)
        return metadata

    def _value(self, key: str) -> Any:
        kind = self._u32(f"the type of {key!r}")
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        form = self._form(kind, key)
        return struct.unpack_from(f"<{form}", self._data, self._take(struct.calcsize(form), key))[0]

    def _form(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise self._wrong(f"{key!r} has the unknown type {kind}")
        return _SCALARS[kind]

    def _array(self, key: str) -> _Lazy:
        """Step over a list, checking that it is all there."""
        kind, count = self._u32(f"the type of {key!r}"), self._u64(f"the length of {key!r}")
        start = self._at
        if kind == _STRING:
            self._strings(key, count)
        elif kind == _ARRAY:
            raise self._wrong(f"{key!r} is a list of lists, which is not read")
        else:
            self._take(count * struct.calcsize(f"<{self._form(kind, key)}"), key)
        return _Lazy(kind, count, start)

    def _strings(self, key: str, count: int) -> None:
        if count * 8 > self._size - self._at:
            self._take(count * 8, key)  # raises
        data, length_at, offset, last = self._data, _U64.unpack_from, self._at, self._size - 8
        for _ in range(count):
            if offset > last:
                break
            offset += 8 + length_at(data, offset)[0]
        self._take(offset - self._at, key)

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        found = [self._tensor(index) for index in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong(f"'general.alignment' is {alignment!r}, but should be a power of two")
        start = -(-self._at // alignment) * alignment
        end = 0
        for info in sorted(found, key=lambda info: info.offset):
            if info.offset % alignment:
                raise self._wrong(
                    f"tensor {info.name!r} begins at byte {info.offset} of the data, which is no "
                    f"multiple of the alignment {alignment}"
                )
            if info.offset < end:
                raise self._wrong(f"tensor {info.name!r} overlaps the one before it")
            end = info.offset + info.n_bytes
            if start + end > self._size:
                raise self._wrong(
                    f"tensor {info.name!r} should end at byte {start + end}, "
                    f"but the file ends at byte {self._size}"
                )
        tensors = {
            info.name: TensorInfo(
                info.name, info.shape, info.type, start + info.offset, info.n_bytes
            )
            for info in found
        }
        if len(tensors) < len(found):
            twice = Counter(info.name for info in found).most_common(1)[0][0]
            raise self._wrong(f"it has two tensors named {twice!r}")
        return tensors

    def _tensor(self, index: int) -> TensorInfo:
        """One tensor's description; its offset still counts from the beginning of the data."""
        name = self._string(f"the name of tensor {index}")
        n_dims = self._u32(f"the number of dimensions of tensor {name!r}")
        if n_dims > _MOST_DIMENSIONS:
            raise self._wrong(
                f"tensor {name!r} has {n_dims} dimensions, but at most {_MOST_DIMENSIONS} are"
                " allowed"
            )
        sizes = [self._u64(f"the shape of tensor {name!r}") for _ in range(n_dims)]
        number = self._u32(f"the type of tensor {name!r}")
        offset = self._u64(f"the offset of tensor {name!r}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._wrong(f"tensor {name!r} has the unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row = sizes[0] if sizes else 1
        if min(sizes, default=1) < 1 or row % block:
            raise self._wrong(
                f"tensor {name!r} of type {kind.name} has shape {sizes[::-1]}, but sizes should be "
                f"at least 1 and the last one a multiple of {block}"
            )
        n_bytes = prod(sizes) // block * block_bytes
        return TensorInfo(name, tuple(reversed(sizes)), kind, offset, n_bytes)
