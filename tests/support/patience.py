"""How long a test waits for what should come."""

SECONDS = 1800  # says that something hangs, not that the machine is slow: beside other suites a step takes minutes
