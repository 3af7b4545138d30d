"""The models against the official ones' float64 vectors: activations, logits and all gradients."""

import pytest
import torch
from reference import Vectors, image

from rev_det.checkpoint import convert_state_dict
from rev_det.modeling import RevMViT, RevViT
from rev_det.modeling.reversible import ACTIVATIONS, run_blocks

# Of each the seeds of its image and of its loss, and its sizes.
TINY = {
    "tiny_rev_vit": (RevViT, 201, 301, dict(embed_dim=32, depth=4, num_heads=4)),
    "tiny_rev_mvit": (
        *(RevMViT, 202, 302),
        dict(embed_dim=16, depth=6, last_block_indexes=(0, 2, 5), out_features=("scale4",)),
    ),
    "tiny_rev_mvit_4stage": (
        *(RevMViT, 203, 303),
        dict(embed_dim=8, depth=8, last_block_indexes=(0, 2, 5, 7), out_features=("scale5",)),
    ),
}
FULL = {
    "rev_vit_s": (RevViT, 101, {"embed_dim": 384, "num_heads": 6}),
    "rev_vit_b": (RevViT, 102, {}),
    "rev_mvit_b": (RevMViT, 103, {"out_features": ("scale5",)}),
}


def build(cls, state, **arguments):
    model = cls(**arguments).double()
    model.load_state_dict(convert_state_dict(state), strict=True)
    return model


def walk(model, x):
    """Every named activation of the official model, from our modules."""
    patches = model.patch_embed(x).flatten(1, 2)
    tokens, hw = model.embed(x)
    found = {"patch_embed": patches, "tokens": tokens}
    x1 = x2 = tokens
    for i, block in enumerate(model.blocks):
        if hasattr(block, "fuse"):
            found[f"layer{i:02d}.fused"] = block.fuse(x1, x2)
            x1 = x2 = found[f"layer{i:02d}.out"] = block(x1, x2, hw)
            hw = tuple(-(-n // 2) for n in hw)
        else:
            x1, x2 = run_blocks([block], x1, x2, hw)
            found[f"layer{i:02d}.X1"], found[f"layer{i:02d}.X2"] = x1, x2
    found["norm_tokens"] = last_norm(model)(x1, x2)
    return found


def last_norm(model):
    return model.norm if isinstance(model, RevViT) else getattr(model, f"{model._out_features[-1]}_norm")


def logits_of(feature_map, state):
    mean = feature_map.flatten(2).mean(-1)
    return torch.nn.functional.linear(mean, state["head.projection.weight"], state["head.projection.bias"])


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_match_every_activation_and_the_logits(name):
    cls, seed, arguments = FULL[name]
    vectors = Vectors(f"parity_{name}.npz")
    state = vectors.state()
    model = build(cls, state, **arguments).eval()
    with torch.no_grad():
        x = image((2, 3, 224, 224), seed)
        (feature_map,) = model(x).values()
        found = {**walk(model, x), "logits": logits_of(feature_map, state)}
    assert len(vectors.names()) >= 12
    for key in vectors.names():
        assert vectors.error(key, found[key]) < 1e-9, key


@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", TINY)
def test_tiny_models_match_all_activations_and_all_gradients(name, activations, keep_attention):
    cls, image_seed, loss_seed, sizes = TINY[name]
    vectors = Vectors("parity_tiny.npz", f"{name}|")
    state = {key: value.requires_grad_() for key, value in vectors.state().items()}
    sizes = {**sizes, "pretrain_img_size": 64}
    model = build(cls, state, activations=activations, keep_attention=keep_attention, **sizes).train()
    x = image((2, 3, 64, 64), image_seed).requires_grad_()
    (feature_map,) = model(x).values()
    logits = logits_of(feature_map, state)
    loss = (logits * image((2, 10), loss_seed)).mean()
    loss.backward()
    found = {**walk(model, x), "logits": logits, "loss": loss, "grad_image": x.grad}
    officials = our_names(state)
    found |= {f"grad|{officials[key]}": p.grad for key, p in model.named_parameters()}
    found |= {f"grad|{key}": state[key].grad for key in state if key.startswith("head.")}
    assert len(vectors.names("grad|")) == len(state)
    for key in vectors.names():
        if key.startswith("grad|") and vectors.largest(key) < 1e-12:
            # A constant added to all keys cancels in the softmax.
            assert found[key].abs().max() < 1e-12, key
        else:
            assert vectors.error(key, found[key]) < 1e-9, key


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_drop_path_matches_recorded_masks(activations):
    vectors = Vectors("parity_tiny.npz", "droppath|")
    arrays = vectors.arrays
    state = Vectors("parity_tiny.npz", "tiny_rev_vit|").state()
    cls, _, _, sizes = TINY["tiny_rev_vit"]
    model = build(cls, state, activations=activations, pretrain_img_size=64, **sizes).train()
    keep = 1.0 - arrays["droppath|prob"]
    masks = [
        tuple(torch.from_numpy(arrays[f"droppath|mask|layer{i:02d}.{b}"]).double() / keep[i] for b in "FG")
        for i in range(4)
    ]
    assert any((m == 0).any() for pair in masks for m in pair)
    model.draw_masks = lambda x: masks
    (feature_map,) = model(image((6, 3, 64, 64), 1201)).values()
    logits = logits_of(feature_map, state)
    (logits * image((6, 10), 1301)).mean().backward()
    assert vectors.error("logits", logits) < 1e-9
    grads = {key: p.grad for key, p in model.named_parameters()}
    for ours, official in our_names(state).items():
        if vectors.largest(f"grad|{official}") > 1e-12:
            # These vectors' gradients are stored in float32.
            assert vectors.error(f"grad|{official}", grads[ours]) < 3e-7, official


def our_names(state):
    """{our key: official key}: converting only renames and reshapes, so a tensor full of i is found again."""
    officials = list(state)
    marked = {key: torch.full_like(state[key], i, requires_grad=False) for i, key in enumerate(officials)}
    return {ours: officials[int(t.flatten()[0])] for ours, t in convert_state_dict(marked).items()}
