#!/usr/bin/env python
"""Train or evaluate a detector on a rev_det backbone. ``train_net.py --help`` shows examples.

What it does is in ``rev_det.engine``: `main` reads the command line and starts the processes, each of which
trains with `Trainer`, Detectron2's ``DefaultTrainer`` with this project's optimizer, precision and data.
"""

import os
import signal
import sys
from importlib.util import find_spec

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While modules are imported, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

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
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
