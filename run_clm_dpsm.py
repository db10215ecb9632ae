#!/usr/bin/env python
"""Train and evaluate a causal language model, as `dpsm clm` does without a clone:

python run_clm_dpsm.py --help
accelerate launch run_clm_dpsm.py settings.yaml
"""

import sys

from dpsm_hf.runtime.mistakes import exit_status
from dpsm_hf.tasks import get_task

main = get_task("language-modelling").main


def _mp_fn(index: int) -> None:
    """Entry point of one TPU process under xla_spawn."""
    main()


if __name__ == "__main__":
    sys.exit(exit_status(main))
