#!/bin/sh
# All tasks of a grid on one machine: one run on each GPU where several are visible, else one run after the other.
#
#   sh runs/study.sh runs/study.grid checkpoint/study      # grid, directory, then flags of main.py
#   python test.py --checkpoint-dir checkpoint/study/*
#
# It may be stopped at any time (Ctrl-C, timeout 600 sh ...); the same line resumes it. On several GPUs the output of a
# task is in its directory, study.log. CUDA_VISIBLE_DEVICES=0,0,1,1 puts two runs on each of two GPUs. Where a task fails
# the others are run all the same, and the exit code is 1.
set -euf
grid=$1
results=$2
shift 2
here=$(dirname "$0")
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || :)
else
    gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' ' ')
fi
taken=$(mktemp -d) # a directory for each task that has begun
trap 'rm -r "$taken"' EXIT

work() { # [GPU], then as task.sh after its NUMBER
    trap 'exit 143' TERM # after main.py has saved its state
    number=0 failed=0
    while [ "$((number += 1))" -le "$(grep -c '^task ' "$grid")" ]; do
        mkdir "$taken/$number" 2>/dev/null || continue
        code=0
        one "$@" || code=$?
        [ "$code" -eq 0 ] || echo "task $number ended with exit code $code" >&2
        [ "$code" -lt 128 ] || return "$code" # stopped by a signal
        [ "$code" -eq 0 ] || failed=1
    done
    return "$failed"
}

one() { # a task: in the foreground, or on a GPU with its output in a file
    if [ -z "$gpu" ]; then
        sh "$here/task.sh" "$grid" "$number" "$results" "$@"
        return
    fi
    directory=$results/$(grep '^task ' "$grid" | sed -n "${number}p" | cut -d ' ' -f 2)
    mkdir -p "$directory"
    echo "task $number on GPU $gpu: $directory/study.log"
    CUDA_VISIBLE_DEVICES=$gpu sh "$here/task.sh" "$grid" "$number" "$results" "$@" >>"$directory/study.log" 2>&1
}

gpu=
if [ "$(echo "$gpus" | wc -w)" -lt 2 ]; then
    work "$@"
    exit
fi
workers=
trap : TERM INT # it waits for the workers, which stop
for gpu in $gpus; do
    work "$@" &
    workers="$workers $!"
done
worst=0
for worker in $workers; do
    code=0
    wait "$worker" || code=$?
    while kill -0 "$worker" 2>/dev/null; do
        code=0
        wait "$worker" || code=$?
    done
    [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst"
