"""What is shown: tables, figures, and a run's report as one file."""
