"""FastRL's parts inside other people's libraries."""
