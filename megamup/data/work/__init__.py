"""How work on the input is divided among workers, and kept for the next run."""
