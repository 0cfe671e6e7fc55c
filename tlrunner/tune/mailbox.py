"""Between a trial's driver and its workers: each epoch there, the answer back.

An actor of its own, in a module that imports nothing large, so that it starts at once.
"""

import asyncio
from typing import Any


class Mailbox:
    """Holds what is told until the driver has answered it."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.answers: asyncio.Queue[bool] = asyncio.Queue()
        self.is_closed = False

    async def tell(self, report: Any) -> bool:
        """By the first worker: whether the trial goes on."""
        if self.is_closed:
            return False
        await self.told.put(report)
        return await self.answers.get()

    async def next(self, seconds: float) -> Any | None:
        """By the driver: what was told next; None if nothing was for a while."""
        try:
            return await asyncio.wait_for(self.told.get(), seconds)
        except asyncio.TimeoutError:
            return None

    async def go_on(self) -> None:
        """By the driver: the answer."""
        await self.answers.put(True)

    async def close(self) -> None:
        """By the driver: nothing goes on from here."""
        self.is_closed = True
        await self.answers.put(False)
