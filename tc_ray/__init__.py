"""tc-ray: fine-tune language models that learn from their own mistakes, on Ray.

Importing this package imports neither torch nor ray; the subpackages do.
"""

__version__ = "0.1.0"
