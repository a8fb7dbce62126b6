"""What the training loop works with; job.py says what a Job, a Run, a Request and Progress are."""
