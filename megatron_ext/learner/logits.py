"""Compare the float32 logits of two checkpoints of either kind: `python -m megatron_ext.learner.logits A B`.

A Hugging Face directory is run by transformers, a Megatron checkpoint by the learner's model. `conversion.verify` runs
this command in a process of its own, because conversion itself needs neither. Status 1 when the difference is above the
tolerance or is not a number.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from configs.schema import ModelConfig, OptimConfig, ParallelConfig
from conversion import cli
from conversion.mapping import megatron_shape
from conversion.sharding import shard
from conversion.sources import HFSource, MegatronSource, Source, open_source
from megatron_ext.learner import model as learner
from megatron_ext.learner.attention import packed_sequences
from megatron_ext.learner.weights import named_weights

LENGTHS = (7, 1, 15)


def fixed_prompts(vocab_size: int) -> list[Tensor]:
    """Token ids of three sequences, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]


def logits(source: Source) -> Tensor:
    """(tokens, vocabulary) logits of all `fixed_prompts`, one sequence after the other."""
    prompts = fixed_prompts(source.hf.vocab_size)
    with torch.inference_mode():
        return _from_megatron(source, prompts) if isinstance(source, MegatronSource) else _from_hf(source, prompts)


def _from_hf(source: Source, prompts: list[Tensor]) -> Tensor:
    assert isinstance(source, HFSource)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    return torch.cat([model.eval()(row[None]).logits[0] for row in prompts])


def _from_megatron(source: MegatronSource, prompts: list[Tensor]) -> Tensor:
    parallel, hf = ParallelConfig(), source.hf
    with learner.distributed(parallel, seed=0), learner.on_device():
        with torch.inference_mode(False), torch.enable_grad():  # Megatron's wrapper registers hooks on gradients
            chunks = learner.build_chunks(hf, parallel, ModelConfig(dtype="float32"), optim=OptimConfig())
        device = learner.device()
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in named_weights(chunks).items():
                parameter.copy_(shard(name, source.rows(name, 0, megatron_shape(hf, name)[0]), 0, 1))
            bounds = torch.tensor([0, *(len(row) for row in prompts)]).cumsum(0).to(torch.int32)
            output = chunks[0].eval()(
                input_ids=torch.cat(prompts)[None].to(device),
                position_ids=torch.cat([torch.arange(len(row)) for row in prompts])[None].to(device),
                attention_mask=None,
                packed_seq_params=packed_sequences(bounds.to(device), max(len(row) for row in prompts)),
            )
        return output[0, :, : hf.vocab_size].float().cpu()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_ext.learner.logits", description=(__doc__ or "").strip())
    parser.add_argument("a", help="Hugging Face or Megatron directory")
    parser.add_argument("b", help="directory to compare it with")
    parser.add_argument("--hf-config", metavar="DIR", help="config.json for Megatron checkpoints that have none")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (%(default)s)")
    args = parser.parse_args()
    ours, theirs = (logits(open_source(path, args.hf_config)) for path in (args.a, args.b))
    worst = (ours - theirs).abs().max().item()
    print(f"logits: largest difference {worst:.2e} (largest logit {ours.abs().max().item():.2e})")
    return int(not worst <= args.tolerance)  # a NaN is not below any tolerance


if __name__ == "__main__":
    cli.run(main)
