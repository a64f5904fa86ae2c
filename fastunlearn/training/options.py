"""The options of every phase, as data: the command line is made of them, and the phases take them.

A field's name is the option's, its metadata the help. Nothing heavy is imported here.
"""

from __future__ import annotations
