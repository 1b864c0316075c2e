"""What the live service counted, read from its /metrics as any scraper would."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

SCRAPE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Figures:
    verified_blocks: int
    rejected: dict[str, int]  # by reason
    ownerless_bytes: int


def read_figures(client: httpx.Client) -> Figures:
    """Raises httpx.HTTPError, or RuntimeError for a metric that is not there."""
    response = client.get("/metrics", timeout=SCRAPE_TIMEOUT_S)
    response.raise_for_status()
    return parse_figures(response.text)


def parse_figures(text: str) -> Figures:
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
    rejected = {
        sample.labels["reason"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "kvstrata_rejected_blocks_total"
    }
    try:
        return Figures(
            verified_blocks=int(samples["kvstrata_verified_blocks_total"]),
            rejected=rejected,
            ownerless_bytes=int(samples["kvstrata_ownerless_bytes"]),
        )
    except KeyError as error:
        raise RuntimeError(f"the service's /metrics has no {error.args[0]}") from None
