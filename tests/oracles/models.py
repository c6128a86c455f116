"""The small modules of the golden files and the judges; tests/golden/README.md describes them for their C++ twins."""

import torch


class Mlp(torch.nn.Module):
    """y = down(tanh(up(x))): x [*, 12] -> y [*, 8]; neither layer is square, and down has no bias."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(12, 20)
        self.down = torch.nn.Linear(20, 8, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class MhaBlock(torch.nn.Module):
    """Self-attention by one torch.nn.MultiheadAttention of 4 heads: x [length, batch, 16] -> y of the same shape."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(16, 4)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]
