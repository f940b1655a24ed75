"""One thing that is known of a machine."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """`about` is a word or two, `text` what is there, and of a warning or a fault one sentence with its remedy.

    A fault keeps a server from starting; a warning makes it slower or something else than it could be.
    """

    level: Level
    about: str
    text: str
