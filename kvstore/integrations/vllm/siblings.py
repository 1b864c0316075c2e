"""Whether another connector loads into vLLM's blocks: KV that may be lossy, broken or of other weights.

Under vLLM's MultiConnector a sibling of ours may load for a request, and vLLM does not say so. But a request
that is scheduled has as many tokens computed as vLLM's own cache had when we were asked, and those that we
load: more are a sibling's. (For the one kind of attention that is served here vLLM's own hits are whole
blocks, and all that it rounds afterwards is rounded down; so the comparison is exact.)
"""

from __future__ import annotations

from kvstore.integrations.vllm.requests import StepOutput

__all__ = ["Siblings"]


class Siblings:
    """Of vLLM's scheduler thread; of every request, also of those that the store never sees."""

    def __init__(self) -> None:
        self._accounted: dict[str, int] = {}  # tokens, between being asked and the request's next step

    def asked(self, request_id: str, computed: int) -> None:
        """vLLM's own cache has so many."""
        self._accounted[request_id] = computed

    def loading(self, request_id: str, tokens: int) -> None:
        """We bring so many more."""
        self._accounted[request_id] = self._accounted.get(request_id, 0) + tokens

    def have_loaded(self, request_id: str, computed: int) -> bool:
        """Where it is scheduled with so many computed, or ends."""
        accounted = self._accounted.pop(request_id, None)
        return accounted is not None and computed > accounted

    def have_loaded_in(self, output: StepOutput) -> bool:
        """For any request that this step begins or takes up again."""
        cached = output.scheduled_cached_reqs
        begun = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        if cached.resumed_req_ids:
            both = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            begun += [each for each in both if each[0] in cached.resumed_req_ids]
        return sum(self.have_loaded(request_id, computed) for request_id, computed in begun) > 0
