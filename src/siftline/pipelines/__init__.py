"""What to run: jobs, schedules, sensors and the shipped recipes."""
