"""train.py's training alone in float64, where the order of sums hides nothing: torchrun ... -m tests.exact"""

from __future__ import annotations

import torch

from gpt.config import load_config
from gpt.distributed import Ranks, distributed, run_program
from gpt.model import GPT
from gpt.record import Run
from gpt.trainer import Trainer
from kernels import select


class Exact(Ranks):
    @property
    def dtype(self) -> torch.dtype:
        return torch.float64


def main(arguments: list[str]) -> int:
    config = load_config(arguments)
    with distributed("cpu") as found:
        ranks = Exact(found.rank, found.world_size, found.device)
        model = GPT(config, select("reference", ranks.device), ranks.dtype).initialise(config.seed).double()
        trainer = Trainer(model, config, Run.create(config, ranks), ranks, bytes_per_token=1.0)
        trainer.train(validate=None)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    run_program(main)
