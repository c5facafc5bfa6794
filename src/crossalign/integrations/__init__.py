"""The regulariser in other people's trainers: Hugging Face Trainer and TRL's (``hf_trainer``), Lightning (``lightning``)."""
