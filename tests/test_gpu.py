"""On a GPU: training, saves beside it, exact sums, and processes that a warm host forks.

What is tested needs a CUDA device; some cases are played on the CPU as well, so that what they say
is known to hold where no GPU is. Measured differences are logged (`--log-cli-level=INFO`).
"""

# B sample, A attention head, S token, E channel of a head

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_state import begin
from test_adversarial import STAGE as ADVERSARIAL
from test_adversarial import DrawnClips
from test_exact import _said
from tiny import STAGE, Attempt, DrawnLatents, attempt, objective
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from worlds import run_world

from elastic import shard
from elastic.attempt import Latents, WorkerJob
from elastic.data.assign import held_out_name
from elastic.data.decode import to_unit
from elastic.data.latents import Encoder, Pending, Scale
from elastic.data.store import BucketPlan, LatentStore, Sample, StoreSchema, fingerprint
from elastic.ema import local
from elastic.exact import reproducible
from elastic.kernels import attention, attention_order, compiled_encoder
from elastic.lease import fork, start_host, wait_for_host
from elastic.link import SETTLED, STOP, Ended, Failed, Measured, Order, Settle, Told
from elastic.loop import Outcome
from elastic.meter import OF_THE_MACHINES
from elastic.objective import Objective, Reconstructing
from elastic.state import Progress, TrainState
from elastic.weights import WEIGHTS
from elastic.world import World
from models import DCAE, DiT, HunyuanVAE
from models.attention import Padding
from models.attention import attention as attend
from models.perceptual import LpipsModule
from stages import AdamW, Adversarial, AutoencoderStage, Bucket, DiffusionStage, Muon, Phase, Stage

log = logging.getLogger(__name__)

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu = [pytest.param("nccl", marks=ON_GPU)]
ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0
STOP_AFTER = 4  # updates

# 320 tokens in heads of 64 channels: several blocks of keys in every attention kernel.
WIDE = STAGE.replace(
    model=DiT(depth=1, depth_single=1, width=128, heads=2, patch=2),
    schedule=[
        Phase(
            until=55,
            buckets=(
                Bucket("128px", frames=17, batch=5, micro=2),
                Bucket("32px", frames=1, batch=6, micro=4),
            ),
        )
    ],
    save_every=22,
    log_every=1,
    optimizer=AdamW(lr=3e-3, warmup=20, weight_decay=0.01),
    evaluate_every=33,
    compile=False,
)
BF16 = WIDE.replace(precision="bf16")
JUDGED = ADVERSARIAL.replace(
    schedule=[
        Phase(until=5, buckets=(Bucket("64px", frames=8, batch=5, micro=2),)),
        Phase(until=40, buckets=(Bucket("64px", frames=8, batch=7, micro=3),)),
    ],
    adversarial=Adversarial(start=5, weight=0.1, lr=1e-3, width=8, layers=3),
)
CAUSAL = JUDGED.replace(
    vae=HunyuanVAE(widths=(4, 4, 8, 8), layers=1, norm_groups=2, channels=4),
    perceptual=None,
    adversarial=None,
    schedule=[Phase(until=28, buckets=(Bucket("32px", frames=5, batch=7, micro=3),))],
)
STAGES: dict[str, Stage] = {
    "small": WIDE.replace(schedule=[Phase(until=33, buckets=STAGE.schedule[0].buckets)]),
    "fp32": WIDE,
    "compiled": WIDE.replace(compile=True),
    "bf16": BF16,
    "judged": JUDGED,
    "muon-bf16": BF16.replace(optimizer=Muon(lr=1e-3, matrix_lr=2e-2, weight_decay=0.01)),
    "causal": CAUSAL,
}
# Relative, on losses and norms, where another seed differs by 0.2. Other sums in fp32; roundings to
# bf16; torch's default has convolutions round the factors of fp32 products to ten bits (TF32).
FROM_CPU = {"fp32": 1e-4, "compiled": 1e-3, "bf16": 1e-2, "judged": 2e-2}
# Without exact=True a GPU may add up in another order each time.
FROM_RESUMED = {"small": 1e-5, "fp32": 1e-4, "bf16": 1e-2, "judged": 2e-2}
SMALLEST = 0.05  # an adversarial loss passes through zero: below this, differences are absolute


@contextmanager
def world_on(backend: str) -> Iterator[World]:
    """A world of one rank in this process: gloo computes on the CPU, NCCL on the GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
            device_id=None if backend == "gloo" else torch.device("cuda", 0),
        )
        try:
            yield World.current()
        finally:
            dist.destroy_process_group()
            torch.set_num_threads(threads)


class Clips(DrawnClips):
    """Drawn clips for the buckets of any stage."""

    def __init__(self, stage: Stage, count: int, first_id: int) -> None:
        super().__init__(count, first_id)
        self._of_buckets = {bucket.name: count for bucket in stage.buckets}

    def counts(self) -> dict[str, int]:
        return self._of_buckets


def _goal(stage: Stage, device: torch.device) -> Objective:
    if isinstance(stage, DiffusionStage):
        return objective(stage)
    assert isinstance(stage, AutoencoderStage), type(stage)
    return Reconstructing(stage, Clips(stage, 23, 100), Clips(stage, 5, 5000), device)


def _attempt(world: World, folder: Path, stage: Stage, stop_after: int | None = None) -> Attempt:
    """One attempt, its layers sharded in groups of their own as those of a large model are."""
    smallest = shard.SMALLEST_GROUP
    if stage.codec.can_recompute or isinstance(stage, DiffusionStage):
        # Not of diffusers' autoencoder: FSDP warns of its dropouts, which return what they get.
        shard.SMALLEST_GROUP = 0
    try:
        return attempt(world, folder, stage, _goal(stage, world.device), stop_after)
    finally:
        shard.SMALLEST_GROUP = smallest


def _train(backend: str, folder: Path, stage: Stage, stop_after: int | None = None) -> Attempt:
    """One attempt in a world of its own, as another process has one."""
    with world_on(backend) as world:
        assert world.device.type == ("cpu" if backend == "gloo" else "cuda")
        return _attempt(world, folder, stage, stop_after)


Whole = Callable[[str, str, bool], tuple[Attempt, Path]]  # backend, name, exact


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs that nobody disturbs, each made once: what they left behind, and their folder."""
    made: dict[tuple[str, str, bool], tuple[Attempt, Path]] = {}

    def run(backend: str, name: str, exact: bool) -> tuple[Attempt, Path]:
        if (backend, name, exact) not in made:
            folder = tmp_path_factory.mktemp("whole") / name
            played = _train(backend, folder, STAGES[name].replace(exact=exact))
            assert played.outcome is Outcome.FINISHED
            made[backend, name, exact] = played, folder
        return made[backend, name, exact]

    return run


@pytest.fixture(autouse=True, scope="module")
def without_tf32() -> Iterator[None]:
    """By default convolutions on a GPU round to 10 bits: 5 % of a critic's gradient norm."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _furthest(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest relative difference of what two runs measured, and where it is."""
    furthest = (0.0, "nothing differs")
    assert some
    for one, other in zip(some, others, strict=True):
        for key in ("position", "context", "order_digest"):
            assert one[key] == other[key], "the runs saw other samples"
        assert one["values"].keys() == other["values"].keys()
        for name in one["values"].keys() - OF_THE_MACHINES:
            a, b = one["values"][name], other["values"][name]
            where = f"{name} {a} and {b} at {one['position']} {one['context']}"
            furthest = max(furthest, (abs(a - b) / max(abs(a), abs(b), SMALLEST), where))
    return furthest


@pytest.mark.parametrize("backend", gpu)
@pytest.mark.parametrize("name", FROM_CPU)
def test_losses_and_norms_on_a_gpu_are_those_on_the_cpu(
    whole: Whole, backend: str, name: str
) -> None:
    reference = "fp32" if name == "compiled" else name
    (there, _), (here, _) = whole(backend, name, False), whole("gloo", reference, False)
    difference, where = _furthest(there.lines, here.lines)
    log.info("%s: GPU and CPU differ by %.1e: %s", name, difference, where)
    assert 0 < difference <= FROM_CPU[name], where
    losses = [line["values"]["loss"] for line in there.lines if "lr" in line["values"]]
    assert sum(losses[-3:]) < sum(losses[:3]), "nothing was learned"


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("gloo", "small"),
        *(pytest.param("nccl", name, marks=ON_GPU) for name in ("fp32", "bf16", "judged")),
    ],
)
def test_stopped_and_resumed_the_losses_are_those_of_the_whole(
    whole: Whole, tmp_path: Path, backend: str, name: str
) -> None:
    stopped = _train(backend, tmp_path / name, STAGES[name], STOP_AFTER)
    rest = _train(backend, tmp_path / name, STAGES[name])
    assert (stopped.outcome, rest.outcome) == (Outcome.STOPPED, Outcome.FINISHED)
    assert rest.events[0] == ("start", stopped.lines[-1]["position"], "resumed")
    undisturbed, _ = whole(backend, name, False)
    difference, where = _furthest(stopped.lines + rest.lines, undisturbed.lines)
    log.info("%s %s: resumed and whole differ by %.1e: %s", backend, name, difference, where)
    assert difference <= FROM_RESUMED[name], where


class LargeState:
    """As much of a TrainState as checkpoints use: tensors that count upwards from the position."""

    def __init__(self, world: World, samples: int, num_values: int) -> None:
        self.progress = Progress("large", samples)
        counts = {f"{kind}/a": num_values for kind in ("model", "ema", "exp_avg", "exp_avg_sq")}
        self.live = {name: _counted(world, n, torch.float32) for name, n in counts.items()}
        self.live["model/b"] = _counted(world, 7, torch.bfloat16)
        self.live["critic/n"] = torch.zeros((), dtype=torch.int64, device=world.device)
        self.move(samples)

    def move(self, by: int) -> None:
        """One update: every value is changed in place."""
        torch._foreach_add_([local(tensor) for tensor in self.live.values()], by)

    def tensors(self) -> dict[str, Tensor]:
        return self.live

    def restored(self, progress: Progress) -> None:
        self.progress = progress


def _counted(world: World, count: int, dtype: torch.dtype) -> Tensor:
    """0, 1, 2, ... as a sharded tensor; whole numbers below 2^24 are exact in fp32."""
    values = torch.arange(count, device=world.device).to(dtype)
    return DTensor.from_local(values, world.mesh, [Shard(0)])


def _save_between_updates(world: World, folder: Path, num_values: int) -> None:
    """Save at 11; move, save at 22 while the device is far behind, and move on at once."""
    store, state = begin(world, folder), LargeState(world, 11, num_values)
    store.checkpoints.save(cast(TrainState, state), "due")
    store.checkpoints.wait()
    if world.device.type == "cuda":
        torch.cuda._sleep(500_000_000)  # cycles: what follows is queued behind them
    state.move(11)
    state.progress.samples = 22
    store.checkpoints.save(cast(TrainState, state), "due")
    state.move(11)
    store.checkpoints.wait()
    assert [kind for kind, _, _ in store.events] == ["publish", "publish"]
    log.info("%s: stalls of %s s", world.device, [times["seconds"] for times in store.times])


def _require_restored(world: World, folder: Path, num_values: int) -> None:
    """The newest checkpoint holds the values of 22, bit for bit, on this device."""
    state, wanted = LargeState(world, 1, num_values), LargeState(world, 22, num_values)
    assert begin(world, folder).checkpoints.restore_latest(cast(TrainState, state))
    assert state.progress.samples == 22
    for name, tensor in state.live.items():
        assert tensor.device.type == world.device.type
        assert torch.equal(local(tensor), local(wanted.live[name])), name


@pytest.mark.parametrize(
    ("backend", "num_values"), [("gloo", 100_000), pytest.param("nccl", 12_500_000, marks=ON_GPU)]
)
def test_a_save_holds_the_values_of_its_moment_and_restores_them_on_any_device(
    tmp_path: Path, backend: str, num_values: int
) -> None:
    """200 MB on a GPU: the copies to the host are queued behind work when the save is asked for."""
    with world_on(backend) as world:
        _save_between_updates(world, tmp_path, num_values)
        _require_restored(world, tmp_path, num_values)
    with world_on("gloo") as world:
        _require_restored(world, tmp_path, num_values)


@pytest.mark.parametrize("backend", gpu)
def test_a_save_that_did_not_wait_for_its_copies_would_be_seen(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before."""
    with world_on(backend) as world:
        monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: None)
        _save_between_updates(world, tmp_path, 12_500_000)
        torch.cuda.synchronize()
    (file,) = (tmp_path / "checkpoints" / "22").glob("*.safetensors")
    assert min(float(tensor[0]) for name, tensor in load_file(file).items() if "/a" in name) == 11


def _state(folder: Path, stage: Stage) -> dict[str, bytes]:
    """The bytes of the last checkpoint and of the finished weights."""
    files = sorted((folder / "checkpoints" / str(stage.budget)).glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in [*files, folder / WEIGHTS]}


EXACT = ["fp32", "muon-bf16", "judged", "causal"]


def _exact(name: str) -> Stage:
    if name == "causal":
        pytest.importorskip("diffusers")
    return STAGES[name].replace(exact=True)


@pytest.mark.parametrize("backend", gpu)
@pytest.mark.parametrize("name", ["muon-bf16", "judged"])
def test_an_exact_run_has_the_same_bits_each_time(
    whole: Whole, tmp_path: Path, backend: str, name: str
) -> None:
    stage = _exact(name)
    (one, folder), again = whole(backend, name, True), _train(backend, tmp_path / name, stage)
    assert _said(again) == _said(one)
    assert _state(tmp_path / name, stage) == _state(folder, stage)


@pytest.mark.parametrize("backend", gpu)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_run_that_was_stopped_and_resumed_has_the_bits_of_the_whole(
    whole: Whole, tmp_path: Path, backend: str, name: str
) -> None:
    stage = _exact(name)
    stopped = _train(backend, tmp_path / name, stage, 2)
    rest = _train(backend, tmp_path / name, stage)
    one, folder = whole(backend, name, True)
    assert _said(stopped) + _said(rest) == _said(one)
    assert _state(tmp_path / name, stage) == _state(folder, stage)


def _attention_gradients(dtype: torch.dtype, is_padded: bool, device: str) -> list[Tensor]:
    """Of long sequences: kernels that split them must put them together in one order."""
    made = torch.Generator(device).manual_seed(0)
    q_BASE, k_BASE, v_BASE = (
        torch.randn(2, 4, 2000, 128, generator=made, device=device, dtype=dtype).requires_grad_()
        for _ in range(3)
    )
    real_BS = torch.ones(2, 2000, dtype=torch.bool, device=device)
    real_BS[0, :100] = False
    padding = Padding.of(real_BS, q_BASE, 128) if is_padded else None
    out_BASE = attend(q_BASE, k_BASE, v_BASE, padding)
    out_BASE.square().sum().backward()
    return [t for leaf in (q_BASE, k_BASE, v_BASE) if (t := leaf.grad) is not None]


def _perceptual_gradients(device: str) -> list[Tensor]:
    """Of LPIPS by the decoded clip, with weights of no meaning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LpipsModule().to(device).requires_grad_(False)
        real, decoded = (torch.randn(2, 3, 2, 64, 96).to(device) for _ in range(2))
    module(real, decoded.requires_grad_()).sum().backward()
    return [] if decoded.grad is None else [decoded.grad]


KERNELS: dict[str, Callable[[str], list[Tensor]]] = {
    f"attention-{str(dtype).removeprefix('torch.')}{'-padded' * is_padded}": (
        lambda device, dtype=dtype, padded=is_padded: _attention_gradients(dtype, padded, device)
    )
    for dtype in (torch.float32, torch.bfloat16)
    for is_padded in (False, True)
} | {"lpips": _perceptual_gradients}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_kernels_at_full_size_give_the_same_bits_each_time(name: str, device: str) -> None:
    with reproducible(True), attention(attention_order(torch.device(device))):
        first, *others = [KERNELS[name](device) for _ in range(4)]
    assert first
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@contextmanager
def _waiting_refused(device: str) -> Iterator[None]:
    """An error for whatever waits for the GPU, as far as torch knows of it."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _encoder(device: str) -> Encoder:
    codec = DCAE(
        channels=16,
        widths=(16, 16, 32, 32, 64, 64),
        encoder_depths=(1, 1, 1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1, 1, 1),
        head_width=8,
    )
    torch.manual_seed(0)
    module = codec.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Encoder(codec, module.to(device), Scale((0.0,) * 16, (1.0,) * 16))


def _chunk(frames: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shape = (3, frames, 64, 64)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw) for _ in range(8)]


def _latents(pending: Pending) -> Tensor:
    return torch.stack([one.latent_CTHW for one in pending.wait()]).float()


@pytest.mark.filterwarnings("default")  # what the compiler says of itself and of the card
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_compiled_encoder_gives_what_an_eager_one_gives_and_the_same_bits_again(
    device: str,
) -> None:
    torch._dynamo.reset()
    compiled_encoder.cache_clear()
    before = counters["stats"]["unique_graphs"]
    encoder = _encoder(device)
    for frames in (4, 8):
        chunks = [_chunk(frames, seed) for seed in (0, 1, 0)]
        eager = [_latents(encoder.begin(chunk, ends=False)) for chunk in chunks]
        first, other, again = [
            _latents(encoder.begin(chunk, ends=False, compiled=True)) for chunk in chunks
        ]
        torch.testing.assert_close(first, eager[0], rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(other, eager[1], rtol=2**-7, atol=1e-3)
        assert (eager[0] - eager[1]).abs().mean() > 0.01, "equal latents would prove little"
        assert torch.equal(first, again)
    assert counters["stats"]["unique_graphs"] - before == 2, "one for each size"
    compiled_encoder.cache_clear()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_chunks_are_begun_without_waiting_and_do_not_disturb_each_other(device: str) -> None:
    encoder, chunks = _encoder(device), [_chunk(8, seed) for seed in range(3)]
    alone = [encoder.begin(chunk, ends=True).wait() for chunk in chunks]
    with _waiting_refused(device):
        begun = [encoder.begin(chunk, ends=True) for chunk in chunks]
    for one, other in zip(alone, [pending.wait() for pending in begun], strict=True):
        assert len(one) == len(other) == 8
        for stored, same in zip(one, other, strict=True):
            torch.testing.assert_close(stored.latent_CTHW, same.latent_CTHW, rtol=0, atol=0)
            torch.testing.assert_close(stored.given_CTHW, same.given_CTHW, rtol=0, atol=0)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_pixels_are_the_same_to_the_bit_on_a_gpu(device: str) -> None:
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(x.to(device)).cpu(), to_unit(x))
    assert torch.equal(to_unit(x), x.float() / 127.5 - 1)


FORKED = WIDE.replace(
    exact=True, schedule=[Phase(until=330, buckets=WIDE.schedule[0].buckets)], save_every=55
)


def _sealed(root: Path, stage: DiffusionStage) -> Latents:
    """A sealed store of drawn latents, all with one text."""
    counts = {bucket.name: 8 for bucket in stage.buckets}
    text = stage.text.encode(["a moving shape"])[0]
    plans: list[BucketPlan] = []
    samples: dict[int, Sample] = {}
    for bucket in stage.buckets:
        for first_id, name in ((100, bucket.name), (5000, held_out_name(bucket))):
            drawn = DrawnLatents(stage, counts, first_id).fetch(bucket, np.arange(8))
            _, channels, frames, height, width = drawn.x_BCTHW.shape
            shape, ids = (channels, frames, height, width), tuple(map(int, drawn.ids))
            plans.append(BucketPlan(name=name, shape=shape, sample_ids=ids))
            for number, x_CTHW in zip(ids, drawn.x_BCTHW, strict=True):
                values = (x_CTHW, text.embedding_LD, text.pooled_D)
                samples[number] = Sample(number, *(value.bfloat16() for value in values))
    schema = StoreSchema(
        fingerprint=fingerprint({"drawn": stage.name}),
        buckets=tuple(plans),
        samples_per_shard=4,
        text_tokens=len(text.embedding_LD),
        text_width=text.embedding_LD.shape[1],
        pooled_width=len(text.pooled_D),
    )
    store = LatentStore.create(root, schema)
    store.publish_null_text(stage.text.null())
    for part in store.missing():
        store.write_shard(*part, [samples[number] for number in store.planned(part)])
    return Latents(str(root), schema.fingerprint, store.seal())


class Life(NamedTuple):
    """What one training process told: how it ended, its metric lines, its events."""

    end: str
    lines: list[dict[str, Any]]
    events: list[Told]

    @property
    def said(self) -> set[str]:
        """The lines without times, each as text."""
        return {repr(line) for line in _said(Attempt(Outcome.STOPPED, self.lines, []))}


def _live(
    address: Path, job: WorkerJob, use_gpu: bool, cut: Literal["", "killed", "stopped"] = ""
) -> Life:
    """One life of a forked process: to its end, or cut short after its first checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, own = listening.getsockname()[1], os.getpid()
        order = Order(0, 1, "127.0.0.1", port, pickle.dumps(job), own, own, use_gpu)
        lease = fork(address, order, listening)
    life = Life("killed", [], [])
    try:
        while True:
            assert lease.pipe.poll(DEADLINE_S), "neither a word nor an end"
            message = lease.pipe.recv()
            if isinstance(message, Told):
                life.events.append(message)
            elif isinstance(message, Settle):
                lease.pipe.send(SETTLED)
            elif isinstance(message, (Ended, Failed)):
                assert isinstance(message, Ended), message
                return life._replace(end=message.outcome)
            if isinstance(message, Measured):
                life.lines.append(message.line)
                has_saved = any(event.kind == "publish" for event in life.events)
                if cut == "killed" and has_saved:
                    os.kill(lease.pid, signal.SIGKILL)
                    return life
                if cut == "stopped" and has_saved:
                    lease.pipe.send(STOP)
    finally:
        lease.close()


@contextmanager
def warm_host() -> Iterator[Path]:
    """The address of a host, which must not have touched the GPU when it is needed no more."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # sockets allow 107 bytes
        address = Path(short) / "host.sock"
        host = start_host(address)
        try:
            assert wait_for_host(address, 2 * DEADLINE_S)
            yield address
            assert not _devices_of(host.pid), "the host has touched the GPU"
        finally:
            host.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def address() -> Iterator[Path]:
    with warm_host() as address:
        yield address


def _devices_of(pid: int) -> set[str]:
    """The GPU's device files that a process holds open."""
    paths = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    return {path for path in paths if path.startswith("/dev/nvidia")}


def _require_traceless(address: Path, folder: Path, use_gpu: bool) -> None:
    """A run that nobody disturbs, and one that is killed, goes on, is stopped and goes on."""
    latents = _sealed(folder / "latents", FORKED)
    jobs = [WorkerJob(FORKED, folder / name, (latents,)) for name in ("whole", "cut")]
    undisturbed = _live(address, jobs[0], use_gpu)
    lives = [_live(address, jobs[1], use_gpu, cut) for cut in ("killed", "stopped", "")]
    assert [life.end for life in [undisturbed, *lives]] == [
        "finished", "killed", "stopped", "finished",
    ]  # fmt: skip
    starts = [event for life in lives for event in life.events if event.kind == "start"]
    assert len(starts) == 3
    assert 0 == (starts[0].position or 0) < (starts[1].position or 0) < (starts[2].position or 0)
    assert starts[1].more["restored_from"]["ram"] > 0, "the copy in memory was not used"
    log.info("phases of a start: %s", [start.more["phases"] for start in starts])
    assert set().union(*(life.said for life in lives)) == undisturbed.said
    assert _state(jobs[0].folder, FORKED) == _state(jobs[1].folder, FORKED)


@pytest.mark.parametrize("use_gpu", [pytest.param(True, marks=ON_GPU)])
def test_forked_processes_train_on_the_gpu_and_a_kill_and_a_stop_leave_no_trace(
    address: Path, tmp_path: Path, use_gpu: bool
) -> None:
    _require_traceless(address, tmp_path, use_gpu)


@pytest.mark.parametrize("use_gpu", [pytest.param(True, marks=ON_GPU)])
def test_a_forked_process_compiles_its_blocks(address: Path, tmp_path: Path, use_gpu: bool) -> None:
    stage = WIDE.replace(compile=True)
    job = WorkerJob(stage, tmp_path / "stage", (_sealed(tmp_path / "latents", stage),))
    life = _live(address, job, use_gpu)
    assert life.end == "finished"
    (start,) = [event for event in life.events if event.kind == "start"]
    assert start.more["compiled"]


LOOKS = """
import os
import torch
import elastic.fork_host
paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
print(torch.cuda.is_initialized(), any(path.startswith("/dev/nvidia") for path in paths), end=" ")
torch.ones((), device="cuda")
paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
print(torch.cuda.is_initialized(), any(path.startswith("/dev/nvidia") for path in paths))
"""


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_what_a_host_imports_does_not_touch_the_gpu(device: str) -> None:
    command = [sys.executable, "-c", LOOKS]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False", "True", "True"], said


SHARED = ["fp32", "muon-bf16", "judged"]


def _on_one_gpu(world: World, folder: Path) -> dict[str, Attempt | str]:
    """Attempts of ranks that share a GPU, which NCCL refuses: gloo carries their messages.

    The first one that fails is the last, and its traceback stands in its place.
    """
    if torch.cuda.is_available():
        everyone = dist.group.WORLD
        assert everyone is not None
        mesh = DeviceMesh.from_group(everyone, "cuda", mesh_dim_names=("shard",))
        world = World(world.rank, world.size, torch.device("cuda", 0), mesh)
    results: dict[str, Attempt | str] = {}
    for name in SHARED:
        try:
            results[name] = _attempt(world, folder / name, _exact(name))
        except Exception:  # shown by the test of this name
            results[name] = traceback.format_exc()
            break
    return results


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Attempt | str], Path]:
    folder = tmp_path_factory.mktemp("shared")
    return run_world(_on_one_gpu, 2, folder)[0], folder


@pytest.mark.parametrize("backend", gpu)
@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_on_a_gpu_have_the_bits_of_one(
    whole: Whole, shared: tuple[dict[str, Attempt | str], Path], backend: str, name: str
) -> None:
    """The promise of exact=True, as far as one GPU can show it."""
    results, folder = shared
    two = results.get(name, "not tried, as one before it failed")
    assert isinstance(two, Attempt), two
    assert {line["world"] for line in two.lines} == {2}
    one, folder_of_one = whole(backend, name, True)
    assert _said(two) == _said(one)
    weights = [(path / WEIGHTS).read_bytes() for path in (folder / name, folder_of_one)]
    assert weights[0] == weights[1]
