"""Sizes as text: 128K tokens, 80G of memory. K, M, G and GiB are powers of 1024, GB is one of 1000."""

import re

from vllm_kimi_linear.config.errors import ConfigError

FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse(flag: str, text: str, example: str) -> int:
    """A whole number from 1, with a factor or none; raises ConfigError naming the flag."""
    found = re.fullmatch(r"(\d{1,15})([KMG]?)", text.strip().upper(), re.ASCII)
    if not found or not int(found[1]):
        raise ConfigError(f"{flag} is {text!r}; give a whole number from 1, such as {example}")
    return int(found[1]) * FACTORS[found[2]]


def memory(flag: str, text: str) -> int:
    """Bytes of 80G, 80GiB or 80GB, or of a number without a unit; raises ConfigError naming the flag."""
    found = re.fullmatch(r"(\d{1,15})\s*(?:([KMG])(I?B)?)?", text.strip().upper(), re.ASCII)
    if not found or not int(found[1]):
        raise ConfigError(f"{flag} is {text!r}; give a whole number from 1 and a unit, such as 80G or 80GB")
    if found[3] == "B":
        return int(found[1]) * 1000 ** (1 + "KMG".index(found[2]))
    return int(found[1]) * FACTORS[found[2] or ""]


def flag(count: int) -> str:
    """A number of tokens as a flag takes it: 1M, 128K, 5000."""
    return tokens(count).replace(",", "")


def tokens(count: int) -> str:
    """1048576 -> 1M, 131072 -> 128K, 5000 -> 5,000."""
    for letter in "MK":
        if count % FACTORS[letter] == 0:
            return f"{count // FACTORS[letter]}{letter}"
    return f"{count:,}"


def documents(count: int, length: int) -> str:
    """27 documents of 128K."""
    shown = tokens(length)
    unit = "" if shown[-1] in FACTORS else " tokens"
    return f"{count:,} document{'' if count == 1 else 's'} of {shown}{unit}"


def gib(size: float) -> str:
    return f"{size / FACTORS['G']:.2f} GiB"
