"""Pictures as rows of a prompt: decoded, cut up and embedded by libmtmd, and where they stand."""
