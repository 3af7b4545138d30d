"""Fingerprints: the same on every machine, and another for other weights."""

import zlib

import numpy as np
import pytest
import torch
from reference import Vectors
from tiny_named import CLASSES, add_tiny_model, container, save_tiny, tiny_logits, tiny_state

from rev_det.checkpoint.named import load_named_model
from rev_det.fingerprint import Fingerprint, fixed_image, take_fingerprints

# Taken with torch 2.15 on an AMD EPYC; also without AVX (ATEN_CPU_CAPABILITY=default) and with two threads.
REV_MVIT_B = """
scale2 (1 x 192 x 56 x 56): mean 0.02000, std 1.00000, values 0.23193 -0.73544 0.15207 -0.13508, crc 3637d2e7
scale3 (1 x 384 x 28 x 28): mean 0.02000, std 1.00000, values 0.07739 -1.09344 0.67191 -1.65101, crc fadf599f
scale4 (1 x 768 x 14 x 14): mean 0.02000, std 1.00000, values -0.68258 0.45985 -0.58861 -0.09755, crc 65babc12
scale5 (1 x 1536 x 7 x 7): mean -0.00029, std 1.00705, values -1.34659 0.94076 -1.19584 0.73331, crc 74e8dd8e
logits (1 x 1000): mean 0.01689, std 0.93273, values 0.01125 0.06456 0.08427 -0.44915, crc e07af8d1
"""


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    add_tiny_model(monkeypatch)


def test_the_fixed_image_is_this_one():
    image = fixed_image()
    assert (image.dtype, tuple(image.shape)) == (torch.float64, (1, 3, 224, 224))
    assert -2.0 <= image.min() < -1.99 and 1.99 < image.max() < 2.0
    # Exact: the numbers are integers times a power of two.
    assert image.flatten()[:3].tolist() == [-1.7547268713370565, 1.901518827934173, -0.6984243841902011]
    assert zlib.crc32(image.numpy().astype("<f8").tobytes()) == 2909353244


def test_rev_mvit_b_with_the_reference_weights_computes_here_what_it_computed_elsewhere():
    weights = load_named_model(Vectors("parity_rev_mvit_b.npz").state())
    assert [str(fingerprint) for fingerprint in take_fingerprints(weights)] == REV_MVIT_B.strip().split("\n")


def test_the_figures_are_those_of_the_tensor():
    values = torch.tensor([[0.5, -1.5, 2.25], [0.0, -0.00001, 3.0004]], dtype=torch.float64)
    found = Fingerprint.of("x", values)
    assert (found.shape, found.mean, found.std) == (
        (2, 3),
        pytest.approx(values.mean().item()),
        pytest.approx(float(np.std(values.numpy()))),
    )
    thousandths = np.array([500, -1500, 2250, 0, 0, 3000], dtype="<i8")
    assert found.crc == zlib.crc32(thousandths.tobytes())
    assert str(found).startswith("x (2 x 3): mean 0.70840, ")
    assert "values 0.50000 -1.50000 2.25000 0.00000, crc" in str(found)
    assert "-0.00000" not in str(Fingerprint.of("x", torch.tensor([-1e-9], dtype=torch.float64)))


def test_the_logits_are_the_classifiers(tmp_path):
    found = take_fingerprints(load_named_model(save_tiny(tmp_path / "tiny.pyth")))
    assert [fingerprint.name for fingerprint in found] == ["last_feat", "logits"]
    assert (found[0].shape, found[1].shape) == ((1, 64, 14, 14), (1, CLASSES))
    expected = tiny_logits(fixed_image().float())
    assert found[1].mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found[1].std == pytest.approx(expected.std(correction=0).item(), abs=1e-5)


def test_one_weight_changed_by_a_hundredth_shows_in_every_output_after_it():
    def fingerprints(change):
        state = tiny_state()
        state["rev_backbone.layers.3.G.mlp.fc2.bias"][5] += change
        return take_fingerprints(load_named_model(container(state)))

    for one, other in zip(fingerprints(0.0), fingerprints(0.01), strict=True):
        assert one.crc != other.crc, one.name
    assert fingerprints(0.0) == fingerprints(0.0)
