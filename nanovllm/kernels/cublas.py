"""How much memory cuBLAS may work in."""

import os

import torch


def limit_cublas_workspace(device: torch.device) -> None:
    """Leaves cuBLAS little memory on Hopper, unless the environment says how much; before its first call.

    With 128 KiB for partial sums, cuBLAS does not split K, which costs Hopper more than it gains. Two H200s, a layer's
    products of Qwen3-8B: 62 to 64 us at 48 to 112 rows, else 66 to 69.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")
