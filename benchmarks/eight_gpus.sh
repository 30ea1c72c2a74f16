#!/usr/bin/env bash
# Eight GPUs of one host: losses of five layouts, kills, the full 7B in nine layouts, variants of TP 4 and PP 4 on half of
# the GPUs each, samples of 256K tokens beside CREAM's of 4K, a 70B's width and a whole 70B with adapters, a prompt of
# 256K tokens. two_gpus.sh explains the arguments.
#
#   bash benchmarks/eight_gpus.sh OUTPUT_FOLDER [STAGE ...]    # --help lists the stages
#
# No GPU waits between stages joined by +. parity-faults kills ranks while losses are measured.
source "$(dirname "$0")/several_gpus.sh"
benchmark 8 "$@"
