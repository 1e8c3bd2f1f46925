"""The ground: operations that know nothing of specs."""
