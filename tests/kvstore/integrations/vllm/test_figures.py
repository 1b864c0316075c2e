"""What is counted and timed survives the way to vLLM's logger and metrics: merged, reduced, taken once."""

from __future__ import annotations

import threading

from kvstore.integrations.vllm.figures import Figures, empty, is_empty, merged, reduced


def test_counts_of_two_threads_are_all_there_once() -> None:
    figures = Figures()

    def count() -> None:
        for _ in range(500):
            figures.count("hits")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = figures.take()
    assert taken is not None
    assert taken["counters"] == {"hits": 2_000}
    assert figures.take() is None


def test_intervals_and_workers_add_up() -> None:
    one, other = Figures(), Figures()
    one.count("hits", 2)
    one.took("lookup", 0.010)
    other.count("hits")
    other.count("miss:absent")
    other.took("lookup", 0.030)
    both = merged(one.take() or empty(), other.take() or empty())
    assert both["counters"] == {"hits": 3, "miss:absent": 1}
    assert both["seconds"] == {"lookup": [2, 0.040, 0.030]}
    assert reduced(both) == {"hits": 3, "miss:absent": 1, "lookup_ms_mean": 20.0, "lookup_ms_max": 30.0}
    assert merged(both, {}) == both
    assert is_empty({})
    assert not is_empty(both)
