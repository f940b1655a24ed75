"""Kimi Linear for vLLM: the plugin's front door.

vLLM calls `register()` in every process it starts, some of them more than once, so it only hands over
names: neither torch nor vLLM is imported before vLLM asks for them.
"""

__version__ = "0.2.0"

ARCHITECTURE = "KimiLinearForCausalLM"


def register() -> None:
    """Tell vLLM where our model, its KDA metadata backend and its configuration checks live.

    Entry point `kimi_linear` of the group `vllm.general_plugins`. Idempotent. Processes that serve other models call
    it too: nothing here, nor what it calls, may change anything for them.
    """
    from vllm_kimi_linear.supported import versions

    if versions.is_refused():
        from vllm_kimi_linear.supported import refused

        return refused.register()

    from vllm_kimi_linear import registration

    registration.register()
