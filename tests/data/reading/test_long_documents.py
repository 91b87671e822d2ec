"""Documents that aren't held whole: the same texts and errors as if they were, in little memory."""

import gzip
import json
import random
import re
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from megamup.data.reading.documents import Reader, ReadOptions
from megamup.data.reading.lines import Block, Span
from megamup.data.reading.long_documents import json_parts, text_parts
from megamup.errors import MegamupError

RunTool = Callable[..., subprocess.CompletedProcess[str]]


class SmallChunks(Span):
    """Every border of a chunk is one that a reader may stumble over."""

    size = 1

    def chunks(self, size: int | None = None) -> Any:
        return super().chunks(size or self.size)

    def part(self, start: int, stop: int) -> Span:
        return SmallChunks(self.file, self.start + start, self.start + stop, self.offset + start)


def span_of(data: bytes, offset: int = 100) -> Span:
    return SmallChunks(BytesIO(b"before" + data + b"behind"), 6, 6 + len(data), offset)


def long_way(line: bytes, options: ReadOptions) -> str:
    try:
        return "".join(part.text for part in json_parts(span_of(line), options))
    except MegamupError as error:
        return f"error: {error}"


def short_way(line: bytes, options: ReadOptions) -> str:
    """What a line that fits into memory gives."""
    try:
        return Reader(options).block(Block(line, 100, 0), str).texts[0]
    except MegamupError as error:
        return f"error: {str(error).removeprefix('0: ')}"


LINES = [
    r'{"text": "plain"}',
    r' { "id" : [1, -2.5e+3, true, null, {"text": "in"}, []], "text" : "é \u00e9 \ud83d\ude00 \n\"\\\/" , "b": {} } ',
    r'{"text": "first", "text": "second"}',
    r'{"a": {"b": "nested"}, "text": ""}',
    r'{"a": {"b": "gone"}, "a": {}, "text": "x"}',
    r'{"a.b": "literal", "a": {"b": "nested"}, "text": "x"}',
    r'{"text": "x", "junk": "\ud800", "a": [[[["deep"]]]], "n": NaN, "m": -Infinity}',
    r'{"te\u0078t": "escaped key"}',
    r'{"text": null, "a": {"b": 1}}',
    r'{"text": ["list"], "a": {"b": {}}}',
    r'{"other": "x"}',
    r"{}",
]
OPTIONS = [ReadOptions(), ReadOptions(("a.b",)), ReadOptions(("text", "a.b"), "|")]


@pytest.mark.parametrize("options", OPTIONS, ids=["text", "nested", "several"])
@pytest.mark.parametrize("line", LINES)
def test_long_lines_read_as_short_ones(line: str, options: ReadOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(SmallChunks, "size", size)
        assert long_way(line.encode(), options) == short_way(line.encode(), options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"not JSON: expected ',' or the end of the array or object at byte 112 .*it ends"),
        (b'{"text": "a" "b"}', r"expected ',' .* at byte 113 of the file, found b'\"'"),
        (b'{"text": "a', r"the end of the string, or a valid character of one at byte 111"),
        (b'{"text": "a\\x"}', r"valid character of one at byte 111"),
        (b'{"text": "a\tb"}', r"valid character of one at byte 111"),
        (b'{"text" "a"}', r"expected ':'"),
        (b"{text: 1}", r"expected a string at byte 101"),
        (b'{"text": nul}', r"expected a value at byte 109"),
        (b'{"text": 01}', r"expected ',' or"),
        (b'{"text": "a"} x', r"expected the end of the line at byte 114"),
        (b'{"text": "a"}}', r"expected the end of the line"),
        (b'{"text": "a", }', r"expected a string"),
        (b'{"a": [1 2], "text": ""}', r"expected ',' or"),
        (b'{"a": [1}, "text": ""}', r"expected ',' or"),
        (b'["text"]', r"expected a JSON object at byte 100"),
        (b"", r"expected a JSON object at byte 100 of the file, it ends"),
        (b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}", r"at most 500 levels"),
        (b'{"text": "caf\xe9 "}', r"not UTF-8: byte 0xe9 at byte 113 of the file"),
        (b'{"text": "caf\xc3', r"not UTF-8: byte 0xc3 at byte 113"),
        (rb'{"text": "\ud83d and more than an escape"}', r"'text' holds half of a surrogate pair"),
        (rb'{"text": "and last \ud83d"}', r"'text' holds half of a surrogate pair"),
        (rb'{"text": "\ude00 first"}', r"'text' holds half of a surrogate pair"),
    ],
)
def test_bad_long_lines(line: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 5, 1000):
        monkeypatch.setattr(SmallChunks, "size", size)
        with pytest.raises(MegamupError, match=message):
            json_parts(span_of(line), ReadOptions())


def test_random_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python's own writer, whole and damaged: what one way takes, the other takes, and as the same."""
    generator = random.Random(0)
    characters = 'ab "\\/\n\t\u00e9中\U0001f600\x7f\u2028{}[]:,0'

    def value(depth: int) -> Any:
        kind = generator.randrange(6 if depth < 4 else 4)
        if kind == 4:
            return [value(depth + 1) for _ in range(generator.randrange(4))]
        if kind == 5:
            return {
                generator.choice(["text", "a", "b", "a.b"]): value(depth + 1) for _ in range(generator.randrange(4))
            }
        text = "".join(generator.choices(characters, k=8))
        return [generator.random() * 100, generator.choice([None, True, text]), text, text][kind]

    refused = 0
    for number in range(1500):
        document = {"a": {"b": value(4)}, "text": value(4), "b": value(0)}
        line = bytearray(json.dumps(document, ensure_ascii=generator.random() < 0.5), "utf-8")
        if number % 2:
            line[generator.randrange(len(line))] = generator.choice(b'"\\{}[],:0x \xc3\xa9')
        monkeypatch.setattr(SmallChunks, "size", generator.choice([1, 4, 16, 100]))
        for options in OPTIONS:
            short, long = short_way(bytes(line), options), long_way(bytes(line), options)
            refused += short.startswith("error")
            short, long = (re.sub("; did you mean.*|; name one.*", "", found) for found in (short, long))
            assert short == long or (short.startswith("error: not") and long.startswith("error: not")), bytes(line)
    assert 1500 < refused < 3500


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_text(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmallChunks, "size", size)
    text = "é中😀 a"
    assert "".join(part.text for part in text_parts(span_of(b"\xef\xbb\xbf" + text.encode(), 0))) == text
    for data, byte in ((b"ab\xff", 102), (b"\xe4\xb8", 100), ("é".encode() + b"\xe4\xb8a", 102)):
        with pytest.raises(MegamupError, match=f"at byte {byte} of the file"):
            text_parts(span_of(data))


def test_a_mark_before_json_and_a_file_that_shrinks() -> None:
    line = b'\xef\xbb\xbf{"text": "a"}'
    assert [part.text for part in json_parts(span_of(line, 0), ReadOptions())] == ["a"]
    with pytest.raises(MegamupError, match="at byte 100"):
        json_parts(span_of(line), ReadOptions())
    with pytest.raises(MegamupError, match="has become shorter: expected 7 more bytes"):
        text_parts(Span(BytesIO(b"abc"), 0, 10, 0))


CHILD = """
import re, sys
from megamup.data.reading.sources import find
from megamup.data.reading.units import plan_units
from megamup.data.reading.documents import ReadOptions
texts = lengths = 0
for unit in plan_units(find([sys.argv[1]])):
    for _, batches in unit.pieces(ReadOptions(), lambda piece: True):
        for batch in batches:
            texts += len(batch.texts)
            lengths += sum(map(len, batch.texts))
peak_kib = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])  # maxrss counts the parent's too
print(texts, lengths, peak_kib // 1024)
"""


@pytest.mark.parametrize("kind", ["text", "text.gz", "jsonl", "jsonl.gz"])
def test_a_document_of_200_mb_in_100_mb(kind: str, tmp_path: Path, run_python: RunTool) -> None:
    paragraph = 'Many words make a long document, and a line break or two.\n"Quoted", too.\n' * 1000
    length = 200_000_000 // len(paragraph) * len(paragraph)
    path = tmp_path / f"big.{kind}"
    n_paragraphs = 200_000_000 // len(paragraph)
    with gzip.open(path, "wt", compresslevel=1) if kind.endswith("gz") else open(path, "w") as file:
        if "jsonl" in kind:
            file.write('{"id": 1, "text": "')
            paragraph = json.dumps(paragraph)[1:-1]
        for _ in range(n_paragraphs):
            file.write(paragraph)
        if "jsonl" in kind:
            file.write('", "url": "x"}\n')
    done = run_python("-c", CHILD, str(path))
    assert done.returncode == 0, done.stderr
    texts, found, peak_mib = map(int, done.stdout.split())
    assert texts > 150
    assert found == length
    assert peak_mib < 100
