"""Training with rebuilt activations and with stored ones is the same training."""

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from rev_det.engine import Trainer, argument_parser, load_config

# Which proposals are kept and which RoIs are sampled hangs on single bits once two scores are close; after
# that two runs are different ones. The proposal network has no such choice when all anchors are sampled.
WITHOUT_CHOICE = ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000")
# AdamW divides by the size of a gradient and so enlarges rounding, the more the faster it learns.
WITHOUT_CHOICE += ("SOLVER.BASE_LR", "0.0003")


def losses(arguments: list[str], iterations: int) -> torch.Tensor:
    args = argument_parser().parse_args(arguments)
    seed_all_rng(3)
    trainer = Trainer(load_config(args.config_file, args.opts, args.dataset))
    with EventStorage() as storage:
        for trainer.iter in range(iterations):
            trainer.run_step()
            trainer.scheduler.step()
    return torch.tensor([value for value, _ in storage.history("total_loss").values()], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts, iterations",
    [(WITHOUT_CHOICE, 50), (("SOLVER.WARMUP_ITERS", "100"), 20)],
    ids=["proposals", "masks"],
)
def test_losses_of_reversible_and_cached_agree(tiny_run, nano_config, opts, iterations):
    opts += ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", "100", "SEED", "3")
    opts += ("MODEL.REV_MVIT.DROP_PATH_RATE", "0.2", "MODEL.REV_VIT.DROP_PATH_RATE", "0.2")
    reversible, cached = (
        losses(tiny_run(nano_config, *opts, "MODEL.REV.ACTIVATIONS", mode), iterations)
        for mode in ("reversible", "cached")
    )
    # Twenty iterations of warm-up change the losses of a Mask R-CNN hardly more than the next images do.
    assert len(cached) == iterations and (iterations < 50 or cached[-1] < 0.98 * cached[0])
    torch.testing.assert_close(reversible, cached, rtol=1e-4, atol=0)
