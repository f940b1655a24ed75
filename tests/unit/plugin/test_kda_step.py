"""What a KDA layer does with what vLLM says of a step."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_kimi_linear.attention.kda_metadata import KdaMetadata
from vllm_kimi_linear.kda import _kimi_delta_attention

LAYER = "model.layers.0.self_attn"


def step(attn_metadata: Any) -> Mock:
    """A layer that was run in a step with this metadata."""
    layer = Mock(spec=("warm_up", "run"))
    context = ForwardContext(no_compile_layers={LAYER: layer}, attn_metadata=attn_metadata, slot_mapping={})
    rows = [torch.zeros(2, channels) for channels in (12, 4, 1, 4, 4)]  # qkv, g, beta, output_gate, out
    with override_forward_context(context):
        _kimi_delta_attention(*rows, LAYER)
    return layer


def test_a_step_without_metadata_is_a_dummy_run():
    layer = step(None)
    assert (layer.warm_up.call_count, layer.run.call_count) == (1, 0)


def test_a_real_step_mixes_with_the_metadata_of_this_layer():
    mine, other = SimpleNamespace(), SimpleNamespace()
    layer = step({LAYER: mine, "another": other})
    assert layer.warm_up.call_count == 0
    assert layer.run.call_args.args[2] is mine


def test_a_real_step_that_forgets_the_layer_fails():
    with pytest.raises(KeyError, match=LAYER):
        step({"model.layers.1.self_attn": Mock(spec=KdaMetadata)})


def test_a_warm_up_of_attention_alone_is_a_dummy_run():
    """On a GPU vLLM warms up attention kernels in steps that leave out every layer with a recurrent state."""
    layer = step({"model.layers.3.self_attn.attn": SimpleNamespace()})
    assert (layer.warm_up.call_count, layer.run.call_count) == (1, 0)
