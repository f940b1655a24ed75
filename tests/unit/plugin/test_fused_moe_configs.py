"""The tables of tiles that the package ships for vLLM's kernel of the experts: their form, and for whom they are."""

import json
import re
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe import fused_moe

from vllm_kimi_linear import fused_moe_configs

use_tables = fused_moe_configs.use_tables
TABLES = sorted(fused_moe_configs.TABLES.glob("*.json"))


@pytest.fixture(params=TABLES, ids=lambda table: table.name)
def table(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def found(table: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, Any] | None]:
    """What vLLM finds for the sizes of `table`, on its GPU, in a step through these layers."""
    sizes = re.match(r"E=(\d+),N=(\d+),device_name=(.*)\.json$", table.name)
    assert sizes
    experts, width, device = int(sizes[1]), int(sizes[2]), sizes[3]
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: device)
    monkeypatch.setattr(fused_moe, "get_moe_configs", unwrap(fused_moe.get_moe_configs))  # without its cache
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    fused_moe_configs.PATCH.apply()

    def find(*layers: nn.Module) -> dict[int, Any] | None:
        named = {str(layer.layer_name): layer for layer in layers}
        with override_forward_context(ForwardContext(no_compile_layers=named, attn_metadata=None, slot_mapping={})):
            return fused_moe.get_moe_configs(experts, width, None, 0, 0)

    return find


def experts(name: str) -> nn.Module:
    layer = nn.Identity()
    layer.layer_name = name
    return layer


def test_a_step_through_our_experts_finds_them(found, table: Path):
    ours = experts("layers.1")
    use_tables(ours)
    use_tables(ours)
    tiles = found(experts("layers.0"), ours)
    assert tiles == {int(key): tile for key, tile in json.loads(table.read_text()).items() if key != "triton_version"}


def test_another_model_does_not(found):
    ours = experts("layers.0")
    use_tables(ours)
    assert found(experts("layers.0")) is None  # even of the same name


def test_a_folder_of_the_user_takes_their_place(found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Path):
    (tmp_path / table.name).write_text('{"1": {"BLOCK_SIZE_M": 16}}')
    ours = experts("layers.0")
    use_tables(ours)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert found(ours) == {1: {"BLOCK_SIZE_M": 16}}


def test_every_table_is_of_whole_tiles_by_rising_tokens(table: Path):
    tiles = {int(tokens): tile for tokens, tile in json.loads(table.read_text()).items() if tokens != "triton_version"}
    assert list(tiles) == sorted(tiles)
    assert {len(tile) for tile in tiles.values()} == {6}
