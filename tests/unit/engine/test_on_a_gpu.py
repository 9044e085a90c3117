"""What a GPU is asked to compute, on tensors without data: torch checks their shapes and number formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.engine.test_layers import CONFIGS, inner_model, make_model
from trainer_svc.engine.layers import projection, segment_attention
from trainer_svc.engine.layers.elementwise import PLAIN
from trainer_svc.engine.layers.fast_layer import FastLayer, Rows
from trainer_svc.engine.layers.segment_attention import Segments

# Where torch is built for the CPU alone, it takes no part of a GPU's tensor, not even of one without data.
DEVICE = torch.device("cpu")
NUM_TOKENS = 96


def drop_data(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_modules", [None, ["q_proj", "v_proj", "up_proj"]])
@pytest.mark.parametrize("last", [False, True])
def test_a_layer_forward_and_backward(
    weights_dtype: torch.dtype, target_modules: list[str] | None, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_attention, "uses_flash", lambda _device, _dtype: True)
    # Tensors without data have no place in memory to compare.
    monkeypatch.setattr(
        projection, "_stack", lambda matrices, dtype: torch.cat([matrix.to(dtype) for matrix in matrices])
    )
    method = None if target_modules is None else {"target_modules": target_modules}
    model = make_model(CONFIGS["qwen3"], method)
    for parameter in model.parameters():
        if method is None or not parameter.requires_grad:  # adapters are float32
            parameter.data = parameter.data.to(weights_dtype)
    with FakeTensorMode():
        drop_data(model)
        layer = FastLayer(inner_model(model).model.layers[0], torch.bfloat16, PLAIN)
        x_SD = torch.empty(NUM_TOKENS, 64, dtype=torch.bfloat16)
        angle_S1E = torch.empty(NUM_TOKENS, 1, 32, dtype=torch.bfloat16)
        outputs_T = torch.zeros(32, dtype=torch.int64) if last else None
        rows = Rows(Segments.of((40, 50, 6), DEVICE, torch.bfloat16), angle_S1E, angle_S1E, outputs_T)
        with torch.no_grad():
            parameters = layer.parameters()
            needs = [parameter.requires_grad for parameter in parameters]
            out, kept = layer.forward(x_SD, parameters, rows, keep=True)
            grad_x, gradients = layer.backward(out, kept, parameters, needs, rows, needs_input=True)

    def described(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        return tensor.dtype, tuple(tensor.shape)

    assert described(out) == (torch.bfloat16, (32 if last else NUM_TOKENS, 64))
    assert grad_x is not None
    assert described(grad_x) == (torch.bfloat16, (NUM_TOKENS, 64))
    for parameter, gradient, learns in zip(parameters, gradients, needs, strict=True):
        if learns:
            assert gradient is not None
            assert described(gradient) == (torch.float32, tuple(parameter.shape))
        else:
            assert gradient is None
