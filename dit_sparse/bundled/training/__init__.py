"""What the trainings of the bundled models have in common."""
