"""TorchTitan 0.3.x's SPMD types: which process holds what of a tensor, checked while a model runs if it is asked to.

The checker knows PyTorch's operators, not ours. So what ours compute is not checked, and their results are declared.
"""

import contextlib

import spmd_types
from spmd_types.runtime import get_partition_spec
from torch import Tensor
from torchtitan.distributed.utils import get_spmd_backend


def checking() -> bool:
    """Whether types are checked: only then have tensors any."""
    return get_spmd_backend() == "spmd_types" and spmd_types.is_type_checking()


def untyped() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is checked, and what is computed has no type."""
    return spmd_types.no_typecheck()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Declares that x is spread over the processes as `other` is, dimension by dimension."""
    if checking():
        spmd_types.assert_type(x, spmd_types.get_local_type(other), get_partition_spec(other))
    return x


def product(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Declares x as `like` does, but as a partial sum over the processes that all have `other` and a part each of the
    dimension of `weight` that was summed over."""
    if checking():
        types = dict(spmd_types.get_local_type(other))
        for axis, held in spmd_types.get_local_type(weight).items():
            if types.get(axis) is spmd_types.R and held is spmd_types.V:
                types[axis] = spmd_types.P
        spmd_types.assert_type(x, types, get_partition_spec(other))
    return x
