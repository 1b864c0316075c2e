"""One process, no store: the reference that the disaggregated service must equal token for token."""

from __future__ import annotations

from engine.engine import Engine
from engine.types import GenerationRequest

__all__ = ["generate"]


def generate(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    """Run `request` to its end; all its output tokens, those it came with included.

    Other sequences of the engine go on meanwhile; their events are lost, so give it an idle engine. Raises
    what `Engine.admit` raises, and RuntimeError if the sequence ends in an error.
    """
    engine.admit(request)
    output = list(request.output_ids)
    while engine.has_work():
        for event in engine.step().events:
            if event.request_id != request.request_id:
                continue
            if event.error is not None:
                raise RuntimeError(f"request {request.request_id}: {event.error}")
            output.append(event.token_id)
            if event.finish is not None:
                return tuple(output)
    raise RuntimeError(f"request {request.request_id} left the engine without an end")
