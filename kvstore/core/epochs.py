"""Epochs: which weights a number of a model stands for, which is current, and what older ones are worth.

A binding is for ever (within this incarnation): equal numbers mean equal weights to everything above. Every
binding has an id, so that a version holds four bytes of it. Advancing writes a few integers, whatever the
cache holds; who must go first is asked when room is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvstore.errors import EpochConflict, EpochUnknown, OverLimit
from kvstore.nouns import Epoch, EpochPolicy, EpochsOfModel

UNBOUND: Final = -1
"""The id of no epoch."""


class Bound(NamedTuple):
    model_id: str
    epoch: Epoch


@dataclass(slots=True)
class ModelEpochs:
    bound: dict[int, int] = field(default_factory=dict)  # number -> id
    current: int = 0  # the first one registered, until another is advanced to
    stale_lag_max: int = 0  # how far back any snapshot may see
    oldest: int = 0  # those below are dropped
    changed: int = 0  # revision of the last change to any of these


_UNKNOWN: Final = ModelEpochs()


class EpochTable:
    def __init__(self, models_max: int, epochs_max: int) -> None:
        self.bound: list[Bound] = []  # by id
        self._models: dict[str, ModelEpochs] = {}
        self._models_max = models_max
        self._epochs_max = epochs_max

    def register(self, model_id: str, epoch: Epoch) -> None:
        """Bind a number to weights. Idempotent. Raises as `check`."""
        self.check(model_id, epoch)
        model = self._models.get(model_id)
        if model is None:
            model = self._models[model_id] = ModelEpochs(current=epoch.number)
        if epoch.number not in model.bound:
            model.bound[epoch.number] = len(self.bound)
            self.bound.append(Bound(model_id, epoch))

    def check(self, model_id: str, epoch: Epoch) -> None:
        """Could it be registered? Binds nothing. Raises EpochConflict when the number is bound to other
        weights, OverLimit when there is no room for another."""
        model = self._models.get(model_id)
        if model is None:
            if len(self._models) >= self._models_max:
                raise OverLimit(f"{len(self._models)} models have epochs on this shard: raise models_max")
            return
        found = model.bound.get(epoch.number)
        if found is not None:
            digest = self.bound[found].epoch.weights_digest
            if digest != epoch.weights_digest:
                raise EpochConflict(
                    f"epoch {epoch.number} of {model_id} is bound to weights {digest.hex()}, not to "
                    f"{epoch.weights_digest.hex()}: take the next number for new weights"
                )
            return
        if len(model.bound) >= self._epochs_max:
            raise OverLimit(f"{len(model.bound)} epochs of {model_id} are registered: raise epochs_max")

    def advance(self, model_id: str, number: int, policy: EpochPolicy, revision: int) -> bool:
        """Make a registered epoch the current one, at a revision. False when that changes nothing.

        Epochs never go back: old weights that return are a new epoch, with a number of its own. What was
        dropped stays dropped.
        """
        model = self._models.get(model_id)
        if model is None or number not in model.bound:
            raise EpochUnknown(
                f"epoch {number} of {model_id} is not registered: register it with its weights"
            )
        if number < model.current:
            return False
        before = model.current, model.stale_lag_max, model.oldest
        model.current = number
        model.stale_lag_max = policy.stale_lag_max
        if policy.drop_older:
            model.oldest = number
        changed = before != (model.current, model.stale_lag_max, model.oldest)
        if changed:
            model.changed = revision
        return changed

    def of(self, model_id: str) -> ModelEpochs:
        """What is known of a model. Read only."""
        return self._models.get(model_id, _UNKNOWN)

    def show(self, model_id: str) -> EpochsOfModel:
        model = self.of(model_id)
        registered = tuple(self.bound[model.bound[number]].epoch for number in sorted(model.bound))
        return EpochsOfModel(registered, model.current, model.stale_lag_max, model.oldest)

    def id_of(self, model_id: str, epoch: Epoch) -> int:
        """UNBOUND when the number is not registered, or with other weights."""
        found = self.of(model_id).bound.get(epoch.number, UNBOUND)
        return found if found != UNBOUND and self.bound[found].epoch == epoch else UNBOUND

    def is_dropped(self, epoch_id: int) -> bool:
        bound = self.bound[epoch_id]
        return bound.epoch.number < self.of(bound.model_id).oldest

    def lag(self, epoch_id: int) -> int:
        """How many numbers behind its model's current epoch; 0 for it and for those to come."""
        bound = self.bound[epoch_id]
        return max(0, self.of(bound.model_id).current - bound.epoch.number)
