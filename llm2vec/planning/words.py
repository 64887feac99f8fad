"""A plan in words: what the run itself says at its start, line for line, and what only a plan tells.

The first lines come from the same functions as the run's (`training.run.describe`), so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from transformers.trainer_utils import SaveStrategy

from llm2vec.model.packing import can_pack
from llm2vec.planning.memory import STATES, optimiser_bytes, optimiser_name
from llm2vec.planning.plan import Plan
from llm2vec.table import Cell, Table
from llm2vec.training.resume import check_writable
from llm2vec.training.rows import sample_of
from llm2vec.training.run import describe, describe_rows, describe_tokens
from llm2vec.types import UserError

#: Share of the texts that are cut, and of a source's rows that an epoch leaves out, from which on a plan warns.
LARGE_SHARE = 0.1
#: Share of a card's memory from which on a plan warns: what is not counted needs the rest.
FULL = 0.9
#: What makes full training smaller on a card that is alone.
ONE_CARD = "optim adamw_8bit, torch_dtype bfloat16 or LoRA take less"


def report(plan: Plan) -> list[str]:
    """All that a plan has to say, line by line."""
    lines = [*as_the_run_says(plan), *_work(plan), *_memory(plan), _disk(plan)]
    return lines + [f"warning     {warning}" for warning in warnings_of(plan)]


def tables_of(plan: Plan) -> list[Table]:
    """The numbers of a plan for programs, unrounded: figures of the run, bytes by part, and the warnings."""
    work = ["steps", "tokens a step", "useful operations a step", "seconds"]
    figures: list[list[Cell]] = [
        [name, None if value is None else float(value)]
        for name, value in zip(work, [plan.steps, plan.tokens_a_step, plan.flops_a_step, _seconds(plan)], strict=True)
    ]
    parts = [] if plan.memory is None else [(part.name, part.size) for part in plan.memory.parts if part.size]
    most = [] if plan.memory is None else [("at most, at once", plan.memory.most)]
    return [
        Table(["Figure", "Value"], figures, "Plan"),
        Table(["Part", "Bytes"], [[name, float(size)] for name, size in [*parts, *most]], "Memory of a process"),
        Table(["Warning"], [[warning] for warning in warnings_of(plan)], "Warnings"),
    ]


def as_the_run_says(plan: Plan) -> list[str]:
    """The lines that the run would print at its start; those that need rows are left out where there are none."""
    template, rows = plan.settings.template, [f"assumed     {plan.assumption}"]
    tokens = f"about {plan.tokens_a_step:,.0f} a step"
    if plan.rows is not None and plan.collate is not None:
        assert plan.order is not None
        template, rows = template or "open", describe_rows(plan.rows, plan.order)
        tokens = describe_tokens(plan.rows, plan.collate, plan.rows_a_step)
    template = template or "not known before the tokenizer is there"
    processes = plan.conditions.num_processes
    return describe(plan.config, plan.args, plan.objective, template, rows, tokens, plan.schedule, processes)


def _work(plan: Plan) -> Iterator[str]:
    """Tokens and operations of the run, and how long they take."""
    number, of = (1, "a step") if plan.steps is None else (plan.steps, f"in {plan.steps:,} steps")
    flops = number * plan.flops_a_step
    yield f"work        {number * plan.tokens_a_step:.3g} tokens and {flops:.3g} useful operations {of}"
    card, conditions = plan.conditions.card, plan.conditions
    seconds, peak = _seconds(plan), _peak(plan)
    if card is None or seconds is None:
        return
    time = f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    yield (
        f"time        about {time} {of} on {conditions.num_processes} x {card.name} ({peak:g} TFLOP/s each) at a "
        f"utilisation of {conditions.utilisation:.0%}"
    )


def _peak(plan: Plan) -> float | None:
    """TFLOP/s of the card in the run's precision; None where there is no card, or it is not known."""
    if (card := plan.conditions.card) is None:
        return None
    in_float32 = card.tflops_tf32 if plan.args.tf32 else card.tflops_float32
    return card.tflops if plan.numbers.compute == 2 else in_float32


def _seconds(plan: Plan) -> float | None:
    """Of the run, or of a step where its steps are not known; None without a card's speed."""
    conditions, peak = plan.conditions, _peak(plan)
    if peak is None:
        return None
    flops = (plan.steps or 1) * plan.flops_a_step
    return flops / (conditions.num_processes * peak * 1e12 * conditions.utilisation)


def _memory(plan: Plan) -> Iterator[str]:
    """The account of a process."""
    if plan.memory is None:
        return
    yield "memory      of a process (GB = 10^9 bytes):"
    for part in filter(lambda part: part.size, plan.memory.parts):
        note = plan.recomputation if part.name == "activations" else part.note
        yield f"            {part.name:<22} {in_bytes(part.size):>12}" + (f"  {note}" if note else "")
    card = plan.conditions.card
    yield f"            {'at most, at once':<22} {in_bytes(plan.memory.most):>12}" + (
        "" if card is None else f"  of {card.memory_gb:g} GB ({card.name})"
    )


def in_bytes(size: float) -> str:
    """A number of bytes in words: of a model of the quickstart's size, gigabytes would say nothing."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _disk(plan: Plan) -> str:
    """What the checkpoints take."""
    trained = [weight for weight in plan.model.parameters() if weight.requires_grad]
    weights = sum(w.nbytes for w in (trained if plan.config.use_peft else plan.model.parameters()))
    state = 0.0 if plan.args.save_only_model else sum(optimiser_bytes(weight, plan.args) for weight in trained)
    number, one, last = num_checkpoints(plan), in_bytes(weights + state), in_bytes(weights)
    if number is None:
        return f"disk        {one} a checkpoint, {last} at the end"
    total = in_bytes(number * (weights + state) + weights)
    return f"disk        {total}: {number} checkpoint(s) of {one}, and {last} at the end"


def num_checkpoints(plan: Plan) -> int | None:
    """How many checkpoints lie in the output folder at the end; None = not known."""
    args, steps, schedule = plan.args, plan.steps, plan.schedule
    horizon = None if schedule is None else schedule.horizon
    if args.save_strategy == SaveStrategy.NO:
        number = 0
    elif args.save_strategy == SaveStrategy.STEPS and steps is not None and (horizon or args.save_steps >= 1):
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * (horizon or 0))
        number = int(steps // every)
        number += steps == horizon and steps % every > 0  # the schedule's last step is saved in any case
    elif args.save_strategy == SaveStrategy.EPOCH and schedule is not None and schedule.an_epoch:
        number = math.ceil(schedule.steps / schedule.an_epoch)
    else:
        return None
    return min(number, args.save_total_limit or number)


def warnings_of(plan: Plan) -> Iterator[str]:
    """What a user should know before the run starts, a sentence each."""
    for adapter in plan.absent:
        yield f"the adapter {adapter} is not there; merged, it changes no shape, but the run needs it."
    schedule, args = plan.schedule, plan.args
    warm_up = 0 if schedule is None else args.get_warmup_steps(schedule.horizon)
    if schedule is not None and warm_up >= schedule.steps:
        yield f"warm-up takes {warm_up:,} steps and the run {schedule.steps:,}: it never reaches its learning rate."
    elif schedule is not None and schedule.steps < schedule.horizon:
        yield (
            f"the schedule is for {schedule.horizon:,} steps, but the run stops after {schedule.steps:,} "
            "(stop_after_n_steps); max_steps shortens the schedule, too."
        )

    yield from _of_the_rows(plan)
    halves = any(weight.requires_grad and weight.itemsize == 2 for weight in plan.model.parameters())
    if halves and "kahan_sum=True" not in (args.optim_args or ""):
        yield (
            "weights are trained in half precision, in which AdamW loses updates that are small beside their weight; "
            'torch_dtype float32 with bf16 does not, nor does optim stable_adamw with "kahan_sum=True" (optim_args).'
        )
    if plan.conditions.card is not None and plan.numbers.compute == 4:
        yield "products are computed in float32; bf16 makes them several times as fast on this card."
    yield from _of_the_memory(plan)
    yield from _of_the_output(plan)


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
        for source, size, taken, block in zip(
            rows.sources, rows.sizes, plan.order.taken, plan.order.filled, strict=True
        ):
            if taken == size // block and size % block >= LARGE_SHARE * size:
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
    advice = []
    if not (config.use_peft or plan.args.fsdp):
        several = plan.conditions.num_processes > 1
        advice.append("fsdp shares the weights among processes" if several else ONE_CARD)
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
