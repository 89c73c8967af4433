"""What happened in a run: one record, its JSON, and how a terminal shows it."""
