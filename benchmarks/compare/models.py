"""The model of many small layers that both sides of the comparison have."""
import torch


class Wide(torch.nn.Module):
    """200 Linear layers of 64 x 64."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(200))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
