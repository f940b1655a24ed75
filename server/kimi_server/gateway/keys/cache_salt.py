"""The `cache_salt` of a request.

vLLM finds a cached prefix only under the salt it was computed with. With a salt for each owner, the time to the first
token does not reveal to one owner what another has asked.
"""

import base64
import hashlib
import hmac
import json
from typing import Any

from kimi_server.gateway.errors import GatewayError


def cache_salt(secret: bytes, owner: str, requested: Any) -> str:
    """HMAC-SHA256 of the owner and of the salt that the request itself gives, None if none; 43 characters.

    Raises GatewayError for a `requested` that vLLM would refuse by its type.
    """
    if requested is not None and not (isinstance(requested, str) and requested):
        raise GatewayError(400, "cache_salt", "cache_salt must be a text that is not empty: give one, or leave it out.")
    mac = hmac.digest(secret, json.dumps([owner, requested]).encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()
