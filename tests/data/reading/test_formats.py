"""What a file is told to be, and what comes out of it, against the standard library's own compressors."""

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.data.reading.formats import ByteStream, Compression, detect
from megamup.errors import MegamupError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": lambda data: zstd.compress(
        data, options={zstd.CompressionParameter.checksum_flag: 1}
    ),  # as the program does
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
TEXT = b"".join(b"%d bottles\n" % number for number in range(100_000))  # 1.6 MB

compressed = pytest.mark.parametrize("compression", list(COMPRESSORS))


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def read(path: str, size: int = 100_000) -> bytes:
    compression = detect(path, path).compression
    with ByteStream(path, path, compression) as stream:
        chunks = []
        while chunk := stream.read(size):
            chunks.append(chunk)
        assert all(len(chunk) == size for chunk in chunks[:-1])
        assert stream.taken == Path(path).stat().st_size
    return b"".join(chunks)


@compressed
def test_members_frames_and_padding(tmp_path: Path, compression: Compression) -> None:
    compress = COMPRESSORS[compression]
    half = len(TEXT) // 2
    data = compress(TEXT[:half]) + compress(b"") + b"\0" * 70_000 + compress(TEXT[half:]) + b"\0" * 3
    path = write(tmp_path / "no-suffix", data)
    assert detect(path, path) == ("text", compression, False)
    assert read(path) == TEXT


@compressed
def test_truncation_is_noticed_wherever_it_is(tmp_path: Path, compression: Compression) -> None:
    whole = COMPRESSORS[compression](TEXT)
    for size in (20, len(whole) // 2, len(whole) - 1):
        path = write(tmp_path / "a", whole[:size])
        with pytest.raises(MegamupError, match=rf"a: broken {compression} file, near byte [\d,]+ of it: .*truncated\?"):
            read(path)


@compressed
def test_damage_and_what_follows_a_member_are_noticed(tmp_path: Path, compression: Compression) -> None:
    whole = COMPRESSORS[compression](TEXT)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for data in (bytes(flipped), whole + b"garbage", whole + b"\0\0garbage"):
        with pytest.raises(MegamupError, match=f"broken {compression} file"):
            read(write(tmp_path / "a", data))


def test_little_is_held_of_a_bomb(tmp_path: Path) -> None:
    path = write(tmp_path / "a", zstd.compress(b"\1" * (64 << 20)))
    assert Path(path).stat().st_size < 10_000
    with ByteStream(path, path, "zstd") as stream:
        assert len(stream.read(1 << 16)) == 1 << 16


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("a.txt", b"plain", "text"),
        ("a.jsonl", b'{"text": "broken', "json lines"),
        ("A.NDJSON", b"anything", "json lines"),
        ("a.json", b'{"text": ""}\n{"text": ""}', "json lines"),
        ("part-0", b'{"text": ""}\n', "json lines"),
        ("part-0", b'\xef\xbb\xbf\n {"text": ""}\n', "json lines"),
        ("part-0", b'{"text": "' + b"long" * 5000, "json lines"),
        ("part-0", b'{"text": "broken\n', "text"),
        ("braces", b"{not json}\n{}\n", "text"),
        ("braces", b"{}\n", "text"),
        ("list", b'["a"]\n', "text"),
        ("a", b"PAR1\x15\x04", "parquet"),
        ("a", b"ARROW1\0\0\xff\xff\xff\xff", "arrow file"),
        ("a", b"\xff\xff\xff\xff\x88\0\0\0\x10\0\0\0", "arrow stream"),
        ("a", b"\xff\xff\xff\xff\x89\0\0\0\x10\0\0\0", "text"),
        ("a", b"PK\x03\x04 and so on", "archive"),
        ("a", b"name" + b"\0" * 253 + b"ustar\x0000", "archive"),
    ],
)
def test_formats_by_content_and_json_lines_by_name(tmp_path: Path, name: str, head: bytes, expected: str) -> None:
    path = write(tmp_path / name, head)
    assert detect(path, path).format == expected
    if expected in ("text", "json lines"):
        path = write(tmp_path / f"{name}.gz", gzip.compress(head))
        assert detect(path, path)[:2] == (expected, "gzip")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"}]', r"a\.json: one JSON array.*jq -c '\.\[\]'"),
        (b'[\n{"text": "a"},\n{"text": "b"}]', r"a\.json: one JSON array, not JSON lines"),
        (b"[" + b'{"text": "a"}, ' * 9000, r"a\.json: one JSON array"),
        (b'{\n  "text": "a"\n}\n', r"a\.json: a JSON object over several lines; .*jq -c \."),
        (b'{"text": "a",\n "b": 1}\n', r"a\.json: a JSON object over several lines"),
    ],
)
def test_json_that_is_no_json_lines(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "a.json", data)
    with pytest.raises(MegamupError, match=message):
        detect(path, path)


def test_a_compressed_table_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet.gz", gzip.compress(b"PAR1\x15\x04"))
    with pytest.raises(MegamupError, match=r"parquet compressed as a whole by gzip; decompress it first"):
        detect(path, path)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"nowhere: cannot be read: No such file"):
        detect(str(tmp_path / "nowhere"), "nowhere")
