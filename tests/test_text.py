"""The built-in text encoder: the same words, the same numbers, on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.text import TextBatch, TextEmbedding, WordHash, pad, without_text

ENCODER = WordHash()
WORDS = st.lists(st.sampled_from(["a", "red", "blue", "circle", "moving", "left"]), max_size=9)


def test_vectors_are_pinned_for_stored_embeddings() -> None:
    # Written out once: a change here makes stored embeddings wrong and must raise WordHash.rule.
    embedding_LD, pooled_D = WordHash(width=4, position=0.0).encode(["red"])[0]
    expected = torch.tensor([[0.92002708, -0.04096692, -0.98007721, -1.62157166]])
    torch.testing.assert_close(embedding_LD, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(pooled_D, expected[0] * 2 / expected.norm(), rtol=1e-6, atol=0)


def test_another_process_gives_the_same_numbers() -> None:
    code = (
        "from models.text import WordHash; "
        "print(WordHash().encode(['a red circle'])[0].embedding_LD.double().sum().item())"
    )
    root = Path(__file__).resolve().parent.parent
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert float(printed) == ENCODER.encode(["a red circle"])[0].embedding_LD.double().sum().item()


@given(words=WORDS)
def test_an_embedding_has_one_token_a_word_and_at_least_one(words: list[str]) -> None:
    embedding_LD, pooled_D = ENCODER.encode([" ".join(words)])[0]
    assert embedding_LD.shape == (max(1, len(words)), ENCODER.width)
    assert pooled_D.shape == (ENCODER.pooled_width,)
    assert embedding_LD.dtype == pooled_D.dtype == torch.float32


@pytest.mark.parametrize("caption", ["", "   ", "...!?"])
def test_a_caption_without_a_word_is_the_null_text(caption: str) -> None:
    embedding_LD, pooled_D = ENCODER.encode([caption])[0]
    null = ENCODER.null()
    assert torch.equal(embedding_LD, null.embedding_LD)
    assert torch.equal(pooled_D, null.pooled_D)
    assert embedding_LD.shape == (1, 64)
    assert not embedding_LD.any()
    assert not pooled_D.any()


def test_case_form_and_punctuation_do_not_matter() -> None:
    first, second = ENCODER.encode(["A r\u00e9d circle, moving", "a RE\u0301D  circle moving!"])
    assert torch.equal(first.embedding_LD, second.embedding_LD)
    assert torch.equal(first.pooled_D, second.pooled_D)


def test_order_matters_to_the_tokens_and_not_to_the_pooled_vector() -> None:
    first, second = ENCODER.encode(["red above blue", "blue above red"])
    assert not torch.allclose(first.embedding_LD.sort(0).values, second.embedding_LD.sort(0).values)
    torch.testing.assert_close(first.pooled_D, second.pooled_D)


def test_word_vectors_are_unit_gaussian_and_unrelated() -> None:
    encoder = WordHash(width=256, position=0.0)
    words_LD = encoder.encode([" ".join(f"word{i}" for i in range(400))])[0].embedding_LD
    assert words_LD.mean().abs() < 0.02
    assert words_LD.var().item() == pytest.approx(1, abs=0.02)
    assert words_LD.pow(4).mean().item() == pytest.approx(3, abs=0.15)
    cosine = torch.nn.functional.normalize(words_LD) @ torch.nn.functional.normalize(words_LD).T
    assert cosine.fill_diagonal_(0).abs().max() < 0.4


def test_the_pooled_vector_has_unit_variance_whatever_the_length() -> None:
    for embedding in ENCODER.encode(["red", "a red circle moving left slowly"]):
        assert embedding.pooled_D.square().mean().item() == pytest.approx(1, rel=1e-5)


@given(captions=st.lists(WORDS.map(" ".join), min_size=1, max_size=5))
def test_padding_keeps_every_caption_and_marks_where_it_ends(captions: list[str]) -> None:
    embeddings = ENCODER.encode(captions)
    text_BLD, mask_BL, pooled_BD = pad(embeddings)
    assert mask_BL is not None
    assert mask_BL.dtype == torch.bool
    assert text_BLD.shape[1] == max(len(each.embedding_LD) for each in embeddings)
    for row, embedding in enumerate(embeddings):
        length = len(embedding.embedding_LD)
        assert torch.equal(text_BLD[row, :length], embedding.embedding_LD)
        assert not text_BLD[row, length:].any()
        assert mask_BL[row].tolist() == [at < length for at in range(text_BLD.shape[1])]
        assert torch.equal(pooled_BD[row], embedding.pooled_D)


@given(words=st.lists(WORDS, min_size=1, max_size=4))
def test_the_longest_caption_is_found_without_encoding(words: list[list[str]]) -> None:
    captions = [" ".join(each) for each in words]
    encoded = ENCODER.encode(captions)
    assert ENCODER.most_tokens(captions) == max(len(each.embedding_LD) for each in encoded)


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("num_null", [1, 2, 5])
def test_dropping_replaces_either_half_of_either_row_by_the_null_text(
    num_null: int, has_mask: bool
) -> None:
    captions = ENCODER.encode(["a red circle", "blue circle moving"])
    null = TextEmbedding(torch.randn(num_null, 64), torch.randn(64))
    whole = pad(captions)
    text = whole if has_mask else TextBatch(whole.text_BLD, None, whole.pooled_BD)
    for tokens in ([False, False], [True, False], [True, True]):
        for pooled in ([False, False], [False, True], [True, True]):
            text_BLD, mask_BL, pooled_BD = without_text(
                text, null, torch.tensor(tokens), torch.tensor(pooled)
            )
            assert mask_BL is not None
            assert text_BLD.shape[1] == mask_BL.shape[1] == max(3, num_null)
            for row, caption in enumerate(captions):
                wanted_LD = (null if tokens[row] else caption).embedding_LD
                assert torch.equal(text_BLD[row, mask_BL[row]], wanted_LD)
                assert not text_BLD[row, ~mask_BL[row]].any()
                assert torch.equal(pooled_BD[row], (null if pooled[row] else caption).pooled_D)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no caption"):
        pad([])


def test_the_fingerprint_tells_encoders_apart() -> None:
    variants = [WordHash(), WordHash(width=32), WordHash(position=0.5)]
    prints = [tuple(sorted(each.fingerprint_fields().items())) for each in variants]
    assert len(set(prints)) == 3
    assert WordHash().fingerprint_fields() == WordHash().fingerprint_fields()


@pytest.mark.parametrize("fields", [{"width": 1}, {"position": -1.0}, {"widht": 64}])
def test_an_impossible_encoder_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        WordHash.model_validate(fields)
