"""Checks of memory and speed: the draft's loss, training steps of real layer shapes, the export for a weight sync."""

from __future__ import annotations

import gzip
import multiprocessing
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import soft_ce
import torch
from gpu_check import KEEP, Check, Figure, apart, relative_error, seconds, synchronize
from real_shapes import MODELS, build_trainer, make_rows, num_parameters, planned_bytes, write_configs
from tiny_checkpoints import batch_of_lengths
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.losses import soft_ce as loss_module
from skyrl_spec.losses.draft_loss import draft_loss as draft_loss_of
from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.specs.flops import policy_training
from skyrl_spec.training import trainer as trainer_module
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

GIB = 2**30
# Dense bf16 matrix products per second, from NVIDIA's data sheet of both H100 SXM and H200.
PEAK_FLOPS = 989e12
# Of the loss as SkyRL computes it. The two float32 tensors of a chunk of 1,024 positions are 1.2 GiB.
LOSS_MEMORY_LIMIT = 0.25
PLAN_LIMIT = 0.25
MFU_LIMIT = 0.2
# An export reads and writes every weight, and packing does so again.
EXPORT_LIMIT = 0.2
PACKING_LIMIT = 2.0
# Relative, of sums over thousands of tokens in bf16; tokens at which rounding turns the favourite are among them.
PACKING_ERROR = 2e-2


def draft_loss(device: torch.device, _folder: Path) -> Figure:
    """Memory and time of the three versions of the loss, with its gradient."""
    on_cuda = device.type == "cuda"
    num_tokens, hidden_size, vocab_size, chunk_size = (8192, 4096, 152_064, 1024) if on_cuda else (256, 64, 1520, 32)
    inputs = soft_ce.make_inputs(device.type, torch.bfloat16, 1, num_tokens, hidden_size, vocab_size)
    measured: dict[str, dict[str, float]] = {}
    for version in soft_ce.VERSIONS:
        run = partial(soft_ce.loss_and_grad, version, inputs, chunk_size)
        measured[version] = {"s": seconds(device, run, repeats=3), "GiB": _peak_extra(device, run) / GIB}
    if not on_cuda:
        return Figure(measured["ours"]["s"], unit="s", details={"versions": measured})
    share = measured["ours"]["GiB"] / measured["checkpointed"]["GiB"]
    return Figure(share, LOSS_MEMORY_LIMIT, "of the memory of checkpointed chunks", details={"versions": measured})


def _peak_extra(device: torch.device, run: Any) -> float:
    """Bytes on top of what is there before; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize(device)
    return float(torch.cuda.max_memory_allocated() - before)


def loss_kinds(device: torch.device, _folder: Path) -> Figure:
    """Time of the draft's loss and its gradient by ``loss_type`` and truncation, against ``soft_ce``."""
    on_cuda = device.type == "cuda"
    num_tokens, hidden_size, vocab_size, chunk_size = (8192, 4096, 152_064, 1024) if on_cuda else (256, 64, 1520, 32)
    inputs = soft_ce.make_inputs(device.type, torch.bfloat16, 1, num_tokens, hidden_size, vocab_size)
    place_KT = torch.arange(num_tokens, device=device)[None]
    common = {"vocab_size": vocab_size, "temperature": 0.8, "chunk_size": chunk_size, "group": None}

    def run(loss_type: str, **options: Any) -> None:
        loss, _ = draft_loss_of(loss_type, *inputs, place_KT, (1, num_tokens), **common, **options)
        torch.autograd.grad(loss, inputs[0])

    kinds: dict[str, Any] = {
        "soft_ce": partial(run, "soft_ce"),
        "accept, sampled": partial(run, "accept", samples_drafts=True),
        "0.7*soft_ce+0.3*accept": partial(run, "0.7*soft_ce+0.3*accept"),
        "soft_ce, top_k 50": partial(run, "soft_ce", top_k=50),
        "soft_ce, top_p 0.95": partial(run, "soft_ce", top_p=0.95),
        "soft_ce, top_k 50, top_p 0.95": partial(run, "soft_ce", top_k=50, top_p=0.95),
    }
    times = {name: seconds(device, kind, repeats=3) for name, kind in kinds.items()}
    return Figure(max(times.values()) / times["soft_ce"], unit="x the time of soft_ce", details={"s": times})


def compiled_losses(device: torch.device, _folder: Path) -> Figure:
    """Time of the draft's loss with its passes over a chunk's logits compiled, against as they are."""
    inputs = soft_ce.make_inputs(device.type, torch.bfloat16, 1, 8192, 4096, 152_064)
    run = partial(soft_ce.loss_and_grad, "ours", inputs, 1024)
    plain_s, gradient = seconds(device, run, repeats=3), run()
    for name in ("softmax_", "_compare_"):
        setattr(loss_module, name, torch.compile(getattr(loss_module, name)))
    start = time.perf_counter()
    error = relative_error(run(), gradient)
    compile_s = time.perf_counter() - start
    compiled_s = seconds(device, run, repeats=3)
    details = {"s": {"as they are": plain_s, "compiled": compiled_s}, "compile s": compile_s, "error": error}
    return Figure(compiled_s / plain_s, unit="of the time as they are", details=details)


def fused_layers(device: torch.device, folder: Path) -> Figure:
    """Time of a training step on eight layers with Megatron's compiled SwiGLU and bias-dropout-add, against without."""
    plain = {"bias_activation_fusion": False, "bias_dropout_fusion": False}
    # By turns: the card's clock changes.
    turns = [apart(_step_with, device, folder / f"{turn}", {} if turn % 2 else plain) for turn in range(4)]
    without, with_fusions = ([step_s for step_s, _ in turns[start::2]] for start in (0, 1))
    details = {"s without": without, "s with": with_fusions, "GiB without, with": [gib for _, gib in turns[:2]]}
    return Figure(sum(with_fusions) / sum(without), unit="of the time without", details=details)


def _step_with(device: torch.device, folder: Path, fusions: dict[str, bool]) -> tuple[float, float]:
    """Median seconds of a mini-batch on eight layers of Qwen3-8B, and peak memory in GiB."""
    plain = trainer_module.transformer_config

    def with_fusions(*args: Any) -> Any:
        config = plain(*args)
        for name, value in fusions.items():
            setattr(config, name, value)
        return config

    trainer_module.transformer_config = with_fusions
    trainer, batch = _trainer_and_batch(device, "qwen3_8b", 8, folder)
    step_s = seconds(device, lambda: trainer.train_mini_batch(batch), repeats=3)
    return step_s, torch.cuda.max_memory_allocated() / GIB


def training_step(device: torch.device, folder: Path, model: str) -> Figure:
    """Tokens per second, MFU and share of the draft with as many layers as fit, and of all layers by their slope."""
    deep = apart(_measure_step, device, folder, model, None)
    shallow = apart(_measure_step, device, folder, model, deep["layers"] // 2)
    per_layer_s = (deep["s"] - shallow["s"]) / (deep["layers"] - shallow["layers"])
    num_layers = MODELS[model].num_layers
    whole_s = deep["s"] + per_layer_s * (num_layers - deep["layers"])
    whole = {"tokens/s": deep["tokens"] / whole_s, "draft share": deep["draft s"] / whole_s}
    details = {"measured": deep, "with half the layers": shallow, f"all {num_layers} layers, by the slope": whole}
    if device.type != "cuda":
        return Figure(deep["tokens/s"], unit="tokens/s", details=details)
    assert deep["waits per micro-batch"] == 0, (
        f"the host waits for the GPU in a micro-batch; all waits: {deep['places']}"
    )
    return Figure(deep["MFU"], MFU_LIMIT, "MFU", at_least=True, details=details)


def _measure_step(device: torch.device, folder: Path, model: str, num_layers: int | None) -> dict[str, Any]:
    """Figures of one mini-batch of two micro-batches. None: as many layers as fit."""
    is_deep = num_layers is None
    if num_layers is None:
        num_layers = _fitting_layers(device, model, folder)
    trainer, batch = _trainer_and_batch(device, model, num_layers, folder / f"{num_layers} layers")
    # Kernels are compiled, workspaces allocated.
    trainer.train_mini_batch(batch)
    start = time.perf_counter()
    report = trainer.train_mini_batch(batch)
    synchronize(device)
    step_s, tokens = time.perf_counter() - start, batch.token_ids.size
    figures: dict[str, Any] = {
        "layers": num_layers,
        "tokens": tokens,
        "s": step_s,
        "tokens/s": tokens / step_s,
        "draft s": report.draft_train_s,
        "draft share": report.draft_train_s / step_s,
    }
    if device.type == "cuda":
        figures["MFU"] = _model_flops(trainer, batch) / step_s / PEAK_FLOPS
        figures["planned GiB"] = plan_memory(trainer.config).worker.total / GIB
        figures["used GiB"] = torch.cuda.max_memory_allocated() / GIB
        if is_deep:
            figures["waits per micro-batch"], figures["places"] = _waits(trainer, batch)
        else:
            _save_trace(trainer, batch, folder / KEEP / f"trace_{model}.json.gz")
    return figures


def _trainer_and_batch(
    device: torch.device, model: str, num_layers: int, folder: Path
) -> tuple[PolicyTrainer, TrainBatch]:
    config = write_configs(MODELS[model], folder, num_layers, small=device.type == "cpu", length=row_length(device))
    trainer = build_trainer(config, device)
    # Without old log-probs the ratio is 1, and no token is clipped, which would save its backward pass.
    return trainer, replace(make_rows(config, trainer.spec.vocab_size, num_rows=2), policy_logprobs=None)


def row_length(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 128


def _fitting_layers(device: torch.device, model: str, folder: Path) -> int:
    """Largest even number of layers whose planned memory is 80 % of what is free."""
    if device.type != "cuda":
        return 8
    free, _ = torch.cuda.mem_get_info()
    depths = range(4, MODELS[model].num_layers + 1, 2)
    return max(n for n in depths if planned_bytes(MODELS[model], folder, n, row_length(device)) < 0.8 * free)


def _model_flops(trainer: PolicyTrainer, batch: TrainBatch) -> float:
    """Of forward and backward pass of policy and draft (``specs.flops``). What recompute does again does not count."""
    config, spec, rows = trainer.config, trainer.spec, len(batch.lengths)
    response = int(batch.loss_mask[0].sum())
    prompt = int(batch.lengths[0]) - response
    assert (batch.loss_mask.sum(axis=1) == response).all(), "the documents are not equally long"
    kind = trained_kind(config.trainer)
    of_draft = 0.0
    if kind is not None and trainer.draft is not None:
        of_draft = kind.training_flops(config, spec, prompt, response).total
    return rows * (policy_training(spec, prompt, response).total + of_draft)


def _waits(trainer: PolicyTrainer, batch: TrainBatch) -> tuple[float, dict[str, int]]:
    """Waits of the host for the GPU: the difference of four rows and two, a row a micro-batch. All places for four."""

    def count(num_rows: int) -> Counter[str]:
        rows = batch.select(np.arange(num_rows) % len(batch.token_ids))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train_mini_batch(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [warning for warning in caught if "synchronizing" in str(warning.message)]
        return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found)

    four, two = count(4), count(2)
    return (four.total() - two.total()) / 2, dict(four.most_common(20))


def _save_trace(trainer: PolicyTrainer, batch: TrainBatch, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        trainer.train_mini_batch(batch)
    plain = path.with_suffix("")
    profile.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    plain.unlink()


def packing(device: torch.device, folder: Path, model: str) -> Figure:
    """Tokens per second in packs, against a document a micro-batch, which is what rows up to the longest allow."""
    config = write_configs(MODELS[model], folder, 4, small=device.type == "cpu", length=row_length(device))
    # With 128 blocks of 16 slots, the draft of a document of 400 tokens costs five times its policy, packed or not.
    config.trainer.dflash.anchors_per_sequence = 16
    trainer = build_trainer(config, device)
    rng, scale = np.random.default_rng(0), row_length(device) / 8192
    num_documents = 64 if device.type == "cuda" else 8
    lengths = rng.lognormal(np.log(400 * scale), 1.0, num_documents).astype(int).clip(8, row_length(device))
    prompts = np.minimum(lengths // 4 + 1, config.trainer.max_prompt_length)
    batch = batch_of_lengths(rng, prompts, lengths - prompts, vocab_size=trainer.spec.vocab_size)
    batch = replace(batch, policy_logprobs=None)
    rates, losses = {}, {}
    for name, budget in (("packed", row_length(device)), ("one by one", 1)):
        config.trainer.max_tokens_per_microbatch = budget
        rates[name] = lengths.sum() / seconds(device, lambda: trainer.forward_backward(batch), repeats=2)
        # The same blocks.
        trainer.set_random_state({"steps": torch.tensor(0)})
        losses[name] = trainer.forward_backward(batch).tolist()
    details = {"tokens/s": rates, "documents": len(lengths), "tokens": int(lengths.sum())}
    errors = [abs(a / b - 1) for a, b in zip(losses["packed"], losses["one by one"], strict=True) if b]
    limit = PACKING_LIMIT if device.type == "cuda" else None
    figure = Figure(rates["packed"] / rates["one by one"], limit, "x tokens/s", at_least=True, details=details)
    assert max(errors) < PACKING_ERROR, f"sums differ by {max(errors):.1e}"
    return figure


def memory_plan(device: torch.device, folder: Path, model: str) -> Figure:
    """Peak memory of a step against the plan's. Four layers: the parts are not those of the step that is timed."""
    trainer, batch = _trainer_and_batch(device, model, 4, folder)
    for _ in range(2):
        trainer.train_mini_batch(batch)
    planned, used = plan_memory(trainer.config).worker, torch.cuda.max_memory_allocated()
    parts = {name: size / GIB for name, size in planned.parts.items()}
    details = {"used GiB": used / GIB, "planned GiB": parts}
    return Figure(abs(used / planned.total - 1), PLAN_LIMIT, "off", details=details)


def export_and_pack(device: torch.device, folder: Path) -> Figure:
    """Speed of an export of 15 GB into buffers of 1 GiB, packed as vLLM does, against a copy on the device.

    A second process then reads the last buffer through its handle.
    """
    reader = _start_reader()
    on_cuda = device.type == "cuda"
    num_layers, buffer_bytes = (36, GIB) if on_cuda else (4, 2**20)
    config = write_configs(MODELS["mimo_7b"], folder, num_layers, small=not on_cuda, length=row_length(device))
    config.trainer.mtp.enabled = False
    trainer = build_trainer(config, device, freeze_policy=True)
    num_bytes = 2 * num_parameters(trainer.model)

    def export() -> Tensor:
        return deque(packed(trainer.export("policy"), buffer_bytes), maxlen=1).pop()

    source = torch.randint(0, 255, (buffer_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_rate = buffer_bytes / 1e9 / seconds(device, lambda: target.copy_(source), repeats=5)
    export_rate = num_bytes / 1e9 / seconds(device, export, repeats=3)
    assert _read_back(reader, export()), "the second process does not see the same bytes"
    details = {"GB": num_bytes / 1e9, "export GB/s": export_rate, "copy GB/s": copy_rate}
    limit = EXPORT_LIMIT if on_cuda else None
    return Figure(export_rate / copy_rate, limit, "of a copy", at_least=True, details=details)


def packed(named_tensors: Iterator[tuple[str, Tensor]], buffer_bytes: int) -> Iterator[Tensor]:
    """Bytes of tensors one after the other, at most ``buffer_bytes`` at a time unless a tensor is larger."""
    parts: list[Tensor] = []
    size = 0
    for _, tensor in named_tensors:
        if parts and size + tensor.nbytes > buffer_bytes:
            yield torch.cat(parts)
            parts, size = [], 0
        parts.append(tensor.detach().contiguous().view(torch.uint8).flatten())
        size += tensor.nbytes
    yield torch.cat(parts)


def _start_reader() -> Connection:
    """A process that adds up the bytes of the tensors whose handles it gets. Begins before CUDA is used here."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    context.Process(target=_read, args=(its,), daemon=True).start()
    return mine


def _read(pipe: Connection) -> None:
    rebuild, arguments = pipe.recv()
    pipe.send(_sum(rebuild(*arguments)))


def _read_back(reader: Connection, tensor: Tensor) -> bool:
    reader.send(reduce_tensor(tensor))
    return reader.poll(60) and reader.recv() == _sum(tensor)


def _sum(tensor: Tensor) -> int:
    return int(tensor.sum(dtype=torch.int64))


MEMORY = [
    Check("loss memory", "peak memory of the draft's loss at [8192, 4096] x 152,064", draft_loss),
    Check("loss kinds", "time of the draft's losses there, and with top-k and top-p", loss_kinds),
]
FUSIONS = [
    Check(
        "compiled losses",
        "time of the draft's loss there with its softmax passes compiled, which is not done",
        compiled_losses,
        waits_for="CUDA: it is a question about kernels",
    ),
    Check(
        "fused layers",
        "time of a training step with Megatron's compiled SwiGLU and bias-dropout-add",
        fused_layers,
        180.0,
        waits_for="CUDA: likewise",
    ),
]
SPEED = [
    Check(f"training step {model}", f"a training step on layers of {model}", partial(training_step, model=model), 200.0)
    for model in MODELS
]
PACKING = [
    Check(
        f"packing {model}",
        f"speed of packs against documents one by one on four layers of {model}, lengths around 400",
        partial(packing, model=model),
    )
    for model in MODELS
]
PLANS = [
    Check(
        f"memory plan {model}",
        f"peak memory of a step on four layers of {model} against the plan",
        partial(memory_plan, model=model),
        waits_for="CUDA: memory is counted by its allocator",
    )
    for model in MODELS
]
SYNC = [Check("weight export", "export and packing of 15 GB, read by a second process", export_and_pack)]
