"""FCOS on Rev-MViT-B, for Detectron2's ``lazyconfig_train_net.py``."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from rev_det.modeling import RevMViT
from rev_det.modeling.build import RevFPN

# FCOS's head stays, and the top block that makes its levels p6 and p7.
model = get_config("common/models/fcos.py").model
model.backbone = L(RevFPN)(
    bottom_up=L(RevMViT)(drop_path_rate=0.4, out_features=("scale3", "scale4", "scale5")),
    in_features="${.bottom_up.out_features}",
    out_channels=256,
    top_block=model.backbone.top_block,
)
# What the published weights expect; the data are read accordingly, below.
constants = get_config("common/data/constants.py").constants
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_3x
train = get_config("common/train.py").train
train.max_iter = 270000
train.init_checkpoint = ""  # a file that `rev-det weights convert` made of the published one
