"""Batches: random windows of a split's tokens, on the device or else from the disk."""

import numpy as np
import torch


def load_tokens(split, device, resident=None):
    """A split's memory map (N,) as an int32 tensor on the device, or as it is for want of room.

    Room is a quarter of a GPU's free memory, or 1 GiB for a CPU; `resident` decides instead.
    """
    device = torch.device(device)
    if resident is None:
        room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
        resident = 4 * len(split) <= room
    return torch.from_numpy(np.asarray(split).astype(np.int32)).to(device) if resident else split


def gather(tokens, positions):
    """The `tokens` (N,) of `load_tokens` at `positions` (...): int64, on the positions' device."""
    if isinstance(tokens, torch.Tensor):
        return tokens[positions].long()
    return torch.from_numpy(tokens[positions.cpu().numpy()].astype(np.int64)).to(positions.device)


def get_batch(tokens, starts, block_size):
    """Windows from `starts` (B,): inputs (B, T), and targets (B, T), which are one token later."""
    windows = gather(tokens, starts[:, None] + torch.arange(block_size + 1, device=starts.device))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def sample_starts(n_tokens, config, step, batches):
    """First positions (batches, B) of random windows, on the CPU; step -1 is the evaluations'.

    They depend on seed, step and sizes alone: a resumed run samples what an unbroken one would.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 1)
    last = n_tokens - config.block_size
    return torch.randint(last, (batches, config.batch_size), generator=generator)


class BatchLoader:
    """The batches of the next steps, in a table on the device that a captured step reads by row.

    `shape` is (steps, micro-steps, B). Tokens that stay on the disk are gathered by the host while
    the device works at the steps before.
    """

    def __init__(self, tokens, shape, block_size, device):
        self.tokens, self.block_size = tokens, block_size
        self.streamed = not isinstance(tokens, torch.Tensor)
        self.windows = torch.zeros(*shape, block_size + 1, dtype=torch.int32, device=device)
        if self.streamed:
            cuda = device.type == "cuda"
            self.staging = torch.zeros(self.windows.shape, dtype=torch.int32, pin_memory=cuda)
            self.copied = torch.cuda.Event() if cuda else None

    def load(self, starts):
        """Fills the table with the windows from `starts` (steps, micro-steps, B)."""
        if not self.streamed:
            starts = starts.to(self.windows.device)
            offsets = torch.arange(self.block_size + 1, device=starts.device)
            self.windows[: len(starts)] = self.tokens[starts[..., None] + offsets]
            return
        if self.copied:
            self.copied.synchronize()  # the copy before this one still reads the same memory
        staged = self.staging.numpy().reshape(-1, self.block_size + 1)
        for window, start in zip(staged, starts.flatten().tolist(), strict=False):
            window[:] = self.tokens[start : start + len(window)]
        self.windows[: len(starts)].copy_(self.staging[: len(starts)], non_blocking=True)
        if self.copied:
            self.copied.record()

    def get(self, row, micro_step):
        """Inputs and targets (B, T) of a micro-step; `row` is an index (1,) on the device."""
        windows = self.windows[:, micro_step][row][0].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
