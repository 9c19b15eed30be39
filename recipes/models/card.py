"""Facts of a run for the model card. They contain names only, no paths, because a card is published."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from configs.schema import Config
from recipes.models.locate import model_location

_ABSOLUTE = re.compile(r"(?<![\w.~/-])(?:/[^\s,'\"\]/]+)*/([^\s,'\"\]/]+)")
COMMAND = "command.txt"  # in the directory of a run: how it was started last


def export_card(config: Config, step: int, run_dir: Path) -> dict[str, Any]:
    """The facts of a run for `conversion.megatron_to_hf`'s card, the same for every export of it."""
    saved = run_dir / COMMAND
    parts = [("loss", config.loss), ("selection", config.selection), ("schedule", config.schedule)]
    chosen = [f"{what} {group['name']}" for what, group in parts if group.get("name") not in (None, "none", "constant")]
    return {
        "base_model": model_location(config).name,
        "recipe": config.run.name,
        "method": ", ".join([*chosen, f"advantages {config.advantage.name}"]),
        "step": step,
        "data": Path(config.data.path).name if config.data.path else config.data.name,
        "command": saved.read_text(encoding="utf-8").strip() if saved.is_file() else None,
    }


def save_command(run_dir: Path) -> None:
    """Save the command line of this process."""
    words = ["python", "-m", "recipes.train", *map(_without_directories, sys.argv[1:])]
    (run_dir / COMMAND).write_text(shlex.join(words) + "\n", encoding="utf-8")


def _without_directories(word: str) -> str:
    """`key=/a/b/c` becomes `key=c`: an absolute path describes a machine, not a model."""
    return _ABSOLUTE.sub(r"\1", word)
