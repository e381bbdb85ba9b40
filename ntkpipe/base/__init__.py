"""What everything rests on: errors, configuration, grid arithmetic, the operator protocol, progress."""
