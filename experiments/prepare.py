"""Prepare a token store: the documents of any corpus as memory-mapped tokens, for pretrain.py --data_path=STORE.

python experiments/prepare.py --data_path="shards/*.jsonl.zst" --out=data/web
python experiments/prepare.py --data_path=pages.parquet --field=body --id_field=url --processes=4 --out=data/pages
python experiments/prepare.py --data_path=books --tokenizer=char --valid_fraction=0.1 --out=data/books
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags, logging
from tqdm import tqdm

from experiments.common import launcher
from hourglass_jax import CharTokenizer, UsageError
from hourglass_jax.data.prepare import PrepareConfig, prepare
from hourglass_jax.data.records import corpus_files

DEFAULT = PrepareConfig()
DATA_PATH = launcher.define_path(
    "data_path", "", "File, directory, pattern or URL of documents, or several separated by commas."
)
OUT = launcher.define_path("out", "", "Directory of the token store.")
FIELD = flags.DEFINE_string("field", DEFAULT.field, "Field of the text in each record; a .txt file is one document.")
ID_FIELD = flags.DEFINE_string(
    "id_field", DEFAULT.id_field, "Split documents by the hash of this field; empty: by the hash of their text."
)
TOKENIZER = flags.DEFINE_enum(
    "tokenizer", DEFAULT.tokenizer, ["byte", "char"], "char: one token for each character of the documents."
)
VOCAB_PATH = launcher.define_path("vocab_path", "", "Use this vocabulary (JSON), e.g. a run's vocab.json.")
VALID_FRACTION = flags.DEFINE_float("valid_fraction", DEFAULT.valid_fraction, "Share of documents for validation.")
TEST_FRACTION = flags.DEFINE_float("test_fraction", DEFAULT.test_fraction, "Share of documents for a test.")
DROP_DUPLICATES = flags.DEFINE_boolean(
    "drop_duplicates", DEFAULT.drop_duplicates, "Keep only the first of several documents with the same text."
)
PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that encode; the store does not depend on them.", 1)


def main(_: list[str]) -> None:
    for name, value in (("data_path", DATA_PATH.value), ("out", OUT.value)):
        if not value:
            raise UsageError(f"--{name} is missing; give --data_path=DOCUMENTS and --out=DIRECTORY")
    if VOCAB_PATH.value and TOKENIZER.present and TOKENIZER.value == "byte":
        raise UsageError("--vocab_path lists characters, which --tokenizer=byte does not use; leave out one of them")
    config = PrepareConfig(
        field=FIELD.value,
        id_field=ID_FIELD.value,
        tokenizer="char" if VOCAB_PATH.value else TOKENIZER.value,
        valid_fraction=VALID_FRACTION.value,
        test_fraction=TEST_FRACTION.value,
        drop_duplicates=DROP_DUPLICATES.value,
    )
    tokenizer = CharTokenizer.load(VOCAB_PATH.value) if VOCAB_PATH.value else None
    files = corpus_files(DATA_PATH.value)
    # Without `disable`, tqdm obeys TQDM_DISABLE=1.
    hidden = {} if sys.stderr.isatty() else {"disable": True}
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5, **hidden) as bar:

        def report(n_bytes: int, file: str) -> None:
            bar.set_postfix_str(file, refresh=False)
            bar.update(n_bytes)

        store = prepare(files, OUT.value, config, tokenizer, processes=PROCESSES.value, report=report)
    record = store.record
    if record["empty"]:
        logging.warning("%d empty documents left out, the first is %s", record["empty"], record["first_empty"])
    if not len(store.valid):
        logging.warning("no document is for validation, which training requires; pass a larger --valid_fraction")
    counts = ", ".join(
        f"{split} {part['tokens']:,} tokens in {part['documents']:,} documents"
        for split, part in record["splits"].items()
    )
    duplicates = f", {record['duplicates']:,} duplicates dropped" * config.drop_duplicates
    print(f"{counts}{duplicates} -> {OUT.value}")
    print("\n" + launcher.next_command("pretrain", f"--data_path={OUT.value}"))


if __name__ == "__main__":
    launcher.run(main)
