"""The arithmetic that SOLVER.AMP chooses on each device."""

import contextlib

import pytest
import torch
from detectron2.config import get_cfg

from rev_det import add_rev_det_config
from rev_det.engine import Precision


def amp_config(device: str, dtype: str = "auto", enabled: bool = True):
    cfg = get_cfg()
    add_rev_det_config(cfg)
    cfg.MODEL.DEVICE = device
    cfg.SOLVER.AMP.ENABLED = enabled
    cfg.SOLVER.AMP.DTYPE = dtype
    return cfg


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_amp_off_is_float32(device):
    assert Precision.from_config(amp_config(device, enabled=False)) == Precision(device, None)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_the_cpu_computes_in_bfloat16(dtype):
    assert Precision.from_config(amp_config("cpu", dtype)) == Precision("cpu", torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU to be asked, whether it computes in bfloat16; it can emulate it."""

    def install(has_bf16: bool) -> None:
        answer = lambda including_emulation=True: has_bf16 or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    return install


@pytest.mark.parametrize("has_bf16, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_bfloat16_only_where_the_gpu_does_not_emulate_it(gpu, has_bf16, expected):
    gpu(has_bf16)
    assert Precision.from_config(amp_config("cuda")).dtype is expected


def test_bf16_on_a_gpu_without_it_is_an_error(gpu):
    gpu(False)
    with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE is 'bf16'.*'fp16' or 'auto'"):
        Precision.from_config(amp_config("cuda", "bf16"))


def test_fp16_on_the_cpu_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE is 'fp16'.*CPU"):
        Precision.from_config(amp_config("cpu", "fp16"))


@pytest.mark.parametrize("enabled", [True, False])
def test_an_unknown_type_is_an_error_even_when_amp_is_off(enabled):
    with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE is 'half'; allowed are 'auto', 'bf16', 'fp16'"):
        Precision.from_config(amp_config("cpu", "half", enabled))


@pytest.mark.parametrize(
    "precision, expected",
    [(Precision("cpu"), torch.float32), (Precision("cpu", torch.bfloat16), torch.bfloat16)],
)
def test_autocast_computes_in_the_chosen_type(precision, expected):
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with precision.autocast():
        assert layer(x).dtype is expected


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_types_with_the_range_of_float32_need_no_loss_scale(dtype):
    assert not Precision("cpu", dtype).grad_scaler().is_enabled()


@pytest.mark.gpu
def test_float16_gets_a_loss_scale():
    assert Precision("cuda", torch.float16).grad_scaler().is_enabled()
