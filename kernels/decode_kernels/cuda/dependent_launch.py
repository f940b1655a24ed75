"""How the kernels of a step follow one another on the GPU (programmatic dependent launch).

Each lets the next one start as soon as all its programs run, loads what no kernel of the step writes (weights), and
only then waits for the one before. So every kernel has the same order: `launch_next`, loads of weights,
`wait_for_last`, everything else. Every program passes `wait_for_last`, also one that has nothing to do: the next kernel
relies on all that came before this one.
"""

import triton
import triton.language as tl

from kda_kernels.cuda.elementwise import INTERPRETED

LAUNCH: dict[str, bool] = {} if INTERPRETED.value else {"launch_pdl": True}  # an option of each launch


@triton.jit
def launch_next():
    if not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last():
    if not INTERPRETED:
        tl.extra.cuda.gdc_wait()
