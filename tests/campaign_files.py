"""A small campaign's file, and every kind of mistake in it: what is edited, the line at fault, what is said."""

from __future__ import annotations

FILE = """\
name: try
title: A try
task: language-modelling
reference: ce
brier: brier
base:
  do_train: true
  do_eval: true
  do_predict: true
  fit_temperature: true
  dataset_name: python-docs
  max_steps: 10
  eval_strategy: steps
  eval_steps: 5
  alpha_warmup_steps: 0.1
variations:
  ce:
    title: Cross-entropy
    arguments: {loss_type: ce}
  brier:
    arguments: {loss_type: brier}
  dpsm:
    arguments: {loss_type: dpsm}
  late:
    role: ablation
    arguments: {loss_type: dpsm, alpha_schedule: late_linear}
  scaled:
    of: ce
sizes:
  tiny:
    arguments:
      model_type: gpt2
      config_overrides: n_embd=32,n_layer=1,n_head=2
      tokenizer_name: train-bpe
data:
  docs:
    arguments: {lowercase: false}
seeds: [1, 2]
studies:
  main:
    variations: all
  sweep:
    variations: [dpsm]
    grid:
      alpha_warmup_steps: [0.1, 0.2]
budget:
  limit: 1.2
  halving:
    metric: eval_nll
scales:
  small: {}
  paper:
    base: {max_steps: 1000}
    seeds: [1, 2, 3]
"""


def edit(old: str, new: str) -> str:
    """Return the file with one passage replaced."""
    assert FILE.count(old) == 1, old
    return FILE.replace(old, new)


# passage, what stands in its place, the line that is at fault, what is said about it
MISTAKES: list[tuple[str, str, str, str]] = [
    (
        "title: A try",
        "titel: A try",
        "titel: A try",
        "titel: 'titel' is not a key that is known here; did you mean title?",
    ),
    (
        "    role: ablation",
        "    rol: ablation",
        "rol: ablation",
        "variations.late.rol: 'rol' is not a key that is known here; did you mean role?",
    ),
    ("brier: brier\n", "", "name: try", "brier: is missing; give it"),
    (
        "    title: Cross-entropy\n",
        "    title: Cross-entropy\n    title: Again\n",
        "title: Again",
        "variations.ce.title: this key was given in line 18 already; keep one of the two",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: 10\n  max_steps: 20\n",
        "max_steps: 20",
        "base.max_steps: this key was given in line 12 already; keep one of the two",
    ),
    ("  late:\n", "  2024:\n", "2024:", "variations: the key 2024 is no text; put it in quotes"),
    (
        "  limit: 1.2\n",
        "  limits: 1.2\n",
        "limits: 1.2",
        "budget.limits: 'limits' is not a key that is known here; did you mean limit?",
    ),
    ("  paper:\n", "  papers:\n", "papers:", "scales.papers: 'papers' is not a scale; did you mean paper?"),
    (
        "    base: {max_steps: 1000}\n",
        "    variations: {}\n",
        "variations: {}",
        "scales.paper.variations: 'variations' is not a key that a scale may change; choose one of base",
    ),
    ("  small: {}\n", "", "scales:", "scales: has no small; add it, or take paper"),
    (
        "task: language-modelling",
        "task: translation",
        "task: translation",
        "task: 'translation' is not known; choose one of language-modelling, summarization",
    ),
    ("title: A try", "title: 5", "title: 5", "title: has a whole number where text belongs; put it in quotes"),
    (
        "seeds: [1, 2]\n",
        "seeds: [1, two]\n",
        "seeds: [1, two]",
        "seeds: has text ('two') where a whole number of at least 0 belongs",
    ),
    (
        "seeds: [1, 2]\n",
        "seeds: [1, 2.5]\n",
        "seeds: [1, 2.5]",
        "seeds: has a number (2.5) where a whole number of at least 0 belongs",
    ),
    (
        "seeds: [1, 2]\n",
        "seeds: [1, true]\n",
        "seeds: [1, true]",
        "seeds: has true or false (True) where a whole number of at least 0 belongs",
    ),
    ("seeds: [1, 2]\n", "seeds: 3\n", "seeds: 3", "seeds: has a whole number where a list belongs; write [ ... ]"),
    ("seeds: [1, 2]\n", "seeds: [1, 1]\n", "seeds: [1, 1]", "seeds: the seed 1 is there twice; keep one"),
    ("  limit: 1.2\n", "  limit: 0.5\n", "limit: 0.5", "budget.limit: is 0.5; give a number of at least 1"),
    (
        "    metric: eval_nll\n",
        "    metric: eval_nll\n    rungs: [0.5, 0.25]\n",
        "rungs: [0.5, 0.25]",
        "budget.halving.rungs: the shares must rise",
    ),
    (
        "    metric: eval_nll\n",
        "    metric: eval_nll\n    keep: 1.0\n",
        "keep: 1.0",
        "budget.halving.keep: is 1; give a number between 0 and 1",
    ),
    ("    metric: eval_nll\n", "    keep: 0.5\n", "halving:", "budget.halving.metric: is missing; give it"),
    (
        "data:\n  docs:\n    arguments: {lowercase: false}\n",
        "data: [docs]\n",
        "data: [docs]",
        "data: has a list where names with keys belong",
    ),
    (
        "budget:\n",
        "audit: {tokens: many}\nbudget:\n",
        "audit: {tokens: many}",
        "audit.tokens: has text ('many') where a whole number of at least 1 belongs",
    ),
    (
        "budget:\n",
        "track: [wandbb]\nbudget:\n",
        "track: [wandbb]",
        "track: 'wandbb' is not known; did you mean wandb?",
    ),
    (
        "  tiny:\n",
        "  tiny:\n    processes: 0\n",
        "processes: 0",
        "sizes.tiny.processes: has a whole number (0) where a whole number of at least 1 belongs",
    ),
    (
        "  max_steps: 10\n",
        "  max_stepz: 10\n",
        "max_stepz: 10",
        "base.max_stepz: 'max_stepz' is not an argument of the script; did you mean max_steps?",
    ),
    (
        "  max_steps: 10\n",
        "  warmup_ratio: 0.1\n",
        "warmup_ratio: 0.1",
        "base.warmup_ratio: this argument is gone from transformers 5; write --warmup_steps",
    ),
    (
        "  max_steps: 10\n",
        "  seed: 10\n",
        "seed: 10",
        "base.seed: the campaign sets this argument itself; leave it out: list seeds under seeds",
    ),
    (
        "  max_steps: 10\n",
        "  output_dir: out\n",
        "output_dir: out",
        "base.output_dir: the campaign sets this argument itself",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: ten\n",
        "max_steps: ten",
        "base.max_steps: text ('ten') where the script takes a whole number",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: 10.5\n",
        "max_steps: 10.5",
        "base.max_steps: a number (10.5) where the script takes a whole number",
    ),
    (
        "  do_eval: true\n",
        "  do_eval: 'yes'\n",
        "do_eval: 'yes'",
        "base.do_eval: text ('yes') where the script takes true or false",
    ),
    (
        "  eval_strategy: steps\n",
        "  eval_strategy: no\n",
        "eval_strategy: no",
        "base.eval_strategy: true or false (False) where the script takes",
    ),
    (
        "  eval_strategy: steps\n",
        "  eval_strategy: step\n",
        "eval_strategy: step",
        "base.eval_strategy: 'step' is not allowed; did you mean steps?",
    ),
    (
        "  max_steps: 10\n",
        "  lr_scheduler_type: cosin\n",
        "lr_scheduler_type: cosin",
        "base.lr_scheduler_type: 'cosin' is not allowed; did you mean cosine?",
    ),
    (
        "{loss_type: dpsm}\n",
        "{loss_type: dspm}\n",
        "arguments: {loss_type: dspm}",
        "variations.dpsm.arguments.loss_type: 'dspm' is not allowed; did you mean dpsm?",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: [10]\n",
        "max_steps: [10]",
        "base.max_steps: a list ([10]) where the script takes a whole number",
    ),
    (
        "  alpha_warmup_steps: 0.1\n",
        "  alpha_warmup_steps: .inf\n",
        "alpha_warmup_steps: .inf",
        "base.alpha_warmup_steps: .inf is no number to work with",
    ),
    (
        "alpha_schedule: late_linear",
        "alpha_schedule: late_linear, alpha_end: 1.5",
        "arguments: {loss_type: dpsm, alpha_schedule: late_linear, alpha_end: 1.5}",
        "variations.late.arguments.alpha_end: alpha=1.5 lies outside [0, 1]",
    ),
    (
        "alpha_schedule: late_linear",
        "alpha_schedule: late",
        "arguments: {loss_type: dpsm, alpha_schedule: late}",
        "variations.late.arguments.alpha_schedule: alpha_schedule='late' is unknown; choose one of",
    ),
    (
        "alpha_schedule: late_linear",
        "alpha_schedule: constant, alpha_hold: 0.5",
        "arguments: {loss_type: dpsm, alpha_schedule: constant, alpha_hold: 0.5}",
        "variations.late.arguments.alpha_hold: alpha_hold=0.5 has no effect on alpha_sch",
    ),
    (
        "{loss_type: brier}\n",
        "{loss_type: brier, focal_gamma: 1.0}\n",
        "arguments: {loss_type: brier, focal_gamma: 1.0}",
        "variations.brier.arguments.focal_gamma: focal_gamma=1.0 has no effect",
    ),
    (
        "n_layer=1",
        "n_layers=1",
        "config_overrides: n_embd=32,n_layers=1,n_head=2",
        "sizes.tiny.arguments.config_overrides: --config_overrides: a gpt2 configuration has no",
    ),
    (
        "model_type: gpt2",
        "model_type: gpt-2",
        "model_type: gpt-2",
        "sizes.tiny.arguments.model_type: --model_type 'gpt-2' is not a model type of transformers.",
    ),
    (
        "{lowercase: false}",
        "{train_file: /dev/null}",
        "arguments: {train_file: /dev/null}",
        "data.docs.arguments.train_file: --dataset_name python-docs and --train_file contradict each",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: 10\n  bf16: true\n  fp16: true\n",
        "fp16: true",
        "base.fp16: At most one of fp16 and bf16 can be True, but not both",
    ),
    (
        "  eval_steps: 5\n",
        "  eval_steps: 5\n  evaluate_best: true\n",
        "evaluate_best: true",
        "base.evaluate_best: --evaluate_best needs a checkpoint of every evaluation",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: 10\n  flip_steps: 0.5\n",
        "flip_steps: 0.5",
        "base.flip_steps: --flip_steps 0.5 has no effect without --flip_target_tokens",
    ),
    (
        "  max_steps: 10\n",
        "  max_steps: 10\n  calibration_bins: 7\n",
        "calibration_bins: 7",
        "base.calibration_bins: calibration_bins=7 does not divide",
    ),
    (
        "  do_train: true\n",
        "  do_train: false\n",
        "do_train: false",
        "base.do_train: do_train is off, so nothing is trained",
    ),
    ("  do_predict: true\n", "", "base:", "base: test_split is test, which needs do_predict"),
    (
        "  eval_strategy: steps\n",
        "  eval_strategy: epoch\n",
        "eval_strategy: epoch",
        "base.eval_strategy: budget.halving compares evaluations at equal steps",
    ),
    ("reference: ce\n", "reference: cee\n", "reference: cee", "reference: 'cee' is not a variation; did you mean ce?"),
    (
        "reference: ce\n",
        "reference: dpsm\n",
        "reference: dpsm",
        "reference: dpsm has loss_type dpsm; name a variation with loss_type ce",
    ),
    (
        "brier: brier\n",
        "brier: scaled\n",
        "brier: scaled",
        "brier: scaled reads ce; name a variation with loss_type brier",
    ),
    (
        "    of: ce\n",
        "    of: cf\n",
        "of: cf",
        "variations.scaled.of: 'cf' is not a variation with runs; choose one of ce, brier, dpsm, late",
    ),
    ("    of: ce\n", "    of: scaled\n", "of: scaled", "variations.scaled.of: 'scaled' is not a variation with runs"),
    (
        "    of: ce\n",
        "    of: ce\n    arguments: {weight_decay: 0.5}\n",
        "of: ce",
        "variations.scaled.of: contradicts arguments",
    ),
    (
        "  fit_temperature: true\n",
        "",
        "of: ce",
        "variations.scaled.of: reads figures after temperature scaling, but no temperature is fitted",
    ),
    (
        "    variations: [dpsm]\n",
        "    variations: [dpsmm]\n",
        "variations: [dpsmm]",
        "studies.sweep.variations: 'dpsmm' is not a variation, a role or all; did you mean dpsm?",
    ),
    (
        "    variations: [dpsm]\n",
        "    variations: [dpsm]\n    sizes: [small]\n",
        "sizes: [small]",
        "studies.sweep.sizes: 'small' is not a size; choose tiny",
    ),
    (
        "    variations: [dpsm]\n",
        "    variations: [dpsm]\n    data: [wiki]\n",
        "data: [wiki]",
        "studies.sweep.data: 'wiki' is not a data set; choose docs",
    ),
    (
        "    variations: [dpsm]\n",
        "    variations: [scaled]\n",
        "sweep:",
        "studies.sweep.variations: scaled reads the figures of ce, which is not among the variations;",
    ),
    (
        "    variations: [dpsm]\n",
        "    variations: []\n",
        "variations: []",
        "studies.sweep.variations: is an empty list; give at least one",
    ),
    ("    variations: [dpsm]\n", "", "sweep:", "studies.sweep.variations: is missing; give it"),
    (
        "[0.1, 0.2]",
        "[]",
        "alpha_warmup_steps: []",
        "studies.sweep.grid.alpha_warmup_steps: is an empty list; give at least one",
    ),
    (
        "[0.1, 0.2]",
        "[0.1, 1e-1]",
        "alpha_warmup_steps: [0.1, 1e-1]",
        "studies.sweep.grid.alpha_warmup_steps: 0.1 is there twice; keep one",
    ),
    (
        "[0.1, 0.2]",
        "0.1",
        "alpha_warmup_steps: 0.1",
        "studies.sweep.grid.alpha_warmup_steps: has a number where a list belongs",
    ),
    (
        "[0.1, 0.2]",
        "[0.1, -1]",
        "alpha_warmup_steps: [0.1, -1]",
        "studies.sweep.grid.alpha_warmup_steps: alpha_warmup_steps=-1.0 must be 0 or more",
    ),
    (
        "      alpha_warmup_steps: [",
        "      alpha_schedul: [",
        "alpha_schedul: [0.1, 0.2]",
        "studies.sweep.grid.alpha_schedul: 'alpha_schedul' is not an argument of the script; did you",
    ),
    (
        "      alpha_warmup_steps: [0.1, 0.2]",
        "      loss_type: [ce, brier]",
        "loss_type: [ce, brier]",
        "studies.sweep.grid.loss_type: the variation dpsm fixes this argument; leave it out, or say",
    ),
    (
        "    grid:\n",
        "    arguments: {alpha_warmup_steps: 0.3}\n    grid:\n",
        "arguments: {alpha_warmup_steps: 0.3}",
        "studies.sweep.arguments.alpha_warmup_steps: the grid of this study varies it; leave one of the",
    ),
    (
        "    grid:\n",
        "    replaces: [max_steps]\n    grid:\n",
        "sweep:",
        "studies.sweep.replaces: max_steps is neither in arguments nor in grid; leave it out",
    ),
    (
        "alpha_schedule: late_linear",
        "alpha_warmup_steps: 0.1",
        "late:",
        "variations.late: has the same arguments as dpsm, on top of the base",
    ),
    (
        "    arguments: {loss_type: brier}\n",
        "    arguments: {loss_type: ce, alpha_warmup_steps: 0.7}\n",
        "brier:",
        "variations.brier: has the same arguments as ce, on top of the base",
    ),
    (
        "{lowercase: false}",
        "{tokenizer_name: gpt2}",
        "arguments: {tokenizer_name: gpt2}",
        "data.docs.arguments.tokenizer_name: contradicts sizes.tiny.arguments.tokenizer_name in",
    ),
    ("  late:\n", "  all:\n", "all:", "variations.all: this name means a group; choose another"),
    ("  late:\n", "  a/b:\n", "a/b:", "variations: the name 'a/b' has a character of / , * in it; leave it out"),
    ("seeds: [1, 2]\n", "seeds: [1, 2\n", "studies:", "this is no valid YAML"),
    ("title: A try", "title: *nothing", "title: *nothing", "this is no valid YAML: found undefined alias 'nothing'"),
    ("  max_steps: 10\n", "\tmax_steps: 10\n", "max_steps: 10", "this is no valid YAML"),
    (
        "title: A try",
        "title: !!python/name:os.system",
        "title: !!python/name:os.system",
        "title: the tag tag:yaml.org,2002:python/name:os.system is not read; leave it out",
    ),
    (
        "  max_steps: 10\n",
        "  <<: {max_steps: 10}\n",
        "<<: {max_steps: 10}",
        "base: merge keys (<<) are not read; put what is shared into base",
    ),
    (
        "alpha_schedule: late_linear",
        "alpha_schedule: linear, label_smoothing_factor: 0",
        "late:",
        "variations.late: has the same arguments as dpsm, on top of the base",
    ),
]
