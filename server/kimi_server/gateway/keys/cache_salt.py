"""`cache_salt`: vLLM finds a cached prefix only under the salt it was made with, so hit times tell owners nothing of
each other.
"""

import base64
import hashlib
import hmac
import json
from typing import Any

from kimi_server.gateway.errors import Refusal


def cache_salt(secret: bytes, owner: str, own: Any) -> str:
    """The salt of an owner's requests, 43 characters; `own` is what the request itself gives as such, or None.

    Raises Refusal for an `own` that vLLM would refuse by its type.
    """
    if own is not None and not (isinstance(own, str) and own):
        raise Refusal(400, "cache_salt", "cache_salt must be a text that is not empty: give one, or leave it out.")
    mark = hmac.digest(secret, json.dumps([owner, own]).encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(mark).rstrip(b"=").decode()
