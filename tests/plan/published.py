"""Training runs whose speed others published, as configs, clusters and layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megamup.cluster import Cluster, parse_cluster
from megamup.config import Config, config_from
from megamup.plan import stage_parameters
from megamup.plan.layout import Layout, layout_of
from megamup.plan.time import StepTime, step_time


@dataclass(frozen=True)
class Published:
    name: str
    config: Config
    layout: Layout
    cluster: Cluster

    def step(self) -> StepTime:
        held = tuple(stage_parameters(self.config))
        return step_time(self.config.model, self.config.lengths, self.layout, self.cluster, held)


@dataclass(frozen=True)
class MegatronRow:
    """Of table 1 of Narayanan et al. 2021 (arXiv 2104.04473); micro batch and interleaving, which the table doesn't
    have, from the authors' script of it (NVIDIA/Megatron-LM, examples/sc21/run_table_1.sh)."""

    name: str
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    micro: int
    virtual: int
    teraflops: float
    """Achieved per GPU, of ``flops``."""

    @property
    def flops(self) -> float:
        """Of a step, by their equation 3: all products, twice the forward pass, every score."""
        s, h, layers, vocab = 2048, self.hidden, self.layers, 51_200
        return 96 * self.batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))

    def run(self) -> Published:
        config = gpt(
            {"d_model": self.hidden, "n_layers": self.layers, "n_heads": self.heads, "vocab_size": 51_200},
            2048,
            train={"steps": 1, "recompute": "full"},
            parallel={"tensor": self.tensor, "pipeline": self.pipeline},
            batch={"global_sequences": self.batch, "micro_sequences": self.micro},
            kernels={"attention": "reference", "cross_entropy": "reference"},
        )
        layout = replace(
            layout_of(config, self.gpus),
            virtual_stages=self.virtual,
            dropout=True,  # 0.1, the program's default
            overlap_tensor=False,  # came later (Korthikanti et al. 2022)
            overlap_data=self.pipeline == 1,  # the script: torch's DDP up to 18B, above Megatron's, which doesn't
            gradient_bytes=2,
            casts_weights=False,  # weights are kept in 16 bits
        )
        return Published(self.name, config, layout, parse_cluster("configs/clusters/a100.yaml", self.gpus))


MEGATRON = (
    MegatronRow("1.7B", 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137),
    MegatronRow("3.6B", 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138),
    MegatronRow("7.5B", 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142),
    MegatronRow("18B", 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135),
    MegatronRow("39B", 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138),
    MegatronRow("76B", 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140),
    MegatronRow("145B", 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148),
    MegatronRow("310B", 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155),
    MegatronRow("530B", 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163),
    MegatronRow("1T", 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163),
)


@dataclass(frozen=True)
class LlamaRow:
    """Of table 4 of Grattafiori et al. 2024 (arXiv 2407.21783): Llama 3 405B, 16M tokens a batch, tensor 8, pipeline
    16."""

    gpus: int
    context: int
    seq_len: int
    sequences: int
    teraflops: float
    """Achieved per GPU."""

    @property
    def name(self) -> str:
        return f"405B, {self.gpus} GPUs, {self.seq_len} positions"

    def run(self) -> Published:
        model = {"arch": "llama", "d_model": 16_384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "d_ff": 53_248}
        config = config_from(
            {
                "model": {**model, "vocab_size": 128_256, "max_seq_len": 131_072},
                "data": {"train": "shard", "seq_len": self.seq_len},
                "train": {"steps": 1},  # 3.3.2: no activation checkpointing at 8K
                "parallel": {"tensor": 8, "pipeline": 16, "sequence": True},
                "batch": {"global_sequences": self.sequences, "micro_sequences": 1},
                "precision": "bf16",
                "deepspeed": "ds_configs/zero1.json",  # 3.3.2: FSDP that doesn't reshard after the forward pass
            }
        )
        layout = replace(
            layout_of(config, self.gpus // self.context),
            context=self.context,
            context_kind="gather",
            virtual_stages=8,  # a layer each: 126 of them, as the first and last of 128 pieces hold no block
            overlap_pipeline=True,
            overlap_tensor=False,  # nothing is said of it
            overlap_data=True,
            scatters_gradients=True,  # FSDP
            gradient_bytes=4,  # 3.3.2: reduced in fp32
        )
        return Published(self.name, config, layout, parse_cluster("configs/clusters/h100.yaml", self.gpus))


LLAMA = (
    LlamaRow(8_192, 1, 8_192, 2_048, 430),
    LlamaRow(16_384, 1, 8_192, 2_048, 400),
    LlamaRow(16_384, 16, 131_072, 128, 380),
)


@dataclass(frozen=True)
class MptRow:
    """Of llm-foundry's scripts/train/benchmarking/README.md (MosaicML 2023), "A100 80GB": FSDP on 8 GPUs."""

    name: str
    seq_len: int
    micro: int
    count: int
    checkpointing: bool
    tokens_per_s: float
    """Of one GPU."""

    def run(self) -> Published:
        hidden, layers, heads = {
            "3b": (2560, 32, 20),
            "7b": (4096, 32, 32),
            "13b": (5120, 40, 40),
            "30b": (7168, 48, 56),
        }[self.name]
        config = gpt(
            {"d_model": hidden, "n_layers": layers, "n_heads": heads, "vocab_size": 50_368, "bias": False},
            self.seq_len,
            train={"steps": 1, "recompute": "full" if self.checkpointing else "none"},
            batch={"global_sequences": 8 * self.micro * self.count, "micro_sequences": self.micro},
            deepspeed="ds_configs/zero3.json",
        )
        name = f"{self.name}, {self.seq_len} positions"
        return Published(name, config, layout_of(config, 8), parse_cluster("configs/clusters/a100.yaml", 8))


MPT = (
    MptRow("30b", 2048, 3, 21, True, 916),
    MptRow("30b", 1024, 6, 21, True, 946),
    MptRow("30b", 512, 12, 21, True, 967),
    MptRow("13b", 2048, 2, 3, False, 2262),
    MptRow("13b", 1024, 40, 3, True, 2330),
    MptRow("7b", 2048, 6, 2, False, 4641),
    MptRow("7b", 1024, 64, 2, True, 4357),
    MptRow("3b", 2048, 10, 2, False, 10_811),
    MptRow("3b", 1024, 20, 6, False, 11_580),
    MptRow("3b", 512, 40, 6, False, 12_127),
)


def gpt(model: dict[str, Any], seq_len: int, **sections: Any) -> Config:
    return config_from(
        {
            "model": {"arch": "gpt", **model, "max_seq_len": seq_len},
            "data": {"train": "shard"},
            "precision": "bf16",
            **sections,
        }
    )
