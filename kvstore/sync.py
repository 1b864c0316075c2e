"""The same store without `await`: asynchronous clients on one event loop, in a thread of the process's own.

    from kvstore.sync import StoreClient
    with StoreClient.in_process() as client: ...

Every name here is its namesake's in client.py and by_tokens.py, with the same arguments and answers. Waits
end when the asynchronous call's own bound does, `GRACE_S` later at the latest (DeadlineExceeded); Ctrl-C
cancels the call. A client may be shared by threads. One call costs two hops between threads, about 0.1 ms.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar

from kvstore import by_tokens, client, merged_watch, session, transaction
from kvstore.answers import Put
from kvstore.errors import DeadlineExceeded
from kvstore.nouns import Epoch, KVLayout, MissReason, NamespaceId, Quality, Revision, ShardId
from kvstore.opening import Opening
from kvstore.topology import Topology

BOUND_S: Final = 600.0
"""For a call that is given no `timeout_s`: those bound themselves, well below."""
GRACE_S: Final = 5.0

Params = ParamSpec("Params")
Answer = TypeVar("Answer")
Inner = TypeVar("Inner")
Outer = TypeVar("Outer")


class _LoopThread:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvstore-sync", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Answer], bound_s: float = BOUND_S) -> Answer:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(bound_s + GRACE_S)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {bound_s:.1f} s: wait longer, or ask for less"
            ) from None
        finally:
            future.cancel()  # of no effect on one that is done


@functools.cache
def _thread_of(_pid: int) -> _LoopThread:
    """One for all clients of a process, as long as it lives: gRPC does not let go of a loop it has seen."""
    return _LoopThread()


class _Blocking(Generic[Inner]):
    """An asynchronous object, and the thread that its calls run on."""

    def __init__(self, thread: _LoopThread, inner: Inner) -> None:
        self._thread = thread
        self._inner = inner


def _call(
    method: Callable[Concatenate[Any, Params], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate[_Blocking[Any], Params], Answer]:
    """The method, waited for."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: Params.args, **kwargs: Params.kwargs) -> Answer:
        return self._thread.run(method(self._inner, *args, **kwargs), _bound_s(kwargs))

    return call


def _makes(
    method: Callable[Concatenate[Any, Params], Coroutine[Any, Any, Inner]],
    outer: Callable[[_LoopThread, Inner], Outer],
) -> Callable[Concatenate[_Blocking[Any], Params], Outer]:
    """What `outer` makes of the method's answer."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: Params.args, **kwargs: Params.kwargs) -> Outer:
        inner = self._thread.run(method(self._inner, *args, **kwargs), _bound_s(kwargs))
        return outer(self._thread, inner)

    return call


def _same(
    method: Callable[Concatenate[Any, Params], Answer],
) -> Callable[Concatenate[_Blocking[Any], Params], Answer]:
    """The method itself: it does not wait."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: Params.args, **kwargs: Params.kwargs) -> Answer:
        return method(self._inner, *args, **kwargs)

    return call


def _each(
    method: Callable[Concatenate[Any, Params], AsyncIterator[Answer]],
) -> Callable[Concatenate[_Blocking[Any], Params], Iterator[Answer]]:
    """The method's items, each waited for."""

    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: Params.args, **kwargs: Params.kwargs) -> Iterator[Answer]:
        items: Any = method(self._inner, *args, **kwargs)
        try:
            while (item := self._thread.run(anext(items, None), _bound_s(kwargs))) is not None:
                yield item
        finally:
            self._thread.run(items.aclose())

    return call


def _entered(
    method: Callable[Concatenate[Any, Params], AbstractAsyncContextManager[Inner]],
    outer: Callable[[_LoopThread, Inner], Outer],
) -> Callable[Concatenate[_Blocking[Any], Params], AbstractContextManager[Outer]]:
    """The method's context, entered and left on the loop; inside it, what `outer` makes of its value."""

    @contextmanager
    @functools.wraps(method)
    def call(self: _Blocking[Any], /, *args: Params.args, **kwargs: Params.kwargs) -> Iterator[Outer]:
        context = method(self._inner, *args, **kwargs)
        inner = self._thread.run(context.__aenter__(), _bound_s(kwargs))
        try:
            yield outer(self._thread, inner)
        except BaseException as error:
            if not self._thread.run(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._thread.run(context.__aexit__(None, None, None))

    return call


def _opened(make: Callable[Params, Opening[client.StoreClient]]) -> Callable[Params, StoreClient]:
    @functools.wraps(make)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> StoreClient:
        thread = _thread_of(os.getpid())
        return StoreClient(thread, thread.run(_awaited(make(*args, **kwargs))))

    return call


def _bound_s(arguments: dict[str, Any]) -> float:
    return float(arguments.get("timeout_s") or arguments.get("for_s") or BOUND_S)


async def _awaited(opening: Opening[client.StoreClient]) -> client.StoreClient:
    return await opening


class Pinned(_Blocking[by_tokens.Pinned]):
    get = _call(by_tokens.Pinned.get)
    renew = _call(by_tokens.Pinned.renew)

    @property
    def n_tokens(self) -> int:
        return self._inner.n_tokens

    @property
    def miss(self) -> MissReason | None:
        return self._inner.miss


class Transaction(_Blocking[transaction.Transaction]):
    put = _call(transaction.Transaction.put)
    commit = _call(transaction.Transaction.commit)
    abort = _call(transaction.Transaction.abort)

    @property
    def committed(self) -> tuple[Put, ...]:
        return self._inner.committed


class Watch(_Blocking[merged_watch.Watch]):
    @property
    def seen(self) -> dict[ShardId, Revision]:
        return self._inner.seen

    def __iter__(self) -> Iterator[merged_watch.WatchEvent]:
        while (event := self._thread.run(anext(self._inner, None))) is not None:
            yield event


class StoreSession(_Blocking[session.StoreSession]):
    put = _call(session.StoreSession.put)
    get = _call(session.StoreSession.get)
    prefetch = _call(session.StoreSession.prefetch)
    announce = _call(session.StoreSession.announce)
    pin = _entered(session.StoreSession.pin, Pinned)
    transaction = _entered(session.StoreSession.transaction, Transaction)
    keys = _same(session.StoreSession.keys)
    match = _call(session.StoreSession.match)
    read = _each(session.StoreSession.read)
    read_into = _call(session.StoreSession.read_into)
    publish = _call(session.StoreSession.publish)
    renew = _call(session.StoreSession.renew)
    release = _call(session.StoreSession.release)

    @property
    def namespace(self) -> NamespaceId:
        return self._inner.namespace

    @property
    def layout(self) -> KVLayout:
        return self._inner.layout

    @property
    def min_quality(self) -> Quality:
        return self._inner.min_quality

    @property
    def epoch(self) -> Epoch:
        return self._inner.epoch


class StoreClient(_Blocking[client.StoreClient]):
    in_process = staticmethod(_opened(client.StoreClient.in_process))
    connect_to = staticmethod(_opened(client.StoreClient.connect_to))
    connect_running = staticmethod(_opened(client.StoreClient.connect_running))
    open = _makes(client.StoreClient.open, StoreSession)
    register_epoch = _call(client.StoreClient.register_epoch)
    advance_epoch = _call(client.StoreClient.advance_epoch)
    epochs = _call(client.StoreClient.epochs)
    try_status = _call(client.StoreClient.try_status)
    try_namespaces = _call(client.StoreClient.try_namespaces)
    namespaces = _call(client.StoreClient.namespaces)
    purge = _call(client.StoreClient.purge)
    compact = _call(client.StoreClient.compact)
    status = _call(client.StoreClient.status)
    listing = _each(client.StoreClient.listing)
    watch = _entered(client.StoreClient.watch, Watch)

    @property
    def topology(self) -> Topology:
        return self._inner.topology

    @property
    def counters(self) -> Counter[str]:
        return self._inner.counters

    def close(self) -> None:
        self._thread.run(self._inner.close())

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
