"""Batches for training: windows of a split's tokens, on the device or, where it has no room, from the memory map."""

import numpy as np
import torch


def tokens_on(device, split, resident=None):
    """A split's memmap (N,) uint16 as an int32 tensor on the device, or as it is where the device has no room for it.

    Room is a quarter of the memory that is free on a card, or 1 GiB for a CPU; `resident` True or False decides instead.
    """
    device = torch.device(device)
    if resident is None:
        room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
        resident = 4 * len(split) <= room
    return torch.from_numpy(np.asarray(split).astype(np.int32)).to(device) if resident else split


def tokens_at(tokens, places):
    """Those of `tokens` (N,), from `tokens_on`, that stand at `places` (...): int64, where the places lie."""
    if isinstance(tokens, torch.Tensor):
        return tokens[places].long()
    return torch.from_numpy(tokens[places.cpu().numpy()].astype(np.int64)).to(places.device)


def get_batch(tokens, starts, block_size):
    """Windows of `tokens` (N,) from `starts` (B,): inputs (B, T) and targets (B, T), one position later."""
    windows = tokens_at(tokens, starts[:, None] + torch.arange(block_size + 1, device=starts.device))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class ResidentBatches:
    """Batches of tokens that lie on the device: the step that needs one gathers it.

    `shape` is (steps, passes, batch), as many steps as are begun together at most.
    """

    def __init__(self, tokens, shape, block_size, together, device):
        self.tokens, self.block_size = tokens, block_size
        self.starts = torch.zeros(shape, dtype=torch.int64, device=device)

    def begin(self, starts):
        """Takes the first positions (steps, passes, batch) of the steps to come."""
        self.starts[: len(starts)] = starts.to(self.starts.device)

    def prefetch(self, row):
        """Makes ready the steps from `row` on that are queued together."""

    def get(self, row, index):
        """Inputs and targets (B, T) of a pass `index` of step `row` (1,)."""
        return get_batch(self.tokens, self.starts[:, index][row][0], self.block_size)


class StreamedBatches:
    """Batches of tokens that the device has no room for, from the memory map by way of pinned memory.

    The host gathers those of the next `together` steps while the device works at the ones before; it waits for these
    before it asks for more, since there is one such buffer. The rest is as in ResidentBatches.
    """

    def __init__(self, tokens, shape, block_size, together, device):
        self.tokens = tokens
        shape = (together, *shape[1:], block_size + 1)
        self.table = torch.zeros(shape, dtype=torch.int16, device=device)  # read as uint16, which few operations take
        self.pinned = torch.zeros(shape, dtype=torch.int16, pin_memory=device.type == "cuda")

    def begin(self, starts):
        self.starts = starts
        self.prefetch(0)

    def prefetch(self, row):
        starts = self.starts[row : row + len(self.table)]
        windows = self.pinned.numpy().view(np.uint16).reshape(-1, self.pinned.shape[-1])
        for window, start in zip(windows, starts.flatten().tolist()):
            window[:] = self.tokens[start : start + len(window)]
        self.table[: len(starts)].copy_(self.pinned[: len(starts)], non_blocking=True)  # after the steps now queued

    def get(self, row, index):
        windows = self.table[:, index][row % len(self.table)][0].long() & 0xFFFF
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
