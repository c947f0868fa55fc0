"""What a process of ours says by its exit code."""

DONE = 0
FAULT = 1
USAGE = 2  # bad usage or configuration: trying again does not help
HUNG = 70  # the watchdog ended a rank because the job made no progress (EX_SOFTWARE)
STOPPED = 85  # stopped on request, a checkpoint is written, the same command continues
