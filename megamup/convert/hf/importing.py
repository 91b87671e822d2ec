"""A Hugging Face folder as a run that training starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megamup.config import Config, config_from, merge, parse_override
from megamup.convert.hf import tokenizer
from megamup.convert.hf.families import Family, family_named
from megamup.convert.hf.fold import Part, factors, parts, shapes, unfold
from megamup.convert.hf.folder import Made, ModelFolder, Renamed, read_json, whole_folder, write_tensors
from megamup.convert.hf.settings import Settings, required
from megamup.convert.hf.tables import Entry
from megamup.convert.hf.tables import without_biases as entries_without_biases
from megamup.errors import MegamupError
from megamup.parallel.stored import MANIFEST
from megamup.parameters import Parameter, parameters

INIT = "init"
"""Folder of the weights in a run's folder."""
SHARD_BYTES = 2_000_000_000
STANDARD = {"parametrization": "sp"}
"""Where no other is given: the rates of a model that wasn't trained under μP are its own."""


@dataclass(frozen=True)
class Imported:
    """A model of theirs as one of ours, whose weights are computed one by one."""

    values: dict[str, Any]
    """The config, but for what an import can't know (data, steps), unless it was given."""
    config: Config
    vocab_size: int
    """Rows that mean something: theirs, or those that were asked for. The config's may be more, for its layout."""
    weights: Sequence[Made]
    notes: list[str]


def import_folder(theirs: Path, output: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Write a run's folder that starts from the model in ``theirs``; returns lines that say what to know of it.

    Args:
        theirs: a folder with config.json and safetensors.
        output: a new folder; it gets config.yaml, init/ and, where ``theirs`` has its files, tokenizer/.
        overrides: ``a.b=c``, of any key of the config.

    Raises:
        MegamupError: an architecture, setting or tensor that isn't ours, by name; nothing is written then.
    """
    where = {"run": {"dir": str(output.parent), "name": output.name}, "train": {"init": str(output / INIT)}}
    made = convert(ModelFolder(theirs), overrides, where)
    with whole_folder(output) as beside:
        (beside / INIT).mkdir()
        files = write_tensors(beside / INIT, "weights", made.weights, SHARD_BYTES)
        inventory = parameters(made.config.model)
        described = {name: {"file": files[name], "shape": list(inventory[name].shape)} for name in inventory}
        manifest = {"vocab_size": made.vocab_size, "tensors": described}
        (beside / INIT / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (beside / "config.yaml").write_text(yaml.safe_dump(made.values, sort_keys=False), encoding="utf-8")
        copied = tokenizer.copy_tokenizer(theirs, beside / tokenizer.FOLDER)
    if not copied:
        made.notes.append(f"{theirs} holds no tokenizer files; make the corpus with the model's own tokenizer")
    lines = [f"{output}: {made.config.model.arch} of {len(inventory)} tensors, from {theirs}"]
    return [*lines, *made.notes, f"next: launch/pretrain.py {output}/config.yaml data.train=... train.steps=..."]


def convert(theirs: ModelFolder, overrides: Sequence[str] = (), where: Mapping[str, Any] | None = None) -> Imported:
    """A model of theirs as one of ours.

    Raises:
        MegamupError: see `import_folder`.
    """
    named = theirs.settings.get("architectures")
    family = family_named(named[0] if isinstance(named, list) and named else named)
    tensors = Renamed(theirs, names_of(family, theirs))
    notes: list[str] = []
    section, rows = section_of(family, theirs, tensors)
    values = settings(family, section, rows, theirs, overrides, dict(where or {}), notes)
    config = checked(values)
    own = config.model.model_copy(update={"vocab_size": rows})
    inventory = parameters(own)
    entries = [entry for entry in family.entries(own, inventory) if all(name in inventory for name in entry.ours)]
    if family.name == "LlamaForCausalLM":
        entries = without_biases(entries, theirs.settings)
    check_tensors(family, entries, shapes(entries, inventory), tensors, notes)
    factor = factors(config, family.own_scales(own, theirs.settings))
    made_of = parts(entries, inventory)
    if zero := [name for name in inventory if name not in made_of]:
        notes.append(f"{family.name} has no {listed(zero)}: zeros, which are trained")
    weights = [
        (name, 4 * parameter.size, partial(weight, parameter, made_of.get(name, []), factor[name], tensors))
        for name, parameter in parameters(config.model).items()
    ]
    asked = [parse_override(override).get("model", {}).get("vocab_size") for override in overrides]
    return Imported(values, config, max([rows, *(count for count in asked if count)]), weights, notes)


def weight(parameter: Parameter, made_of: list[Part], factor: float, theirs: Mapping[str, Tensor]) -> Tensor:
    """One of ours; zeros where theirs has none, and in rows that are added to the vocabulary."""
    if not made_of:
        return torch.zeros(parameter.shape)
    found = unfold(made_of, factor, theirs)
    added = parameter.shape[0] - found.shape[0]
    return torch.cat((found, found.new_zeros(added, *found.shape[1:]))) if added else found


def names_of(family: Family, folder: ModelFolder) -> Callable[[str], str]:
    """Names as the class has them: older files lack its prefix, or call a norm's gain and bias gamma and beta."""
    prefix = "" if any(name.startswith(family.prefix) for name in folder) else family.prefix

    def own(name: str) -> str:
        return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{NORM[m[1]]}", prefix + name)

    return own


NORM = {"gamma": "weight", "beta": "bias"}


# ----------------------------------------------------------------------------- the config


def section_of(family: Family, theirs: ModelFolder, tensors: Renamed) -> tuple[dict[str, Any], int]:
    """The ``model`` section, and the rows of the vocabulary."""
    section = family.section(theirs.settings)
    if family.model_type == "t5":  # its class ties where there is no readout in the file, whatever config.json says
        section["tie_embeddings"] = "lm_head.weight" not in tensors
    return {key: value for key, value in section.items() if value is not None}, required(theirs.settings, "vocab_size")


def settings(
    family: Family,
    section: dict[str, Any],
    rows: int,
    theirs: ModelFolder,
    overrides: Sequence[str],
    where: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The values of config.yaml."""
    values: dict[str, Any] = {"model": section | {"vocab_size": rows}, **where}
    if objective := objective_of(family, theirs, notes):
        values["objective"] = objective
    given: dict[str, Any] = {}
    for override in overrides:
        merge(given, parse_override(override))
    if "parametrization" not in (given.get("mup") or {}):
        values["mup"] = dict(STANDARD if not given.get("mup") else {})
    merge(values, given)
    wanted, tensor = values["model"]["vocab_size"], (given.get("parallel") or {}).get("tensor", 1)
    if isinstance(wanted, int) and isinstance(tensor, int) and tensor > 0:
        wanted = values["model"]["vocab_size"] = -(-wanted // tensor) * tensor
        if wanted < rows:
            raise MegamupError(f"model.vocab_size={wanted}: the model has {rows} rows; expected at least as many")
        if wanted > rows:
            notes.append(
                f"model.vocab_size={wanted}: {wanted - rows} rows of zeros were added to the model's {rows}; their "
                "logits begin at 0 and training lowers them; export cuts off those that nobody asked for"
            )
    dropout = [key for key, value in theirs.settings.items() if "drop" in key and value]
    if dropout:
        notes.append(f"config.json: {', '.join(dropout)}: megamup has no dropout")
    return values


SPECIAL = {"bert": ("[MASK]", "mask_id"), "t5": ("<extra_id_0>", "first_sentinel")}
"""The token that the architecture's own objective needs, and the key that names its id."""


def objective_of(family: Family, theirs: ModelFolder, notes: list[str]) -> dict[str, Any]:
    """Ids of what the model was trained to predict, where its files tell."""
    ids = tokenizer.special_ids(theirs.folder)
    if type(mask := theirs.settings.get("mask_token_id")) is int:  # export writes it
        ids.setdefault("[MASK]", mask)
    token, key = SPECIAL.get(family.model_type, ("", ""))
    if token and token not in ids:
        notes.append(f"{theirs.folder}: no file tells the id of {token}; give objective.{key} if it isn't the highest")
    if family.model_type == "bert":
        tokens = {"mask_id": "[MASK]"}
        if family.name == "BertForPreTraining":
            tokens |= {"cls_id": "[CLS]", "sep_id": "[SEP]"}
        found: dict[str, Any] = {key: ids[token] for key, token in tokens.items() if token in ids}
        return found | ({"pairs": "next_sentence"} if family.name == "BertForPreTraining" else {})
    if family.model_type != "t5":
        return {}
    generation = theirs.folder / "generation_config.json"
    known = dict(theirs.settings) | (read_json(generation) if generation.is_file() else {})
    start = known.get("decoder_start_token_id", known.get("pad_token_id", 0))
    found = {} if start is None else {"start_id": start}
    return found | ({"first_sentinel": ids["<extra_id_0>"]} if "<extra_id_0>" in ids else {})


def checked(values: dict[str, Any]) -> Config:
    """The config as it will be: what only training needs may be missing yet."""
    whole: dict[str, Any] = {"data": {"train": "-"}, "train": {"steps": 1}}
    copy: dict[str, Any] = {}
    merge(copy, whole)
    merge(copy, values)
    return config_from(copy)


# ----------------------------------------------------------------------------- the tensors


def without_biases(entries: list[Entry], settings: Settings) -> list[Entry]:
    """Llama has two switches for biases, of attention and of the MLP."""
    off = [] if settings.get("attention_bias") else [".self_attn."]
    off += [] if settings.get("mlp_bias") else [".mlp."]
    return entries_without_biases(entries, tuple(off))


def check_tensors(
    family: Family,
    entries: Sequence[Entry],
    wanted: Mapping[str, tuple[int, ...]],
    theirs: Renamed,
    notes: list[str],
) -> None:
    """Raises MegamupError where a tensor is missing, has another shape, or is no part of the class."""
    if missing := [name for name in wanted if name not in theirs]:
        raise MegamupError(f"{family.name} lacks {listed(missing)} in these files; expected all tensors of the class")
    for name, shape in wanted.items():
        if theirs.shapes[name] != shape:
            raise MegamupError(f"{name} has shape {theirs.shapes[name]}; config.json makes it {shape}")
    extra = [name for name in theirs if name not in wanted]
    for name in extra:
        source = family.copies.get(name)
        if source is not None and not torch.equal(theirs[name], theirs[source]):
            raise MegamupError(
                f"{name} differs from {source}, but config.json ties them; set tie_word_embeddings=false"
            )
    passed = [name for name in extra if name.endswith(family.passed_over)]
    if unknown := [name for name in extra if name not in family.copies and name not in passed]:
        raise MegamupError(f"{listed(unknown)} in these files: no tensors of {family.name}; expected its own alone")
    if passed:
        notes.append(f"{family.name} doesn't read {listed(passed)}: left out")


def listed(names: Sequence[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
