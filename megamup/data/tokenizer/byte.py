"""UTF-8 bytes as tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from megamup.data.tokenizer.base import FastBackendError, FileTokenizer, Ids, Lengths
from megamup.errors import MegamupError


class ByteTokenizer(FileTokenizer):
    """The 256 byte values of UTF-8, and 256 for the end of a document. Exact for every text.

    Raises:
        MegamupError: `eod` is another than 256.
    """

    kind: ClassVar[str] = "bytes"
    vocab_size = 257
    eod_id = 256
    backend = "bytes"

    def __init__(self, eod: str | None = None) -> None:
        if eod not in (None, str(self.eod_id)):
            raise MegamupError(f"--eod {eod!r}: the tokenizer `bytes` ends documents with its id 256; leave --eod out")
        super().__init__("bytes", {}, str(self.eod_id))

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        encoded = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.frombuffer(b"".join(encoded), dtype=np.uint8), lengths

    def decode(self, ids: Ids) -> str:
        values = np.asarray(ids)
        data: bytes = values[values != self.eod_id].astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")

    def gigatoken(self) -> Any:
        raise FastBackendError  # without a reason: nothing is left to be made faster
