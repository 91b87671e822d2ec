"""What a worker does with a piece of input."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.data.preprocess.encode import Encoder, words
from megamup.data.preprocess.filters import SEEN_CHARACTERS
from megamup.data.preprocess.pieces import PieceFolder, PieceInfo, PieceWriter
from megamup.data.reading.documents import Batch
from megamup.data.tokenizer import ByteTokenizer, Ids, Lengths
from megamup.errors import MegamupError

EOD = 256


def encode(folder: Path, encoder: Encoder, batches: list[Batch]) -> tuple[PieceInfo, list[list[str]]]:
    """What the piece tells of itself, and the documents of each part, each checked to end as it must."""
    folder.mkdir(exist_ok=True)
    pieces = PieceFolder(folder)
    with PieceWriter(pieces, "a", encoder.n_parts) as piece:
        encoder.encode(iter(batches), piece)
    info = pieces.info("a")
    assert info is not None
    parts = []
    for part, about in enumerate(info.parts):
        data = b"".join(pieces.checked_ids("a", part, about, 0, 1 << 40))
        ids = np.frombuffer(data, encoder.dtype)
        ends = np.cumsum(pieces.checked_lengths("a", part, about))
        assert len(ids) == about.tokens == (ends[-1] if len(ends) else 0)
        documents = np.split(ids, ends[:-1]) if len(ends) else []
        assert all(document[-1] == EOD for document in documents)
        parts.append([bytes(document[:-1].astype(np.uint8)).decode() for document in documents])
    return info, parts


def test_long_documents_are_put_together(tmp_path: Path) -> None:
    """In one batch or over many, alone or between others."""
    batches = [
        Batch(
            [
                "one",
                "two ",
            ],
            continues=True,
        ),
        Batch(["and "], continues=True),
        Batch(["more", "three", "four "], continues=True),
        Batch(["ends"]),
        Batch(["", "five"], source_bytes=7, unreadable=["x: broken"]),
    ]
    info, parts = encode(tmp_path, Encoder(ByteTokenizer()), batches)
    assert parts == [["one", "two and more", "three", "four ends", "five"]]
    assert info.left_out == {"empty": 1, "unreadable": 1}
    assert (info.source_bytes, info.inexact_cuts, info.named) == (7, 0, ["x: broken"])
    assert info.parts[0].text_bytes == sum(map(len, parts[0]))
    assert info.parts[0].text_words == sum(len(text.split()) for text in parts[0])


@pytest.mark.parametrize(
    "text", ["one word's", " two  words\n", "für drei\u3000Worte\x85", "\x1cfour\x1f of these words"]
)
def test_words_are_counted_once_wherever_a_document_is_cut(tmp_path: Path, text: str) -> None:
    for place in range(1, len(text)):
        batches = [Batch([text[:place]], continues=True), Batch([text[place:], "and more"])]
        info, _ = encode(tmp_path / str(place), Encoder(ByteTokenizer()), batches)
        assert info.parts[0].text_words == len(text.split()) + 2


def test_words_are_those_of_split(odd_texts: list[str]) -> None:
    assert [words(text) for text in odd_texts] == [len(text.split()) for text in odd_texts]


def test_filters_judge_a_long_document_by_its_first_text(tmp_path: Path) -> None:
    encoder = Encoder(ByteTokenizer(), ["length:min_characters=4"])
    batches = [
        Batch(["no", "long"], continues=True),
        Batch(["er"]),
        Batch(["bad"], continues=True),
        Batch(["but long"]),
    ]
    info, parts = encode(tmp_path, encoder, batches)
    assert parts == [["longer"]]
    assert info.left_out == {"length:min_characters=4": 2}


def test_each_document_goes_to_one_part(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(400)]
    encoder = Encoder(ByteTokenizer(), valid_fraction=0.25, seed=1)
    info, (train, valid) = encode(
        tmp_path / "1", encoder, [Batch(texts), Batch(["text 1"], continues=True), Batch([" ends"])]
    )
    assert sorted(train + valid) == sorted([*texts, "text 1 ends"])
    assert 60 < len(valid) < 140
    assert ("text 1 ends" in valid) == ("text 1" in valid)  # its first text decides
    assert [part.documents for part in info.parts] == [len(train), len(valid)]
    assert [part.text_bytes for part in info.parts] == [sum(map(len, train)), sum(map(len, valid))]
    other = encode(tmp_path / "2", Encoder(ByteTokenizer(), valid_fraction=0.25, seed=2), [Batch(texts)])[1][1]
    assert other != valid


class Spaced(ByteTokenizer):
    """Puts a space before every text, as SentencePiece does by default: also before what follows a cut."""

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        return super().encode_batch([" " + text for text in texts])


def test_cuts_that_change_tokens_are_counted(tmp_path: Path) -> None:
    batches = [Batch(["x"], continues=True), Batch(["y"], continues=True), Batch(["z", "short"])]
    info, parts = encode(tmp_path / "1", Encoder(ByteTokenizer()), batches)
    assert (info.inexact_cuts, parts) == (0, [["xyz", "short"]])
    info, parts = encode(tmp_path / "2", Encoder(Spaced()), batches)
    assert (info.inexact_cuts, parts) == (2, [[" x y z", " short"]])


class Broken(ByteTokenizer):
    """Claims fewer ids than it has."""

    vocab_size = 100


def test_an_id_that_would_wrap_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match="gave ids 32 to 121, outside its vocabulary of 100"):
        encode(tmp_path, Encoder(Broken()), [Batch(["it can not be true, says y"])])
    assert list(tmp_path.iterdir()) == []


def test_what_the_digest_tells_apart() -> None:
    encoders: list[dict[str, Any]] = [{}, {"filters": ["length:min_words=2"]}, {"valid_fraction": 0.1}]
    encoders += [{"valid_fraction": 0.1, "seed": 3}]
    digests = [Encoder(ByteTokenizer(), **options).digest for options in encoders]
    assert len(set(digests)) == len(digests)
    assert pickle.loads(pickle.dumps(Encoder(ByteTokenizer(), **encoders[1]))).digest == digests[1]


def test_a_filter_that_is_rewritten_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = []
    for body in ("len(text) > 1", "len(text) > 2"):
        (tmp_path / "my_filters.py").write_text(f"def keeps(text: str) -> bool:\n    return {body}\n")
        digests.append(Encoder(ByteTokenizer(), ["my_filters:keeps"]).digest)
    assert digests[0] != digests[1]


def test_batches_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Memory is that of a batch: the next is asked for when the last is written."""
    written: list[int] = []

    def batches(piece: PieceWriter) -> Iterator[Batch]:
        for _ in range(3):
            written.append(piece.info.parts[0].tokens)
            yield Batch(["ab"])

    with PieceWriter(PieceFolder(tmp_path), "a", 1) as piece:
        Encoder(ByteTokenizer()).encode(batches(piece), piece)
    assert written == [0, 3, 6]


def test_where_a_document_was_cut_has_no_say(tmp_path: Path) -> None:
    """The same text in one piece or in several: to the same side, and the same verdict of a filter."""
    text = "".join(f"word{number} " for number in range(90_000))
    assert len(text) > SEEN_CHARACTERS
    whole, cut = [Batch([text])], [Batch([text[:SEEN_CHARACTERS]], continues=True), Batch([text[SEEN_CHARACTERS:]])]
    for seed in range(8):
        encoder = Encoder(ByteTokenizer(), valid_fraction=0.5, seed=seed)
        parts = [encode(tmp_path / f"{seed}-{len(batches)}", encoder, batches)[1] for batches in (whole, cut)]
        assert parts[0] == parts[1]
    for batches in (whole, cut):
        encoder = Encoder(ByteTokenizer(), [f"length:max_characters={SEEN_CHARACTERS - 1}"])
        assert encode(tmp_path / f"{len(batches)}", encoder, batches)[1] == [[]]


class Faster(ByteTokenizer):
    backend = "bytes 2"


def test_pieces_of_another_backend_are_others() -> None:
    """So that --backend reference begins anew where a fast one was found wrong."""
    assert Encoder(ByteTokenizer()).digest != Encoder(Faster()).digest
