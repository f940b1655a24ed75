"""API keys: the file they are in, their limits, the cache salts of their owners."""
