"""From files on S3 to packed token rows."""
