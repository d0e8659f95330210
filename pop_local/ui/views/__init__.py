"""What a result looks like: tables, plots and words."""
