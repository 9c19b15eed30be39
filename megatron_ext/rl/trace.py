"""What the updates of one step did to a few tokens, for the token view of the report.

Pure: torch only. W traced tokens; R response tokens of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.rl.types import LossInputs, LossOutputs


@dataclass(slots=True)
class TokenTrace:
    """Sums over updates for the tokens at the flat places ``tokens_W`` (int64, ascending) of a batch."""

    tokens_W: Tensor
    sums: Tensor = field(init=False)  # (5, W) float64: updates, below, above, ratio, gradient weight

    def __post_init__(self) -> None:
        self.sums = torch.zeros(5, len(self.tokens_W), dtype=torch.float64)

    def add(self, flat_R: Tensor, inputs: LossInputs, factor_R: Tensor, outputs: LossOutputs) -> None:
        """Count an update of the tokens at ``flat_R`` that are traced and in the loss's mask.

        ``factor_R``: of the policy loss in the objective, as token selection says; 0 or False switches it off.
        """
        if not len(self.tokens_W):
            return
        slot_R = torch.searchsorted(self.tokens_W, flat_R).clamp(max=len(self.tokens_W) - 1)
        found = (self.tokens_W[slot_R] == flat_R).nonzero()[:, 0]
        if not len(found):
            return

        def at(values_R: Tensor) -> Tensor:
            return values_R.detach()[found.to(values_R.device)].cpu().double()

        advantages, gradient, mask = at(inputs.advantages), at(outputs.gradient), at(inputs.mask)
        weight = torch.where(advantages == 0, 0.0, gradient / advantages) * at(factor_R)
        ratio = (at(inputs.logp) - at(inputs.old_logp)).exp()
        rows = torch.stack([mask, at(outputs.below), at(outputs.above), torch.where(mask > 0, ratio, 0.0), weight])
        self.sums.index_add_(1, slot_R[found], rows)

    def of(self, start: int, end: int) -> dict[str, list[float]] | None:
        """Means over updates of the traced tokens in flat places [start, end), in order. None if there are none.

        ``ratio``: importance ratio. ``clip_side``: share of updates above minus share below the loss's interval, in
        [-1, 1]. ``gradient_weight``: F of d(-loss)/d logp = F A; 0 where clipping or selection stops the gradient.
        None too when a number is not finite.
        """
        low, high = torch.searchsorted(self.tokens_W, torch.tensor([start, end])).tolist()
        updates, below, above, ratio, weight = self.sums[:, low:high]
        if not len(updates) or not bool(updates.any()) or not bool(torch.isfinite(self.sums[:, low:high]).all()):
            return None
        updates = updates.clamp(min=1)
        means = {"ratio": ratio, "clip_side": above - below, "gradient_weight": weight}
        return {name: [round(value, 3) for value in (sums / updates).tolist()] for name, sums in means.items()}
