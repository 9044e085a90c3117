"""Counts the floating-point operations of a step, as PaLM's appendix B does (Chowdhery et al. 2022).

Where we differ: the output head counts at targets only, since nowhere else are logits computed; attention
counts as causal attention within rows, half the square; and frozen weights need no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from trainer_svc.engine.bitsandbytes import num_weights
from trainer_svc.engine.examples import Example


@dataclass(frozen=True)
class FlopCounts:
    """A model's operations.

    Attributes:
        per_token: of the matrices that every token goes through.
        per_target: of the output head, which only predicted tokens need.
        per_pair: of attention, for each pair of a token and one that it sees.
    """

    per_token: float
    per_target: float
    per_pair: float

    @classmethod
    def of(cls, model: nn.Module, base: PreTrainedModel) -> FlopCounts:
        """Counts a model's operations, forward and backward.

        Args:
            model: with its adapters, if it has any.
            base: the transformers model within it.
        """
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        embeddings = {id(parameter) for parameter in embedding.parameters()}
        per_token = per_target = 0.0
        for parameter in model.parameters():
            if parameter.ndim < 2:
                continue
            # Two for the product, two for its input's gradient, two for its own.
            flops = num_weights(parameter) * (6.0 if parameter.requires_grad else 4.0)
            if id(parameter) in heads:
                per_target += flops
            elif id(parameter) not in embeddings:
                per_token += flops
        config = base.config
        # Two products, of a token's D numbers each, and twice that in the backward pass.
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(per_token, per_target, 3 * 2 * 2.0 * width * config.num_hidden_layers)

    def of_rows(self, rows: Sequence[Example]) -> float:
        """The operations of training on these rows once."""
        return sum(
            self.per_token * row.num_tokens
            + self.per_target * row.num_targets
            + self.per_pair * row.num_tokens * (row.num_tokens + 1) / 2
            for row in rows
        )
