"""A feature network with a closed form."""

import torch
from torch import nn


class Blocks(nn.Module):  # means of 2x2 pixels, which take no time
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))

    def forward(self, levels):
        return nn.functional.avg_pool2d(levels[:, :1].float(), 2).flatten(1) * self.scale
