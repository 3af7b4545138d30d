"""A tiny Rev-ViT among the named models, and its weights in a file as the official saver writes it."""

import torch
from reference import Vectors

from rev_det.checkpoint import load_pretrained, named
from rev_det.modeling import RevViT

CLASSES = 10


def add_tiny_model(monkeypatch):
    """Name the tiny Rev-ViT "rev_vit_tiny". Its position embedding is resized to 224 x 224 images."""
    model = named.NamedModel("rev_vit", 32, (3,), 4, "https://example.org/t.pyth", 12.3)
    monkeypatch.setitem(named.NAMED_MODELS, "rev_vit_tiny", model)


def tiny_state():
    vectors = Vectors("parity_tiny.npz", "tiny_rev_vit|")
    return {key: value.float() for key, value in vectors.state().items()}


def container(state, num_heads=4):
    return {"epoch": 0, "model_state": state, "cfg": f"MVIT:\n  NUM_HEADS: {num_heads}\n"}


def save_tiny(path, **changes):
    """Write the file; a change to None leaves the tensor out."""
    state = {key: value for key, value in {**tiny_state(), **changes}.items() if value is not None}
    torch.save(container(state), path)
    return str(path)


def tiny_logits(images):
    """Logits of (B, 3, 224, 224) without the classifier that is tested."""
    state = tiny_state()
    model = RevViT(embed_dim=32, depth=4, num_heads=4).eval()
    load_pretrained(model, state)
    with torch.no_grad():
        tokens = model(images)["last_feat"].flatten(2)
    return tokens.mean(2) @ state["head.projection.weight"].T + state["head.projection.bias"]
