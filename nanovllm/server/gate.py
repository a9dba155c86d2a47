"""What stands before all routes: the API key or the Host, and the bound on the size of a body. Plain ASGI, so that
nothing is buffered and a client's going away is seen behind it."""

import secrets
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from nanovllm.openai_api.errors import Refused
from nanovllm.server.errors import respond

LOOPBACK = ("127.", "::1", "::ffff:127.")  # how addresses of the machine itself begin
PRIVATE_ENDINGS = (".localhost", ".internal")  # of names that the public DNS does not have
OPEN_PATHS = ("/", "/health")  # which show nothing that a key would have to protect


class Gate:
    """Lets through what may pass."""

    def __init__(self, app: Any, api_keys: Sequence[str], max_body_bytes: int) -> None:
        """Before `app`; without keys, everyone may pass but pages of other sites in a browser of this machine."""
        self.app = app
        self.api_keys = [key.encode() for key in api_keys]
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """A request, as ASGI has it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self._may_be_rebound(scope["server"][0], headers.get(b"host", b"localhost").decode("latin-1")):
            reason = "on this machine, the Host must be a local name or an IP address, unless --api-key is used"
            return await respond(Refused(403, reason))(scope, receive, send)
        length = headers.get(b"content-length", b"0")
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            refused = Refused(401, "the API key is missing or wrong", None, "invalid_api_key")
            return await respond(refused)(scope, receive, send)
        if length.isdigit() and int(length) > self.max_body_bytes:
            too_large = Refused(413, self._limit(), headers={"Connection": "close"})
            return await respond(too_large)(scope, receive, send)
        num_bytes = 0

        async def counted_receive() -> dict[str, Any]:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:  # of a body that did not say its length
                raise HTTPException(413, self._limit(), {"Connection": "close"})
            return message

        return await self.app(scope, counted_receive, send)

    def _limit(self) -> str:
        return f"a body must have at most {self.max_body_bytes} bytes"

    def _may_be_rebound(self, address: str, host: str) -> bool:
        """Whether a name was looked up for what came to this machine's own address, and no key is asked for.

        Another site can have its name lead here, so that its pages would read the answers (DNS rebinding).
        """
        return not self.api_keys and address.startswith(LOOPBACK) and not is_unmistakable(host)

    def _knows(self, authorization: bytes) -> bool:
        """Whether a header has one of the keys; all are compared, in a time that tells nothing of them."""
        scheme, _, given = authorization.partition(b" ")
        is_known = [secrets.compare_digest(given.strip(), key) for key in self.api_keys]
        return not self.api_keys or (scheme.lower() == b"bearer" and any(is_known))


def is_unmistakable(host: str) -> bool:
    """Whether a Host header has a name that no site can have, as localhost, or an address."""
    try:
        name = urlsplit(f"//{host}").hostname
        is_private = bool(name) and ("." not in name or name.endswith(PRIVATE_ENDINGS))
        return is_private or bool(ip_address(name or ""))
    except ValueError:
        return False
