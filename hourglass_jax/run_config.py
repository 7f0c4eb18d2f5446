"""Configuration of a run: data, optimizer, training and runtime, as validated, frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_literals, check_range, take_plain_values

MAX_SEED = 2**32 - 1  # JAX keys keep the low 32 bits, so larger seeds would collide
IMAGE_SIZES = {"cifar10": 32, "imagenet32": 32, "imagenet64": 64}  # side of the images of a data set, in pixels
FOLDER = "folder"  # data set name for a folder of images


def check_image_size(dataset: str, image_size: int) -> None:
    """Raise UsageError unless images of `dataset` can be resized to this side; 0 keeps their size."""
    if dataset == FOLDER:
        check_range("image_size", image_size, 0)
        return
    size = IMAGE_SIZES[dataset]
    check_range("image_size", image_size, 0, size)
    if image_size and size % image_size:
        raise UsageError(
            f"image_size={image_size} does not divide {size}, the side of {dataset} images; choose a divisor, or 0"
        )


@dataclass(frozen=True)
class DataConfig:
    """Data set and batches. `order` and `split` apply only to text.

    path: a UTF-8 text file, a directory of .txt files, a pattern such as "books/*.txt", or several of these separated
        by commas; texts are joined in the order of their names. tokenizer="byte" reads any files. Or a token store,
        which has its own tokenizer and splits. For images, their directory. Empty: the built-in corpus.
    dataset: text | cifar10 | imagenet32 | imagenet64 | folder (of image files).
    image_size: side in pixels to which images are averaged down; must divide the stored side. 0: as stored. Images of a
        folder are cropped to squares, and may be resized to any side.
    tokenizer: char | byte.
    clean: lower-case, strip accents, keep only "\\n !&'$,-.:;?" and a-z. Ignored by tokenizer="byte".
    block_size: tokens per training window; for cifar10, imagenet32 and imagenet64, tokens per image.
    batch_size: windows or images per step.
    order: random (windows start anywhere) | epochs (consecutive windows, each once per epoch) | documents (windows
        begin with a document of a token store; see `data.pipeline.plan_documents`).
    split: fraction (at train_fraction, no test split) | enwik8 (90M train, 5M validation, 5M test).
    train_fraction: share of training tokens, or of images in a folder; the rest is for validation.
    valid_path: validation text, in the same form as `path`. Its files, and copies of them, are excluded from training.
    background: gray level behind transparent pixels of a folder's images, from 0 (black) to 255 (white).
    """

    path: str = ""
    dataset: Literal["text", "cifar10", "imagenet32", "imagenet64", "folder"] = "text"
    image_size: int = 0
    tokenizer: Literal["char", "byte"] = "char"
    clean: bool = False
    block_size: int = 128
    batch_size: int = 16
    order: Literal["random", "epochs", "documents"] = "random"
    split: Literal["fraction", "enwik8"] = "fraction"
    train_fraction: float = 0.9
    valid_path: str = ""
    background: int = 255

    def __post_init__(self) -> None:
        take_plain_values(self)
        check_literals(self)
        if self.dataset != "text":
            check_image_size(self.dataset, self.image_size)
        if self.dataset in IMAGE_SIZES:
            object.__setattr__(self, "block_size", 3 * (self.image_size or IMAGE_SIZES[self.dataset]) ** 2)
        if self.dataset == "text" and self.image_size:
            raise UsageError(
                f"image_size={self.image_size} requires images; leave it out, or choose another dataset than text"
            )
        if self.valid_path and (self.dataset != "text" or self.split != "fraction"):
            other = f"dataset={self.dataset!r}" if self.dataset != "text" else f"split={self.split!r}"
            raise UsageError(
                f"valid_path={self.valid_path!r} excludes {other}, which has its own validation split; leave out one"
            )
        check_range("background", self.background, 0, 255)
        check_range("block_size", self.block_size, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("train_fraction", self.train_fraction, 0.0, 1, open_low=True, open_high=True)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning rate schedule; the defaults are the paper's (section 3): no weight decay, no clipping.

    optimizer: adamw | muon (orthogonal updates for the kernels of linear layers but the head, Adam with Nesterov
        momentum for all other parameters).
    learning_rate: maximum, after the warmup.
    schedule: after the warmup. cosine (to 0) | inverse_sqrt | constant | wsd (warmup, stable, decay: constant, then
        `decay_steps` of linear decay to 0).
    warmup_steps: length of the linear warmup from 0.
    decay_steps: length of a linear decay to 0 at the end of training, with any schedule. 0: none; for wsd, a fifth of
        the steps.
    beta1, beta2, eps: of Adam.
    weight_decay: applies only to linear kernels; see `training.optimizer.decay_mask`.
    clip_norm: maximum global norm of the gradient of trained parameters; 0: no clipping.
    train_only: modules to train, separated by commas, e.g. "hourglass.post,head". Other parameters are frozen and have
        no optimizer state. Empty: all.
    level_rates: factors of the learning rate, one for each level of the hierarchy, outermost first. Embeddings and head
        belong to the first level, a shortening and its upsampling to the outer of their two levels. Empty: all 1.
    ema: decay of an exponential moving average of the trained parameters, e.g. 0.999. Evaluation, samples and `load`
        use the average. Over the first steps the decay is lower; see `training.optimizer.with_average`. 0: no average.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 4e-4
    schedule: Literal["cosine", "inverse_sqrt", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    train_only: str = ""
    level_rates: tuple[float, ...] = ()
    ema: float = 0.0

    def __post_init__(self) -> None:
        take_plain_values(self)
        check_literals(self)
        check_range("learning_rate", self.learning_rate, 0.0, open_low=True)
        check_range("eps", self.eps, 0.0, open_low=True)
        for name in ("warmup_steps", "decay_steps"):
            check_range(name, getattr(self, name), 0)
        for name in ("weight_decay", "clip_norm"):
            check_range(name, getattr(self, name), 0.0)
        for name in ("beta1", "beta2", "ema"):
            check_range(name, getattr(self, name), 0.0, 1, open_high=True)
        if not isinstance(self.level_rates, tuple):
            raise UsageError(f"level_rates={self.level_rates!r} is not a tuple; give factors, e.g. (1.0, 0.5)")
        for rate in self.level_rates:
            check_range("level_rates", rate, 0.0, open_low=True)


@dataclass(frozen=True)
class TrainConfig:
    """Length of training, evaluation and seed.

    steps: number of batches.
    eval_interval: steps between evaluations, each of which saves a checkpoint.
    eval_batches: batches of an evaluation during training, evenly spaced; the final evaluation uses the whole split.
    patience: evaluations without improvement until training stops early; 0: never.
    seed: of initialization, data order and dropout.
    shorten_factors: one of them is drawn for each step (section 4.1). Empty: the factor of the hierarchy.
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
            raise UsageError(f"shorten_factors={self.shorten_factors!r} is not a tuple; give factors, e.g. (2, 3)")
        for factor in self.shorten_factors:
            check_range("shorten_factors", factor, 2)


@dataclass(frozen=True)
class RuntimeConfig:
    """Devices, memory, checkpoints and logs. They do not affect the result and may change when a run resumes.

    data: devices that share a batch; -1: all devices, divided by fsdp.
    fsdp: devices that share parameters, optimizer state and batch.
    accumulate: sequential parts of a batch, to save memory.
    checkpoint_interval: steps between checkpoints, in addition to those of evaluations; 0: none.
    keep_checkpoints: latest checkpoints to keep, at least 2, in addition to the best one; 0: all.
    sample_interval: steps between samples during training; 0: none.
    profile_steps: first:last steps to profile, e.g. 10:12; empty: none.
    log: bar | plain (lines) | none | auto (a bar in a terminal, otherwise lines).
    """

    data: int = -1
    fsdp: int = 1
    accumulate: int = 1
    checkpoint_interval: int = 0
    keep_checkpoints: int = 2
    sample_interval: int = 0
    profile_steps: str = ""
    log: Literal["auto", "bar", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        take_plain_values(self)
        check_literals(self)
        for name in ("fsdp", "accumulate"):
            check_range(name, getattr(self, name), 1)
        for name in ("checkpoint_interval", "sample_interval", "keep_checkpoints"):
            check_range(name, getattr(self, name), 0)
        if self.keep_checkpoints == 1:
            raise UsageError(
                "keep_checkpoints=1 would leave none while the next one is saved; give 2 or more, or 0 for all"
            )
        if self.data != -1:
            check_range("data", self.data, 1)
        self.profiled  # noqa: B018 - validates profile_steps

    @property
    def profiled(self) -> tuple[int, int]:
        """First and last step to profile; (0, 0): none."""
        if not self.profile_steps:
            return 0, 0
        first, colon, last = self.profile_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UsageError(
                f"profile_steps={self.profile_steps!r} is not a range; give the first and last step, e.g. 10:12"
            )
        return int(first), int(last)
