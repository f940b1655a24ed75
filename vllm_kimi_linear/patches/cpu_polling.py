"""Leave the cores to the computing threads while a process waits for another's message, on a CPU."""

import functools
import time

from vllm_kimi_linear.patches.patch import Function, Hook, Patch

POLL_SECONDS = 1e-4


def sleep(original: Function) -> Function:
    return functools.partial(time.sleep, POLL_SECONDS)


PATCH = Patch(
    symptom="On a machine with few cores decoding is a third slower than its matrix products.",
    cause="A reader of the shared-memory queue polls without a pause for a second after each message, so in steady "
    "decoding the engine's process always takes a core from the worker's threads.",
    upstream="vllm-project/vllm#52848 and #52814 make the wait configurable; #52916 would make it adaptive.",
    remove_when="one of these is in vLLM; then set its variable instead.",
    device="cpu",
    scope="process",
    speed=True,
    hooks=(Hook("vllm.distributed.device_communicators.shm_broadcast:sched_yield", "", sleep),),
)
