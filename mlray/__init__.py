"""mlray: one multilingual model for every market, from a corpus on S3 to an HTTP endpoint."""
