"""Every theorem, corollary and approximation of the papers as a check that takes the step and measures.

Float64, tabular softmax, random policies drawn from fixed seeds. Three kinds:

* first order: a step is taken along a direction, the change of entropy is compared with the predicted slope. Right: the
  error is O(eta^2), so halving eta quarters it (order 2). Wrong: the error is O(eta) (order 1).
* identity: two sides that must be equal, to rounding.
* share: how often a rule of thumb or a condition holds.

Each check names what must come out, so that a result can contradict it.
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
