"""How `transformers` splits a model over ranks: by the plan its own class has, each rank reading its share of the files."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers.distributed import DistributedConfig

from gpu_daemon.errors import LoadFailed

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_MESHES = (("pp", "dp_replicate", "fsdp", "tp"), ("pp", "dp_replicate", "efsdp", "ep"))


def split(name: str, config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What `from_pretrained` is to be told. Raises LoadFailed unless each rank can have as many heads as the others."""
    if ranks == 1:
        return {}
    text = config.get("text_config") or config
    for what in _DIVIDED:
        number = text.get(what, text.get("num_attention_heads"))
        if not isinstance(number, int) or number % ranks:
            raise LoadFailed(f"{name}: its {what} ({number}) cannot be divided among {ranks} ranks")
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks)}


def end_mesh(model: Any) -> None:
    """Ends the process groups that were made to split this one model: a rank has what it is to have, and they hold sockets."""
    for dimensions in _MESHES:
        for group in model._mesh_manager.get_mesh(dimensions).get_all_groups():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
