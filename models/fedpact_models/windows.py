"""A convolution in torch: a dense layer on each window of a picture, with weights as `nn.Conv2d` orders them."""

import torch
from torch import nn

from fedpact_models.registry import Windows


class Look(nn.Module):
    """Numbers of a grid [n, numbers], the constant last where windows hold it, to windows [n, count, inputs]."""

    def __init__(self, windows: Windows, scale: float) -> None:
        super().__init__()
        self._windows, self._scale = windows, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each window holds, times the scale."""
        grid, kernel, stride, count = (getattr(self._windows, name) for name in ("grid", "kernel", "stride", "count"))
        planes = x[:, : grid.size].reshape(len(x), *grid)
        seen = planes.unfold(2, kernel, stride).unfold(3, kernel, stride).permute(0, 2, 3, 1, 4, 5)
        seen = seen.reshape(len(x), count, kernel * kernel * grid.channels)
        if self._windows.constant:
            seen = torch.cat([seen, x[:, None, grid.size :].expand(-1, count, -1)], dim=2)
        return seen if self._scale == 1.0 else seen * self._scale


class Planes(nn.Module):
    """What a dense layer made of windows [n, count, outputs], output by output: [n, outputs x count]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same numbers in a grid's order."""
        return x.transpose(1, 2).flatten(1)
