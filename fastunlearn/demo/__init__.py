"""A tiny text-to-video model of coloured shapes, and the whole procedure that erases one shape from it."""
