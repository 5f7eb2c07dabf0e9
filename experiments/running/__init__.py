"""Training: a job, the driver of its loop, its records, its processes."""
