# shellcheck shell=bash
# sbatch hands on the environment of its caller. From inside another job (salloc, an interactive srun) that includes the
# other job's SLURM_* variables, and srun reads many of them as options: a binding to cores that this job does not
# have, memory per CPU beside --mem, GPUs on a CPU node. Sourced by lib.sh before site.env, which may set some.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_@}" "${!SLURM_HET_@}" "${!SLURM_NTASKS_PER_@}" \
	SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_CORE_SPEC SLURM_DISTRIBUTION SLURM_DIST_PLANESIZE SLURM_EXACT \
	SLURM_EXCLUSIVE SLURM_EXPORT_ENV SLURM_GPU_BIND SLURM_GPUS SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK SLURM_GRES \
	SLURM_GRES_FLAGS SLURM_HINT SLURM_HOSTFILE SLURM_IMMEDIATE SLURM_KILL_BAD_EXIT SLURM_LABELIO SLURM_NO_KILL \
	SLURM_OPEN_MODE SLURM_OVERCOMMIT SLURM_STDERRMODE SLURM_STDINMODE SLURM_STDOUTMODE SLURM_STEP_GRES \
	SLURM_THREAD_SPEC SLURM_THREADS SLURM_THREADS_PER_CORE SLURM_TIMELIMIT SLURM_TRES_PER_TASK SLURM_WAIT \
	SLURM_WORKING_DIR
if [[ -n ${DRY_RUN:-} ]]; then # no job at all
	for name in "${!SLURM_@}"; do [[ $name == SLURM_CONF ]] || unset "$name"; done
fi
