"""Whether the installed vLLM is one that our patches are made for, and what becomes of this model where it is not."""

import os

from vllm import version

from vllm_kimi_linear.supported import install_check

# Not VLLM_...: vLLM warns of variables of that name that it does not know.
UNSUPPORTED = "KIMI_LINEAR_UNSUPPORTED_VLLM"


def is_known() -> bool:
    return install_check.is_known(version.__version__)


def series() -> str:
    """Of the installed vLLM, as "0.32"."""
    return install_check.series(version.__version__)


def is_refused() -> bool:
    """Whether this model must not be served: nobody has seen its answers with this vLLM, and nobody insists."""
    return not is_known() and os.environ.get(UNSUPPORTED) != "1"


def refusal() -> str:
    return (
        f"vLLM {version.__version__} is not supported by vllm-kimi-linear, and answers can be wrong without its "
        f"patches: install {install_check.SUPPORTED}, or set {UNSUPPORTED}=1 to serve without patches or prefix caching"
    )


def unsupported() -> str:
    return (
        f"vLLM {version.__version__} is unsupported, and {UNSUPPORTED} is set: prefix caching is off, and no patch is "
        "applied"
    )
