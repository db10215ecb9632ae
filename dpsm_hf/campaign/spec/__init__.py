"""What a campaign file says: its reader, the design it describes, and every mistake in it."""
