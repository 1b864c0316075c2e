"""Admission policies by name: what is worth a write to the next tier. One policy is one file."""

from __future__ import annotations

from typing import Final

from kvstore.core.seams import MakeAdmission
from kvstore.policies.admission.always import Always
from kvstore.policies.admission.predicted_reuse import PredictedReuse
from kvstore.policies.admission.second_use import SecondUse

ADMISSIONS: Final[dict[str, MakeAdmission]] = {
    "always": Always,
    "predicted_reuse": PredictedReuse,
    "second_use": SecondUse,
}
