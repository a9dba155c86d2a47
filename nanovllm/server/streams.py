"""Iterators and clients: several iterators at once, server-sent events, clients that leave."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class ClientGone(Exception):
    """The client has closed its connection."""


async def merge(iterators: Sequence[AsyncGenerator[T, None]]) -> AsyncIterator[tuple[int, T]]:
    """The items of several iterators as they come, with the number of theirs. Closes all, however it ends."""
    if len(iterators) == 1:  # needs no tasks, which would cost more than all else that is done for a token
        async with aclosing(iterators[0]) as items:
            async for item in items:
                yield 0, item
        return
    pending = {asyncio.ensure_future(anext(each, None)): number for number, each in enumerate(iterators)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, item = pending.pop(task), task.result()
                if item is not None:
                    pending[asyncio.ensure_future(anext(iterators[number], None))] = number
                    yield number, item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for each in iterators:
            await each.aclose()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled if the client goes away.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body has been read, so there is nothing else to come
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + ENCODER.encode(data).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events, whose source is closed however the response ends."""

    def __init__(self, first: bytes, others: AsyncGenerator[bytes, None]) -> None:
        """The first event has been waited for, as the status is sent before it."""
        super().__init__(self._chain(first, others), media_type="text/event-stream")
        self.others = others

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The response, as ASGI has it; ends when the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.others.aclose()

    @staticmethod
    async def _chain(first: bytes, others: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        yield first
        async for other in others:
            yield other
