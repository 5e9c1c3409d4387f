"""The machinery that runs: the driver of the notebooks, a run's paths, starting and resuming processes."""

# An environment variable and its value, read when a process loads torch: a thread that waits for the others of a
# parallel loop spins 1,000 times before it gives its core away; GNU's OpenMP has it spin 300,000 times. With this,
# training is two to six times as fast next to other work, and a tenth to a fifth slower alone
# (tests/benchmarks/seconds.py).
WAITING_THREADS = ("GOMP_SPINCOUNT", "1000")
