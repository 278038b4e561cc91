"""The Mistake Log: a Delta table of the Pilot's errors with one committer, many writers and pinned readers. No torch."""
