#!/bin/bash
# Stands for Python on nodes with fake GPUs: real for everything but the processes that would compute, which write down
# how they were started and wait for each other. Set by the test: REAL_PYTHON.
note() { # ROLE NUMBER ARGUMENTS
	local file=$ATTEMPT_DIR/$1-$2.started
	{ echo "node=$SLURMD_NODENAME"; echo "gpus=$CUDA_VISIBLE_DEVICES"; echo "rank=${RANK:-}"
		echo "local_rank=${LOCAL_RANK:-}"; echo "world=${WORLD_SIZE:-}"; echo "master=$MASTER_ADDR:$MASTER_PORT"
		printf 'arg=%s\n' "${@:3}"; } >"$file.part"
	mv "$file.part" "$file"
}
case "$*" in
	*"-m recipes.cluster.serve "*)
		note server "$SLURM_PROCID" "$@"
		trap 'exit 0' TERM
		echo "http://$SLURMD_NODENAME:$((12000 + SLURM_LOCALID))" >"$ATTEMPT_DIR/.url.$SLURM_PROCID"
		mv "$ATTEMPT_DIR/.url.$SLURM_PROCID" "$ATTEMPT_DIR/server-$SLURM_PROCID.url"
		while :; do sleep 1 & wait $!; done ;;
	*"-m recipes.train "* | *"-m recipes.evaluate "*)
		note learner "$RANK" "$@"
		((RANK == 0)) || exit 0
		for ((i = 0; i < 600; i++)); do
			started=("$ATTEMPT_DIR"/learner-*.started)
			((${#started[@]} == WORLD_SIZE)) && { echo '{"steps": 1000000}' >"$RUN_DIR/finished.json"; exit 0; }
			sleep 0.1
		done
		exit 1 ;;
	*) exec "$REAL_PYTHON" "$@" ;;
esac
