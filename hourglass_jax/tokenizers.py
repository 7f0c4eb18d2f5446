"""Text and images to integers and back: characters with a JSON vocabulary, bytes, pixels."""

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
    """Lower-cases, strips accents to ASCII and keeps only `CLEAN_CHARACTERS`, as the original project does."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return "".join(c for c in ascii_text if c in CLEAN_CHARACTERS)


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"{type(text).__name__} is no text; give a str, of bytes e.g. data.decode('utf-8')")


def to_utf8(text: str) -> bytes:
    """Raises UsageError for a lone surrogate, half of a character, of which there is no UTF-8."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start} of the text is {text[error.start]!a}, half of a surrogate pair and no character; "
            "leave it out, or decode the text as what it is"
        ) from None


def read_tokens(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    """int [L] as a list; raises UsageError for another shape or type, and for tokens outside 0 .. vocab_size - 1."""
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise UsageError("tokens are rows of different lengths; give integers [L], of one text at a time") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"tokens are {array.dtype} {list(array.shape)}; give integers [L], of one text at a time")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        raise UsageError(f"tokens {array.min()} .. {array.max()} are outside 0 .. {vocab_size - 1}, the vocabulary")
    return array.tolist()


class CharTokenizer:
    """One token a character: the sorted characters of a text after <EOS>, <UNK> and <BOS>."""

    kind = "char"
    SPECIALS = ("<EOS>", "<UNK>", "<BOS>")

    def __init__(self, characters: Sequence[str], *, clean: bool = False):
        """`characters` in the order of their tokens, without the specials; `clean` cleans what is encoded."""
        self.characters = list(characters)
        self.clean = clean
        if any(not isinstance(c, str) or len(c) != 1 for c in self.characters) or len(set(self.characters)) != len(
            self.characters
        ):
            raise UsageError("a vocabulary must list different single characters after <EOS>, <UNK>, <BOS>")
        to_utf8("".join(self.characters))  # in which the vocabulary is saved
        self.eos_id, self.unk_id, self.bos_id = range(3)
        self._ids = {c: i + len(self.SPECIALS) for i, c in enumerate(self.characters)}

    @classmethod
    def from_text(cls, text: str, *, clean: bool = False) -> CharTokenizer:
        """With the characters of `text`, of its cleaned form with `clean`."""
        check_text(text)
        return cls(sorted(set(_clean(text) if clean else text)), clean=clean)

    @property
    def vocab_size(self) -> int:
        """Specials included."""
        return len(self.SPECIALS) + len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """-> int32 [L]; characters outside the vocabulary become <UNK>. Raises UsageError for what is no str."""
        check_text(text)
        text = _clean(text) if self.clean else text
        return np.fromiter((self._ids.get(c, self.unk_id) for c in text), np.int32)

    def unknown(self, text: str) -> list[str]:
        """The characters of `text` that `encode` would map to <UNK>, sorted."""
        return sorted(set(_clean(text) if self.clean else text) - set(self._ids))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """int [L] -> text, without the special tokens. Raises UsageError for tokens outside the vocabulary."""
        n = len(self.SPECIALS)
        return "".join(self.characters[t - n] for t in read_tokens(tokens, self.vocab_size) if t >= n)

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 of `decode`."""
        return self.decode(tokens).encode("utf-8")

    def stream_decoder(self) -> Callable[..., str]:
        """A function from the next tokens to the text they complete; `final=True` ends the stream."""
        return lambda tokens, final=False: self.decode(tokens)

    def save(self, path: str | Path) -> None:
        """JSON: token string to token id, and whether text is cleaned."""
        names = [*self.SPECIALS, *self.characters]
        record = {"clean": self.clean, "vocabulary": {name: i for i, name in enumerate(names)}}
        write_whole(Path(path), json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """What `save` wrote; raises UsageError for another file."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            names = sorted(record["vocabulary"], key=record["vocabulary"].get)
            ids = sorted(record["vocabulary"].values())
            cleaned = bool(record["clean"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a vocabulary of this library: {error}") from error
        if tuple(names[:3]) != cls.SPECIALS or ids != list(range(len(ids))):
            raise UsageError(f"{path}: tokens 0, 1, 2 must be <EOS>, <UNK>, <BOS> and the ids must have no gaps")
        try:
            return cls(names[3:], clean=cleaned)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


_clean = clean  # `clean` is also a parameter above


class ByteTokenizer:
    """One token a byte, 0 .. 255; BOS and EOS, 256 and 257, begin and end examples.

    They are tokens of their own, since any byte may stand in a file, and there is no <UNK>, since none is unknown.
    `ByteTokenizer(256)` has bytes alone, as the vocabulary of the paper's tables and of older models of this library:
    there, the control bytes STX and ETX, 2 and 3, are BOS and EOS, and stand in no text.
    """

    kind = "byte"
    N_BYTES = 256
    unk_id = None

    def __init__(self, vocab_size: int = N_BYTES + 2):
        """`vocab_size`: 258, or 256 for bytes alone. Raises UsageError for another."""
        if vocab_size not in (self.N_BYTES, self.N_BYTES + 2):
            raise UsageError(f"vocab_size={vocab_size!r} is out of range; bytes with BOS and EOS are 258, alone 256")
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = (2, 3) if vocab_size == self.N_BYTES else (256, 257)

    def encode(self, text: str | bytes) -> np.ndarray:
        """-> int32 [L], the bytes of a text's UTF-8, or those given. Raises UsageError for what has none."""
        if not isinstance(text, bytes):
            check_text(text)
            text = to_utf8(text)
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def unknown(self, text: str) -> list[str]:
        """None: every text has bytes."""
        return []

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """int [L] -> text, without BOS and EOS; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Sequence[int] | np.ndarray) -> bytes:
        """int [L] -> the bytes themselves, without BOS and EOS. Raises UsageError for tokens outside the vocabulary."""
        specials = (self.bos_id, self.eos_id)
        return bytes(t for t in read_tokens(tokens, self.vocab_size) if t not in specials)

    def stream_decoder(self) -> Callable[..., str]:
        """As `CharTokenizer.stream_decoder`; a split character waits for its rest, or for `final=True`."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, final=False: decoder.decode(self.decode_bytes(tokens), final)


class ImageTokenizer:
    """One token a channel of a pixel, its intensity, in raster order; BOS comes before the first."""

    kind = "image"
    vocab_size = 257
    bos_id, eos_id, unk_id = 256, None, None

    def __init__(self, shape: Sequence[int]):
        """`shape` of an image: height, width, channels."""
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise UsageError(f"image shape {shape!r} is unknown; give height, width and channels")
        self.shape = tuple(shape)

    @property
    def n_tokens(self) -> int:
        """Of an image, without BOS."""
        return math.prod(self.shape)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [..., H, W, C] -> int32 [..., H*W*C]. Raises UsageError for another shape or type."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[-3:] != self.shape:
            raise UsageError(
                f"images are {images.dtype} {list(images.shape)}; give uint8 [..., H, W, C] of {self.shape}"
            )
        return images.reshape(*images.shape[:-3], self.n_tokens).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """int [..., H*W*C] -> uint8 [..., H, W, C]. Raises UsageError for another length, or BOS among the tokens."""
        tokens = np.asarray(tokens)
        whole = tokens.dtype.kind in "iu" and tokens.shape[-1:] == (self.n_tokens,)
        if not whole or not ((tokens >= 0) & (tokens < self.bos_id)).all():
            raise UsageError(f"tokens {list(tokens.shape)} are no images of {self.n_tokens} intensities from 0 to 255")
        return tokens.astype(np.uint8).reshape(*tokens.shape[:-1], *self.shape)


TextTokenizer = CharTokenizer | ByteTokenizer
Tokenizer = TextTokenizer | ImageTokenizer


def boundary_tokens(tokenizer: Tokenizer, boundaries: str) -> tuple[int, ...]:
    """The tokens at which `boundaries` of a configuration end a group; none where they read bytes, or no tokens.

    Raises UsageError for images, in which nothing is whitespace.
    """
    [name, *_] = [*boundaries.split(), "fixed"]
    if name not in ("whitespace", "spacelike") or isinstance(tokenizer, ByteTokenizer):
        return ()
    if isinstance(tokenizer, ImageTokenizer):
        raise UsageError(f"boundaries={boundaries!r} are read off a text; images have none, so choose fixed")
    ends_group = str.isspace if name == "whitespace" else lambda c: not c.isalnum()
    listed = (i for i, c in enumerate(tokenizer.characters, len(tokenizer.SPECIALS)) if ends_group(c))
    return (tokenizer.eos_id, tokenizer.bos_id, *listed)
