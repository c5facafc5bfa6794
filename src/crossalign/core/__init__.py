"""What every room uses and that knows none of them: errors, files, the machine, progress."""
