"""What a run or a plan shows to a person: rows for the terminal, Markdown for Prefect's pages."""
