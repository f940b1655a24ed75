"""Which replica a request goes to: session affinity, bounded by load.

A session is named by the X-Session-ID header, else by its system prompt and first message, which later turns repeat.
Rendezvous hashing gives each session its own order of replicas, so when a replica goes down only its sessions move.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil

from kimi_server.gateway.upstream.replicas import Replica

# A session leaves its replica when that runs more than OVERLOAD times the average, plus SLACK requests.
OVERLOAD, SLACK = 1.25, 4


def session_hash(session_id: str | None, owner: str, prefix_hash: bytes | None) -> str | None:
    """The session's name in 24 hexadecimal digits, never shared by two owners; None without id and prefix."""
    if session_id is None and prefix_hash is None:
        return None
    shared = session_id if session_id is not None else [prefix_hash.hex() if prefix_hash else ""]
    return blake2b(json.dumps([owner, shared]).encode(), digest_size=12).hexdigest()


def rendezvous(session: str, names: Sequence[str]) -> list[int]:
    """Indexes of the replicas with these names, in the session's order of preference (highest random weight)."""
    score = [blake2b(f"{session} {name}".encode(), digest_size=8).digest() for name in names]
    return sorted(range(len(names)), key=score.__getitem__)


def replica_order(replicas: Sequence[Replica], session: str | None, failed: frozenset[int] = frozenset()) -> list[int]:
    """Indexes of the replicas that are up, the one to try first at the front.

    With a session: its preferred replicas that are not overloaded, then the others by running requests. Without: all by
    running requests. Those in `failed` come last.
    """
    up = [replica for replica in replicas if replica.up]
    order = [replica.index for replica in sorted(up, key=lambda replica: replica.running)]
    if session is not None and len(up) > 1:
        most = ceil(OVERLOAD * sum(replica.running for replica in up) / len(up)) + SLACK
        preferred = [index for index in rendezvous(session, [one.name for one in replicas]) if replicas[index].up]
        with_room = [index for index in preferred if replicas[index].running < most]
        order = with_room + [index for index in order if index not in with_room]
    return sorted(order, key=lambda index: index in failed)
