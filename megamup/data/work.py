"""What worker processes run: one lane of one unit, from its input to its pieces."""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path

from megamup.data.documents import ReadOptions
from megamup.data.encode import Encoder
from megamup.data.lanes import Lane, while_alive
from megamup.data.pieces import PieceFolder, PieceWriter, piece_key
from megamup.data.units import Unit


@lru_cache(maxsize=1)
def _load_encoder(path: Path) -> Encoder:
    """A worker's encoder, made once a process. The file's name holds its hash."""
    encoder: Encoder = pickle.loads(path.read_bytes())  # the run's own file, in its own folder
    return encoder


def encode_lane(encoder_path: Path, options: ReadOptions, unit: Unit, key: str, lane: Lane, alive: Path) -> None:
    """Write the pieces of a lane that aren't there yet.

    Args:
        encoder_path: a pickled `Encoder` in the work folder.
        options: how documents are read.
        unit: the lane's.
        key: of the unit's pieces.
        lane: which of them.
        alive: see `while_alive`.

    Raises:
        MegamupError: a document can't be read or encoded, or a piece not written.
    """
    encoder = _load_encoder(encoder_path)
    folder = PieceFolder(encoder_path.parent / "pieces", options.on_error == "skip")

    def wanted(piece: int) -> bool:
        return lane.has(piece) and folder.info(piece_key(key, piece)) is None

    pieces = 0
    for piece, batches in while_alive(unit.pieces(options, wanted), alive):
        pieces = piece + 1
        if wanted(piece):
            with PieceWriter(folder, piece_key(key, piece), encoder.n_parts) as writer:
                encoder.encode(while_alive(batches, alive), writer)
    if unit.is_stream:
        folder.mark_stream_end(key, pieces)
