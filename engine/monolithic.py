"""One process, no store: the reference that the disaggregated service must equal token for token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from engine.engine import Engine
from engine.types import GenerationRequest

__all__ = ["generate", "generate_all"]


def generate(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    """`generate_all` for one request."""
    return generate_all(engine, [request])[0]


def generate_all(
    engine: Engine, requests: Sequence[GenerationRequest], ended: Callable[[int], None] = lambda _: None
) -> list[tuple[int, ...]]:
    """Run the requests to their ends, as many at once as fit; all output tokens of each, those it came with
    included. `ended` hears how many are done.

    Other sequences of the engine go on meanwhile; their events are lost, so give it an idle engine. Raises
    what `Engine.admit` raises, and RuntimeError if a sequence ends in an error.
    """
    outputs = {request.request_id: list(request.output_ids) for request in requests}
    arrivals = {name: arrival for arrival, name in enumerate(outputs)}
    waiting, running = deque(requests), set(outputs)
    while running:
        while waiting and (engine.can_admit(waiting[0]) or not engine.has_work()):
            engine.admit(waiting[0], arrival=arrivals[waiting[0].request_id])
            waiting.popleft()
        result = engine.step()
        waiting.extendleft(result.preempted)  # the last in order left first: the first comes first again
        for event in result.events:
            if event.request_id not in running:
                continue
            if event.error is not None:
                raise RuntimeError(f"request {event.request_id}: {event.error}")
            outputs[event.request_id].append(event.token_id)
            if event.finish is not None:
                running.discard(event.request_id)
                ended(len(outputs) - len(running))
    return [tuple(output) for output in outputs.values()]
