"""The embedding of the network's conditions: the timestep and, if the network has classes, the class."""

import math

import torch
from torch import Tensor, nn

LARGEST_PERIOD = 10_000  # timesteps: the slowest sinusoid of Vaswani et al. 2017, as in DDPM
SMALLEST_NOISE_LEVEL = 1e-4  # smaller noise levels are raised to this one, since their logarithm has no lower bound


class SinusoidalFeatures(nn.Module):
    """cos and sin of the timestep at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps float32 (B,) to features (B, dim)."""
        half = self.dim // 2
        exponent = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angle = timestep[:, None] * torch.exp(-math.log(LARGEST_PERIOD) * exponent)  # (B, dim / 2)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierFeatures(nn.Module):
    """cos and sin of the logarithm of a continuous noise level at random frequencies (Karras et al. 2022, table 1)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        drawn = torch.randn(dim // 2).bfloat16()  # rounded to 8 significant bits, so half precision keeps them
        self.register_buffer("frequencies", drawn.float())

    def forward(self, noise_level: Tensor) -> Tensor:
        """Standard deviations of the noise, float32 (B,), to features (B, dim)."""
        c_noise = noise_level.clamp(min=SMALLEST_NOISE_LEVEL).log() / 4
        angle = c_noise[:, None] * (2 * math.pi * self.frequencies.float())
        return torch.cat([angle.cos(), angle.sin()], dim=1)


FEATURES = {"sinusoidal": SinusoidalFeatures, "fourier": FourierFeatures}


class ConditionEmbedding(nn.Module):
    """Timestep features through a two-layer perceptron, plus one learnt row per class and one for "no class".

    Args:
        kind: "sinusoidal" for discrete timesteps, "fourier" for continuous noise levels.
        embed_dim: size of the features and of the result, an even number.
        num_class_embeds: number of classes, or None. The table has one more row, the last, for the null class.
    """

    def __init__(self, kind: str, embed_dim: int, num_class_embeds: int | None) -> None:
        super().__init__()
        self.features = FEATURES[kind](embed_dim)
        self.linear_1 = nn.Linear(embed_dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)
        self.activation = nn.SiLU()
        self.classes = None if num_class_embeds is None else nn.Embedding(num_class_embeds + 1, embed_dim)

    def forward(self, timestep: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Timesteps (B,) and class indices (B,) to an embedding (B, embed_dim) of the given dtype."""
        features = self.features(timestep.float()).to(dtype)  # computed in float32, whatever the network's dtype
        embedding = self.linear_2(self.activation(self.linear_1(features)))
        if self.classes is not None:
            embedding = embedding + self.classes(class_labels).to(embedding.dtype)
        return self.activation(embedding)  # once here, since every block starts by activating it
