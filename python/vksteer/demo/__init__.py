"""`python -m vksteer.demo`: the package at work on the bundled model and on real ones."""
