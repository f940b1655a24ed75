"""The words of `kimi-linear`: help with examples, what a typo meant, shell completion."""
