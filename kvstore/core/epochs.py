"""Epochs: which weights a number of a model stands for, and which number is current.

A binding is for ever (within this incarnation): equal numbers mean equal weights to everything above.
Advancing writes one integer, whatever the cache holds; who must go first is asked when room is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.errors import EpochConflict, EpochUnknown, OverLimit
from kvstore.nouns import Epoch, WeightsDigest


@dataclass(slots=True)
class ModelEpochs:
    bound: dict[int, WeightsDigest] = field(default_factory=dict)
    current: int = 0  # the first one registered, until another is advanced to


class EpochTable:
    def __init__(self, models_max: int, epochs_max: int) -> None:
        self._models: dict[str, ModelEpochs] = {}
        self._models_max = models_max
        self._epochs_max = epochs_max

    def register(self, model_id: str, epoch: Epoch) -> None:
        """Bind a number to weights. Idempotent. Raises EpochConflict when it is bound to others."""
        model = self._models.get(model_id)
        if model is None:
            model = self._new_model(model_id, epoch.number)
        bound = model.bound.get(epoch.number)
        if bound is None and len(model.bound) >= self._epochs_max:
            raise OverLimit(f"{len(model.bound)} epochs of {model_id} are registered: raise epochs_max")
        if bound is not None and bound != epoch.weights_digest:
            raise EpochConflict(
                f"epoch {epoch.number} of {model_id} is bound to weights {bound.hex()}, not to "
                f"{epoch.weights_digest.hex()}: take the next number for new weights"
            )
        model.bound[epoch.number] = epoch.weights_digest

    def advance(self, model_id: str, number: int) -> bool:
        """Make a registered epoch the current one. False when it is already, or a later one is.

        Epochs never go back: old weights that return are a new epoch, with a number of its own.
        """
        model = self._models.get(model_id)
        if model is None or number not in model.bound:
            raise EpochUnknown(
                f"epoch {number} of {model_id} is not registered: register it with its weights"
            )
        if number <= model.current:
            return False
        model.current = number
        return True

    def is_registered(self, model_id: str, epoch: Epoch) -> bool:
        model = self._models.get(model_id)
        return model is not None and model.bound.get(epoch.number) == epoch.weights_digest

    def lag(self, model_id: str, number: int) -> int:
        """How many numbers behind the model's current epoch; 0 for it and for those to come."""
        model = self._models.get(model_id)
        return 0 if model is None else max(0, model.current - number)

    def _new_model(self, model_id: str, number: int) -> ModelEpochs:
        if len(self._models) >= self._models_max:
            raise OverLimit(f"{len(self._models)} models have epochs on this shard: raise models_max")
        model = self._models[model_id] = ModelEpochs(current=number)
        return model
