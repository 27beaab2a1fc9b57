"""Adapters that are kept elsewhere: the Hugging Face Hub, S3-compatible buckets, OCI registries.

The owner's machine downloads them; the service opens no address. Each module imports the library of its extra when it
is used.
"""
