"""A plan in words: what the run itself says at its start, line for line, and what only a plan tells.

The first lines come from the same functions as the run's (`train.run.describe`), so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from transformers.trainer_utils import SaveStrategy

from llm2vec.planning.memory import optimiser_bytes
from llm2vec.planning.plan import Plan
from llm2vec.planning.warnings import warnings_of
from llm2vec.train.run import (
    describe,
    describe_model,
    describe_negatives,
    describe_rows,
    describe_steps,
    describe_weights,
    steps_an_epoch,
)


def report(plan: Plan) -> list[str]:
    """All that a plan has to say, line by line."""
    lines = [*as_the_run_says(plan), *_work(plan), *_memory(plan), *_disk(plan)]
    return lines + [f"warning     {warning}" for warning in warnings_of(plan)]


def as_the_run_says(plan: Plan) -> list[str]:
    """The lines that the run would print at its start; those that need rows are left out where there are none."""
    config, args, processes = plan.config, plan.args, plan.conditions.num_processes
    if plan.rows is not None and plan.collate is not None:
        assert plan.order is not None
        steps_per_epoch = steps_an_epoch(args, len(plan.order), processes)
        lines = describe(config, args, plan.model, plan.rows, plan.collate, plan.settings, steps_per_epoch, processes)
    else:
        lines = [
            describe_model(config, plan.settings.template or "not known before the tokenizer is there"),
            f"assumed     {plan.assumption}",
            describe_steps(config, args, plan.schedule),
            describe_rows(args, processes),
            f"tokens      about {plan.tokens_a_step:,.0f} a step",
            *describe_weights(args, plan.model),
            f"output      {config.output_dir}",
        ]
    if plan.objective.contrasts:
        lines.append(describe_negatives(config, args, processes))
    return lines


def _work(plan: Plan) -> Iterator[str]:
    """Tokens and operations of the run, and how long they take."""
    number, of = (1, "a step") if plan.steps is None else (plan.steps, f"in {plan.steps:,} steps")
    flops = number * plan.flops_a_step
    yield f"work        {number * plan.tokens_a_step:.3g} tokens and {flops:.3g} useful operations {of}"
    card, conditions = plan.conditions.card, plan.conditions
    if card is None:
        return
    in_float32 = card.tflops_tf32 if plan.args.tf32 else card.tflops_float32
    peak = card.tflops if plan.numbers.compute == 2 else in_float32
    if peak is None:
        return
    seconds = flops / (conditions.num_processes * peak * 1e12 * conditions.utilisation)
    time = f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    yield (
        f"time        about {time} {of} on {conditions.num_processes} x {card.name} ({peak:g} TFLOP/s each) at a "
        f"utilisation of {conditions.utilisation:.0%}"
    )


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


def _disk(plan: Plan) -> Iterator[str]:
    """What the checkpoints take."""
    trained = [weight for weight in plan.model.parameters() if weight.requires_grad]
    weights = sum(w.nbytes for w in (trained if plan.config.use_peft else plan.model.parameters()))
    state = 0.0 if plan.args.save_only_model else sum(optimiser_bytes(weight, plan.args) for weight in trained)
    number = num_checkpoints(plan)
    one, last = in_bytes(weights + state), in_bytes(weights)
    if number is None:
        yield f"disk        {one} a checkpoint, {last} at the end"
    else:
        total = in_bytes(number * (weights + state) + weights)
        yield f"disk        {total}: {number} checkpoint(s) of {one}, and {last} at the end"


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
