"""Memory of each rank's GPU that the other ranks' GPUs read, over NVLink where there is one."""

import ctypes

import torch
import torch.distributed as dist

from nanovllm.kernels.all_reduce import Peers
from nanovllm.kernels.linear import SMALL_BATCH

MAX_SUMS = 1024  # of a step
# Sums of more rows are made in shares. A step of Qwen3-8B on two H200s, in parts / in shares: 1,024 rows 13.0 / 14.3
# ms, 2,048 rows 24.9 / 25.6, 4,096 rows 48.0 / 48.4, 16,200 rows 167 / 162. With more ranks, parts are more traffic.
MAX_PART_ROWS = 2048


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


def aligned(num_bytes: int) -> int:
    """The least multiple of 64 that is not smaller."""
    return -(-num_bytes // 64) * 64


class PeerMemory:
    """A buffer that the GPUs of all ranks read and write, laid out for `Peers`; and the count of its sums."""

    def __init__(self, store: dist.Store, rank: int, size: int, sum_shape: tuple[int, int], dtype: torch.dtype,
            device: torch.device) -> None:  # fmt: skip
        """For sums of up to `sum_shape`. Raises RuntimeError where the GPUs cannot reach each other's memory."""
        self.rank = rank
        rows, hidden_size = sum_shape
        self.packet_bytes = 8 * size * SMALL_BATCH * hidden_size
        row_bytes = hidden_size * dtype.itemsize
        self.place_bytes = aligned(self.packet_bytes + min(rows, MAX_PART_ROWS) * row_bytes)
        self.first_place = aligned(4 * size)  # behind the flags
        # Behind the two places, parts and sums of shares, which may be uneven.
        num_bytes = self.first_place + 2 * self.place_bytes + (rows > MAX_PART_ROWS) * 2 * (rows + size) * row_bytes
        # A handle is one of a whole allocation; in a pool of its own, the buffer is one.
        self.pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self.pool):
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.step, self.index = torch.zeros(1, dtype=torch.int32, device=device), 0
        self.given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        torch.cuda.synchronize(device)
        handle, with_peer_access = IpcHandle(), 1
        cuda_driver("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.bytes.data_ptr()))
        store.set(f"memory of rank {rank}", bytes(handle))
        self.opened: list[ctypes.c_uint64] = []
        addresses = [self.bytes.data_ptr()] * size
        for peer in range(size):
            if peer != rank:
                handle, address = IpcHandle.from_buffer_copy(store.get(f"memory of rank {peer}")), ctypes.c_uint64()
                cuda_driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, with_peer_access)
                self.opened.append(address)
                addresses[peer] = address.value
        self.addresses = torch.tensor(addresses, device=device)
        # As tensors of this rank's device, though most lie on another's: all that counts is that it can write there.
        storages = [torch._C._construct_storage_from_data_pointer(base, device, num_bytes) for base in addresses]
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device).set_(storage) for storage in storages]

    def close(self) -> None:
        """Gives up the others' memory."""
        torch.cuda.synchronize(self.bytes.device)
        for base in self.opened:
            cuda_driver("cuIpcCloseMemHandle", base)

    def begin_step(self) -> None:
        """Gives the next sums numbers that no earlier ones had."""
        self.step += MAX_SUMS
        self.index = 0

    def next_peers(self, rows: int) -> Peers:
        """Where the step's next sum is made; a step makes an even number of sums, two a layer."""
        form = "packets" if rows <= SMALL_BATCH else "parts" if rows <= MAX_PART_ROWS else "shares"
        place = 2 if form == "shares" else self.index % 2
        offset = self.first_place + place * self.place_bytes + self.packet_bytes * (form == "parts")
        index = self.index
        self.index += 2 if form == "shares" else 1
        return Peers(self.buffers, form, self.addresses, self.rank, offset, self.step, index, self.given_up)
