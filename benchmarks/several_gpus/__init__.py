"""The benchmarks of two_gpus.sh, four_gpus.sh and eight_gpus.sh."""
