"""The one chain of commands in the default set: pretrain, finetune, generate, evaluate."""

import json

from launching import run_forked

WORDS = "an old pond a frog jumps in the sound of water "
SMALL = ["--hierarchy=0@1 1@2 1@1", "--d_model=16", "--n_heads=2", "--d_ff=32", "--block_size=16", "--batch_size=4"]
SMALL += ["--shortening=average", "--upsampling=repeat", "--steps=6", "--train.eval_interval=3"]


def succeed(script, *flags, cwd):
    result = run_forked(script, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_pretrained_model_is_fine_tuned_generates_and_is_evaluated(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 40)
    (tmp_path / "haiku.txt").write_text(
        "\n\n".join(f"an old pond\na frog jumps in\n{'the ' * i}sound" for i in range(20))
    )
    succeed("pretrain", *SMALL, "--data_path=text.txt", "--out=plain", cwd=tmp_path)
    flags = ["--data_path=haiku.txt", "--extend_vocabulary", "--epochs=1", "--out=tuned"]
    succeed("finetune", "--load_model_path=plain", *flags, cwd=tmp_path)
    assert succeed("generate", "--load_model_path=tuned", "--max_tokens=12", cwd=tmp_path).strip()
    evaluated = succeed("evaluate", "--load_model_path=tuned", "--data_path=text.txt", cwd=tmp_path)
    assert 0 < json.loads(evaluated.splitlines()[-1])["loss"] < 10
