"""Which replica gets which rows. Pure functions over immutable views."""
