"""Text targets: real tokens only, padding never averaged, the same draw for the same content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossalign.config import AlignConfig, BackboneConfig
from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir
from crossalign.models.classifier import targets as module
from crossalign.models.classifier.backbone import Backbone
from crossalign.models.classifier.targets import TextTargets, kmeans, text_targets
from crossalign.models.language.model import LanguageModel, open_language_model
from crossalign.models.taps import masked_mean


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**settings: object) -> AlignConfig:
    return AlignConfig(**{"sequences": 50, "sequence_length": 6, "otdd_classes": 3, **settings})  # type: ignore[arg-type]


@pytest.fixture
def spoken(tiny_folder: Callable[[str], Path], tmp_path: Path) -> tuple[LanguageModel, Tensor]:
    """A tiny Llama with a word-level tokenizer (w3 to w58, three special tokens, one spare) and its text vectors."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "spoken"
    folder.mkdir()
    for file in tiny_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 59)} | {"[unused0]": 59, "beyond": 70}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    language_model = open_language_model(str(folder))
    return language_model, Backbone(language_model, BackboneConfig()).text_embedding_table()


@pytest.fixture
def mute(tiny_config: Callable[[str], Path]) -> tuple[LanguageModel, Tensor]:
    """A tiny Llama without a tokenizer."""
    language_model = open_language_model(f"random:{tiny_config('llama')}")
    return language_model, Backbone(language_model, BackboneConfig()).text_embedding_table()


def corpus(tmp_path: Path, text: str, name: str = "corpus.txt") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# The draw


def test_vocabulary_draws_every_text_token_and_no_other(spoken: tuple[LanguageModel, Tensor]) -> None:
    drawn = text_targets(*spoken, config(sequences=400))
    assert drawn.ids.shape == (400, 6) and drawn.mask.all() and drawn.labels is None
    assert set(drawn.ids.flatten().tolist()) == set(range(3, 59))
    counts = drawn.ids.flatten().bincount(minlength=61)[3:59].float()
    assert counts.std() / counts.mean() < 0.25  # even: Poisson would give 0.15


def test_vocabulary_without_a_tokenizer_leaves_out_the_configured_specials(mute: tuple[LanguageModel, Tensor]) -> None:
    drawn = text_targets(*mute, config(sequences=400))
    assert set(drawn.ids.flatten().tolist()) == set(range(61)) - {1, 2}  # Llama's bos and eos


def test_corpus_keeps_sentences_whole_and_apart(spoken: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    """Spaces separate words, lines do not run together, and a long line is cut."""
    text = "w5 w6 w7\n\n  \nw8\n" + " ".join(f"w{i}" for i in range(10, 20)) + "\n"
    drawn = text_targets(*spoken, config(target="corpus", corpus=corpus(tmp_path, text)))
    sentences = [row[mask].tolist() for row, mask in zip(drawn.ids, drawn.mask, strict=True)]
    assert sentences == [[5, 6, 7], [8], [10, 11, 12, 13, 14, 15]]
    assert not drawn.ids[~drawn.mask].any()


def test_corpus_larger_than_asked_is_sampled(spoken: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    path = corpus(tmp_path, "".join(f"w{3 + i % 50}\n" for i in range(500)))
    one, same, other = (text_targets(*spoken, config(target="corpus", corpus=path), seed=seed) for seed in (0, 0, 1))
    assert len(one) == 50 and len(one.ids.unique()) > 20
    assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, other.ids)


def test_corpus_labels(spoken: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    path = corpus(tmp_path, "story\tw5 w6\npoem\tw7\nstory\tw8\n", "corpus.tsv")
    drawn = text_targets(*spoken, config(target="corpus", corpus=path), labels=True)
    assert drawn.labels is not None and drawn.labels.tolist() == [1, 0, 1]
    assert drawn.ids[0].tolist() == [5, 6, 0, 0, 0, 0]
    assert text_targets(*spoken, config(target="corpus", corpus=path)).labels is None


# What comes out


def test_batches_look_vectors_up(spoken: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    language_model, table = spoken
    path = corpus(tmp_path, "w5 w6\nw7\n")
    drawn = text_targets(language_model, table, config(target="corpus", corpus=path), labels=False)
    vectors, mask, labels = drawn.batch(40, generator())
    assert vectors.shape == (40, 6, 32) and mask.shape == (40, 6) and labels is None
    assert not vectors[~mask].any()
    for row, row_mask in zip(vectors, mask, strict=True):
        ids = [5, 6] if row_mask.sum() == 2 else [7]
        assert torch.equal(row[row_mask], table[ids])
    assert {int(m.sum()) for m in mask} == {1, 2}
    assert torch.equal(vectors, drawn.batch(40, generator())[0])
    assert not torch.equal(mask, drawn.batch(40, generator(1))[1])


def test_batch_labels_belong_to_their_sequences(mute: tuple[LanguageModel, Tensor]) -> None:
    drawn = text_targets(*mute, config(), labels=True)
    vectors, _mask, labels = drawn.batch(30, generator())
    assert labels is not None and drawn.labels is not None
    for vector, label in zip(vectors, labels, strict=True):
        rows = [i for i in range(len(drawn)) if torch.equal(drawn.table[drawn.ids[i]], vector)]
        assert label in drawn.labels[rows]


def test_tokens_are_drawn_evenly_over_real_tokens(spoken: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    """Each token of the text counts once: a word of a short line is no likelier than one of a long line."""
    language_model, table = spoken
    drawn = text_targets(language_model, table, config(target="corpus", corpus=corpus(tmp_path, "w5 w6 w7\nw8\n")))
    vectors = drawn.tokens(4000, generator())
    shares = [(vectors == table[i]).all(1).float().mean().item() for i in (5, 6, 7, 8)]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


def test_means_leave_padding_out(spoken: tuple[LanguageModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    language_model, table = spoken
    text = "w5 w6 w7\nw8\nw9 w9 w10\n"
    drawn = text_targets(language_model, table, config(target="corpus", corpus=corpus(tmp_path, text)))
    expected = torch.stack([table[[5, 6, 7]].mean(0), table[8], table[[9, 9, 10]].mean(0)])
    torch.testing.assert_close(drawn.means(), expected)
    torch.testing.assert_close(masked_mean(table[drawn.ids], drawn.mask), expected)


def test_masked_mean_is_the_same_for_left_and_right_padding() -> None:
    vectors = torch.randn(2, 5, 3)
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    flipped = masked_mean(vectors.flip(1), right.flip(1))
    torch.testing.assert_close(masked_mean(vectors, right), flipped)
    torch.testing.assert_close(flipped[1], vectors[1, 0])


def test_targets_move_together(mute: tuple[LanguageModel, Tensor]) -> None:
    moved = text_targets(*mute, config(), labels=True).to("meta")
    assert all(x.is_meta for x in (moved.table, moved.ids, moved.mask, moved.labels) if x is not None)


# Clusters


def test_kmeans_finds_separate_groups() -> None:
    truth = torch.arange(3).repeat_interleave(40)
    points = torch.randn(120, 5, generator=generator()) + 30 * torch.eye(3, 5)[truth]
    labels = kmeans(points, 3, generator())
    assert labels.dtype == torch.int64
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 3
    assert torch.equal(labels, kmeans(points, 3, generator()))


def test_clusters_label_sequences_by_their_means(mute: tuple[LanguageModel, Tensor]) -> None:
    drawn = text_targets(*mute, config(sequences=200), labels=True)
    assert drawn.labels is not None and drawn.labels.shape == (200,)
    assert set(drawn.labels.tolist()) == {0, 1, 2}
    means = drawn.means()
    within = sum(means[drawn.labels == k].var(0, correction=0).sum() * (drawn.labels == k).sum() for k in range(3))
    assert within < 0.95 * means.var(0, correction=0).sum() * len(means)


# The cache


def test_a_draw_is_cached_by_content(mute: tuple[LanguageModel, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    first = text_targets(*mute, config(), labels=True, seed=11)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_from_vocabulary", None)  # drawing again would fail
        again = text_targets(*mute, config(lr=0.5), labels=True, seed=11)  # a setting that has no part in it
        assert torch.equal(first.ids, again.ids) and torch.equal(first.mask, again.mask)
        assert first.labels is not None and again.labels is not None and torch.equal(first.labels, again.labels)
    for settings, seed in ((config(), 12), (config(sequence_length=5), 11), (config(otdd_classes=2), 11)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_from_vocabulary", None)
            with pytest.raises(TypeError):
                text_targets(*mute, settings, labels=True, seed=seed)


def test_cache_notices_another_corpus_model_and_tokenizer(
    spoken: tuple[LanguageModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model, table = spoken
    settings = config(target="corpus", corpus=corpus(tmp_path, "w5 w6\n"))
    assert text_targets(language_model, table, settings).ids[0, :2].tolist() == [5, 6]
    corpus(tmp_path, "w7 w8 w9\n")
    assert text_targets(language_model, table, settings).ids[0, :3].tolist() == [7, 8, 9]
    language_model.tokenizer.add_tokens(["w60"])
    monkeypatch.setattr(module, "_from_corpus", None)  # another tokenizer: the draw is made again
    with pytest.raises(TypeError):
        text_targets(language_model, table, settings)


def test_damaged_cache_is_made_again(mute: tuple[LanguageModel, Tensor]) -> None:
    before = set(cache_dir("targets").iterdir())
    first = text_targets(*mute, config(), seed=21)
    (path,) = set(cache_dir("targets").iterdir()) - before
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(text_targets(*mute, config(), seed=21).ids, first.ids)


# Faults


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("", "empty.txt", "is empty: give a text file"),
        (" \n\n", "blank.txt", "is empty: give a text file"),
        ("story\tw5\nno tab here\n", "bad.tsv", r"has a line without a tab \('no tab here'\): write label, tab, text"),
    ],
)
def test_bad_corpus(spoken: tuple[LanguageModel, Tensor], tmp_path: Path, text: str, name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        text_targets(*spoken, config(target="corpus", corpus=corpus(tmp_path, text, name)))


def test_corpus_that_is_not_text(spoken: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"image.png' is not text in UTF-8"):
        text_targets(*spoken, config(target="corpus", corpus=str(tmp_path / "image.png")))


def test_corpus_faults(spoken: tuple[LanguageModel, Tensor], mute: tuple[LanguageModel, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs --align.corpus FILE"):
        text_targets(*spoken, config(target="corpus"))
    with pytest.raises(UserError, match=r"'.*no-such.txt' is no file"):
        text_targets(*spoken, config(target="corpus", corpus=str(tmp_path / "no-such.txt")))
    with pytest.raises(UserError, match="has no tokenizer"):
        text_targets(*mute, config(target="corpus", corpus=corpus(tmp_path, "w5\n")))
    with pytest.raises(UserError, match="gives ids beyond its 61 embeddings"):
        text_targets(*spoken, config(target="corpus", corpus=corpus(tmp_path, "beyond w5\n")))


def test_settings_that_give_no_text_or_no_classes(mute: tuple[LanguageModel, Tensor]) -> None:
    with pytest.raises(UserError, match=r"--align\.sequences is 0; it must be at least 2"):
        text_targets(*mute, config(sequences=0))
    with pytest.raises(UserError, match=r"--align\.otdd-classes is 1; it must be at least 2"):
        text_targets(*mute, config(otdd_classes=1), labels=True)
    with pytest.raises(UserError, match=r"--align.otdd-classes 9 is more than the 4 distinct"):
        text_targets(*mute, config(sequences=4, otdd_classes=9), labels=True)


# Real text


def test_real_corpus_and_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "text" / "tinystories_lower_4MB.txt").read_text().splitlines()[:300]
    language_model = open_language_model(str(shared_data / "models" / "stories260K"))
    table = Backbone(language_model, BackboneConfig()).text_embedding_table()
    path = corpus(tmp_path, "\n".join(lines))
    drawn = text_targets(language_model, table, AlignConfig(target="corpus", corpus=path), labels=True)
    line = next(line for line in lines if line.strip()).strip()
    decoded = str(language_model.tokenizer.decode(drawn.ids[0][drawn.mask[0]]))
    assert line.startswith(decoded.strip()) and len(decoded) > 20
    assert isinstance(drawn, TextTargets) and drawn.mask.sum(1).max() == 64
    vocabulary = text_targets(language_model, table, AlignConfig(sequences=100))
    assert not torch.isin(vocabulary.ids, torch.tensor([0, 1, 2])).any()
