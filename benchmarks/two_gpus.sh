#!/usr/bin/env bash
# What one GPU cannot stand for, on two: the default run, losses of every layout, a full 7B, full length, kills.
#
#   bash benchmarks/two_gpus.sh OUTPUT_FOLDER [default|prepare|one|parity|faults|7b|long|parity-bf16 ...]
#
# No stage named: all. A run whose figures are in OUTPUT_FOLDER already is not made again, so the same command resumes
# where it was stopped. Flags after -- go to every run of parity and of the 7B. --seconds N starts no run after N
# seconds. Without GPUs the small stages (default, parity, faults) run on CPU ranks.
source "$(dirname "$0")/several_gpus.sh"
benchmark 2 "$@"
