"""Estimators of accuracy from n samples per problem: avg@k, pass@k and their uncertainty. Pure, but for the command:

`python -m recipes.evaluate model.path=DIR [data.name=jsonl data.path=FILE reward.name=math] [eval.n=8 eval.k=[1,8]]`
evaluates a Hugging Face directory on held-out problems with the same engine, prompts and verifier as training.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Print the estimates as a table, then as one JSON line."""
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from recipes.checks.settings import load_checked
    from recipes.loop.collect import Collector
    from recipes.models.locate import model_location, prepare_model

    try:
        config = load_checked(argv)
        model_dir = model_location(config)
        prepare_model(config, model_dir)
        with tempfile.TemporaryDirectory() as logs:
            collector = Collector(config, model_dir, Path(logs))
            try:
                collector.serve(model_dir)
                metrics = collector.evaluate(0)["metrics"]
            finally:
                collector.close()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{model_dir.name}: {config.eval.problems} problems, {config.eval.n} samples each")
    for column in ("metric", "mean", "95 % interval over problems"):
        table.add_column(column)
    for name in (key for key in metrics if not key.endswith(("/low", "/high"))):
        table.add_row(name, f"{metrics[name]:.3f}", f"{metrics[name + '/low']:.3f} - {metrics[name + '/high']:.3f}")
    Console().print(table)
    print(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
