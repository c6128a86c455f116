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


class Layer(torch.nn.Module):
    """x + tanh(mix(ln(x)))."""

    def __init__(self):
        super().__init__()
        self.ln = torch.nn.LayerNorm(6)
        self.mix = torch.nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.mix(self.ln(x)))


class Head(torch.nn.Module):
    """out(tanh(dense(x))): x [*, 5] -> [*, 3]."""

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(5, 4)
        self.out = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.dense(x)))


class Reader(torch.nn.Module):
    """Reads tokens and classifies: ids [batch, length] -> [batch, 3]; a layer of every kind that options reach."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(11, 6, padding_idx=0)
        self.h = torch.nn.ModuleList([Layer(), Layer()])
        self.conv = torch.nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm1d(5)
        self.classifier = Head()

    def forward(self, ids):
        x = self.wte(ids)
        for layer in self.h:
            x = layer(x)
        return self.classifier(self.norm(self.conv(x.transpose(1, 2))).mean(-1))


class Convs(torch.nn.Module):
    """x [batch, 2, 3, 6, 6] -> [batch, 5, 3, 3] by a Conv3d without bias and a Conv2d with string padding."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(2, 4, (3, 2, 2), stride=(1, 2, 2), bias=False)
        self.second = torch.nn.Conv2d(4, 5, 3, padding="same")

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).squeeze(2))
