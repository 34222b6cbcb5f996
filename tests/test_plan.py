"""Stage files: every mistake is one line that says what, which value, which rule."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import models
import stages
from models import DCAE, DiT, HunyuanVAE, T5Clip, WordHash
from stages import (
    AdamW,
    AutoencoderStage,
    Bucket,
    DiffusionStage,
    Ema,
    Given,
    Phase,
    Plan,
    PlanError,
    Videos,
    load_plan,
)
from stages.explain import explain
from stages.identity import description
from stages.names import check_safe_name

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "stages/recipes").glob("*.py") if p.name != "__init__.py")

# A whole stage file; tests break one piece of it.
FILE = """\
from models import DiT, HunyuanVAE
from stages import AdamW, AutoencoderStage, Bucket, DiffusionStage, Ema, Fresh, Phase, Plan, Videos

videos = Videos("captions.csv")
parent = AutoencoderStage(
    name="parent",
    data=videos,
    vae=HunyuanVAE(),
    schedule=[Phase(until=320, buckets=[Bucket("64px", frames=9, batch=8)])],
    optimizer=AdamW(lr=1e-3, warmup=64),
    ema=Ema(halflife=100),
    save_every=64, log_every=16, evaluate_every=160,
)
child = DiffusionStage(
    name="child",
    data=videos,
    vae=parent,
    model=DiT(depth=1, depth_single=1, width=64, heads=2, patch=2),
    schedule=[
        Phase(
            until=240,
            buckets=[Bucket("64px", frames=9, batch=8), Bucket("64px", frames=1, batch=16)],
        ),
    ],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=100),
    save_every=48, log_every=24, evaluate_every=120,
)
plan = Plan("course", [parent, child])
"""


def _load(folder: Path, text: str) -> Plan:
    path = folder / "course.py"
    path.write_text(text)
    return load_plan(path)


def _lines_of(text: str, piece: str) -> range:
    """The lines of the statement in which the piece stands."""
    number = text[: text.index(piece)].count("\n") + 1
    statement = [node for node in ast.parse(text).body if node.lineno <= number][-1]
    assert statement.end_lineno is not None
    return range(statement.lineno, statement.end_lineno + 1)


def test_a_whole_file_gives_its_plan(tmp_path: Path) -> None:
    plan = _load(tmp_path, FILE)
    assert [stage.name for stage in plan.stages] == ["parent", "child"]
    child = plan.stage("child")
    assert isinstance(child, DiffusionStage)
    assert child.vae == plan.stage("parent")
    assert child.codec == HunyuanVAE()
    assert child.budget == 240


MISTAKES = {
    "a field with a typo": ("warmup=64", "warmpu=64", "AdamW has no such field.* 'warmup'"),
    "a stage field with a typo": ("log_every=16", "log_evry=16", "did you mean 'log_every'"),
    "a field left out": ("save_every=64, ", "", "Stage save_every: .* needs this field"),
    "a wrong type": (
        "AdamW(lr=1e-3)",
        "AdamW(lr='1e-3')",
        r"AdamW lr: '1e-3' is text; drop .* lr=1e-3$",
    ),
    "text that is no number": ("AdamW(lr=1e-3)", "AdamW(lr='x')", r"AdamW lr: .*number, got 'x'$"),
    "a number of samples in quotes": ("warmup=64", "warmup='64'", "drop the quotes: warmup=64$"),
    "a share in place of samples": (
        "warmup=64",
        "warmup=0.1",
        r"AdamW warmup: 0\.1 is not a whole number of samples; it is no share: .*=1_000$",
    ),
    "samples that are no whole number": ("warmup=64", "warmup=64.0", "samples; nearest is 64$"),
    "the class of a policy": (
        "vae=parent,",
        "vae=parent, init=Fresh,",
        r"DiffusionStage init: Fresh is the class itself; write Fresh\(\)$",
    ),
    "a policy as a word": (
        "vae=parent,",
        "vae=parent, init='fresh',",
        r"Stage init: 'fresh' does not .* give Fresh\(\), Contin.* or FromFile\(path=\.\.\.\)$",
    ),
    "a rate in place of an optimizer": (
        "optimizer=AdamW(lr=1e-3),",
        "optimizer=1e-3,",
        r"optimizer: 0\.001 does .* give AdamW\(lr=\.{3}\) or Muon\(lr=\.{3}, matrix_lr=\.{3}\)$",
    ),
    "no average": (
        "ema=Ema(halflife=100),\n    save_every=64",
        "ema=None,\n    save_every=64",
        r"AutoencoderStage ema: None does not belong here; give Ema\(halflife=\.\.\.\)$",
    ),
    "the class of a codec": (
        "vae=HunyuanVAE()",
        "vae=HunyuanVAE",
        r"AutoencoderStage vae: HunyuanVAE is the class itself; write HunyuanVAE\(\)$",
    ),
    "what may be left out": (
        "vae=parent,",
        "vae=parent, order=64,",
        r"DiffusionStage order: 64 does not belong here; give Windows\(\) or None$",
    ),
    "a stage by itself": (
        "[parent, child]",
        "child",
        r"Plan stages: one DiffusionStage by itself; write a list: stages=\[\.\.\.\]$",
    ),
    "a thing that is no stage": (
        "[parent, child]",
        "[parent, child, 3]",
        r"Plan stages\.2: 3 does .* AutoencoderStage\(\.\.\.\) or DiffusionStage\(\.\.\.\)$",
    ),
    "three of two values": (
        "AdamW(lr=1e-3)",
        "AdamW(lr=1e-3, betas=(0.9, 0.98, 0.999))",
        r"AdamW betas: 3 values; write 2 in brackets, such as betas=\(0\.9, 0\.999\)$",
    ),
    "one of two values": (
        "AdamW(lr=1e-3)",
        "AdamW(lr=1e-3, betas=(0.9,))",
        r"AdamW betas: 1 values; write 2 in brackets, such as betas=\(0\.9, 0\.999\)$",
    ),
    "one number of workers": (
        "vae=parent,",
        "vae=parent, workers=8,",
        r"DiffusionStage workers: 8; write 2 in brackets, such as workers=\(8, 8\)$",
    ),
    "a batch that is no whole number": (
        "batch=16",
        "batch=16.5",
        r"Bucket batch: 16\.5 is not a whole number; nearest is 16",
    ),
    "no number": ("AdamW(lr=1e-3)", "AdamW(lr=float('inf'))", "AdamW lr: .*finite number, got inf"),
    "a frame count that the codec would cut": (
        "frames=9, batch=8), B",
        "frames=8, batch=8), B",
        r"stage 'child': schedule\[0\]\.buckets\[0\]: HunyuanVAE: 8 frames .*4k\+1.* nearest is 9",
    ),
    "a size that leaves half a patch": (
        'Bucket("64px", frames=9, batch=8), B',
        'Bucket("56px", frames=9, batch=8), B',
        r"stage 'child': .*height of 56 px .*multiple of 16 px \(stride 8 x patch 2\).* 64",
    ),
    "a phase of broken rounds": (
        "until=240",
        "until=250",
        r"stage 'child': schedule\[0\]\.until 250: .*rounds of 24 samples.* nearest is 240",
    ),
    "a parent that comes later": (
        "[parent, child]",
        "[child, parent]",
        r"stage 'child': vae: its parent 'parent' does not come earlier .*\(child, parent\)",
    ),
    "a parent that is not there": ("[parent, child]", "[child]", "parent 'parent' does not come"),
    "another stage by the parent's name": (
        "vae=parent,",
        "vae=parent.replace(seed=1),",
        "its parent 'parent' is not the stage of that name .* give the same value",
    ),
    "an unknown parent": ("vae=parent,", "vae=parnt,", "NameError: name 'parnt' is not defined"),
    "a parent as a word": (
        "vae=parent,",
        "vae='parent',",
        "vae: 'parent' is no autoencoder; give .* itself",
    ),
    "a text encoder as a word": (
        "vae=parent,",
        "vae=parent, text='t5',",
        r"DiffusionStage text: 't5' is no text encoder; give WordHash\(\), or T5Clip\(t5=[^;]*$",
    ),
    "a dropout that is a switch": (
        "vae=parent,",
        "vae=parent, text_dropout=False,",
        r"DiffusionStage text_dropout: False: write a share [^;]*$",
    ),
    "a perceptual loss as a word": (
        "vae=HunyuanVAE()",
        "vae=HunyuanVAE(), perceptual='lpips'",
        r"AutoencoderStage perceptual: 'lpips' is no perceptual loss; give Lpips\([^;]*$",
    ),
    "two stages of one name": (
        'name="child"',
        'name="parent"',
        "two stages are named 'parent'",
    ),
    "no stage": ("[parent, child]", "[]", "needs at least one stage"),
    "a plan name that is no folder": ('"course"', '"My Course"', "'My Course'.* try 'my-course'"),
    "fewer workers than the fewest": (
        "vae=parent,",
        "vae=parent, workers=(3, 2),",
        r"stage 'child': workers \(3, 2\)",
    ),
    "a warm-up longer than the stage": (
        "warmup=64",
        "warmup=321",
        r"stage 'parent': optimizer\.warmup 321: longer than the stage \(320 samples\)",
    ),
    "an untrained codec under a DiT": (
        "vae=parent,",
        "vae=HunyuanVAE(channels=8),",
        "stage 'child': vae: HunyuanVAE has no weights; give weights=",
    ),
    "samples at every step of nothing": (
        "vae=parent,",
        "vae=parent, sample_every=0,",
        r"sample_every: .*greater than 0, got 0",
    ),
    "weights for a codec that is trained": (
        "vae=HunyuanVAE()",
        "vae=HunyuanVAE(weights='w.safetensors')",
        "stage 'parent': vae.weights 'w.safetensors': .*leave weights out",
    ),
    "a word of another module": ("import DiT, ", "import DyT, ", "ImportError: .*'DyT'"),
    "an error of several lines": ("plan =", "raise OSError('a\\nb')\nplan =", "OSError: a b"),
    "an exit": ("plan =", "raise SystemExit(0)\nplan =", "SystemExit: 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_place_value_and_rule(tmp_path: Path, mistake: str) -> None:
    right, wrong, expected = MISTAKES[mistake]
    assert FILE.count(right) == 1, f"{right!r} stands {FILE.count(right)} times in the file"
    text = FILE.replace(right, wrong)
    with pytest.raises(PlanError) as caught:
        _load(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    place, _, words = message.partition(": ")
    number = int(place.removeprefix(f"{tmp_path}/course.py:"))
    # What only the whole plan can show is reported where the plan is made.
    of_the_piece, of_the_plan = _lines_of(text, wrong or "parent ="), _lines_of(text, "plan = ")
    assert number in of_the_piece or number in of_the_plan, message
    assert re.search(expected, words), words
    assert "function-" not in words, "names of pydantic's insides help nobody"


def test_all_mistakes_of_one_record_are_said_a_line_each(tmp_path: Path) -> None:
    text = FILE.replace("AdamW(lr=1e-3)", "AdamW(lr='x', eps=-1, betaz=3)")
    with pytest.raises(PlanError) as caught:
        _load(tmp_path, text)
    number = text[: text.index("betaz")].count("\n") + 1
    lines = str(caught.value).splitlines()
    assert [line.partition(" AdamW ")[2].split()[0] for line in lines] == ["lr:", "eps:", "betaz:"]
    assert {line.partition(": ")[0] for line in lines} == {f"{tmp_path}/course.py:{number}"}


def test_a_fault_that_follows_from_another_is_not_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        _load(tmp_path, FILE.replace("batch=16", "batch=0"))
    assert re.search(r"Bucket batch: .*greater than or equal to 1, got 0$", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FILE.replace("plan = ", ""), "defines 0 plans"),
        (FILE + "other = Plan('other', [parent])\n", "defines 2 plans"),
        ("", "defines 0 plans"),
        ("plan = (\n", r"course\.py:1: not Python: '\(' was never closed"),
        ("x = 1\n  y = 2\n", r"course\.py:2: not Python: unexpected indent"),
        ("x = '\0'\n", r"course\.py:\d: not Python: source code .*null bytes"),
        ("def f(): f()\nf()\n", r"course\.py:\d: RecursionError"),
    ],
)
def test_a_file_that_is_not_one_plan_says_so(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(PlanError, match=expected) as caught:
        _load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_one_plan_under_two_names_is_one_plan(tmp_path: Path) -> None:
    assert _load(tmp_path, FILE + "course = plan\n").name == "course"


def test_a_folder_is_no_stage_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a folder; name a \.py file"):
        load_plan(tmp_path)


def test_a_stage_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "marked.py"
    path.write_text("\ufeff" + (ROOT / "stages/recipes/demo.py").read_text(), "utf-8")
    assert load_plan(path).name == "demo"


def test_a_file_that_is_not_there_is_named_with_one_that_is(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no such file; try stages/recipes/demo\.py"):
        load_plan(tmp_path / "nowhere.py")
    assert (ROOT / "stages/recipes/demo.py").is_file()


def test_a_broken_module_that_the_file_imports_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_beside.py").write_text("x = 1\ny = (\n")
    with pytest.raises(PlanError, match=r"broken_beside\.py:2: not Python"):
        _load(tmp_path, "import broken_beside\n")


def test_an_unknown_stage_is_told_the_nearest_name(tmp_path: Path) -> None:
    plan = _load(tmp_path, FILE)
    with pytest.raises(PlanError, match="'course' has no stage 'chlid'; did you mean 'child'"):
        plan.stage("chlid")


def test_a_record_cannot_be_changed_and_replace_checks_again(tmp_path: Path) -> None:
    stage = _load(tmp_path, FILE).stage("child")
    with pytest.raises(ValidationError, match="frozen"):
        stage.seed = 3  # type: ignore[misc]  # mypy knows it too
    assert stage.replace(seed=3).seed == 3
    with pytest.raises(ValidationError, match="whole number"):
        stage.replace(schedule=[stage.schedule[0].replace(until=241)])
    with pytest.raises(ValidationError) as caught:
        stage.replace(sede=3)
    assert "did you mean 'seed'" in explain(caught.value)


SAFE = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")


@settings(deadline=None)
@given(st.text(max_size=80) | st.from_regex(r"[a-z0-9._/\\ -]{0,70}", fullmatch=True))
def test_a_name_is_one_harmless_folder_or_refused_with_one_that_is(name: str) -> None:
    try:
        check_safe_name(name)
    except ValueError as error:
        suggestion = re.findall(r"try '([^']*)'", str(error))[-1]
        assert check_safe_name(suggestion) == suggestion
        return
    assert SAFE.fullmatch(name)
    assert len(name) <= 64
    assert ".." not in name
    assert os.path.basename(name) == os.path.normpath(name) == name


HARMFUL = ["", ".", "..", "a/b", "a\\b", "a\0", "a\n", "a b", "A", "-a", "a.", "con", "nul.txt"]
HARMFUL += ["com1", "LPT0", "a" * 65, "\u0430", "a..b", "~", "$x", "*"]


@pytest.mark.parametrize("name", HARMFUL)
def test_names_that_would_harm_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names become folders") as refused:
        check_safe_name(name)
    check_safe_name(str(refused.value).rpartition("try ")[2].strip("'"))
    with pytest.raises(ValidationError, match="names become folders"):
        Plan(name, [])


batches = st.integers(1, 512)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """An autoencoder and a DiT on it, with some of their fields drawn."""
    hunyuan = draw(st.booleans())
    frames = draw(st.integers(1, 9)) * 4 + (1 if hunyuan else 0)
    batch = draw(batches)
    bucket = Bucket("64x128", frames=frames, batch=batch, micro=draw(st.integers(1, batch)))
    phase = Phase(until=bucket.batch * draw(st.integers(1, 1000)), buckets=(bucket,))
    optimizer = AdamW(
        lr=draw(st.floats(1e-12, 1e3)),
        betas=draw(st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999))),
        decay=draw(st.integers(0, phase.until)),
    )
    parent = AutoencoderStage(
        name="parent",
        data=Videos(draw(st.text(min_size=1)), folder=draw(st.none() | st.text())),
        vae=HunyuanVAE(channels=8) if hunyuan else DCAE(),
        schedule=(phase,),
        optimizer=optimizer,
        ema=Ema(halflife=draw(batches)),
        rate=draw(st.floats(0.1, 240)),
        seed=draw(st.integers(0, 2**70)),
        save_every=1,
        log_every=2,
        evaluate_every=3,
    )
    child = DiffusionStage(
        name="child",
        data=parent.data,
        vae=parent,
        model=DiT(depth=1, depth_single=0, width=64, heads=2, patch=1),
        schedule=(phase,),
        optimizer=optimizer,
        ema=parent.ema,
        text_dropout=draw(st.floats(0, 0.99)),
        sample_every=draw(st.sampled_from([None, 4])),
        save_every=1,
        log_every=2,
        evaluate_every=3,
    )
    return Plan("drawn", [parent, child])


@settings(deadline=None, max_examples=50)
@given(plans())
def test_a_plan_goes_through_json_unchanged(plan: Plan) -> None:
    assert Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json")))) == plan


@pytest.mark.parametrize(
    "text", [WordHash(width=8), T5Clip(t5="t5", clip="clip"), T5Clip(t5="a", clip="b", pooled=64)]
)
def test_the_text_encoder_reads_back_as_what_it_was(
    text: WordHash | T5Clip, tmp_path: Path
) -> None:
    plan = _load(tmp_path, FILE)
    child = plan.stage("child").replace(text=text)
    changed = Plan(plan.name, [plan.stage("parent"), child])
    again = Plan.model_validate(json.loads(json.dumps(changed.model_dump(mode="json"))))
    assert again == changed
    assert type(again.stage("child").text) is type(text)  # type: ignore[union-attr]  # a DiffusionStage
    assert again.stage("child").build().txt_in.in_features == text.width  # type: ignore[union-attr]


def test_given_frames_and_a_model_that_takes_them_come_together(tmp_path: Path) -> None:
    child = _load(tmp_path, FILE).stage("child")
    assert isinstance(child, DiffusionStage)
    taking = child.model.replace(image_condition=True)
    stage = child.replace(model=taking, given=Given())
    assert [stage.gives(bucket) for bucket in stage.buckets] == [True, False]
    assert not any(child.gives(bucket) for bucket in child.buckets)
    again = DiffusionStage.model_validate(json.loads(stage.model_dump_json()))
    assert again == stage
    stills = [Phase(until=160, buckets=[Bucket("64px", frames=1, batch=16)])]
    for changes, words in (
        ({"given": Given()}, "'child': given: .*takes no frames: write .*image_condition=True"),
        ({"model": taking}, r"'child': given: None, .*with given=Given\(\)"),
        ({"model": taking, "given": Given(), "schedule": stills}, "a single latent frame"),
    ):
        with pytest.raises(ValidationError, match=words):
            child.replace(**changes)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"none": 1, "head": 0, "loop": 0, "tail": 0}, "nothing is ever given"),
        ({"head": -1}, "head"),
        ({"haed": 1}, "haed"),
        ({"tail": float("inf")}, "tail"),
    ],
)
def test_impossible_weights_of_given_frames_are_refused(
    weights: dict[str, float], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        Given(**weights)


def test_what_identifies_a_stage_is_all_that_can_change_its_result(tmp_path: Path) -> None:
    child = _load(tmp_path, FILE).stage("child")
    same = child.replace(
        workers=(2, 3), save_every=1, log_every=1, evaluate_every=1, sample_every=1
    )
    smaller = [
        phase.replace(buckets=[bucket.replace(micro=1) for bucket in phase.buckets])
        for phase in child.schedule
    ]
    assert description(same.replace(schedule=smaller)) == description(child)
    for change in (
        {"seed": 1},
        {"rate": 8.0},
        {"match": "any"},
        {"optimizer": AdamW(lr=2e-3)},
        {"text_dropout": 0.2},
        {"held_out": 3},
        {"data": Videos("other.csv")},
    ):
        assert description(child.replace(**change)) != description(child), change
    json.dumps(description(child), allow_nan=False)


# Runs a stage file where opening any file but Python's own sources, making a tensor, and
# connecting anywhere end the process.
WATCHED = """\
import builtins, io, socket, sys
import models, stages  # their own imports are not the recipe's
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.addaudithook(lambda event, arguments: check(event, arguments))
watching = False

def check(event, arguments):
    if not watching or not arguments:
        return
    if event.startswith("socket."):
        sys.exit(f"network: {event} {arguments}")
    name = str(arguments[0])
    if event == "open" and not name.endswith((".py", ".pyc")) and ".pyc." not in name:
        sys.exit(f"opened {name}")

class NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        sys.exit(f"tensor work: {function}")

import runpy
with NoTensors():
    watching = True
    names = runpy.run_path(sys.argv[1], run_name="stage_file")
    watching = False
    probe = sys.argv[2]
    if probe == "tensor":
        torch.zeros(1)
    if probe == "file":
        watching = True
        open("/dev/null")
print([v.name for v in names.values() if isinstance(v, stages.Plan)])
"""


def _watched(path: Path, probe: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, str(path), probe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_loads_makes_no_tensor_and_reads_no_file(recipe: Path) -> None:
    done = _watched(recipe, "none")
    assert done.returncode == 0, done.stderr
    plan = load_plan(recipe)
    assert done.stdout.strip() == str([plan.name])
    assert Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json")))) == plan


@pytest.mark.parametrize(("probe", "word"), [("tensor", "tensor work"), ("file", "/dev/null")])
def test_the_watch_over_recipes_sees_a_tensor_and_a_file(probe: str, word: str) -> None:
    done = _watched(RECIPES[0], probe)
    assert done.returncode == 1
    assert word in done.stderr


def test_defaults_in_the_guide_are_those_of_the_code() -> None:
    guide = (ROOT / "stages/README.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| `(.+?)` \|", guide, re.MULTILINE)
    assert len(rows) > 8
    for record, field, default in rows:
        owner = getattr(stages, record, None) or getattr(models, record)
        assert repr(owner.model_fields[field].default) == default, f"{record}.{field}"
