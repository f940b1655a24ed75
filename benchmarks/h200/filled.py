"""A context that is not computed: for the time of a decode step, which does not depend on what the latents are."""

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector
from vllm.v1.request import Request


class FilledConnector(DecodeBenchConnector):
    """vLLM's own connector for this, of which only requests that ask for it make use."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get("filled"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
