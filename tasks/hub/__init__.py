"""The Hugging Face Hub: revisions, downloads, staged publishing, rollback, and checks of published repos."""
