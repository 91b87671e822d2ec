"""Pieces to shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.data.preprocess.assemble import ShardPlan, assemble, assembled, record_path
from megamup.data.preprocess.pieces import PartInfo, PieceFolder, PieceWriter
from megamup.data.shards import Shard
from megamup.errors import MegamupError

DTYPE = np.dtype("<u2")


def shards_of(pieces: list[list[int]], limit: int) -> list[list[tuple[int, int]]]:
    """Documents (piece, place in it) of each shard that a plan makes of pieces of documents of these lengths."""
    plan = ShardPlan(limit, lambda key: np.array(pieces[int(key)]))
    made = []
    for number, lengths in enumerate(pieces):
        made += plan.feed(str(number), PartInfo(documents=len(lengths), tokens=sum(lengths)))
    if plan.segments:
        made.append(plan.finish())
    for segment in (segment for shard in made for segment in shard):
        lengths = pieces[int(segment.key)]
        assert segment.start == sum(lengths[: segment.first])
        assert segment.stop == sum(lengths[: segment.last])
    return [[(int(s.key), place) for s in shard for place in range(s.first, s.last)] for shard in made]


@pytest.mark.parametrize("limit", [1, 7, 30, 100, 10**6])
def test_shards_dont_depend_on_pieces(limit: int) -> None:
    rng = np.random.default_rng(limit)
    lengths = [int(length) for length in rng.integers(0, 20, size=200)]
    whole = [[place for _, place in shard] for shard in shards_of([lengths], limit)]
    assert [place for shard in whole for place in shard] == list(range(200))
    for shard in whole:
        assert sum(lengths[place] for place in shard) <= limit or sum(lengths[place] > 0 for place in shard) == 1
    for cuts in ([50, 51, 120], sorted(rng.integers(0, 200, size=30).tolist())):
        pieces = [piece.tolist() for piece in np.split(np.array(lengths), cuts)]
        starts = np.cumsum([0, *map(len, pieces)])
        assert [[int(starts[piece]) + place for piece, place in shard] for shard in shards_of(pieces, limit)] == whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pieces of two parts: documents [1] [2 2] [] and [3 3 3] in part 0."""
    (tmp_path / "pieces").mkdir()
    for key, documents in (("a", [[1], [2, 2], []]), ("b", [[3, 3, 3]])):
        with PieceWriter(PieceFolder(tmp_path / "pieces"), key, 1) as piece:
            piece.write(0, np.array([token for document in documents for token in document], DTYPE), 10)
            piece.end_documents(0, np.array([len(document) for document in documents]))
    return tmp_path


def segments(folder: Path, limit: int = 100) -> list[list[Any]]:
    pieces = PieceFolder(folder / "pieces")
    plan = ShardPlan(limit, lambda key: pieces.lengths(key, 0))
    full = []
    for key in ("a", "b"):
        info = pieces.info(key)
        assert info is not None
        full += plan.feed(key, info.parts[0])
    return [*full, plan.finish()]


def test_a_shard_of_two_pieces(folder: Path) -> None:
    (shard,) = segments(folder)
    entry = assemble(folder, 0, shard, DTYPE)
    made = Shard(str(folder / "shards" / entry.name))
    assert [made.document(index).tolist() for index in range(len(made))] == [[1], [2, 2], [], [3, 3, 3]]
    assert assembled(folder, 0, shard) == entry
    assert assembled(folder, 0, segments(folder, limit=3)[0]) is None  # of the same pieces, but fewer documents


def test_shards_within_a_piece(folder: Path) -> None:
    entries = [assemble(folder, 0, shard, DTYPE) for shard in segments(folder, limit=1)]
    shards = [Shard(str(folder / "shards" / entry.name)) for entry in entries]
    assert [shard.tokens(0, shard.n_tokens).tolist() for shard in shards] == [[1], [2, 2], [3, 3, 3]]


@pytest.mark.parametrize("name", ["a.0.bin", "a.0.len"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), Path.unlink])
def test_a_piece_whose_files_are_lost_is_none(folder: Path, name: str, damage: Any) -> None:
    """As after a crash of the machine, which may keep the marker alone."""
    damage(folder / "pieces" / name)
    assert PieceFolder(folder / "pieces").info("a") is None
    assert PieceFolder(folder / "pieces").info("b") is not None


@pytest.mark.parametrize("name", ["a.0.bin", "a.0.len"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"\1" * path.stat().st_size), Path.unlink])
def test_a_damaged_piece_is_given_up(folder: Path, name: str, damage: Any) -> None:
    """A crash of the machine may lose what was written last: the piece isn't done any more; nothing is made of it."""
    (shard,) = segments(folder)
    damage(folder / "pieces" / name)
    with pytest.raises(
        MegamupError, match=r"a\.bin: what is on the disk isn't what was written.*start the same command"
    ):
        assemble(folder, 0, shard, DTYPE)
    assert not record_path(folder, 0, shard).exists()
    assert PieceFolder(folder / "pieces").info("a") is None
    assert PieceFolder(folder / "pieces").info("b") is not None


def test_a_piece_left_in_the_middle_is_none(tmp_path: Path) -> None:
    folder = PieceFolder(tmp_path)

    def write() -> None:
        with PieceWriter(folder, "a", 1) as piece:
            piece.write(0, np.array([1], DTYPE), 1)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write()
    assert folder.info("a") is None
    assert list(tmp_path.iterdir()) == []
