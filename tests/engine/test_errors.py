"""Every error of a model says what to do next, and survives being sent between processes."""

from __future__ import annotations

import copy

import pytest

from engine import errors
from kvstore.errors import KVStrataError

ALL = [kind for name in errors.__all__ if issubclass(kind := getattr(errors, name), errors.ModelError)]


@pytest.mark.parametrize("kind", ALL)
def test_message_holds_problem_and_cure(kind: type[errors.ModelError]) -> None:
    error = kind("the disk is full", "Free some space")
    assert str(error) == "the disk is full. Free some space"
    assert isinstance(error, KVStrataError)


@pytest.mark.parametrize("kind", ALL)
def test_a_copy_by_the_reduce_protocol_is_equal(kind: type[errors.ModelError]) -> None:
    error = kind("a problem", "A cure")
    rebuilt = copy.copy(error)  # the protocol Ray rebuilds exceptions by
    assert (type(rebuilt), rebuilt.problem, rebuilt.cure) == (kind, "a problem", "A cure")


def test_each_kind_but_the_root_has_a_status_of_its_own() -> None:
    statuses = [kind.status for kind in ALL]
    assert len(set(statuses)) == len(ALL)
