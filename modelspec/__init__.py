"""modelspec: a declarative model factory. See `modelspec.load`, `modelspec.plan`, `modelspec.build`."""
