"""Campaigns: from one YAML file to runs, records, statistics, a verdict and a report.

Data flows one way: `spec` (YAML to a `design.Campaign`) → `runner` (a process and a JSON record for each run) →
`verdict` (figures at the points of the design, and what they say of each claim) → `report`.

- variation: one way to train, such as DPSM with a linear schedule; seeds repeat it.
- setting: what points share whose variation and seed alone differ: study, size, data, and what the study varies.
- point: one place in the plan, a variation with a seed in a setting. Points may share a run.
- run: one training, known by its id, a hash of everything that decides its numbers.
- rung: a share of the training steps at which successive halving compares the ablations and stops the worse ones.
"""
