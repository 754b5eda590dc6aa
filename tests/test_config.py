"""Presets, environment names, options, and what is refused."""

from __future__ import annotations

import json

import pytest

from gpt.config import PRESETS, SEED_ONLY, Config, ConfigError, build_config, load_config

# The run command of pull request 1517, less its test-time training.
SEED_COMMAND = {
    "VOCAB_SIZE": "8192",
    "QK_GAIN_INIT": "5.25",
    "RECUR_LAYERS": "3,4,5",
    "RECUR_START_STEP": "2000",
    "MUON_WD": "0.095",
    "EMA_DECAY": "0.9965",
    "WARMDOWN_FRAC": "0.72",
    "TTT_ENABLED": "0",
    "SEED": "1337",
}


def test_the_seeds_command_sets_the_seeds_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SEED_COMMAND.items():
        monkeypatch.setenv(name, value)
    config = load_config([])
    assert (config.preset, config.vocab_size, config.recur_layers) == ("seed", 8192, (3, 4, 5))
    assert (config.recur_start_step, config.warmdown_frac, config.ema_decay) == (2000, 0.72, 0.9965)
    assert (config.train_batch_tokens, config.document_mask, config.train_order) == (786_432, False, "sequential")
    for world_size, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1), (3, 3), (5, 2), (7, 2)):
        assert config.accumulation(world_size) == accumulation


def test_options_go_before_environment_before_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATRIX_LR", "0.5")
    monkeypatch.setenv("PRESET", "seed-first")
    assert load_config([]).matrix_lr == 0.5
    config = load_config(["--matrix-lr", "0.25", "--preset=one-gpu", "--recur-layers", "3,4"])
    assert (config.matrix_lr, config.preset, config.recur_layers) == (0.25, "one-gpu", (3, 4))
    assert config.train_batch_tokens == 98_304
    assert load_config(["--recur-layers", ""]).recur_layers == ()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_frozen_and_survive_json(preset: str) -> None:
    config = build_config(preset=preset)
    assert config.preset == preset
    assert Config(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recur-layers", "3,5"], r"recur_layers=\(3, 5\).*contiguous"),
        (["--recur-layers", "10,11"], r"outside 0\.\.10"),
        (["--num-heads", "7"], "model_dim=512 is not a multiple of num_heads=7"),
        (["--num-kv-heads", "3"], "num_heads=8 is not a multiple of num_kv_heads=3"),
        (["--train-batch-tokens", "1000"], "train_batch_tokens=1000 is not a multiple of train_seq_len=2048"),
        (["--micro-batch-tokens", "1024"], "micro_batch_tokens=1024 is less than one row"),
        (["--eval-stride", "4096"], "eval_stride=4096 is more than the context 2048"),
        (["--gptq-reserve-seconds", "600"], "leaves nothing"),
        (["--rope-dims", "128"], "rope_dims=128"),
        (["--matrix-lr", "fast"], "matrix_lr='fast'"),
        (["--warmdown-frac", "1.5"], "warmdown_frac='1.5'"),
        (["--preset", "huge"], "preset='huge'.*one of seed, seed-first, one-gpu, sample"),
        (["--train-order", "random"], "train_order='random'"),
        (["--run-id", "../x"], "run_id"),
        (["--matrix-lr", "inf"], "matrix_lr='inf'"),
        (["--seed", "1e23"], "seed='1e23'"),
    ],
)
def test_contradictions_are_errors_that_name_the_setting(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(arguments)


def test_unknown_options_and_names_are_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_config(["--learning-rate", "3"])
    assert "--learning-rate" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="colour"):
        build_config(colour="red")
    monkeypatch.setenv("TTT_EPOCHS", "18")
    with pytest.raises(ConfigError, match=r"TTT_EPOCHS=18.*wanted TTT_ENABLED=0 beside it"):
        load_config([])
    monkeypatch.setenv("TTT_ENABLED", "0")
    load_config([])
    monkeypatch.delenv("TTT_ENABLED")
    monkeypatch.delenv("TTT_EPOCHS")
    for name, value in (("TTT_ENABLED", "1"), ("QAT_ENABLED", "1"), ("XSA_LAST_N", "4"), ("TARGET_MB", "15.9")):
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            load_config([])
        monkeypatch.delenv(name)
    for name, (value, _) in SEED_ONLY.items():
        monkeypatch.setenv(name, value)
    load_config([])


def test_switches_are_flags() -> None:
    assert load_config(["--document-mask"]).document_mask
    assert not load_config(["--preset", "sample", "--no-document-mask"]).document_mask


def test_a_world_size_with_more_parts_than_the_batch_has_rows_is_an_error() -> None:
    config = build_config(preset="seed")
    assert config.accumulation(384) == 1
    with pytest.raises(ConfigError, match=r"world size 400 is too large.*384 rows.*found 400 forward passes"):
        config.accumulation(400)
    with pytest.raises(ConfigError, match=r"world size 193 is too large.*384 rows.*found 386 forward passes"):
        config.model_copy(update={"micro_batch_tokens": 2048}).accumulation(193)


def test_the_fingerprint_knows_the_model_but_not_the_machine() -> None:
    config = build_config(preset="seed")
    moved = build_config(preset="seed", data_path="/elsewhere", runs_path="/tmp/x", run_id="a", device="cpu")
    assert config.fingerprint() == moved.fingerprint()
    assert config.fingerprint() != build_config(preset="seed", seed=1).fingerprint()
