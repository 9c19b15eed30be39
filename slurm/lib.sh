# shellcheck shell=bash
# Code that all templates share: source this, set the variables below, `main "$@"`. slurm/README.md has the picture.
#
#   RECIPE, ARGS         the run; arguments of sbatch come after ARGS, and recipe=NAME there replaces both
#   LEARNER_NODES        nodes with learner ranks, the first ones of the allocation
#   ROLLOUT_NODES        nodes with vLLM servers; 0: servers share the learner's nodes
#   GPUS_PER_NODE        0: CPU nodes
#   RANKS_PER_NODE       learner ranks (one GPU each) on a learner node
#   SERVERS_PER_NODE     servers, of SERVER_GPUS each, on a rollout node (or on the ranks' node, on its next GPUs)
#   VLLM_ARGS            array: further arguments of vLLM
#   PROGRAM              module that the learner's ranks run; default recipes.train
#   GRES                 0: the site has no GPU GRES (site.env)
#   STOP_GRACE_S         seconds to wait for a step boundary once the time limit is near; less than the lead of --signal

set -uo pipefail
# shellcheck source=slurm/inherited.sh
source "${BASH_SOURCE[0]%/*}/inherited.sh"
ROOT=${SLURM_SUBMIT_DIR:-$PWD}
refuse() { echo "error: $*" >&2; exit 2; }
[[ -f $ROOT/slurm/lib.sh ]] || refuse "submit from the repository's root directory"; cd "$ROOT" || exit 2
RUNTIME=venv PYTHON=$ROOT/.venv/bin/python IMAGE='' MOUNTS='' # site.env may change these
ARGS=() VLLM_ARGS=() PROGRAM=${PROGRAM:-recipes.train}
# shellcheck disable=SC2329 # site.env may have its own
prepare_node() { :; }
SITE_ENV=${SITE_ENV:-slurm/site.env}; [[ -f $SITE_ENV ]] || SITE_ENV=slurm/site.env.example
# shellcheck source=slurm/site.env.example
source "$SITE_ENV"
ulimit -Sc "${CORE_KB:-0}"; ulimit -Sn "$(ulimit -Hn)" # a core dump of a learner is as large as its memory
export ROOT SITE_ENV OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --- how Python starts: HOST_PY in the batch script, TASK_PY within srun, PYXIS for srun itself ----------------------
PYXIS=()
# shellcheck disable=SC2034 # TASK_PY is task.sh's
case $RUNTIME in
	venv) HOST_PY=("$PYTHON") TASK_PY=("$PYTHON") ;;
	apptainer)
		HOST_PY=(apptainer exec --nv --pwd "$ROOT" --bind "$ROOT${MOUNTS:+,$MOUNTS}" "$IMAGE" python)
		TASK_PY=("${HOST_PY[@]}") ;;
	pyxis)
		PYXIS=("--container-image=$IMAGE" "--container-mounts=$ROOT:$ROOT${MOUNTS:+,$MOUNTS}" "--container-workdir=$ROOT")
		HOST_PY=(srun --overlap --mem=0 -N1 -n1 -r0 "${PYXIS[@]}" python) TASK_PY=(python) ;;
	*) refuse "RUNTIME=$RUNTIME in $SITE_ENV: choose venv, apptainer or pyxis" ;;
esac

say() { echo "[job $(date +%H:%M:%S)] $*"; }
event() { # ROLE NAME [, "key": value ...]: a line that recipes.status reads
	printf '{"time": %s, "event": "%s"%s}\n' "$(date +%s.%3N)" "$2" "${3:-}" >>"$ATTEMPT_DIR/$1.events.jsonl"
}
step() { # NAME NODES FIRST_NODE TASKS_PER_NODE [SRUN OPTIONS] -- ROLE ARGUMENTS: a job step of slurm/task.sh
	local name=$1 nodes=$2 first=$3 tasks=$4 cpus=$((${SLURM_CPUS_ON_NODE:-64} / $4)) options=()
	shift 4
	while [[ $1 != -- ]]; do options+=("$1"); shift; done
	shift
	[[ ${TASK_PLUGIN:=$(scontrol show config 2>/dev/null | sed -n 's/^TaskPlugin *= *//p')} == task/none ]] ||
		options+=(--cpu-bind=none)
	# --overlap and --mem=0: steps share their nodes; task.sh divides the GPUs. --cpu-bind=none: threads place themselves
	# (where Slurm binds nothing, TaskPlugin=task/none, srun warns of the option in each step).
	local command=(srun --job-name="$name" --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks"
		--relative="$first" --overlap --mem=0 --cpus-per-task=$((cpus > 0 ? cpus : 1))
		"${options[@]}" "${PYXIS[@]}" bash "$ROOT/slurm/task.sh" "$@")
	if [[ -n ${DRY_RUN:-} ]]; then printf '  '; printf '%q ' "${command[@]}"; echo; else exec "${command[@]}"; fi
}

# --- arithmetic -------------------------------------------------------------------------------------------------------
layout() { # RUN_ARGS, RANKS, SERVERS from the template's variables and sbatch's arguments
	: "${ROLLOUT_NODES:=0}" "${GPUS_PER_NODE:=8}" "${SERVER_GPUS:=1}"
	local gpus=$GPUS_PER_NODE shared=$((ROLLOUT_NODES == 0)) taken
	: "${RANKS_PER_NODE:=$((gpus == 0 ? 1 : shared ? gpus / 2 : gpus))}"
	taken=$((shared && gpus ? RANKS_PER_NODE : 0))
	[[ $PROGRAM == recipes.train ]] || taken=0 # only the learner computes on GPUs
	: "${SERVERS_PER_NODE:=$((gpus == 0 ? 1 : (gpus - taken) / SERVER_GPUS))}"
	export PROGRAM GPUS_PER_NODE SERVER_GPUS RANKS_PER_NODE FIRST_SERVER_GPU=$taken
	((gpus > 0)) && [[ ${GRES:-1} != 0 ]] || unset SLURM_GPUS_PER_NODE # of an outer job
	NODES=$((LEARNER_NODES + ROLLOUT_NODES)) RANKS=$((LEARNER_NODES * RANKS_PER_NODE))
	SERVER_NODES=$((shared ? LEARNER_NODES : ROLLOUT_NODES))
	SERVERS=$((SERVER_NODES * SERVERS_PER_NODE))
	NODE_COUNTS=(env "SERVER_NODES=$SERVER_NODES" "ROLLOUT_NODES=$ROLLOUT_NODES" "GPUS_PER_NODE=$GPUS_PER_NODE")
	((SERVER_GPUS == 1 || gpus == 0)) || VLLM_ARGS+=(--tensor-parallel-size "$SERVER_GPUS")
	[[ " $*" == *" recipe="* ]] && RUN_ARGS=("$@") || RUN_ARGS=("recipe=$RECIPE" "${ARGS[@]}" "$@")
	RUN_ARGS=("${RUN_ARGS[@]//%a/${SLURM_ARRAY_TASK_ID:-0}}") # array jobs: run.dir=runs/name-%a seed=%a
	RUN_ARGS+=("parallel.nproc=$RANKS" "rollout.num_servers=$((SERVERS ? SERVERS : 1))")
	((gpus == 0 || taken + SERVERS_PER_NODE * SERVER_GPUS <= gpus)) ||
		refuse "$taken ranks and $SERVERS_PER_NODE servers of $SERVER_GPUS need more than GPUS_PER_NODE=$gpus"
	local have=${SLURM_JOB_NUM_NODES:-$(sed -n 's/^#SBATCH.*--nodes=\([0-9]*\).*/\1/p' "$0" | head -n1)}
	((${have:-$NODES} == NODES)) || refuse "$have nodes for LEARNER_NODES=$LEARNER_NODES + ROLLOUT_NODES=$ROLLOUT_NODES:" \
		"change one, or sbatch --nodes=$NODES"
}
preflight_step() { step preflight "$NODES" 0 1 -- preflight; }
server_step() { # losing a node or server must not end the others
	step servers "$SERVER_NODES" $((ROLLOUT_NODES ? LEARNER_NODES : 0)) "$SERVERS_PER_NODE" \
		--no-kill --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$ATTEMPT_DIR/server-%t.log" \
		-- server "${VLLM_ARGS[@]}"
}
learner_step() { # one missing rank blocks the others
	step learner "$LEARNER_NODES" 0 "$RANKS_PER_NODE" --kill-on-bad-exit=1 --open-mode=append \
		--output="$ATTEMPT_DIR/learner-rank%t.log" -- learner "${RUN_ARGS[@]}" "$@"
}
dry_run() {
	ATTEMPT_DIR=RUN_DIR/logs/attempt_1
	echo "# $0: $NODES nodes x $GPUS_PER_NODE GPUs, $RANKS learner ranks, $SERVERS servers of $SERVER_GPUS GPU(s)"
	grep '^#SBATCH' "$0" | if [[ ${GRES:-1} == 0 ]]; then sed 's/ --gpus-per-node=[0-9]*//'; else cat; fi
	echo "# steps:"
	preflight_step; ((SERVERS == 0)) || server_step; learner_step 'rollout.urls=[http://...]'
	((SERVERS == 0)) || "${NODE_COUNTS[@]}" "${HOST_PY[@]}" -m recipes.cluster.transport "${RUN_ARGS[@]}"
	"${HOST_PY[@]}" -m recipes.plan "${RUN_ARGS[@]}" "gpu_gib=${GPU_GIB:-80}" ||
		echo "# memory and configuration: once the files that the error names are on this host"
}

# --- the life of a job ------------------------------------------------------------------------------------------------
on_usr1() { # the time limit is near: checkpoint at the next step boundary; requeue by force if that comes too late
	STOPPING=$((SECONDS + ${STOP_GRACE_S:-240})); say "time limit near: asking for a checkpoint"
	[[ -z $ATTEMPT_DIR ]] || : >"$ATTEMPT_DIR/stop"
}
on_term() { CANCELLED=1; [[ -z $ATTEMPT_DIR ]] || event job cancelled; say "cancelled"; }
tick() { # servers and recipes.status watch the file; signals interrupt `wait`
	printf '%(%s)T\n' -1 >"$ATTEMPT_DIR/heartbeat"; sleep 1 & wait $!
}
signal_step() { # NAME SIGNAL: TERM to srun itself would SIGKILL its tasks
	squeue -h -s -j "$SLURM_JOB_ID" -o '%i %j' | awk -v n="$1" '$2 == n {print $1}' |
		xargs -r scancel --signal="$2" 2>/dev/null # it may have ended
}
requeue() { # without the nodes whose ranks hung, when the partition has others
	local hung; hung=$(paste -sd, "$ATTEMPT_DIR/hung_nodes" 2>/dev/null)
	scontrol requeue "$SLURM_JOB_ID" || return
	[[ -n $hung ]] || return 0
	sleep 1 # it stays pending for a while, and its exclusions can be changed
	if exclude "$hung"; then say "next without $hung"; else say "no node to take the place of $hung"; fi
}
job_field() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/^ *$1=\([^ ]*\).*/\1/p" | sed 's/^(null)$//'; }
exclude() { # NODES: add them to the job's exclusions, unless the user requested them or too few nodes would be left
	local before spare; before=$(job_field ExcNodeList)
	[[ -z $(job_field ReqNodeList) ]] || return 1
	spare=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,mix,alloc -o %N | sort -u | wc -l)
	((spare - $(tr , '\n' <<<"$1" | wc -l) >= NODES)) || return 1
	scontrol update "jobid=$SLURM_JOB_ID" "excnodelist=${before:+$before,}$1"
}
begin() {
	local variables code line
	variables=$("${NODE_COUNTS[@]}" "${HOST_PY[@]}" -m recipes.cluster.job "${RUN_ARGS[@]}"); code=$?
	((code == 0)) || { say "not started, not requeued"; exit "$code"; }
	while IFS= read -r line; do [[ $line =~ ^[A-Z_]+= ]] && export "${line?}" || echo "$line"; done <<<"$variables"
	[[ $STATE != finished ]] || { say "$RUN_DIR is finished: nothing to do"; exit 0; }
	say "attempt $ATTEMPT_DIR (job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}) on $SLURM_JOB_NODELIST"
	MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
	VLLM_API_KEY=$(head -c 32 /dev/urandom | base64 | tr -d '+/=\n') # only this attempt's processes know it
	export MASTER_ADDR VLLM_API_KEY GPPO_ATTEMPT_DIR=$ATTEMPT_DIR
	if [[ $SERVED == 0 ]]; then SERVERS=0; fi
}
preflight() {
	local began ended=(); began=$(date +%s)
	(preflight_step) >"$ATTEMPT_DIR/preflight.out" 2>"$ATTEMPT_DIR/preflight.err" && ended=(--all-ended)
	"${HOST_PY[@]}" -m recipes.cluster.preflight judge "$ATTEMPT_DIR" --gpus "$GPUS_PER_NODE" --began "$began" \
		--nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" --run-gib "${MIN_RUN_GIB:-20}" \
		"${ended[@]}" <"$ATTEMPT_DIR/preflight.out" 2>&1 | tee "$ATTEMPT_DIR/preflight.log"
	((PIPESTATUS[0] == 0)) || { cat "$ATTEMPT_DIR/preflight.err"; end refused 3; }
}
count_servers() { # READY and GONE: servers that have given up will not become ready
	READY=$(find "$ATTEMPT_DIR" -name 'server-*.url' | wc -l)
	GONE=$(grep -lsE '"event": "(gave up|ended)"' "$ATTEMPT_DIR"/server-*.events.jsonl | wc -l)
}
serve() { # start the servers and wait until each has produced a token
	local READY GONE deadline=$((SECONDS + ${SERVER_START_S:-1800}))
	(server_step) & SERVING=$!
	say "waiting for $SERVERS servers"
	while count_servers; ((READY + GONE < SERVERS)); do
		[[ -z $CANCELLED$STOPPING ]] || return 0
		kill -0 "$SERVING" 2>/dev/null || { say "the servers ended before they were ready"; return 1; }
		((SECONDS < deadline)) || break
		tick
	done
	((READY > 0)) || { say "no server is ready"; return 1; }
	((READY >= SERVERS)) || say "going on with $READY of $SERVERS servers"
	URLS=$(cat "$ATTEMPT_DIR"/server-*.url | paste -sd,)
	say "servers ready: $URLS"
}
watch() { "${HOST_PY[@]}" -m recipes.cluster.watch "$ATTEMPT_DIR" --ranks "$RANKS" & WATCHING=$!; }
learn() { # the learner's exit status; requeue by force when a requested checkpoint is not written in time
	local serving=()
	[[ -z $URLS ]] || serving+=("rollout.urls=[$URLS]" "rollout.weight_sync=$WEIGHT_SYNC")
	[[ -z $SYNC_DIR ]] || ((SERVER_NODES == 1 && ROLLOUT_NODES == 0)) || serving+=("rollout.sync_dir=$SYNC_DIR")
	(learner_step "${serving[@]}") & LEARNER=$!
	watch
	while kill -0 "$LEARNER" 2>/dev/null; do
		[[ -n $CANCELLED ]] && return 1
		if ! kill -0 "$WATCHING" 2>/dev/null; then
			wait "$WATCHING"; (($? != 4)) || return 4 # a rank hangs: the watcher has recorded it
			watch
		fi
		[[ -z $STOPPING ]] || ((SECONDS < STOPPING)) || { say "no step boundary in time"; return 0; }
		tick
	done
	wait "$LEARNER"
}
remove_weights() { # staged for servers by a learner that was killed; those of a running learner are locked
	local staged prefix=megatron-gppo-weights-
	for staged in "${SYNC_DIR:-/dev/shm}/$prefix"*/ "/dev/shm/$prefix"*/ "/tmp/$prefix"*/; do
		[[ ! -O $staged || ! -e $staged/lock ]] || flock -n "$staged/lock" rm -rf "$staged"
	done
}
lost_nodes() { # Slurm's view of nodes that are down, for the reader of the first error
	local down; down=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -t down,fail,no_respond -o %N | sort -u | paste -sd,)
	[[ -z $down ]] || event nodes lost ", \"down\": \"$down\""
}
end() { # OUTCOME STATUS: stop all steps, report the outcome, requeue if that helps
	[[ -n $CANCELLED ]] || event job "$1"
	[[ $1 != failed ]] || lost_nodes
	signal_step servers TERM
	[[ -z $WATCHING ]] || kill "$WATCHING" 2>/dev/null
	[[ -z $LEARNER ]] || ! kill -0 "$LEARNER" 2>/dev/null || kill "$LEARNER"
	for ((i = 0; i < 80; i++)); do kill -0 "$SERVING" 2>/dev/null || break; sleep 0.25; done
	remove_weights
	"${HOST_PY[@]}" -m recipes.status "$RUN_DIR"
	[[ $1 == stopped || $1 == failed ]] && [[ -z $CANCELLED ]] || exit "$2"
	"${HOST_PY[@]}" -m recipes.cluster.requeue "$RUN_DIR" || exit "$2"
	local told=''; trap 'told=1' TERM # requeueing ends this script by TERM; processes that ignore TERM end after KillWait
	event job requeued
	for ((i = 0; i < 5; i++)); do
		if (trap '' TERM; requeue); then
			say "requeued"; SECONDS=0
			until [[ -n $told ]] || ((SECONDS > 60)); do sleep 1 & wait $!; done; exit 0
		fi; sleep 10 & wait $!
	done
	say "cannot be requeued: submit again to continue"; exit "$2"
}
main() {
	layout "$@"
	if [[ -n ${DRY_RUN:-} ]]; then dry_run; return; fi
	STOPPING='' CANCELLED='' LEARNER='' SERVING='' WATCHING='' ATTEMPT_DIR='' URLS=''
	trap on_usr1 USR1; trap on_term TERM; prepare_node; begin; preflight
	((SERVERS == 0)) || serve || end failed 1
	[[ -z $CANCELLED ]] || end cancelled 143; [[ -z $STOPPING ]] || end stopped 1
	learn; local code=$?
	[[ -n $CANCELLED ]] && end cancelled 143
	((code == 0)) && [[ -f $RUN_DIR/finished.json || $PROGRAM != recipes.train ]] && end finished 0
	grep -qs '"code": 2}' "$ATTEMPT_DIR"/learner-rank*.events.jsonl && end "user error" 2
	grep -qs '"code": 5}' "$ATTEMPT_DIR"/learner-rank*.events.jsonl && end "not finite" 5 # a retry would not help
	((code == 0)) && end stopped 1
	end failed "$code"
}
