"""The CPU's templates."""
