"""Draw every loss from its own code into docs/atlas.md: `python -m recipes.atlas`, `make atlas`.

The gradient weight F over the ratio and over (p_old, p_new), the bounds of dynamic clipping, the closed loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.studies import figures
from recipes.studies.portraits import PORTRAITS, bounds, controller, portrait

HEAD = """# Atlas of the losses

Drawn from the code by `make atlas`. F is the gradient weight of a token: the step goes along F · A · ∇logp. Left: F
over the ratio r = p_new / p_old, solid for rewarded, dashed for penalised tokens, black for an unlikely and grey for a
likely token. Middle and right: F over (p_old, p_new) for rewarded and penalised tokens, black where the token has no
gradient; the line is r = 1.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.atlas", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="where atlas.md and figures/atlas go; default: %(default)s"
    )
    args = parser.parse_args(argv)
    folder, parts = args.out / "figures" / "atlas", [HEAD]
    for name, of in PORTRAITS.items():
        figures.save(portrait(of), folder / f"{name}.png", dpi=80)
        parts.append(f"## {of.title}\n\n{of.look}\n\n![{of.title}](figures/atlas/{name}.png)\n")
    figures.save(bounds(), folder / "bounds.png", dpi=80)
    parts.append(
        "## Dynamic bounds\n\nThe offsets over p, and over training for a likely and an unlikely token: ID relaxes the "
        "upper bound first and tightens the lower one later, DID starts from the constant, OD switches.\n\n"
        "![Bounds of dynamic clipping](figures/atlas/bounds.png)\n"
    )
    figures.save(controller(), folder / "controller.png", dpi=80)
    parts.append(
        "## The closed loop\n\nThe parameters move linearly with the error and stop at their limits.\n\n"
        "![Closed loop on entropy](figures/atlas/controller.png)\n"
    )
    (args.out / "atlas.md").write_text("\n".join(parts), encoding="utf-8")
    print(args.out / "atlas.md")


if __name__ == "__main__":
    main()
