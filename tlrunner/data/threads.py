"""Work done ahead of time by threads, handed over in order, with a bound on how far ahead.

Threads, not processes: JPEG decoding and resizing release the interpreter lock, and nothing has
to be copied, pickled or forked.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, ahead: int
) -> Generator[Result, None, None]:
    """`map(function, items)`, in order, with up to `ahead` results in the making.

    `items` is drawn in the consuming thread, no earlier than needed. An exception in `function`
    is raised where its result would have come. The threads are gone once the iterator is
    exhausted, closed or collected.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tlrunner-data")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
