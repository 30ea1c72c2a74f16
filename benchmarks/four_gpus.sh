#!/usr/bin/env bash
# Four GPUs of one host: losses of every layout, the full 7B, variants of TP 4 and PP 4, samples of 128K tokens beside
# CREAM's of 4K, a 70B's width, a prompt of 128K tokens, kills. two_gpus.sh explains the arguments.
#
#   bash benchmarks/four_gpus.sh OUTPUT_FOLDER [STAGE ...]    # --help lists the stages
source "$(dirname "$0")/several_gpus.sh"
benchmark 4 "$@"
