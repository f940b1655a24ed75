"""`make dist`: the sdist and the wheel of this tree in dist/, and for TAG=v1.2.3 the text of that release."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version_of(root: Path) -> str:
    """`__version__` of the plugin.

    Raises:
        ValueError: it is not there.
    """
    path = root / "vllm_kimi_linear/__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"$', path.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{path} has no line `__version__ = ...`.")
    return found[1]


def notes(changelog: str, version: str) -> str:
    """The entry of a version, without its heading.

    Raises:
        ValueError: there is none, it has no date, or it is empty.
    """
    heading = re.search(rf"^## {re.escape(version)}\b.*$", changelog, re.MULTILINE)
    if not heading:
        raise ValueError(f"CHANGELOG.md has no `## {version} (date)`: write it.")
    if not re.fullmatch(rf"## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading[0]):
        raise ValueError(f"CHANGELOG.md has `{heading[0]}`: give it the date of the release, as (2026-01-31).")
    entry = re.split(r"^## ", changelog[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not entry:
        raise ValueError(f"CHANGELOG.md says nothing below `{heading[0]}`.")
    return entry + "\n"


def main() -> int:
    """Check the tag, if there is one, and build."""
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__)
    parser.add_argument("--tag", default="", help="the release that this is, as v1.2.3")
    tag = parser.parse_args().tag
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    try:
        version = version_of(ROOT)
        if tag and tag != f"v{version}":
            raise ValueError(f"TAG={tag} is not the version, which is {version}: use TAG=v{version}.")
        if tag:
            (dist / "notes.md").write_text(notes((ROOT / "CHANGELOG.md").read_text(), version))
    except ValueError as error:
        print(f"make dist: {error}", file=sys.stderr)
        return 1
    # The sdist, and from it the wheel: what the sdist lacks, the wheel would lack.
    build = [sys.executable, "-m", "uv", "build", "--no-build-isolation", "--python", sys.executable]
    return subprocess.run([*build, "--out-dir", str(dist), str(ROOT)]).returncode


if __name__ == "__main__":
    sys.exit(main())
