"""Load balance without an auxiliary loss (arXiv 2412.19437, section 2.1.2).

After an optimizer step, each expert's selection bias moves by a fixed speed: up if the expert saw fewer tokens than
the mean, down if more, not at all if just as many. Counts are integers over the whole global batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_selection_biases(model: nn.Module, counts: Mapping[str, Tensor], speed: float) -> None:
    """Moves the selection bias of every router in `counts` (int64 [experts] by router name), in place.

    Routers without a bias are left alone.
    """
    biases = dict(model.named_buffers())
    for name, load in counts.items():
        bias = biases.get(f"{name}.selection_bias")
        if bias is None or speed == 0.0:
            continue
        # mean - load, times the number of experts to stay in integers.
        shortage = load.sum() - load * load.numel()
        bias.add_(shortage.sign().to(bias.dtype), alpha=speed)
