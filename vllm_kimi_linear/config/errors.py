"""The error that ends a start or a plan with one sentence. Standard library only."""


class ConfigError(Exception):
    """A config, flag or combination that this implementation cannot run.

    Not a ValueError: vLLM's configuration classes would wrap one in several lines of their own.
    """
