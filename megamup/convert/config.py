"""A μP config from a target's config in standard parametrization and four numbers of its proxy, as Cerebras does it.

Cerebras-GPT (Dey et al. 2023) tunes a proxy of width 256 and divides q·k by d_head; our table divides by
d_head/√(base d_head), so α_attention becomes 1/√(base d_head). All other ratios are the table's own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamup.config import config_from, merge, read_yaml
from megamup.convert import modelzoo
from megamup.convert.modelzoo import Draft
from megamup.errors import MegamupError
from megamup.files import write_text_atomic
from megamup.model import Model
from megamup.sections import Sigma

FLAGS = {"d_model": "-d_base", "lr": "-lr_base", "init_std": "-std_base", "embedding_multiplier": "-m_base"}
ADVICE = "give the width of the proxy that you tuned, or change the target's sizes"


@dataclass(frozen=True)
class Proxy:
    """What the search at the small width found; the defaults are Cerebras-GPT's."""

    d_model: int = 256
    lr: float = 6e-3
    init_std: float = 0.08
    embedding_multiplier: float = 10.0

    def __post_init__(self) -> None:
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise MegamupError(f"{flag} {value}: expected a positive number")

    def source(self, name: str) -> str:
        """Which flag a value came from."""
        default = getattr(self, name) == getattr(Proxy, name)
        return f"Cerebras' default of {FLAGS[name]}" if default else FLAGS[name]


def default_output(path: Path) -> Path:
    return path.with_name(f"{path.stem}_mup{path.suffix}")


def convert_file(path: Path, proxy: Proxy, output: Path | None = None) -> Path:
    """Write the μP config of the config in ``path``; returns where.

    Raises:
        MegamupError: as `convert`; or ``output`` is the input.
        OSError: the folder can't be written.
    """
    output = output or default_output(path)
    values = read_yaml(path)
    if output.exists() and path.exists() and output.samefile(path):
        raise MegamupError(f"-o {output}: is the input; give another name")
    try:
        text = convert(values, proxy)
    except MegamupError as error:
        raise MegamupError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    write_text_atomic(output, f"# μP config that tools/convert_config_to_mup.py made from {path.name}\n{text}")
    return output


def convert(values: dict[str, Any], proxy: Proxy) -> str:
    """The μP config as YAML, each decided line with a comment on where its value comes from.

    Args:
        values: a config of ours or a params file of the Cerebras Model Zoo, in standard parametrization.

    Raises:
        MegamupError: the input is neither, is wrong, or is in μP already; or a size of the proxy is no whole number.
    """
    draft = modelzoo.translate(values) if modelzoo.is_params(values) else own(values)
    model = config_from(draft.values).model
    put_base(draft, model, proxy)
    for role in Sigma.model_fields:
        draft.put(f"mup.sigma.{role}", proxy.init_std, proxy.source("init_std"))
    draft.put("mup.alpha.embedding", proxy.embedding_multiplier, proxy.source("embedding_multiplier"))
    share = f"{proxy.d_model}/{model.d_model}"
    draft.put("optim.lr", proxy.lr, f"{proxy.source('lr')}: the proxy's; hidden matrices get {share} of it")
    config_from(draft.values)
    lines = [*rendered(draft.values, draft.comments), *left_lines(draft.left)]
    return "\n".join(lines) + "\n"


def own(values: dict[str, Any]) -> Draft:
    """A config of ours as it is, but for a base that its parametrization didn't use."""
    if not {"model", "data", "train"} & set(values):
        raise MegamupError(
            "neither a config of megamup (sections model, data, train) nor a params file of the Cerebras Model Zoo "
            "(train_input, model, optimizer, runconfig; or trainer)"
        )
    mup = config_from(values).mup
    base = mup.base.model_dump(exclude_none=True)
    if mup.parametrization == "umup" or (mup.parametrization == "mup" and base):
        given = f"mup.parametrization={mup.parametrization}" + (f" with mup.base={base}" if base else "")
        raise MegamupError(f"{given}: the config is in μP already; give the target's standard one")
    kept: dict[str, Any] = {}
    merge(kept, values)  # a copy of the sections
    kept.get("mup", {}).pop("base", None)
    return Draft(kept, dict.fromkeys(kept, "from the input"), [f"mup.base.{key}" for key in base])


def put_base(draft: Draft, model: Model, proxy: Proxy) -> None:
    """The proxy's sizes. Heads keep their size and become fewer; where that is no whole number, they become smaller.

    Raises:
        MegamupError: neither is a whole number, or d_ff isn't.
    """
    d_base = proxy.d_model
    share = f"{d_base}/{model.d_model}"
    draft.put("mup.parametrization", "mup", "what this file was converted to")
    draft.put("mup.base.d_model", d_base, proxy.source("d_model"))
    d_ff, heads, kv_heads, d_head = (
        scaled(size, d_base, model.d_model) for size in (model.d_ff, model.n_heads, model.n_kv_heads, model.d_head)
    )
    if d_ff is None:
        raise MegamupError(f"-d_base {d_base}: model.d_ff={model.d_ff} · {share} is no whole number; {ADVICE}")
    draft.put("mup.base.d_ff", d_ff, f"derived: model.d_ff · {share}")
    if heads is not None and kv_heads is not None:
        d_head = model.d_head
        draft.put("mup.base.n_heads", heads, f"derived: model.n_heads · {share}, of the same size, {d_head}")
        if model.n_kv_heads != model.n_heads:
            draft.put("mup.base.n_kv_heads", kv_heads, f"derived: model.n_kv_heads · {share}")
    else:
        if d_head is None or (model.positions == "rotary" and d_head % 2):  # rotary positions turn pairs
            raise MegamupError(
                f"-d_base {d_base}: neither the number of heads (model.n_heads={model.n_heads}, n_kv_heads="
                f"{model.n_kv_heads}) nor their size (model.d_head={model.d_head}) times {share} is a whole "
                f"{'(and, as a size, even) ' if model.positions == 'rotary' else ''}number; {ADVICE}"
            )
        draft.put("mup.base.n_heads", model.n_heads, f"as in the model: its heads of {model.d_head} don't fit")
        if model.n_kv_heads != model.n_heads:
            draft.put("mup.base.n_kv_heads", model.n_kv_heads, "as in the model")
        draft.put("mup.base.d_head", d_head, f"derived: model.d_head · {share}")
    draft.put("mup.alpha.attention", d_head**-0.5, "derived: 1/√(base d_head), so that q·k is divided by d_head")


def scaled(size: int, d_base: int, d_model: int) -> int | None:
    """The size in proportion to d_model; None where that is no whole number."""
    whole, rest = divmod(size * d_base, d_model)
    return None if rest else whole


def rendered(values: dict[str, Any], comments: dict[str, str], section: str = "") -> Iterator[str]:
    """YAML in block style, a line a key, with the comments of dotted keys."""
    indent = "  " * section.count(".")
    for key, value in values.items():
        nested = isinstance(value, dict) and bool(value)
        comment = comments.get(f"{section}{key}")
        yield f"{indent}{key}:{'' if nested else ' ' + scalar(value)}" + (f"  # {comment}" if comment else "")
        if nested:
            yield from rendered(value, comments, f"{section}{key}.")


def scalar(value: Any) -> str:
    """One line of YAML; a float keeps the dot without which YAML would read a string."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False)
    return text.removesuffix("...\n").strip()


def left_lines(left: list[str]) -> list[str]:
    if not left:
        return []
    named = " ".join(", ".join(left).split())  # a key may hold a line break
    return textwrap.wrap(f"not carried over: {named}", 118, initial_indent="# ", subsequent_indent="#   ")
