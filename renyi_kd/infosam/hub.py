"""Relation modules as folders and as repositories of the Hugging Face Hub, by huggingface_hub.

That package is imported when it is first needed, as it takes longer than the whole library.
"""

from types import new_class
from typing import Any

import torch
from torch import nn

CARD = """---
{{ card_data }}
---

A relation module of InfoSAM ([paper]({{ paper_url }})) for the library renyi_kd.

```python
from renyi_kd import RelationModule

relation = RelationModule.from_pretrained(...)  # the name of this repository
```
"""


def hub_class(kind: type[nn.Module]) -> Any:
    """Return a class of the same modules with the methods of `PyTorchModelHubMixin`.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
    """
    try:
        import safetensors.torch  # noqa: F401 (huggingface_hub works without it until it saves)
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError as error:
        raise ImportError(
            f"`{kind.__name__}` is saved and loaded by huggingface_hub and safetensors, which are "
            f"not both there ({error}). Install them with `pip install 'renyi_kd[hub]'`."
        ) from error
    about = {
        "library_name": "renyi_kd",
        "tags": ["infosam"],
        "paper_url": "https://arxiv.org/abs/2505.21920",
        "model_card_template": CARD,
    }
    return new_class(kind.__name__, (PyTorchModelHubMixin, kind), about)


def for_hub(module: nn.Module, config: dict[str, Any]) -> Any:
    """Return an object of `hub_class` that shares everything with a module.

    Args:
        module: the module.
        config: the arguments that build another one like it.

    Raises:
        ValueError: another one that is built by `config` could not load the weights.
    """
    with torch.device("meta"):
        expected = shapes_of(type(module)(**config))
    own = shapes_of(module)
    if own != expected:
        names = ", ".join(sorted({name for name, _ in own.items() ^ expected.items()}))
        raise ValueError(
            f"`{type(module).__name__}` with {config} must have the parameters that it was built "
            f"with, got others ({names}). Remove what was added, for instance by "
            f"torch.nn.utils.parametrize.remove_parametrizations."
        )
    kind = hub_class(type(module))
    shared = kind.__new__(kind)
    shared.__dict__ |= module.__dict__
    shared._hub_mixin_config = config
    return shared


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of what a module is saved as, by name; of shared tensors only one."""
    state = module.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name].shape for name in names.values()}


def from_hub(kind: type[nn.Module], name: str, **options: Any) -> Any:
    """Return a module of just this class from a folder or a repository; see `hub_class`."""
    module = hub_class(kind).from_pretrained(name, **{"strict": True, **options})
    # So that it can be pickled and copied like any other: nobody else knows the other class.
    module.__class__ = kind
    del module._hub_mixin_config
    return module
