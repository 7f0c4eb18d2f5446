"""Tokenizers of characters (with a JSON vocabulary), bytes and images."""

from __future__ import annotations

import codecs
import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hourglass_jax.errors import UsageError
from hourglass_jax.files import write_whole

CLEAN_CHARACTERS = "\n !&'$,-.:;?abcdefghijklmnopqrstuvwxyz"


def clean(text: str) -> str:
    """Lower-case, strip accents, and drop characters outside `CLEAN_CHARACTERS`, as the original project does."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return "".join(c for c in ascii_text if c in CLEAN_CHARACTERS)


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"text is {type(text).__name__}; give a str, e.g. data.decode('utf-8')")


def to_utf8(text: str) -> bytes:
    """Encode as UTF-8. Raises UsageError for a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start} of the text is {text[error.start]!a}, half of a surrogate pair; remove it, or "
            "decode the text with its actual encoding"
        ) from None


def read_tokens(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    """Convert integers [L] to a list. Raises UsageError for other shapes and types, and for unknown tokens."""
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise UsageError("tokens has rows of different lengths; give integers [L], one text per call") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"tokens is {array.dtype} {list(array.shape)}; give integers [L], one text per call")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        raise UsageError(f"tokens has values {array.min()} .. {array.max()}; give values from 0 to {vocab_size - 1}")
    return array.tolist()


class CharTokenizer:
    """One token per character: <EOS>, <UNK>, <BOS>, then the sorted characters of a text."""

    kind = "char"
    SPECIALS = ("<EOS>", "<UNK>", "<BOS>")

    def __init__(self, characters: Sequence[str], *, clean: bool = False):
        """Create a tokenizer with these characters, which follow the special tokens in this order.

        clean: apply `clean` to text before encoding.

        Raises UsageError for duplicates, and for strings that are not one character.
        """
        self.characters = list(characters)
        self.clean = clean
        single = all(isinstance(c, str) and len(c) == 1 for c in self.characters)
        if not single or len(set(self.characters)) != len(self.characters):
            raise UsageError(
                "characters must be distinct single characters; list each once, without <EOS>, <UNK>, <BOS>"
            )
        to_utf8("".join(self.characters))  # raises for characters that the saved vocabulary cannot encode
        self.eos_id, self.unk_id, self.bos_id = range(3)
        self._ids = {c: i + len(self.SPECIALS) for i, c in enumerate(self.characters)}

    @classmethod
    def from_text(cls, text: str, *, clean: bool = False) -> CharTokenizer:
        """Return a tokenizer with the characters of `text`, cleaned first if `clean`."""
        check_text(text)
        return cls(sorted(set(_clean(text) if clean else text)), clean=clean)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including the special ones."""
        return len(self.SPECIALS) + len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Encode text as int32 [L]; unknown characters become <UNK>. Raises UsageError unless it is a str."""
        check_text(text)
        text = _clean(text) if self.clean else text
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        token_of = np.full(int(codes.max(initial=0)) + 1, self.unk_id, np.int32)
        for character, token in self._ids.items():
            if ord(character) < len(token_of):
                token_of[ord(character)] = token
        return token_of[codes]

    def unknown(self, text: str) -> list[str]:
        """Return the sorted characters that `encode` maps to <UNK>."""
        return sorted(set(_clean(text) if self.clean else text) - set(self._ids))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode int [L] to text, without special tokens. Raises UsageError for tokens outside the vocabulary."""
        n = len(self.SPECIALS)
        return "".join(self.characters[t - n] for t in read_tokens(tokens, self.vocab_size) if t >= n)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Decode int [L] to UTF-8, without special tokens."""
        return self.decode(tokens).encode("utf-8")

    def stream_decoder(self) -> Callable[..., str]:
        """Return a function that decodes a stream: from the next tokens to their text; `final=True` ends it."""
        return lambda tokens, final=False: self.decode(tokens)

    def save(self, path: str | Path) -> None:
        """Write JSON with the token of each character, and `clean`."""
        names = [*self.SPECIALS, *self.characters]
        record = {"clean": self.clean, "vocabulary": {name: i for i, name in enumerate(names)}}
        write_whole(Path(path), json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Read a vocabulary that `save` wrote. Raises UsageError for other files."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            names = sorted(record["vocabulary"], key=record["vocabulary"].get)
            ids = sorted(record["vocabulary"].values())
            cleaned = bool(record["clean"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a saved CharTokenizer: {error}") from error
        if tuple(names[:3]) != cls.SPECIALS or ids != list(range(len(ids))):
            raise UsageError(f"{path}: tokens must be 0, 1, 2, ... without gaps, starting with <EOS>, <UNK>, <BOS>")
        try:
            return cls(names[3:], clean=cleaned)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


_clean = clean  # `clean` is also a parameter above


class ByteTokenizer:
    """One token per byte, 0 .. 255; 256 and 257 are BOS and EOS, which begin and end examples.

    `ByteTokenizer(256)` has no separate special tokens, for models of the paper's tables and older models of this
    library. Its BOS and EOS are the control bytes STX (2) and ETX (3), which do not occur in text.
    """

    kind = "byte"
    N_BYTES = 256
    unk_id = None

    def __init__(self, vocab_size: int = N_BYTES + 2):
        """`vocab_size`: 258, or 256 without separate BOS and EOS. Raises UsageError for other sizes."""
        if vocab_size not in (self.N_BYTES, self.N_BYTES + 2):
            raise UsageError(f"vocab_size={vocab_size!r} is not 258 (bytes, BOS and EOS) or 256 (bytes)")
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = (2, 3) if vocab_size == self.N_BYTES else (256, 257)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Encode UTF-8 text or bytes as int32 [L]. Raises UsageError for lone surrogates and other types."""
        if not isinstance(text, bytes):
            check_text(text)
            text = to_utf8(text)
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def unknown(self, text: str) -> list[str]:
        """Return []: all text can be encoded."""
        return []

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode int [L] to text, without BOS and EOS; invalid UTF-8 becomes the replacement character."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """Decode int [L] to bytes, without BOS and EOS. Raises UsageError for tokens outside the vocabulary."""
        specials = (self.bos_id, self.eos_id)
        return bytes(t for t in read_tokens(tokens, self.vocab_size) if t not in specials)

    def stream_decoder(self) -> Callable[..., str]:
        """As `CharTokenizer.stream_decoder`; an incomplete character is held back until it is complete or `final`."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, final=False: decoder.decode(self.decode_bytes(tokens), final)


class ImageTokenizer:
    """One token per intensity, in the order row, column, channel; BOS starts a sequence."""

    kind = "image"
    vocab_size = 257
    bos_id, eos_id, unk_id = 256, None, None

    def __init__(self, shape: Sequence[int]):
        """`shape`: height, width, channels of an image."""
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise UsageError(f"shape={shape!r} is not an image shape; give height, width and channels")
        self.shape = tuple(shape)

    @property
    def n_tokens(self) -> int:
        """Tokens of an image, without BOS."""
        return math.prod(self.shape)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode uint8 [..., H, W, C] as int32 [..., H*W*C]. Raises UsageError for other shapes and types."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[-3:] != self.shape:
            shape = ", ".join(map(str, self.shape))
            raise UsageError(f"images is {images.dtype} {list(images.shape)}; give uint8 [..., {shape}]")
        return images.reshape(*images.shape[:-3], self.n_tokens).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode int [..., H*W*C] to uint8 [..., H, W, C]. Raises UsageError for other lengths and for BOS."""
        tokens = np.asarray(tokens)
        whole = tokens.dtype.kind in "iu" and tokens.shape[-1:] == (self.n_tokens,)
        if not whole or not ((tokens >= 0) & (tokens < self.bos_id)).all():
            raise UsageError(
                f"tokens is {tokens.dtype} {list(tokens.shape)}; give integers [..., {self.n_tokens}] from 0 to 255"
            )
        return tokens.astype(np.uint8).reshape(*tokens.shape[:-1], *self.shape)


TextTokenizer = CharTokenizer | ByteTokenizer
Tokenizer = TextTokenizer | ImageTokenizer


def boundary_tokens(tokenizer: Tokenizer, boundaries: str) -> tuple[int, ...]:
    """Return the tokens that end groups with whitespace or spacelike boundaries; () for bytes and other boundaries.

    Raises UsageError for images with such boundaries.
    """
    [name, *_] = [*boundaries.split(), "fixed"]
    if name not in ("whitespace", "spacelike") or isinstance(tokenizer, ByteTokenizer):
        return ()
    if isinstance(tokenizer, ImageTokenizer):
        raise UsageError(f"boundaries={boundaries!r} requires text, not images; choose fixed")
    ends_group = str.isspace if name == "whitespace" else lambda c: not c.isalnum()
    listed = (i for i, c in enumerate(tokenizer.characters, len(tokenizer.SPECIALS)) if ends_group(c))
    return (tokenizer.eos_id, tokenizer.bos_id, *listed)
