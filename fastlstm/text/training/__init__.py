"""What the training loop works with.

Request: what the user asked for, a Config and the flags that are no part of one (options.py).
Config: the options of one training run, as its config.json holds them (options.py).
Run: the files of a run's folder, written and read back (run.py).
Progress: where a run stands, as its checkpoints hold it (run.py).
Job: all of these, the model, the optimizer, the text and the team, ready for a step (job.py).
"""
