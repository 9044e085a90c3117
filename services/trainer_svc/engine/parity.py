"""The last check of a run: what was stored, loaded afresh, says what the trained model says.

Catches what no loss shows: a weight that was not written, written under another name or in a wrong format,
bytes damaged on their way to the store and back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer_svc.engine.adapters import load_adapters
from trainer_svc.engine.base_model import load_base_model
from trainer_svc.engine.device import is_out_of_memory
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.run_spec import MERGED_DIR, LoraMethod, RunSpec
from trainer_svc.engine.setup import Workload

# Largest relative difference of logits that is taken for rounding, by the coarsest number format on the way
# (the products', or the stored weights'). A lost adapter or a wrong layer shows as far more.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-2}

_NUM_ROWS = 4
_ROW_TOKENS = 128
_POLL_SECONDS = 0.1


class ParityError(RuntimeError):
    """The stored model is not the trained one."""


@dataclass(frozen=True)
class Reference:
    """What the trained model says.

    Attributes:
        rows: the first tokens of a few of the training rows, int64 [S] each.
        logits: for each row, float32 [S, V] on the CPU.
    """

    rows: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]

    @property
    def is_sound(self) -> bool:
        """Whether each row's logits are finite and differ: else training has diverged."""
        return all(0 < _spread(logits_SV) < math.inf for logits_SV in self.logits)


def reference_of(workload: Workload, group: ProcessGroup) -> Reference:
    """Has the trained model compute a few rows. Every process must call it where weights are sharded."""
    # Whatever the targets: all that was trained shows in any token's logits.
    rows = tuple(row.input_ids[:_ROW_TOKENS] for row in workload.training.examples[:_NUM_ROWS])
    return Reference(rows, _logits(workload.model, rows, workload.dtype, group.device, workload.packs_rows))


def wait_for(folder: Path) -> None:
    """Returns once a folder is there. Whoever runs the engine makes it, or ends the run."""
    while not folder.exists():
        time.sleep(_POLL_SECONDS)


def check_parity(
    folder: Path, reference: Reference, spec: RunSpec, workload: Workload, device: torch.device
) -> float:
    """Loads an artifact as its users will and holds its logits against the trained model's.

    Args:
        folder: the artifact: an adapter, a merged model in it where there is one, or a whole model.
        reference: from the trained model.
        spec: the run's; the base model is loaded anew from it.
        workload: for the number formats only.
        device: where to compute.

    Returns:
        The largest relative difference of a row's logits: the norm of the difference by the norm of the
        reference about its mean.

    Raises:
        ParityError: the difference is above `TOLERANCE`, or the artifact can't be loaded.
    """
    stored: list[tuple[Path, Path | None]] = [(folder, None)]
    if isinstance(spec.method, LoraMethod):
        stored = [(spec.base_model_dir, folder)]
        if spec.extras.save_merged:
            stored.append((folder / MERGED_DIR, None))
    return max(_difference(*each, reference, spec, workload, device) for each in stored)


def _difference(
    model_dir: Path,
    adapter_dir: Path | None,
    reference: Reference,
    spec: RunSpec,
    workload: Workload,
    device: torch.device,
) -> float:
    # transformers' own attention: the engine's must not vouch for itself.
    plain = spec.extras.model_copy(update={"packing": False, "attention": "sdpa"})
    weights_dtype = workload.stored_dtype if adapter_dir is None else workload.dtype
    try:
        model = load_base_model(model_dir, weights_dtype, device, plain).model
        adapted = model if adapter_dir is None else load_adapters(model, adapter_dir)
        logits = _logits(adapted, reference.rows, workload.dtype, device, packs_rows=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ParityError(f"the stored model can't be loaded: {error}") from error
    difference = max(
        _relative_difference(ours, theirs) for ours, theirs in zip(logits, reference.logits, strict=True)
    )
    coarsest = max((workload.dtype, weights_dtype), key=lambda dtype: TOLERANCE[dtype])
    # Not `difference > tolerance`: a NaN is no parity.
    if not difference <= TOLERANCE[coarsest]:
        name = "merged model" if model_dir.name == MERGED_DIR else "model"
        raise ParityError(
            f"the stored {name} is not the trained one: their logits differ by {difference:.2g}, "
            f"and {TOLERANCE[coarsest]:g} is allowed for rounding"
        )
    return difference


def _logits(
    model: torch.nn.Module,
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    packs_rows: bool,
) -> tuple[Tensor, ...]:
    model.eval()
    found = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for row_S in rows:
            ids_1S = row_S.unsqueeze(0).to(device)
            positions_1S = torch.arange(len(row_S), device=device).unsqueeze(0)
            segments = {"segment_lengths": (len(row_S),)} if packs_rows else {}
            logits_1SV = model(
                input_ids=ids_1S, position_ids=positions_1S, use_cache=False, **segments
            ).logits
            found.append(logits_1SV.squeeze(0).float().cpu())
    return tuple(found)


def _relative_difference(ours_SV: Tensor, theirs_SV: Tensor) -> float:
    return float((ours_SV - theirs_SV).norm()) / _spread(theirs_SV)


def _spread(logits_SV: Tensor) -> float:
    return float((logits_SV - logits_SV.mean()).norm())
