"""A vision transformer in plain PyTorch, before: its layers add to ``x`` themselves."""

import torch
from torch import Tensor, nn


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, classes: int, dim: int = 64, num_layers: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            self.layers.extend([SelfAttention(dim, num_heads=4, batch_first=True), mlp])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * num_layers + 1))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position
        for site, layer in enumerate(self.layers):
            x = x + layer(self.norms[site](x))
        return self.head(self.norms[-1](x).mean(1))
