"""What a query sees, by the worked example of the module that defines it."""

from __future__ import annotations

import pytest
import torch

from engine.attention.base import hidden_tokens


@pytest.mark.parametrize(
    ("window", "sinks", "query", "seen"),
    [
        (4, 0, 9, [6, 7, 8, 9]),
        (4, 2, 9, [0, 1, 6, 7, 8, 9]),
        (4, 2, 4, [0, 1, 2, 3, 4]),
        (None, 0, 4, [0, 1, 2, 3, 4]),
        (None, 2, 4, [0, 1, 2, 3, 4]),
        (1, 0, 5, [5]),
    ],
)
def test_the_worked_example(window: int | None, sinks: int, query: int, seen: list[int]) -> None:
    hidden = hidden_tokens(torch.tensor([[query]]), torch.arange(12), window, sinks)
    assert (~hidden[0]).nonzero().flatten().tolist() == seen
