"""What lies on disk: run folders and the records in them."""
