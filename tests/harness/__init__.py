"""What the tests share: stores, training jobs, launched runs, faults, and how to wait for events."""
