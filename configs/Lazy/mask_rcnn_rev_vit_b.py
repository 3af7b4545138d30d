"""ViTDet's Mask R-CNN on Rev-ViT-B, for Detectron2's ``lazyconfig_train_net.py``."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from rev_det.modeling import RevViT
from rev_det.modeling.build import RevSimpleFeaturePyramid

# ViTDet's heads, their norms and its RGB statistics stay.
model = get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone = L(RevSimpleFeaturePyramid)(
    net=L(RevViT)(embed_dim=768, depth=12, num_heads=12, drop_path_rate=0.2, out_feature="last_feat"),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
)

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_3x
train = get_config("common/train.py").train
train.max_iter = 270000
train.init_checkpoint = ""  # a file that `rev-det weights convert` made of the published one
