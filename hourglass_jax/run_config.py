"""What can be chosen of a run: its data, optimiser, length and machine, as plain frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_choice, check_range, take_plain_values

MAX_SEED = 2**32 - 1  # of a larger one, a key of JAX keeps the last 32 bits, so that two would share it
IMAGE_SIZES = {"cifar10": 32, "imagenet32": 32, "imagenet64": 64}  # side of a data set's images, in pixels
FOLDER = "folder"  # the data set of one's own images


def check_image_size(dataset: str, image_size: int) -> None:
    """Raises unless images of `dataset` can be averaged down to this side; 0 leaves them as they are."""
    if dataset == FOLDER:
        check_range("image_size", image_size, 0)
        return
    size = IMAGE_SIZES[dataset]
    check_range("image_size", image_size, 0, size)
    if image_size and size % image_size:
        raise UsageError(f"image_size={image_size} does not divide the side {size} of {dataset}'s images")


@dataclass(frozen=True)
class DataConfig:
    """Which text or images, and how they are cut into batches. Images have their own order, split and length.

    path: a UTF-8 text file, a directory of .txt files, a pattern such as "books/*.txt", or several of these with commas
        between, joined in the order of their names; any files where `tokenizer` is byte; the images' directory; empty:
        the built-in corpus.
    dataset: text | cifar10 | imagenet32 | imagenet64 | folder (image files of one's own).
    image_size: averages images down to this side in pixels, which divides their own; 0: as stored. Images of a folder
        are first cut to squares, and take any side.
    tokenizer: char | byte.
    clean: lower-case, strip accents, keep "\\n !&'$,-.:;?" and a-z (characters only).
    block_size: tokens a training window; images have their own length.
    batch_size: windows or images a step.
    order: random (windows start anywhere) | epochs (consecutive windows, each once an epoch).
    split: fraction (by train_fraction, no test) | enwik8 (90M train, 5M validation, 5M test).
    train_fraction: the rest is for validation, of a text or a folder.
    valid_path: another text for validation, given as `path` is; then `path` is for training, without the files for
        validation and copies of them.
    background: the gray level, 0 (black) to 255 (white), behind transparent pixels of a folder's images.
    """

    path: str = ""
    dataset: str = "text"
    image_size: int = 0
    tokenizer: str = "char"
    clean: bool = False
    block_size: int = 128
    batch_size: int = 16
    order: str = "random"
    split: str = "fraction"
    train_fraction: float = 0.9
    valid_path: str = ""
    background: int = 255

    def __post_init__(self) -> None:
        take_plain_values(self)
        check_choice("dataset", self.dataset, ("text", *IMAGE_SIZES, FOLDER))
        if self.dataset != "text":
            check_image_size(self.dataset, self.image_size)
        if self.dataset in IMAGE_SIZES:
            object.__setattr__(self, "block_size", 3 * (self.image_size or IMAGE_SIZES[self.dataset]) ** 2)
        if self.dataset == "text" and self.image_size:
            raise UsageError(f"image_size={self.image_size} is for images; choose them by dataset")
        if self.valid_path and (self.dataset != "text" or self.split != "fraction"):
            other = f"dataset={self.dataset!r}" if self.dataset != "text" else f"split={self.split!r}"
            raise UsageError(f"valid_path={self.valid_path!r}: {other} has a validation split; leave out one of them")
        check_choice("tokenizer", self.tokenizer, ("char", "byte"))
        check_choice("order", self.order, ("random", "epochs"))
        check_choice("split", self.split, ("fraction", "enwik8"))
        check_range("background", self.background, 0, 255)
        check_range("block_size", self.block_size, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("train_fraction", self.train_fraction, 0.0, 1, open_low=True, open_high=True)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule; the defaults are the paper's (section 3): no weight decay, no clipping.

    learning_rate: the peak.
    schedule: cosine (to 0) | inverse_sqrt | constant, after the warm-up.
    warmup_steps: from 0 to the peak, linearly.
    decay_steps: the last ones of the training, over which the rate of any schedule falls to 0, linearly.
    beta1, beta2, eps: Adam's.
    weight_decay: of the matrices of linear layers alone; see `training.optimizer.is_decayed`.
    clip_norm: of the gradient of all parameters that are trained; 0: no clipping.
    train_only: modules that are trained, with commas between, as "hourglass.post,head"; the others stay as they are,
        and have no optimizer state. Empty: all.
    """

    learning_rate: float = 4e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    train_only: str = ""

    def __post_init__(self) -> None:
        take_plain_values(self)
        check_choice("schedule", self.schedule, ("cosine", "inverse_sqrt", "constant"))
        check_range("learning_rate", self.learning_rate, 0.0, open_low=True)
        check_range("eps", self.eps, 0.0, open_low=True)
        for name in ("warmup_steps", "decay_steps"):
            check_range(name, getattr(self, name), 0)
        for name in ("weight_decay", "clip_norm"):
            check_range(name, getattr(self, name), 0.0)
        for name in ("beta1", "beta2"):
            check_range(name, getattr(self, name), 0.0, 1, open_high=True)


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look.

    steps: batches.
    eval_interval: steps between evaluations, each with a checkpoint.
    eval_batches: batches an evaluation during training, evenly spaced; the last one reads the whole split.
    patience: evaluations in a row without a better one after which training ends early; 0: it never does.
    seed: of initialisation, order and dropout.
    shorten_factors: one of them is drawn each step (section 4.1); none: the hierarchy's own.
    """

    steps: int = 1000
    eval_interval: int = 200
    eval_batches: int = 20
    patience: int = 0
    seed: int = 0
    shorten_factors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        take_plain_values(self)
        for name in ("steps", "eval_interval", "eval_batches"):
            check_range(name, getattr(self, name), 1)
        check_range("patience", self.patience, 0)
        check_range("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.shorten_factors, tuple):
            raise UsageError(f"shorten_factors={self.shorten_factors!r}: give factors, as (2, 3)")
        for factor in self.shorten_factors:
            check_range("shorten_factors", factor, 2)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how watched a run is. None of it changes what is learned: it may differ when a run goes on.

    data: devices among which a batch is divided; -1: all that fsdp leaves.
    fsdp: devices among which parameters and optimiser state are divided, and the batch too.
    accumulate: parts a batch is taken in, one after another, to save memory.
    checkpoint_interval: steps between checkpoints beside those of each evaluation; 0: none.
    keep_checkpoints: the latest that are kept, 2 at least, beside the best one; 0: all.
    sample_interval: steps between samples during training; 0: none.
    profile_steps: first:last steps to profile, e.g. 10:12; empty: none.
    log: bar | plain (lines) | none | auto: a bar on a terminal, lines elsewhere.
    """

    data: int = -1
    fsdp: int = 1
    accumulate: int = 1
    checkpoint_interval: int = 0
    keep_checkpoints: int = 2
    sample_interval: int = 0
    profile_steps: str = ""
    log: str = "auto"

    def __post_init__(self) -> None:
        take_plain_values(self)
        for name in ("fsdp", "accumulate"):
            check_range(name, getattr(self, name), 1)
        for name in ("checkpoint_interval", "sample_interval", "keep_checkpoints"):
            check_range(name, getattr(self, name), 0)
        if self.keep_checkpoints == 1:
            raise UsageError("keep_checkpoints=1 leaves none while the next is written; give 2 or more, or 0 for all")
        check_choice("log", self.log, ("auto", "bar", "plain", "none"))
        if self.data != -1:
            check_range("data", self.data, 1)
        self.profiled  # noqa: B018 - read for its check

    @property
    def profiled(self) -> tuple[int, int]:
        """First and last step to profile; (0, 0) for none."""
        if not self.profile_steps:
            return 0, 0
        first, colon, last = self.profile_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UsageError(f"profile_steps={self.profile_steps!r}: give the first and last step, e.g. 10:12")
        return int(first), int(last)
