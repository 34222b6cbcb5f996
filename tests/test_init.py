"""Init policies: what each loads, solves, draws, carries and holds, on any world."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import (
    CLIP,
    STAGE,
    STILL,
    DrawnLatents,
    Turn,
    blank_state,
    in_turn,
    restored,
    train,
    whole_bytes,
    world_of_one,
)
from torch import Tensor
from worlds import run_world

from elastic.align import Pairs
from elastic.data.order import updates_before
from elastic.errors import InputError
from elastic.init_table import Available, init_table
from elastic.loop import rate_at
from elastic.start import Origin, begin, check_origin
from elastic.weights import WEIGHTS
from elastic.world import World
from models import DCAE, DiT, Tiling
from models.align import PairSums, complete, overlap, paired_cells, signal_moments, solve_embedding
from models.dit import GUIDANCE_LAYERS, codec_shaped
from models.flow import Times, timesteps
from stages import (
    AdamW,
    Align,
    AutoencoderStage,
    Bucket,
    Continue,
    DiffusionStage,
    Ema,
    Fresh,
    FromFile,
    Given,
    KeepTrunk,
    Muon,
    Phase,
    Plan,
    Videos,
)
from stages.identity import description
from stages.init import Init

PARENT = STAGE
NEW_CLIP = "32px-4f"
CHILD = PARENT.replace(
    name="child",
    vae=DCAE(channels=16, weights="none.safetensors"),
    model=PARENT.model.replace(patch=1, rope_unit="pixel"),
    schedule=[Phase(until=60, buckets=[Bucket("32px", frames=4, batch=6, micro=4)])],
    optimizer=AdamW(lr=3e-3, warmup=12, decay=12),
    save_every=30,
    log_every=6,
    evaluate_every=60,
    init=KeepTrunk(PARENT),
)
AUTOENCODER = AutoencoderStage(
    name="ae",
    data=Videos("none.csv"),
    vae=DCAE(channels=16),
    schedule=[Phase(until=4, buckets=[Bucket("32px", frames=4, batch=2)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=4),
    save_every=4,
    log_every=2,
    evaluate_every=4,
)


@pytest.fixture(scope="module")
def parent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the parent, trained to its end."""
    folder: Path = tmp_path_factory.mktemp("parent")
    with world_of_one() as world:
        train(world, folder)
    return folder


def origin(parent: Path) -> Origin:
    def pairs() -> Pairs:
        old = DrawnLatents(PARENT, {CLIP: 23, STILL: 17}, 100)
        return Pairs(PARENT, old, DrawnLatents(CHILD, {NEW_CLIP: 19}, 104))

    return Origin(parent, pairs)


def started(world: World, stage: DiffusionStage, parent: Path) -> dict[str, bytes]:
    """Every tensor of a stage that has just begun."""
    state = blank_state(world, stage)
    for name, tensor in state.tensors().items():
        if name.startswith("exp_avg"):
            tensor.zero_()  # as optimizers make them
    begin(state, origin(parent), world)
    return whole_bytes(state)


def values(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


# What a plan refuses


WRONG: list[tuple[str, Init, str]] = [
    ("codec", Continue(PARENT), "another vae.*KeepTrunk"),
    ("long", KeepTrunk(PARENT, warmup_samples=48), "warmup_samples 48: .* write less than 48"),
    ("width", KeepTrunk(PARENT.replace(model=PARENT.model.replace(width=48))), "model.width is 24"),
    ("text", Align(PARENT.replace(text=PARENT.text.replace(width=10))), "text .* not the parent's"),
]


def test_an_autoencoder_has_no_trunk_to_keep() -> None:
    with pytest.raises(ValidationError, match=r"'ae' is no DiffusionStage.*its variable"):
        KeepTrunk(AUTOENCODER)
    with pytest.raises(ValidationError, match=r"an autoencoder has no trunk to keep"):
        Plan("p", [PARENT, AUTOENCODER.replace(init=KeepTrunk(PARENT))])


GUIDED = PARENT.replace(model=PARENT.model.replace(guidance=True))
LEARNT = GUIDED.replace(init=FromFile("flux.safetensors"))


@pytest.mark.parametrize(
    "stages",
    [
        [GUIDED],
        [GUIDED.replace(init=FromFile("flux.safetensors", fresh=("guidance_in.*",)))],
        [LEARNT, LEARNT.replace(name="kept", init=KeepTrunk(LEARNT, fresh=("*.out_layer.bias",)))],
    ],
)
def test_a_strength_of_guidance_that_nothing_has_learnt_is_refused(
    stages: list[DiffusionStage],
) -> None:
    words = r"model.guidance is True, and 'guidance_in\..*' would be new: .*leave guidance out.*"
    with pytest.raises(ValidationError, match=words + r"FromFile"):
        Plan("p", stages)


def test_a_strength_of_guidance_that_a_file_has_learnt_goes_down_the_line() -> None:
    kept = LEARNT.replace(name="kept", init=KeepTrunk(LEARNT, fresh=("txt_in.*",)))
    again = kept.replace(name="again", init=Continue(kept))
    assert len(Plan("p", [LEARNT, kept, again]).stages) == 3


def test_the_layers_that_take_the_strength_of_guidance_are_those_of_the_model() -> None:
    has, plain = ({n for n, _ in s.build().named_parameters()} for s in (GUIDED, PARENT))
    assert has - plain == set(GUIDANCE_LAYERS)


@pytest.mark.parametrize(("init", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_parent_that_does_not_fit_is_refused_when_the_plan_is_made(init: Init, said: str) -> None:
    parent = init.stage if isinstance(init, Continue | KeepTrunk) else PARENT
    with pytest.raises((ValidationError, ValueError), match=said):
        Plan("p", [parent, CHILD.replace(init=init)])


def test_a_parent_must_come_earlier_in_the_plan() -> None:
    with pytest.raises(ValidationError, match=r"init: its parent 'tiny' does not come earlier"):
        Plan("p", [CHILD])


def test_an_optimizer_is_carried_only_to_its_own_kind() -> None:
    more = PARENT.replace(
        name="more", init=Continue(PARENT), optimizer=Muon(lr=1e-3, matrix_lr=0.1)
    )
    with pytest.raises(ValidationError, match="optimizer='reset'"):
        Plan("p", [PARENT, more])
    Plan("p", [PARENT, more.replace(init=Continue(PARENT, optimizer="reset"))])


@pytest.mark.parametrize(
    "init",
    [
        Fresh(seed=3),
        KeepTrunk(PARENT, warmup_samples=12),
        Align(PARENT, clips=9),
        FromFile("x.safetensors", drop=("a.*",)),
    ],
    ids=lambda init: type(init).__name__,
)
def test_every_policy_reads_back_from_the_record_of_a_run(init: Init) -> None:
    plan = Plan("p", [PARENT, CHILD.replace(init=init)])
    back = Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json"))))
    assert back == plan
    assert type(back.stages[1].init) is type(init)
    assert description(back.stages[1])["init"]["policy"] == type(init).__name__


def test_the_guard_may_be_changed_while_a_stage_is_under_way() -> None:
    loose = CHILD.replace(init=KeepTrunk(PARENT, guard_factor=9.0, guard_samples=1))
    assert description(loose) == description(CHILD)
    assert description(CHILD.replace(init=KeepTrunk(PARENT, seed=1))) != description(CHILD)


def test_how_latents_are_cut_may_be_changed_when_an_autoencoder_is_trained() -> None:
    tiled = AUTOENCODER.replace(vae=DCAE(channels=16, tiling=Tiling(frames=16, pixels=128)))
    assert description(tiled) == description(AUTOENCODER)
    assert description(AUTOENCODER.replace(vae=DCAE(channels=8))) != description(AUTOENCODER)


# What the table says


def test_only_layers_with_the_codecs_shape_are_new_when_the_trunk_is_kept() -> None:
    table = init_table(CHILD)
    assert all(codec_shaped(name) for name in table.names("new"))
    assert set(table.names("new")) == {
        name for name, _ in CHILD.build().named_parameters() if codec_shaped(name)
    }
    totals = table.as_json()["totals"]
    count = sum(p.numel() for p in CHILD.build().parameters())
    assert totals["loaded"]["parameters"] + totals["new"]["parameters"] == count  # type: ignore[index]
    lines = "\n".join(table.lines())
    assert "1 double_blocks, 1 single_blocks" in lines
    assert "img_in, final_layer" in lines


def test_a_pattern_that_matches_nothing_is_refused_with_the_closest_name() -> None:
    with pytest.raises(InputError, match=r"'text_in.\*' matches no parameter.*'txt_in"):
        init_table(CHILD.replace(init=KeepTrunk(PARENT, fresh=("text_in.*",))))
    table = init_table(CHILD.replace(init=KeepTrunk(PARENT, fresh=("txt_in.*",))))
    assert {"txt_in.weight", "txt_in.bias"} <= set(table.names("new"))


def test_a_policy_that_would_load_nothing_or_names_what_is_solved_is_refused() -> None:
    with pytest.raises(InputError, match="nothing would be loaded from stage 'tiny'"):
        init_table(CHILD.replace(init=KeepTrunk(PARENT, fresh=("*",))))
    with pytest.raises(InputError, match="which Align solves for"):
        init_table(CHILD.replace(init=Align(PARENT, fresh=("img_in.*",))))


def test_a_layer_that_is_gained_has_no_optimizer_state_to_carry() -> None:
    model = PARENT.model.replace(image_condition=True)
    more = PARENT.replace(name="more", init=Continue(PARENT), model=model, given=Given())
    with pytest.raises(ValidationError, match=r"gains image_condition.*optimizer='reset'"):
        Plan("p", [PARENT, more])
    Plan("p", [PARENT, more.replace(init=Continue(PARENT, optimizer="reset"))])


def test_a_name_in_place_of_a_stage_is_told_what_to_give() -> None:
    with pytest.raises(ValidationError, match="'tiny' is no stage; give the stage itself"):
        Continue("tiny")


SHAPES = {name: tuple(p.shape) for name, p in CHILD.build().named_parameters()}
FILE: list[tuple[str, dict[str, Any], FromFile, str]] = [
    ("missing", {"txt_in.bias": None}, FromFile("f"), r"txt_in.bias is not in f.*fresh="),
    ("shape", {"img_in.weight": (24, 4)}, FromFile("f"), r"img_in.weight is 24x4 in f and 24x16"),
    ("extra", {"lora.a": (2,)}, FromFile("f"), r"1 tensors of f .* lora.a.*drop="),
    ("drop", {}, FromFile("f", drop=("lora.*",)), r"drop pattern 'lora.\*' matches no tensor"),
    ("fresh", {}, FromFile("f", fresh=("img_out.*",)), r"fresh pattern 'img_out.\*' matches no"),
]


@pytest.mark.parametrize(
    ("change", "init", "said"), [f[1:] for f in FILE], ids=[f[0] for f in FILE]
)
def test_what_a_file_lacks_or_has_too_much_of_is_refused_unless_named(
    change: dict[str, Any], init: FromFile, said: str
) -> None:
    shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape is not None}
    there = Available(shapes, frozenset(), {}, "f")
    with pytest.raises(InputError, match=said):
        init_table(CHILD.replace(init=init), there)
    named = FromFile("f", fresh=("txt_in.bias", "img_in.weight"), drop=("lora.*",))
    everything = Available({**SHAPES, "lora.a": (2,)}, frozenset({"txt_in.weight"}), {}, "f")
    table = init_table(CHILD.replace(init=named), everything)
    assert table.names("converted") == ["txt_in.weight"]
    assert set(table.names("new")) == {"txt_in.bias", "img_in.weight"}
    assert set(table.names("dropped")) == {"txt_in.bias", "img_in.weight", "lora.a"}


# What the parameters are


def _policies(parent: Path) -> list[DiffusionStage]:
    own = PARENT.replace(name="more", init=Continue(PARENT))
    return [
        CHILD.replace(init=Fresh(seed=5)),
        CHILD,
        CHILD.replace(init=Align(PARENT)),
        own.replace(init=FromFile(str(parent / WEIGHTS))),
        own,
    ]


def _start_all(world: World, folder: Path, parent: Path) -> list[list[str]]:
    """Digests of every tensor, for each policy on worlds of 1, 2 and 3."""
    turns = [Turn(n, _digests, (stage, parent)) for stage in _policies(parent) for n in (1, 2, 3)]
    return in_turn(world, folder, turns)


def _digests(world: World, stage: DiffusionStage, parent: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(data).hexdigest()
        for name, data in started(world, stage, parent).items()
    }


def test_every_policy_gives_the_same_start_on_any_world(
    parent_folder: Path, tmp_path: Path
) -> None:
    starts = run_world(_start_all, 3, tmp_path, parent_folder)[0]
    for first in range(0, len(starts), 3):
        assert starts[first] == starts[first + 1] == starts[first + 2]


def test_a_kept_trunk_is_the_parents_average_and_its_own_average_starts_from_it(
    parent_folder: Path,
) -> None:
    parent = load_file(parent_folder / WEIGHTS)
    with world_of_one() as world:
        state = started(world, CHILD, parent_folder)
        fresh = started(world, CHILD.replace(init=Fresh(seed=0)), parent_folder)
    for name in SHAPES:
        expected = fresh[f"model/{name}"] if codec_shaped(name) else parent[name].numpy().tobytes()
        assert state[f"model/{name}"] == expected, name
        assert state[f"ema/{name}"] == expected, name
        assert not values(state[f"exp_avg/{name}"]).any()


def test_continue_takes_parameters_average_and_moments_and_counts_updates_on(
    parent_folder: Path,
) -> None:
    more = PARENT.replace(name="more", init=Continue(PARENT))
    with world_of_one() as world:
        last = whole_bytes(restored(world, parent_folder))
        state = blank_state(world, more)
        begin(state, origin(parent_folder), world)
        reset = started(
            world, more.replace(init=Continue(PARENT, optimizer="reset")), parent_folder
        )
        assert whole_bytes(state) == last
        steps = {float(m["step"]) for m in state.optimizer.state.values()}
    assert steps == {float(updates_before(PARENT, PARENT.budget))}
    assert {k: v for k, v in reset.items() if k.startswith(("model/", "ema/"))} == {
        k: v for k, v in last.items() if k.startswith(("model/", "ema/"))
    }
    assert not any(values(v).any() for k, v in reset.items() if k.startswith("exp_avg"))


def test_a_stage_may_gain_an_image_condition_that_changes_nothing_at_first(
    parent_folder: Path,
) -> None:
    shape = PARENT.model.replace(image_condition=True)
    more = PARENT.replace(name="more", init=Continue(PARENT), model=shape, given=Given())
    assert set(init_table(more).names("new")) == {"cond_in.weight", "cond_in.bias"}
    more = more.replace(init=Continue(PARENT, optimizer="reset"))
    with world_of_one() as world:
        state = started(world, more, parent_folder)
    assert not values(state["model/cond_in.weight"]).any()
    assert not values(state["ema/cond_in.weight"]).any()


def test_continue_names_a_damaged_checkpoint_of_its_parent(
    parent_folder: Path, tmp_path: Path
) -> None:
    more = PARENT.replace(name="more", init=Continue(PARENT))
    with world_of_one() as world:
        state = blank_state(world, more)
        with pytest.raises(Exception, match=r"checkpoint 305 of .* cannot be used.*FromFile"):
            begin(state, Origin(tmp_path), world)


def test_a_file_that_does_not_fit_leaves_every_value_as_it_was(
    parent_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(parent_folder / WEIGHTS)
    del weights["final_layer.linear.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    stage = PARENT.replace(init=FromFile(str(tmp_path / "w.safetensors")))
    with pytest.raises(InputError, match=r"final_layer.linear.bias is not in"):
        check_origin(stage)
    with world_of_one() as world:
        state = blank_state(world, stage)
        with pytest.raises(InputError, match=r"final_layer.linear.bias is not in"):
            begin(state, origin(parent_folder), world)
        assert all(t.isnan().all() for t in state.tensors().values())


def _other_files(world: World, stage: DiffusionStage, folders: list[Path]) -> str:
    """What a rank is told that sees other files than the rest."""
    init = stage.init
    assert isinstance(init, FromFile)
    own = stage.replace(init=init.replace(path=str(folders[world.rank] / WEIGHTS)))
    state = blank_state(world, own)
    with pytest.raises(InputError) as told:
        begin(state, Origin(), world)
    assert all(tensor.to_local().isnan().all() for tensor in state.tensors().values())  # type: ignore[attr-defined]  # DTensors
    return str(told.value)


def test_workers_that_see_other_files_are_all_told_and_nothing_is_loaded(
    parent_folder: Path, tmp_path: Path
) -> None:
    other, without = tmp_path / "other", tmp_path / "without"
    for folder in (other, without):
        folder.mkdir()
    weights = load_file(parent_folder / WEIGHTS)
    save_file({n: weights[n].bfloat16() for n in weights}, other / WEIGHTS)
    stage = PARENT.replace(init=FromFile("w"))
    for folder, said in ((other, "see different files"), (without, "no such file")):
        for told in run_world(_other_files, 2, stage, [parent_folder, folder]):
            assert said in told


# What is held


def test_a_held_trunk_keeps_its_bits_until_the_warm_up_is_over_and_then_moves(
    parent_folder: Path, tmp_path: Path
) -> None:
    stage = CHILD.replace(init=KeepTrunk(PARENT, warmup_samples=30))
    with world_of_one() as world:
        at_first = started(world, stage, parent_folder)
        where = origin(parent_folder)
        train(world, tmp_path, stop_after=5, stage=stage, origin=where)
        state = restored(world, tmp_path, stage)
        assert state.progress.samples == 30
        held = whole_bytes(state)
        train(world, tmp_path, stage=stage, origin=where)
        let_go = whole_bytes(restored(world, tmp_path, stage))
    moved = {n for n in SHAPES if held[f"model/{n}"] != at_first[f"model/{n}"]}
    assert moved <= {name for name in SHAPES if codec_shaped(name)}
    assert "final_layer.linear.weight" in moved
    still = {n for n in SHAPES if let_go[f"model/{n}"] == at_first[f"model/{n}"]}
    assert still == set()


def test_what_was_held_warms_up_from_zero_when_it_is_let_go() -> None:
    stage = CHILD.replace(init=KeepTrunk(PARENT, warmup_samples=30))
    held = [rate_at(stage, samples, held=True) for samples in range(6, 61, 6)]
    assert held[:5] == [0.0] * 5
    assert held[5] == pytest.approx(3e-3 * 6 / 12)
    assert held[6] == pytest.approx(3e-3)
    assert [rate_at(CHILD, s, held=True) for s in (6, 30)] == [rate_at(CHILD, s) for s in (6, 30)]


# Align


def _linear_pairs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    map_EC = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    new_NC = torch.randn(400, 7, generator=generator, dtype=torch.float64) + 0.3
    return map_EC, new_NC, new_NC @ map_EC.T


def test_an_embedding_that_can_be_imitated_is_imitated_exactly() -> None:
    map_EC, new_NC, old_NE = _linear_pairs()
    weight_DE, bias_D = torch.randn(11, 5), torch.randn(11)
    weight, bias = solve_embedding(
        PairSums.of(new_NC, old_NE), weight_DE, bias_D, Times(2.0), 1e-12
    )
    torch.testing.assert_close(weight, (weight_DE.double() @ map_EC).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, bias_D, atol=1e-4, rtol=1e-4)


def test_the_solution_is_that_of_least_squares_over_latents_at_every_noise_level() -> None:
    _, new_NC, old_NE = _linear_pairs()
    old_NE = old_NE.tanh() + 0.1  # no longer linear, so that the fit is a compromise
    weight_DE, bias_D = torch.randn(4, 5), torch.randn(4)
    alpha, ridge = 3.0, 1e-2
    sums = PairSums.of(new_NC[:150], old_NE[:150]) + PairSums.of(new_NC[150:], old_NE[150:])
    weight, bias = solve_embedding(sums, weight_DE, bias_D, Times(alpha), ridge)

    quantile = (np.arange(200) + 0.5) / 200
    logit = np.array([torch.special.ndtri(torch.tensor(q)).item() for q in quantile])
    signal = 1 - 1 / (1 + np.exp(-(logit + np.log(alpha))))
    rows_x, rows_y = [], []
    for s in signal:
        scaled = s * new_NC.numpy()
        rows_x.append(np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1))
        rows_y.append(s * old_NE.numpy() @ weight_DE.double().numpy().T + bias_D.double().numpy())
    x, y = np.concatenate(rows_x) / np.sqrt(200), np.concatenate(rows_y) / np.sqrt(200)
    second = signal_moments(Times(alpha))[1]
    penalty = ridge * second * (new_NC.numpy() ** 2).sum(0).mean()
    root = np.sqrt(penalty) * np.eye(8)[:7]
    reference = np.linalg.lstsq(np.concatenate([x, root]), np.concatenate([y, np.zeros((7, 4))]))[0]
    np.testing.assert_allclose(weight.numpy(), reference[:7].T, atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(bias.numpy(), reference[7], atol=2e-3, rtol=2e-3)


def test_the_moments_are_those_of_the_times_that_are_drawn() -> None:
    times = Times(3.0, mean=-0.5, std=1.5, uniform=0.3)
    generator = torch.Generator().manual_seed(0)
    normal_B = torch.randn(400_000, generator=generator)
    signal_B = 1 - timesteps(normal_B, times, torch.rand(400_000, generator=generator))
    first, second = signal_moments(times)
    assert first == pytest.approx(signal_B.mean().item(), abs=2e-3)  # four deviations
    assert second == pytest.approx(signal_B.square().mean().item(), abs=2e-3)


def test_what_the_solution_does_not_see_is_embedded_afresh() -> None:
    map_EC, new_NC, old_NE = _linear_pairs()
    weight_DE, fresh_DC = torch.randn(11, 5), torch.rand(11, 7)
    weight, _ = solve_embedding(
        PairSums.of(new_NC, old_NE), weight_DE, torch.zeros(11), Times(2.0), 1e-9
    )
    whole = complete(weight, fresh_DC)
    assert torch.linalg.matrix_rank(weight, rtol=1e-4) == 5
    assert torch.linalg.matrix_rank(whole, rtol=1e-4) == 7
    seen = torch.linalg.qr(map_EC.T).Q.float()  # what the old cells depend on
    torch.testing.assert_close(whole @ seen, weight @ seen, atol=1e-4, rtol=1e-4)
    unseen = torch.eye(7) - seen @ seen.T
    torch.testing.assert_close(whole @ unseen, fresh_DC @ unseen, atol=1e-4, rtol=1e-4)


@given(
    new=st.lists(st.floats(0, 10), min_size=2, max_size=6, unique=True),
    old=st.lists(st.floats(0, 10), min_size=2, max_size=6, unique=True),
)
def test_overlaps_are_shares_of_each_new_interval(new: list[float], old: list[float]) -> None:
    new, old = sorted(new), sorted(old)
    share = overlap(new, old)
    for i, (a, b) in enumerate(itertools.pairwise(new)):
        if b - a < 1e-6:
            continue
        covered = max(0.0, min(b, old[-1]) - max(a, old[0])) / (b - a)
        assert float(share[i].sum()) == pytest.approx(covered, abs=1e-9)


def test_old_cells_are_averaged_over_the_pixels_and_time_of_the_new_token() -> None:
    old_BTHWE = torch.arange(1.0, 1 + 3 * 4 * 4).reshape(1, 3, 4, 4, 1)
    new_BTHWC = torch.arange(2.0 * 2 * 2).reshape(1, 2, 2, 2, 1)
    half = overlap([0, 0.5, 1], [0, 0.25, 0.5, 0.75, 1])
    # Causal frames 1, 4, 4 against two latents of 4: the first is 1/4 frame 0 and 3/4 frames 1-3.
    time = overlap([0, 4, 8], [0, 1, 5, 9])
    new_NC, old_NE = paired_cells(new_BTHWC, old_BTHWE, (time, half, half))
    first = old_BTHWE[0, :, :2, :2].mean(dim=(1, 2, 3)).double() @ time[0]
    assert len(new_NC) == 8
    assert float(old_NE[0]) == pytest.approx(float(first))
    # Of clips that end earlier, only the tokens that are covered count.
    short = overlap([0, 4, 8], [0, 1, 5])
    new_NC, _ = paired_cells(new_BTHWC, old_BTHWE[:, :2], (short, half, half))
    assert new_NC.flatten().tolist() == [0, 1, 2, 3]


def test_stages_without_a_common_clip_cannot_be_aligned(parent_folder: Path) -> None:
    stage = CHILD.replace(init=Align(PARENT))
    strangers = Origin(
        parent_folder,
        lambda: Pairs(
            PARENT,
            DrawnLatents(PARENT, {CLIP: 23, STILL: 17}, 100),
            DrawnLatents(CHILD, {NEW_CLIP: 19}, 9000),
        ),
    )
    with world_of_one() as world, pytest.raises(InputError, match="no clip is both in bucket"):
        begin(blank_state(world, stage), strangers, world)


def test_a_dit_in_pixels_sees_the_distances_of_its_parent() -> None:
    parent, child = PARENT.build(), CHILD.build()
    assert parent.spacing == (1.0, 1.0, 1.0)
    assert child.spacing == (1.0, 2.0, 2.0)
    assert isinstance(CHILD.model, DiT)
