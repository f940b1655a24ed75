"""`kimi-linear keys`: what it does to a file, and that nothing else of the file changes."""

import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from kimi_server.cli import main
from kimi_server.gateway.keys import stored
from kimi_server.gateway.keys.keyring import Keyring
from kimi_server.gateway.keys.keys_file import digest

HASH = digest("sk-a")
BLOCK = f"""# Who may ask.
cache_salt_secret: 0123456789abcdef  # shared
keys:
  # The web.
  - id: "a"
    sha256: {HASH}  # of March
    concurrency: 2  # as agreed

  # Those of the night.
  - {{id: b, sha256: {digest("sk-b")}}}  # one line
# The end.
"""
FLOW = json.dumps({"keys": [{"id": "a", "sha256": HASH}, {"id": "b", "sha256": digest("sk-b"), "concurrency": 2}]})


def new_key(printed: str) -> str:
    [key] = re.findall(r"sk-[\w-]+", printed)
    return key


def keys(*words: str) -> int:
    return main(["keys", *words])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_the_first_key_makes_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("add", "tëam 😀", "--owner", "t", "--requests-per-minute", "5", "--file", str(path)) == 0
    key = new_key(capsys.readouterr().out)
    ring = Keyring(path)
    found = ring.authenticate(key).key
    assert (found.id, found.owner, found.requests_per_minute, found.metrics) == ("tëam 😀", "t", 5, False)
    assert key not in path.read_text() and digest(key) in path.read_text()
    assert ring.secret == Keyring(path).secret, "cache salts would change with each start"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", [BLOCK, FLOW])
def test_a_key_is_added_behind_the_others(path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path.write_text(text)
    path.chmod(0o640)
    assert keys("add", "c", "--metrics", "--concurrency", "none", "--file", str(path)) == 0
    ring = Keyring(path)
    assert list(ring.limiters) == ["a", "b", "c"]
    assert ring.authenticate(new_key(capsys.readouterr().out)).key.metrics
    [line] = re.findall(r"(?:\n  - |, )\{id: \"c\".*?\}", path.read_text())
    assert path.read_text().replace(line, "") == text, "something else changed"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in path.parent.iterdir()] == [path.name], "something was left behind"


def test_limits_change_in_their_place(path: Path) -> None:
    path.write_text(BLOCK)
    words = ("--concurrency", "none", "--tokens-per-minute", "900")
    assert keys("limit", "a", *words, "--file", str(path)) == 0
    assert keys("limit", "b", "--longest-context", "4096", "--file", str(path)) == 0
    wanted = BLOCK.replace("concurrency: 2  # as agreed", "concurrency: null  # as agreed\n    tokens_per_minute: 900")
    assert path.read_text() == wanted.replace("}  # one", ", longest_context: 4096}  # one")


@pytest.mark.parametrize("text", [BLOCK, FLOW])
@pytest.mark.parametrize("gone", ["a", "b"])
def test_a_revoked_key_is_gone_and_the_last_one_stays(
    path: Path, capsys: pytest.CaptureFixture[str], text: str, gone: str
) -> None:
    path.write_text(text)
    assert keys("revoke", gone, "--file", str(path)) == 0
    other = {"a": "b", "b": "a"}[gone]
    assert list(Keyring(path).limiters) == [other]
    assert text is FLOW or {"# The web.", "# Those of the night.", "# The end."} <= {
        line.strip() for line in path.read_text().splitlines()
    }
    kept = path.read_text()
    assert keys("revoke", other, "--file", str(path)) == 2
    assert "last key" in capsys.readouterr().err
    assert path.read_text() == kept


def test_a_list_has_limits_and_no_hash(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(BLOCK)
    assert keys("list", "--file", str(path)) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["id", "owner"] and (first.split()[0], second.split()[0]) == ("a", "b")
    assert keys("list", "--json", "--file", str(path)) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)[0]["concurrency"] == 2
    assert HASH not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "a"], "has a key 'a' already"),
        (["add", "x\ny"], "no control characters"),
        (["limit", "nobody", "--concurrency", "1"], "it has 'a', 'b'"),
        (["limit", "a", "--concurrency", str(1 << 60)], "at most"),
        (["limit", "a"], "--requests-per-minute"),
        (["revoke", "nobody"], "no key 'nobody'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    path.write_text(BLOCK)
    assert keys(*words, "--file", str(path)) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert path.read_text() == BLOCK


def test_a_way_of_writing_that_is_not_understood_is_left_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BLOCK.replace('- id: "a"', '-\n    id: "a"')
    path.write_text(text)
    assert keys("revoke", "a", "--file", str(path)) == 2
    assert "edit it" in capsys.readouterr().err
    assert path.read_text() == text


def test_a_file_that_is_not_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("list", "--file", str(path)) == 2
    assert keys("revoke", "a", "--file", str(path)) == 2
    assert capsys.readouterr().err.count("cannot be read") == 2
    assert not path.exists()


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(BLOCK)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert keys("add", "c", "--file", str(path)) == 2
    assert path.read_text() == BLOCK
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_link_stays_one(path: Path) -> None:
    target = path.with_name("elsewhere.yaml")
    target.write_text(BLOCK)
    path.symlink_to(target)
    assert keys("add", "c", "--file", str(path)) == 0
    assert path.is_symlink() and list(Keyring(target).limiters) == ["a", "b", "c"]


def count_up(path: Path, times: int) -> None:
    for _ in range(times):
        stored.change(path, lambda text: str(int(text) + 1))


def test_writers_wait_for_each_other(path: Path) -> None:
    path.write_text("0")
    writers = [multiprocessing.get_context("fork").Process(target=count_up, args=(path, 50)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() == "200"
