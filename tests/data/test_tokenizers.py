"""Laws of the tokenizers."""

import json

import numpy as np
import pytest

from hourglass_jax import ByteTokenizer, CharTokenizer, UsageError
from hourglass_jax.tokenizers import CLEAN_CHARACTERS, clean

TEXTS = ["", "a", "hello, World!\n", "tabs\tand  spaces", "naïve café — 日本語 🙂 ñ\u0301"]
TEXT = "The quick brown fox\njumps — naïvely — over 13 lazy dogs 🙂"


@pytest.mark.parametrize("text", TEXTS)
def test_known_characters_come_back(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unknown(text) == []


def test_vocabulary_is_sorted_after_the_specials():
    tokenizer = CharTokenizer.from_text(TEXT)
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.characters == sorted(set(TEXT))
    assert tokenizer.vocab_size == 3 + len(set(TEXT))
    assert tokenizer.encode("".join(sorted(set(TEXT)))).tolist() == list(range(3, tokenizer.vocab_size))


def test_vocabulary_depends_on_the_set_of_characters_only():
    assert CharTokenizer.from_text(TEXT).characters == CharTokenizer.from_text(TEXT[::-1] * 2).characters


def test_unknown_characters_become_unk():
    tokenizer = CharTokenizer.from_text("abc")
    assert tokenizer.encode("axbyyx").tolist() == [3, 1, 4, 1, 1, 1]
    assert tokenizer.unknown("axbyyx") == ["x", "y"]


def test_specials_decode_to_nothing():
    tokenizer = CharTokenizer.from_text("abc")
    assert tokenizer.decode([2, 3, 1, 4, 0, 5]) == "abc"


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text("abc"), ByteTokenizer()], ids=lambda t: t.kind)
def test_one_text_of_integers_is_decoded_and_nothing_else(tokenizer):
    assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0, int)) == ""
    for tokens in ([[3, 4]], np.array([3.0]), np.array(3), [True]):
        with pytest.raises(UsageError, match=r"give integers \[L\]"):
            tokenizer.decode(tokens)


def test_names_of_specials_are_plain_text():
    tokenizer = CharTokenizer.from_text("<EOS>")
    assert tokenizer.encode("<EOS>").min() >= 3
    assert tokenizer.decode(tokenizer.encode("<EOS>")) == "<EOS>"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Hello, World!", "hello, world!"),
        ("Café à la crème, ÀÉÎÕÜ Ñandú", "cafe a la creme, aeiou nandu"),
        ('"quoted" (and) [more] 42 % #_*', "quoted and more   "),
        ("tab\tline\r\nend", "tabline\nend"),
        ("ﬁne — 日本 🙂", "fine   "),
        (CLEAN_CHARACTERS, "\n !&'$,-.:;?abcdefghijklmnopqrstuvwxyz"),
    ],
)
def test_clean_lowers_strips_accents_and_keeps_the_allowed_set(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize("text", [*TEXTS, TEXT, "".join(map(chr, range(0x2500))), "İıſßĲ"])
def test_clean_is_idempotent_and_within_the_allowed_set(text):
    assert clean(clean(text)) == clean(text)
    assert set(clean(text)) <= set(CLEAN_CHARACTERS)


def test_cleaning_tokenizer_encodes_what_clean_leaves():
    tokenizer = CharTokenizer.from_text("Ábc", clean=True)
    assert tokenizer.characters == ["a", "b", "c"]
    assert tokenizer.decode(tokenizer.encode("ÇAB 日")) == "cab"
    assert tokenizer.unknown("ÇAB Ð 日 Z") == [" ", "z"]


@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("text", [*TEXTS, TEXT, '"\\\u2028\u0000\x7f'])
def test_vocabulary_file_comes_back(tmp_path, text, cleaned):
    tokenizer = CharTokenizer.from_text(text, clean=cleaned)
    tokenizer.save(tmp_path / "vocab.json")
    loaded = CharTokenizer.load(tmp_path / "vocab.json")
    assert loaded.characters == tokenizer.characters
    assert loaded.clean is cleaned
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()


SPECIALS = {"<EOS>": 0, "<UNK>": 1, "<BOS>": 2}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        "[]",
        "3",
        "{}",
        json.dumps({"clean": False}),
        json.dumps({"vocabulary": SPECIALS}),
        json.dumps({"clean": False, "vocabulary": ["a"]}),
        json.dumps({"clean": False, "vocabulary": {}}),
        json.dumps({"clean": False, "vocabulary": SPECIALS | {"a": "3"}}),
        json.dumps({"clean": False, "vocabulary": SPECIALS | {"a": None}}),
        json.dumps({"clean": False, "vocabulary": SPECIALS | {"a": 4}}),
        json.dumps({"clean": False, "vocabulary": SPECIALS | {"a": 3, "b": 3}}),
        json.dumps({"clean": False, "vocabulary": SPECIALS | {"ab": 3}}),
        json.dumps({"clean": False, "vocabulary": {"<EOS>": 1, "<UNK>": 0, "<BOS>": 2, "a": 3}}),
        json.dumps({"clean": False, "vocabulary": {"a": 0, "b": 1, "c": 2}}),
    ],
)
def test_broken_vocabulary_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UsageError) as error:
        CharTokenizer.load(tmp_path / "vocab.json")
    assert "\n" not in str(error.value)


def test_vocabulary_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_bytes(b'{"clean": false, "vocabulary": {"\xff": 0}}')
    with pytest.raises(UsageError):
        CharTokenizer.load(tmp_path / "vocab.json")


@pytest.mark.parametrize("characters", [["a", "a"], ["ab"], [""]])
def test_vocabulary_holds_different_single_characters(characters):
    with pytest.raises(UsageError):
        CharTokenizer(characters)


@pytest.mark.parametrize("text", [*TEXTS, TEXT, "a\x02b\x03", "\r\n\0"])
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert bytes(tokens.tolist()) == text.encode("utf-8")
    assert tokenizer.decode(tokens) == text
    assert tokenizer.unknown(text) == []


def test_any_bytes_come_back_and_no_special_is_a_byte():
    tokenizer, content = ByteTokenizer(), bytes(range(256)) * 2
    assert tokenizer.encode(content).tolist() == list(content)
    assert tokenizer.decode_bytes(tokenizer.encode(content)) == content
    assert {tokenizer.bos_id, tokenizer.eos_id} == set(range(256, tokenizer.vocab_size))
    assert tokenizer.decode_bytes([tokenizer.bos_id, *content, tokenizer.eos_id]) == content


def test_bytes_alone_lose_the_two_that_stand_for_specials():
    tokenizer = ByteTokenizer(256)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (256, 2, 3)
    assert tokenizer.decode(tokenizer.encode("a\x02b\x03")) == "ab"


def test_the_bytes_of_characters_are_their_utf8():
    tokenizer = CharTokenizer.from_text(TEXT)
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id]
    assert tokenizer.decode_bytes(tokens) == TEXT.encode("utf-8")


@pytest.mark.parametrize("vocab_size", [256, 258])
def test_byte_specials_decode_to_nothing_even_within_a_character(vocab_size):
    tokenizer = ByteTokenizer(vocab_size)
    first, second = tokenizer.encode("é")
    assert tokenizer.decode([tokenizer.bos_id, first, second, tokenizer.eos_id]) == "é"


@pytest.mark.parametrize("tokens", [[0xFF], [0xC3], [0x80], [0xE6, 0x97], [0xC3, 0x41], [0xF0, 0x9F, 0x99]])
def test_invalid_bytes_become_the_replacement_character(tokens):
    within = bytes([0x61, *tokens, 0x62])
    assert "\ufffd" in ByteTokenizer().decode(tokens)
    assert ByteTokenizer().decode(list(within)) == within.decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.from_text(TEXT)], ids=["byte", "char"])
def test_stream_gives_the_same_text_for_every_split(tokenizer):
    tokens = tokenizer.encode(TEXT)
    for split in range(len(tokens) + 1):
        decode = tokenizer.stream_decoder()
        assert decode(tokens[:split]) + decode(tokens[split:]) == TEXT
    decode = tokenizer.stream_decoder()
    assert "".join(decode([token]) for token in tokens) == TEXT


def test_stream_of_invalid_bytes_is_the_whole_decode_for_every_split():
    tokenizer = ByteTokenizer()
    tokens = list(b"a\xc3(\xff\xe6\x97\xf0\x9f\x99\x82\xe6")
    for split in range(len(tokens) + 1):
        decode = tokenizer.stream_decoder()
        assert decode(tokens[:split]) + decode(tokens[split:], final=True) == tokenizer.decode(tokens)


def test_streams_do_not_share_state():
    tokenizer = ByteTokenizer()
    first, second = tokenizer.encode("é")
    one, other = tokenizer.stream_decoder(), tokenizer.stream_decoder()
    assert one([first]) == ""
    assert other([0x61]) == "a"
    assert one([second]) == "é"
