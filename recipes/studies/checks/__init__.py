"""Every theorem, corollary and approximation of the papers as a numerical check.

Float64, tabular softmax, random policies drawn from fixed seeds. Three kinds:

* first order: take a step along a direction and compare the change of entropy with the predicted slope. If the claim is
  right, the error is O(eta^2), so halving eta quarters it (order 2). If it is wrong, the error is O(eta) (order 1).
* identity: two sides must be equal up to rounding.
* share: how often a rule of thumb or a condition holds.

Each check states its expected verdict, so a result can contradict it.
"""

from __future__ import annotations

from recipes.studies.checks import ce_gppo, clip_low_high, entropy_dynamics, flexible_entropy, own_weights

CHECKS = [
    *flexible_entropy.CHECKS,
    *ce_gppo.CHECKS,
    *clip_low_high.CHECKS,
    *entropy_dynamics.CHECKS,
    *own_weights.CHECKS,
]
