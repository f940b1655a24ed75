"""Let drafts be verified with prefix caching on a CPU, where no Triton kernel runs."""

from vllm_kimi_linear.cpu import draft_states
from vllm_kimi_linear.patches.patch import Hook, Patch

CONTEXT = "vllm.v1.worker.mamba_utils:MambaSpecDecodeGPUContext"


PATCH = Patch(
    symptom="With --speculative-config and prefix caching on a CPU the first step ends the engine: the kernels that "
    "copy states at block boundaries are not callable.",
    cause="`MambaSpecDecodeGPUContext` launches Triton kernels, for which vLLM has no CPU version.",
    remove_when="`vllm.utils.cpu_triton_utils` has them.",
    device="cpu",
    scope="process",
    hooks=(
        Hook(
            f"{CONTEXT}.run_fused_postprocess",
            "self num_reqs num_accepted_tokens_gpu mamba_state_idx_gpu num_scheduled_tokens_gpu "
            "num_computed_tokens_gpu num_draft_tokens_gpu",
            lambda original: draft_states.keep_at_block_ends,
        ),
        Hook(
            f"{CONTEXT}.run_fused_precopy",
            "self num_reqs state_idx_gpu src_col_gpu token_bias_gpu idx_mapping",
            lambda original: draft_states.move_to_new_block,
        ),
    ),
)
