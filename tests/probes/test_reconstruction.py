"""Texts from anchors: generation and scores equal a slow loop, and the probe's figures equal one row at a time.

The last tests start the script and the training run as people do.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import MODELS, WORDS, family_tokenizer, tiny_model, write_jsonl
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from llm2vec import LLM2Vec
from llm2vec.choice import ModelChoice
from llm2vec.data.rows import TrainingRows
from llm2vec.data.sources import Instruction, Source
from llm2vec.files import alone_beside
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.chain import RUN_FILE
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, row_tokenizer
from llm2vec.probes import reconstruction_probe
from llm2vec.probes.reconstruction import (
    Reconstructor,
    Sampling,
    embed_rows,
    load_reconstructor,
    score_targets,
    target_ids,
    text_of_side,
)
from llm2vec.probes.reconstruction_probe import ANCHORS, Figure, ReconstructionProbe, as_table
from llm2vec.text.batches import pack_rows
from llm2vec.training.config.file import load_config
from llm2vec.training.log import LOG_FILE
from llm2vec.types import Attention, Example, InstructedText, ReconstructionTarget, UserError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = {"llama": "llama3", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen2", "gemma": "gemma"}
INSTRUCTION = "find the answer"
TEXTS = [
    text_of_side("query", "who wrote it", INSTRUCTION),
    text_of_side("document", "hello blue world"),
    text_of_side("document", "red"),
]


def reconstructor(
    family: str = "llama",
    attention: Attention = "causal",
    target: ReconstructionTarget = "counterpart",
    reconstruct_instruction: bool = False,
    spread: float = 0.3,
) -> Reconstructor:
    """Over a tiny random model in float64, its logits far enough apart for one likeliest token."""
    model = reference.exact(tiny_model(family, True, initializer_range=spread))
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    settings = EncoderSettings("last", 64, template=TEMPLATES[family], instruction_join="; ", attention=attention)
    rows = row_tokenizer(family_tokenizer(family), settings, reconstruct_instruction=reconstruct_instruction)
    return Reconstructor(BidirectionalReconstruction(model, settings, target=target), rows)


def examples(num_rows: int = 9) -> list[Example]:
    """Ragged rows of two sources, of 5 and 4."""
    rows = [row._replace(source="one" if i % 2 == 0 else "two") for i, row in enumerate(reference.examples(num_rows))]
    # Long enough for the buckets 9-16 and 17-32.
    rows[0] = rows[0]._replace(positive=InstructedText("", "red green blue who the " * 4, "document"))
    return rows


def greedy(model: Any, anchor: Tensor, num_tokens: int) -> list[int]:
    """The likeliest token behind the anchor and all tokens so far, each from a pass of its own."""
    decoder, ids = model.base_model, list[int]()
    for _ in range(num_tokens):
        known = [decoder.get_input_embeddings()(torch.tensor(token)) for token in ids]
        state = reference.states(decoder, "causal", embeddings=torch.stack([anchor, *known]))[-1]
        ids.append(int((model.get_output_embeddings().weight @ state).argmax()))
    return ids


# --- generation ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_generated_texts_are_those_of_a_slow_loop(family: str, attention: Attention) -> None:
    """Whatever the attention of the encoding pass, and for each text as if it were alone."""
    one = reconstructor(family, attention)
    tokenizer = one.tokenizer.tokenizer
    ends = {tokenizer.eos_token_id, one.tokenizer.closing_token_id}
    expected = []
    for text in TEXTS:
        [row] = one.tokenizer.rows([text])
        ids = greedy(one.objective.model, reference.embedding(one.objective.decoder, row, attention), 7)
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        expected.append([tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()])
    assert one.generate(TEXTS, 7) == expected
    assert len({text for [text] in expected}) > 1, "the same text from every anchor would prove little"
    assert [one.generate([text], 7)[0] for text in TEXTS] == expected


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_generate_reads_the_states_that_training_decodes(family: str, attention: Attention) -> None:
    """Step by step through the library's cache, or packed in one pass: the same log-probabilities."""
    one = reconstructor(family, attention)
    anchor_BD = embed_rows(one.objective, one.tokenizer.rows(TEXTS))[:, 0]
    model: Any = one.objective.model
    output = model.generate(
        inputs_embeds=anchor_BD.unsqueeze(1),
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=-1, output_logits=True, return_dict_in_generate=True
        ),
        is_causal=True,
    )
    log_p_BTV = torch.stack(output.logits, dim=1).log_softmax(dim=-1)
    picked = -log_p_BTV.gather(2, output.sequences.unsqueeze(2)).flatten()
    packed = score_targets(one.objective, anchor_BD, output.sequences.tolist())
    # generate hands out its logits in float32
    torch.testing.assert_close(packed.terms.float(), picked.float(), rtol=1e-5, atol=1e-6)
    assert packed.hits.all()


def test_generation_ends_at_the_closing_token() -> None:
    """Where the model writes it; what stands behind it is no part of the text."""
    one = reconstructor()
    free = one.generate(TEXTS[:1], 6)[0][0]
    [row] = one.tokenizer.rows(TEXTS[:1])
    with torch.no_grad():
        second = greedy(one.objective.model, reference.embedding(one.objective.decoder, row), 2)[1]
    one.tokenizer.closing_token_id = second
    ended = one.generate(TEXTS[:1], 6)[0][0]
    assert free.startswith(ended) and len(ended) < len(free)


def test_samples_follow_the_models_distribution() -> None:
    """First tokens of 3,000 texts against the softmax over the whole vocabulary, not its likeliest 50."""
    one = reconstructor(spread=0.02)
    anchor_BD = embed_rows(one.objective, one.tokenizer.rows(TEXTS[:1]))[:, 0]
    vocabulary = one.objective.model.config.vocab_size
    with torch.no_grad():
        first = score_targets(one.objective, anchor_BD.expand(vocabulary, -1), [[token] for token in range(vocabulary)])
    p_V = first.terms.neg().exp()
    assert p_V.sum() == pytest.approx(1) and p_V.max() < 0.2
    drawn: list[list[int]] = []
    one.tokenizer.tokenizer.batch_decode = lambda ids, **_: drawn.extend(ids.tolist()) or [""] * len(ids)
    one.generate(TEXTS[:1], 1, Sampling(1.0, 1.0, 3000))
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=vocabulary)
    assert counts.sum() == 3000
    # Pearson's statistic has mean V - 1 and variance 2 (V - 1); six standard deviations.
    statistic = ((counts - 3000 * p_V) ** 2 / (3000 * p_V)).sum()
    assert statistic < vocabulary - 1 + 6 * (2 * (vocabulary - 1)) ** 0.5
    assert (counts > 0).sum() > 60


def test_sampling_is_decided_by_the_seed_and_narrows_to_greedy() -> None:
    one = reconstructor()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(one.generate(TEXTS, 8, Sampling(1.5, 1.0, 2)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(texts) for texts in drawn[0]] == [2, 2, 2] and drawn[0][0][0] != drawn[0][0][1]
    likeliest = one.generate(TEXTS, 8)
    assert one.generate(TEXTS, 8, Sampling(top_p=1e-6)) == likeliest
    assert one.generate(TEXTS, 8, Sampling(temperature=1e-3, top_p=1.0)) == likeliest


# --- scores of a text ---


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_token_losses_are_those_of_a_slow_loop(attention: Attention) -> None:
    one = reconstructor(attention=attention)
    target = text_of_side("query", "who wrote the answer", INSTRUCTION)
    source, goal = one.tokenizer.rows([TEXTS[1], target])
    expected = reference.reconstruction_terms(one.objective.model, source, goal, attention)
    scored = one.score(TEXTS[1], target)
    assert [token.loss for token in scored] == pytest.approx([term.item() for term in expected], rel=1e-9)
    assert "".join(token.text for token in scored).strip() == "who wrote the answer"


@pytest.mark.parametrize("text", ["東京 naïve café", "red 東", "a\nb"])
def test_pieces_of_letters_that_are_several_tokens(text: str) -> None:
    scored = reconstructor().score(TEXTS[0], text_of_side("document", text))
    assert "".join(token.text for token in scored).strip() == text
    assert len(scored) > len(text.split())


# --- the probe ---


def bucket_of(position: int) -> str:
    first, last = 1, 1
    while not first <= position <= last:
        first, last = last + 1, 2 * last
    return str(last) if first == last else f"{first}-{last}"


def slow_figures(probe: ReconstructionProbe, one: Reconstructor, rows: Sequence[Example]) -> dict[Any, list[Any]]:
    """(direction, group, name, anchor) -> [loss, hit] of each token, one row and one token at a time."""
    model: Any = one.objective.model
    attention = one.objective.settings.attention
    found: dict[Any, list[Any]] = {}
    for number, direction in enumerate(one.objective.directions):
        sides = {"query": [row.query for row in rows], "positive": [row.positive for row in rows]}
        sources = one.tokenizer.rows(sides[direction.source])
        goals = one.tokenizer.rows(sides[direction.goal])
        anchors = [reference.embedding(model.base_model, row, attention) for row in sources]
        for i, row in enumerate(rows):
            drawn = torch.from_numpy(np.random.default_rng([probe.seed, number, i]).standard_normal(len(anchors[i])))
            random = drawn * (anchors[i].norm() / drawn.norm())
            own = {"own": anchors[i], "other": anchors[probe._other[i]], "random": random}
            ids = target_ids(goals[i])
            for name, anchor in own.items():
                for position, token in enumerate(ids):
                    known = [model.get_input_embeddings()(torch.tensor(earlier)) for earlier in ids[:position]]
                    state = reference.states(model.base_model, "causal", embeddings=torch.stack([anchor, *known]))[-1]
                    logits = model.get_output_embeddings().weight @ state
                    term = [(torch.logsumexp(logits, 0) - logits[token]).item(), float(logits.argmax() == token)]
                    for group in (("all", "all"), ("source", row.source), ("position", bucket_of(position + 1))):
                        found.setdefault((direction.name, *group, name), []).append(term)
    return found


def assert_figures(figures: Sequence[Figure], expected: dict[Any, list[Any]]) -> None:
    keys = [(f.direction, f.group, f.name, anchor) for f in figures for anchor in ANCHORS]
    assert sorted(keys) == sorted(expected)
    for figure in figures:
        for anchor in ANCHORS:
            terms = torch.tensor(expected[figure.direction, figure.group, figure.name, anchor], dtype=torch.float64)
            assert figure.tokens == len(terms)
            loss, accuracy = terms.mean(dim=0).tolist()
            assert figure.loss[anchor] == pytest.approx(loss, rel=1e-9)
            assert figure.accuracy[anchor] == pytest.approx(accuracy, rel=1e-9)


@pytest.mark.parametrize("tokens_at_once", [4096, 40])
@pytest.mark.parametrize(
    ("attention", "target", "with_instruction"),
    [("causal", "counterpart", False), ("bidirectional", "counterpart", True), ("causal", "self", False)],
)
@torch.no_grad()
def test_figures_equal_one_row_at_a_time(
    attention: Attention,
    target: ReconstructionTarget,
    with_instruction: bool,
    tokens_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconstruction_probe, "TOKENS_AT_ONCE", tokens_at_once)
    one = reconstructor("llama", attention, target, with_instruction)
    rows = examples()
    probe = ReconstructionProbe(one.objective, one.tokenizer, rows)
    figures = probe.figures()
    assert_figures(figures, slow_figures(probe, one, rows))
    names = {figure.name for figure in figures if figure.group == "position"}
    assert {"1", "2", "3-4", "5-8", "9-16", "17-32"} <= names
    overall = next(f for f in figures if (f.direction, f.group) == (one.objective.directions[1].name, "all"))
    logged = probe()
    assert logged[f"reconstruction_{overall.direction}_loss_other"] == overall.loss["other"]
    assert len(logged) == 2 * 2 * len(ANCHORS)


def test_other_is_another_row_of_the_same_source() -> None:
    one, rows = reconstructor(), examples()
    probe = ReconstructionProbe(one.objective, one.tokenizer, rows)
    assert sorted(probe._other) == list(range(len(rows)))
    assert all(i != other and rows[i].source == rows[other].source for i, other in enumerate(probe._other))
    assert probe._other != ReconstructionProbe(one.objective, one.tokenizer, rows, seed=1)._other


def test_a_source_of_one_row_has_no_other() -> None:
    one = reconstructor()
    with pytest.raises(UserError, match=r"source 'two' has one held-out row"):
        ReconstructionProbe(one.objective, one.tokenizer, examples(2) + examples(1))


@pytest.mark.parametrize("num_ranks", [2, 3, 12])
def test_ranks_share_the_rows(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums add up to one process's, also where a rank has no row."""
    one = reconstructor()
    probe = ReconstructionProbe(one.objective, one.tokenizer, examples())
    whole = [probe._sums(number) for number in (0, 1)]
    monkeypatch.setattr(reconstruction_probe, "world_size", lambda: num_ranks)
    shares = []
    for r in range(num_ranks):
        monkeypatch.setattr(reconstruction_probe, "rank", lambda r=r: r)
        shares.append([probe._sums(number) for number in (0, 1)])
    for number in (0, 1):
        total = torch.stack([share[number] for share in shares]).sum(dim=0)
        torch.testing.assert_close(total, whole[number], rtol=1e-12, atol=1e-12)
    assert not torch.equal(shares[0][0], whole[0])


def test_the_probe_leaves_random_numbers_and_weights_alone() -> None:
    one = reconstructor()
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    ReconstructionProbe(one.objective, one.tokenizer, examples())()
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert all(parameter.grad is None for parameter in one.objective.parameters())


def test_the_table_names_what_there_is() -> None:
    one = reconstructor()
    table = as_table(ReconstructionProbe(one.objective, one.tokenizer, examples()).figures())
    for word in ("q2d", "d2q", "source one", "position 9-16", "own", "other", "random", "gain"):
        assert word in table
    alone = [row._replace(source="one") for row in examples()]
    assert "source one" not in as_table(ReconstructionProbe(one.objective, one.tokenizer, alone).figures())


def test_training_makes_the_anchor_tell_its_own_text() -> None:
    """Words against their neighbours in `WORDS`: a mapping that only the anchor can carry."""
    words = [word for word in WORDS if word != "the"]
    rows = [
        Example(
            "words",
            text_of_side("query", word, INSTRUCTION),
            text_of_side("document", f"the {words[i - 1]} {words[i - 2]}"),
            (),
        )
        for i, word in enumerate(words)
    ]
    model: Any = tiny_model("llama", True)
    settings = EncoderSettings("last", 64, template="llama3", instruction_join="; ", attention="causal")
    objective = BidirectionalReconstruction(model, settings, alpha=0.5)
    tokenizer = row_tokenizer(family_tokenizer("llama"), settings)
    probe = ReconstructionProbe(objective, tokenizer, rows)

    def gains(reference_anchor: str) -> dict[str, float]:
        overall = [figure for figure in probe.figures() if figure.group == "all"]
        return {figure.direction: figure.loss[reference_anchor] - figure.loss["own"] for figure in overall}

    assert all(abs(gain) < 0.05 for gain in gains("other").values())
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    sides = {"query": [row.query for row in rows], "positive": [row.positive for row in rows]}
    batch = {side: pack_rows(tokenizer.rows(texts)) for side, texts in sides.items()}
    for _ in range(80):
        objective(batch, objective.count(batch)).parts["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    for name in ("other", "random"):
        assert all(gain > 1 for gain in gains(name).values()), gains(name)
    one = Reconstructor(objective, tokenizer)
    [generated] = one.generate([rows[3].query], 3)
    assert generated == [rows[3].positive.text]


# --- checkpoints, files and scripts ---


def script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """A script in this process."""
    file = str(ROOT / "experiments" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
    runpy.run_path(file, run_name="__main__")


def keys(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "I"),
        "sources_file": str(folder / "sources.json"),
        "max_seq_length": 64,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "num_eval_rows": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "reconstruction_probe": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | changed


def write_config(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(json.dumps(values), "utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two sources of 12 rows, a Stage I checkpoint that logged its reconstructions, and Stage II on it."""
    folder = tmp_path_factory.mktemp("reconstruction")
    for name in ("one", "two"):
        rows = [{"query": r.query.text, "positive": r.positive.text, "negative": "red"} for r in reference.examples(12)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    sources = {name: {"file": f"{name}.jsonl", "instruction": INSTRUCTION} for name in ("one", "two")}
    (folder / "sources.json").write_text(json.dumps(sources), "utf-8")
    tiny_model("llama", True, initializer_range=0.3).save_pretrained(folder / "base")
    family_tokenizer("llama").save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as monkeypatch:
        script("run_stage_I", monkeypatch, write_config(folder / "I.json", keys(folder)))
        second = keys(folder, model_name_or_path=str(folder / "I"), output_dir=str(folder / "II"), lora_r=4)
        del second["reconstruction_probe"]
        script("run_stage_II", monkeypatch, write_config(folder / "II.json", second))
    return folder


def logged(folder: Path) -> list[dict[str, float]]:
    lines = (folder / LOG_FILE).read_text("utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "eval_loss" in entry]


def test_a_run_logs_what_its_checkpoint_scores(folder: Path) -> None:
    rows = TrainingRows(
        folder,
        [Source(name, f"{name}.jsonl", (Instruction(INSTRUCTION),)) for name in ("one", "two")],
        num_negatives=0,
        num_held_out=4,
    ).held_out()
    loaded = load_reconstructor(ModelChoice(str(folder / "I")), device="cpu")
    scores = ReconstructionProbe(loaded.objective, loaded.tokenizer, rows)()
    first, last = logged(folder / "I")
    assert {f"eval_{name}": pytest.approx(value, rel=1e-5) for name, value in scores.items()}.items() <= last.items()
    assert first["eval_reconstruction_d2q_loss_own"] != pytest.approx(last["eval_reconstruction_d2q_loss_own"])


def test_the_probe_changes_nothing_of_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = keys(folder, output_dir=str(tmp_path / "without"), reconstruction_probe=False)
    script("run_stage_I", monkeypatch, write_config(tmp_path / "run.json", values))
    with_probe, without = (load_file(path / "model.safetensors") for path in (folder / "I", tmp_path / "without"))
    assert with_probe.keys() == without.keys()
    assert all(torch.equal(with_probe[name], tensor) for name, tensor in without.items())


@pytest.mark.slow
def test_two_processes_log_the_figures_of_one(folder: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        values = keys(folder, output_dir=str(tmp_path / f"of_{processes}"), learning_rate=0.0, total_batch_size=4)
        values["per_device_train_batch_size"] = 4 // processes
        file = write_config(tmp_path / f"of_{processes}.json", values)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(ROOT / "experiments/run_stage_I.py"), str(file)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        last = logged(tmp_path / f"of_{processes}")[-1]
        found.append({name: value for name, value in last.items() if "reconstruction" in name})
    assert len(found[0]) == 12
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_an_adapter_is_decoded_on_its_base(folder: Path) -> None:
    """The anchors are the adapted model's; the head is the base's."""
    loaded = load_reconstructor(ModelChoice(str(folder / "II")), device="cpu")
    anchors = embed_rows(loaded.objective, loaded.tokenizer.rows(TEXTS))[:, 0]
    texts = [[text.instruction, text.text] if text.instruction else text.text for text in TEXTS]
    encoded = LLM2Vec.from_pretrained(str(folder / "II")).encode(texts, show_progress_bar=False, device="cpu")
    torch.testing.assert_close(anchors, encoded, rtol=1e-4, atol=1e-5)
    first = load_reconstructor(ModelChoice(str(folder / "I")), device="cpu")
    heads = [one.objective.model.get_output_embeddings().weight for one in (loaded, first)]
    assert torch.equal(*heads)
    assert not torch.equal(anchors, embed_rows(first.objective, first.tokenizer.rows(TEXTS))[:, 0])


def copy_of(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_habits_of_generating_that_a_folder_brings_have_no_say(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder / "base", tmp_path / "habits")
    (copy / SETTINGS_FILE).write_bytes((folder / "I" / SETTINGS_FILE).read_bytes())
    expected = load_reconstructor(ModelChoice(str(copy)), device="cpu").generate(TEXTS, 12)
    habits = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    habits["eos_token_id"] = json.loads((copy / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    (copy / "generation_config.json").write_text(json.dumps(habits), "utf-8")
    assert load_reconstructor(ModelChoice(str(copy)), device="cpu").generate(TEXTS, 12) == expected


def test_a_bos_stands_before_the_anchor_where_the_run_had_one(folder: Path, tmp_path: Path) -> None:
    trained = copy_of(folder / "I", tmp_path / "trained")
    told = json.loads((trained / RUN_FILE).read_text("utf-8"))
    (trained / RUN_FILE).write_text(json.dumps({**told, "config": told["config"] | {"decoder_bos": True}}), "utf-8")
    found, without = (load_reconstructor(ModelChoice(str(name)), device="cpu") for name in (trained, folder / "I"))
    assert found.objective.bos_id == found.tokenizer.tokenizer.bos_token_id and without.objective.bos_id is None
    assert found.generate(TEXTS, 12) != without.generate(TEXTS, 12)


def test_what_has_no_anchor_to_decode_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base: there is no llm2vec_config.json"):
        load_reconstructor(ModelChoice(str(folder / "base")))
    trained = copy_of(folder / "I", tmp_path / "trained")
    told = json.loads((trained / RUN_FILE).read_text("utf-8"))
    for keys, words in (
        ({"objective": "token_set"}, "trained to token sets .target_loss 'bag'., which are not decoded"),
        ({"target_loss": "bag"}, "trained to token sets"),
    ):
        run = {**told, "config": told["config"] | keys}
        (trained / RUN_FILE).write_text(json.dumps(run), "utf-8")
        with pytest.raises(UserError, match=f"trained: {words}"):
            load_reconstructor(ModelChoice(str(trained)))
    run = {**told, "config": told["config"] | {"decoder": "frozen"}}
    run["parent"] |= {"model_name_or_path": str(tmp_path / "gone")}
    (trained / RUN_FILE).write_text(json.dumps(run), "utf-8")
    with pytest.raises(UserError, match=r"trained: it is decoded by what it was trained from, and .*gone"):
        load_reconstructor(ModelChoice(str(trained)))
    LLM2Vec.from_pretrained(str(folder / "I")).save(tmp_path / "headless")
    with pytest.raises(UserError, match=r"headless.* lacks 1 of the tensors .*lm_head.weight"):
        load_reconstructor(ModelChoice(str(tmp_path / "headless")))


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(device: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"^device is '{device}', where the model cannot be put: .") as raised:
        load_reconstructor(ModelChoice(str(folder / "I")), device=device)
    assert "\n" not in str(raised.value)


def test_the_target_of_training_is_the_target_of_decoding(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder / "I", tmp_path / "self")
    run = json.loads((copy / RUN_FILE).read_text("utf-8"))
    run["config"] |= {"target": "self", "reconstruct_instruction": True}
    (copy / RUN_FILE).write_text(json.dumps(run), "utf-8")
    loaded = load_reconstructor(ModelChoice(str(copy)), device="cpu")
    assert [direction.name for direction in loaded.objective.directions] == ["q2q", "d2d"]
    assert loaded.tokenizer.target_kinds


def test_the_script_prints_texts_and_the_targets_losses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [folder / "I", "hello world", "--from", "document", "--instruction", INSTRUCTION, "--device", "cpu"]
    script("reconstruct", monkeypatch, *arguments, "--max_new_tokens", 5, "--target", "who wrote it")
    printed = capsys.readouterr().out
    loaded = load_reconstructor(ModelChoice(str(folder / "I")), device="cpu")
    [[generated]] = loaded.generate([TEXTS[1]._replace(text="hello world")], 5)
    scored = loaded.score(text_of_side("document", "hello world"), text_of_side("query", "who wrote it", INSTRUCTION))
    mean = sum(token.loss for token in scored) / 3
    assert printed.startswith("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in generated))
    assert f"mean loss {mean:.3f} nats over 3 tokens" in printed and f"who[{scored[0].loss:.2f}]" in printed
    script("reconstruct", monkeypatch, *arguments, "--sample", "--num", 2, "--seed", 7, "--max_new_tokens", 3)
    drawn = capsys.readouterr().out
    script("reconstruct", monkeypatch, *arguments, "--sample", "--num", 2, "--seed", 7, "--max_new_tokens", 3)
    assert capsys.readouterr().out == drawn


def test_the_script_scores_rows_and_a_retrieval_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = [
        row for name in ("one", "two") for row in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()[8:]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(held_out[:4]) + "\n", "utf-8")
    rows = [json.loads(line) for line in held_out[:4]]
    write_jsonl(tmp_path / "set/corpus.jsonl", [{"_id": f"d{i}", "text": r["positive"]} for i, r in enumerate(rows)])
    write_jsonl(tmp_path / "set/queries.jsonl", [{"_id": f"q{i}", "text": r["query"]} for i, r in enumerate(rows)])
    judgements = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(4)]
    write_jsonl(tmp_path / "set/qrels/test.jsonl", judgements)
    instruction = ["--instruction", INSTRUCTION]
    figures = {}
    for name in ("rows.jsonl", "set"):
        output = tmp_path / f"{name}.figures.json"
        arguments = ["--score", tmp_path / name, *instruction, "--output", output, "--device", "cpu"]
        script("reconstruct", monkeypatch, folder / "I", *arguments)
        said = capsys.readouterr()
        assert "q2d" in said.out and "without an instruction" not in said.err
        figures[name] = json.loads(output.read_text("utf-8"))
    script("reconstruct", monkeypatch, folder / "I", "--score", tmp_path / "set", "--device", "cpu")
    assert "note: queries go without an instruction" in capsys.readouterr().err
    overall = {name: [f for f in of["figures"] if f["group"] == "all"] for name, of in figures.items()}
    assert overall["rows.jsonl"] == overall["set"]
    assert figures["rows.jsonl"]["rows"] == figures["set"]["rows"] == 4
    script("reconstruct", monkeypatch, folder / "I", "--score", tmp_path / "set", "--num_rows", 2, "--device", "cpu")
    assert ": 2 rows of " in capsys.readouterr().out


def test_two_may_not_score_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone_beside(tmp_path / "figures.json", "reconstruct"), pytest.raises(SystemExit) as ended:
        script("reconstruct", monkeypatch, "nowhere", "--score", "x.jsonl", "--output", tmp_path / "figures.json")
    assert ended.value.code == 2 and "another reconstruct is at work here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_retrieval_set_without_a_relevant_document_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "set/corpus.jsonl", [{"_id": "d", "text": "red"}])
    write_jsonl(tmp_path / "set/queries.jsonl", [{"_id": "q", "text": "blue"}])
    write_jsonl(tmp_path / "set/qrels/test.jsonl", [{"query-id": "q", "corpus-id": "d", "score": 0}])
    with pytest.raises(SystemExit) as ended:
        script("reconstruct", monkeypatch, "nowhere", "--score", tmp_path / "set")
    assert ended.value.code == 2 and "has no query with a relevant document" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of TEXT and --score"),
        (["red", "--score", "x.jsonl"], "give one of TEXT and --score"),
        (["red", "--num_rows", "3"], "--num_rows has no effect with TEXT"),
        (["red", "--output", "x"], "--output has no effect with TEXT"),
        (["red", "--seed", "-1"], "--seed is -1; a number from 0 to 4294967295 is needed"),
        (["red", "--seed", "4294967296"], "--seed is 4294967296; a number from 0"),
        (["--score", "x.jsonl", "--from", "query"], "--from has no effect with --score"),
        (["--score", "x.jsonl", "--sample"], "--sample has no effect with --score"),
        (["red", "--temperature", "0.5"], "--temperature has no effect without --sample"),
        (["red", "--sample", "--top_p", "1.5"], "--top_p is 1.5; above 0 and at most 1"),
        (["red", "--sample", "--temperature", "nan"], "--temperature is nan"),
        (["red", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
        ([" "], "TEXT is empty"),
        (["red", "--target", ""], "--target is empty"),
        (["--score", "x.jsonl", "--output", "."], "exists; remove it"),
        (["--score", "x.jsonl", "--output", "nowhere/y.jsonl"], "there is no folder nowhere"),
        (["--score", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--score", "empty"], "lacks corpus.jsonl"),
        (["red"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_sentence(
    arguments: list[str],
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before the checkpoint is loaded, which is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        script("reconstruct", monkeypatch, "nowhere/checkpoint", *arguments)
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and words in lines[-1]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"eval_strategy": "no"}, "reconstruction_probe is true, but it is taken of held-out rows at evaluations"),
        ({"num_eval_rows": 1}, "num_eval_rows to 2 or more"),
        ({"target_loss": "bag"}, "reconstruction_probe has no effect under target_loss 'bag'"),
        ({"fsdp": True, "save_only_model": True}, "reconstruction_probe cannot run with fsdp"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_probed_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_config(write_config(tmp_path / "run.json", keys(tmp_path, **changed)), "stage_I")
    assert words in str(raised.value)
    with pytest.raises(UserError, match="reconstruction_probe has no effect in stage_II"):
        load_config(write_config(tmp_path / "II.json", keys(tmp_path)), "stage_II")
