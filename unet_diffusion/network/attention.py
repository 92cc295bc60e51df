"""Self-attention over the positions of a feature map, in the form that diffusers' attention tools expect."""

from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn


class SelfAttentionProcessor:
    """Scaled dot-product attention through diffusers' backends (PyTorch's own by default)."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attention: "SelfAttention", tokens: Tensor) -> Tensor:
        """Tokens (B, L, C) to attended tokens (B, L, C)."""
        if attention.fused_projections:
            query, key, value = attention.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, key, value = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
        query, key, value = (
            rearrange(x, "b l (heads c) -> b l heads c", heads=attention.heads) for x in (query, key, value)
        )
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        tokens = rearrange(attended, "b l heads c -> b l (heads c)").to(query.dtype)
        for layer in attention.to_out:
            tokens = layer(tokens)
        return tokens


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Every position attends to every other (Vaswani et al. 2017; in a U-Net: Ho et al. 2020), plus the input.

    Args:
        channels: channels of the map.
        head_channels: channels per head; `channels` is a multiple of it.
        norm: normalisation applied before the projections.
    """

    processor: SelfAttentionProcessor
    to_qkv: nn.Linear  # while the projections are fused

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]

    def __init__(self, channels: int, head_channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.use_bias = True
        self.is_cross_attention = False
        self.norm = norm
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, since diffusers' tools look for to_out.0
        self.processor = SelfAttentionProcessor()

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, H, W) to a map of the same shape."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        attended = self.processor(self, tokens)
        return x + rearrange(attended, "b (h w) c -> b c h w", h=x.shape[2])
