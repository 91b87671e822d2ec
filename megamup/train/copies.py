"""Optional copies of metrics.jsonl: Weights & Biases and TensorBoard. One that fails is dropped; training goes on."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from megamup.config import Config

Record = dict[str, float]
Copy = Callable[[Record], Any]


class Copies:
    """What the run config's ``log`` asks for; call with a record."""

    def __init__(self, config: Config) -> None:
        wanted = {"wandb": (config.log.wandb, open_wandb), "tensorboard": (config.log.tensorboard, open_tensorboard)}
        self.copies: dict[str, Copy] = {}
        for name, (asked, opened) in wanted.items():
            if asked:
                self.attempt(name, partial(self.add, name, opened, config))

    def __call__(self, record: Record) -> None:
        for name, copy in list(self.copies.items()):
            self.attempt(name, partial(copy, record))

    def add(self, name: str, opened: Callable[[Config], Copy], config: Config) -> None:
        self.copies[name] = opened(config)

    def attempt(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self.copies.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            print(f"{name}: not logging there any more ({reason}); metrics.jsonl is written", file=sys.stderr)


def open_wandb(config: Config) -> Copy:
    import wandb

    if not wandb_key():
        os.environ.setdefault("WANDB_MODE", "offline")  # rather than ask for a key on a terminal that nobody watches
    settings = config.model_dump(mode="json")
    run = wandb.init(project="megamup", name=config.run.name, dir=config.run.folder, config=settings)
    return lambda record: run.log(record, step=int(record["step"]))


def wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def open_tensorboard(config: Config) -> Copy:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(config.run.folder / "tensorboard"))

    def copy(record: Record) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, int(record["step"]))
        writer.flush()

    return copy
