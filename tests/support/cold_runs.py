"""A prompt with the answer of its own cold run, which other answers to it are measured by."""

from dataclasses import dataclass

import httpx

from tests.support.completions import Completions

LEVEL = 1e-3  # a lead of a logprob below which two right computations in fp32 may take either token


@dataclass(frozen=True)
class ColdRun:
    prompt: list[int]
    tokens: list[int]  # of the answer
    leads: list[float]  # of each over the next best

    def differs(self, tokens: list[int]) -> str | None:
        """Where other tokens were taken, or None; as far as the cold run's choice is clear."""
        for at, (ours, cold, lead) in enumerate(zip(tokens, self.tokens, self.leads, strict=False)):
            if ours != cold:
                if lead < LEVEL:
                    return None
                return f"{len(self.prompt)} tokens: token {at} is {ours}, cold {cold}, {lead:.3f} ahead"
        return None


async def cold_run(server: Completions, client: httpx.AsyncClient, prompt: list[int], tokens: int) -> ColdRun:
    # Two tokens may have one text.
    more = {"logprobs": 2, "return_tokens_as_token_ids": True}
    body = server.body(prompt, tokens, **server.salt(cold=True)) | more
    [choice] = (await client.post("/v1/completions", json=body)).raise_for_status().json()["choices"]
    ranked = [sorted(found.values(), reverse=True) for found in choice["logprobs"]["top_logprobs"]]
    return ColdRun(prompt, choice["token_ids"], [best[0] - best[1] for best in ranked])
