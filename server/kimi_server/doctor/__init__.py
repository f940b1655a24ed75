"""`kimi-linear doctor`: what this machine has, lacks and would serve."""
