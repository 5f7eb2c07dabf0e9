"""What trains groups: a job, the loop around it, its records, its processes."""
