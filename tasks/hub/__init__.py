"""The Hugging Face Hub: revisions, files, the model card, staged publishing."""
