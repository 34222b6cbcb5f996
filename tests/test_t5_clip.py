"""T5 and CLIP from local folders: true lengths, no padding in the values, only safetensors."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import NUM_TOKENS, POOLED, WIDTH, WORDS, change_weights, tiny_t5_clip
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from models import T5Clip, t5_clip

CAPTIONS = ["a red circle", "", "blue square moving left a red circle", "left"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> T5Clip:
    return tiny_t5_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def copied(encoder: T5Clip, tmp_path: Path) -> T5Clip:
    """The same encoder in folders that a test may change."""
    shutil.copytree(encoder.t5, tmp_path / "t5")
    shutil.copytree(encoder.clip, tmp_path / "clip")
    return encoder.replace(t5=str(tmp_path / "t5"), clip=str(tmp_path / "clip"))


def test_an_embedding_is_that_of_its_caption_alone_and_as_long(encoder: T5Clip) -> None:
    """Against transformers, one caption at a time, so that nothing can be padded."""
    t5 = T5EncoderModel.from_pretrained(encoder.t5)
    clip = CLIPTextModel.from_pretrained(encoder.clip)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (encoder.t5, encoder.clip)]
    found = encoder.encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, found, strict=True):
        tokens = [tokenizer(caption, return_tensors="pt").input_ids for tokenizer in tokenizers]
        with torch.no_grad():
            text_LD = t5(input_ids=tokens[0]).last_hidden_state[0]
            pooled_D = clip(input_ids=tokens[1]).pooler_output[0]
        assert len(embedding.embedding_LD) == len(caption.split()) + 1  # with the end token
        torch.testing.assert_close(embedding.embedding_LD, text_LD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embedding.pooled_D, pooled_D, rtol=1e-5, atol=1e-6)
    assert len({embedding.pooled_D.sum().item() for embedding in found}) == len(CAPTIONS)


def test_what_a_caption_is_encoded_with_does_not_matter(encoder: T5Clip) -> None:
    many = [" ".join(WORDS[: 1 + number % 7]) for number in range(40)]  # several batches
    together, alone = encoder.encode(many), [encoder.encode([caption])[0] for caption in many]
    for one, other in zip(together, alone, strict=True):
        assert one.embedding_LD.shape == other.embedding_LD.shape
        torch.testing.assert_close(one.embedding_LD, other.embedding_LD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.pooled_D, other.pooled_D, rtol=1e-5, atol=1e-6)


def test_a_long_caption_is_cut_and_keeps_its_end_token(encoder: T5Clip) -> None:
    cut, whole = encoder.encode(["red " * 30, "red " * (NUM_TOKENS - 1)])
    assert len(cut.embedding_LD) == NUM_TOKENS == encoder.most_tokens(["red " * 30])
    assert torch.equal(cut.embedding_LD, whole.embedding_LD)


def test_the_null_text_is_the_empty_caption(encoder: T5Clip) -> None:
    null = encoder.null()
    assert null.embedding_LD.shape == (1, WIDTH)
    assert null.pooled_D.shape == (POOLED,)
    assert null.embedding_LD.any()
    assert torch.equal(null.embedding_LD, encoder.encode([""])[0].embedding_LD)
    assert encoder.encode([]) == []


def test_bfloat16_is_near_and_is_another_encoder(encoder: T5Clip) -> None:
    rounded = encoder.replace(dtype="bfloat16")
    one, other = encoder.encode(CAPTIONS[:1])[0], rounded.encode(CAPTIONS[:1])[0]
    assert other.embedding_LD.dtype == torch.float32
    torch.testing.assert_close(one.embedding_LD, other.embedding_LD, rtol=0.05, atol=0.05)
    assert encoder.fingerprint_fields() != rounded.fingerprint_fields()


@pytest.mark.parametrize("part", ["t5", "clip"])
def test_the_fingerprint_follows_the_weights_and_not_the_folder(
    encoder: T5Clip, copied: T5Clip, part: str
) -> None:
    before = copied.fingerprint_fields()
    assert before == encoder.fingerprint_fields()
    folder = Path(getattr(copied, part))
    (folder / "README.md").write_text("of no weight")
    assert copied.fingerprint_fields() == before
    change_weights(folder)
    changed = copied.fingerprint_fields()
    assert {name for name in before if before[name] != changed[name]} == {part}


@pytest.mark.parametrize(
    "change", [{"tokens": 5}, {"clip_tokens": 4}, {"dtype": "bfloat16"}], ids=str
)
def test_the_fingerprint_tells_settings_apart(encoder: T5Clip, change: dict[str, object]) -> None:
    assert encoder.replace(**change).fingerprint_fields() != encoder.fingerprint_fields()


def test_a_tokenizer_is_part_of_the_fingerprint(copied: T5Clip) -> None:
    before = copied.fingerprint_fields()
    path = Path(copied.t5) / "tokenizer.json"
    path.write_text(path.read_text().replace("circle", "circus"))
    assert copied.fingerprint_fields() != before


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", r"text\.t5 .*config\.json is missing"),
        ("model.safetensors", r"text\.t5 .*no \*\.safetensors file.* convert"),
        ("tokenizer.json", r"text\.t5 .*no tokenizer.*spiece\.model"),
    ],
)
def test_a_missing_file_is_named(copied: T5Clip, gone: str, words: str) -> None:
    (Path(copied.t5) / gone).unlink()
    (Path(copied.t5) / "pytorch_model.bin").write_bytes(b"a pickle, never read")
    for use in (copied.check, copied.fingerprint_fields, copied.null):
        with pytest.raises(ValueError, match=words):
            use()


def test_a_missing_folder_is_named_and_nobody_is_asked(
    encoder: T5Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ValueError, match=r"text\.clip 'openai/clip': no such folder"):
        encoder.replace(clip="openai/clip").null()


def test_weights_that_lack_a_layer_are_refused(copied: T5Clip) -> None:
    path = Path(copied.clip) / "model.safetensors"
    tensors = load_file(path)
    del tensors[max(name for name in tensors if "layers.1" in name)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fill a CLIPTextModel.*layers\.1"):
        copied.null()


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _words(path: Path) -> None:
    path.write_text("<html>not found</html>")


def _list(path: Path) -> None:
    path.write_text("[]")


def _set(**fields: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _without_layers(path: Path) -> None:
    tensors = {name: x for name, x in load_file(path).items() if "norm" in name}
    save_file(tensors, path, metadata={"format": "pt"})


def _renamed(path: Path) -> None:
    path.rename(path.with_name("t5xxl_fp16.safetensors"))


def _listed(path: Path) -> None:
    path.rename(path.with_name("model-1-of-2.safetensors"))
    listed = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(listed))


def _only_pieces(path: Path) -> None:
    path.unlink()
    path.with_name("spiece.model").write_bytes(b"no protobuf")


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("t5/model.safetensors", _torn, r"model\.safetensors \([\d,]+ bytes\) is no whole safeten"),
        ("clip/model.safetensors", _torn, r"is no whole safetensors file .*; copy it again"),
        ("t5/model.safetensors", _empty, r"\(0 bytes\) is no whole safetensors file"),
        ("t5/model.safetensors", _without_layers, "no tensor 'encoder.* which a T5 encoder has"),
        ("t5/model.safetensors", _renamed, r"'t5xxl_fp16\.safetensors' is not read; .*rename"),
        ("t5/model.safetensors", _listed, r"lists 2 files, and model-2-of-2\.safetensors \(1 in"),
        ("t5/config.json", _torn, r"config\.json cannot be read .*; copy the published one"),
        ("clip/config.json", _list, r"config\.json holds a list, and must hold an object"),
        ("t5/config.json", _set(model_type="bert"), "model_type 'bert', and a T5 encoder has 't5'"),
        ("t5/config.json", _set(model_type=None), "model_type None"),
        ("t5/config.json", _set(d_model="8"), "d_model '8', which must be a whole number"),
        (
            "t5/config.json",
            _set(d_model=16),
            r"q\.weight has the shape \[8, 8\].* d_model 16;",
        ),
        ("clip/config.json", _set(max_position_embeddings=77), r"shape \[9, 12\].*embeddings 77"),
        ("t5/tokenizer.json", _torn, r"the tokenizer tokenizer\.json .*cannot be read"),
        ("clip/tokenizer.json", _words, r"the tokenizer tokenizer\.json .*cannot be read"),
        ("t5/tokenizer.json", _only_pieces, r"the tokenizer spiece\.model .*cannot be read"),
        ("clip/tokenizer_config.json", _words, r"tokenizer_config\.json cannot be read"),
    ],
)
def test_a_broken_file_is_named_before_a_model_is_loaded(
    copied: T5Clip,
    name: str,
    harm: Callable[[Path], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(t5_clip, "_load", None)
    copied.check()
    field, _, file = name.partition("/")
    harm(Path(getattr(copied, field)) / file)
    with pytest.raises(ValueError, match=rf"text\.{field} '{getattr(copied, field)}': .*{words}"):
        copied.check()


def test_swapped_folders_are_told_apart(encoder: T5Clip) -> None:
    with pytest.raises(ValueError, match=r"text\.t5 .*'clip_text_model', and .* swapped\?"):
        encoder.replace(t5=encoder.clip, clip=encoder.t5).check()
    with pytest.raises(ValueError, match=r"text\.clip .*'t5', and a CLIP text model .* swapped\?"):
        encoder.replace(clip=encoder.t5).check()


def test_weights_may_lie_in_several_files(copied: T5Clip) -> None:
    before = copied.encode(CAPTIONS)
    folder = Path(copied.t5)
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    places = {}
    for part, some in (("a", tensors[:5]), ("b", tensors[5:])):
        save_file(dict(some), folder / f"{part}.safetensors", metadata={"format": "pt"})
        places |= {name: f"{part}.safetensors" for name, _ in some}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    copied.check()
    t5_clip._load.cache_clear()
    for one, other in zip(before, copied.encode(CAPTIONS), strict=True):
        assert torch.equal(one.embedding_LD, other.embedding_LD)


def test_a_whole_clip_will_do_for_its_text_model(copied: T5Clip) -> None:
    before = copied.encode(CAPTIONS)
    config = Path(copied.clip) / "config.json"
    text_config = json.loads(config.read_text())
    config.write_text(json.dumps({"model_type": "clip", "text_config": text_config}))
    path = Path(copied.clip) / "model.safetensors"
    # Some versions write the text model alone under the prefix as well.
    prefixed = {
        f"text_model.{name.removeprefix('text_model.')}": x for name, x in load_file(path).items()
    }
    save_file(prefixed, path, metadata={"format": "pt"})
    copied.check()
    t5_clip._load.cache_clear()
    for one, other in zip(before, copied.encode(CAPTIONS), strict=True):
        assert torch.equal(one.pooled_D, other.pooled_D)


def test_what_only_loading_finds_names_the_folder(copied: T5Clip) -> None:
    _set(num_layers="two")(Path(copied.t5) / "config.json")
    copied.check()
    with pytest.raises(ValueError, match=rf"text\.t5 '{copied.t5}': transformers cannot load it"):
        copied.null()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t5_width": 9}, "t5_width=9: .*has 8"),
        ({"pooled": 13}, "pooled=13: .*has 12"),
        ({"clip_tokens": 77}, "clip_tokens=77: .*knows 9 places"),
    ],
)
def test_sizes_of_another_model_are_refused(
    encoder: T5Clip, change: dict[str, object], words: str
) -> None:
    for use in (encoder.replace(**change).check, encoder.replace(**change).null):
        with pytest.raises(ValueError, match=words):
            use()


def test_folders_are_made_absolute_for_other_processes(
    encoder: T5Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(encoder.t5).parent)
    assert encoder.replace(t5="t5", clip="clip").located() == encoder


def test_without_the_library_the_message_says_what_to_install(
    encoder: T5Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "restage\[text\]"'):
        encoder.check()
