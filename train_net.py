#!/usr/bin/env python
"""Train or evaluate a detector on a rev_det backbone. ``train_net.py --help`` shows examples.

What it does is in ``rev_det.engine``: `main` reads the command line and starts the processes, each of which
trains with `Trainer`, Detectron2's ``DefaultTrainer`` with this project's optimizer, precision and data.
"""

import os
import sys
from importlib.util import find_spec

for module, name in (("torch", "PyTorch"), ("detectron2", "Detectron2")):
    if find_spec(module) is None:
        sys.stderr.write(
            f"error: {name} is not installed in {sys.executable}; first 'source .venv/bin/activate', "
            "or 'make setup'\n"
        )
        sys.exit(2)

# Read when torch is imported: threads that wait for work shall sleep. By default they spin, which makes
# training on the CPU several times slower as soon as another program wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rev_det.warning_filters import hide_advice  # noqa: E402

hide_advice()

from rev_det.engine import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
