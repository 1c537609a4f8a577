"""The mean of a role over a round's last steps.

The last step of a noisy path is off its middle by that step's noise; the mean of a few is less so (stochastic weight
averaging, arXiv 1803.05407).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.role_optimizer import TrainedRole

_SUM, _COUNT = "sum/", "count"


class AveragedRole:
    """A trained role that also sums up its parameters; to a checkpoint, one `TrainedRole`.

    An adapter's two matrices are averaged each by itself, so its product is not quite the mean of products. Rank 0
    holds the sums, whole and in main memory.
    """

    def __init__(self, backbone: Backbone, role: str, training: TrainedRole) -> None:
        self._backbone = backbone
        self._role = role
        self._training = training
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def take(self) -> None:
        """Add the parameters as they are now. All ranks call."""
        taken = self._backbone.role_state(self._role)
        for name, total in self._sums.items():
            taken[name] += total
        self._sums = taken
        self._count += 1

    def put_in_place(self) -> None:
        """Give the role the mean of what was taken since the last time; nothing where nothing was. All ranks call.

        No optimiser step may follow.
        """
        if self._count:
            self._backbone.set_role_state(self._role, {name: s.div_(self._count) for name, s in self._sums.items()})
        self._sums, self._count = {}, 0

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's moments, and the sums if there are any."""
        if not self._count:
            return self._training.moments()
        sums = {f"{_SUM}{name}": tensor for name, tensor in self._sums.items()}
        return self._training.moments() | sums | {_COUNT: torch.tensor(float(self._count))}

    def load(self, parameters: Sequence[Tensor], moments: Mapping[str, Tensor]) -> None:
        sums = {name.removeprefix(_SUM): moment for name, moment in moments.items() if name.startswith(_SUM)}
        count = float(moments[_COUNT]) if _COUNT in moments else 0.0
        shapes = self._backbone.role_shapes(self._role) if count else {}
        if not (count >= 0 and count.is_integer() and {name: s.shape for name, s in sums.items()} == shapes):
            raise ValueError(f"{count} and tensors of other shapes are no sums of {self._role!r}")
        own = {_COUNT, *(f"{_SUM}{name}" for name in sums)}
        self._training.load(parameters, {name: moment for name, moment in moments.items() if name not in own})
        self._count = int(count)
        self._sums = {name: s.clone() for name, s in sums.items()} if distributed.world().is_main else {}
