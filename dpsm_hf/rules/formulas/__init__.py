"""The scoring rules, one file each; `dpsm_hf.rules.registry` finds them."""
