"""Matrices that read the same input, as one product, with their adapters.

Shapes: S tokens of a pack, I inputs, O outputs of all matrices together, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from trainer_svc.engine.layers.packed_weight import PackedWeight, can_be_packed


@dataclass(frozen=True)
class Weights:
    """A projection's weights for one pass, in the format of the products.

    Attributes:
        weight_OI: the matrices, one below the other.
        bias_O: None if the matrices have none.
        down_RI: the adapters' first matrices, one below the other; None without adapters.
        up: the adapters' second matrices times their scale, each [its outputs, its rank].
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    down_RI: Tensor | None
    up: tuple[Tensor, ...]


class Projection:
    """Some linear layers over one input.

    Its parameters are passed in with every call rather than read from the modules, so that autograd and
    FSDP see them. Their order: each module's weight, each module's bias, then each adapter's two matrices.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Takes the modules as they are; `is_covered` must hold for each."""
        self._modules = tuple(modules)
        bases = [_base(module) for module in modules]
        biased = [base.bias is not None for base in bases]
        assert all(biased) or not any(biased)
        self._has_bias = biased[0]
        self._outputs = _ranges([base.out_features for base in bases])
        adapted = [(i, module) for i, module in enumerate(modules) if isinstance(module, LoraLinear)]
        self._adapted_outputs = [self._outputs[index] for index, _ in adapted]
        self._ranks = _ranges([module.r[_adapter(module)] for _, module in adapted])
        self._packed: PackedWeight | None = None
        self._scales = [float(module.scaling[_adapter(module)]) for _, module in adapted]

    @staticmethod
    def is_covered(module: nn.Module) -> bool:
        """Whether the module is a plain linear layer, with or without one plain adapter of peft's on it."""
        if type(module) is nn.Linear:
            return module.weight.is_floating_point()
        return (
            type(module) is LoraLinear
            and type(module.base_layer) is nn.Linear
            and len(module.active_adapters) == 1
            and _adapter(module) in module.lora_A
            and _adapter(module) not in module.lora_variant  # DoRA and others
            and not module.lora_bias[_adapter(module)]
            and isinstance(module.lora_dropout[_adapter(module)], nn.Identity)
            and not module.merged
            and not module.disable_adapters
        )

    def parameters(self) -> Iterator[Tensor]:
        bases = [_base(module) for module in self._modules]
        yield from (base.weight for base in bases)
        if self._has_bias:
            yield from (base.bias for base in bases)
        for module in self._modules:
            if isinstance(module, LoraLinear):
                assert not module.merged
                assert not module.disable_adapters
                yield from _adapter_matrices(module)

    @property
    def num_parameters(self) -> int:
        return len(self._outputs) * (1 + self._has_bias) + 2 * len(self._ranks)

    def lay_out(self, dtype: torch.dtype) -> None:
        """Lays frozen weights one below the other in memory, so that `weights` has nothing to copy.

        The parameters stay what they are and hold the same numbers; they become parts of one tensor.
        """
        parameters = [_base(module).weight for module in self._modules]
        if len(parameters) == 1 or any(p.requires_grad or p.dtype != dtype for p in parameters):
            return
        together = torch.cat([parameter.data for parameter in parameters])
        for parameter, (start, end) in zip(parameters, self._outputs, strict=True):
            parameter.data = together[start:end]

    def pack(self) -> None:
        """Packs the matrices, if they can be packed. From then on they must not change."""
        matrices = [_base(module).weight for module in self._modules]
        if all(can_be_packed(matrix) for matrix in matrices):
            self._packed = PackedWeight(_stack(matrices, matrices[0].dtype).detach())

    def weights(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Weights:
        """The parameters' values as the products need them.

        Args:
            parameters: the values of `parameters()`, in its order.
            dtype: of the products.
        """
        matrices, biases, downs, ups = self._parts(parameters)
        return Weights(
            weight_OI=_stack(matrices, dtype),
            bias_O=torch.cat([bias.to(dtype) for bias in biases]) if biases else None,
            down_RI=torch.cat([down.to(dtype) for down in downs]) if downs else None,
            up=tuple((up * scale).to(dtype) for up, scale in zip(ups, self._scales, strict=True)),
        )

    def _parts(self, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        count = len(self._outputs)
        first_adapter = count * (1 + self._has_bias)
        adapters = parameters[first_adapter:]
        return parameters[:count], parameters[count:first_adapter], adapters[::2], adapters[1::2]

    def apply(
        self, x_SI: Tensor, weights: Weights, residual_SO: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The product, plus `residual_SO`.

        Returns:
            [S, O], and the input times the adapters' first matrices, [S, R], which `backward` needs; None
            without adapters.
        """
        if self._packed is not None:
            out_SO = self._packed.times(x_SI, residual_SO)
        elif residual_SO is not None:
            out_SO = torch.addmm(residual_SO, x_SI, weights.weight_OI.t())
        else:
            out_SO = torch.mm(x_SI, weights.weight_OI.t())
        if weights.bias_O is not None:
            out_SO += weights.bias_O
        if weights.down_RI is None:
            return out_SO, None
        low_SR = torch.mm(x_SI, weights.down_RI.t())
        for up, (start, end), (first, last) in self._adapters(weights):
            out_SO[:, start:end].addmm_(low_SR[:, first:last], up.t())
        return out_SO, low_SR

    def backward(
        self,
        grad_SO: Tensor,
        x_SI: Tensor | None,
        low_SR: Tensor | None,
        weights: Weights,
        *,
        needs: Sequence[bool],
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients by the input and by each parameter.

        Args:
            grad_SO: of the product.
            x_SI: the input; may be None if `uses_input(needs)` is false.
            low_SR: as `apply` returned it.
            weights: those of `apply`.
            needs: for each parameter whether it learns.
            needs_input: whether the input's gradient is asked for.

        Returns:
            [S, I] or None; float32 gradients in the parameters' order, None for those that don't learn.
        """
        grad_low_SR = None
        if low_SR is not None:
            grad_low_SR = torch.empty_like(low_SR)
            for up, (start, end), (first, last) in self._adapters(weights):
                torch.mm(grad_SO[:, start:end], up, out=grad_low_SR[:, first:last])
        grad_SI = None
        if needs_input:
            if self._packed is not None:
                grad_SI = self._packed.input_gradient(grad_SO)
            else:
                grad_SI = torch.mm(grad_SO, weights.weight_OI)
            if grad_low_SR is not None:
                assert weights.down_RI is not None
                grad_SI.addmm_(grad_low_SR, weights.down_RI)
        count = len(self._outputs)
        gradients: list[Tensor | None] = [None] * len(needs)
        if any(needs[:count]):
            assert x_SI is not None
            grad_OI = torch.mm(grad_SO.t(), x_SI)
            for index, (start, end) in enumerate(self._outputs):
                gradients[index] = grad_OI[start:end].float() if needs[index] else None
        if self._has_bias and any(needs[count : 2 * count]):
            grad_O = grad_SO.sum(0, dtype=torch.float32)
            for index, (start, end) in enumerate(self._outputs):
                gradients[count + index] = grad_O[start:end] if needs[count + index] else None
        if low_SR is not None and any(needs[-2 * len(self._ranks) :]):
            assert x_SI is not None
            assert grad_low_SR is not None
            gradients[-2 * len(self._ranks) :] = self._adapter_gradients(grad_SO, x_SI, low_SR, grad_low_SR)
        return grad_SI, gradients

    def uses_input(self, needs: Sequence[bool]) -> bool:
        """Whether `backward` reads the input: matrices learn, or adapters do."""
        count = len(self._outputs)
        return any(needs[:count]) or any(needs[count * (1 + self._has_bias) :])

    def _adapter_gradients(
        self, grad_SO: Tensor, x_SI: Tensor, low_SR: Tensor, grad_low_SR: Tensor
    ) -> Iterator[Tensor]:
        grad_down_RI = torch.mm(grad_low_SR.t(), x_SI)
        for (start, end), (first, last), scale in zip(
            self._adapted_outputs, self._ranks, self._scales, strict=True
        ):
            yield grad_down_RI[first:last].float()
            yield torch.mm(grad_SO[:, start:end].t(), low_SR[:, first:last]).float().mul_(scale)

    def _adapters(self, weights: Weights) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
        return zip(weights.up, self._adapted_outputs, self._ranks, strict=True)


def _base(module: nn.Module) -> nn.Linear:
    base = module.base_layer if isinstance(module, LoraLinear) else module
    assert isinstance(base, nn.Linear)
    return base


def _adapter_matrices(module: LoraLinear) -> tuple[Tensor, Tensor]:
    down, up = module.lora_A[_adapter(module)].weight, module.lora_B[_adapter(module)].weight
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    return down, up


def _adapter(module: LoraLinear) -> str:
    name = module.active_adapters[0]
    assert isinstance(name, str)
    return name


def _ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ranges, start = [], 0
    for size in sizes:
        ranges.append((start, start + size))
        start += size
    return ranges


def _stack(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrices one below the other; without a copy if they lie so in memory."""
    first = matrices[0]
    if all(matrix.dtype == dtype for matrix in matrices):
        if len(matrices) == 1:
            return first
        end = first.data_ptr()
        for matrix in matrices:
            if matrix.data_ptr() != end or not matrix.is_contiguous():
                break
            end += matrix.numel() * matrix.element_size()
        else:
            num_rows = sum(matrix.shape[0] for matrix in matrices)
            if first.untyped_storage().nbytes() >= end - first.untyped_storage().data_ptr():
                return first.as_strided((num_rows, first.shape[1]), (first.shape[1], 1))
    return torch.cat([matrix.to(dtype) for matrix in matrices])
