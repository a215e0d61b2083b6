"""Expert arithmetic: the reference loop and faster backends that agree with it."""
