"""What every network that is traced has: its component's ports, and the names of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Config = Mapping[str, Any]


class Network(torch.nn.Module):
    """A network that takes and returns its component's ports in order.

    Attributes:
        prefix: what its parameters' names carry beyond their names in a checkpoint.
        config: the whole configuration, defaults filled in.
        mode: the mode under which its parameters have shapes but no values.
    """

    prefix = ""
    config: Config
    mode: FakeTensorMode

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight that a checkpoint must hold, by its name there."""
        state = self.state_dict()
        return {name.removeprefix(self.prefix): tuple(t.shape) for name, t in state.items()}

    def tied(self) -> list[tuple[str, ...]]:
        """The names of parameters that are one and the same tensor, in groups."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name.removeprefix(self.prefix))
        return [tuple(names) for names in groups.values() if len(names) > 1]
