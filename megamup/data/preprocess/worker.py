"""What worker processes run: one lane of one unit, from its input to its pieces."""

from __future__ import annotations

import hashlib
import pickle
from functools import lru_cache
from pathlib import Path

from megamup.data.preprocess.encode import Encoder
from megamup.data.preprocess.pieces import PieceFolder, PieceWriter, piece_key
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.units import Unit
from megamup.data.work.lanes import Lane, while_alive
from megamup.data.writer import writing
from megamup.files import write_bytes_atomic


def write_encoder(encoder: Encoder, folder: Path) -> Path:
    """Put the encoder in the work folder, where workers find it; its name is a hash, so equal ones have equal names.

    Raises:
        MegamupError: the folder can't be written.
    """
    data = pickle.dumps(encoder)
    path = folder / f"encoder-{hashlib.sha256(data).hexdigest()[:16]}.pickle"
    with writing(path):
        write_bytes_atomic(path, data)
    return path


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
        MegamupError: a document can't be read or encoded, the input has changed, or a piece isn't written.
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
                for source in unit.sources:
                    source.check_unchanged()
    if unit.is_stream:
        folder.mark_stream_end(key, pieces)
