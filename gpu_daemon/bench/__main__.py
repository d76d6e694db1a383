"""Runs the benchmark."""

from gpu_daemon.bench import main

main()
