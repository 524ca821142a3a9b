"""Canonical names: where a module or parameter sits in the model its author wrote, whatever wraps it today."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: Attribute names under which compile, checkpoint and FSDP wrappers hold the module they wrap.
_WRAPPER_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _is_transparent(parent: nn.Module, attribute: str) -> bool:
    if attribute in _WRAPPER_ATTRIBUTES:
        return True
    return attribute == "module" and isinstance(parent, DistributedDataParallel | DataParallel)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every place a module sits at, as (canonical name, module); a module held twice comes twice."""
    yield prefix, model
    for attribute, child in model._modules.items():
        if child is None:
            continue
        if _is_transparent(model, attribute):
            yield from named_modules(child, prefix)
        else:
            yield from named_modules(child, f"{prefix}.{attribute}" if prefix else attribute)


def join(module_name: str, attribute: str) -> str:
    """The canonical name of a parameter of the module of that name."""
    return f"{module_name}.{attribute}" if module_name else attribute
