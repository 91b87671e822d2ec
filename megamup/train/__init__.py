"""Training under DeepSpeed."""

import os
import warnings

import torch

# Counting devices through NVML leaves CUDA uninitialised, so that ranks can still be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Both are settled when DeepSpeed is first imported: its accelerator, and a warning that torch 2.13 raises on every
# step because DeepSpeed 0.19.8 calls collectives by names that are being renamed.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
# DeepSpeed broadcasts tied weights as leaves that require a gradient; nothing is differentiated through it.
warnings.filterwarnings("ignore", category=UserWarning, message="c10d::broadcast_")
