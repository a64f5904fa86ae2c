"""The tensor operations behind `fastunlearn.functional`: their definition, their torch backend, and what picks one."""
