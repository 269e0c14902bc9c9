"""One connection to Redis or Valkey for all callers of a process: what is asked in one turn of the loop is one write.

A request asks the store two to four small things. With a connection each (the library's own way) every one of them
costs a write, two tasks and two timers; here they cost a future and a timer, and those that fall together share the
write and the wake-up, which Redis calls pipelining. Answers come in the order of the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import RedisError, ResponseError


class SharedRedis(Redis):
    """The library's client, whose single commands share a connection. Pipelines, transactions and subscriptions have
    connections of their own, as before; commands that block theirs (BLPOP) are not for it."""

    _line: Line | None = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """The answer. Raises RedisError, or TimeoutError after `socket_timeout`; nothing is tried again."""
        line = self._line
        if line is None or line.lost:
            line = self._line = Line(self._connection())
        try:
            async with asyncio.timeout(self.connection_pool.connection_kwargs.get("socket_timeout")):
                answer = await line.ask(args)
        except TimeoutError:
            line.leave()
            raise
        except asyncio.CancelledError:
            if line.lost:
                line.leave()  # the last who waited there has gone: nobody would close it
            raise
        options.pop("keys", None)  # for the library's client-side cache
        callback = self.response_callbacks.get(args[0])
        return answer if callback is None else callback(answer, **options)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Whoever still waits hears that the connection is lost."""
        if self._line is not None:
            await self._line.close()
        await super().aclose(close_connection_pool)

    def _connection(self) -> AbstractConnection:
        # Callers have timers of their own: the connection needs none, and idles as long as nobody asks.
        pool = self.connection_pool
        made: AbstractConnection = pool.connection_class(**{**pool.connection_kwargs, "socket_timeout": None})
        return made


class Line:
    """A connection, and who waits for its answers."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.lost = False  # nothing more is to be asked here
        self._connection = connection
        self._outgoing: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._asked = asyncio.Event()
        self._running = asyncio.ensure_future(self._run())

    def ask(self, command: tuple[Any, ...]) -> asyncio.Future[Any]:
        """What will be answered; to be cancelled by whoever does not care any more. Raises RedisError for what is no
        command."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._outgoing += self._connection.pack_command(*command)
        self._waiting.append(answer)
        self._asked.set()
        return answer

    def leave(self) -> None:
        """Somebody waited too long: who asks next shall not wait behind that; who has asked may yet be answered."""
        self.lost = True
        if self._deserted:
            self._running.cancel()

    async def close(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    @property
    def _deserted(self) -> bool:
        return all(answer.done() for answer in self._waiting)

    async def _run(self) -> None:
        failure: Exception = LostError("the connection is closed")
        writing: asyncio.Task[None] | None = None
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]
            writing = asyncio.ensure_future(self._write())
            await self._read()
        except (RedisError, OSError, TimeoutError) as error:
            failure = error
        finally:
            self.lost = True
            if writing is not None:
                writing.cancel()
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(failure)
            with contextlib.suppress(RedisError, OSError):
                await self._connection.disconnect(nowait=True)

    async def _write(self) -> None:
        """A connection that cannot be written to is not read from for long either: the reader tells."""
        with contextlib.suppress(RedisError, OSError):
            while await self._asked.wait():
                self._asked.clear()
                packed, self._outgoing = self._outgoing, []
                await self._connection.send_packed_command(packed, check_health=False)

    async def _read(self) -> None:
        """Hand answers out until the connection is lost (raises RedisError), or was left and nobody waits any more."""
        while not (self.lost and self._deserted):
            error, found = None, None
            try:
                found = await self._connection.read_response()
            except ResponseError as refused:  # of this command alone
                error = refused
            answer = self._waiting.popleft()
            if answer.done():
                continue  # its caller has left
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(found)
