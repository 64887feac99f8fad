"""Memory of a training process by part, before anything loads: weights, gradients, optimiser state, activations, ...

`most` is what tensors take at the worst of these moments: after the forward pass, when all activations are there; while
the backward pass goes through one of the decoder's passes, when those of the passes before it are still there; and at
its end, when all gradients are. A weight that two passes use gets its gradient from both at once, so that of the pass
that is differentiated first waits. Not counted: the libraries themselves, and what an allocator keeps for later (on
CUDA 1 to 2 GB, and some per cent).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from llm2vec.model.packing import inner_decoder
from llm2vec.objectives.head import language_head
from llm2vec.objectives.losses import rows_of_a_block
from llm2vec.planning.activations import Numbers, frozen_form, kept_by_a_layer, kept_by_pass, working
from llm2vec.types import Pass

#: Optimiser (`optim`) -> numbers of state for each trained weight, and the bytes of one; None = those of the weight.
#: One that is not here is counted as AdamW, and that is said.
STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "stable_adamw": (2, None), "sgd": (0, None),
    "adafactor": (0, None), "adagrad": (1, None), "rmsprop": (1, None), "lion_32bit": (1, 4), "lion_8bit": (1, 1),
    "adamw_8bit": (2, 1), "adamw_bnb_8bit": (2, 1),
}  # fmt: skip

#: Blocks of logits whose gradients a half-precision loss joins before it multiplies them with the states.
_BLOCKS_JOINED = 4


class Step(NamedTuple):
    """What a process has in hand in an optimiser step."""

    passes: tuple[Pass, ...]  #: of a sample of rows
    scale: float  #: how many times the sample the largest micro-batch is
    num_recomputed: int  #: how many layers are recomputed, the first ones
    #: whether there are several micro-batches, so that gradients of others are there already.
    accumulates: bool
    #: that a contrastive loss compares: of this process, and documents of all processes.
    texts: tuple[int, int] | None = None


class Part(NamedTuple):
    """What takes memory, its bytes, and what else there is to say."""

    name: str
    size: float
    note: str = ""


class Memory(NamedTuple):
    """What a process holds."""

    parts: tuple[Part, ...]  #: one by one; not all of them at the same time
    most: float  #: bytes held at once


def memory_of(model: Any, args: TrainingArguments, numbers: Numbers, step: Step, num_processes: int) -> Memory:
    """The account of one of `num_processes` that share a step, and with `fsdp` the weights; arguments as elsewhere."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    shares = num_processes if args.fsdp else 1
    state = sum(optimiser_bytes(weight, args) for weight in trained) / shares
    gradients = Part("gradients", _size(trained) / shares)
    always = [
        Part("weights", (_size(model.parameters()) - _saved_by_few_bits(model, numbers)) / shares),
        Part("optimiser state", state, optimiser_name(args)),
        *_between_processes(model, args, numbers, gradients.size, num_processes),
    ]
    if any(p.kind != "trained" for p in step.passes) and all(weight.requires_grad for weight in _matrices(model)):
        always.append(Part("frozen decoder", _size(model.parameters()), "a copy of what the run starts from"))
    if step.texts is not None:  # as embedded and joined, and as unit vectors with their gradients
        own, documents = step.texts
        size = model.config.hidden_size * (own * (2 * numbers.stream + 3 * 4) + documents * 2 * 4)
        always.append(Part("vectors", float(size), "of the texts that the loss compares"))
    num_targets = step.scale * sum(p.targets for p in step.passes if p.kind != "read")
    copies, loss = _copies(model, numbers, step), _loss(model, numbers, step, math.ceil(num_targets))
    recomputes_all = step.num_recomputed == len(inner_decoder(model).layers)
    kept, at_work = [], []
    for p in step.passes:
        kept.append(step.scale * kept_by_pass(model, numbers, p, step.num_recomputed))
        run = model if p.kind == "trained" else frozen_form(model)
        again = kept_by_a_layer(run, numbers, p) if recomputes_all and p.kind != "read" else 0.0
        at_work.append(step.scale * (working(run, numbers, p) + again))
    targets = num_targets * model.config.hidden_size * numbers.compute
    moments = [copies.size + sum(kept) + targets + loss.size]
    beside = _table(model, tied=True) + (0 if recomputes_all else copies.size)
    # Gradients of the pass that is differentiated first, which wait for the others'; under FSDP not yet shared out.
    of_layers = [weight for weight in inner_decoder(model).layers.parameters() if weight.requires_grad]
    waiting = float(sum(w.numel() * (numbers.compute if args.fsdp else w.itemsize) for w in of_layers))
    for i in reversed(range(len(kept))):
        waits = any(p.kind == "trained" for p in step.passes[i + 1 :])
        moments.append(beside + waits * waiting + sum(kept[: i + 1]) + at_work[i])
    before = gradients.size if step.accumulates else 0.0
    most = max(before + max(moments), gradients.size + _table(model) + _table(model, tied=True))
    passing = (gradients, copies, Part("activations", sum(kept) + targets), Part("a layer at work", max(at_work)), loss)
    return Memory((*always, *passing), sum(part.size for part in always) + most)


def _saved_by_few_bits(model: Any, numbers: Numbers) -> float:
    frozen = [weight for weight in _matrices(model) if not weight.requires_grad]
    return 0.0 if numbers.bits is None else sum(w.nbytes - w.numel() * numbers.bits / 8 for w in frozen)


def _size(weights: Iterable[Tensor]) -> float:
    return float(sum(weight.nbytes for weight in weights))


def optimiser_name(args: TrainingArguments) -> str:
    """As a config writes it."""
    return str(OptimizerNames(args.optim).value)


def optimiser_bytes(weight: Tensor, args: TrainingArguments) -> float:
    """Bytes of an optimiser's state for a weight."""
    name = optimiser_name(args)
    numbers, size = STATES.get(name, STATES["adamw_torch"])
    if name == "stable_adamw" and "kahan_sum=True" in (args.optim_args or "") and weight.itemsize == 2:
        numbers += 1
    return float(numbers * weight.numel() * (size or weight.itemsize))


def _between_processes(
    model: Any, args: TrainingArguments, numbers: Numbers, gradients: float, num_processes: int
) -> list[Part]:
    """What several processes hold to train one model."""
    if num_processes == 1:
        return []
    if not args.fsdp:
        return [Part("buckets", gradients, "in which gradients travel (DDP)")]
    layers = inner_decoder(model).layers
    of_layers = sum(weight.numel() for weight in layers.parameters())
    of_tables = sum(weight.numel() for weight in model.parameters()) - of_layers
    keeps = not (args.fsdp_plugin_args or {}).get("reshard_after_forward", True)
    gathered = of_tables + (of_layers if keeps else 2 * of_layers / len(layers))
    return [
        Part("gathered weights", gathered * numbers.compute, "all" if keeps else "tables, and two layers"),
        Part("gathered gradients", 4 * of_tables, "of embeddings and head, in float32"),
    ]


def _copies(model: Any, numbers: Numbers, step: Step) -> Part:
    """Weights cast to half precision: trained ones once, frozen ones in every pass; kept neither by recomputed layers
    nor where nothing is differentiated."""
    matrices = _matrices(model)
    kept = 1 - step.num_recomputed / len(inner_decoder(model).layers)
    trained = sum(weight.numel() for weight in matrices if weight.requires_grad)
    frozen = {"trained": sum(weight.numel() for weight in matrices) - trained, "read": 0}
    if any(p.kind == "frozen" for p in step.passes):
        frozen["frozen"] = sum(weight.numel() for weight in _matrices(frozen_form(model)))
    number = trained + kept * sum(frozen[p.kind] for p in step.passes)
    is_cast = numbers.stream != numbers.compute and numbers.bits is None
    return Part("half-precision weights", number * numbers.compute if is_cast else 0.0, "copies (autocast)")


def _matrices(model: Any) -> list[Tensor]:
    """The weights of the layers' products."""
    return [module.weight for module in inner_decoder(model).layers.modules() if isinstance(module, nn.Linear)]


def _loss(model: Any, numbers: Numbers, step: Step, targets: int) -> Part:
    """A block of logits with its gradients, and the gradient of the vocabulary's matrix, which is summed in float32.
    Beside a teacher, two blocks more: what it says, and its product with the logits."""
    if not targets:
        return Part("logits", 0.0)
    head, capped = model.get_output_embeddings().weight, language_head(model).softcap is not None
    rows = rows_of_a_block(len(head), numbers.device)
    entries, blocks = min(rows, targets) * len(head), min(_BLOCKS_JOINED, math.ceil(targets / rows))
    is_trained = head.requires_grad and any(p.targets and p.kind == "trained" for p in step.passes)
    taught = any(p.kind == "read" for p in step.passes)
    size = 4.0 * entries * (1 + capped + 2 * taught) + (4 * head.numel() if is_trained else 0)
    if numbers.compute == 2:
        size += 2 * entries * blocks * (2 if blocks > 1 else 1)
        size += 2 * head.numel() * ((numbers.stream != numbers.compute) + is_trained)
    return Part("logits", size, f"none held: made {rows:,} positions at a time")


def _table(model: Any, tied: bool = False) -> float:
    """The embeddings' gradient, if they are trained; `tied`: if the head is the same table, whose gradient waits."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is table
    return float(table.nbytes) if table.requires_grad and (is_tied or not tied) else 0.0
