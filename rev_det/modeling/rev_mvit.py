"""Rev-MViT: a reversible multiscale vision transformer (Reversible Vision Transformers, CVPR 2022)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..rules import check_count, check_pair, is_whole
from .attention import MultiHeadPoolingAttention
from .backbone import TRANSITIONS, ReversibleBackbone, to_feature_map
from .fusion import ScaleNorm, build_fusion
from .kept_attention import to_autocast_dtype
from .layers import AttentionBranch, MlpBranch, ReversibleBlock
from .recomputation import recompute, recompute_each
from .repetition import WHOLE

Q_STRIDE = 2  # of every stage transition


class StageTransition(nn.Module):
    """Ends a stage: fuses the streams, halves the resolution, doubles the width. It is not reversible::

        z = [X1, X2] + MLP([X1, X2])
        y = norm_q(pool_q(z)) + F(z)        queries pooled with stride 2
        y = y + G(y)

    Args:
        dim: width C of each incoming stream; the result is 2C wide.
        num_heads: of the attention over 2C channels.
        stride_kv: stride of the key and value pooling, on the incoming grid.
        mlp_ratio, qkv_bias, pool_kernel: as in the reversible blocks.
        fusion: how the streams become z, see `fusion.FUSIONS`; the above is "2x-mlp".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stride_kv: int,
        mlp_ratio: float,
        qkv_bias: bool,
        pool_kernel: tuple[int, int],
        fusion: str = "2x-mlp",
    ):
        super().__init__()
        self.fuse = build_fusion(fusion, dim)
        # A fusion that reduces the streams instead of concatenating them leaves q, k, v and the skip
        # connection to widen.
        in_dim = dim if fusion == "max" else 2 * dim
        attn = MultiHeadPoolingAttention(
            2 * dim, num_heads, qkv_bias, pool_kernel, stride_kv, Q_STRIDE, in_dim=in_dim
        )
        self.F = AttentionBranch(in_dim, attn)
        self.widen = nn.Identity() if in_dim == 2 * dim else nn.Linear(in_dim, 2 * dim)
        self.G = MlpBranch(2 * dim, mlp_ratio)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        hw: tuple[int, int],
        masks: tuple[Tensor | None, Tensor | None] = (None, None),
        checkpointed: bool = False,
        keep_attention: bool = True,
    ) -> Tensor:
        """Fuse and pool.

        Args:
            x1, x2: (B, H*W, C).
            hw: (H, W).
            masks: drop-path multipliers (mF, mG) of shape (B,); the pooled skip connection is never dropped.
            checkpointed: compute again in the backward pass what is large: the fusion, q, k and v before
                pooling, and the MLP. Kept are z, the pooled q, k, v and the attention's result.
            keep_attention: if not, with ``checkpointed``, the whole attention is computed again.

        Returns:
            y of shape (B, ceil(H/2) * ceil(W/2), 2C).
        """
        mask_f, mask_g = (m if m is None else m.view(-1, 1, 1) for m in masks)
        if not (checkpointed and torch.is_grad_enabled()):
            y = self._attention(self.fuse(x1, x2), hw, mask_f)
            return _masked_sum(y, self.G(y), mask_g)
        parts = self.fuse.parts(x1) if hasattr(self.fuse, "parts") else WHOLE
        z = recompute(self.fuse, x1, x2, parts=parts, last=getattr(self.fuse, "fc2", None))
        if keep_attention:
            y = self._kept_attention(z, hw, mask_f)
        else:
            y = recompute(self._attention, z, hw, mask_f, modules=[self.widen, self.F])
        return _masked_sum(y, recompute(self.G, y, parts=self.G.parts(y), last=self.G.mlp.fc2), mask_g)

    def _attention(self, z: Tensor, hw: tuple[int, int], mask: Tensor | None) -> Tensor:
        return _masked_sum(self._residual(z, hw), self.F(z, hw), mask)

    def _kept_attention(self, z: Tensor, hw: tuple[int, int], mask: Tensor | None) -> Tensor:
        attn = self.F.attn
        residual = recompute(self._residual, z, hw, modules=[self.widen, attn.pool_q, attn.norm_q])
        # Before pooling q, k and v are large: the backward pass computes one at a time.
        q, k, v = recompute_each(
            (lambda z: to_autocast_dtype(self.F.norm(z)), [self.F.norm]),
            [(partial(attn.project, name, hw=hw), attn.modules_of(name)) for name in "qkv"],
            z,
        )
        return _masked_sum(residual, attn.proj(attn.attend(q, k, v)), mask)

    def _residual(self, z: Tensor, hw: tuple[int, int]) -> Tensor:
        return self.F.attn.pool("q", self.widen(z), hw).flatten(2)


class RevMViT(ReversibleBackbone):
    """Rev-MViT as a backbone: feature maps at strides 4, 8, 16, 32 (for four stages).

    A stage is a run of reversible blocks; every stage but the first begins with a `StageTransition`. Each
    scale is the concatenation of both streams at its stage's end, normalised jointly by one LayerNorm. The
    defaults are Rev-MViT-B, whose scales have 192, 384, 768 and 1536 channels.

    Args:
        patch_kernel, patch_stride, patch_padding: of the patch embedding's convolution.
        in_chans: channels of the images.
        embed_dim: width of each stream in the first stage; doubles with every stage.
        depth: number of blocks, transitions included.
        num_heads: attention heads in the first stage; doubles with every stage.
        last_block_indexes: index of the last block of each stage, ending with ``depth - 1``.
        qkv_pool_kernel: kernel of the pooling convolutions.
        adaptive_kv_stride: stride of the key and value pooling in the first stage; halved (at least 1) in
            every transition.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: give the query, key and value projections a bias.
        drop_path_rate: drop-path probability of the last block (linear from 0), for F and G separately.
        pretrain_img_size: image side in pixels that ``pos_embed`` is sized for; it is interpolated to others.
        out_features: the scales to return, of "scale2" (first stage), "scale3", ...
        activations: "reversible", "cached" or "checkpoint", see `ReversibleSequence`.
        transitions: "checkpoint" recomputes the large parts of transitions, "cached" keeps them; "auto" is
            "checkpoint" unless ``activations`` is "cached".
        keep_attention: keep the fused attention's results instead of computing them again.
        freeze_at: 0 trains all, 1 freezes the embeddings, 1 + k also the first k blocks.
        fusion: how transitions fuse the streams (Table 6), see `fusion.FUSIONS`.
        termination: how outputs are made of the streams (Table 6), see `fusion.TERMINATIONS`.
        inner_residual: the naive variant of Table 5, with skip connections inside F and G.

    Raises:
        ValueError: an argument outside the allowed values; the message names it.
    """

    def __init__(
        self,
        patch_kernel: tuple[int, int] = (7, 7),
        patch_stride: tuple[int, int] = (4, 4),
        patch_padding: tuple[int, int] = (3, 3),
        in_chans: int = 3,
        embed_dim: int = 96,
        depth: int = 16,
        num_heads: int = 1,
        last_block_indexes: tuple[int, ...] = (0, 2, 13, 15),
        qkv_pool_kernel: tuple[int, int] = (3, 3),
        adaptive_kv_stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        pretrain_img_size: int = 224,
        out_features: tuple[str, ...] = ("scale2", "scale3", "scale4", "scale5"),
        activations: str = "reversible",
        transitions: str = "auto",
        keep_attention: bool = True,
        freeze_at: int = 0,
        fusion: str = "2x-mlp",
        termination: str = "concat-norm",
        inner_residual: bool = False,
    ):
        super().__init__(
            patch_kernel=patch_kernel,
            patch_stride=patch_stride,
            patch_padding=patch_padding,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            pretrain_img_size=pretrain_img_size,
            activations=activations,
            keep_attention=keep_attention,
        )
        _check_stages(last_block_indexes, depth)
        if transitions not in TRANSITIONS:
            raise ValueError(f"transitions must be one of {', '.join(TRANSITIONS)}; got {transitions!r}")
        check_pair("qkv_pool_kernel", qkv_pool_kernel)
        check_count("adaptive_kv_stride", adaptive_kv_stride)
        scales = [f"scale{i + 2}" for i in range(len(last_block_indexes))]
        unknown = [name for name in out_features if name not in scales]
        if unknown or not out_features:
            raise ValueError(
                f"out_features must be some of {', '.join(scales)} for {len(scales)} stages; "
                f"got {tuple(out_features)}"
            )
        self.checkpoint_transitions = transitions == "checkpoint" or (
            transitions == "auto" and activations != "cached"
        )
        self.last_block_indexes = tuple(last_block_indexes)

        self.blocks = nn.ModuleList()
        self._out_features = [name for name in scales if name in out_features]
        self._out_feature_channels = {}
        self._out_feature_strides = {}
        dim, heads, stride_kv, stride = embed_dim, num_heads, adaptive_kv_stride, patch_stride[0]
        for stage, (name, last) in enumerate(zip(scales, last_block_indexes, strict=True)):
            if stage:
                heads, stride_kv, stride = 2 * heads, max(stride_kv // Q_STRIDE, 1), stride * Q_STRIDE
                self.blocks.append(
                    StageTransition(dim, heads, stride_kv, mlp_ratio, qkv_bias, qkv_pool_kernel, fusion)
                )
                dim = 2 * dim
            while len(self.blocks) <= last:
                attn = MultiHeadPoolingAttention(dim, heads, qkv_bias, qkv_pool_kernel, stride_kv)
                self.blocks.append(ReversibleBlock(dim, attn, mlp_ratio, inner_residual))
            if name in out_features:
                self.add_module(f"{name}_norm", ScaleNorm(dim, termination))
                self._out_feature_channels[name] = 2 * dim
                self._out_feature_strides[name] = stride
        self.finish(freeze_at)

    def drop_outputs(self, names: set[str]) -> None:
        """Return these scales no longer, and remove their norms."""
        for name in names:
            self._out_features.remove(name)
            delattr(self, f"{name}_norm")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Extract the feature maps.

        Args:
            images: (B, in_chans, H, W) of any size.

        Returns:
            For each of ``out_features`` in order of stride s, (B, channels, ceil(H / s), ceil(W / s)).
        """
        x, hw = self.embed(images)
        masks = self.draw_masks(x)
        x1 = x2 = x
        outputs = {}
        first = 0
        for stage, last in enumerate(self.last_block_indexes):
            if stage:
                transition, mask = self.blocks[first], masks[first]
                x = transition(x1, x2, hw, mask, self.checkpoint_transitions, self.keep_attention)
                hw = tuple(-(-n // Q_STRIDE) for n in hw)
                first += 1
            x1, x2 = self.run(first, last, x, hw, masks=masks)
            first = last + 1
            name = f"scale{stage + 2}"
            if name in self._out_features:
                tokens = self.normalise(getattr(self, f"{name}_norm"), x1, x2)
                outputs[name] = to_feature_map(tokens, hw)
        return outputs


def _masked_sum(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    return x + y if mask is None else torch.addcmul(x, y, mask)


def _check_stages(last_block_indexes: tuple[int, ...], depth: int) -> None:
    allowed = (
        "last_block_indexes must be whole numbers that increase, leave every stage a reversible block "
        "(every stage but the first also has a transition, so steps are at least 2) and end with "
        f"depth - 1 = {depth - 1}"
    )
    valid = bool(last_block_indexes) and all(map(is_whole, last_block_indexes))
    if valid:
        starts = (-2, *last_block_indexes)
        steps = [b - a for a, b in zip(starts, last_block_indexes, strict=False)]
        valid = min(steps) >= 2 and last_block_indexes[-1] == depth - 1
    if not valid:
        raise ValueError(f"{allowed}; got {last_block_indexes!r}")
