"""The demo checkpoint with code of its own, for those who test the code and those who test its tokenizer."""

from pathlib import Path

import pytest

from vllm_kimi_linear import demo


@pytest.fixture(scope="session")
def remote_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote")
    demo.write_checkpoint(path, remote_code=True)
    return path
