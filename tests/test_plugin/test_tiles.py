"""The tables of tiles that the package ships for vLLM's kernel of the experts."""

import json
import os
from pathlib import Path

import pytest

import vllm_kimi_linear

TABLES = sorted(Path(vllm_kimi_linear.__file__).with_name("tiles").glob("*.json"))


def test_vllm_looks_for_them_where_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    vllm_kimi_linear.register()
    assert TABLES and {str(table.parent) for table in TABLES} == {os.environ["VLLM_TUNED_CONFIG_FOLDER"]}


def test_a_folder_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/mine")
    vllm_kimi_linear.register()
    assert os.environ["VLLM_TUNED_CONFIG_FOLDER"] == "/mine"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_is_of_whole_tiles_by_rising_tokens(table: Path):
    tiles = {int(tokens): tile for tokens, tile in json.loads(table.read_text()).items() if tokens != "triton_version"}
    assert list(tiles) == sorted(tiles)
    assert {len(tile) for tile in tiles.values()} == {6}
