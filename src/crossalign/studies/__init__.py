"""Many runs: whole tables and searches."""
