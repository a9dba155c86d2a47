"""Memory of each rank's GPU that the other ranks' GPUs read, over NVLink where there is one."""

import ctypes
from itertools import accumulate

import torch
import torch.distributed as dist

from nanovllm.kernels.tuning import MAX_PART_ROWS
from nanovllm.parallel.all_reduce import Peers


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
    """The least multiple of 256 that is not smaller, so that lines of 128 bytes cross NVLink whole."""
    return -(-num_bytes // 256) * 256


class PeerMemory:
    """A buffer that the GPUs of all ranks read and write, laid out for `Peers`."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        sum_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """For sums of up to `sum_shape`. Raises RuntimeError where the GPUs cannot reach each other's memory."""
        num_bytes = self.lay_out(rank, size, sum_shape, dtype)
        # A handle is one of a whole allocation; in a pool of its own, the buffer is one.
        self.pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self.pool):
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.bytes[self.candidate_offset : self.share_offset] = 255
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
        self.addresses = tuple(addresses)
        # As tensors of this rank's device, though most lie on another's: all that counts is that it can write there.
        storages = [torch._C._construct_storage_from_data_pointer(base, device, num_bytes) for base in addresses]
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device).set_(storage) for storage in storages]

    def lay_out(self, rank: int, size: int, sum_shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Decides where in a buffer everything stands; returns the buffer's bytes.

        Flags come first, zero at the beginning; then the candidates and two places for sums, all bits set; then parts
        and sums of shares.
        """
        self.rank = rank
        self.num_sums = 0
        rows, hidden_size = sum_shape
        row_bytes = hidden_size * dtype.itemsize
        place_bytes = size * min(rows, MAX_PART_ROWS) * row_bytes
        # The ranks' shares may be uneven.
        share_bytes = 2 * (rows + size) * row_bytes if rows > MAX_PART_ROWS else 0
        sizes = (4 * size, 8 * size * rows, place_bytes, place_bytes, share_bytes)
        offsets = accumulate(map(aligned, sizes), initial=0)
        _flags, self.candidate_offset, *self.place_offsets, self.share_offset, num_bytes = offsets
        return num_bytes

    def close(self) -> None:
        """Gives up the others' memory."""
        torch.cuda.synchronize(self.bytes.device)
        for base in self.opened:
            cuda_driver("cuIpcCloseMemHandle", base)

    def candidates(self) -> Peers:
        """Where the ranks' candidates for the next tokens meet; sums come between two such meetings."""
        return Peers(self.buffers, "packets", self.addresses, self.rank, self.candidate_offset, self.given_up)

    def next_peers(self, rows: int, max_packet_rows: int) -> Peers:
        """Where the next sum is made, in turn; a step makes an even number, so that captured ones may follow any."""
        form = "packets" if rows <= max_packet_rows else "parts" if rows <= MAX_PART_ROWS else "shares"
        offset = self.share_offset if form == "shares" else self.place_offsets[self.num_sums % 2]
        self.num_sums += 1
        return Peers(self.buffers, form, self.addresses, self.rank, offset, self.given_up)
