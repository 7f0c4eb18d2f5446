"""The paper's tables as data: each row a configuration and the paper's figures."""

from __future__ import annotations

from dataclasses import dataclass

from hourglass_jax import HourglassConfig

# Section 3's enwik8 ablation model. Table 1's parameter counts fit these two resampling methods.
ENWIK8 = {
    "vocab_size": 256,
    "d_model": 512,
    "d_ff": 2048,
    "n_heads": 8,
    "shortening": "attention_average",
    "upsampling": "attention_repeat",
    "dropout": 0.15,
    "max_length": 2048,
}


@dataclass(frozen=True)
class Table1Row:
    """enwik8 validation BPC, training memory in GB, training steps a second, parameters in millions."""

    hierarchy: str
    bpc: float
    memory_gb: float
    steps_per_second: float
    parameters_millions: int

    @property
    def config(self) -> HourglassConfig:
        return HourglassConfig(hierarchy=self.hierarchy, **ENWIK8)


TABLE_1 = (
    Table1Row("6@1", 1.182, 4.53, 0.95, 21),
    Table1Row("2@1 1@3 2@1", 1.163, 4.41, 1.11, 24),
    Table1Row("2@1 4@4 2@1", 1.143, 4.41, 1.10, 34),
    Table1Row("8@1", 1.151, 5.75, 0.73, 28),
    Table1Row("2@1 4@3 2@1", 1.128, 4.88, 1.00, 34),
    Table1Row("2@1 8@4 2@1", 1.128, 4.98, 0.99, 48),
    Table1Row("2@1 1@2 4@4 1@2 2@1", 1.115, 4.69, 0.86, 48),
    Table1Row("2@1 8@3 2@1", 1.111, 5.50, 0.88, 48),
    Table1Row("10@1", 1.128, 6.99, 0.56, 34),
    Table1Row("3@1 8@4 3@1", 1.109, 6.14, 0.76, 55),
    Table1Row("12@1", 1.115, 8.12, 0.47, 41),
    Table1Row("4@1 8@4 4@1", 1.098, 7.20, 0.62, 62),
    Table1Row("2@1 16@3 2@1", 1.096, 5.89, 0.71, 75),
    Table1Row("14@1", 1.102, 9.35, 0.40, 48),
    Table1Row("5@1 8@2 5@1", 1.079, 9.57, 0.45, 69),
)
