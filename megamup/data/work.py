"""What worker processes run: one lane of one unit, from its input to its pieces."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from megamup.data.documents import Batch, ReadOptions
from megamup.data.encode import Encoder
from megamup.data.pieces import PieceFolder, PieceWriter, piece_key
from megamup.data.units import Unit


class StoppedError(RuntimeError):
    """The run that this work is for has ended."""


@lru_cache(maxsize=1)
def _load_encoder(path: Path) -> Encoder:
    """A worker's encoder, made once a process. The file's name holds its hash."""
    encoder: Encoder = pickle.loads(path.read_bytes())  # the run's own file, in its own folder
    return encoder


def encode_unit(
    encoder_path: Path, options: ReadOptions, unit: Unit, key: str, lane: int, lanes: int, alive: Path
) -> None:
    """Write the pieces of a unit that aren't there yet.

    Args:
        encoder_path: a pickled `Encoder` in the work folder.
        options: how documents are read.
        unit: of the plan.
        key: of the unit's pieces.
        lane: of a stream, pieces `lane`, `lane + lanes`, ... are written; others write the rest.
        lanes: in how many lanes the unit is worked on.
        alive: a file that is removed when the run ends, whereupon work stops.

    Raises:
        MegamupError: a document can't be read or encoded, or a piece not written.
    """
    encoder = _load_encoder(encoder_path)
    folder = PieceFolder(encoder_path.parent / "pieces", options.on_error == "skip")

    def wanted(piece: int) -> bool:
        return piece % lanes == lane and folder.info(piece_key(key, piece)) is None

    def while_alive(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if not alive.exists():
                raise StoppedError
            yield batch

    pieces = 0
    for piece, batches in unit.pieces(options, wanted):
        pieces = piece + 1
        if wanted(piece):
            with PieceWriter(folder, piece_key(key, piece), encoder.n_parts) as writer:
                encoder.encode(while_alive(batches), writer)
        elif not alive.exists():
            raise StoppedError
    if unit.is_stream:
        folder.mark_stream_end(key, pieces)
