"""Backends, one a file. A file here that defines ``BACKEND`` (see ``inference/base.py``) is found and ranked by itself.

A backend imports optional packages inside `supports` and `prepare`, not at the top, so that all can be listed anywhere.
"""
