"""Every op beside its derivative."""
