#!/bin/bash
# One task of a job step, started by lib.sh: task.sh preflight | server [VLLM ARGUMENTS] | learner [RUN ARGUMENTS]
{ # read as a whole before it runs: editing this file does not affect running jobs
cd "$ROOT" || exit 3
# shellcheck source=slurm/lib.sh
source slurm/lib.sh
prepare_node # modules and limits come before anything else
role=$1; shift

own_gpus() { # FIRST COUNT: use COUNT of the step's GPUs; a step sees all GPUs of its node
	((GPUS_PER_NODE > 0)) || return 0
	[[ ${GRES:-1} != 0 ]] || unset CUDA_VISIBLE_DEVICES # Slurm did not set it: it comes from the submitting shell
	local all; IFS=, read -ra all <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS_PER_NODE - 1)))}"
	CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${all[*]:$1:$2}"); export CUDA_VISIBLE_DEVICES
}
limit_log() { # NAME: runs next to the task until this script ends
	((${LOG_MIB:=512} > 0)) || return 0
	bash slurm/rotate.sh "$ATTEMPT_DIR/$1.log" "$LOG_MIB" </dev/null >/dev/null 2>&1 &
	rotating=$!
}
requeue_orphan() { # with --no-kill, losing the node of the batch script leaves a job without one: requeue it from here
	local last='' now silent=0
	command -v scontrol >/dev/null || return
	while sleep 5; do
		now=$(stat -c %Y "$ATTEMPT_DIR/heartbeat" 2>/dev/null)
		if [[ $now == "$last" ]]; then silent=$((silent + 5)); else last=$now silent=0; fi
		((silent < ${ORPHAN_S:-120})) && continue
		event "server-$SLURM_PROCID" orphaned; scontrol requeue "$SLURM_JOB_ID"; silent=0
	done
}

private_interface() { # with the address by which this node and the first one reach each other; "" when that is unclear
	local address
	address=$(getent ahostsv4 "$MASTER_ADDR" | awk '{print $1; exit}')
	address=$(ip -o -4 route get "${address:-$MASTER_ADDR}" 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
	ip -o -4 addr show 2>/dev/null | awk -v a="$address" '{split($4, x, "/"); if (a != "" && x[1] == a) {print $2; exit}}'
}
private_network() { # gloo's ports have no authentication: bind them to one private interface; data goes by InfiniBand
	local interface=${GLOO_SOCKET_IFNAME:-$(private_interface)}
	[[ $role != server ]] || interface=${SERVER_INTERFACE:-$interface}
	[[ -z $interface || $interface == lo ]] || export GLOO_SOCKET_IFNAME=$interface
	[[ -z ${GLOO_SOCKET_IFNAME:-} ]] || export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$GLOO_SOCKET_IFNAME}
}
local_caches() { # for compiled Triton and torch code: on a shared file system hundreds of processes wait for each other
	local root=${CACHE_ROOT:-${TMPDIR:-/tmp}/gppo-cache-$(id -u)}
	export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/triton} VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$root/vllm}
	export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$root/inductor}
}
near_gpu() { # INDEX: NEAR becomes a taskset to the CPUs of this GPU's NUMA node, where both are known; NUMA_BIND=0: off
	NEAR=()
	local bus cpus all; IFS=, read -ra all <<<"${CUDA_VISIBLE_DEVICES:-}"
	[[ ${NUMA_BIND:-1} == 1 && -n ${all[$1]:-} ]] || return 0
	bus=$(nvidia-smi -i "${all[$1]}" --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null | head -n1)
	bus=${bus,,}
	cpus=$(cat "/sys/bus/pci/devices/${bus#0000}/local_cpulist" 2>/dev/null)
	[[ -z $cpus ]] || ! taskset -c "$cpus" true 2>/dev/null || NEAR=(taskset -c "$cpus")
}

profiler() { # RUN_ARGS: PROFILER becomes the command that records this rank (run.profile=nsys, run.profile_ranks)
	PROFILER=()
	[[ " $* " == *" run.profile=nsys "* ]] || return 0
	local word ranks=,0,
	for word in "$@"; do [[ $word != run.profile_ranks=* ]] || ranks=,${word//[^0-9,]/},; done
	[[ $ranks != *",$SLURM_PROCID,"* ]] || PROFILER=(nsys profile --capture-range=cudaProfilerApi
		--capture-range-end=repeat --trace="cuda,nvtx,osrt" --force-overwrite=true -o "$ATTEMPT_DIR/nsys-rank$SLURM_PROCID")
}

private_network; local_caches
trap : TERM USR1 USR2 # the program decides when to end, and its status must still be recorded
case $role in
	preflight) exec "${TASK_PY[@]}" -m recipes.cluster.preflight node "$ATTEMPT_DIR" ;;
	server)
		own_gpus $((FIRST_SERVER_GPU + SLURM_LOCALID * SERVER_GPUS)) "$SERVER_GPUS"
		near_gpu 0
		if ((SLURM_LOCALID == 0)); then requeue_orphan & watcher=$!; fi
		name=server-$SLURM_PROCID; limit_log "$name"; trap 'asked=1' TERM
		while :; do # a supervisor that is killed is started again
			"${NEAR[@]}" "${TASK_PY[@]}" -m recipes.cluster.serve "$ATTEMPT_DIR" --toward "$MASTER_ADDR" \
				--interface "${SERVER_INTERFACE:-}" --start-s "${SERVER_START_S:-1800}" \
				--hang-s "${SERVER_HANG_S:-300}" -- "$@"
			code=$?
			((code > 128)) && [[ -z ${asked:-} ]] || break
			event "$name" failed ", \"error\": \"the supervisor ended by signal $((code - 128))\""
			sleep 2
		done
		[[ -z ${watcher:-} ]] || kill "$watcher" 2>/dev/null ;;
	learner)
		own_gpus 0 "$RANKS_PER_NODE"
		# torch's record of collectives, written by NCCL's watchdog or when the heartbeat asks for it through the pipe
		mkdir -p "$ATTEMPT_DIR/flight"
		export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_FR_DUMP_TEMP_FILE=$ATTEMPT_DIR/flight/rank
		export TORCH_NCCL_DUMP_ON_TIMEOUT=1
		export TORCH_NCCL_DEBUG_INFO_PIPE_FILE=${TMPDIR:-/tmp}/gppo-$SLURM_JOB_ID-flight-
		export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
		near_gpu "$SLURM_LOCALID"
		name=learner-rank$SLURM_PROCID; limit_log "$name"
		profiler "$@"
		"${NEAR[@]}" "${PROFILER[@]}" "${TASK_PY[@]}" -m "$PROGRAM" "$@"
		code=$? ;;
esac
[[ -z ${rotating:-} ]] || kill "$rotating" 2>/dev/null
event "$name" ended ", \"code\": $code"
exit "$code"
}
