"""What the records say of every claim: holds, fails, or cannot tell."""
