#!/bin/bash
# Keep the log of one task below a limit: rotate.sh LOG MIB [SECONDS BETWEEN LOOKS]; task.sh starts it with the task.
#
#   LOG.first   the first MiB: versions, settings, the first error; written once
#   LOG.1       the last quarter of the limit, of what the log held before it was emptied
#   LOG         starts again with the last 64 KiB, since blame and status read the end of it
#
# The file is emptied in place: srun holds it open, for appending (--open-mode=append). This runs on the node that
# writes the log, since on a network file system another node's view of its length may be old. Lines that are written
# between the copy and the emptying, some milliseconds, are lost.
log=$1 limit=$(($2 << 20)) every=${3:-30}
trap '' USR1 USR2
trap 'kill $! 2>/dev/null; exit 0' TERM
while kill -0 $PPID 2>/dev/null; do
	if (($(stat -c %s "$log" 2>/dev/null || echo 0) > limit)); then
		[[ -e $log.first ]] || head -c 1M "$log" >"$log.first"
		# A full disk: leave the log alone, it is the only copy.
		if tail -c $((limit / 4)) "$log" >"$log.part" && mv "$log.part" "$log.1"; then
			truncate -s 0 "$log" && tail -c 64K "$log.1" >>"$log"
		fi
	fi
	sleep "$every" & wait $!
done
