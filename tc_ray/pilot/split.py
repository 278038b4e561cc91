"""ZeRO-3 without a whole model on any rank: each weight is split among the ranks as soon as it is read.

Invariant: rank 0 alone reads weights, one at a time, from maps of the model's files; the others hold their parts. What
DeepSpeed makes of it is what it makes of a model that is whole on every rank. Called by `engine.build_engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tc_ray.models.weights import check_finite


def split_over_ranks(module: nn.Module, settings: Mapping[str, Any], dtype: torch.dtype, where: str) -> None:
    """Split all parameters in `dtype` among the ranks; buffers go to this rank's device (collective).

    module: on the CPU, the same on every rank; mapped weights are read on rank 0 only. settings: DeepSpeed's. where: the
    model's place, for errors. Raises NotFiniteError (on rank 0) that names a weight with a NaN or an infinity.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # as `deepspeed.initialize` does; zero.Init reads the number of ranks before it would
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(), dist_init_required=False, verbose=False
    )
    first: Any = None
    for name, parameter in module.named_parameters():
        if dist.get_rank() == 0:
            whole = parameter.detach().to(dtype, copy=True)
            plain = name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer.", ".")
            check_finite([(plain, whole)], where)
        else:
            whole = torch.empty(parameter.shape, dtype=dtype)
        parameter.data = whole
        del whole
        if first is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=dict(settings), dtype=dtype)
            first = parameter
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    device = get_accelerator().current_device_name()
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
