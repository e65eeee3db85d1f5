"""Both encoders give the same ids, and every text comes back."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fathom.errors import UserError
from fathom.train import prepare as prepare_module
from fathom.train.data import Manifest
from fathom.train.embedded import documents as embedded_documents
from fathom.train.prepare import prepare
from fathom.train.tokenizer import EOS, Encoder, load_tokenizer, train_tokenizer
from tests.train.datasets import OPTIONS, TEXTS, contents, decoded, folder_of_texts


@pytest.fixture(scope="module")
def sotu() -> Tokenizer:
    return train_tokenizer([document.text for document in embedded_documents()][:10], 1024)[0]


def test_tiktoken_gives_the_same_ids(sotu: Tokenizer):
    fast, slow = Encoder(sotu), Encoder(sotu, fast=False)
    assert (fast.backend, slow.backend) == ("tiktoken", "tokenizers")
    texts = [document.text for document in embedded_documents()][:16]
    texts += ["", " ", "\n\n \n", f"a{EOS}b", "don't DON'T ſ 'S", "1234567 ¼ ٣٤٥", "\u200b\u0085\u180e\ufeff\x00 \x1c"]
    texts += [" " * 300_000, "^" * 20_000, "a" * 20_000, "\n" * 20_000]
    for text, a, b in zip(texts, fast.encode(texts), slow.encode(texts), strict=True):
        assert a.tolist() == b.tolist(), text[:50]
        assert sotu.decode(a.tolist(), skip_special_tokens=False) == text


def test_words_are_cut_as_the_pattern_says(sotu: Tokenizer):
    text = "I'd say   12345 (no!)\n\n  done\tnow "
    cut = [text[start:stop] for _, (start, stop) in sotu.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == ["I", "'d", " say", "  ", " ", "123", "45", " (", "no", "!)\n\n", " ", " done", "\tnow", " "]


@given(st.lists(st.text(max_size=60), max_size=4))
@settings(max_examples=300, deadline=None)
def test_tiktoken_gives_the_same_ids_on_anything(sotu: Tokenizer, texts: list[str]):
    fast, slow = Encoder(sotu).encode(texts), Encoder(sotu, fast=False).encode(texts)
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in slow]


def gpt2_like(**changes) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**changes))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def test_tiktoken_is_used_only_where_it_reads_alike():
    plain = gpt2_like()
    assert Encoder(plain).backend == "tiktoken"
    text = "It's 12345 naïve  ships,\n\n and\tso on. ✓ don’t"
    assert Encoder(plain).encode([text])[0].tolist() == Encoder(plain, fast=False).encode([text])[0].tolist()
    prefixed = gpt2_like()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    word = gpt2_like()
    word.add_tokens(["ships"])
    for other in (prefixed, word, gpt2_like(dropout=0.5)):
        assert Encoder(other).backend == "tokenizers"


def test_an_existing_tokenizer_is_taken_as_it_is(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    gpt2_like().save(str(path))
    source = folder_of_texts(tmp_path / "in")
    manifest = prepare(source, tmp_path / "out", options=replace(OPTIONS, tokenizer=path))
    assert manifest.eos_id == gpt2_like().token_to_id("</s>")
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(TEXTS)
    with pytest.raises(UserError, match=r"no end token '<stop>'; .*--eos"):
        load_tokenizer(path, "<stop>")


def test_the_text_of_the_end_token_ends_no_document(tmp_path: Path):
    texts = [*TEXTS, f"before {EOS} after"]
    for name, fast in (("fast", True), ("slow", False)):
        options = replace(OPTIONS, val_fraction=0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_module, "Encoder", lambda tokenizer, fast=fast: Encoder(tokenizer, fast=fast))
            prepare(folder_of_texts(tmp_path / f"in-{name}", texts), tmp_path / name, options=options)
        assert sorted(decoded(tmp_path / name, "train") + decoded(tmp_path / name, "val")) == sorted(texts)
    assert Manifest.load(tmp_path / "fast").splits == Manifest.load(tmp_path / "slow").splits


def test_without_tiktoken_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = folder_of_texts(tmp_path / "in")
    prepare(source, tmp_path / "with", options=OPTIONS)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    prepare(source, tmp_path / "without", options=OPTIONS)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
