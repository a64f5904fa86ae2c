"""What proves the operations right, for this project's tests and for its users'."""
