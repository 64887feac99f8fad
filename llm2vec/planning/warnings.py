"""What a user should know of a run before it starts; `warnings_of` yields a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SaveStrategy

from llm2vec.model.packing import can_pack
from llm2vec.planning.memory import STATES, optimiser_name
from llm2vec.planning.plan import Plan
from llm2vec.train.resume import check_writable
from llm2vec.train.rows import sample_of
from llm2vec.train.run import Schedule
from llm2vec.types import UserError

#: Share of the texts that are cut, and of a source's rows that an epoch leaves out, from which on a plan warns.
LARGE_SHARE = 0.1
#: Share of a card's memory from which on a plan warns: what is not counted needs the rest.
FULL = 0.9


def warnings_of(plan: Plan) -> Iterator[str]:
    """What a user should know before the run starts."""
    for adapter in plan.absent:
        yield f"the adapter {adapter} is not there; merged, it changes no shape, but the run needs it."
    yield from _of_the_schedule(plan)
    yield from _of_the_rows(plan)
    yield from _of_the_numbers(plan)
    yield from _of_the_memory(plan)
    yield from _of_the_output(plan)


def _of_the_schedule(plan: Plan) -> Iterator[str]:
    schedule = plan.schedule
    if schedule is None:
        return
    warm_up = plan.args.get_warmup_steps(schedule.horizon)
    if warm_up >= schedule.steps:
        yield f"warm-up takes {warm_up:,} steps and the run {schedule.steps:,}: it never reaches its learning rate."
    elif schedule.steps < schedule.horizon:
        share = learning_rate_share(plan, schedule, schedule.steps)
        at = "" if share is None else f" at {share:.0%} of its learning rate"
        yield (
            f"the schedule is for {schedule.horizon:,} steps, but the run stops after {schedule.steps:,}{at} "
            "(stop_after_n_steps); max_steps shortens the schedule, too."
        )


def learning_rate_share(plan: Plan, schedule: Schedule, step: int) -> float | None:
    """Which share of the learning rate a step has; None = that depends on the run."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(
        plan.args.lr_scheduler_type,
        optimiser,
        num_warmup_steps=plan.args.get_warmup_steps(schedule.horizon),
        num_training_steps=schedule.horizon,
        scheduler_specific_kwargs=dict(plan.args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
    )
    return float(scheduler.lr_lambdas[0](step)) if isinstance(scheduler, LambdaLR) else None


def _of_the_rows(plan: Plan) -> Iterator[str]:
    config, rows = plan.config, plan.rows
    if plan.rows is not None and plan.collate is not None and plan.collate.cut_at is not None:
        lengths = [len(row.ids) for row in plan.collate.all_rows(sample_of(plan.rows))]
        share = sum(length >= plan.collate.cut_at for length in lengths) / len(lengths)
        if share >= LARGE_SHARE:
            yield f"{share:.0%} of the texts are cut at max_seq_length {config.max_seq_length}."
    longest = max(max(texts.tokens_of_rows) for texts in plan.by_source)
    if longest > (config.tokens_per_microbatch or longest):
        yield (
            f"tokens_per_microbatch is {config.tokens_per_microbatch:,}, but there are rows of {longest:,} tokens with "
            "all their texts; a row is not cut in two, so memory is what such a row needs."
        )
    if plan.order is not None and rows is not None:
        block = plan.order.block_size
        for source, size in zip(rows.sources, rows.sizes, strict=True):
            if size % block >= LARGE_SHARE * size:
                left = f"{size % block:,} of {source.name}'s {size:,} rows"
                yield f"{left} are left out of an epoch, others each time, as they fill no batch of {block:,}."
    if plan.objective.contrasts and plan.args.gradient_accumulation_steps > 1:
        yield (
            f"accumulation over {plan.args.gradient_accumulation_steps} micro-batches adds no negatives; a larger "
            "per_device_train_batch_size does, and with tokens_per_microbatch takes no more memory."
        )
    symmetric = [s.name for s in rows.sources if any(i.symmetric and i.text for i in s.instructions)] if rows else []
    if symmetric and plan.objective.contrasts and not config.mask_false_negatives:
        yield (
            f"batches come from one source, and in {', '.join(symmetric)} queries and documents are texts of one kind, "
            "so a batch may hold copies of a query's positive as its negatives; mask_false_negatives leaves them out."
        )
    if config.num_eval_rows and plan.args.eval_strategy == "no":
        yield f"num_eval_rows holds {config.num_eval_rows} rows of each source back, but eval_strategy is no."


def _of_the_numbers(plan: Plan) -> Iterator[str]:
    args = plan.args
    halves = any(weight.requires_grad and weight.itemsize == 2 for weight in plan.model.parameters())
    if halves and "kahan_sum=True" not in (args.optim_args or ""):
        yield (
            "weights are trained in half precision, in which AdamW loses updates that are small beside their weight; "
            'torch_dtype float32 with bf16 does not, nor does optim stable_adamw with "kahan_sum=True" (optim_args).'
        )
    if plan.conditions.card is not None and plan.numbers.compute == 4:
        yield "products are computed in float32; bf16 makes them several times as fast on this card."


def _of_the_memory(plan: Plan) -> Iterator[str]:
    config, card = plan.config, plan.conditions.card
    if plan.memory is None:
        yield f"memory is not known for {type(plan.model).__name__}: its layers are not made as Llama's are."
        return
    if optimiser_name(plan.args) not in STATES:
        yield f"the state of optim {optimiser_name(plan.args)} is counted as AdamW's."
    if config.compilation is not None:
        yield "compiled layers keep less than what is counted here."
    if not can_pack(plan.model, config.max_seq_length):
        yield "the model cannot be packed (capped scores, sinks, a short window, recurrence): padding takes more."
    if card is None or plan.memory.most <= FULL * card.memory_gb * 1e9:
        return
    fits = "fills" if plan.memory.most <= card.memory_gb * 1e9 else "does not fit"
    advice = ["fsdp shares the weights among processes"] if not (config.use_peft or plan.args.fsdp) else []
    if config.tokens_per_microbatch is None:
        advice.append("tokens_per_microbatch runs fewer tokens at once")
    elif config.activation_memory_gb is None and config.checkpointing is None:
        advice.append("a smaller tokens_per_microbatch or activation_memory_gb leaves less to keep")
    yield f"{plan.memory.most / 1e9:.1f} GB {fits} {card.name}'s {card.memory_gb:g} GB" + (
        f"; {', '.join(advice)}." if advice else "."
    )


def _of_the_output(plan: Plan) -> Iterator[str]:
    output, args = plan.config.output_dir, plan.args
    try:
        check_writable(output)
    except UserError as error:  # no refusal: the run may be for another machine
        yield str(error)
    if output.is_dir() and any(output.iterdir()):
        yield (
            f"{output} is there: an earlier run's checkpoints in it are removed, its files written over (resume)."
            if plan.config.resume == "never"
            else f"{output} is there: the same run goes on from it or, finished, ends at once; another one is refused."
        )
    if args.save_only_model or args.save_strategy == SaveStrategy.NO:
        yield "no checkpoint holds the optimiser's state (save_only_model, save_strategy): a run cut short starts anew."
