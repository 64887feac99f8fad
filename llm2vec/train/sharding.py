"""FSDP2: every process keeps a share of the weights, their gradients and the optimiser's state.

transformers' Trainer and accelerate do the work; here is what they cannot know of a model that stands inside an
objective, and what they would do worse by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from llm2vec.types import UserError


def plan_sharding(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Tell accelerate which modules are gathered one at a time, and in which precision; nothing without `fsdp`.

    The decoder's layers are; what is left (embeddings, final norm, head) is gathered for the whole forward pass, as an
    objective reads those weights directly.

    Raises:
        UserError: the model has no module of the class that is to be gathered by itself.
    """
    plan: dict[str, Any] | None = args.fsdp_plugin_args
    if plan is None:
        return
    names = plan.setdefault("transformer_cls_names_to_wrap", ",".join(sorted(model._no_split_modules or ())))
    missing = set(names.split(",")) - {type(module).__name__ for module in model.modules()}
    if missing:
        raise UserError(
            f"fsdp: {type(model).__name__} has no layers of class {min(missing)!r}; name theirs in fsdp_config as "
            "transformer_layer_cls_to_wrap."
        )
    # By default gradients would be summed in half precision, and the floats that go into the model rounded to it: the
    # step's number of tokens, by which every loss is divided, among them.
    plan["mixed_precision_policy"] = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def shard_on_cpu(accelerator: Accelerator, plan: dict[str, Any]) -> None:
    """Make accelerate shard CPU processes too; it knows FSDP on GPUs only, and would train whole copies instead."""
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plan)
    for state in (PartialState(), accelerator.state):  # each has its own record, and the first one's is copied over
        state.distributed_type = DistributedType.FSDP


def state_of_model(state: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The part of an objective's gathered state that is its model's, under the model's own names.

    Weights that are tied come as copies; here they are one tensor again, so that they are written once.
    """
    prefix = "model."
    own = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    tied: dict[str, str] = model.all_tied_weights_keys or {}
    return own | {name: own[source] for name, source in tied.items() if source in own}


def own_share(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state as `state_dict` gives it, with this process's share of every tensor in place of it."""
    state = optimizer.state_dict()
    shares = {
        i: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": shares}


def load_own_share(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put back what `own_share` took from an optimiser over the same weights, spread over as many processes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole = {
        i: {name: _spread_like(parameters[i], value) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": whole})


def _spread_like(parameter: Any, value: Any) -> Any:
    """A process's share of a tensor that has the parameter's form; anything else as it is."""
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor)):
        return value
    if value.dim() == 0 or value.shape != parameter.to_local().shape:
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
