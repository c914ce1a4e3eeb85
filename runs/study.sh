#!/bin/sh
# Both recipes on the same dense networks: three seeds, the controls and five sparsities, one-shot and iterative.
#
#   sh runs/study.sh checkpoint/study                  # the directory, then flags of main.py
#   python test.py --checkpoint-dir checkpoint/study/*
#
# It may be stopped at any time (timeout 600 sh ...); the same line resumes it.
set -eu
directory=$1
shift
trap 'exit 143' TERM # after main.py has saved its state
for seed in 0 1 2; do
    for retrain in distilled plain; do
        python main.py -pr 0.5 0.75 0.9 0.95 0.98 -shot single iter --control --retrain $retrain \
            --seed $seed --checkpoint-dir "$directory/$seed" "$@"
    done
done
