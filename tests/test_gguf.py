"""The GGUF reader against gguf-py's own, and against damaged files."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from llama_probe.checkpoints.gguf import GgufFile
from llama_probe.errors import CheckpointError, UnknownNameError

QUANTISABLE = [Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
# gguf-py cannot quantise to these: their blocks are random bytes.
RAW = [
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.TQ1_0, Kind.TQ2_0),
    *(Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4, Kind.NVFP4),
]
SHAPE = (70, 512)  # more elements than are dequantised at a time, and no multiple of that


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind | None]], **more: int) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "naïve ½")
    writer.add_array("a.strings", ["one", "", "日本", "x" * 300])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.25])
    writer.add_array("a.flags", [True, False])
    if "alignment" in more:
        writer.add_custom_alignment(more["alignment"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def raw_blocks(kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * n_bytes
    return np.random.default_rng(1).integers(0, 256, (*shape[:-1], row), dtype=np.uint8)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tensors = {
        "f32": (numbers(2, 3, 4), None),
        "f16": (numbers(5).astype(np.float16), None),
        "q8": (quantize(numbers(4, 64), Kind.Q8_0), Kind.Q8_0),
    }
    return write(tmp_path / "small.gguf", tensors)


def patched(path: Path, at: int, new: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)
    return path


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert (found.view(np.uint32) == expected.astype(np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("kind", [*QUANTISABLE, *RAW], ids=lambda kind: kind.name)
def test_every_type_equals_gguf_py_bit_for_bit(kind, tmp_path):
    data = quantize(numbers(*SHAPE), kind) if kind in QUANTISABLE else raw_blocks(kind, SHAPE)
    path = write(tmp_path / "one.gguf", {"t": (data, kind)})
    [theirs] = GGUFReader(path).tensors
    with np.errstate(all="ignore"):
        expected = dequantize(theirs.data, kind)
    with GgufFile(path) as file:
        assert file.tensors["t"].shape == SHAPE
        assert file.tensors["t"].type == kind
        assert_same_bits(file.read("t"), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_floats(dtype, tmp_path):
    data = numbers(2, 3, 40).astype(dtype)
    with GgufFile(write(tmp_path / "one.gguf", {"t": (data, None)})) as file:
        assert_same_bits(file.read("t"), data)


def test_what_is_read_is_writable_and_outlives_the_file(small):
    with GgufFile(small) as file:
        found = file.read("f32")
    found += 1
    assert_same_bits(found, numbers(2, 3, 4) + np.float32(1))


def test_metadata(small):
    with GgufFile(small) as file:
        metadata = dict(file.metadata)
        assert metadata["a.strings"] is file.metadata["a.strings"]  # read once
    theirs = GGUFReader(small)
    own = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert metadata == own
    assert metadata["a.strings"] == ["one", "", "日本", "x" * 300]
    assert metadata["a.flags"] == [True, False]


def test_other_alignments(tmp_path):
    tensors = {"a": (numbers(3), None), "b": (numbers(5), None)}
    path = write(tmp_path / "one.gguf", tensors, alignment=256)
    with GgufFile(path) as file:
        assert file.tensors["b"].offset % 256 == 0
        assert_same_bits(file.read("b"), numbers(5))


def test_version_2(small):
    with GgufFile(patched(small, 4, struct.pack("<I", 2))) as file:
        assert_same_bits(file.read("f32"), numbers(2, 3, 4))


def test_an_unknown_name_gets_the_near_ones(small):
    with GgufFile(small) as file, pytest.raises(UnknownNameError, match="'f32'"):
        file.read("f3")


def test_after_closing(small):
    file = GgufFile(small)
    file.close()
    with pytest.raises(CheckpointError, match="closed"):
        file.read("f32")
    with pytest.raises(CheckpointError, match="closed"):
        file.metadata["a.strings"]
    assert file.metadata["a.text"] == "naïve ½"


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    path = write(tmp_path / "one.gguf", {"t": (np.arange(4, dtype=np.int32), None)})
    with GgufFile(path) as file, pytest.raises(CheckpointError, match="'t' is of type I32"):
        file.read("t")


def fails(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("at", "new", "match"),
    [
        (0, b"GGML", "begins with b'GGML'"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack("<I", 99), "version 99"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<q", -1), "claims 18446744073709551615 tensors"),
        (8, struct.pack("<Q", 1 << 40), "claims 1099511627776 tensors"),
        (16, struct.pack("<q", -1), "metadata entries"),
        (16, struct.pack("<Q", 1000), "metadata entries"),
        (24, struct.pack("<q", -1), "key of metadata entry 0"),
        (24, struct.pack("<Q", 1 << 20), "key of metadata entry 0"),
        (32, b"\xff", "not UTF-8"),
        (32 + len("general.architecture"), struct.pack("<I", 13), "unknown type 13"),
    ],
)
def test_a_damaged_start(small, at, new, match):
    fails(patched(small, at, new), match)


def patch_after(path: Path, marker: bytes, skip: int, new: bytes) -> Path:
    """Change bytes which lie `skip` behind the end of a name."""
    data = path.read_bytes()
    assert data.count(marker) == 1
    return patched(path, data.index(marker) + len(marker) + skip, new)


@pytest.mark.parametrize(
    ("marker", "skip", "new", "match"),
    [
        # A list: type, element type, count, then the elements.
        (b"a.strings", 4, struct.pack("<I", 9), "list of lists"),
        (b"a.strings", 4, struct.pack("<I", 77), "unknown type 77"),
        (b"a.strings", 8, struct.pack("<q", -1), "'?a.strings'? at byte"),
        (b"a.strings", 8, struct.pack("<Q", 1 << 61), "'?a.strings'? at byte"),
        (b"a.strings", 16, struct.pack("<q", -1), "'?a.strings'? at byte"),
        (b"a.ints", 8, struct.pack("<Q", 1 << 62), "a.ints at byte"),
        # A tensor: number of dimensions, sizes, type, offset.
        (b"f16", 0, struct.pack("<I", 5), "5 dimensions"),
        (b"f16", 4, struct.pack("<Q", 0), "at least 1"),
        (b"f16", 4, struct.pack("<q", -1), "should end at byte"),
        (b"f32", 4, struct.pack("<QQQ", 1 << 63, 1 << 63, 1 << 63), "should end at byte"),
        (b"f16", 12, struct.pack("<I", 4), "unknown type 4"),
        (b"f16", 12, struct.pack("<I", 8), "multiple of 32"),
        (b"f16", 16, struct.pack("<Q", 1 << 62), "should end at byte"),
        (b"f16", 16, struct.pack("<Q", 8), "no multiple of the alignment"),
        (b"f16", 16, struct.pack("<Q", 0), "overlaps"),
        (b"f16", -3, b"f32", "two tensors named 'f32'"),
        (b"a.ints", -6, b"a.flag", "'a.flag' twice"),
    ],
)
def test_a_damaged_header(small, marker, skip, new, match):
    fails(patch_after(small, marker, skip, new), match)


@pytest.mark.parametrize("alignment", [0, 24, 1 << 31])
def test_a_wrong_alignment(alignment, tmp_path):
    path = write(tmp_path / "one.gguf", {"t": (numbers(3), None)}, alignment=64)
    fails(
        patch_after(path, b"general.alignment", 4, struct.pack("<I", alignment)),
        "should be a power of two|should end at byte",
    )


def test_wherever_a_file_is_cut_it_is_an_error(small):
    data = small.read_bytes()
    with GgufFile(small) as file:
        end = max(info.offset + info.n_bytes for info in file.tensors.values())
    for length in {*range(0, end, 7), end - 1}:
        small.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            GgufFile(small)
    small.write_bytes(data[:end])  # only padding is missing
    GgufFile(small).close()


def test_damaged_bytes_give_no_other_error(small):
    data = small.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        small.write_bytes(data)
        patched(small, rng.randrange(len(data) // 2), rng.randbytes(rng.choice((1, 4, 8))))
        try:
            with GgufFile(small) as file:
                dict(file.metadata)
                for name in file.tensors:
                    file.read(name)
        except CheckpointError:
            refused += 1
    assert refused > 40


def test_a_string_that_is_not_utf8_is_found_when_it_is_read(small):
    data = small.read_bytes()
    with GgufFile(patched(small, data.index("日本".encode()), b"\xff")) as file:
        with pytest.raises(CheckpointError, match="entry 2 of 'a.strings' is not UTF-8"):
            file.metadata["a.strings"]


def test_no_file_and_an_empty_file(tmp_path):
    fails(tmp_path / "none.gguf", "cannot be opened")
    (tmp_path / "empty.gguf").write_bytes(b"")
    fails(tmp_path / "empty.gguf", "cannot be opened")


@pytest.mark.slow
def test_smollm2_equals_gguf_py_bit_for_bit(smollm2_path):
    theirs = {tensor.name: tensor for tensor in GGUFReader(smollm2_path).tensors}
    with GgufFile(smollm2_path) as file:
        assert list(file.tensors) == list(theirs)
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
        for name, tensor in theirs.items():
            assert_same_bits(file.read(name), dequantize(tensor.data, tensor.tensor_type))
