"""Random weights with which tokens spread over the experts as evenly as those of a trained model.

With the weights that vLLM's dummy loader makes up all tokens would choose the same experts: the logits come out near
1e-6, the routers' biases near 1e-3. Simulated routing (vLLM's own remedy) costs each step 0.4 ms. This gives the layers
that decide about it, in every server alike, the weights that a model is initialised with.
"""

import torch

SAMPLE = 32  # tokens


class EvenRouters:
    """An extension of vLLM's workers: `--worker-extension-cls benchmarks.h200.even_routers.EvenRouters`."""

    def spread_routers(self, top_k: int) -> float:
        """Give routers and norms new weights; returns how many different experts SAMPLE tokens choose in a layer."""
        parameters = dict(self.model_runner.model.named_parameters())  # type: ignore[attr-defined]
        embedding = next(param for name, param in parameters.items() if name.endswith("embed_tokens.weight"))
        generator = torch.Generator(embedding.device).manual_seed(0)
        embedding.data.normal_(generator=generator)
        for name, param in parameters.items():
            if "norm" in name and param.dim() == 1:
                param.data.fill_(1)
            elif name.endswith("e_score_correction_bias"):
                param.data.zero_()
        tokens = torch.nn.functional.rms_norm(embedding[:SAMPLE].float(), embedding.shape[1:])
        chosen = []
        for name, param in parameters.items():
            if name.endswith("gate.weight"):
                param.data.normal_(std=param.shape[1] ** -0.5, generator=generator)
                chosen.append(len((tokens @ param.float().T).topk(top_k).indices.unique()))
        return sum(chosen) / len(chosen)


def expected(experts: int, top_k: int) -> float:
    """Different experts that SAMPLE tokens choose where every choice is as likely."""
    return experts * (1 - (1 - top_k / experts) ** SAMPLE)
