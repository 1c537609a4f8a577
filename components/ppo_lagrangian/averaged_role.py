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
        for name, parameter in self._backbone.role_state(self._role).items():
            self._sums[name] = self._sums[name] + parameter if name in self._sums else parameter
        self._count += 1

    def put_in_place(self) -> None:
        """Give the role the mean of what was taken; nothing where nothing was. All ranks call."""
        if self._count:
            self._backbone.set_role_state(self._role, {name: s / self._count for name, s in self._sums.items()})

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's moments, and the sums."""
        sums = {f"{_SUM}{name}": tensor for name, tensor in self._sums.items()}
        return self._training.moments() | sums | {_COUNT: torch.tensor(float(self._count))}

    def load(self, parameters: Sequence[Tensor], moments: Mapping[str, Tensor]) -> None:
        own = {name: m for name, m in moments.items() if name == _COUNT or name.startswith(_SUM)}
        self._training.load(parameters, {name: m for name, m in moments.items() if name not in own})
        self._count = int(own.pop(_COUNT))
        sums = {name.removeprefix(_SUM): tensor for name, tensor in own.items()}
        shapes = self._backbone.role_shapes(self._role) if self._count else {}
        if {name: tensor.shape for name, tensor in sums.items()} != shapes:
            raise ValueError(f"the sums of {self._role!r} are of other shapes than its parameters")
        self._sums = {name: tensor.cpu() for name, tensor in sums.items()} if distributed.world().is_main else {}
