"""Print how far the models are from the official ones' float64 vectors: python tests/modeling/print_parity.py

For every model and kind of tensor, the largest difference over the largest value of its tensor. Gradients
that are zero in exact arithmetic have no relative error and are left out; test_parity.py bounds them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests")]

from test_parity import FULL, TINY, run_full, run_tiny  # noqa: E402

from rev_det.modeling.reversible import ACTIVATIONS  # noqa: E402

# Names of the vectors by the columns of the table.
COLUMNS = {
    "tokens": ("patch_embed", "tokens"),
    "streams": ("X1", "X2"),
    "transitions": ("fused", "out"),
    "final tokens": ("norm_tokens",),
    "logits": ("logits", "loss"),
    "gradients": (),
}


def collect(vectors, found):
    """{column: errors of its tensors} of what test_parity's runs return."""
    errors = {}
    for key in vectors.names():
        if vectors.largest(key) > 1e-12:
            errors.setdefault(column(key), []).append(vectors.error(key, found[key]))
    return errors


def column(key):
    if key.startswith("grad"):
        return "gradients"
    last = key.rpartition(".")[2]
    return next(title for title, names in COLUMNS.items() if last in names)


def row(title, errors):
    cells = (f"{max(errors[key]):.1e} ({len(errors[key])})" if key in errors else "-" for key in COLUMNS)
    return f"{title:33}" + "".join(f"{cell:>15}" for cell in cells)


def main():
    print("Largest relative error (tensors compared), float64:")
    print(" " * 33 + "".join(f"{title:>15}" for title in COLUMNS))
    for name in FULL:
        print(row(name, collect(*run_full(name))), flush=True)
    for name in TINY:
        for activations in ACTIVATIONS:
            errors = collect(*run_tiny(name, activations=activations))
            print(row(f"{name}, {activations}", errors), flush=True)


if __name__ == "__main__":
    main()
