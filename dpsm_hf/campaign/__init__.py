"""Campaigns: from one YAML file to runs, records, statistics, a verdict and a report.

Data flows one way: `loading` (YAML to a `design.Campaign`) → `running` (a process for each run) → `records` (one JSON
file a run) → `results` (figures at the points of the design) → `verdict` → `report`.
"""
