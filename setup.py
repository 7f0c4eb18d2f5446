"""Packaging of hourglass_jax; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "numpy>=2.0",
    "absl-py>=2.3",
    "grain>=0.2.18",
    "ml_collections>=1.1.0",
    "tqdm>=4.66",
    "tensorboardX>=2.6.4",
    "matplotlib>=3.9",
    "Pillow>=10.1",
    "safetensors>=0.5",
    "jaxtyping>=0.3",
]

DATA = ["pyarrow>=17.0", "fsspec[http]>=2024.6"]  # Parquet, Arrow and .zst files, and URLs
HUB = ["huggingface_hub>=0.34"]
STABLEHLO = ["flatbuffers>=24.3.25"]  # jax.export serializes with it
NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]


class EditableWithLaunchers(editable_wheel):
    """A checkout can import `experiments` too; a wheel would take a user's own folder of that name away."""

    def run(self):
        self.distribution.packages += find_packages(include=["experiments", "experiments.*"])
        super().run()


setup(
    name="hourglass_jax",
    version="0.1.0",
    description="Hierarchical (Hourglass) character- and pixel-level language models in JAX/Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the hourglass_jax authors",
    license="Apache-2.0",
    project_urls={"Paper": "https://arxiv.org/abs/2110.13711"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["hourglass_jax", "hourglass_jax.*"]),
    package_data={"hourglass_jax": ["py.typed", "data/haiku.txt", "weights/*/*"]},
    cmdclass={"editable_wheel": EditableWithLaunchers},
    install_requires=CORE,
    extras_require={
        "bench": ["hourglass-transformer-pytorch>=0.0.6", "torch==2.13.0"],
        "cuda": ["jax[cuda]>=0.10.2"],
        "data": DATA,
        "tpu": ["jax[tpu]>=0.10.2"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "latex2mathml>=3.78"],
        "hub": HUB,
        "notebooks": NOTEBOOKS,
        "stablehlo": STABLEHLO,
        "torch": ["torch>=2.4"],  # to convert its checkpoints; 2.3 was the first for numpy 2
        "test": [
            *("pytest>=8.0", "pytest-xdist>=3.8", "ruff>=0.9", "mypy>=1.11", "setuptools>=68", "datasets>=3.2"),
            *DATA,
            *HUB,
            *STABLEHLO,
            *NOTEBOOKS,
        ],
    },
)
