"""Work on the local devices: a thread for each, results in the order of the items."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # items per device in progress while the oldest result is awaited


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], devices: Sequence[jax.Device]
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, `work(item)`) in order; each call has one of the devices to itself, as its `jax.default_device`.

    With one device it is called in this thread, when the result is requested, and the default device is unchanged.
    """
    if len(devices) == 1:
        for item in items:
            yield item, work(item)
        return
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def on_a_device(item: Item) -> Result:
        device = free.get()
        try:
            with jax.default_device(device):
                return work(item)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(on_a_device, item)))
                if len(pending) > _AHEAD * len(devices):
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        finally:
            for _, future in pending:
                future.cancel()
