"""Print how far the models are from the official ones' float64 vectors: python tests/modeling/print_parity.py

For every model and kind of tensor, the largest difference over the largest value of its tensor. Gradients
that are zero in exact arithmetic have no relative error and are left out; test_parity.py bounds them.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests")]

from reference import Vectors, image  # noqa: E402
from test_parity import FULL, TINY, build, logits_of, our_names, walk  # noqa: E402

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


def full_size_errors(name):
    """{column: errors of its tensors} of a full-size model."""
    cls, seed, arguments = FULL[name]
    vectors = Vectors(f"parity_{name}.npz")
    state = vectors.state()
    model = build(cls, state, **arguments).eval()
    with torch.no_grad():
        x = image((2, 3, 224, 224), seed)
        found = walk(model, x)
        (feature_map,) = model(x).values()
        found["logits"] = logits_of(feature_map, state)
    return collect(vectors, found)


def tiny_errors(name, activations):
    """The same of a tiny model, with all gradients."""
    cls, image_seed, loss_seed, arguments = TINY[name]
    vectors = Vectors("parity_tiny.npz", f"{name}|")
    state = {key: value.requires_grad_() for key, value in vectors.state().items()}
    model = build(cls, state, activations=activations, **arguments).train()
    x = image((2, 3, 64, 64), image_seed).requires_grad_()
    (feature_map,) = model(x).values()
    logits = logits_of(feature_map, state)
    loss = (logits * image((2, 10), loss_seed)).mean()
    loss.backward()
    officials = our_names(state)
    grads = {f"grad|{officials[key]}": p.grad for key, p in model.named_parameters()}
    grads |= {f"grad|{key}": value.grad for key, value in state.items() if value.grad is not None}
    return collect(vectors, {**walk(model, x), **grads, "logits": logits, "loss": loss, "grad_image": x.grad})


def collect(vectors, found):
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
        print(row(name, full_size_errors(name)), flush=True)
    for name in TINY:
        for activations in ACTIVATIONS:
            print(row(f"{name}, {activations}", tiny_errors(name, activations)), flush=True)


if __name__ == "__main__":
    main()
