"""Training resumed from a checkpoint: bitwise equal under the same parallel layout, equal to rounding under another.

PolicyTrainers on gloo processes. Starting processes takes most of the time, so one pair of them runs all checks that
can share it: first alone (each a world of one rank), then together.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
import torch.distributed
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_checkpoint, write_model

from skyrl_spec.checkpoint import dist, folders, pieces
from skyrl_spec.checkpoint.background import BackgroundSaver
from skyrl_spec.checkpoint.optimizer_state import initialize_optimizer, optimizers
from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.metrics.values import values
from skyrl_spec.models import megatron_patches, parallel
from skyrl_spec.models.conversion import export_weights
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer

EXTRA = {"step": 2, "lr": 0.1 + 0.2, "metrics": {"policy/grad_norm": 1e-300}, "name": "läuft", "none": None}

# Pads to 192 rows under TP 1, to 256 under TP 2.
VOCAB_SIZE = 150

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp1-bf16": {"dtype": "bf16"},
    "tp2": {"tp": 2},
    "tp2-bf16": {"tp": 2, "dtype": "bf16"},
    "dp2": {},
    "dp2-bf16": {"dtype": "bf16"},
    "dp2-distributed": {"distributed": True},
    "dp2-distributed-bf16": {"distributed": True, "dtype": "bf16"},
    "cp2": {"cp": 2},
    "cp2-distributed-bf16": {"cp": 2, "distributed": True, "dtype": "bf16"},
    "pp2": {"pp": 2},
    "pp2-distributed-bf16": {"pp": 2, "distributed": True, "dtype": "bf16"},
    "tp1-distributed": {"distributed": True},
    "tp1-distributed-bf16": {"distributed": True, "dtype": "bf16"},
}

# Of a mixture of experts.
MIXTURES: dict[str, dict[str, Any]] = {
    name: {"draft": "dflash", "sequence_parallel": None} | options
    for name, options in {
        "tp1-experts": {},
        "dp2-ep2": {"ep": 2},
        "dp2-ep2-distributed-bf16": {"ep": 2, "distributed": True, "dtype": "bf16"},
        "dp2-experts-distributed": {"distributed": True},
        "tp2-ep2": {"tp": 2, "ep": 2},
        "tp2-expert_tp2-distributed-bf16": {"tp": 2, "expert_tp": 2, "distributed": True, "dtype": "bf16"},
        "pp2-experts": {"pp": 2},
    }.items()
}
MIXTURES_TO_TWO_RANKS = [
    ("tp1-experts", "dp2-ep2"),
    ("dp2-ep2", "tp2-ep2"),
    ("tp2-ep2", "pp2-experts"),
    ("pp2-experts", "dp2-experts-distributed"),
    ("dp2-experts-distributed", "dp2-ep2"),
    ("dp2-ep2-distributed-bf16", "tp2-expert_tp2-distributed-bf16"),
    ("tp2-expert_tp2-distributed-bf16", "dp2-ep2-distributed-bf16"),
]

# Layout of the save, layout of the load.
TO_TWO_RANKS = [
    ("tp1", "tp2"),
    ("tp1-distributed-bf16", "tp2-bf16"),
    ("tp1-distributed", "dp2-distributed"),
    ("dp2-distributed-bf16", "tp2-bf16"),
    ("dp2-distributed", "dp2"),
    ("tp2-bf16", "dp2-distributed-bf16"),
    ("tp1-distributed", "cp2"),
    ("cp2-distributed-bf16", "tp2-bf16"),
    ("dp2-distributed-bf16", "cp2-distributed-bf16"),
    ("tp1-distributed", "pp2"),
    ("tp2", "pp2"),
    ("cp2-distributed-bf16", "pp2-distributed-bf16"),
    ("pp2", "cp2"),
    ("pp2-distributed-bf16", "tp2-bf16"),
]
TO_ONE_RANK = [
    [("tp2", "tp1"), ("dp2", "tp1"), ("cp2", "tp1-distributed"), ("pp2", "tp1"), ("dp2-distributed-bf16", "tp1-bf16")],
    [("tp2-bf16", "tp1-bf16"), ("dp2-distributed", "tp1-distributed"), ("dp2-bf16", "tp1-distributed-bf16")],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_checkpoints, "VOCAB_SIZE", VOCAB_SIZE)
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def _build(model: Path, layout: str, **options: Any) -> PolicyTrainer:
    """Trainer in the groups of ``layout``, which replace the present groups."""
    options = (LAYOUTS | MIXTURES)[layout] | options
    if parallel.parallel_state.is_initialized():
        parallel.parallel_state.destroy_model_parallel()
    sizes = (options.get(name, 1) for name in ("cp", "pp", "ep", "expert_tp"))
    ranks = parallel.lay_out(options.get("tp", 1), torch.device("cpu"), *sizes)
    config = make_config(model, **options)
    config.trainer.policy.optimizer_config.num_warmup_steps = 2
    config.trainer.policy.optimizer_config.scheduler = "cosine"
    config.trainer.policy.optimizer_config.weight_decay = 0.1
    return PolicyTrainer(config, load_spec(str(model)), ranks, total_optimizer_steps=10)


def _train(trainer: PolicyTrainer, seeds: range) -> list[dict[str, float]]:
    return [
        values(trainer._reduce(trainer.forward_backward(make_batch(seed))) | trainer.optimizer_step()) for seed in seeds
    ]


def _state(trainer: PolicyTrainer, only: str | None = None) -> dict[str, Any]:
    """This rank's trained state of policy and draft, or of ``only`` one."""
    state: dict[str, Any] = {}
    for name, part in trainer.saved_components().items():
        if only not in (None, name):
            continue
        initialize_optimizer(part.trainable)
        for key, parameter in part.trainable.module.named_parameters():
            for kind, flat, start, _ in pieces._tensors(part, parameter):
                state[f"{name}.{key}.{kind}.{start}"] = flat.clone()
        inner = [optimizer.optimizer for optimizer in optimizers(part.trainable)]
        state[f"{name}.steps"] = [int(entry["step"]) for optimizer in inner for entry in optimizer.state.values()]
        groups = [group for optimizer in inner for group in optimizer.param_groups]
        state[f"{name}.groups"] = [{key: group[key] for key in group if key != "params"} for group in groups]
        state[f"{name}.scheduler"] = part.trainable.scheduler.state_dict()
    return state


def _assert_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[key].dtype, key
            assert torch.equal(value, theirs[key]), key
        else:
            assert value == theirs[key], key


def _full_state(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    """Full parameters, moments and masters by HF name, of all stages, gathered without the code under test."""
    full: dict[str, torch.Tensor] = {}
    for name, part in trainer.saved_components().items():
        by_kind: dict[str, dict[str, torch.Tensor]] = {}
        for local_key, parameter in part.trainable.module.named_parameters():
            key = megatron_patches.name_in_model(part.trainable.module, local_key)
            tensors = {kind: (flat, start) for kind, flat, start, _ in pieces._tensors(part, parameter)}
            kinds = ["param", "exp_avg", "exp_avg_sq", *(["master"] if parameter.dtype == torch.bfloat16 else [])]
            for kind in kinds:
                whole = torch.zeros(parameter.numel())
                if kind in tensors:
                    flat, start = tensors[kind]
                    whole[start : start + flat.numel()] = flat.float()
                if kind != "param" and trainer.config.trainer.policy.megatron_config.use_distributed_optimizer:
                    ranks, is_expert = trainer.parallel, ".experts." in key
                    torch.distributed.all_reduce(whole, group=ranks.expert_dp_group if is_expert else ranks.dp_cp_group)
                by_kind.setdefault(kind, {})[key] = whole.view(parameter.shape)
        for kind, tensors in by_kind.items():
            stand_in = torch.nn.Module()
            stand_in.named_parameters = lambda tensors=tensors: tensors.items()  # type: ignore[method-assign]
            for hf_name, tensor in export_weights(stand_in, part.rules, trainer.parallel):
                full[f"{name}.{kind}.{hf_name}"] = tensor.clone()
    of_stages: list[dict[str, torch.Tensor]] = [{}] * trainer.parallel.pp_size
    torch.distributed.all_gather_object(of_stages, full, group=trainer.parallel.pp_group)
    return {name: tensor for of_stage in of_stages for name, tensor in of_stage.items()}


def _has_losses(trainer: PolicyTrainer) -> bool:
    return trainer.parallel.is_last_stage


def _per_rank() -> dict[str, torch.Tensor]:
    return {"generator": torch.Generator().manual_seed(torch.distributed.get_rank()).get_state()}


def _resume_job(rank: int, model: Path, root: Path, layouts: list[str]) -> None:
    """2 steps, a save and 2 more steps, against a new trainer that loads and runs the same 2 steps."""
    for layout in layouts:
        directory = root / layout / "step_2"
        torch.manual_seed(rank)
        trainer = _build(model, layout)
        for part in trainer.saved_components().values():
            initialize_optimizer(part.trainable)
        fresh = _full_state(trainer)
        _train(trainer, range(2))
        dist.save(directory, trainer.saved_components(), EXTRA, _per_rank())
        saved, full = _state(trainer), _full_state(trainer)
        if rank == 0:
            torch.save(full, root / layout / "full.pt")
        rng = torch.get_rng_state()
        metrics = _train(trainer, range(2, 4))
        trained = _state(trainer)
        if _has_losses(trainer) and trainer.parallel.rank_in_replica == trainer.parallel.dp_rank == 0:
            (root / layout / "metrics.json").write_text(json.dumps(metrics[0]))

        torch.manual_seed(99)
        resumed = _build(model, layout)
        loaded = dist.load(directory, resumed.saved_components())
        assert loaded.extra == EXTRA
        assert torch.equal(loaded.per_rank["generator"], _per_rank()["generator"])
        assert torch.equal(torch.get_rng_state(), rng)
        _assert_same(_state(resumed), saved)
        assert _train(resumed, range(2, 4)) == metrics
        _assert_same(_state(resumed), trained)
        # The comparison can fail: training changes every tensor, before and after the save.
        for key, tensor in _full_state(trainer).items():
            if not key.endswith("norm.weight") or ".param." not in key:
                assert not torch.equal(fresh[key], full[key]), key
                assert not torch.equal(full[key], tensor), key
        assert metrics[0]["policy/grad_norm"] > 0
        assert not _has_losses(trainer) or metrics[0]["draft/grad_norm"] > 0
        assert folders.contents(directory) == {"policy", "draft"}


def _reshard_job(rank: int, model: Path, root: Path, pairs: list[tuple[str, str]]) -> None:
    """A load under another layout has the same full tensors, and training continues equally."""
    for source, target in pairs:
        directory = root / source / "step_2"
        torch.manual_seed(99)
        trainer = _build(model, target)
        before = torch.get_rng_state()
        loaded = dist.load(directory, trainer.saved_components())
        assert loaded.extra == EXTRA
        _assert_same(_full_state(trainer), torch.load(root / source / "full.pt", weights_only=True))
        assert all(part.trainable.scheduler.num_steps == 2 for part in trainer.saved_components().values())
        # States come from the same data-parallel index, or stay. They are equal within a replica.
        saved_world = 1 if source.startswith("tp1") else 2
        saved_dp = 2 if source.startswith("dp2") else 1
        if trainer.parallel.dp_rank < saved_dp:
            from_rank = trainer.parallel.dp_rank if source.startswith(("tp1", "dp2")) else 0
            # Of the last stage.
            from_rank += source.startswith("pp2")
            if source.split("-")[0] == target.split("-")[0]:
                from_rank = rank
            assert from_rank < saved_world
            expected = torch.Generator().manual_seed(from_rank).get_state()
            assert torch.equal(loaded.per_rank["generator"], expected), (source, target)
            assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(from_rank).get_state())
        else:
            assert loaded.per_rank == {}
            assert torch.equal(torch.get_rng_state(), before)
        metrics = _train(trainer, range(2, 3))[0]
        reference = json.loads((root / source / "metrics.json").read_text())
        # The same step with sums in another order. Ratios of tiny numbers are left out.
        of_draft = ("draft/loss", "draft/grad_norm", "draft/lr") if _has_losses(trainer) else ()
        for key in ("policy/grad_norm", "policy/lr", *of_draft):
            assert metrics[key] == pytest.approx(reference[key], rel=1e-4 if "bf16" not in source else 0.05), key
        # A resharded state can be saved and loaded again.
        again = root / f"{source}-{target}" / "step_3"
        dist.save(again, trainer.saved_components(), EXTRA)
        state = _state(trainer)
        other = _build(model, target)
        dist.load(again, other.saved_components())
        _assert_same(_state(other), state)


def _says(action: Callable[[], object], kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as raised:
        action()
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def _errors_job(model: Path, other_model: Path, root: Path) -> None:
    """A user's mistake gives one line, and changes nothing."""
    trainer = _build(model, "tp1")
    parts, here = trainer.saved_components(), root / "errors"
    _train(trainer, range(1))
    dist.save(here / "step_1", parts, EXTRA)
    dist.save(here / "step_2", {"draft": parts["draft"]}, EXTRA)
    assert folders.contents(here / "step_2") == {"draft"}
    state = _state(trainer)

    setting = f"trainer.resume_path={here}"
    _says(lambda: dist.load(here / "step_9", parts), ConfigError, f"{setting}/step_9: no such directory")
    _says(lambda: dist.load(here, parts), ConfigError, f"{setting}: is no checkpoint")
    _says(lambda: dist.load(here / "step_2", parts), ConfigError, "holds no policy (it has: draft)")
    for name in (".metadata", "__0_0.distcp", "rank_dp0_tp0.safetensors", "common.pt", "metadata.json"):
        broken = Path(shutil.copytree(here / "step_1", here / "step_3", dirs_exist_ok=True))
        (broken / name).unlink()
        _says(lambda broken=broken: dist.load(broken, parts), ConfigError, f"step_3: {name} is missing")
    _assert_same(_state(trainer), state)
    # Right size, wrong bytes.
    shutil.copytree(here / "step_1", broken, dirs_exist_ok=True)
    (broken / ".metadata").write_bytes(bytes((broken / ".metadata").stat().st_size))
    _says(lambda: dist.load(broken, parts), ConfigError, "step_3: .metadata cannot be read")

    bf16 = _build(model, "tp1-bf16").saved_components()
    _says(lambda: dist.load(here / "step_1", bf16), ConfigError, "in fp32, this run is set to bf16", "dtype=fp32")
    other = _build(other_model, "tp1").saved_components()
    _says(lambda: dist.load(here / "step_1", other), ConfigError, "is another model", "[150, 128], here [97, 128]")

    # Drafts that are new, dropped, or trained alone.
    without = _build(model, "tp1", draft=None)
    dist.load(here / "step_1", without.saved_components())
    policy_state = {key: value for key, value in state.items() if key.startswith("policy.")}
    _assert_same(policy_state, _state(without))
    dist.save(here / "step_4", without.saved_components(), EXTRA)
    again = _build(model, "tp1")
    started = _state(again, "draft")
    dist.load(here / "step_4", {"policy": again.saved_components()["policy"]})
    _assert_same(policy_state, _state(again, "policy"))
    _assert_same(_state(again, "draft"), started)
    dist.load(here / "step_2", {"draft": again.saved_components()["draft"]})
    _assert_same(_state(again), state)


def _full_disk_job(rank: int, model: Path, root: Path) -> None:
    """One rank cannot write: all ranks raise the error, nothing incomplete is left, and the next save works."""
    trainer = _build(model, "tp2")
    parts, here = trainer.saved_components(), root / "full"
    dist.save(here / "step_1", parts, EXTRA)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for full_rank, num_bytes in ((1, 100_000), (0, 100_000), (0, 100)):
        if rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        _says(lambda: dist.save(here / "step_2", parts, EXTRA), RunError, "could not be written (File too large)")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        torch.distributed.barrier()
        assert {path.name for path in here.iterdir()} == {"step_1", "latest"}
        # The next save must not begin before both ranks have checked.
        torch.distributed.barrier()
    dist.save(here / "step_2", parts, EXTRA)
    assert folders.latest(here) == here / "step_2"
    torch.distributed.barrier()
    # Over an existing checkpoint, on all ranks together.
    dist.save(here / "step_2", parts, EXTRA | {"step": 7})
    assert dist.load(here / "step_2", parts).extra["step"] == 7


def _background_job(rank: int, model: Path, root: Path, layouts: list[str]) -> None:
    """Two steps are trained while a save is written: it holds what was there when it began."""
    write, may_write = dist.Save.write, threading.Event()

    def write_later(save: dist.Save, group: Any = None) -> None:
        may_write.wait()
        write(save, group)

    saver = BackgroundSaver(timeout_s=60.0)
    for layout in layouts:
        here = root / "background" / layout
        trainer = _build(model, layout)
        _train(trainer, range(1))
        dist.save(here / "step_1", trainer.saved_components(), EXTRA | {"step": 1})
        _train(trainer, range(1, 2))
        may_write.clear()
        dist.Save.write = write_later  # type: ignore[method-assign]
        saver.begin(here / "step_2", trainer.saved_components(), EXTRA, _per_rank())
        saved, rng = _state(trainer), torch.get_rng_state()
        torch.rand(3)
        metrics = _train(trainer, range(2, 4))
        # Nobody sees it before it is complete.
        assert not saver.finish(wait=False)
        assert folders.latest(here) == here / "step_1"
        torch.distributed.barrier()
        may_write.set()
        # It appears by itself.
        while folders.latest(here) != here / "step_2":
            time.sleep(0.01)
        assert saver.finish(wait=True)
        dist.Save.write = write  # type: ignore[method-assign]
        # Nothing is being written.
        assert saver.finish(wait=False)
        torch.distributed.barrier()
        assert folders.latest(here) == here / "step_2"

        resumed = _build(model, layout)
        loaded = dist.load(here / "step_2", resumed.saved_components())
        assert loaded.extra == EXTRA
        assert torch.equal(torch.get_rng_state(), rng)
        _assert_same(_state(resumed), saved)
        assert _train(resumed, range(2, 4)) == metrics
        _assert_same(_state(resumed), _state(trainer))
    _full_disk_in_the_background(rank, trainer, saver, root / "full_background")


def _full_disk_in_the_background(rank: int, trainer: PolicyTrainer, saver: BackgroundSaver, here: Path) -> None:
    parts, limits = trainer.saved_components(), resource.getrlimit(resource.RLIMIT_FSIZE)
    saver.begin(here / "step_1", parts, EXTRA)
    saver.finish(wait=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    saver.begin(here / "step_2", parts, EXTRA)
    _says(lambda: saver.finish(wait=True), RunError, "could not be written (File too large)")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    assert {path.name for path in here.iterdir()} == {"step_1", "latest"}
    torch.distributed.barrier()
    saver.begin(here / "step_2", parts, EXTRA)
    saver.finish(wait=True)
    assert dist.load(here / "step_2", parts).extra == EXTRA


def _regroup(rank: int, world_size: int, store: Path) -> None:
    if parallel.parallel_state.is_initialized():
        parallel.parallel_state.destroy_model_parallel()
    # A rank that ends at once closes connections that the other one still opens.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def _job(rank: int, model: Path, other_model: Path, root: Path) -> None:
    _regroup(0, 1, root / f"alone{rank}")
    _resume_job(0, model, root, [["tp1", "tp1-bf16"], ["tp1-distributed", "tp1-distributed-bf16"]][rank])
    if rank == 0:
        _errors_job(model, other_model, root)

    _regroup(rank, 2, root / "together")
    _resume_job(rank, model, root, [layout for layout in LAYOUTS if not layout.startswith("tp1")])
    _reshard_job(rank, model, root, TO_TWO_RANKS)
    _full_disk_job(rank, model, root)
    _background_job(rank, model, root, ["tp2", "dp2-distributed-bf16"])

    _regroup(0, 1, root / f"alone_again{rank}")
    _reshard_job(0, model, root, TO_ONE_RANK[rank])
    parallel.shutdown()
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/end{rank}", rank=0, world_size=1)


def test_resume_is_bitwise_and_resharding_and_errors(model: Path, tmp_path: Path) -> None:
    other_model = write_checkpoint(tmp_path / "other")
    run_distributed(_job, 2, model, other_model, tmp_path, timeout_s=400.0)


def _mixture_job(rank: int, model: Path, root: Path) -> None:
    _regroup(0, 1, root / f"alone{rank}")
    if rank == 0:
        _resume_job(0, model, root, ["tp1-experts"])
    _regroup(rank, 2, root / "together")
    _resume_job(rank, model, root, [layout for layout in MIXTURES if not layout.startswith("tp1")])
    _reshard_job(rank, model, root, MIXTURES_TO_TWO_RANKS)
    _regroup(0, 1, root / f"alone_again{rank}")
    if rank == 0:
        _reshard_job(0, model, root, [("dp2-ep2", "tp1-experts"), ("pp2-experts", "tp1-experts")])
    parallel.shutdown()
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/end{rank}", rank=0, world_size=1)


def test_mixtures_of_experts_resume_and_reshard(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "dflash", has_experts=True)
    run_distributed(_mixture_job, 2, model, tmp_path, timeout_s=400.0)


def _kinds() -> list[list[str]]:
    """Layouts of two ranks whose checkpoints are of one kind: model and dtype."""
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for layout in (*LAYOUTS, *MIXTURES):
        if not layout.startswith("tp1"):
            kinds.setdefault((layout in MIXTURES, layout.endswith("bf16")), []).append(layout)
    return list(kinds.values())


def _every_pair_job(rank: int, model: Path, root: Path, layouts: list[str]) -> None:
    _resume_job(rank, model, root, layouts)
    pairs = [(source, target) for source in layouts for target in layouts if source != target]
    _reshard_job(rank, model, root, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("layouts", _kinds(), ids=lambda layouts: layouts[-1])
def test_every_layout_loads_in_every_other(layouts: list[str], model: Path, tmp_path: Path) -> None:
    if layouts[0] in MIXTURES:
        model = write_model(tmp_path / "model", "dflash", has_experts=True)
    run_distributed(_every_pair_job, 2, model, tmp_path, layouts, timeout_s=600.0)


def _killed_job(rank: int, model: Path, root: Path) -> None:
    """Rank 1 dies in the second save, after writing its tensors and before reporting it."""
    trainer = _build(model, "tp2")
    dist.save(root / "step_1", trainer.saved_components(), EXTRA)
    real = os.fsync

    def die(descriptor: int) -> None:
        real(descriptor)
        # Small files come first.
        if any((root / "step_2.partial").glob("__1_*.distcp")):
            (root.parent / "died").touch()
            os._exit(9)

    if rank == 1:
        os.fsync = die
    dist.save(root / "step_2", trainer.saved_components(), EXTRA)


def test_a_save_killed_half_way_leaves_the_old_one(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    with pytest.raises(Exception):  # noqa: B017  (which rank is heard first is chance)
        run_distributed(_killed_job, 2, model, root, timeout_s=400.0)
    assert (tmp_path / "died").exists()
    assert list((root / "step_2.partial").glob("*.distcp")), "it was to be half written"
    assert folders.latest(root) == root / "step_1"
    assert folders.read_record(root / "step_1")["extra"] == EXTRA
    assert folders.rotate(root, keep=1) == []
    assert {path.name for path in root.iterdir()} == {"step_1", "latest"}


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 3), (4, 1, 2)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            boxes = list(pieces._boxes(start, end, shape))
            parts = [
                numbers[tuple(slice(c, c + n) for c, n in zip(corner, sizes, strict=True))].flatten()
                for corner, sizes in boxes
            ]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist() == list(range(start, end))
            assert len(boxes) <= 2 * len(shape) - 1
