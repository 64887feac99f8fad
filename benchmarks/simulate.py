"""What a config's training step asks of a GPU, without one: kernels, operations, bytes, memory, and the least time.

    python -m benchmarks.simulate CONFIG --num_processes 8 --card H200 --tokens_query 24 --tokens_document 170
    python -m benchmarks.simulate train_configs/*/*.json --out FILE.json   # a table, the plan's memory beside it
    python -m benchmarks.simulate train_configs/comparison/mistral_7b ...  # Stage I of a comparison's recipes

The project's own step runs over tensors without values (torch's FakeTensorMode; the device is `benchmarks.fakecuda`),
and every kernel is counted with what it reads and writes. What is fused (`model.fused_layers`) is one kernel. The time
is a roofline: each kernel takes as long as its operations or its bytes do at the share of the maker's figures that good
kernels reach; a real step takes 10 to 15 % more. Not seen: what an allocator keeps for later, CUDA's own memory, the
exchange between cards, the host.
"""

from __future__ import annotations

from benchmarks import fakecuda  # before torch

# isort: split
import argparse
import dataclasses
import gc
import json
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.activations import SiLUActivation

from benchmarks.inputs import InHalf
from benchmarks.shapes import SHAPES, shape_for
from llm2vec import llm2vec_q2d_d2q, processes
from llm2vec.cli import run_command
from llm2vec.compare.recipes import read_set
from llm2vec.files import write_json
from llm2vec.model import fused_layers, packed_attention
from llm2vec.model.packing import inner_decoder
from llm2vec.objectives import language_modelling
from llm2vec.planning.gpus import CARDS, Card
from llm2vec.planning.plan import Conditions, Plan, plan_of, shape_of, stage_of
from llm2vec.planning.work import assumed_batch, useful_flops
from llm2vec.table import Table
from llm2vec.training import step
from llm2vec.training.config import Config
from llm2vec.training.config.file import load_config
from llm2vec.training.model import decoder_of, fuses, plan_sharding
from llm2vec.training.recomputation import recompute_first
from llm2vec.types import Batch

#: Bytes a second of a card's memory (the makers' figures).
BANDWIDTH = {"B200": 8e12, "H200": 4.8e12, "H100": 3.35e12, "A100-80GB": 2.04e12, "A100-40GB": 1.56e12}
#: Share of the matrix peak that large products reach: more on older cards, whose memory is fast beside it.
OF_PEAK = {"A100-80GB": 0.80, "A100-40GB": 0.80}
#: The same of other cards, the share of the bandwidth that good kernels reach, and a kernel's least seconds.
OF_OTHER_PEAKS, OF_BANDWIDTH, SHORTEST = 0.68, 0.85, 2.5e-6

#: Operators that move nothing.
_VIEWS = (
    "prim",
    "empty",
    "new_empty",
    "detach",
    "_unsafe_view",
    "view",
    "lift",
    "record_stream",
    "alias",
    "_reshape_alias",
)
#: Operators that touch of a table only the rows they name, so what they give counts twice.
_LOOK_UPS = ("gather", "scatter_add", "index_select", "embedding.default", "index.Tensor")


class Kernels(NamedTuple):
    """Kernels of one kind."""

    number: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Simulation:
    """A step of one process.

    Attributes:
        tokens: of its rows.
        pieces: micro-batches.
        kernels: by phase (`step`, `optimiser`), operator and precision.
        useful: floating-point operations that the step cannot do without.
        peak: most bytes of tensors at once.
        parts: what they were at the peak, by the phase in which they were made.
    """

    tokens: int
    pieces: int
    kernels: dict[tuple[str, str, str], Kernels]
    useful: float
    peak: int
    parts: dict[str, int]

    def total(self, figure: str, *, products: bool | None = None) -> int:
        """The sum of a figure of `Kernels`, of matrix products, of all else (False), or of everything (None)."""
        chosen = [k for k in self.kernels.values() if products is None or bool(k.flops) is products]
        return sum(getattr(k, figure) for k in chosen)

    def seconds(self, card: Card) -> float:
        """The roofline's time on a card."""
        assert card.tflops is not None and card.tflops_float32 is not None
        of_peak = OF_PEAK.get(card.name, OF_OTHER_PEAKS)
        total = 0.0
        for (_, _, precision), k in self.kernels.items():
            peak = card.tflops_float32 if precision == "float32" else card.tflops
            at_work = k.flops / (peak * 1e12 * of_peak), k.bytes / (BANDWIDTH[card.name] * OF_BANDWIDTH)
            total += max(*at_work, k.number * SHORTEST)
        return total

    def utilisation(self, card: Card) -> float:
        """Useful operations, as a share of what the card could do in that time."""
        return self.useful / (self.seconds(card) * float(card.tflops or 0) * 1e12)


class _Tracer(TorchDispatchMode):
    """Counts kernels and live memory of tensors on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        self.phase = "weights"
        self.counts = self.quiet = False  # whether kernels are counted; whether memory is not
        self.total = self.peak = 0
        self.parts: Counter[str] = Counter()
        self._live: dict[int, tuple[int, Any, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if not self.quiet:
            self.hold(out)
            if self.counts:
                self._count(func, (args, kwargs), out)
        return out

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def one_kernel(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that is one kernel: what it makes on the way is never in memory."""
        before, self.quiet = self.quiet, True
        out = function(*arguments)
        self.quiet = before
        if not before:
            self.hold(out)
            read, written = _tensors(arguments), _tensors(out)
            # The gradient of a norm's weight is a sum over tokens, and is taken in a second pass.
            again = sum(t.nbytes for t in read) if "backward" in function.__name__ and arguments[-1] is True else 0
            self._add("fused." + function.__name__, read, 0, sum(t.nbytes for t in read + written) + again)
        return out

    def hold(self, made: Any) -> None:
        """Count the memory of new tensors."""
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
            self._drop(key)
            gone = weakref.ref(storage, partial(self._gone, key))
            self._live[key] = (size, gone, self.phase)
            self.total += size
        if self.total > self.peak:
            if self.total > 1.005 * sum(self.parts.values()):
                self.parts = Counter()
                for size, _, phase in self._live.values():
                    self.parts[phase] += size
            self.peak = self.total

    def resize(self, storage: Any, size: int) -> None:
        """A storage's memory was given back, or taken again (FSDP)."""
        if (held := self._live.get(storage._cdata)) is not None:
            self._live[storage._cdata] = (size, *held[1:])
            self.total += size - held[0]
            self.peak = max(self.peak, self.total)

    def _gone(self, key: int, _: Any) -> None:
        self._drop(key)

    def _drop(self, key: int) -> None:
        if (held := self._live.pop(key, None)) is not None:
            self.total -= held[0]

    def _count(self, func: Any, given: Any, out: Any) -> None:
        name = str(func).removeprefix("aten.")
        read, written = _tensors(given), _tensors(out)
        if not read + written or name.startswith(_VIEWS) or _is_view(func._schema):
            return
        flops = 0
        if name.startswith(("mm", "addmm", "bmm", "baddbmm")):
            left, right = ([t for t in read if t.dim() >= 2][-2:]) if ".out" not in name else read[:2]
            flops = 2 * left.numel() * right.shape[-1]
        unique = {id(t): t for t in read + written}.values()
        moved = 2 * sum(t.nbytes for t in written) if name.startswith(_LOOK_UPS) else sum(t.nbytes for t in unique)
        if name.startswith("scatter_add"):
            moved = 3 * sum(t.nbytes for t in read[1:])
        self._add(name, read, flops, moved)

    def _add(self, name: str, read: Sequence[Tensor], flops: int, moved: int) -> None:
        is_float32 = any(t.dtype == torch.float32 for t in read)
        held = self.kernels[self.phase, name, "float32" if is_float32 else "half"]
        for i, number in enumerate((1, flops, moved)):
            held[i] += number


def _tensors(nested: Any) -> list[Tensor]:
    return [t for t in tree_flatten(nested)[0] if isinstance(t, Tensor) and t.device.type == "cuda"]


def _is_view(schema: Any) -> bool:
    gives_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return gives_view and not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def simulate(plan: Plan, *, fused: bool | None = None, rows: int | None = None) -> Simulation:
    """Run a step of a planned config over tensors without values.

    Args:
        plan: over assumed lengths, and not sharing a prefix; its model is filled, so it serves once.
        fused: whether layers run fused; None = as the config has it on a GPU.
        rows: that the process holds; None = as the config has it.
    """
    objective: Any = plan.objective
    decoder = decoder_of(plan.model)
    decoders = (decoder, *(copy.base_model for copy in objective.copies))
    if fuses(plan.config, plan.model, "cuda") if fused is None else fused:
        for one in decoders:
            fused_layers.fuse(inner_decoder(one))
        for module in objective.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = not (plan.args.bf16 or plan.args.fp16)
    for one in decoders if plan.num_recomputed else ():
        recompute_first(one, plan.num_recomputed)
    tracer, number = _Tracer(), plan.conditions.num_processes
    mesh = init_device_mesh("cuda", (number,)) if plan.args.fsdp else None
    with _without_values(tracer), FakeTensorMode(allow_non_fake_inputs=True), tracer:
        _fill(objective, *objective.copies)
        if mesh is not None:
            _share_out(plan, objective, mesh)
        gc.collect()
        trained = [weight for weight in objective.parameters() if weight.requires_grad]
        with tracer.during("optimiser"):
            optimiser = torch.optim.AdamW(trained, fused=True)
            for weight in trained:
                weight.grad = torch.empty_like(weight)
            optimiser.step()
            optimiser.zero_grad()
        several = number > 1 and mesh is None
        with tracer.during("buckets"):
            buckets = [torch.empty_like(weight) for weight in trained] if several else []
        gc.collect()
        batch = _batch(plan, rows or plan.args.per_device_train_batch_size)
        bound = plan.config.tokens_per_microbatch
        totals = {name: torch.empty((), device="cuda") for name in objective.count(batch)}
        if (
            plan.args.gradient_accumulation_steps > 1
        ):  # the last micro-batch is run, which adds to the others' gradients
            with tracer.during("gradients"):
                for weight in trained:
                    weight.grad = torch.empty_like(weight)
        tracer.counts, tracer.peak, tracer.parts = True, tracer.total, Counter()
        with tracer.during("step"):
            half = bool(plan.args.bf16 or plan.args.fp16) and not plan.args.fsdp
            called: Any = InHalf(objective, torch.autocast("cuda", torch.bfloat16, enabled=half))
            step.backward_step(called, batch, totals, max_tokens=bound, backward=_backward)
        with tracer.during("optimiser"):
            # The norm of the gradients is one kernel, which is taken apart without values. And under FSDP2 DTensor asks
            # tensors without values of the whole weights' size what it will give: 32 GB for 8B, which no card holds.
            tracer.quiet = True
            tracer.kernels["optimiser", "norm and clip", "float32"] = [3, 0, 3 * sum(w.nbytes for w in trained)]
            tracer.quiet = False
            optimiser.step()
        pieces = len(step.split_batch(batch, bound))
        del buckets
    kernels = {key: Kernels(*numbers) for key, numbers in tracer.kernels.items()}
    tokens = sum(sum(side["lengths"]) for side in batch.values())
    useful = useful_flops(plan.model, objective.passes(batch))
    return Simulation(tokens, pieces, kernels, useful, tracer.peak, dict(tracer.parts))


def _backward(loss: Tensor) -> None:
    loss.backward()


def _batch(plan: Plan, rows: int) -> Batch:
    """Rows of the assumed lengths; their ids have no values."""
    objective: Any = plan.objective
    query, document = plan.conditions.tokens_query or 0, plan.conditions.tokens_document or 0
    batch = assumed_batch(plan.config, plan.settings, query, document, rows)
    for side in batch.values():
        number = sum(side["lengths"])
        side["input_ids"] = torch.empty(number, dtype=torch.long, device="cuda")
        side["pool_mask"] = side["target_mask"] = torch.empty(number, dtype=torch.bool, device="cuda")
        if plan.config.imitation_weight:
            width = objective.imitation.out_features
            side["facts"] = {"teacher": torch.empty(len(side["lengths"]), width, device="cuda")}
    return batch


def _fill(*models: nn.Module) -> None:
    """Weights without values, in place of those on the meta device."""
    made: dict[int, Any] = {}
    for module in (module for model in models for module in model.modules()):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied ones stay so
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                table[name] = made[id(tensor)]


def _share_out(plan: Plan, objective: nn.Module, mesh: Any) -> None:
    """FSDP2 as accelerate applies it."""
    plan_sharding(plan.args, plan.model)
    given = plan.args.fsdp_plugin_args or {}
    how = {"mp_policy": given["mixed_precision_policy"], "mesh": mesh}
    for layer in inner_decoder(decoder_of(plan.model)).layers:
        fully_shard(layer, reshard_after_forward=given.get("reshard_after_forward", True), **how)
    fully_shard(objective, **how)


class _Silu(torch.autograd.Function):
    """One kernel on CUDA, which would be taken apart here."""

    tracer: _Tracer

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _Silu.tracer.one_kernel(torch.empty_like, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Silu.tracer.one_kernel(_like, x, *gradients)


def _like(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x)


@contextmanager
def _without_values(tracer: _Tracer) -> Iterator[None]:
    """Around a step over tensors without values: what would read some, and what is one kernel."""

    def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in tensors]

    resize = torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:
        made = resize(storage, size)
        tracer.resize(storage, size)
        return made

    _Silu.tracer = tracer
    with ExitStack() as stack:
        for where, name, stand_in in (
            (packed_attention, "send", send),
            (llm2vec_q2d_d2q, "send", send),
            (language_modelling, "send", send),
            (packed_attention, "_varlen_is_there", lambda: True),
            (fused_layers, "_run", tracer.one_kernel),
            (step, "draw_seeds", lambda number: [0] * number),
            (step, "seeded", lambda *_: nullcontext()),
            (step, "max_over_ranks", lambda number: number),
            (SiLUActivation, "forward", lambda self, x: _Silu.apply(x)),
            (torch.UntypedStorage, "resize_", resized),
            (torch.cuda, "get_rng_state", lambda *_: None),
            (torch.cuda, "set_rng_state", lambda *_: None),
        ):
            stack.enter_context(patch.object(where, name, stand_in))
        yield


def report(plan: Plan, simulation: Simulation, card: Card) -> Iterator[str]:
    """What was found, line by line."""
    s = simulation
    yield f"step        {s.tokens:,} tokens of a process in {s.pieces} micro-batch(es)"
    yield f"kernels     {s.total('number'):,}"
    yield f"products    {s.total('flops'):.3g} operations, of which {s.useful:.3g} useful"
    others = s.total("bytes", products=False) / 1e9
    yield f"bytes       {s.total('bytes') / 1e9:,.1f} GB, of which not products {others:,.1f} GB"
    planned = "" if plan.memory is None else f"; planned: at most {plan.memory.most / 1e9:.1f} GB"
    yield f"memory      {s.peak / 1e9:.1f} GB{planned}"
    for phase, size in sorted(s.parts.items(), key=lambda part: -part[1]):
        yield f"            {phase:<12} {size / 1e9:>8.2f} GB"
    yield f"time        {s.seconds(card) * 1e3:,.0f} ms on {card.name}, which is {s.utilisation(card):.0%} of its peak"
    yield "most bytes, apart from products:"
    moved = Counter({key: k.bytes for key, k in s.kernels.items() if not k.flops})
    for (phase, name, precision), size in moved.most_common(20):
        number = s.kernels[phase, name, precision].number
        yield f"            {name:<44} {precision:<8} {phase:<10} {number:>6,} x {size / 1e9:>8.2f} GB"


def simulate_all(paths: Sequence[Path], plan_at: Callable[[Path], Plan], out: Path, card: Card) -> None:
    """Simulate configs, each kind of step once, and write what was found to a file, which an earlier start may have.

    Args:
        paths: of the configs.
        plan_at: plans one.
        out: the file.
        card: by which time is reckoned.
    """
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for path in paths:
        plan = plan_at(path)
        assert plan.memory is not None, f"{path}: layers of another kind"
        parts = [(part.name, part.size) for part in plan.memory.parts]
        share = plan.args.per_device_train_batch_size
        key = sha256(repr((parts, plan.all_rows, share, plan.config.tokens_per_microbatch)).encode()).hexdigest()[:12]
        name = f"{path.parent.name}/{path.stem}"
        if key not in found:
            s = simulate(plan)
            found[key] = {
                "configs": [], "tokens": s.tokens, "pieces": s.pieces, "recomputed": plan.num_recomputed,
                "kernels": s.total("number"), "flops": s.total("flops"), "useful": s.useful,
                "bytes_of_products": s.total("bytes", products=True),
                "bytes_of_others": s.total("bytes", products=False),
                "planned": plan.memory.most, "peak": s.peak, "parts": s.parts,
                "seconds": s.seconds(card), "of_the_peak": s.utilisation(card),
            }  # fmt: skip
        if name not in found[key]["configs"]:
            found[key]["configs"].append(name)
        write_json(out, found)
        planned, simulated = found[key]["planned"] / 1e9, found[key]["peak"] / 1e9
        print(f"{name}: planned {planned:.1f} GB, simulated {simulated:.1f} GB", flush=True)


def table(found: dict[str, Any], card: Card) -> Table:
    """What `simulate_all` wrote, a row a step; the configs that share it stand in its first cell."""
    header = ["configs", "tokens; pieces", "layers recomputed", "kernels", "bytes, GB; not products"]
    header += ["plan, GB", "simulated, GB", "plan / simulated", f"{card.name}: ms; of its peak"]
    rows = []
    for of_step in sorted(found.values(), key=lambda of_step: of_step["configs"][0]):
        everything, others = of_step["bytes_of_products"] + of_step["bytes_of_others"], of_step["bytes_of_others"]
        planned, simulated = of_step["planned"] / 1e9, of_step["peak"] / 1e9
        rows.append([
            ", ".join(f"`{name}`" for name in of_step["configs"]), f"{of_step['tokens']:,}; {of_step['pieces']}",
            str(of_step["recomputed"]), f"{of_step['kernels']:,}", f"{everything / 1e9:,.0f}; {others / 1e9:,.0f}",
            f"{planned:.1f}", f"{simulated:.1f}", f"{planned / simulated:.2f}",
            f"{of_step['seconds'] * 1e3:,.0f}; {of_step['of_the_peak']:.0%}",
        ])  # fmt: skip
    return Table(header, rows)


def recipes_in(place: Path, folder: Path) -> Iterator[Path]:
    """A config; or those of Stage I of a comparison's recipes, written into a folder."""
    if place.is_file():
        yield place
        return
    found = read_set(place)
    for recipe in found.recipes:
        for stage in recipe.stages:
            if stage.stage == "stage_I":
                # The objective's key tells that it is a config of Stage I.
                told = {"objective": "reconstruction", "output_dir": "output"}
                keys = {**told, **found.shared["all"], **found.shared["stage_I"], **stage.keys}
                file = folder / place.name / f"{recipe.name}.json"
                file.parent.mkdir(exist_ok=True)
                write_json(file, keys)
                yield file


def with_teacher(config: Config, width: int, folder: Path) -> Config:
    """A config whose vectors to imitate lie in a folder, if it has any: one, as wide as said; the rest is to come."""
    if config.teacher_vectors in (None, "self"):
        return config
    vector = pa.FixedSizeListArray.from_arrays(pa.array([0.0] * width, pa.float32()), width)
    pq.write_table(pa.table({"id": ["0" * 16], "vector": vector}), folder / "vectors.parquet")
    return dataclasses.replace(config, teacher_vectors=str(folder))


def start_processes(number: int) -> None:
    """A group of so many processes, of which the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if number > 1:
        torch.distributed.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
        patch.object(processes, "_patient_group", lambda: None).start()  # nobody waits for those who are not there


def main(argv: Sequence[str]) -> None:
    """Simulate the step of the config on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "configs",
        type=Path,
        nargs="+",
        metavar="CONFIG",
        help="training configs, or a comparison's folder; several: a table",
    )
    parser.add_argument("--num_processes", type=int, default=1, help="that share the step")
    parser.add_argument("--card", choices=list(BANDWIDTH), default="H200", help="by which time is reckoned")
    parser.add_argument(
        "--base", help="model whose shape stands for the base's; by default the published shape is known"
    )
    parser.add_argument("--tokens_query", type=int, default=24, help="of a row's query, template included")
    parser.add_argument("--tokens_document", type=int, default=170, help="of each of its documents")
    parser.add_argument("--rows", type=int, help="that the process holds, where it is not what the config says")
    parser.add_argument(
        "--fused", choices=["auto", "on", "off"], default="auto", help="fused layers; auto = as the config"
    )
    parser.add_argument("--out", type=Path, default=Path("simulation.json"), help="where the table's figures go")
    given = parser.parse_args(argv)
    fakecuda.install()
    card = CARDS[given.card]
    start_processes(given.num_processes)
    with tempfile.TemporaryDirectory() as folder:

        def plan_at(path: Path) -> Plan:
            base = given.base
            if base is None and (name := shape_for(path.read_text(encoding="utf-8"))) is not None:
                base = str(Path(folder, name))
                SHAPES[name][0].save_pretrained(base)
            conditions = Conditions(
                num_processes=given.num_processes, card=card, base=base,
                tokens_query=given.tokens_query, tokens_document=given.tokens_document,
            )  # fmt: skip
            config = load_config(path, stage_of(path))
            width = shape_of(base or config.model_name_or_path).hidden_size
            return plan_of(with_teacher(config, width, Path(folder)), conditions)

        configs = [config for place in given.configs for config in recipes_in(place, Path(folder))]
        if len(configs) > 1:
            simulate_all(configs, plan_at, given.out, card)
            print(table(json.loads(given.out.read_text(encoding="utf-8")), card).markdown())
            return
        fused = None if given.fused == "auto" else given.fused == "on"
        plan = plan_at(configs[0])
        for line in report(plan, simulate(plan, fused=fused, rows=given.rows), card):
            print(line)


if __name__ == "__main__":
    run_command(main)
