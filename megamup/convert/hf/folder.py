"""Folders of safetensors: a Hugging Face model's, read with care, and ours, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from megamup.errors import MegamupError
from megamup.files import sync_folder
from megamup.parallel.stored import safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5_000_000_000
"""Of a file, as `save_pretrained` cuts."""


class ModelFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model by name, each read when it is asked for.

    Raises:
        MegamupError: no safetensors there, or files that are damaged or don't fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = read_json(folder / "config.json")
        _, self._library = safetensors()
        self._file: Any = None
        self._open = ""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        listed = self._listed()
        for name in sorted(set(listed.values())) if listed else [SINGLE]:
            self._look_into(name)
        if listed is not None and (wrong := [name for name, file in listed.items() if self._files.get(name) != file]):
            raise MegamupError(f"{folder / INDEX}: {wrong[0]} is not in {listed[wrong[0]]}, where the index says it is")

    def _listed(self) -> dict[str, str] | None:
        """Name of tensor -> file, of an index; None where there is one file."""
        if (self.folder / SINGLE).is_file():
            return None
        if not (self.folder / INDEX).is_file():
            pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
            advice = (
                f"{pickles[0]} is a pickle, which runs code when it is read, and is not opened; convert it where you "
                "trust it: AutoModel.from_pretrained(...).save_pretrained(FOLDER)"
                if pickles
                else f"expected {SINGLE}, or {INDEX} and its files"
            )
            raise MegamupError(f"{self.folder}: no safetensors; {advice}")
        listed = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise MegamupError(f"{self.folder / INDEX}: expected a weight_map of file names")
        for file in listed.values():
            if os.path.basename(file) != file or not file.endswith(".safetensors"):
                raise MegamupError(f"{self.folder / INDEX}: {file!r} is no safetensors file of this folder")
        return listed

    def _look_into(self, file: str) -> None:
        """The names and shapes of a file, from its header."""
        handle = self._handle(file)
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            if name in self._files:
                raise MegamupError(f"{self.folder}: {name} is in {self._files[name]} and in {file}; expected it once")
            part = handle.get_slice(name)
            if (kind := part.get_dtype()) not in FLOATS:
                raise MegamupError(
                    f"{self.folder / file}: {name} is of type {kind}, expected {', '.join(FLOATS)}: quantized weights "
                    "can't be trained on; take the model before it was quantized"
                )
            self._files[name], self.shapes[name] = file, tuple(part.get_shape())

    def _handle(self, file: str) -> Any:
        """One file is open at a time."""
        if self._open != file:
            try:
                self._file, self._open = self._library.safe_open(self.folder / file, framework="pt"), file
            except (OSError, self._library.SafetensorError) as error:
                raise MegamupError(f"{self.folder / file}: not readable as safetensors ({error})") from None
        return self._file

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, self._handle(self._files[name]).get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Renamed(Mapping[str, Tensor]):
    """The same tensors under other names."""

    def __init__(self, folder: ModelFolder, rename: Callable[[str], str]) -> None:
        self._names = {rename(name): name for name in folder}
        self._folder = folder
        self.shapes = {name: folder.shapes[own] for name, own in self._names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._folder[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_json(path: Path) -> dict[str, Any]:
    """Raises MegamupError where there is no such file, or no JSON object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MegamupError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise MegamupError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that gets the name ``output`` where nothing is raised, and else is gone.

    Raises:
        MegamupError: ``output`` is there already.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MegamupError(f"{output}: is there already; give the name of a new folder, or remove it")
    beside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a program that was killed
    try:
        beside.mkdir(parents=True)
        yield beside
        for path in [*beside.rglob("*"), beside]:
            if path.is_dir():
                sync_folder(path)
            else:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.replace(beside, output)
        sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


Made = tuple[str, int, Callable[[], Tensor]]
"""A tensor's name, its bytes, and how to compute it."""


def shards(tensors: Sequence[Made], limit: int) -> list[list[Made]]:
    """In order, as many in a file as fit; one that is larger has a file of its own."""
    found: list[list[Made]] = [[]]
    size = 0
    for tensor in tensors:
        if found[-1] and size + tensor[1] > limit:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor[1]
    return found


def write_tensors(folder: Path, stem: str, tensors: Sequence[Made], limit: int) -> dict[str, str]:
    """Write ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` and the others, one at a time in memory.

    Returns:
        Name of tensor -> file.
    """
    writer, _ = safetensors()
    umask = os.umask(0)
    os.umask(umask)
    readable = 0o666 & ~umask
    pieces = shards(tensors, limit)
    files: dict[str, str] = {}
    for number, piece in enumerate(pieces, 1):
        name = f"{stem}.safetensors" if len(pieces) == 1 else f"{stem}-{number:05d}-of-{len(pieces):05d}.safetensors"
        computed = {tensor: compute() for tensor, _, compute in piece}
        writer.save_file(computed, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(readable)  # safetensors makes files that only their owner reads
        files |= dict.fromkeys(computed, name)
    return files
