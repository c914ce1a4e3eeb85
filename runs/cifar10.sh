#!/bin/sh
# CIFAR-10 at the protocol that two CPU cores can compute, in the order in which each part is a table by itself.
#
#   sh runs/cifar10.sh checkpoint/cifar10 --precision bf16      # the directory, then flags of main.py
#   python test.py --checkpoint-dir checkpoint/cifar10/resnet18
#
# ResNet18 takes about 11 hours of two undisturbed cores, ResNet20 about 8 for the default recipe and 5 for `plain`.
# It may be stopped at any time (timeout 600 sh ...); the same line resumes it. Give --precision: what `auto` selects
# depends on the processor, and is a setting of the results.
set -eu
directory=$1
shift
trap 'exit 143' TERM # after main.py has saved its state
resnet18() {
    python main.py --epochs 24 --retrain-epochs 4 --step-epochs 1 --final-epochs 8 \
        --checkpoint-dir "$directory/resnet18" "$@"
}
resnet20() {
    python main.py --arch resnet20 --checkpoint-dir "$directory/resnet20" "$@"
}
resnet18 "$@"
resnet18 -pr 0.5 0.75 0.9 0.95 0.98 -shot single --control "$@"
resnet18 -pr 0.9 -shot iter --control "$@"
resnet20 "$@"
resnet20 -pr 0.5 0.75 0.9 -shot single iter "$@"
resnet20 -pr 0.9 -shot single iter --retrain plain "$@"
resnet18 -pr 0.5 0.75 -shot iter "$@"
resnet20 -pr 0.5 0.75 0.9 -shot single iter --retrain plain "$@"
resnet20 -pr 0.5 0.75 0.9 -shot single iter --control "$@"
