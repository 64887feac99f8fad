"""A corpus encoded on a Ray cluster: the same shards, the same files, workers on any number of machines.

Ray Data's `map_batches` runs over the shards' *numbers*, a number a task, on a pool of actors that keep their model.
Ray Data may run a task twice, when a worker or a machine dies, and promises no order. Rows that went through it would
then come in blocks of its own choosing, and files written twice under other names. A number that comes twice does no
harm: the shard's file is written aside and renamed, and is the same file. So nothing is lost, nothing is double, and
an encoding that one engine has begun the other can finish.

Every machine must see the output folder, and the model's folder if it is not on the hub, under the same path.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from typing import Any

from llm2vec.corpus.encoding import QUEUE_FOLDER, CorpusEncoding, ShardEncoder
from llm2vec.types import UserError, needs_extra

logger = logging.getLogger(__name__)

#: How often a shard is begun: one that kills every worker (out of memory) must come to an end, and Ray Data knows none.
MOST_ATTEMPTS = 5


class _Worker:
    """What an actor holds: a loaded model. That a shard cannot be encoded is an answer, not a reason to try again."""

    def __init__(self, encoding: CorpusEncoding) -> None:
        self.attempts = encoding.output / QUEUE_FOLDER
        self.encode = ShardEncoder(encoding)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (shard,) = batch["shard"].tolist()
        try:
            self._count_attempt(shard)
            return {"shard": [shard], "rows": [self.encode(shard)], "problem": [""]}
        except UserError as error:
            return {"shard": [shard], "rows": [0], "problem": [str(error)]}

    def _count_attempt(self, shard: int) -> None:
        file = self.attempts / f"attempts-{shard:05d}"
        with file.open("a", encoding="utf-8") as attempts:
            attempts.write(".")
        if file.stat().st_size > MOST_ATTEMPTS:
            raise UserError(f"Shard {shard:05d} was given up: its worker died {MOST_ATTEMPTS} times.")


def check_ray_installed() -> None:
    """Refuse, by a `UserError`, to begin what only Ray can do, before anything is written."""
    with needs_extra("--engine ray needs Ray", "ray"):
        import ray.data  # noqa: F401


def encode_on_ray(encoding: CorpusEncoding, shards: Sequence[int], num_workers: int | None) -> list[str]:
    """An engine: actors of the running Ray cluster, or of one started on this machine if there is none.

    An actor takes a GPU, or a core where the cluster has no GPU. `num_workers` are actors; None = one a GPU of the
    cluster, or one. A `UserError` where Ray is not installed.
    """
    check_ray_installed()
    import ray.data

    shutil.rmtree(encoding.output / QUEUE_FOLDER, ignore_errors=True)  # the attempts of an earlier start
    (encoding.output / QUEUE_FOLDER).mkdir()
    if not ray.is_initialized():
        ray.init()
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_workers = min(num_workers or num_gpus or 1, len(shards))
    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    results = numbers.map_batches(
        _Worker,
        fn_constructor_args=(encoding,),
        batch_size=1,
        # One task at a time, or the last shards would wait in line behind one worker while others are idle.
        compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        num_gpus=1 if num_gpus else 0,
    )
    problems = []
    try:
        for done, result in enumerate(results.iter_rows(), start=1):
            logger.info("shard %05d: %d rows (%d of %d shards)", result["shard"], result["rows"], done, len(shards))
            problems += [result["problem"]] if result["problem"] else []
    except ray.exceptions.ActorDiedError as error:  # deaths in a shard are tried again, those before the first are not
        problems.append(f"Ray's workers could not start ({str(error).strip().splitlines()[-1]}).")
    return problems
