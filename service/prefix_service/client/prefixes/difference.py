"""Compares two prefixes layer by layer. Needs torch."""

from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.prefix.bins import Bins, Shape, rows_of
from prefix_service.prefix.comparison import LayerDifference, comparing, layer_differences, require_same_shape
from prefix_service.prefix.encoder import finished


def differences(first: Prefix, second: Prefix) -> list[LayerDifference]:
    """Returns the differences of two prefixes, in the order of their layers.

    Raises:
        InvalidRequest: they differ in the number of layers, heads or tokens, or in the head size.
    """
    one, other = first.kv.tensor, second.kv.tensor
    shape = Shape.of(one)
    require_same_shape(shape, Shape.of(other))
    sums = finished(comparing(shape, rows_of(one), rows_of(other)))
    return layer_differences(sums, Bins(shape.layers, 1), first.kv.layers[0])
