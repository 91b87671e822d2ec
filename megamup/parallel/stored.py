"""Initial weights out of a folder: safetensors under global names and logical shapes, and a manifest of where each is.

A rank reads its own slices and no more, so that a folder is of any layout.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from megamup.errors import MegamupError
from megamup.parallel.init import shard_bounds
from megamup.parallel.mesh import Axis
from megamup.parameters import Parameter

MANIFEST = "weights.json"
ADVICE = "write it again with tools/import_hf.py"


def safetensors() -> Any:
    """The package, or a MegamupError that says how to get it."""
    try:
        return importlib.import_module("safetensors.torch"), importlib.import_module("safetensors")
    except ImportError as error:
        raise MegamupError(f"safetensors can't be imported ({error}): pip install 'megamup[hf]'") from None


@dataclass(frozen=True)
class StoredWeights:
    """A folder that `tools/import_hf.py` wrote."""

    folder: Path
    files: Mapping[str, str]
    """Global name -> file."""
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: Path, inventory: Mapping[str, Parameter]) -> StoredWeights:
        """The weights of a folder, all of which the model has, and the other way round.

        Raises:
            MegamupError: no such folder, or weights of another model; says which parameter.
        """
        safetensors()  # missing, it is missed now
        path = folder / MANIFEST
        try:
            tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
            files = {name: str(entry["file"]) for name, entry in tensors.items()}
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MegamupError(f"train.init={folder}: {MANIFEST} is not readable ({error}); {ADVICE}") from None
        if outside := [file for file in files.values() if Path(file).name != file]:
            raise MegamupError(f"train.init={folder}: {outside[0]!r} is no file of this folder; {ADVICE}")
        for name in sorted(files.keys() | inventory.keys()):
            there = shapes.get(name)
            wanted = inventory[name].shape if name in inventory else None
            if there != wanted:
                raise MegamupError(
                    f"train.init={folder}: {name} is {said(there)} there, and {said(wanted)} in the model; give the "
                    "model section that was written with it"
                )
        return cls(folder, files, shapes)

    def shard(self, parameter: Parameter, axis: Axis) -> Tensor:
        """A rank's shard as `initial_shard` gives it: fp32, logical shape but for the partition dim."""
        path, dim = self.folder / self.files[parameter.name], parameter.partition_dim or 0
        rows = slice(*shard_bounds(parameter, axis))
        _, reader = safetensors()
        try:
            with reader.safe_open(path, framework="pt") as file:
                piece = file.get_slice(parameter.name)[(slice(None),) * dim + (rows,)]
        except (OSError, reader.SafetensorError) as error:
            raise MegamupError(f"train.init={self.folder}: {path.name} can't be read ({error}); {ADVICE}") from None
        return cast(Tensor, piece).float().contiguous()


def said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"
