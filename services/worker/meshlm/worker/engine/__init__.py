"""The engine process: schedule, run, sample, publish."""
