"""The runs of a campaign: launched, watched, pruned, recorded, and taken up again after any kill."""
