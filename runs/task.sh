#!/bin/sh
# One task of a grid: sh runs/task.sh GRID NUMBER RESULTS [FLAGS of main.py]
#
# It may be stopped at any time; the same line resumes it. SIGUSR1 is the notice of study.sbatch that a SLURM job ends
# soon: main.py saves its state, and the job goes back into the queue.
set -euf
grid=$1
number=$2
results=$3
shift 3
task=$(awk -v number="$number" '$1 == "task" && ++found == number {sub(/^task +/, ""); print}' "$grid")
if [ -z "$task" ]; then
    echo "$grid has no task $number" >&2
    exit 2
fi
directory=${task%% *}
flags=${task#"$directory"}
stopped=  # the exit code after a signal
notified= # whether that signal was the notice
python=   # the process that is running
# SLURM, Ctrl-C and `timeout` send their signal to main.py, too, which ends when its state is saved: the shell waits.
trap 'stopped=143' TERM
trap 'stopped=130' INT
trap 'stopped=143; notified=1; [ -z "$python" ] || kill -TERM "$python"' USR1

# The SLURM_JOB_ID of an array's last task is that of the array: it would requeue all tasks.
job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

stop_if_asked() {
    [ -n "$stopped" ] || return 0
    [ -z "$notified" ] || [ -z "$job" ] || scontrol requeue "$job"
    exit "$stopped"
}

for run in $(sed -n '/^run/=' "$grid"); do
    stop_if_asked
    # shellcheck disable=SC2046,SC2086 # flags are words
    python main.py --checkpoint-dir "$results/$directory" $flags $(sed -n "${run}s/^run//p" "$grid") "$@" &
    python=$!
    [ -z "$notified" ] || kill -TERM "$python" # the notice came before its number was known
    code=0
    wait "$python" || code=$?
    while kill -0 "$python" 2>/dev/null; do # a signal ended the wait
        code=0
        wait "$python" || code=$?
    done
    python=
    stop_if_asked
    [ "$code" -eq 0 ] || exit "$code"
done
