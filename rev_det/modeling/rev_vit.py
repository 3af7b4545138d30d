"""Rev-ViT: a reversible vision transformer of one stride (*Reversible Vision Transformers*, CVPR 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from ..rules import check_count
from .attention import MultiHeadAttention
from .backbone import ReversibleBackbone, pad_to_multiple, to_feature_map
from .fusion import ScaleNorm
from .layers import ReversibleBlock


class RevViT(ReversibleBackbone):
    """Rev-ViT as a backbone: one feature map of 2 * embed_dim channels at the patch stride.

    The map is the concatenation of both streams, normalised jointly by one LayerNorm. The defaults are
    Rev-ViT-B; S, L and H are (embed_dim, depth, num_heads) = (384, 12, 6), (1024, 24, 16), (1280, 32, 16).

    Args:
        patch_size: side of a patch in pixels, and the stride of the output.
        in_chans: channels of the images.
        embed_dim: width of each stream; a multiple of ``num_heads``.
        depth: number of reversible blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        qkv_bias: give the query, key and value projections a bias.
        drop_path_rate: drop-path probability of the last block (linear from 0), for F and G separately.
        pretrain_img_size: image side in pixels that ``pos_embed`` is sized for; it is interpolated to others.
        out_feature: name of the feature map.
        activations: "reversible", "cached" or "checkpoint", see `ReversibleSequence`.
        keep_attention: keep the fused attention's results (batch * tokens * embed_dim values for each block)
            instead of computing them again.
        freeze_at: 0 trains all, 1 freezes the embeddings, 1 + k also the first k blocks.
        termination: how the output is made of the streams (Table 6), see `fusion.TERMINATIONS`.
        inner_residual: the naive variant of Table 5, with skip connections inside F and G.

    Raises:
        ValueError: an argument outside the allowed values; the message names it.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        pretrain_img_size: int = 224,
        out_feature: str = "last_feat",
        activations: str = "reversible",
        keep_attention: bool = True,
        freeze_at: int = 0,
        termination: str = "concat-norm",
        inner_residual: bool = False,
    ):
        check_count("patch_size", patch_size)
        super().__init__(
            patch_kernel=(patch_size, patch_size),
            patch_stride=(patch_size, patch_size),
            patch_padding=(0, 0),
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
        self.patch_size = patch_size
        self.blocks = nn.ModuleList(
            ReversibleBlock(
                embed_dim, MultiHeadAttention(embed_dim, num_heads, qkv_bias), mlp_ratio, inner_residual
            )
            for _ in range(depth)
        )
        self.norm = ScaleNorm(embed_dim, termination)
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: 2 * embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self.finish(freeze_at)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Extract the feature map.

        Args:
            images: (B, in_chans, H, W) of any size; zeros are added on the right and at the bottom up to the
                next multiple of the patch size.

        Returns:
            {out_feature: (B, 2 * embed_dim, ceil(H / patch_size), ceil(W / patch_size))}.
        """
        x, hw = self.embed(pad_to_multiple(images, self.patch_size))
        y1, y2 = self.run(0, len(self.blocks) - 1, x, hw, masks=self.draw_masks(x))
        return {self._out_features[0]: to_feature_map(self.normalise(self.norm, y1, y2), hw)}
