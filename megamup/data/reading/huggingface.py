"""Data sets of Hugging Face: folders made by `save_to_disk`, and names that `datasets.load_dataset` knows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from megamup.errors import MegamupError

PREFIX = "hf:"


def saved_files(folder: str) -> list[str] | None:
    """The Arrow files of a data set that `save_to_disk` wrote, in order; None where the folder isn't one.

    Raises:
        MegamupError: it has several splits, or an order of its rows that its files don't have, or is broken.
    """
    names = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(names):
        splits = _read(names, "splits")
        if len(splits) != 1:
            choices = " ".join(os.path.join(folder, split) for split in splits)
            raise MegamupError(f"{folder}: a data set of several splits; name what to read: {choices}")
        return saved_files(os.path.join(folder, splits[0]))
    state = os.path.join(folder, "state.json")
    if not (os.path.isfile(state) and os.path.isfile(os.path.join(folder, "dataset_info.json"))):
        return None
    if _read(state, "_indices_files", []):
        raise MegamupError(
            f"{folder}: this data set was selected or shuffled by a table of indices (_indices_files), its Arrow files "
            "hold other rows; save it again with dataset.flatten_indices().save_to_disk(...)"
        )
    files = [os.path.join(folder, entry["filename"]) for entry in _read(state, "_data_files")]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise MegamupError(f"{missing[0]}: no such file, but {state} names it")
    return files


def _read(path: str, key: str, default: Any = None) -> Any:
    try:
        with open(path, "rb") as file:
            value = json.load(file)
        return value[key] if default is None else value.get(key) or default
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise MegamupError(f"{path}: not a file of datasets.save_to_disk: {error!r}") from error


class HubData:
    """A data set by name, read as a stream, shard by shard (files, mostly).

    Args:
        spec: `hf:NAME[:CONFIG[:SPLIT]]`, the split "train" by default; NAME is one of the hub, or a folder.

    Raises:
        MegamupError: there is no such data set, configuration or split, or the hub can't be reached.
    """

    def __init__(self, spec: str) -> None:
        name, *others = spec.removeprefix(PREFIX).split(":")
        if not name or len(others) > 2:
            raise MegamupError(f"input {spec!r}: expected hf:NAME[:CONFIG[:SPLIT]], such as hf:allenai/c4:en:train")
        config, split = [*others, "", ""][:2]
        try:
            import datasets
        except ImportError as error:
            raise MegamupError(f"input {spec!r}: needs the package datasets: pip install 'megamup[hf]'") from error
        self.spec = spec
        try:
            builder = datasets.load_dataset_builder(name, config or None)
            self._rows = builder.as_streaming_dataset(split or "train")
        except Exception as error:  # the library has many
            raise MegamupError(f"input {spec!r}: datasets says: {error}") from error
        self.state: str = builder.hash
        """Changes when the data set's files do."""
        self.shards: int = self._rows.num_shards

    def rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of one shard.

        Raises:
            MegamupError: it can't be read.
        """
        try:
            yield from self._rows.shard(num_shards=self.shards, index=shard)
        except Exception as error:
            raise MegamupError(f"{self.spec} shard {shard}: datasets says: {error}") from error
