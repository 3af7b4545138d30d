"""Fingerprints: the same on every machine, and another for other weights."""

import re
import zlib

import numpy as np
import pytest
import torch
from reference import Vectors
from tiny_named import CLASSES, add_tiny_model, container, tiny_logits, tiny_state

from rev_det.classify import load_classifier
from rev_det.fingerprint import fingerprint, fixed_image, take_fingerprints

# Taken with torch 2.15 on an AMD EPYC; also without AVX (ATEN_CPU_CAPABILITY=default) and with two threads.
REV_MVIT_B = """
scale2 (1 x 192 x 56 x 56): mean 0.02000, std 1.00000, values 0.23193 -0.73544 0.15207 -0.13508, crc 3637d2e7
scale3 (1 x 384 x 28 x 28): mean 0.02000, std 1.00000, values 0.07739 -1.09344 0.67191 -1.65101, crc fadf599f
scale4 (1 x 768 x 14 x 14): mean 0.02000, std 1.00000, values -0.68258 0.45985 -0.58861 -0.09755, crc 65babc12
scale5 (1 x 1536 x 7 x 7): mean -0.00029, std 1.00705, values -1.34659 0.94076 -1.19584 0.73331, crc 74e8dd8e
logits (1 x 1000): mean 0.01689, std 0.93273, values 0.01125 0.06456 0.08427 -0.44915, crc e07af8d1
"""


def test_rev_mvit_b_with_the_reference_weights_computes_here_what_it_computed_elsewhere():
    classifier, *_ = load_classifier(Vectors("parity_rev_mvit_b.npz").state())
    assert take_fingerprints(classifier) == REV_MVIT_B.strip().split("\n")


def test_the_figures_are_those_of_the_tensor():
    values = torch.tensor([[0.5, -1.5, 2.25], [0.0, -0.00001, 3.0004]], dtype=torch.float64)
    crc = zlib.crc32(np.array([500, -1500, 2250, 0, 0, 3000], dtype="<i8").tobytes())
    assert fingerprint("x", values) == (
        f"x (2 x 3): mean 0.70840, std {float(np.std(values.numpy())):.5f}, "
        f"values 0.50000 -1.50000 2.25000 0.00000, crc {crc:08x}"
    )
    assert "-0.00000" not in fingerprint("x", torch.tensor([-1e-9], dtype=torch.float64))


def test_one_weight_changed_by_a_hundredth_shows_in_every_output_after_it(monkeypatch):
    add_tiny_model(monkeypatch)

    def fingerprints(change):
        state = tiny_state()
        state["rev_backbone.layers.3.G.mlp.fc2.bias"][5] += change
        return take_fingerprints(load_classifier(container(state))[0])

    same, other = fingerprints(0.0), fingerprints(0.01)
    assert fingerprints(0.0) == same
    assert all(a[-8:] != b[-8:] for a, b in zip(same, other, strict=True))
    assert [line.partition(":")[0] for line in same] == [
        "last_feat (1 x 64 x 14 x 14)",
        f"logits (1 x {CLASSES})",
    ]
    mean = float(re.search(r"mean (\S+),", same[1]).group(1))
    assert mean == pytest.approx(tiny_logits(fixed_image().float()).mean().item(), abs=2e-5)
