"""Self-attention over the positions of a feature map, in the form that diffusers' attention tools expect."""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

WITHOUT_LORA = (
    "call unload_lora() first, and fuse_lora() before it if the weights are to keep what the adapter has learnt"
)


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

    def fuse_projections(self) -> None:
        """Joins the projections to query, key and value into one layer.

        Raises:
            ValueError: a projection has an adapter, such as LoRA, which the joined layer would lack.
        """
        for name in ("to_q", "to_k", "to_v"):
            self._check_plain(name)
        super().fuse_projections()

    @torch.no_grad()
    def unfuse_projections(self) -> None:
        """Takes the joined layer apart; the projections keep what it has learnt.

        Raises:
            ValueError: the joined layer has an adapter, such as LoRA.
        """
        if self.fused_projections:
            self._check_plain("to_qkv")
            parts = zip((self.to_q, self.to_k, self.to_v), self.to_qkv.weight.chunk(3), self.to_qkv.bias.chunk(3))
            for layer, weight, bias in parts:
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        super().unfuse_projections()

    def _check_plain(self, name: str) -> None:
        kind = type(getattr(self, name))
        if not issubclass(kind, nn.Linear):
            raise ValueError(
                f"{name} is a {kind.__module__}.{kind.__name__}, but only plain linear layers can be joined or taken "
                f"apart; {WITHOUT_LORA}."
            )
