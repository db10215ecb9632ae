"""What the two training scripts are made of: their arguments, set-up, and the run itself."""
