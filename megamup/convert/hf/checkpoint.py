"""A checkpoint's weights by global name, whole and in fp32, from DeepSpeed's files of any layout.

    |            | without a pipeline                   | with one                                    |
    | ZeRO 0     | mp_rank_TT_model_states.pt           | layer_LL-model_TT-model_states.pt           |
    | ZeRO 1-2   | fp32 in parts, laid end to end: (bf16_)zero_pp_rank_D_mp_rank_MM_optim_states.pt, names in     |
    |            | mp_rank_MM_model_states.pt                                                         |
    | ZeRO 3     | each parameter in D parts            | -                                           |

with tensor rank TT, data rank D and MM = stage x tensor + TT; and experts_pipelineP_tensorT_expertE.pt, where ranks
share out experts. Files are mapped into memory, so that only what is asked for is read.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from megamup.config import Config
from megamup.convert.hf.folder import read_json
from megamup.errors import MegamupError
from megamup.models.build import context, cross_entropy, model_layers
from megamup.models.network import Network, wires
from megamup.parallel.mesh import SINGLE, Axis
from megamup.parameters import Parameter, parameters
from megamup.sections import Kernels, Parallel
from megamup.train import checkpoint

Shard = Callable[[], Tensor]


class CheckpointWeights(Mapping[str, Tensor]):
    """Weights by global name, each read and joined when it is asked for.

    Raises:
        MegamupError: the checkpoint is cut short, or its files aren't those of the model.
    """

    def __init__(self, config: Config, path: Path) -> None:
        layout = read_json(path / "manifest.json").get("layout") or {}
        checkpoint.check(path, config, int(layout.get("world_size", 0)))
        self.inventory, self.path = parameters(config.model), path
        names = Names.of(config)
        read = by_layer if config.parallel.pipeline > 1 else by_module
        if config.zero_stage:
            read = by_group
        self.shards = read(path / checkpoint.TAG, names, config)
        if config.parallel.expert > 1 and not config.zero_stage:
            put_experts(path, self.shards)
        for tensor in range(config.parallel.tensor):
            if missing := self.inventory.keys() - self.shards[tensor].keys():
                raise MegamupError(
                    f"{path}: no file holds {min(missing)} of tensor rank {tensor}; was it written whole?"
                )

    def __getitem__(self, name: str) -> Tensor:
        parameter = self.inventory[name]
        dim = parameter.partition_dim
        cut = [shards[name]() for shards in (self.shards[:1] if dim is None else self.shards)]
        whole = torch.cat(cut, dim or 0)
        if whole.shape != parameter.shape:
            raise MegamupError(f"{self.path}: {name} is {tuple(whole.shape)} there, the model has {parameter.shape}")
        return whole.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.inventory)

    def __len__(self) -> int:
        return len(self.inventory)


# ----------------------------------------------------------------------------- names


class Shapes:
    """Parameters without contents, to learn by what names modules hold them."""

    def shard(self, parameter: Parameter, axis: Axis) -> Tensor:
        return torch.empty(parameter.shape, device="meta")


@dataclass(frozen=True)
class Names:
    """Global names by those in a checkpoint."""

    modules: Mapping[str, str]
    """Of parameters of the whole module."""
    layers: Mapping[tuple[int, str], str]
    """Of a layer's, by its number in the list; with a pipeline."""

    @classmethod
    def of(cls, config: Config) -> Names:
        train = config.train.model_copy(update={"init": None, "recompute": "none"})
        plain = config.model_copy(update={"kernels": Kernels(), "train": train, "parallel": Parallel()})
        built_from = replace(context(plain, SINGLE), source=Shapes())
        loss = cross_entropy(built_from, plain)
        specs = model_layers(built_from, plain, loss)
        if config.parallel.pipeline == 1:
            return cls(global_names(Network(specs, loss)), {})
        modules: dict[str, str] = {}
        layers: dict[tuple[int, str], str] = {}
        for number, (spec, at) in enumerate(zip(specs, wires(specs), strict=True)):
            own = global_names(spec.build())
            wired = "" if spec.shared is not None or at.plain else "layer."  # see pipe_spec in train/engine.py
            place = f"{number}." if spec.shared is None else f"tied_modules.{spec.shared}."
            modules |= {f"{place}{wired}{name}": found for name, found in own.items()}
            layers |= {(number, f"{wired}{name}"): found for name, found in own.items()}
        return cls(modules, layers)


def global_names(module: torch.nn.Module) -> dict[str, str]:
    return {name: cast(str, shard.spec.name) for name, shard in module.named_parameters()}  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------- ZeRO 0

KNOWN: list[Any] = [LossScaler, ZeroStageEnum, fragment_address]
"""Classes of DeepSpeed's in its optimizers' files."""


def load(path: Path) -> Any:
    """A file of DeepSpeed's, mapped into memory; of its pickle nothing runs but tensors, plain values and `KNOWN`.

    Raises:
        MegamupError: it can't be read, or holds something else.
    """
    try:
        with torch.serialization.safe_globals(KNOWN):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {found[1]}" if found else "is damaged"
        raise MegamupError(f"{path}: {what}; expected the tensors and plain values of a run's checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise MegamupError(f"{path}: not readable ({str(error).splitlines()[0]})") from None


def matching(folder: Path, pattern: str) -> Iterator[tuple[tuple[int, ...], Path]]:
    """The numbers in the names of files that are wholly such, and the files, in the order of the numbers."""
    found = [
        (tuple(int(number or 0) for number in match.groups()), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(pattern, path.name))
    ]
    return iter(sorted(found))


def kept(tensor: Tensor) -> Shard:
    return lambda: tensor


def by_module(folder: Path, names: Names, config: Config) -> list[dict[str, Shard]]:
    found: list[dict[str, Shard]] = [{} for _ in range(config.parallel.tensor)]
    for (rank,), path in matching(folder, r"mp_rank_(\d+)_model_states\.pt"):
        module = load(path)["module"]
        found[rank] |= {names.modules[name]: kept(value) for name, value in module.items() if name in names.modules}
    return found


def by_layer(folder: Path, names: Names, config: Config) -> list[dict[str, Shard]]:
    found: list[dict[str, Shard]] = [{} for _ in range(config.parallel.tensor)]
    for (layer, rank), path in matching(folder, r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt"):
        for name, value in load(path).items():
            if (layer, name) in names.layers:
                found[rank][names.layers[layer, name]] = kept(value)
    return found


def put_experts(path: Path, shards: list[dict[str, Shard]]) -> None:
    """In place of the first replica's experts those of all ranks that share them out (train/experts.py)."""
    parts: list[dict[str, list[Shard]]] = [{} for _ in shards]
    for (_, tensor, _), file in matching(path, r"experts_pipeline(\d+)_tensor(\d+)_expert(\d+)\.pt"):
        for name, state in load(file).items():
            parts[tensor].setdefault(name, []).append(kept(state["weight"]))
    for tensor, found in enumerate(parts):
        shards[tensor] |= {name: joined(cut) for name, cut in found.items()}


def joined(cut: list[Shard]) -> Shard:
    return cut[0] if len(cut) == 1 else lambda: torch.cat([each() for each in cut])


# ----------------------------------------------------------------------------- ZeRO 1-3


def by_group(folder: Path, names: Names, config: Config) -> list[dict[str, Shard]]:
    found: list[dict[str, Shard]] = [{} for _ in range(config.parallel.tensor)]
    optimizers: dict[int, list[Any]] = {}
    for (_, rank), path in matching(folder, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt"):
        optimizers.setdefault(rank, []).append(load(path)["optimizer_state_dict"])
    whole = config.zero_stage < 3
    described = r"mp_rank_(\d+)_model_states\.pt" if whole else r"zero_pp_rank_0_mp_rank_(\d+)_model_states\.pt"
    for (rank,), path in matching(folder, described):
        groups = load(path)["param_shapes"]
        of = partial(of_groups, names=names, experts=config.parallel.expert) if whole else of_parts
        shards = of(groups, optimizers[rank])
        tensor = rank % config.parallel.tensor
        found[tensor] |= {names.modules[name]: shard for name, shard in shards.items() if name in names.modules}
    return found


def of_groups(groups: list[Mapping[str, torch.Size]], ranks: list[Any], names: Names, experts: int) -> dict[str, Shard]:
    """ZeRO 1 and 2: a group's parameters are one vector, of which each rank has a part; of experts that ranks share
    out there are several, each on every ``experts``-th rank. By the module's names."""
    found: dict[str, Shard] = {}
    gaps = ranks[0].get("param_alignment_paddings")  # after each parameter, where there are any
    for number, group in enumerate(groups):
        parts = [rank["single_partition_of_fp32_groups"][number] for rank in ranks]
        shared_out = any(".moe.experts." in names.modules.get(name, "") for name in group)
        vectors = [parts[first::experts] for first in range(experts)] if shared_out else [parts]
        start = 0
        for index, (name, shape) in enumerate(group.items()):
            size = math.prod(shape)
            found[name] = joined([stretch([vector], start, size, shape) for vector in vectors])
            start += size + (gaps[number][index] if gaps else 0)
    return found


def of_parts(groups: list[Mapping[str, torch.Size]], ranks: list[Any]) -> dict[str, Shard]:
    """ZeRO 3: each parameter is cut into as many parts as there are ranks, which have them end to end."""
    found, start = {}, 0
    vectors = [rank["fp32_flat_groups"] for rank in ranks]
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        size = math.ceil(math.prod(shape) / len(ranks))
        found[name] = stretch(vectors, start, size, shape)
        start += size
    return found


def stretch(vectors: list[list[Tensor]], start: int, size: int, shape: torch.Size) -> Shard:
    """What stands at a place of each vector, which is in pieces, joined to a parameter."""

    def read() -> Tensor:
        pieces = []
        for vector in vectors:
            at = 0
            for piece in vector:
                low, high = max(start - at, 0), min(start + size - at, piece.numel())
                if low < high:
                    pieces.append(piece[low:high])
                at += piece.numel()
        return torch.cat(pieces)[: math.prod(shape)].view(shape)

    return read
