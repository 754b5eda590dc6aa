"""The configuration of a run: one frozen typed object, presets named for what they reproduce.

Every field is a command-line option (``--matrix-lr 0.02``) and an environment name (``MATRIX_LR=0.02``: the seed's own
names). Priority: option, environment, preset, the field's default. Source of the seed's values: pull request 1517 of
openai/parameter-golf.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

ROOT = Path(__file__).resolve().parent.parent
ARTIFACT_LIMIT = 16_000_000  # bytes, decimal, code included
BOS = 1  # token that every document starts with
# Settings that say where things are on one machine; neither fingerprint nor artifact holds them.
MACHINE = {"data_path", "tokenizer_path", "runs_path", "run_id", "device"}

# Names that the seed's script reads and for which only one value has a meaning here; any other value is refused.
SEED_ONLY = {
    "EMA_ENABLED": ("1", "the EMA is what is exported"),
    "TTT_ENABLED": ("0", "the seed's trains on the tokens it is scored on: --pre-quant validation --allow-leak"),
    "TIE_EMBEDDINGS": ("1", "the output head is always the embedding"),
    "LN_SCALE": ("1", "the 1/sqrt(layer+1) scale is always on"),
    "SWA_ENABLED": ("0", "the seed collects SWA snapshots and never uses them"),
    "LAWA_ENABLED": ("0", "weights are averaged by EMA"),
    "QAT_ENABLED": ("0", "the seed's QAT switch does nothing on banked weights"),
    "LATE_QAT_THRESHOLD": ("0", "the seed's QAT switch does nothing on banked weights"),
    "MTP_NUM_HEADS": ("0", "the seed's extra heads are in no optimizer"),
    "BIGRAM_VOCAB_SIZE": ("0", "there is no bigram embedding"),
    "VE_ENABLED": ("0", "there is no value embedding"),
    "DTG_ENABLED": ("0", "there is no token gate"),
    "GATED_ATTENTION": ("0", "attention has no gate"),
    "VALUE_RESIDUAL": ("0", "there is no value residual"),
}
SEED_RENAMED = {
    "XSA_LAST_N": "XSA is in all layers",
    "WARMDOWN_ITERS": "the warm-down is a fraction of the run: WARMDOWN_FRAC",
    "EMBED_CLIP_SIGMAS": "every row's clip follows from its share in the loss; --sdclip of quantize.py pack has both",
    "EMBED_LR": "the embedding is tied: TIED_EMBED_LR",
    "HEAD_LR": "the embedding is tied: TIED_EMBED_LR",
    "TARGET_MB": "the limit is 16,000,000 bytes, code included",
    "MUON_BETA2": "nothing uses it, in the seed neither",
}
# Names with these beginnings tune what the switch turns on: they may stand beside the switch turned off.
SEED_TUNING = {
    "TTT_": "TTT_ENABLED",
    "SWA_": "SWA_ENABLED",
    "LAWA_": "LAWA_ENABLED",
    "MTP_": "MTP_NUM_HEADS",
    "BIGRAM_": "BIGRAM_VOCAB_SIZE",
    "VE_": "VE_ENABLED",
}


class ConfigError(ValueError):
    """A setting is unknown, malformed or contradicts another; the message names it."""


def _layers(value: Any) -> Any:
    """`"3,4,5"` -> (3, 4, 5); an empty string -> ()."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


class Config(BaseModel):
    """All settings of a run. Frozen; printed at the start, stored in the run record and in the artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    preset: Literal["seed", "seed-first", "one-gpu", "sample"] = "seed"
    """What this configuration started from."""

    # Data.
    data_path: Path = Path("data/datasets/fineweb10B_sp8192")
    """Folder with fineweb_train_*.bin and fineweb_val_*.bin."""
    tokenizer_path: Path = Path("data/tokenizers/fineweb_8192_bpe.model")
    """SentencePiece model that the shards were encoded with."""
    train_order: Literal["shuffled", "sequential"] = "shuffled"
    """Rows in an order drawn from the seed, or the seed script's contiguous stream over the shards in name order."""
    document_mask: bool = True
    """Attention and smear stop at document borders (BOS). The seed's model crosses them."""

    # Model.
    vocab_size: int = Field(8192, ge=8, le=65536)
    num_layers: int = Field(11, ge=2)
    """Physical layers."""
    model_dim: int = Field(512, ge=8)
    num_heads: int = Field(8, ge=1)
    num_kv_heads: int = Field(4, ge=1)
    mlp_mult: int = Field(4, ge=1)
    rope_base: float = Field(10000.0, gt=1)
    rope_dims: int = Field(16, ge=4)
    """Rotated dimensions of each head."""
    logit_softcap: float = Field(30.0, gt=0)
    qk_gain_init: float = 5.25
    tied_embed_init_std: float = Field(0.005, gt=0)
    recur_layers: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_layers)] = (3, 4, 5)
    """Contiguous physical layers that are run a second time once recurrence is on; empty for none."""
    recur_start_step: int = Field(3000, ge=0)
    """First step that uses recurrence."""

    # Training.
    seed: int = Field(1337, ge=0, lt=2**63)
    train_seq_len: int = Field(2048, ge=2)
    train_batch_tokens: int = Field(786_432, ge=1)
    """Tokens of one optimizer step, all ranks together."""
    micro_batch_tokens: int = Field(98_304, ge=1)
    """At most so many tokens in one forward pass of one rank; gradients are accumulated over the rest."""
    iterations: int = Field(20_000, ge=0)
    """Most steps. Progress is the larger of step/iterations and seconds/cap."""
    max_wallclock_seconds: float = Field(595.0, ge=0)
    """Cap on training time, calibration for the quantiser included; 0 for none."""
    gptq_reserve_seconds: float = Field(6.0, ge=0)
    """Part of the cap kept for calibration; more where a trial of it in warm-up takes longer."""
    warmup_steps: int = Field(20, ge=0)
    """Steps before the clock starts, on random tokens, at each depth; weights and optimizer are restored."""
    warmdown_frac: float = Field(0.667, ge=0, le=1)
    """Last part of the run in which the learning rate falls linearly."""
    min_lr: float = Field(0.0, ge=0, le=1)
    """Floor of the learning-rate factor."""
    matrix_lr: float = Field(0.020, gt=0)
    muon_wd: float = Field(0.095, ge=0)
    muon_momentum: float = Field(0.99, ge=0, lt=1)
    muon_momentum_warmup_start: float = Field(0.92, ge=0, lt=1)
    muon_momentum_warmup_steps: int = Field(1500, ge=0)
    muon_backend_steps: int = Field(5, ge=1, le=12)
    """Newton-Schulz iterations."""
    muon_row_norm: bool = False
    """MuonEq-R: rows of the update are normalised before Newton-Schulz."""
    newton_schulz: Literal["classic", "polar-express"] = "classic"
    """Coefficients of the Newton-Schulz iteration."""
    tied_embed_lr: float = Field(0.035, gt=0)
    embed_wd: float = Field(0.085, ge=0)
    scalar_lr: float = Field(0.025, gt=0)
    adam_wd: float = Field(0.02, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    grad_clip_norm: float = Field(0.3, ge=0)
    """Largest norm of the averaged gradient; 0 for no clipping."""
    ema_decay: float = Field(0.9965, ge=0, lt=1)
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a gradient norm that is NaN or infinite does: stop the run, or skip the step, for which the host waits for
    every step's norm. Ten such steps in a row stop the run in any case."""

    # Fine-tuning of the averaged weights before they are quantised.
    pre_quant: Literal["none", "train", "validation"] = "none"
    """On rows at the end of the training stream, held out for it, or on the validation tokens, as the seed did: that
    leaks, wants allow_leak, and every result says so."""
    allow_leak: bool = False
    """Let a result be worthless: see pre_quant."""
    pre_quant_rows: int = Field(512, ge=1)
    """Rows of train_seq_len tokens that are held out. Fine-tuning is on the clock: training ends earlier by it."""
    pre_quant_epochs: int = Field(22, ge=1)
    pre_quant_lr: float = Field(2.5e-4, gt=0)
    pre_quant_soup: int = Field(1, ge=1)
    """Mean of so many fine-tuned models, each of a random 80% of the rows where there are several."""

    # Quantisation.
    matrix_clip_sigmas: float = Field(6.0, gt=0)
    """Median over the rows of matrices of scale / std(row) * 31; of one row it is what its share in the loss says.
    Raised by the packer until the artifact fits; the least sensible one, so that the artifact fills the limit."""
    gptq_calibration_batches: int = Field(32, ge=1)
    """Batches of micro_batch_tokens of training data behind the Hessians, all ranks together; the first row of each is
    behind the gradients."""

    # Scoring.
    eval_seq_len: int = Field(0, ge=0)
    """Context of scoring; 0 for train_seq_len."""
    eval_stride: int = Field(64, ge=1)
    val_batch_size: int = Field(98_304, ge=1)
    """Tokens in one forward pass of scoring, one rank."""
    val_loss_every: int = Field(1000, ge=0)
    """Steps between validations, outside the clock; 0 for none."""

    # Run.
    run_id: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")
    """Name of the run's folder; made from time, preset and seed where empty."""
    runs_path: Path = Path("runs")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    kernels: str = "auto"
    """reference, compiled or triton, with overrides by op: compiled,attention=triton or auto,mlp=fp8. auto: Triton on a
    GPU, reference on a CPU."""
    train_log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(1000, ge=0)
    """Steps between checkpoints; 0 for one at the end only."""

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return self.mlp_mult * self.model_dim

    @property
    def context(self) -> int:
        """Tokens of context in scoring."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def num_skips(self) -> int:
        """U-Net skip connections: as many as the first half of the physical layers has."""
        return self.num_layers // 2

    @property
    def leaking(self) -> bool:
        """Whether the weights have seen the tokens that they are scored on."""
        return self.pre_quant == "validation"

    @property
    def held_out_tokens(self) -> int:
        """Tokens at the end of the training stream that training does not see."""
        return self.pre_quant_rows * self.train_seq_len + 1 if self.pre_quant == "train" else 0

    def depth(self, recurrence: bool) -> tuple[int, ...]:
        """Physical index of each virtual layer."""
        layers = tuple(range(self.num_layers))
        if not recurrence or not self.recur_layers:
            return layers
        after = self.recur_layers[-1] + 1
        return layers[:after] + self.recur_layers + layers[after:]

    def depth_at(self, step: int) -> tuple[int, ...]:
        return self.depth(step >= self.recur_start_step)

    def accumulation(self, world_size: int) -> int:
        """Forward passes of one rank in one step; all of them together take the batch's rows, evenly but for one row.

        Raises ConfigError where there are more of them than rows.
        """
        rows = self.train_batch_tokens // self.train_seq_len
        accumulation = math.ceil(rows / (world_size * (self.micro_batch_tokens // self.train_seq_len)))
        if world_size * accumulation > rows:
            raise ConfigError(
                f"world size {world_size} is too large for the batch: train_batch_tokens={self.train_batch_tokens} is "
                f"{rows} rows of {self.train_seq_len}, found {world_size * accumulation} forward passes of at most "
                f"micro_batch_tokens={self.micro_batch_tokens}; wanted a row for each"
            )
        return accumulation

    def rows(self, rank: int, world_size: int, micro: int) -> tuple[int, int]:
        """First row of the batch, and the one after the last, that a rank takes in a micro-step."""
        rows, parts = self.train_batch_tokens // self.train_seq_len, self.accumulation(world_size) * world_size
        part = micro * world_size + rank
        return part * rows // parts, (part + 1) * rows // parts

    def fingerprint(self) -> str:
        """sha256 of the settings that define the model and its training; machine paths do not count."""
        portable = self.model_dump_json(exclude=MACHINE)
        return hashlib.sha256(portable.encode()).hexdigest()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        def want(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        want(
            self.model_dim % self.num_heads == 0,
            f"model_dim={self.model_dim} is not a multiple of num_heads={self.num_heads}",
        )
        want(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        want(
            self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim,
            f"rope_dims={self.rope_dims} has to be even and at most the head dimension {self.head_dim}",
        )
        want(
            self.train_batch_tokens % self.train_seq_len == 0,
            f"train_batch_tokens={self.train_batch_tokens} is not a multiple of train_seq_len={self.train_seq_len}",
        )
        want(
            self.micro_batch_tokens >= self.train_seq_len,
            f"micro_batch_tokens={self.micro_batch_tokens} is less than one row of {self.train_seq_len}",
        )
        first = self.recur_layers[0] if self.recur_layers else 0
        want(
            self.recur_layers == tuple(range(first, first + len(self.recur_layers))),
            f"recur_layers={self.recur_layers} has to be ascending and contiguous",
        )
        want(
            all(0 <= layer < self.num_layers for layer in self.recur_layers),
            f"recur_layers={self.recur_layers} names a layer outside 0..{self.num_layers - 1}",
        )
        want(
            self.eval_stride <= self.context, f"eval_stride={self.eval_stride} is more than the context {self.context}"
        )
        want(
            self.val_batch_size >= self.context,
            f"val_batch_size={self.val_batch_size} is less than one row of {self.context}",
        )
        want(
            self.pre_quant != "validation" or self.allow_leak,
            "pre_quant=validation trains on the tokens that are scored; wanted --allow-leak beside it",
        )
        want(
            self.max_wallclock_seconds == 0 or self.gptq_reserve_seconds < self.max_wallclock_seconds,
            f"gptq_reserve_seconds={self.gptq_reserve_seconds} leaves nothing of "
            f"max_wallclock_seconds={self.max_wallclock_seconds}",
        )
        return self


_SEED = {
    # Final settings of the pull request: unmasked, contiguous stream, recurrence from step 3000.
    "train_order": "sequential",
    "document_mask": False,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "seed": _SEED,
    # First settings of the pull request, as in its run command.
    "seed-first": _SEED
    | {"recur_start_step": 2000, "warmdown_frac": 0.72, "matrix_lr": 0.025, "matrix_clip_sigmas": 12.85},
    # The seed's final settings on one H100: one eighth of its batch, recurrence from step 2000.
    "one-gpu": _SEED | {"train_batch_tokens": 98_304, "max_wallclock_seconds": 600.0, "recur_start_step": 2000},
    # The text in data/sample; minutes on two CPU cores.
    "sample": {
        "data_path": ROOT / "data/sample",
        "tokenizer_path": ROOT / "data/sample/tokenizer.model",
        "vocab_size": 1024,
        "num_layers": 5,
        "model_dim": 192,
        "num_heads": 6,
        "num_kv_heads": 3,
        "recur_layers": (2,),
        "recur_start_step": 75,
        "train_seq_len": 512,
        "train_batch_tokens": 4096,
        "micro_batch_tokens": 4096,
        "val_batch_size": 8192,
        "iterations": 150,
        "max_wallclock_seconds": 250.0,
        "gptq_reserve_seconds": 10.0,
        "warmup_steps": 1,
        "muon_momentum": 0.95,
        "muon_momentum_warmup_start": 0.85,
        "muon_momentum_warmup_steps": 50,
        "muon_row_norm": True,
        "ema_decay": 0.95,
        "matrix_clip_sigmas": 12.85,
        "gptq_calibration_batches": 8,
        "eval_stride": 128,
        "val_loss_every": 75,
        "train_log_every": 10,
        "checkpoint_every": 50,
    },
}


class _Preset(BaseSettings):
    """The one setting that decides where the others start from."""

    model_config = SettingsConfigDict(cli_ignore_unknown_args=True, extra="ignore")
    preset: str = "seed"


class _Settings(Config, BaseSettings):
    """Every setting is an option here and, in capitals, a name in the environment. --resume RUN goes on with a run."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_implicit_flags=True, extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the command line is put before these by pydantic-settings


def _check_seed_names(environ: Mapping[str, str]) -> None:
    for name, (wanted, reason) in SEED_ONLY.items():
        found = environ.get(name, wanted)
        try:
            same = float(found) == float(wanted)
        except ValueError:
            same = False
        if not same:
            raise ConfigError(f"{name}={found}: {reason}; wanted {name}={wanted} or nothing")
    for name, reason in SEED_RENAMED.items():
        if name in environ:
            raise ConfigError(f"{name}={environ[name]}: {reason}")
    for beginning, switch in SEED_TUNING.items():
        for name in environ:
            if name.startswith(beginning) and name not in SEED_ONLY and switch not in environ:
                raise ConfigError(f"{name}={environ[name]}: {SEED_ONLY[switch][1]}; wanted {switch}=0 beside it")


def check_environment(config: Config) -> None:
    """Raises ConfigError where the environment sets anything else than `config` has: a resumed run keeps its own."""
    _check_seed_names(os.environ)
    try:
        found = _Settings(_cli_parse_args=[], **config.model_dump())  # type: ignore[call-arg]
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    for name in Config.model_fields:
        if getattr(found, name) != getattr(config, name):
            raise ConfigError(
                f"--resume takes the run's own {name}={getattr(config, name)}; the environment sets "
                f"{name.upper()}={getattr(found, name)}"
            )


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{name}={item['input']!r}: {message}" if name else message)
    return "; ".join(lines)


def build_config(**settings: Any) -> Config:
    """A Config from a preset and settings by name; the environment is not read.

    Raises ConfigError, naming each setting at fault and what was wanted.
    """
    preset = settings.get("preset", "seed")
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r}: wanted one of {', '.join(PRESETS)}")
    try:
        return Config(**{**PRESETS[preset], "preset": preset, **settings})
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None


def load_config(arguments: Sequence[str]) -> Config:
    """A Config from command-line arguments, the environment and a preset.

    Raises ConfigError for a malformed or contradictory setting; an unknown option ends the program with argparse's
    message, ``--help`` with the list of all settings.
    """
    _check_seed_names(os.environ)
    try:
        without_help = [argument for argument in arguments if argument not in ("-h", "--help")]
        preset = _Preset(_cli_parse_args=without_help).preset  # type: ignore[call-arg]
        if preset not in PRESETS:
            raise ConfigError(f"preset={preset!r}: wanted one of {', '.join(PRESETS)}")
        settings = _Settings(
            _cli_parse_args=list(arguments),  # type: ignore[call-arg]
            _cli_prog_name="train.py",
            **PRESETS[preset],
        )
        return Config(**{**settings.model_dump(), "preset": preset})
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None
