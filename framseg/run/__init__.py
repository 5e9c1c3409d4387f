"""The machinery that runs: the driver of the notebooks, a run's paths, starting and resuming processes."""

# Threads of a parallel loop that wait for the others spin 1,000 times before they give their core away, not 300,000 as
# GNU's OpenMP does: training is two to six times as fast beside other work, a tenth to a fifth slower alone
# (tests/benchmarks/seconds.py). An environment variable and its value, read when a process loads torch.
WAITING_THREADS = ("GOMP_SPINCOUNT", "1000")
