"""Where everything of ours logs to."""

from vllm.logger import init_logger

logger = init_logger("vllm.kimi_linear")  # under "vllm", so that its handlers apply
