"""What a component is: the folder it lies in and its ports, whose sizes a configuration holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sdopt.errors import SourceError
from sdopt.exporters import residuals
from sdopt.passes.base import Role

Kind = Literal["weights", "float32", "int64"]
"""A port's dtype; ``weights`` is whatever dtype the component is exported in."""

SAMPLE_SIZES: Mapping[str, int] = {
    "batch_size": 2,
    "sequence_length": 11,
    "height": 13,
    "width": 23,
    "latent_height": 13,
    "latent_width": 23,
    "sample_height": 99,
    "sample_width": 181,
    # Of what is halved on the way down: 13 and 23, rounded up.
    "height_div_2": 7,
    "width_div_2": 12,
    "height_div_4": 4,
    "width_div_4": 6,
    "height_div_8": 2,
    "width_div_8": 3,
}
"""The dynamic dimensions and the sizes they are traced at.

Those of images and latents are odd: at a latent that is no multiple of 8, diffusers passes every
skip's size to its upsamplers, so the traced graph is right at every size. An image's halved three
times and rounded up are the latent's, as a ControlNet's hint is.
"""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: its name in the graph.
        dims: per axis a dynamic dimension (a key of ``SAMPLE_SIZES``) or the key of the
            component's configuration that holds the size, or one of ``_COMPUTED``, or a number;
            empty for a scalar.
        kind: its dtype.
        needs: what the configuration must say for the port to be there: ``key`` is not null, or
            ``key=value``; empty for a port that always is.
        each: the key of a number of layers: then there is one port before the first and one after
            each, ``name.0`` and so on. Or a key of ``residuals.EACH``, which says the dims too.
    """

    name: str
    dims: tuple[str | int, ...]
    kind: Kind = "weights"
    needs: str = ""
    each: str = ""

    def of(self, config: Mapping[str, Any]) -> tuple[Port, ...]:
        """The ports that this entry of the table means for a configuration: none, one, several.

        Raises:
            SourceError: the configuration does not say how many layers there are.
        """
        key, _, value = self.needs.partition("=")
        found = config.get(key)
        if key and (found != value if value else found is None):
            return ()
        if not self.each:
            return (self,)
        if self.each in residuals.EACH:
            found_dims = residuals.EACH[self.each](config)
            return tuple(
                replace(self, name=self.name + suffix, dims=dims, each="")
                for suffix, dims in found_dims
            )
        count = _size(config, self.each) + 1
        return tuple(replace(self, name=f"{self.name}.{i}", each="") for i in range(count))

    def dynamic_axes(self) -> dict[int, str]:
        """Axis to symbolic name, for the dynamic axes."""
        return {axis: str(dim) for axis, dim in enumerate(self.dims) if dim in SAMPLE_SIZES}

    def sample_shape(self, config: Mapping[str, Any]) -> list[int]:
        """The shape that the port is traced at.

        Raises:
            SourceError: the configuration does not say a size that the port needs.
        """
        return [
            dim if isinstance(dim, int) else SAMPLE_SIZES.get(dim) or _size(config, dim)
            for dim in self.dims
        ]


@dataclass(frozen=True)
class Component:
    """One graph of a bundle and the folder of the pipeline that it is made from.

    Attributes:
        name: its folder in a bundle.
        folder: its folder in a diffusers pipeline.
        role: what it is for.
        class_name: the class of diffusers or transformers that it is built from.
        inputs: in order.
        outputs: in order.
        also: other classes that it may be instead.
        optional: whether a whole pipeline may do without it.
    """

    name: str
    folder: str
    role: Role
    class_name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    also: tuple[str, ...] = ()
    optional: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that it may be."""
        return (self.class_name, *self.also)

    def of(self, config: Mapping[str, Any]) -> Component:
        """The component with the ports that a configuration gives it.

        Raises:
            SourceError: the configuration does not say how many layers there are.
        """
        inputs = tuple(port for entry in self.inputs for port in entry.of(config))
        outputs = tuple(port for entry in self.outputs for port in entry.of(config))
        return replace(self, inputs=inputs, outputs=outputs)


def _time_ids(config: Mapping[str, Any]) -> int:
    """How many numbers XL's ``time_ids`` are: 6 sizes, or the refiner's 4 and a score.

    The refiner is the UNet whose one text encoder gives both the states and the embedding, of
    one width (1280; the base's states are both encoders', 2048).
    """
    embedded = _size(config, "projection_class_embeddings_input_dim")
    five = embedded - 5 * _size(config, "addition_time_embed_dim")
    return 5 if five == _size(config, "cross_attention_dim") else 6


def _text_embeds(config: Mapping[str, Any]) -> int:
    """The width of XL's ``text_embeds``: what is left of the added embedding."""
    embedded = _size(config, "projection_class_embeddings_input_dim")
    return embedded - _time_ids(config) * _size(config, "addition_time_embed_dim")


_COMPUTED: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "2*latent_channels": lambda config: 2 * _size(config, "latent_channels"),
    "time_ids": _time_ids,
    "text_embeds": _text_embeds,
}
"""Sizes that a configuration holds under no key of their own."""


def _size(config: Mapping[str, Any], key: str) -> int:
    value = _COMPUTED[key](config) if key in _COMPUTED else config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(
            f"the configuration's {key} is {value!r}, a positive whole number is needed",
            where="config.json",
            hint="save the pipeline again with the diffusers installed here",
        )
    return value
