"""Make training data: `python -m recipes.prepare_data path=FILE out=DIR [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.data.preparation import PrepareConfig
from recipes.data.prepare import prepare

HELP = """usage: python -m recipes.prepare_data path=FILE out=DIR [key=value ...]

Reads problems in any format of docs/data.md and writes out/train.jsonl, out/heldout.jsonl, out/stats.json and
out/README.md (a data card). Repeated problems and texts with two answers are dropped. The same input and settings give
the same bytes.

  path=FILE or [FILE,...]   files or directories
  out=DIR                   a new directory
  tokenizer=DIR max_prompt_tokens=1024 template='chat:{problem}'
                            measure prompts as the model will see them, and drop longer ones
  against=[FILE,...]        drop problems that share ngram=9 words with a benchmark (overlap=1 such run of words)
  rates=FILE min_rate=0.0625 max_rate=0.9375 unrated=drop
                            keep problems with a pass rate strictly between the two; FILE is a run's journal.jsonl, an
                            evaluation's completions, or rows with id and pass_rate
  heldout=500 seed=0        split off held-out problems by a hash of their text
  bad=drop                  leave out rows that are no problems, instead of stopping at the first"""


TEXTS = ("out", "tokenizer", "template", "rates", "unrated", "bad")  # taken as they are, braces and all


def main(argv: Sequence[str]) -> int:
    """Prepare data and print the counts; the exit status."""
    if {"-h", "--help"} & set(argv) or not argv:
        print(HELP)
        return 0
    try:
        outcome = prepare(parse(argv), lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{outcome.read} rows: {outcome.train} for training, {outcome.heldout} held out")
    for reason, number in outcome.dropped.items():
        print(f"  {number} dropped: {reason} (such as {outcome.examples[reason][0]})")
    return 0


def parse(argv: Sequence[str]) -> PrepareConfig:
    """Settings of a command line. Raises ValueError for unknown keys and wrong types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words: list[str] = []
    texts: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"argument {word!r} is not of the form key=value; --help lists the keys")
        if key in TEXTS:
            texts[key] = value.strip("'\"") if key != "template" else value
            continue
        listed = key in ("path", "against") and not value.startswith("[")
        words.append(f"{key}=[{value}]" if listed else word)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PrepareConfig), OmegaConf.from_dotlist(words), texts)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{str(error).splitlines()[0]}; --help lists the keys") from error
    assert isinstance(config, PrepareConfig)
    return config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
