"""Floats of 8 bits (arXiv 2209.05433): a sign, 4 bits of exponent, 3 of mantissa; there is NaN, but no infinity."""

import functools

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # some versions of torch make NaN of what is beyond
E4M3_CAPABILITY = (8, 9)


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a GPU computes with e4m3, and kernels can read it: from E4M3_CAPABILITY on. Torch can on any."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= E4M3_CAPABILITY


def check_e4m3(what: str, device: torch.device) -> None:
    """Raises ValueError if kernels cannot read e4m3 on a device; `what` needs it."""
    if not has_e4m3(device):
        versions = E4M3_CAPABILITY, torch.cuda.get_device_capability(device)
        needed, found = (".".join(map(str, version)) for version in versions)
        raise ValueError(f"{what} needs a GPU of compute capability {needed} or later, this one has {found}")
