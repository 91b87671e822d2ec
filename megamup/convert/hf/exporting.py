"""A run's checkpoint as a folder that `from_pretrained` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megamup.config import Config, load_config
from megamup.convert.hf.checkpoint import CheckpointWeights
from megamup.convert.hf.families import Family, family_of
from megamup.convert.hf.fold import factors, fold, shapes
from megamup.convert.hf.folder import INDEX, SHARD_BYTES, Made, read_json, whole_folder, write_tensors
from megamup.convert.hf.tokenizer import TokenizerFiles, exported
from megamup.parallel.stored import MANIFEST
from megamup.train import checkpoint

DTypeName = Literal["float32", "bfloat16"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """A model of ours as one of theirs, whose tensors are computed one by one."""

    family: Family
    settings: dict[str, Any]
    """config.json."""
    tensors: Sequence[Made]


def export_run(run: str, output: Path, dtype: DTypeName = "float32") -> list[str]:
    """Write ``RUN[@STEP]`` to a new folder; returns lines that say what was written, and what could not be said.

    Raises:
        MegamupError: no such run or step, a model that no class computes, a multiplier that can't be folded, a
            checkpoint that is cut short, or ``output`` is there.
    """
    folder, step, path = checkpoint.named(run)
    config = load_config([folder / "config.yaml"])
    family_of(config.model)
    tokenizer = exported(config)
    with whole_folder(output) as beside:
        made = convert(config, CheckpointWeights(config, path), dtype, tokenizer)
        write(beside, made, tokenizer)
    size = sum(size for _, size, _ in made.tensors)
    line = f"{output}: {made.family.name} of {folder} after {step} steps, {len(made.tensors)} tensors of {dtype}"
    init, notes = config.train.init, []
    if init is not None and not (Path(init) / MANIFEST).is_file():
        notes.append(f"{init}: not there any more; rows that import added to the vocabulary, if any, were not cut off")
    return [f"{line}, {size / 1e6:,.1f} MB", *notes, *tokenizer.notes]


def convert(
    config: Config, weights: Mapping[str, Tensor], dtype: DTypeName = "float32", tokenizer: TokenizerFiles | None = None
) -> Exported:
    """A model of ours, its weights whole and by global name, as one of theirs.

    Raises:
        MegamupError: no class computes it, or a multiplier can't be folded.
    """
    model, family = config.model, family_of(config.model)
    rows = rows_of_vocabulary(config)
    ids = special_settings(config, None if tokenizer is None else tokenizer.eod_id)
    settings = {
        "architectures": [family.name],
        "model_type": family.model_type,
        "vocab_size": rows,
        "tie_word_embeddings": model.tie_embeddings,
        **family.settings(model),
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers before its version 5
        **ids,
    }
    widened = family.inventory(model.model_copy(update={"vocab_size": rows}))
    entries = family.entries(model, widened)
    folded = fold(entries, factors(config, family.own_scales(model, settings)), weights, widened, rows)
    sizes, kind = shapes(entries, widened), DTYPES[dtype]
    tensors = [(name, math.prod(sizes[name]) * kind.itemsize, of_type(kind, compute)) for name, compute in folded]
    return Exported(family, settings, tensors)


def of_type(kind: torch.dtype, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: compute().to(kind)


def rows_of_vocabulary(config: Config) -> int:
    """Rows that mean something: all, but where import added some for the layout."""
    init = config.train.init
    if init is None or not (Path(init) / MANIFEST).is_file():
        return config.model.vocab_size
    return min(config.model.vocab_size, int(read_json(Path(init) / MANIFEST)["vocab_size"]))


def special_settings(config: Config, eod_id: int | None) -> dict[str, Any]:
    """Ids that begin, end and pad; null where they aren't known, since a class's own are another vocabulary's."""
    if config.model.arch == "bert":
        mask = config.objective.mask_id
        masked = config.model.vocab_size - 1 if mask is None else mask
        return {"pad_token_id": eod_id, "mask_token_id": masked}
    if config.model.arch == "t5":
        start = eod_id if config.objective.start_id is None else config.objective.start_id
        return {"eos_token_id": eod_id, "pad_token_id": start, "decoder_start_token_id": start}
    return {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": None}


def write(folder: Path, made: Exported, tokenizer: TokenizerFiles) -> None:
    files = write_tensors(folder, "model", made.tensors, SHARD_BYTES)
    if len(set(files.values())) > 1:
        total = sum(size for _, size, _ in made.tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    write_json(folder / "config.json", made.settings)
    if made.family.model_type != "bert":
        generation = {key: value for key, value in made.settings.items() if key.endswith("_token_id")}
        write_json(folder / "generation_config.json", {key: i for key, i in generation.items() if i is not None})
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def state_dict(made: Exported) -> dict[str, Tensor]:
    """All tensors at once."""
    return {name: compute() for name, _, compute in made.tensors}
