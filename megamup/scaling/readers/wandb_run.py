"""Offline runs of Weights & Biases: `run-ID.wandb`, a log in LevelDB's format of protocol buffers.

The package has read this file in Python and in Go over its versions; the format has stayed the same, so the framing is
read here and only the messages are the package's. https://github.com/google/leveldb/blob/main/doc/log_format.md, with
zlib's CRC-32 in place of Castagnoli's, after a header of 7 bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamup.errors import MegamupError
from megamup.model import Model
from megamup.parameters import count
from megamup.scaling.readers.log import Record, RunLog, by_wandb_step, flat

HEADER = struct.Struct("<4sHB")
IDENT = (b":W&B", 0xBEE1, 0)
CHUNK = struct.Struct("<IHB")
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_file(path: Path) -> Path | None:
    """The .wandb file that `path` is or holds."""
    if path.suffix == ".wandb" and path.is_file():
        return path
    return next(iter(sorted(path.glob("run-*.wandb"))), None) if path.is_dir() else None


def read_wandb_run(name: str, path: Path) -> RunLog:
    """An offline run: its history by step, its config as facts; what a killed run left half-written is dropped.

    A run of ours is known by its config, from which its parameters are counted.

    Args:
        name: what to call it; a folder's name of `offline-run-...` gives way to the run's display name.
        path: the folder `offline-run-...`, or the file in it.

    Raises:
        MegamupError: the wandb package is missing, or the file is broken or without history.
    """
    try:
        from wandb.proto import wandb_internal_pb2 as messages
    except ImportError as error:
        raise MegamupError(f"{path}: reading it takes the wandb package; pip install 'megamup[log]'") from error
    file = wandb_file(path)
    if file is None:
        raise MegamupError(f"{path}: holds no run-*.wandb; expected the folder of an offline run")
    records: list[Record] = []
    config: Record = {}
    for payload in _payloads(file):
        message = messages.Record()
        message.ParseFromString(payload)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            config |= _values(message.run.config.update)
            if "run-" in name and message.run.display_name:
                name = message.run.display_name
        elif kind == "config":
            config |= _values(message.config.update)
        elif kind == "history":
            record = flat(_values(message.history.item))
            records.append({"_step": message.history.step.num} | record)
    if not records:
        raise MegamupError(f"{file}: holds no history; the run logged nothing, so leave it out")
    facts = flat(config)
    convention = facts.get("train.flops_convention")
    return RunLog(name, path, by_wandb_step(records), facts | _counts(config), convention)


def _payloads(path: Path) -> Iterator[bytes]:
    """The log's records, put together from their chunks."""
    data = path.read_bytes()
    if len(data) < HEADER.size or HEADER.unpack_from(data) != IDENT:
        raise MegamupError(f"{path}: is no .wandb file of version 0; expected an offline run of the wandb package")
    position, parts = HEADER.size, b""
    while position + CHUNK.size <= len(data):
        if BLOCK - position % BLOCK < CHUNK.size:  # no chunk begins in the last bytes of a block
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = CHUNK.unpack_from(data, position)
        chunk = data[position + CHUNK.size : position + CHUNK.size + length]
        if len(chunk) < length:
            return
        if kind not in (FULL, FIRST, MIDDLE, LAST) or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise MegamupError(f"{path}: is damaged at byte {position}; restore it, or leave this run out")
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
        position += CHUNK.size + length


def _values(items: Any) -> Record:
    """Items of a history or config message; keys of nested values are lists."""
    found: Record = {}
    for item in items:
        key = item.key or ".".join(item.nested_key)
        found[key] = json.loads(item.value_json) if item.value_json else _typed(item)
    return found


def _typed(item: Any) -> Any:
    """A value that later versions send without JSON."""
    kinds = [kind for kind in ("number", "integer", "text") if kind in item.DESCRIPTOR.fields_by_name]
    return next((getattr(item, kind) for kind in kinds if item.HasField(kind)), None)


def _counts(config: Record) -> Record:
    """Parameters of the model in the config of a run of ours; nothing for others."""
    try:
        model = Model.model_validate(config["model"])
    except (KeyError, TypeError, ValueError):
        return {}
    return {f"parameters.{kind}": number for kind, number in count(model).items()}
