"""Memory of each rank's GPU that the other ranks' GPUs read, over NVLink where there is one."""

import ctypes

import torch
import torch.distributed as dist

from nanovllm.kernels.all_reduce import FLAG_BYTES, MAX_BLOCKS, add_sum

PART_BYTES = 2**21  # of a rank's part of a sum; NCCL is faster with larger ones


class IpcHandle(ctypes.Structure):
    """What names a piece of GPU memory to other processes (CUDA driver API, CUipcMemHandle)."""

    _fields_ = (("bytes", ctypes.c_byte * 64),)


def cuda_driver(function: str, *args: object) -> None:
    """Calls the CUDA driver, whose functions for memory shared between processes torch does not offer alone.

    Raises:
        RuntimeError: it failed.
    """
    if code := getattr(ctypes.CDLL("libcuda.so.1"), function)(*args):
        raise RuntimeError(f"{function} failed with CUDA error {code}")


class PeerMemory:
    """Memory that the GPUs of all ranks read: flags, then two places for this rank's part of a sum."""

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        """Raises RuntimeError where the GPUs cannot reach each other's memory."""
        self.rank = rank
        self.bytes = torch.zeros(size * FLAG_BYTES + 2 * PART_BYTES, dtype=torch.uint8, device=device)
        self.counts = torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=device)
        self.given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.first_offset = self.offset = size * FLAG_BYTES
        torch.cuda.synchronize(device)
        # torch hands out pieces of larger allocations, and a handle is one of a whole allocation.
        address, own, handle = self.bytes.data_ptr(), ctypes.c_uint64(), IpcHandle()
        cuda_driver("cuMemGetAddressRange_v2", ctypes.byref(own), None, ctypes.c_uint64(address))
        cuda_driver("cuIpcGetMemHandle", ctypes.byref(handle), own)
        store.set(f"memory of rank {rank}", (address - own.value).to_bytes(8, "little") + bytes(handle))
        self.opened: list[ctypes.c_uint64] = []
        addresses = []
        for peer in range(size):
            message = store.get(f"memory of rank {peer}")
            base = own if peer == rank else self._open(IpcHandle.from_buffer_copy(message[8:]))
            addresses.append(base.value + int.from_bytes(message[:8], "little"))
        self.peers = torch.tensor(addresses, device=device)

    def _open(self, handle: IpcHandle) -> ctypes.c_uint64:
        base, with_peer_access = ctypes.c_uint64(), 1
        cuda_driver("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, with_peer_access)
        self.opened.append(base)
        return base

    def close(self) -> None:
        """Gives up the others' memory."""
        torch.cuda.synchronize(self.bytes.device)
        for base in self.opened:
            cuda_driver("cuIpcCloseMemHandle", base)

    def part(self, rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """The place for the next sum's part, [rows, size]; a step makes an even number of sums, two a layer."""
        return self.bytes[self.offset :][: rows * size * dtype.itemsize].view(dtype).view(rows, size)

    def add_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Adds to x the sum of the parts that the ranks have written."""
        add_sum(x, self.peers, self.offset, self.counts, self.given_up, self.rank)
        self.offset = 2 * self.first_offset + PART_BYTES - self.offset
        return x
