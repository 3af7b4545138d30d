"""Which devices there are, and what is set in torch while a run lasts."""

import pytest
import torch
from detectron2.config import get_cfg

from rev_det import add_rev_det_config
from rev_det.devices import check_device, cudnn_attention, device_settings


@pytest.mark.parametrize(
    "gpus, known", [(0, ["cpu"]), (1, ["cuda", "cuda:0", "cpu"]), (2, ["cuda", "cuda:0", "cuda:1", "cpu"])]
)
def test_the_devices_of_the_machine_are_known_and_no_others(monkeypatch, gpus, known):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [check_device("--device", name) for name in known] == known
    assert check_device("--device") == known[0]
    for name in {"cuda", "cuda:1", "cuda:2", "cuda:-1", "cpu:0", "tpu", ""} - set(known):
        with pytest.raises(ValueError, match=f"^--device is '{name}'; .* are {', '.join(known)}$"):
            check_device("--device", name)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_cudnns_attention_is_forbidden_for_a_while_and_never_permitted(before, allowed):
    at_first = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        with pytest.raises(KeyError), cudnn_attention(allowed):
            assert torch.backends.cuda.cudnn_sdp_enabled() == (before and allowed)
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(at_first)


@pytest.mark.gpu
def test_the_current_device_is_that_of_the_config():
    cfg = get_cfg()
    add_rev_det_config(cfg)
    last = torch.cuda.device_count() - 1
    cfg.MODEL.DEVICE = f"cuda:{last}"
    before = torch.cuda.current_device()
    with device_settings(cfg):
        assert torch.cuda.current_device() == last
    assert torch.cuda.current_device() == before
